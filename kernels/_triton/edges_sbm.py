"""Edges of a stochastic block model drawn and attended to on the device: the backend sbm.

Head by head, edges are drawn into bits. Tiles of rows that drew at least one pair in LISTED_SHARE run through
the block-sparse kernel with their bits as masks, blocks without a bit left out: matrix products over all
pairs of a block cost less than gathering some of them. The other tiles' bits become edge lists. Which tile
goes which way is decided on the device, and both kernels are launched; a row has its keys in one of them.
Counts are read back once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor

from kernels._triton.block_sparse import Lists, launch_on, rows_for, tiles_of
from kernels._triton.edges import EdgeLists, EdgeRows, attend_edges
from kernels._triton.edges_bits import (
    Layout,
    PointTables,
    count_launch,
    list_launch,
    pairs_launch,
    points_launch,
)
from kernels._triton.operands import Keys, keys_of_call
from kernels.math.sbm_keys import KeySums
from kernels.math.sbm_part import EdgePart
from kernels.math.sbm_sampler import head_stream, rates, row_streams

LISTED_SHARE = 48
BLOCK = 64
BITS_AT_ONCE = 1 << 24
"""Words of bits held at once: a head's, or those of some of its rows."""
CHANCES_AT_ONCE = 1 << 24
ROW_WORDS = 128
ROW_SPLITS = 16
"""Programs that locate the points of one row; each draws all of them, which costs little."""


def add_drawn(part: EdgePart) -> Callable[[], None]:
    """Draw the edges of every row of the call and add the softmax over them; what is returned tells
    ``part.kept``, and waits for the device."""
    acc = part.acc
    add = _add_row if acc.q.shape[-2] == 1 else _add_heads
    tallies = torch.stack([add(part, b) for b in range(len(acc.q))]).sum(0)  # [3, H]

    def count() -> None:
        kept, listed, dense = tallies.tolist()
        part.kept = kept
        acc.complete(sum(kept), sum(listed) + sum(dense), sum(dense))

    return count


def _add_heads(part: EdgePart, b: int) -> Tensor:
    """Pairs int64 [3, H] that were kept, computed from lists, and computed in blocks."""
    _, key_heads, group, _, _ = part.acc.q.shape
    tallies = []
    for key_head in range(key_heads):
        sums = part.sums(b, key_head)
        own = key_head * group if len(sums.members) > group else 0
        keys = _keys(part, b, slice(key_head, key_head + 1))
        tallies += [_add_head(part, b, key_head, g, sums, own + g, keys) for g in range(group)]
    return torch.stack(tallies, 1)


def _keys(part: EdgePart, b: int, heads: slice) -> Keys:
    acc = part.acc
    return keys_of_call(acc.k[b : b + 1, heads], acc.v[b : b + 1, heads], acc.call)


