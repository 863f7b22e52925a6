"""Random key blocks of a call's rows, added beside a base that may have parts of them.

Semantics in ``random_keys``. Blocks that share no pair with the base run as lists, whole; of the others the
pairs that the base has, or that lie behind the keys' end, are masked out. Plans are cached.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from kernels.math.accumulate import Accumulator
from kernels.math.block_lists import BlockLists
from kernels.math.block_sparse import add_block_lists
from kernels.math.cache import DRAWS
from kernels.math.dense import Mask, dense_part, make_mask
from kernels.math.merge import merge_into
from kernels.math.random_keys import RandomParams, block_draws
from kernels.math.spans import SpanPattern


@dataclass(frozen=True)
class PartialBlocks:
    """Blocks of which the base has a part, or that the keys end in: at most one key block ``keys[p]`` [P, L]
    for each query block ``query_block[p]`` of one key head, with its mask [P, 1, R, L].

    The query blocks are those of ``height`` rows from row ``row`` of the call on.
    """

    head: int
    row: int
    height: int
    query_block: Tensor
    keys: Tensor
    mask: Mask

    @property
    def nbytes(self) -> int:
        return self.query_block.nbytes + self.keys.nbytes + self.mask.nbytes


@dataclass(frozen=True)
class BlockPlan:
    """Whole blocks as lists per query block and key head; the others one by one, and how many of their pairs
    are kept and computed per query head of a group."""

    whole: BlockLists
    partial: tuple[PartialBlocks, ...]
    kept: int
    computed: int

    @property
    def nbytes(self) -> int:
        return self.whole.nbytes + sum(blocks.nbytes for blocks in self.partial)


def add_blocks(acc: Accumulator, params: RandomParams, base: SpanPattern) -> None:
    """Add the drawn blocks without the pairs that ``base`` has."""
    if acc.call.impl == "triton":
        from kernels._triton import random_blocks

        random_blocks.add_blocks(acc, params, base)
        return
    B, G = acc.q.shape[0], acc.q.shape[2]
    began = perf_counter()
    plan = _cached_plan(acc, params, base)
    acc.selection_s += perf_counter() - began
    for b in range(B):
        add_block_lists(acc, b, plan.whole)
        for blocks in plan.partial:
            _add_partial(acc, b, blocks)
    acc.complete(B * G * plan.kept, B * G * plan.computed)


def _cached_plan(acc: Accumulator, params: RandomParams, base: SpanPattern) -> BlockPlan:
    call, num_rows = acc.call, acc.q.shape[-2]
    num_keys = call.start + num_rows if call.causal else acc.k.shape[2]
    where = (call.seed, call.layer, call.causal, acc.k.shape[1], call.start, num_rows, num_keys)
    key = ("blocks", *where, params.num_random, params.block_size, base.key, acc.q.dtype, acc.q.device)
    return DRAWS.get(key, lambda: block_plan(acc, params, base, num_keys), from_second_use=True)


def _add_partial(acc: Accumulator, b: int, blocks: PartialBlocks) -> None:
    q, out, lse = (
        _query_blocks(x[b, blocks.head, :, blocks.row :], blocks) for x in (acc.q, acc.out, acc.lse)
    )
    k, v = (x[b, blocks.head][blocks.keys].unsqueeze(1) for x in (acc.k, acc.v))
    guard = not math.isfinite(float(k.sum(dtype=torch.float32)) + float(v.sum(dtype=torch.float32)))
    part, part_lse = dense_part(q.unsqueeze(1), k, v, acc.call.scale, mask=blocks.mask, guard=guard)
    merge_into(out, lse, part[:, 0], part_lse[:, 0])
    _put_query_blocks(acc.out[b, blocks.head, :, blocks.row :], blocks, out)
    _put_query_blocks(acc.lse[b, blocks.head, :, blocks.row :], blocks, lse)


def _query_blocks(rows: Tensor, blocks: PartialBlocks) -> Tensor:
    """A copy of the query blocks' rows: [P, G, R, ...] of [G, N, ...]."""
    return _by_block(rows, blocks)[blocks.query_block]


def _put_query_blocks(rows: Tensor, blocks: PartialBlocks, new: Tensor) -> None:
    _by_block(rows, blocks)[blocks.query_block] = new


def _by_block(rows: Tensor, blocks: PartialBlocks) -> Tensor:
    whole = rows.shape[1] // blocks.height * blocks.height
    return torch.unflatten(rows[:, :whole], 1, (-1, blocks.height)).transpose(0, 1)


def block_plan(acc: Accumulator, params: RandomParams, base: SpanPattern, num_keys: int) -> BlockPlan:
    """Draw, drop repeats and what ``base`` covers, and sort the rest into whole and partial blocks."""
    borders = [0]
    drawn, whole, partial = [], [], []
    kept = computed = 0
    for group in drawn_blocks(acc, params, base, num_keys):
        row, height = group.row, group.height
        borders += [row + height * (block + 1) for block in range(group.count)]
        drawn.append(group.drawn)
        whole.append(group.whole)
        for head in range(acc.k.shape[1]):
            blocks, more_kept = group.partial_blocks(head)
            partial += blocks
            kept += more_kept
            computed += sum(len(one.keys) for one in blocks) * height * params.block_size
    lists = _lists(np.concatenate(drawn, 1), np.concatenate(whole, 1), params.block_size, borders)
    return BlockPlan(lists, tuple(partial), kept, computed)


