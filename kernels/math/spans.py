"""Patterns whose rows see runs of keys: row i keeps lo_i <= j < hi_i, in one or more disjoint spans.

    out_i = merge over spans of softmax(scale * q_i K[lo_i:hi_i]^T) V[lo_i:hi_i]

Query rows are cut into tiles at absolute multiples of the tile height. The keys that all rows of a tile see
form a panel without a mask, the ragged edges carry a small mask; narrow spans are one masked panel. Panels
are views, and neighbouring tiles of equal shape run as one batch over overlapping views: few large calls,
which matters most where other work competes for the cores. Cost: O(N (width + tile height)) score elements;
memory O(N).

A span may run over every ``step``-th key from ``first`` (summary columns): lo and hi then count in that
series.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.contract import AttentionResult, Call
from kernels.math.accumulate import Accumulator, accumulator, result
from kernels.math.cache import MASKS, PLANS
from kernels.math.decode import attend_row
from kernels.math.dense import Mask, computed_elements, dense_part, make_mask
from kernels.math.merge import merge_into

BATCH_ROWS = 4096
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Span:
    """Row r of the call (position start + r) keeps lo[r] <= j < hi[r]; nothing where hi <= lo.

    ``hole`` drops the row's own position. ``first`` and ``step`` select the series of keys that lo and hi
    index.
    """

    lo: Ints
    hi: Ints
    first: int = 0
    step: int = 1
    hole: bool = False


@dataclass(frozen=True)
class Panel:
    """Keys ``a <= j < b`` of the series (first, step), for all rows of a tile; in a batch of tiles every
    further one reads ``advance`` keys later."""

    first: int
    step: int
    a: int
    b: int
    mask: Mask | None = None
    causal: bool = False
    advance: int = 0

    def of(self, keys: Tensor, count: int) -> Tensor:
        """[Hk, M, D] -> [count, Hk, b - a, D]: the panels of ``count`` tiles. A view."""
        series = keys[:, self.first :: self.step] if self.step > 1 else keys
        if count == 1 or self.advance == 0:
            return series[None, :, self.a : self.b].expand(count, -1, -1, -1)
        stop = self.b + (count - 1) * self.advance
        return series[:, self.a : stop].unfold(1, self.b - self.a, self.advance).permute(1, 0, 3, 2)


@dataclass(frozen=True)
class Tile:
    """``count`` neighbouring tiles of ``height`` rows, the first at row ``row`` of the call."""

    row: int
    height: int
    count: int
    panels: tuple[Panel, ...]

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.height * self.count)


@dataclass(frozen=True)
class SpanPlan:
    """Tiles, or the runs of a single row; pairs per head; the range of keys that masked panels touch."""

    tiles: tuple[Tile, ...]
    runs: tuple[slice, ...]
    kept: int
    computed: int
    masked: slice | None

    @property
    def nbytes(self) -> int:
        return 200 * sum(1 + len(tile.panels) for tile in self.tiles)


@dataclass(frozen=True)
class SpanPattern:
    """A pattern as spans: ``spans(rows, num_keys)`` of int64 positions; rows in ``cuts`` begin a new tile."""

    key: Hashable
    spans: Callable[[Ints, int], Sequence[Span]]
    tile: int = 256
    cuts: tuple[int, ...] = field(default=())


def span_attention(q: Tensor, k: Tensor, v: Tensor, pattern: SpanPattern, call: Call) -> AttentionResult:
    """A whole call over a pattern that is nothing but spans."""
    began = perf_counter()
    acc = accumulator(q, k, v, call)
    add_spans(acc, plan_for(acc, pattern))
    return result(acc, q, began)


def plan_for(acc: Accumulator, pattern: SpanPattern) -> SpanPlan:
    """The plan for these rows, cached. A causal one does not depend on how many keys follow the last row."""
    began = perf_counter()
    start, num_rows, causal = acc.call.start, acc.q.shape[-2], acc.call.causal
    num_keys = start + num_rows if causal else acc.k.shape[2]
    place = (acc.q.dtype, acc.q.device)
    key = (pattern.key, start, num_rows, num_keys, causal, place)
    plan = PLANS.get(key, lambda: _plan(pattern, start, num_rows, num_keys, *place))
    acc.selection_s += perf_counter() - began
    return plan


def add_spans(acc: Accumulator, plan: SpanPlan) -> None:
    """Add the plan's rows to the accumulator."""
    scale = acc.call.scale
    if acc.q.shape[-2] == 1:
        _add_row(acc, plan, scale)
    else:
        guard = plan.masked is not None and not _finite(acc.k, acc.v, plan.masked)
        for tile in plan.tiles:
            for b in range(acc.q.shape[0]):
                _add_tile(acc, b, tile, scale, guard)
    acc.complete(plan.kept * acc.num_heads, plan.computed * acc.num_heads)


