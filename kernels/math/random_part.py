"""The random part of a pattern, added to rows that may hold another part: random and bigbird.

Semantics in ``random_keys``. Pairs that the other part (``base``, spans) has are left out, so each counts
once. Draws are made in tiles at absolute rows and cached; one row (decode) draws its own and gathers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from kernels.contract import Call
from kernels.math.accumulate import Accumulator
from kernels.math.block_sparse import BlockLists, PartialBlocks, add_block_lists, key_blocks
from kernels.math.cache import DRAWS
from kernels.math.dense import make_mask
from kernels.math.edges import attend_edges, attend_row_edges
from kernels.math.random_keys import RandomParams, block_draws, row_draws
from kernels.math.spans import Span, SpanPattern

EDGE_ROWS = 8192
DRAWS_AT_ONCE = 1 << 15


def add_random(acc: Accumulator, params: RandomParams, base: SpanPattern | None) -> None:
    """Add the drawn keys that ``base`` does not have. Without a base every row also keeps itself
    (block_size 1 only: whole blocks need a base that has the row itself, added before)."""
    if acc.q.shape[-2] == 1:
        _add_row(acc, params, base)
    elif params.block_size == 1:
        _add_edges(acc, params.num_random, base)
    else:
        assert base is not None and acc.filled
        _add_blocks(acc, params, base)


@dataclass(frozen=True)
class EdgeTile:
    """Keys of some rows of every head: edges int32 [H, R, E] ascending, ``drop`` [H, R, E] where one does not
    count.
    """

    edges: Tensor
    drop: Tensor
    kept: int

    @property
    def nbytes(self) -> int:
        return self.edges.nbytes + self.drop.nbytes


def edge_tile(
    call: Call, num_heads: int, rows: Tensor, num_keys: int, num_random: int, base: SpanPattern | None
) -> EdgeTile:
    """The edges of query rows at positions ``rows`` [R]."""
    shape = (num_heads, len(rows), num_random + (base is None))
    edges = torch.empty(shape, dtype=torch.int32, device=rows.device)
    drop = torch.zeros(shape, dtype=torch.bool, device=rows.device)
    step = max(1, DRAWS_AT_ONCE // (num_heads * num_random))
    for a in range(0, len(rows), step):
        some = slice(a, a + step)
        _draw(edges[:, some], drop[:, some], call, rows[some], num_keys, num_random, base)
    return EdgeTile(edges, drop, drop.numel() - int(drop.sum()))


def _draw(
    edges: Tensor,
    drop: Tensor,
    call: Call,
    rows: Tensor,
    num_keys: int,
    num_random: int,
    base: SpanPattern | None,
) -> None:
    """Fill the edges of a few rows, ascending, and mark repeats and what the base has."""
    edges[..., :num_random] = row_draws(call, len(edges), rows, num_random, num_keys)
    edges[..., num_random:] = rows[:, None]
    edges.copy_(_sorted(edges))
    drop[..., 1:] = edges[..., 1:] == edges[..., :-1]
    for span in _spans(base, rows, num_keys):
        lo, hi = (_like(bound, edges)[:, None] for bound in (span.lo, span.hi))
        drop |= (edges >= lo) & (edges < hi)


def _add_edges(acc: Accumulator, num_random: int, base: SpanPattern | None) -> None:
    call, B, G = acc.call, acc.q.shape[0], acc.q.shape[2]
    kept = computed = 0
    sources = [
        [(_dense(k, acc.q), _dense(v, acc.q)) for k, v in zip(acc.k[b], acc.v[b], strict=True)]
        for b in range(B)
    ]
    for rows in _edge_rows(call.start, acc.q.shape[-2]):
        tile = _cached_tile(acc, rows, num_random, base)
        kept, computed = kept + B * tile.kept, computed + B * tile.edges.numel()
        for b in range(B):
            for h in range(tile.edges.shape[0]):
                q = acc.q[b, h // G, h % G, rows]
                part, lse = attend_edges(q, *sources[b][h // G], tile.edges[h], tile.drop[h], call.scale)
                acc.put_into(acc.out[b, h // G, h % G, rows], acc.lse[b, h // G, h % G, rows], part, lse)
    acc.complete(kept, computed)


def _cached_tile(acc: Accumulator, rows: slice, num_random: int, base: SpanPattern | None) -> EdgeTile:
    began = perf_counter()
    call, num_heads, device = acc.call, acc.q.shape[1] * acc.q.shape[2], acc.q.device
    first, stop = call.start + rows.start, call.start + rows.stop
    num_keys = stop if call.causal else acc.k.shape[2]
    key = ("edges", call.seed, call.layer, call.causal, num_heads, first, stop, num_keys, num_random)
    tile = DRAWS.get(
        (*key, base and base.key, device),
        lambda: edge_tile(
            call, num_heads, torch.arange(first, stop, device=device), num_keys, num_random, base
        ),
    )
    acc.selection_s += perf_counter() - began
    return tile


def _edge_rows(start: int, num_rows: int) -> Iterator[slice]:
    first = start // EDGE_ROWS * EDGE_ROWS
    for a in range(first, start + num_rows, EDGE_ROWS):
        yield slice(max(a, start) - start, min(a + EDGE_ROWS, start + num_rows) - start)


def _dense(keys: Tensor, q: Tensor) -> Tensor:
    return keys.to(q.dtype).contiguous()


def _sorted(drawn: Tensor) -> Tensor:
    """Ascending along the last dimension. numpy sorts short integer rows several times faster than torch on a
    CPU.
    """
    if drawn.device.type != "cpu":
        return drawn.sort(-1).values
    return torch.from_numpy(np.sort(drawn.numpy(), axis=-1))


def _spans(base: SpanPattern | None, rows: Tensor, num_keys: int) -> Sequence[Span]:
    return () if base is None else base.spans(rows.cpu().numpy(), num_keys)


def _like(bound: np.ndarray[tuple[int, ...], np.dtype[np.int64]], edges: Tensor) -> Tensor:
    return torch.from_numpy(bound).to(edges.device, edges.dtype)


def _add_row(acc: Accumulator, params: RandomParams, base: SpanPattern | None) -> None:
    began = perf_counter()
    call, device = acc.call, acc.q.device
    B, Hk, G, _, D = acc.q.shape
    per_query_head = params.block_size == 1
    if per_query_head:
        rows = torch.tensor([call.start], device=device)
        tile = edge_tile(
            call, Hk * G, rows, call.start + 1 if call.causal else acc.k.shape[2], params.num_random, base
        )
        edges, drop, kept = tile.edges[:, 0].long(), tile.drop[:, 0], tile.kept
        head = torch.arange(Hk, device=device).repeat_interleave(G)
    else:
        edges, drop = _row_blocks(acc, params, base)
        kept = G * (drop.numel() - int(drop.sum()))
        head = torch.arange(Hk, device=device)
    acc.selection_s += perf_counter() - began
    for b in range(B):
        q = acc.q[b].reshape(len(head), -1, D)
        out, lse = attend_row_edges(q, acc.k[b], acc.v[b], head, edges, drop, call.scale)
        acc.put_into(acc.out[b], acc.lse[b], out.view(Hk, G, 1, -1), lse.view(Hk, G, 1))
    acc.complete(B * kept, B * edges.numel() * (1 if per_query_head else G))


def _row_blocks(acc: Accumulator, params: RandomParams, base: SpanPattern | None) -> tuple[Tensor, Tensor]:
    """The keys [Hk, P] in the blocks drawn by a single row, and which of them do not count."""
    call, L, device, num_keys = acc.call, params.block_size, acc.q.device, acc.k.shape[2]
    own = torch.tensor([call.start // L], device=device)
    drawn = (
        block_draws(call, acc.k.shape[1], own, params.num_random // L, -(-num_keys // L))[:, 0]
        .sort(-1)
        .values
    )
    repeat = torch.zeros_like(drawn, dtype=torch.bool)
    repeat[:, 1:] = drawn[:, 1:] == drawn[:, :-1]
    repeat |= drawn < 0
    edges = (drawn[..., None] * L + torch.arange(L, device=device)).flatten(1)
    drop = repeat.repeat_interleave(L, 1) | (edges >= num_keys)
    for span in _spans(base, torch.tensor([call.start]), num_keys):
        drop |= (edges >= int(span.lo[0])) & (edges < int(span.hi[0]))
    return edges.clamp(0, num_keys - 1), drop


@dataclass(frozen=True)
class BlockPlan:
    """The lists of every key head, one or more groups of query blocks each; pair counts per query head of the
    sum.
    """

    lists: tuple[tuple[BlockLists, ...], ...]
    kept: int
    computed: int

    @property
    def nbytes(self) -> int:
        return sum(group.nbytes for groups in self.lists for group in groups)


def _add_blocks(acc: Accumulator, params: RandomParams, base: SpanPattern) -> None:
    call, L = acc.call, params.block_size
    B, Hk, G, num_rows, _ = acc.q.shape
    began = perf_counter()
    num_keys = call.start + num_rows if call.causal else acc.k.shape[2]
    key = (
        "blocks",
        call.seed,
        call.layer,
        call.causal,
        Hk,
        call.start,
        num_rows,
        num_keys,
        params.num_random,
        L,
    )
    place = (acc.q.dtype, acc.q.device)
    plan = DRAWS.get((*key, base.key, place), lambda: block_plan(acc, params, base, num_keys))
    acc.selection_s += perf_counter() - began
    for b in range(B):
        for head in range(Hk):
            k, v = (key_blocks(x[b, head, :num_keys], L, acc.q.dtype) for x in (acc.k, acc.v))
            guard = not math.isfinite(float(k.sum()) + float(v.sum()))
            for lists in plan.lists[head]:
                add_block_lists(acc, b, head, k, v, lists, guard)
    acc.complete(B * G * plan.kept, B * G * plan.computed)


def block_plan(acc: Accumulator, params: RandomParams, base: SpanPattern, num_keys: int) -> BlockPlan:
    """Draw, drop repeats and what ``base`` covers, and sort the rest into full and partial blocks."""
    lists: list[tuple[BlockLists, ...]] = [() for _ in range(acc.k.shape[1])]
    kept = computed = 0
    for row, height, count in _block_rows(acc.call.start, acc.q.shape[-2], params.block_size):
        group = _Group(acc, params, base, num_keys, row, height, count)
        for head in range(acc.k.shape[1]):
            one, more_kept, more_computed = group.lists(head)
            lists[head] = (*lists[head], one)
            kept, computed = kept + more_kept, computed + more_computed
    return BlockPlan(tuple(lists), kept, computed)


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


class _Group:
    """Query blocks of equal height, sorted against the base."""

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

    def lists(self, head: int) -> tuple[BlockLists, int, int]:
        """The lists of one key head, and the pairs kept and computed per query head."""
        drawn = self.drawn[head]
        fresh = drawn >= 0
        fresh[:, 1:] &= drawn[:, 1:] != drawn[:, :-1]
        first, stop = drawn * self.L, np.minimum(drawn * self.L + self.L, self.num_keys)
        touched, covered = self._against_base(first, stop)
        cut = stop - first < self.L
        full = fresh & ~touched & ~cut
        partial = fresh & ~covered & (touched | cut)
        num_full = full.sum(1)
        F_ = int(num_full.max())
        order = np.argsort(~full, axis=1, kind="stable")[:, :F_]
        packed = np.maximum(np.take_along_axis(drawn, order, 1), 0)
        parts, partial_kept = self._partial(drawn, partial)
        kept = int(num_full.sum()) * self.height * self.L + partial_kept
        computed = (self.count * F_ + int(partial.sum())) * self.height * self.L
        on = self.device
        lists = BlockLists(
            self.row,
            self.height,
            self.count,
            torch.from_numpy(packed).to(on),
            torch.from_numpy(num_full).to(on),
            parts,
        )
        return lists, kept, computed

    def _against_base(self, first: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Key blocks [count, F] that share a pair with the base, and those that lie in one span for every
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

    def _partial(self, drawn: np.ndarray, partial: np.ndarray) -> tuple[tuple[PartialBlocks, ...], int]:
        """Partial blocks in rounds of at most one per query block, with masks; and the pairs they keep."""
        rounds, kept = [], 0
        turn = np.cumsum(partial, axis=1) - 1
        for number in range(int(partial.sum(1).max())):
            query_block, slot = np.nonzero(partial & (turn == number))
            keep = self._keep(query_block, drawn[query_block, slot])
            kept += int(keep.sum())
            mask = make_mask(torch.from_numpy(keep[:, None]).to(self.device), self.dtype)
            rounds.append(
                PartialBlocks(
                    torch.from_numpy(query_block).to(self.device),
                    torch.from_numpy(drawn[query_block, slot]).to(self.device),
                    mask,
                )
            )
        return tuple(rounds), kept

    def _keep(self, query_block: np.ndarray, key_block: np.ndarray) -> np.ndarray:
        """Pairs [P, R, L] of those blocks that exist and that the base does not have."""
        j = (key_block[:, None] * self.L + np.arange(self.L))[:, None]
        keep = np.broadcast_to(j < self.num_keys, (len(key_block), self.height, self.L)).copy()
        for lo, hi in zip(self.lo, self.hi, strict=True):
            keep &= (j < lo[query_block][..., None]) | (j >= hi[query_block][..., None])
        return keep
