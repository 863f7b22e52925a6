"""Softmax attention of query tiles over lists of whole key blocks: the computation below every block-sparse
backend.

    out_i = softmax(scale * q_i [K_(c_1) | K_(c_2) | ...]^T) [V_(c_1); V_(c_2); ...],   c = list of i's tile

Cost: 4 D FLOP per row and listed key; memory: ``PANEL_BYTES`` of keys and values, or one list's. What
neighbouring tiles have in common is attended to by all their rows at once (``block_common``). Every list then
goes one of three ways, all with the same result:

gathered   The listed blocks are copied side by side into a panel, and one flash call runs over the panels of
           a few lists of equal length (many, where tiles are small: calls cost more than elements there).
           The query heads that share a list follow one another as rows of one head: torch's kernel
           takes its larger query blocks from 192 and from 768 rows on.
as a view  A list without gaps is a slice of the keys. Neighbouring tiles and heads with the same list are one
           call.
beyond the crossover
           A list with few gaps is the slice from its first to its last block under a mask of one row: the
           left-out blocks are computed and dropped, which costs less than copying the listed ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.math.accumulate import Accumulator
from kernels.math.block_common import common_and_rest
from kernels.math.block_lists import BlockLists
from kernels.math.block_skip import without_skipped
from kernels.math.decode import softmax_lse
from kernels.math.dense import Mask, dense_part
from kernels.math.merge import merge_into
from kernels.math.query_tiles import QueryTiles

PANEL_BYTES = 4 << 20
"""Keys and values gathered at once, unless one list alone is longer. Two panels of 2048 keys of width 64 per
core of two fill the cores' second-level caches; with 12 MB the rate fell by 6 %."""
MASK_COST = 1.045
"""Time of an element under a mask of one row, over that without: 1.043 to 1.055 for 128 to 768 rows."""
GATHER_ROWS = 25
"""Copying a key and its value into the panel takes as long as computing this many rows against it: 13 where
the keys are in a cache, 30 to 40 where they are not. With 25 the crossover lies at 0.95 for 256 rows and at
1.0 for 512, where ``python -m kernels.bench_blocks --sweep --length 4096`` finds it (0.96 and 0.99, one
thread, 12x12x64); from about 560 rows on gathering is cheaper at any share.
"""
VIEW_ELEMENTS = 1 << 19
"""A slice with fewer score elements than this is gathered with others: calls cost more than copies there."""
VIEW_ROWS = 1 << 14
"""Rows, over heads, of one call: bounds the part's memory."""
TILE_ROWS = 2048
"""Neighbouring tiles with the same slice are joined up to so many rows."""
LOOSE_ELEMENTS = 1 << 13
"""Tiles of fewer elements than this are collected by an index, larger ones by slices."""

Ints = npt.NDArray[np.int64]


def crossover(num_rows: int) -> float:
    """Share of listed blocks, between a list's first and last, from which the slice under a mask is cheaper
    than the panel: MASK_COST * span = (1 + GATHER_ROWS / rows) * listed. ``num_rows``: those of the tile in
    all heads that share the list."""
    return MASK_COST / (1.0 + GATHER_ROWS / num_rows)


def add_block_lists(
    acc: Accumulator,
    b: int,
    lists: BlockLists,
    *,
    skip: float = 0.0,
    guard: bool = False,
    own: QueryTiles | None = None,
) -> BlockLists:
    """Merge attention of batch entry ``b`` over ``lists`` into rows that another part has filled, and count
    its pairs into ``acc``. Returns the lists that were attended.

    ``lists.heads`` is Hk or H. ``skip`` drops blocks first, see ``block_skip``; ``own``: the tiles whose own
    keys belong to a row's best logit there. At 0 nothing is looked at. ``guard``: the keys hold NaN or
    infinities, so that the way beyond the crossover is not worth trying (it is redone where it meets one).
    Raises ValueError where the lists do not fit the rows, heads or keys.
    """
    if acc.call.impl == "triton":
        from kernels._triton import block_lists

        return block_lists.add_block_lists(acc, b, lists, skip=skip, own=own)
    _check(acc, lists)
    if skip != 0.0:
        lists = without_skipped(acc, b, lists, skip, own)
    group = acc.q.shape[1] * acc.q.shape[2] // lists.heads
    for part in common_and_rest(lists, group):
        for run in _runs(acc, b, part):
            _add_run(run, masked=not guard)
    return lists


def _add_run(run: _Run, masked: bool) -> None:
    rest = run.num > 0
    for rect in _rectangles(run, masked):
        if _add_view(run, rect):
            rest[rect.heads, rect.tiles] = False
    _add_gathered(run, list(_batches(run, rest)))


