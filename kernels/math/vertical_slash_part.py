"""Attention of one query tile over chosen single keys and chosen diagonals of key blocks.

    rows of query block b see   columns of the tile  ∪  key blocks {b - d : d chosen}

The columns run as one gathered panel without a mask for all rows of the tile, the query heads of a key head
side by side as rows. Query blocks with equally many diagonals run as one batch of gathered panels in which
the columns are masked: a pair counts once. A masked key is a column of the same rows, so one that is NaN has
reached them anyway.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.contract import CallShape
from kernels.math.accumulate import Accumulator
from kernels.math.dense import KEY_CHUNK, Mask, dense_part
from kernels.math.merge import merge_into
from kernels.math.vertical_slash import TileChoice, TilePlace

PANEL_BYTES = 4 << 20
_FP32 = 4


def part_bytes(shape: CallShape, query_tile: int, block: int, num_verticals: int, num_slashes: int) -> int:
    """Bytes of one tile's parts: copied keys, gathered panels, the rows and outputs of one part."""
    one_key = (shape.key_dim + shape.value_dim) * _FP32
    copied = 0
    if not shape.causal or shape.itemsize < _FP32:  # keys of a packed stream are not dense head by head
        copied = shape.num_keys * shape.num_kv_heads * one_key
    columns = shape.num_kv_heads * min(num_verticals, shape.num_keys) * one_key
    slashes = max(2 * PANEL_BYTES, num_slashes * block * one_key) if num_slashes else 0
    rows = min(query_tile, shape.num_rows) * shape.num_heads
    parts = rows * 2 * (shape.key_dim + shape.value_dim + 1) * _FP32
    widest = 0
    if not shape.on_cpu or shape.key_dim != shape.value_dim:
        widest = 3 * rows * min(shape.num_keys, KEY_CHUNK) * _FP32
    return copied + max(columns, slashes) + parts + widest


class KeyRows:
    """The keys of every head of one sequence, [Hk, M, D], as rows: key j of head h is row ``h * head_rows +
    j`` of the same memory. Copied only where narrower than ``dtype`` or where a head's rows are not dense.
    """

    def __init__(self, keys: Tensor, dtype: torch.dtype) -> None:
        keys = keys.to(dtype)
        num_heads, M, D = keys.shape
        if keys.stride(1) != D or keys.stride(2) != 1 or keys.stride(0) % D:
            keys = keys.contiguous()
        self.heads = keys
        self.head_rows = keys.stride(0) // D
        self._rows = keys.as_strided(((num_heads - 1) * self.head_rows + M, D), (D, 1))
        self._buffer = keys.new_empty(0, D)

    @property
    def device(self) -> torch.device:
        return self.heads.device

    def keys_in(self, num_bytes: int) -> int:
        """How many keys so many bytes hold."""
        return num_bytes // (self.heads.shape[2] * self.heads.element_size())

    def panel(self, head: Tensor, index: Tensor) -> Tensor:
        """The keys ``index`` [n, P] of heads ``head`` [n] as [n, 1, P, D]: valid until the next panel."""
        if len(self._buffer) < index.numel():
            size = max(index.numel(), self.keys_in(PANEL_BYTES))
            self._buffer = self.heads.new_empty(size, self.heads.shape[2])
        rows = (index + head[:, None] * self.head_rows).flatten().to(self.device)
        into = self._buffer[: index.numel()]
        torch.index_select(self._rows, 0, rows, out=into)
        return into.view(len(index), 1, index.shape[1], -1)


@dataclass(frozen=True)
class TileRows:
    """One tile's rows of the accumulator: q [Hk, G, R, D], out [Hk, G, R, Dv], lse [Hk, G, R], views."""

    q: Tensor
    out: Tensor
    lse: Tensor
    scale: float


