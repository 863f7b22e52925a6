"""Yun et al.'s three ways to combine p patterns A^0 .. A^(p-1) (arXiv 2006.04862, section 3).

union: every layer and head keeps the union. multihead: query head h keeps A^(h mod p). sequential: layer t
keeps A^(t mod p), t counting the layers to which the choice applies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from kernels.math.accumulate import Accumulator

Combine = Literal["union", "multihead", "sequential"]
AddPart = Callable[[Accumulator], None]


def combined_keep(patterns: Sequence[Tensor], combine: Combine, num_heads: int, layer: int) -> Tensor:
    """Masks [N, M] of the patterns as one mask [H, N, M]: the definition."""
    if combine == "union":
        return torch.stack(list(patterns)).any(0).expand(num_heads, *patterns[0].shape)
    if combine == "sequential":
        return patterns[layer % len(patterns)].expand(num_heads, *patterns[0].shape)
    return torch.stack([patterns[head % len(patterns)] for head in range(num_heads)])


def add_combined(acc: Accumulator, combine: Combine, union: AddPart, patterns: Sequence[AddPart]) -> None:
    """The same, computed: ``union`` and ``patterns`` add a pattern to the heads they are given."""
    if combine == "union":
        union(acc)
    elif combine == "sequential":
        patterns[acc.call.layer % len(patterns)](acc)
    else:
        _by_head(acc, patterns)


def _by_head(acc: Accumulator, patterns: Sequence[AddPart]) -> None:
    kept = computed = 0
    for turn, add in enumerate(patterns):
        for key_heads, group in heads_of_turn(acc.q.shape[1], acc.q.shape[2], turn, len(patterns)):
            share = acc.heads(key_heads, group)
            add(share)
            kept, computed = kept + share.kept, computed + share.computed
            acc.selection_s += share.selection_s
    acc.complete(kept, computed)


def heads_of_turn(num_key_heads: int, group: int, turn: int, turns: int) -> Iterator[tuple[slice, slice]]:
    """The query heads h = hk * G + g with h mod turns = turn, as slices over hk and g that are views."""
    for first in range(min(turns, num_key_heads)):
        member = (turn - first * group) % turns
        if member < group:
            yield slice(first, None, turns), slice(member, None, turns)