def _check(acc: Accumulator, lists: BlockLists) -> None:
    Hk, G, N = acc.q.shape[1:4]
    if lists.heads not in (Hk, Hk * G):
        raise ValueError(f"lists for {lists.heads} heads, expected {Hk} key heads or {Hk * G} query heads")
    if lists.borders[0] != 0 or lists.borders[-1] != N:
        raise ValueError(f"tiles span rows {lists.borders[0]} .. {lists.borders[-1]}, the call has 0 .. {N}")
    if not acc.filled:
        raise ValueError("block lists are added to rows that another part has filled")
    num_blocks = acc.k.shape[2] // lists.block
    if lists.indices.numel() and not 0 <= int(lists.indices.min()) <= int(lists.indices.max()) < num_blocks:
        raise ValueError(f"a listed block lies outside the {num_blocks} whole blocks of the keys")


@dataclass(frozen=True)
class _Run:
    """``count`` neighbouring tiles of ``height`` rows from row ``row``: list (h, t) is
    indices[begin[h, t] : begin[h, t] + num[h, t]]."""

    acc: Accumulator
    b: int
    block: int
    row: int
    height: int
    begin: Ints
    num: Ints
    indices: Ints

    @property
    def per_query_head(self) -> bool:
        return len(self.num) != self.acc.q.shape[1]

    @property
    def group(self) -> int:
        """Query heads that share a list."""
        return 1 if self.per_query_head else self.acc.q.shape[2]

    def key_head(self, head: int) -> int:
        return head // self.acc.q.shape[2] if self.per_query_head else head

    def at(self, heads: slice, tiles: slice) -> tuple[Any, ...]:
        """Index of those lists' rows in q, out and lse: [key heads, query heads, rows, ...], a view. List
        heads of more than one key head only where they are key heads."""
        rows = slice(self.row + tiles.start * self.height, self.row + tiles.stop * self.height)
        if not self.per_query_head:
            return self.b, heads, slice(None), rows
        G = self.acc.q.shape[2]
        key_head, first = divmod(heads.start, G)
        return self.b, slice(key_head, key_head + 1), slice(first, first + heads.stop - heads.start), rows

    def by_tile(self, rows: Tensor, heads: Ints, tiles: Ints) -> tuple[Tensor, tuple[Any, ...]]:
        """A view of q, out or lse, and the index into it that gives [lists, (G,) R, ...]."""
        stop = self.row + self.height * self.num.shape[1]
        view = torch.unflatten(rows[self.b, :, :, self.row : stop], 2, (-1, self.height))
        t = torch.from_numpy(tiles)
        if not self.per_query_head:
            return view.transpose(1, 2), (torch.from_numpy(heads), t)
        key_head, member = np.divmod(heads, self.acc.q.shape[2])
        return view, (torch.from_numpy(key_head), torch.from_numpy(member), t)


def _runs(acc: Accumulator, b: int, lists: BlockLists) -> Iterator[_Run]:
    indptr, indices = lists.indptr.cpu().numpy(), lists.indices.cpu().numpy().astype(np.int64)
    num = indptr[:, 1:] - indptr[:, :-1]
    heights = np.diff(lists.borders)
    starts = [0, *(np.flatnonzero(np.diff(heights)) + 1).tolist(), len(heights)]
    for t0, t1 in zip(starts[:-1], starts[1:], strict=True):
        if num[:, t0:t1].any():
            begin = indptr[:, t0:t1]
            yield _Run(
                acc, b, lists.block, lists.borders[t0], int(heights[t0]), begin, num[:, t0:t1], indices
            )


@dataclass(frozen=True)
class _Rectangle:
    """Lists of some heads and tiles that are one slice of the keys: ``span`` blocks from ``first``. ``bias``
    drops those that are not listed."""

    heads: slice
    tiles: slice
    first: int
    span: int
    whole: bool