def _add_head(part: EdgePart, b: int, key_head: int, g: int, sums: KeySums, own: int, keys: Keys) -> Tensor:
    acc, one = part.acc, (slice(b, b + 1), slice(key_head, key_head + 1), slice(g, g + 1))
    num_rows, num_keys = acc.q.shape[-2], part.num_keys
    height = rows_for(acc.q[one].flatten(1, 2), 1, max(keys.key_dim, keys.value_dim))
    layout = Layout(height, BLOCK // 32, -(-num_keys // BLOCK))
    at_once = max(1, BITS_AT_ONCE // (height * layout.blocks * layout.words)) * height
    draw = _Points if part.params.sampler == "poisson" else _Pairs
    drawing = draw(part, b, key_head, g, sums, own)
    tallies = []
    for a in range(0, num_rows, at_once):
        rows = slice(a, min(a + at_once, num_rows))
        bits = layout.empty(rows.stop - a, acc.q.device)
        began = perf_counter()
        drawing.draw(bits, layout, rows)
        acc.selection_s += perf_counter() - began
        some = EdgeRows(acc.q[(*one, rows)], acc.out[(*one, rows)], acc.lse[(*one, rows)])
        tallies.append(_attend_bits(some, keys, bits, layout, num_keys, acc.call.scale))
    return torch.stack(tallies).sum(0)


class _Points:
    """The poisson sampler for one head's rows."""

    def __init__(self, part: EdgePart, b: int, key_head: int, g: int, sums: KeySums, own: int) -> None:
        self.part, self.q, self.head = part, part.acc.q[b, key_head, g], key_head * part.acc.q.shape[2] + g
        self.prefix = sums.prefix(own, part.num_keys)

    def draw(self, bits: Tensor, layout: Layout, rows: slice) -> None:
        call, num_keys = self.part.acc.call, self.part.num_keys
        positions = torch.arange(call.start + rows.start, call.start + rows.stop, device=bits.device)
        r = self.part.rates(self.q[rows], self.head)
        if call.causal:
            limits, seen = positions + 1, self.prefix[:, positions + 1].mT
        else:
            limits, seen = torch.full_like(positions, num_keys), self.prefix[:, -1].expand_as(r)
        streams = row_streams(head_stream(call.seed, call.layer, self.head), positions)
        upto = rates(r, seen).upto
        tables = PointTables(streams, limits.int(), upto, r.contiguous(), self.prefix, None, per_line=False)
        points_launch(bits, layout, tables, num_keys).run()


class _Pairs:
    """The bernoulli sampler for one head's rows."""

    def __init__(self, part: EdgePart, b: int, key_head: int, g: int, sums: KeySums, own: int) -> None:
        self.part, self.q, self.head = part, part.acc.q[b, key_head, g], key_head * part.acc.q.shape[2] + g
        self.members = sums.members[own, :, : part.num_keys].double()

    def draw(self, bits: Tensor, layout: Layout, rows: slice) -> None:
        call = self.part.acc.call
        stream = head_stream(call.seed, call.layer, self.head, bernoulli=True)
        step = max(1, CHANCES_AT_ONCE // self.part.num_keys)
        for a in range(rows.start, rows.stop, step):
            b = min(a + step, rows.stop)
            streams = row_streams(stream, torch.arange(call.start + a, call.start + b, device=bits.device))
            chances = self.part.rates(self.q[a:b], self.head) @ self.members
            self.part.flops += 2 * (b - a) * self.members.numel()
            first, start = a - rows.start, call.start + rows.start
            pairs_launch(bits, layout, streams, chances, first, start, causal=call.causal).run()


def _attend_bits(
    rows: EdgeRows, keys: Keys, bits: Tensor, layout: Layout, num_keys: int, scale: float
) -> Tensor:
    """The softmax over one head's bits -> pairs int64 [3]: kept, computed from lists, computed in blocks."""
    tiles, device = len(bits), bits.device
    of_rows = torch.zeros(tiles, layout.rows, dtype=torch.int32, device=device)
    of_blocks = torch.empty(tiles, layout.blocks, dtype=torch.int32, device=device)
    count_launch(bits, layout, of_rows, of_blocks).run()
    listed = of_blocks.sum(1) * LISTED_SHARE < layout.rows * num_keys
    blocks = (of_blocks > 0) & ~listed[:, None]
    kernel_tiles = tiles_of((0, rows.q.shape[-2]), layout.rows, device)
    lists = _mask_lists(bits, blocks)
    launch_on(rows.q, rows.out, rows.lse, keys, kernel_tiles, lists, scale=scale).run()
    counts = torch.where(listed[:, None], of_rows, 0).flatten()
    most = tiles * layout.rows * num_keys // LISTED_SHARE
    edges = _listed(bits, layout, counts, most, num_keys)
    filled = EdgeRows(rows.q, rows.out, rows.lse, filled=True)
    attend_edges(filled, keys, edges, scale=scale)
    in_blocks = blocks.sum() * (layout.rows * BLOCK)
    return torch.stack([of_rows.sum(), counts.sum(), in_blocks])


def _mask_lists(bits: Tensor, blocks: Tensor) -> Lists:
    """Entries under a mask for ``blocks`` bool [T, nb] of bits [T, nb, rows, words]; longest lists first."""
    tiles, per_tile = blocks.shape
    number = torch.arange(tiles * per_tile, device=bits.device)
    flat = blocks.flatten()
    places = torch.where(flat, flat.cumsum(0) - 1, len(flat))
    entries = torch.stack([number % per_tile * BLOCK, torch.ones_like(number), number], 1).int()
    masked = entries.new_zeros(len(flat) + 1, 3).index_copy_(0, places, entries)
    num = blocks.sum(1)
    return Lists(
        BLOCK,
        masked_indptr=torch.nn.functional.pad(num.cumsum(0), (1, 0))[None].int(),
        masked=masked,
        masks=bits.flatten(0, 1),
        order=num.argsort(descending=True, stable=True)[None].int(),
    )


def _listed(bits: Tensor, layout: Layout, counts: Tensor, most: int, num_keys: int) -> EdgeLists:
    """The keys of rows with ``counts`` int32 [lines] bits, in room for ``most``; a row is its own line."""
    begins = counts.cumsum(0) - counts
    edges = torch.empty(max(1, most), dtype=torch.int32, device=bits.device)
    list_launch(bits, layout, edges, begins, counts).run()
    return EdgeLists(edges, (0, 0, 0), begins, counts, longest=num_keys)


def _add_row(part: EdgePart, b: int) -> Tensor:
    """The only row of the call, of all heads. Result as of ``_add_heads``."""
    acc, num_keys = part.acc, part.num_keys
    _, key_heads, group, _, D = acc.q.shape
    sums, heads = part.sums(b, None), key_heads * group
    began = perf_counter()
    r = part.rates(acc.q[b].reshape(heads, 1, D), slice(None))[:, 0].contiguous()
    layout = Layout(1, ROW_WORDS, -(-num_keys // (32 * ROW_WORDS)))
    bits = layout.empty(heads, acc.q.device)
    streams = part.streams_of_row()
    if part.params.sampler == "poisson":
        limits = torch.full((heads,), num_keys, dtype=torch.int32, device=bits.device)
        upto = rates(r, sums.upto(num_keys)).upto
        tables = PointTables(streams, limits, upto, r, sums.before, sums.members, per_line=True)
        points_launch(bits, layout, tables, num_keys, splits=ROW_SPLITS).run()
    else:
        for head in range(heads):
            members = sums.members[head, :, :num_keys].double()
            part.flops += 2 * members.numel()
            chances, one = r[head : head + 1] @ members, slice(head, head + 1)
            pairs_launch(bits[one], layout, streams[one], chances, 0, acc.call.start, causal=False).run()
    of_rows = torch.zeros(heads, 1, dtype=torch.int32, device=bits.device)
    of_blocks = torch.empty(heads, layout.blocks, dtype=torch.int32, device=bits.device)
    count_launch(bits, layout, of_rows, of_blocks).run()
    counts = of_rows.flatten()
    lists = _listed(bits, layout, counts, heads * num_keys, num_keys)
    acc.selection_s += perf_counter() - began
    lists = EdgeLists(lists.edges, (0, group, 1), lists.begins, counts, longest=num_keys)
    one = slice(b, b + 1)
    attend_edges(
        EdgeRows(acc.q[one], acc.out[one], acc.lse[one]),
        _keys(part, b, slice(None)),
        lists,
        scale=acc.call.scale,
    )
    kept = counts.long()
    return torch.stack([kept, kept, torch.zeros_like(kept)])
