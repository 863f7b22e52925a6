"""Which keys a row draws at random: the semantics shared by random and bigbird.

block_size 1:  row i of query head h draws num_random keys, uniform with replacement, from 0..i (causal) or
               from 0..M-1.
block_size L:  all rows of query block b = i // L share num_random / L draws of whole key blocks, uniform with
               replacement, from the earlier blocks 0..b-1 (causal; block 0 draws none) or from all
               ceil(M / L) blocks; one list per key head.

A key drawn twice counts once. Draw t is keyed by (seed, layer, head, row or block, t), so it depends neither
on the chunk that asks nor on the batch around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.contract import Call
from kernels.math.rng import below, bits, fold

Ints = npt.NDArray[np.int64]
BlockSize = Literal[1, 32, 64, 128]
_ROWS, _BLOCKS = 0, 1


class RandomParams(Protocol):
    @property
    def num_random(self) -> int: ...
    @property
    def block_size(self) -> BlockSize: ...


def num_random_problem(num_random: int, block_size: int) -> str | None:
    """What is wrong with this pair of parameters, or None."""
    if block_size == 1:
        return "must lie in 1 .. 256 where block_size is 1" if not 1 <= num_random <= 256 else None
    if num_random % block_size or not block_size <= num_random <= 4096:
        return f"must be a multiple of block_size ({block_size}) in {block_size} .. 4096"
    return None


def row_draws(call: Call, num_heads: int, rows: Tensor, num_random: int, num_keys: int) -> Tensor:
    """Keys drawn by query rows (positions [R]) of every head: [H, R, num_random], repeats included."""
    bound = (rows + 1)[:, None] if call.causal else num_keys
    return below(_bits(call, _ROWS, num_heads, rows, num_random), bound)


def row_streams(layer: int, seeds: Sequence[int], num_heads: int, device: torch.device) -> Tensor:
    """The streams that rows of every head draw from, of sequences with these seeds: int64 [S, num_heads]."""
    return torch.stack([_head_streams(seed, layer, _ROWS, num_heads, device) for seed in seeds])


def block_draws(call: Call, num_key_heads: int, blocks: Tensor, num_draws: int, num_blocks: int) -> Tensor:
    """Key blocks drawn by query blocks [nb] for every key head: [Hk, nb, num_draws], repeats included, -1 for
    none.
    """
    drawn = _bits(call, _BLOCKS, num_key_heads, blocks, num_draws)
    if not call.causal:
        return below(drawn, num_blocks)
    return torch.where(blocks[:, None] > 0, below(drawn, blocks[:, None]), -1)


def draws_of_rows(
    layer: int, seeds: Sequence[int], rows: Ints, num_heads: int, num_draws: int, *, blocks: bool
) -> Ints:
    """What ``row_draws`` and, for ``blocks``, ``block_draws`` say of one causal row (or query block) of each
    of many sequences: seeds and rows [S] -> [S, num_heads, num_draws]."""
    kind = _BLOCKS if blocks else _ROWS
    streams = torch.stack(
        [_head_streams(seed, layer, kind, num_heads, torch.device("cpu")) for seed in seeds]
    )
    places = torch.from_numpy(rows)[:, None]
    drawn = bits(bits(streams, places)[..., None], torch.arange(num_draws))
    bound = places[..., None] if blocks else places[..., None] + 1
    drawn = torch.where(bound > 0, below(drawn, bound), -1)
    found: Ints = drawn.numpy()
    return found


def random_keep(
    call: Call, params: RandomParams, num_heads: int, num_key_heads: int, i: Tensor, j: Tensor
) -> Tensor:
    """The drawn pairs as booleans [H, N, M], for references: positions of rows i [N, 1], of keys j [1, M]."""
    num_keys, L = j.shape[1], params.block_size
    if L == 1:
        drawn = row_draws(call, num_heads, i[:, 0], params.num_random, num_keys)
        return torch.zeros(num_heads, len(i), num_keys, dtype=torch.bool, device=i.device).scatter_(
            2, drawn, True
        )
    drawn = block_draws(call, num_key_heads, i[:, 0] // L, params.num_random // L, -(-num_keys // L))
    keep = (drawn[..., None, :] == (j // L)[..., None]).any(-1)
    return keep.repeat_interleave(num_heads // num_key_heads, dim=0)


def _bits(call: Call, kind: int, num_heads: int, rows: Tensor, num_draws: int) -> Tensor:
    streams = _head_streams(call.seed, call.layer, kind, num_heads, rows.device)
    draws = torch.arange(num_draws, device=rows.device)
    return bits(bits(streams[:, None], rows)[..., None], draws)


@lru_cache(maxsize=1 << 13)
def _head_streams(seed: int, layer: int, kind: int, num_heads: int, device: torch.device) -> Tensor:
    return torch.tensor([fold(seed, layer, kind, head) for head in range(num_heads)], device=device)