def _add_row(acc: Accumulator, plan: SpanPlan, scale: float) -> None:
    if plan.runs:
        acc.put(slice(0, 1), *attend_row(acc.q, acc.k, acc.v, plan.runs, scale))
    else:
        acc.put(slice(0, 1), *_nothing(acc, slice(0, 1)))


def _add_tile(acc: Accumulator, b: int, tile: Tile, scale: float, guard: bool) -> None:
    if not tile.panels:
        acc.put(tile.rows, *_nothing(acc, tile.rows))
        return
    q, to_out = (_by_tile(x[b, :, :, tile.rows], tile) for x in (acc.q, acc.out))
    to_lse = _by_tile(acc.lse[b, :, :, tile.rows].unsqueeze(-1), tile)[..., 0]
    parts = (_panel_part(q, acc.k[b], acc.v[b], panel, scale, guard) for panel in tile.panels)
    out, lse = next(parts)
    for part in parts:
        merge_into(out, lse, *part)
    acc.put_into(to_out, to_lse, out, lse)


def _by_tile(rows: Tensor, tile: Tile) -> Tensor:
    """[Hk, G, count * R, D] -> [count, Hk, G, R, D], a view."""
    return torch.unflatten(rows, 2, (tile.count, tile.height)).permute(2, 0, 1, 3, 4)


def _panel_part(
    q: Tensor, k: Tensor, v: Tensor, panel: Panel, scale: float, guard: bool
) -> tuple[Tensor, Tensor]:
    keys, values = panel.of(k, len(q)), panel.of(v, len(q))
    return dense_part(q, keys, values, scale, mask=panel.mask, causal=panel.causal, guard=guard)


def _nothing(acc: Accumulator, rows: slice) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(acc.out[..., rows, :]), torch.full_like(acc.lse[..., rows], -math.inf)


def _finite(k: Tensor, v: Tensor, keys: slice) -> bool:
    """False sends masked panels the slow way round: a dropped key with NaN would spoil the rows beside it.
    A sum that overflows says False too, which costs time and nothing else."""
    return math.isfinite(
        float(k[:, :, keys].sum(dtype=torch.float32)) + float(v[:, :, keys].sum(dtype=torch.float32))
    )


def _plan(
    pattern: SpanPattern, start: int, num_rows: int, num_keys: int, dtype: torch.dtype, device: torch.device
) -> SpanPlan:
    rows = np.arange(start, start + num_rows, dtype=np.int64)
    spans = [s for s in pattern.spans(rows, num_keys) if bool((s.hi > s.lo).any())]
    kept = sum(_num_kept(span, rows) for span in spans)
    if num_rows == 1:
        return SpanPlan((), tuple(_runs(spans, start)), kept, kept, None)
    tiles: list[Tile] = []
    computed = 0
    for r0, r1 in _tile_rows(start, num_rows, pattern):
        pieces = [piece for span in spans for piece in _pieces(span, rows, r0, r1)]
        panels = tuple(_panel(piece, dtype, device) for piece in pieces)
        computed += sum(computed_elements(r1 - r0, p.b - p.a, p.causal) for p in pieces)
        tiles.append(Tile(r0, r1 - r0, 1, panels))
    return SpanPlan(tuple(_batched(tiles)), (), kept, computed, _masked_range(tiles))


def _batched(tiles: Sequence[Tile]) -> Iterator[Tile]:
    """Runs of tiles that differ by a constant advance of their panels, as one tile each."""
    batch = tiles[0]
    for tile in tiles[1:]:
        longer = _extended(batch, tile)
        if longer is None:
            yield batch
        batch = longer or tile
    yield batch


def _extended(batch: Tile, tile: Tile) -> Tile | None:
    """The batch with the tile that follows it, or None where it does not fit."""
    fits = tile.height == batch.height and len(tile.panels) == len(batch.panels)
    if not fits or tile.height * (batch.count + 1) > BATCH_ROWS:
        return None
    panels = []
    for old, new in zip(batch.panels, tile.panels, strict=True):
        advance = new.a - old.a if batch.count == 1 else old.advance
        moved = replace(old, a=old.a + batch.count * advance, b=old.b + batch.count * advance, advance=0)
        if advance < 0 or moved != new:
            return None
        panels.append(replace(old, advance=advance))
    return Tile(batch.row, batch.height, batch.count + 1, tuple(panels))


def _num_kept(span: Span, rows: Ints) -> int:
    width = np.maximum(span.hi - span.lo, 0)
    return int(width.sum()) - (int(((span.lo <= rows) & (rows < span.hi)).sum()) if span.hole else 0)