def tile_rows(acc: Accumulator, b: int, rows: slice) -> TileRows:
    return TileRows(acc.q[b, :, :, rows], acc.out[b, :, :, rows], acc.lse[b, :, :, rows], acc.call.scale)


def add_choice(
    rows: TileRows, k: KeyRows, v: KeyRows, place: TilePlace, choice: TileChoice
) -> tuple[int, int]:
    """Merge what the tile has chosen into its rows, which hold its own keys; pairs kept and computed, over
    all heads."""
    counts = [_add_runs(rows, k, v, place, choice)]
    counts += [_add_columns(rows, k, v, heads, choice) for heads in _alike(choice)]
    counts += [_add_slashes(rows, k, v, place, batch, choice) for batch in _batches(place, choice)]
    return sum(kept for kept, _ in counts), sum(computed for _, computed in counts)


def _add_runs(
    rows: TileRows, k: KeyRows, v: KeyRows, place: TilePlace, choice: TileChoice
) -> tuple[int, int]:
    """Heads that keep every candidate read them as views."""
    for _, heads in _runs_of(choice.whole.nonzero().flatten()):
        for run in place.runs:
            _merge(rows, heads, k.heads[heads, run], v.heads[heads, run])
    pairs = int(choice.whole.sum()) * place.num_candidates * _rows_per_head(rows)
    return pairs, pairs


def _add_columns(
    rows: TileRows, k: KeyRows, v: KeyRows, heads: Tensor, choice: TileChoice
) -> tuple[int, int]:
    """Heads with equally many columns."""
    columns = choice.columns[heads].nonzero()[:, 1].view(len(heads), -1)
    keys, values = (x.panel(heads, columns)[:, 0] for x in (k, v))
    for at, some in _runs_of(heads):
        _merge(rows, some, keys[at], values[at])
    pairs = columns.numel() * _rows_per_head(rows)
    return pairs, pairs


def _merge(rows: TileRows, heads: slice, keys: Tensor, values: Tensor) -> None:
    """All rows of some heads over a panel for each head: keys [h, P, D]."""
    q, out, lse = rows.q[heads], rows.out[heads], rows.lse[heads]
    part, part_lse = dense_part(q.flatten(1, 2)[None, :, None], keys[None], values[None], rows.scale)
    merge_into(
        out,
        lse,
        torch.unflatten(part[0, :, 0], 1, q.shape[1:3]),
        torch.unflatten(part_lse[0, :, 0], 1, q.shape[1:3]),
    )


@dataclass(frozen=True)
class _Batch:
    """Query blocks of ``height`` rows, the first at row ``row`` of the tile: entry e is query block
    ``block[e]`` of them for key head ``head[e]``, over key blocks ``keys`` [e, F]."""

    row: int
    height: int
    count: int
    head: Tensor
    block: Tensor
    keys: Tensor

    def entries(self, some: slice) -> _Batch:
        return replace(self, head=self.head[some], block=self.block[some], keys=self.keys[some])

    def by_query_block(self, x: Tensor) -> Tensor:
        """[Hk, G, R, ...] -> [Hk, G, count, height, ...], a view."""
        rows = x[:, :, self.row : self.row + self.count * self.height]
        return torch.unflatten(rows, 2, (self.count, self.height))


def _batches(place: TilePlace, choice: TileChoice) -> Iterator[_Batch]:
    """Query blocks of equal height with equally many diagonals, as many as one panel's memory allows."""
    targets, usable = place.targets
    used = choice.slashes[:, None] & usable
    if not bool(used.any()):
        return
    num_used = used.sum(-1)
    for blocks, row, height in _heights(place):
        counts = num_used[:, blocks]
        for count in sorted(set(counts.flatten().tolist())):
            if count:
                head, block = (counts == count).nonzero(as_tuple=True)
                chosen = used[:, blocks][head, block]
                keys = targets[blocks][block][chosen].view(-1, count)
                yield _Batch(row, height, blocks.stop - blocks.start, head, block, keys)