def _rectangles(run: _Run, masked: bool) -> Iterator[_Rectangle]:
    """The lists to read as slices: without gaps, or beyond the crossover where ``masked`` allows it."""
    if run.height == 1:
        return
    last = run.indices[np.maximum(run.begin + run.num, 1) - 1]
    first = run.indices[np.minimum(run.begin, len(run.indices) - 1)]
    span = np.where(run.num > 0, last - first + 1, 0)
    whole = (run.num > 0) & (span == run.num)
    rows = run.group * run.height
    same: dict[tuple[int, ...], list[int]] = {}
    for h, t0, t1 in _streaks(whole, first, span, max(1, TILE_ROWS // run.height)):
        same.setdefault((t0, t1, int(first[h, t0]), int(span[h, t0]), run.key_head(h)), []).append(h)
    if not run.per_query_head:
        same = _across_key_heads(same)
    for (t0, t1, a, width, _), members in same.items():
        for heads in _consecutive(members, max(1, VIEW_ROWS // (rows * (t1 - t0)))):
            if (heads.stop - heads.start) * (t1 - t0) * rows * width * run.block >= VIEW_ELEMENTS:
                yield _Rectangle(heads, slice(t0, t1), a, width, True)
    if masked:
        gaps = (run.num > 0) & ~whole & (run.num >= crossover(rows) * span)
        gaps &= rows * span * run.block >= VIEW_ELEMENTS
        for h, t in np.argwhere(gaps).tolist():
            yield _Rectangle(slice(h, h + 1), slice(t, t + 1), int(first[h, t]), int(span[h, t]), False)


def _across_key_heads(same: dict[tuple[int, ...], list[int]]) -> dict[tuple[int, ...], list[int]]:
    joined: dict[tuple[int, ...], list[int]] = {}
    for key, members in same.items():
        joined.setdefault((*key[:-1], 0), []).extend(members)
    return joined


def _streaks(
    whole: npt.NDArray[np.bool_], first: Ints, span: Ints, most: int
) -> Iterator[tuple[int, int, int]]:
    """(head, begin, end) of at most ``most`` neighbouring tiles that list the same slice."""
    goes_on = np.zeros_like(whole)
    goes_on[:, 1:] = whole[:, 1:] & whole[:, :-1]
    goes_on[:, 1:] &= (first[:, 1:] == first[:, :-1]) & (span[:, 1:] == span[:, :-1])
    for h in range(len(whole)):
        begin, end = 0, 0
        for t in np.flatnonzero(whole[h]).tolist():
            if not (goes_on[h, t] and t - begin < most):
                if end > begin:
                    yield h, begin, end
                begin = t
            end = t + 1
        if end > begin:
            yield h, begin, end


def _consecutive(members: list[int], most: int) -> Iterator[slice]:
    start = 0
    for at in range(1, len(members) + 1):
        ends = at == len(members) or members[at] != members[at - 1] + 1 or at - start == most
        if ends:
            yield slice(members[start], members[at - 1] + 1)
            start = at


def _add_view(run: _Run, rect: _Rectangle) -> bool:
    """False where a block that is not listed held NaN or an infinity, and nothing was added."""
    acc, L = run.acc, run.block
    at = run.at(rect.heads, rect.tiles)
    q = acc.q[at]
    heads, G, R, D = q.shape
    if G > 1 and R < 768:
        q = q.reshape(heads, 1, G * R, D)
    keys = slice(rect.first * L, (rect.first + rect.span) * L)
    k, v = (x[run.b, at[1], keys].unsqueeze(0) for x in (acc.k, acc.v))
    mask = None if rect.whole else _gap_mask(run, rect, q.dtype)
    out, lse = dense_part(q.unsqueeze(0), k, v, acc.call.scale, mask=mask)
    acc.computed += heads * G * R * rect.span * L
    if mask is not None and not math.isfinite(float(out.sum()) + float(lse.sum())):
        return False
    acc.dense += heads * G * R * rect.span * L
    acc.kept += heads * G * R * int(run.num[rect.heads.start, rect.tiles.start]) * L
    merge_into(acc.out[at], acc.lse[at], out.view(heads, G, R, -1), lse.view(heads, G, R))
    return True


def _gap_mask(run: _Run, rect: _Rectangle, dtype: torch.dtype) -> Mask:
    h, t = rect.heads.start, rect.tiles.start
    listed = run.indices[run.begin[h, t] : run.begin[h, t] + run.num[h, t]] - rect.first
    bias = torch.full((rect.span, run.block), -math.inf, dtype=dtype)
    bias[torch.from_numpy(listed)] = 0.0
    return Mask(bias.view(1, -1).to(run.acc.q.device))


def _batches(run: _Run, rest: npt.NDArray[np.bool_]) -> Iterator[tuple[Ints, Ints, int]]:
    """(heads, tiles, blocks listed) of lists of equal length whose panels fit into PANEL_BYTES."""
    heads, tiles = np.nonzero(rest)
    num = run.num[heads, tiles]
    order = np.argsort(num, kind="stable")
    heads, tiles, num = heads[order], tiles[order], num[order]
    ends = [*(np.flatnonzero(np.diff(num)) + 1).tolist(), len(num)] if len(num) else []
    begin = 0
    for end in ends:
        step = _lists_at_once(run, int(num[begin]))
        for a in range(begin, end, step):
            some = slice(a, min(a + step, end))
            yield heads[some], tiles[some], int(num[begin])
        begin = end


def _lists_at_once(run: _Run, num: int) -> int:
    acc = run.acc
    width = acc.k.shape[-1] + acc.v.shape[-1]
    in_panel = PANEL_BYTES // (num * run.block * width * acc.q.element_size())
    return max(1, min(in_panel, VIEW_ROWS // (run.group * run.height)))


def _add_gathered(run: _Run, batches: list[tuple[Ints, Ints, int]]) -> None:
    """Fresh memory for every batch would cost as much as the copies do: the panels are reused."""
    acc = run.acc
    keys = max((len(heads) * num for heads, _, num in batches), default=0) * run.block
    buffers = [x.new_empty(keys, x.shape[-1]) for x in (acc.k, acc.v)]
    for heads, tiles, num in batches:
        k, v = (x[: len(heads) * num * run.block].view(len(heads), num * run.block, -1) for x in buffers)
        _gather_lists(run, heads, tiles, num, k, v)
        if run.group * run.height * acc.q.shape[-1] >= LOOSE_ELEMENTS:
            _add_streaks(run, heads, tiles, k, v)
        else:
            _add_by_index(run, heads, tiles, k, v)
        pairs = len(heads) * run.group * run.height * num * run.block
        acc.kept, acc.computed = acc.kept + pairs, acc.computed + pairs


def _gather_lists(run: _Run, heads: Ints, tiles: Ints, num: int, k: Tensor, v: Tensor) -> None:
    """The lists' blocks side by side into k [lists, num * L, D] and v, in the keys' dtype."""
    acc = run.acc
    listed = torch.from_numpy(run.indices[run.begin[heads, tiles][:, None] + np.arange(num)]).to(k.device)
    borders = [0, *(np.flatnonzero(np.diff(heads)) + 1).tolist(), len(heads)]
    for a, b in zip(borders[:-1], borders[1:], strict=True):
        head, chosen = run.key_head(int(heads[a])), listed[a:b].flatten()
        _gather(acc.k[run.b, head], chosen, run.block, k[a:b])
        _gather(acc.v[run.b, head], chosen, run.block, v[a:b])


def _gather(keys: Tensor, chosen: Tensor, L: int, into: Tensor) -> None:
    """Blocks ``chosen`` of keys [M, D]; whole blocks at once where rows are dense."""
    blocks = torch.unflatten(keys[: len(keys) // L * L], 0, (-1, L))
    if blocks[0].is_contiguous():
        blocks = blocks.flatten(1)
    torch.index_select(blocks, 0, chosen, out=into.view(len(chosen), *blocks.shape[1:]))


def _attend(run: _Run, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """q [lists, rows, D] over a panel each [lists, P, D] -> [lists, rows, Dv], [lists, rows]."""
    scale = run.acc.call.scale
    if run.height > 1:
        out, lse = dense_part(q[:, None, None], k[:, None], v[:, None], scale)
        return out[:, 0, 0], lse[:, 0, 0]
    weights, lse = softmax_lse(torch.bmm(q * scale, k.to(q.dtype).mT))
    return torch.bmm(weights, v.to(q.dtype)), lse


def _add_streaks(run: _Run, heads: Ints, tiles: Ints, k: Tensor, v: Tensor) -> None:
    """Neighbouring tiles of one head are rows of one view: few calls, however they are threaded."""
    acc, R = run.acc, run.height
    turns = np.flatnonzero((np.diff(heads) != 0) | (np.diff(tiles) != 1)) + 1
    streaks = list(zip([0, *turns.tolist()], [*turns.tolist(), len(heads)], strict=True))
    places = [
        run.at(slice(h := int(heads[i]), h + 1), slice(t := int(tiles[i]), t + j - i)) for i, j in streaks
    ]
    q = acc.q.new_empty(len(heads), run.group, R, acc.q.shape[-1])
    for (i, j), at in zip(streaks, places, strict=True):
        q[i:j].copy_(torch.unflatten(acc.q[at][0], 1, (-1, R)).transpose(0, 1))
    out, lse = _attend(run, q.flatten(1, 2), k, v)
    out, lse = (torch.unflatten(x, 1, (-1, R)).transpose(0, 1) for x in (out, lse))
    for (i, j), at in zip(streaks, places, strict=True):
        rows, rows_lse = (torch.unflatten(x[at][0], 1, (-1, R)) for x in (acc.out, acc.lse))
        merge_into(rows, rows_lse, out[:, i:j], lse[:, i:j])


def _add_by_index(run: _Run, heads: Ints, tiles: Ints, k: Tensor, v: Tensor) -> None:
    acc = run.acc
    (all_q, at), (all_out, _), (all_lse, _) = (
        run.by_tile(x, heads, tiles) for x in (acc.q, acc.out, acc.lse)
    )
    q, rows, rows_lse = all_q[at], all_out[at], all_lse[at]
    out, lse = _attend(run, q.reshape(len(heads), -1, q.shape[-1]), k, v)
    merge_into(rows, rows_lse, out.view(rows.shape), lse.view(rows_lse.shape))
    all_out[at], all_lse[at] = rows, rows_lse