def drawn_blocks(
    acc: Accumulator, params: RandomParams, base: SpanPattern, num_keys: int
) -> list[DrawnBlocks]:
    """The draws of the call's query blocks, in runs of blocks of equal height."""
    rows = _block_rows(acc.call.start, acc.q.shape[-2], params.block_size)
    return [DrawnBlocks(acc, params, base, num_keys, *own) for own in rows]


def _lists(drawn: np.ndarray, whole: np.ndarray, block: int, borders: list[int]) -> BlockLists:
    """Lists of the draws [Hk, tiles, F] that are ``whole``."""
    ends = whole.sum(-1).cumsum().reshape(whole.shape[:2])
    begins = np.concatenate([[0], ends.flat[:-1]]).reshape(ends.shape)
    indptr = torch.from_numpy(np.concatenate([begins, ends[:, -1:]], 1))
    return BlockLists(block, tuple(borders), indptr, torch.from_numpy(drawn[whole]).int())


def _block_rows(start: int, num_rows: int, L: int) -> Iterator[tuple[int, int, int]]:
    """(row, height, count) of runs of query blocks of equal height: at most a cut one, the whole ones, a cut
    one.
    """
    stop = start + num_rows
    whole, end = min(-(-start // L) * L, stop), stop // L * L
    if whole > start:
        yield 0, whole - start, 1
    if end > whole:
        yield whole - start, L, (end - whole) // L
    if stop > max(end, whole):
        yield max(end, whole) - start, stop - max(end, whole), 1


class DrawnBlocks:
    """The draws ``drawn`` [Hk, count, F] of query blocks of equal height, sorted against the base: ``whole``
    and ``partial`` say which of them count in whole, and which in part."""

    def __init__(
        self,
        acc: Accumulator,
        params: RandomParams,
        base: SpanPattern,
        num_keys: int,
        row: int,
        height: int,
        count: int,
    ) -> None:
        self.row, self.height, self.count = row, height, count
        self.L, self.num_keys = params.block_size, num_keys
        self.dtype, self.device = acc.q.dtype, acc.q.device
        rows = np.arange(acc.call.start + row, acc.call.start + row + height * count, dtype=np.int64)
        blocks = torch.from_numpy(rows[::height] // self.L)
        num_draws, num_blocks = params.num_random // self.L, -(-num_keys // self.L)
        self.drawn = np.sort(
            block_draws(acc.call, acc.k.shape[1], blocks, num_draws, num_blocks).numpy(), axis=-1
        )
        self.lo, self.hi = [], []
        for span in base.spans(rows, num_keys):
            self.lo.append(span.lo.reshape(count, height))
            self.hi.append(span.hi.reshape(count, height))
        self.whole, self.partial = self._sorted_out()

    def _sorted_out(self) -> tuple[np.ndarray, np.ndarray]:
        """Which of the draws [Hk, count, F] count as whole blocks, and which in part."""
        fresh = self.drawn >= 0
        fresh[..., 1:] &= self.drawn[..., 1:] != self.drawn[..., :-1]
        first, stop = self.drawn * self.L, np.minimum(self.drawn * self.L + self.L, self.num_keys)
        touched, covered = self._against_base(first, stop)
        cut = stop - first < self.L
        return fresh & ~touched & ~cut, fresh & ~covered & (touched | cut)

    def _against_base(self, first: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Key blocks [Hk, count, F] that share a pair with the base, and those that lie in one span for every
        row.
        """
        touched, covered = np.zeros(first.shape, bool), np.zeros(first.shape, bool)
        for lo, hi in zip(self.lo, self.hi, strict=True):
            live = hi > lo
            low = np.where(live, lo, self.num_keys).min(1)[:, None]
            high = np.where(live, hi, 0).max(1)[:, None]
            touched |= (first < high) & (stop > low)
            covered |= (first >= lo.max(1)[:, None]) & (stop <= hi.min(1)[:, None])
        return touched, covered

    def partial_blocks(self, head: int) -> tuple[list[PartialBlocks], int]:
        """One key head's in rounds of at most one per query block, and the pairs they keep."""
        rounds, kept = [], 0
        partial, drawn = self.partial[head], self.drawn[head]
        turn = np.cumsum(partial, axis=1) - 1
        for number in range(int(partial.sum(1).max())):
            query_block, slot = np.nonzero(partial & (turn == number))
            key_block = drawn[query_block, slot]
            keep = self.keep(query_block, key_block)
            kept += int(keep.sum())
            keys = np.minimum(key_block[:, None] * self.L + np.arange(self.L), self.num_keys - 1)
            rounds.append(
                PartialBlocks(
                    head,
                    self.row,
                    self.height,
                    torch.from_numpy(query_block).to(self.device),
                    torch.from_numpy(keys).to(self.device),
                    make_mask(torch.from_numpy(keep[:, None]).to(self.device), self.dtype),
                )
            )
        return rounds, kept

    def keep(self, query_block: np.ndarray, key_block: np.ndarray) -> np.ndarray:
        """Pairs [P, R, L] of those blocks that exist and that the base does not have."""
        j = (key_block[:, None] * self.L + np.arange(self.L))[:, None]
        keep = np.broadcast_to(j < self.num_keys, (len(key_block), self.height, self.L)).copy()
        for lo, hi in zip(self.lo, self.hi, strict=True):
            keep &= (j < lo[query_block][..., None]) | (j >= hi[query_block][..., None])
        return keep