def _runs(spans: Sequence[Span], position: int) -> Iterator[slice]:
    """The keys of a single row as few slices: neighbours are joined."""
    pending: slice | None = None
    for run in sorted(_pieces_of_row(spans, position), key=lambda run: (run.step, run.start)):
        if pending is not None and run.step == pending.step == 1 and run.start == pending.stop:
            pending = slice(pending.start, run.stop, 1)
            continue
        if pending is not None:
            yield pending
        pending = run
    if pending is not None:
        yield pending


def _pieces_of_row(spans: Sequence[Span], position: int) -> Iterator[slice]:
    for span in spans:
        lo, hi = int(span.lo[0]), int(span.hi[0])
        holed = span.hole and lo <= position < hi
        for a, b in ((lo, position), (position + 1, hi)) if holed else ((lo, hi),):
            if b > a:
                yield _series(span, a, b)


def _series(span: Span, a: int, b: int) -> slice:
    return slice(span.first + a * span.step, span.first + (b - 1) * span.step + 1, span.step)


def _tile_rows(start: int, num_rows: int, pattern: SpanPattern) -> Iterator[tuple[int, int]]:
    stop = start + num_rows
    first = start // pattern.tile * pattern.tile
    borders = {start, stop, *range(first, stop, pattern.tile), *pattern.cuts}
    inside = sorted(x - start for x in borders if start <= x <= stop)
    yield from zip(inside[:-1], inside[1:], strict=True)


@dataclass(frozen=True)
class _Piece:
    """A panel before its mask is made: keys a..b of a span, lo and hi clipped to them and counted from a."""

    span: Span
    a: int
    b: int
    lo: Ints
    hi: Ints
    own: int | None
    full: bool
    causal: bool


def _pieces(span: Span, rows: Ints, r0: int, r1: int) -> Iterator[_Piece]:
    """The panels of one span in one tile: one where it is narrow, else its ragged edges apart from its
    middle.
    """
    lo, hi = span.lo[r0:r1], span.hi[r0:r1]
    live = hi > lo
    if not live.any():
        return
    a, b = int(lo[live].min()), int(hi[live].max())
    borders = {a, b}
    if b - a > 4 * (r1 - r0):
        borders |= {int(lo.max()), int(hi.min())}
        if span.hole:
            borders |= {int(rows[r0]), int(rows[r1 - 1]) + 1}
    inside = sorted(x for x in borders if a <= x <= b)
    for x, y in zip(inside[:-1], inside[1:], strict=True):
        piece = _piece(span, lo, hi, int(rows[r0]), x, y)
        if piece is not None:
            yield piece


def _piece(span: Span, lo: Ints, hi: Ints, position: int, a: int, b: int) -> _Piece | None:
    low, high = np.clip(lo, a, b) - a, np.clip(hi, a, b) - a
    if not (high > low).any():
        return None
    num_rows, width = len(lo), b - a
    own = position - a if span.hole and position < b and position + num_rows > a else None
    full = own is None and not low.any() and bool((high == width).all())
    triangle = own is None and width == num_rows and not low.any()
    causal = triangle and num_rows > 1 and bool((high == np.arange(1, num_rows + 1)).all())
    return _Piece(span, a, b, low, high, own, full, causal)


def _panel(piece: _Piece, dtype: torch.dtype, device: torch.device) -> Panel:
    panel = Panel(piece.span.first, piece.span.step, piece.a, piece.b, causal=piece.causal)
    if piece.full or piece.causal:
        return panel
    width = piece.b - piece.a
    key = ("span", piece.lo.tobytes(), piece.hi.tobytes(), piece.own, width, dtype, device)
    return replace(panel, mask=MASKS.get(key, lambda: _edge_mask(piece, width, dtype, device)))


def _edge_mask(piece: _Piece, width: int, dtype: torch.dtype, device: torch.device) -> Mask:
    columns = torch.arange(width)
    lo, hi = torch.from_numpy(piece.lo)[:, None], torch.from_numpy(piece.hi)[:, None]
    keep = (columns >= lo) & (columns < hi)
    if piece.own is not None:
        keep &= columns != torch.arange(len(piece.lo))[:, None] + piece.own
    return make_mask(keep.to(device), dtype)


def _masked_range(tiles: Sequence[Tile]) -> slice | None:
    ragged = [p for tile in tiles for p in tile.panels if p.mask is not None or p.causal]
    if not ragged:
        return None
    return slice(
        min(p.first + p.a * p.step for p in ragged), max(p.first + (p.b - 1) * p.step + 1 for p in ragged)
    )