def _heights(place: TilePlace) -> Iterator[tuple[slice, int, int]]:
    """(query blocks of the tile, first row, rows of each): a cut one, the whole ones, a cut one."""
    L, first, stop = place.block, place.first, place.stop
    begin, end = -(-first // L) * L, stop // L * L
    if begin > end:
        yield slice(0, 1), 0, stop - first
        return
    if begin > first:
        yield slice(0, 1), 0, begin - first
    before = int(begin > first)
    if end > begin:
        yield slice(before, before + (end - begin) // L), begin - first, L
    if stop > end:
        last = before + (end - begin) // L
        yield slice(last, last + 1), end - first, stop - end


def _add_slashes(
    rows: TileRows, k: KeyRows, v: KeyRows, place: TilePlace, batch: _Batch, choice: TileChoice
) -> tuple[int, int]:
    """Diagonals of one batch, in panels of bounded memory."""
    step = max(1, k.keys_in(PANEL_BYTES) // (batch.keys.shape[1] * place.block))
    kept = 0
    for a in range(0, len(batch.keys), step):
        kept += _add_some_slashes(rows, k, v, place, batch.entries(slice(a, a + step)), choice)
    per_query_block = _rows_per_head(rows) // rows.q.shape[2] * batch.height
    return kept * per_query_block, batch.keys.numel() * place.block * per_query_block


def _add_some_slashes(
    rows: TileRows, k: KeyRows, v: KeyRows, place: TilePlace, batch: _Batch, choice: TileChoice
) -> int:
    """Merges the entries; how many keys they keep, summed over them."""
    own = (batch.head.to(k.device), slice(None), batch.block.to(k.device))
    q, out, lse = (batch.by_query_block(x) for x in (rows.q, rows.out, rows.lse))
    keys = (batch.keys[..., None] * place.block + torch.arange(place.block)).flatten(1)
    columns = choice.columns[batch.head[:, None], keys]
    k_panel, v_panel = k.panel(batch.head, keys), v.panel(batch.head, keys)
    mask = _without(columns, q)
    part, part_lse = dense_part(q[own].flatten(1, 2)[:, None, None], k_panel, v_panel, rows.scale, mask=mask)
    merged, merged_lse = out[own], lse[own]
    merge_into(merged, merged_lse, part[:, 0, 0].view_as(merged), part_lse[:, 0, 0].view_as(merged_lse))
    out[own], lse[own] = merged, merged_lse
    return columns.numel() - int(columns.sum())


def _without(columns: Tensor, q: Tensor) -> Mask | None:
    """Drops the keys that are columns [n, P], for all rows of an entry."""
    if not bool(columns.any()):
        return None
    bias = torch.zeros(columns.shape, dtype=q.dtype).masked_fill_(columns, -math.inf)
    empty = columns.all(-1)
    return Mask(
        bias[:, None, None].to(q.device),
        empty[:, None, None, None].to(q.device) if bool(empty.any()) else None,
    )


def _alike(choice: TileChoice) -> Iterator[Tensor]:
    """Heads with equally many columns, of those that chose."""
    counts = torch.where(choice.whole, 0, choice.columns.sum(-1))
    for count in sorted(set(counts.flatten().tolist())):
        if count:
            yield (counts == count).nonzero().flatten()


def _runs_of(heads: Tensor) -> Iterator[tuple[slice, slice]]:
    """Ascending head numbers as runs of neighbours: where they stand in ``heads``, and the heads."""
    begin = 0
    for at in range(1, len(heads) + 1):
        if at == len(heads) or int(heads[at]) != int(heads[at - 1]) + 1:
            yield slice(begin, at), slice(int(heads[begin]), int(heads[at - 1]) + 1)
            begin = at


def _rows_per_head(rows: TileRows) -> int:
    """Query rows of one key head: of all its query heads."""
    return rows.q.shape[1] * rows.q.shape[2]
