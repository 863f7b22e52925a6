"""FlexAttention's side of the bench: the same mask as the backend's, compiled by torch.compile.

A mask is given as FlexAttention wants it: blocks that hold a kept pair, those of them that are kept whole,
and the predicate on elements for the rest (``kernels.benchmarks.flex_masks``). Where nearly every block holds
a kept pair, FlexAttention would compute nearly everything, and the reason is told instead of a time. A
data-dependent choice is made beforehand: FlexAttention's time holds no selection.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from kernels.benchmarks.cases import Case
from kernels.benchmarks.flex_masks import Blocks, fixed_mask, listed_mask, why_no_mask
from kernels.benchmarks.inputs import Tensors
from kernels.registry import load

_MAX_BLOCKS_TOUCHED = 0.6


def runner(case: Case, x: Tensors) -> Callable[[], Tensor] | str:
    """A call that computes the case, or why there is none."""
    reason = why_no_mask(case)
    if reason:
        return reason
    select = load(case.backend).select
    blocks = fixed_mask(case) if select is None else listed_mask(case, select, x)
    if case.backend != "exact" and blocks.share_touched() > _MAX_BLOCKS_TOUCHED:
        return "most key blocks hold a kept pair"
    compiled, mask, grouped = _compiled(), block_mask(blocks, case), case.Hk != case.H
    return lambda: compiled(x.q, x.k, x.v, block_mask=mask, scale=case.scale, enable_gqa=grouped)


@cache
def _compiled() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 1024
    torch._dynamo.config.accumulated_recompile_limit = 4096
    return cast(Callable[..., Tensor], torch.compile(flex_attention, dynamic=False))


def block_mask(blocks: Blocks, case: Case) -> Any:
    """torch's BlockMask: lists of blocks kept in part and kept whole, per query head where they differ."""
    from torch.nn.attention.flex_attention import BlockMask

    (num_partial, partial), (num_whole, whole) = (
        _lists(chosen, case) for chosen in (blocks.touched & ~blocks.whole, blocks.whole)
    )
    return BlockMask.from_kv_blocks(
        num_partial,
        partial,
        num_whole,
        whole,
        BLOCK_SIZE=(blocks.query_block, blocks.key_block),
        mask_mod=blocks.keep,
        seq_lengths=(case.N, case.N),
    )


def _lists(chosen: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """Counts int32 [1, heads, query blocks] and indices int32 [1, heads, query blocks, key blocks]."""
    heads = chosen.shape[0]
    chosen = chosen.repeat_interleave(case.H // heads, 0) if heads > 1 else chosen
    order = torch.argsort(chosen.int(), dim=-1, descending=True, stable=True).int()
    return chosen.sum(-1).int()[None], order[None]
