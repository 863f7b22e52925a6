"""Random key blocks of a call's rows as lists for the block-sparse kernel: whole blocks as full entries,
those that a base has a part of, or that the keys end in, as entries under masks. One launch for all heads.

Draws and what of them is whole are ``kernels.math.random_blocks``'s; equal masks are kept once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels._triton.block_sparse import Lists, Tiles, launch_on, tile_rows
from kernels._triton.operands import keys_of_call
from kernels._triton.spans import Bits, indptr_of, packed_bits
from kernels._triton.targets import target_of
from kernels.math.accumulate import Accumulator
from kernels.math.cache import DRAWS
from kernels.math.random_blocks import DrawnBlocks, drawn_blocks
from kernels.math.random_keys import RandomParams
from kernels.math.spans import Ints, SpanPattern


@dataclass(frozen=True)
class RandomTables:
    """Ready to launch for any batch entry; pairs over all key heads, per query head of a group."""

    tiles: Tiles
    lists: Lists
    kept: int
    computed: int

    @property
    def nbytes(self) -> int:
        tables = (x for x in vars(self.lists).values() if isinstance(x, Tensor))
        return self.tiles.table.nbytes + sum(table.nbytes for table in tables)


def add_blocks(acc: Accumulator, params: RandomParams, base: SpanPattern) -> None:
    """Add the drawn blocks without the pairs that ``base`` has."""
    began = perf_counter()
    tables = _cached(acc, params, base)
    acc.selection_s += perf_counter() - began
    B, G = acc.q.shape[0], acc.q.shape[2]
    for b in range(B):
        one = slice(b, b + 1)
        keys = keys_of_call(acc.k[one], acc.v[one], acc.call)
        rows = acc.q[one], acc.out[one], acc.lse[one]
        launch_on(*rows, keys, tables.tiles, tables.lists, scale=acc.call.scale, filled=acc.filled).run()
    acc.complete(B * G * tables.kept, B * G * tables.computed)


def _cached(acc: Accumulator, params: RandomParams, base: SpanPattern) -> RandomTables:
    call, (_, num_key_heads, group, num_rows, _) = acc.call, acc.q.shape
    num_keys = call.start + num_rows if call.causal else acc.k.shape[2]
    width = max(acc.k.shape[-1], acc.v.shape[-1])
    height = tile_rows(target_of(acc.q.device), acc.q.dtype, width, group)
    where = (call.seed, call.layer, call.causal, num_key_heads, call.start, num_rows, num_keys)
    key = ("block tables", *where, params.num_random, params.block_size, base.key, height, acc.q.device)
    return DRAWS.get(key, lambda: _tables(acc, params, base, num_keys, height), from_second_use=True)


def _tables(
    acc: Accumulator, params: RandomParams, base: SpanPattern, num_keys: int, height: int
) -> RandomTables:
    L, height = params.block_size, min(height, params.block_size)
    groups = drawn_blocks(acc, params, base, num_keys)
    heights = np.concatenate([np.full(group.count, group.height) for group in groups])
    first = np.concatenate([group.row + np.arange(group.count) * group.height for group in groups])
    drawn, whole = (np.concatenate([getattr(g, name) for g in groups], 1) for name in ("drawn", "whole"))
    num_full = whole.sum(-1)
    tiles = _cut(first, heights, height)
    num_masked, masked, masks, kept = _masked(groups, tiles[:, 3], height, L)
    weight = num_full[:, tiles[:, 3]] + num_masked

    def put(array: npt.NDArray[np.generic]) -> Tensor:
        told = torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32))
        return told.to(acc.q.device, non_blocking=True)

    lists = Lists(
        L,
        full_indptr=put(indptr_of(num_full)),
        full=put(np.stack([drawn[whole] * L, np.ones_like(drawn[whole])], 1)),
        masked_indptr=put(indptr_of(num_masked)),
        masked=put(masked),
        masks=put(masks),
        order=put(np.argsort(-weight, axis=1, kind="stable")),
        whole=True,
    )
    pairs = int((num_full * heights).sum()) * L
    computed = pairs + int((num_masked * tiles[:, 1]).sum()) * L
    return RandomTables(Tiles(height, put(tiles)), lists, pairs + kept, computed)


def _cut(first: Ints, heights: Ints, height: int) -> Ints:
    """Query blocks cut into kernel tiles: (first row, rows, sequence 0, query block) [T, 4]."""
    pieces = -(-heights // height)
    block = np.repeat(np.arange(len(heights)), pieces)
    row = first[block] + (np.arange(len(block)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * height
    num = np.minimum(first[block] + heights[block] - row, height)
    return np.stack([row, num, np.zeros_like(row), block], 1)


def _masked(
    groups: Sequence[DrawnBlocks], tile_block: Ints, height: int, L: int
) -> tuple[Ints, Ints, Bits, int]:
    """Blocks of which the base has a part, for every head and kernel tile: how many [Hk, T], (first key,
    step, mask) one by one, the masks, and how many pairs are kept."""
    num_heads = len(groups[0].drawn)
    places, keeps, kept, before = [], [], 0, 0
    for group in groups:
        for head in range(num_heads):
            query_block, slot = np.nonzero(group.partial[head])
            key_block = group.drawn[head][query_block, slot]
            keep = group.keep(query_block, key_block)
            kept += int(keep.sum())
            for piece in range(-(-group.height // height)):
                part = keep[:, piece * height : (piece + 1) * height]
                tile = np.searchsorted(tile_block, query_block + before) + piece
                places.append(np.stack([np.full_like(tile, head), tile, key_block * L], 1))
                keeps.append(np.pad(part, ((0, 0), (0, height - part.shape[1]), (0, 0))))
        before += group.count
    place, keep = np.concatenate(places), np.concatenate(keeps)
    some = keep.any((1, 2))
    place, keep = place[some], keep[some]
    masks, number = _distinct(packed_bits(keep))
    order = np.lexsort((place[:, 2], place[:, 1], place[:, 0]))
    entries = np.stack([place[:, 2], np.ones(len(place), np.int64), number], 1)[order]
    T = len(tile_block)
    num = np.bincount(place[:, 0] * T + place[:, 1], minlength=num_heads * T).reshape(num_heads, T)
    return num, entries, masks, kept


def _distinct(bits: Bits) -> tuple[Bits, Ints]:
    """Masks [n, rows, words], each once, and the number of each."""
    masks, number = np.unique(bits, axis=0, return_inverse=True)
    return masks, number.reshape(-1)
