"""Patterns whose rows see runs of keys: row i keeps lo_i <= j < hi_i, in one or more disjoint spans.

    out_i = merge over spans of softmax(scale * q_i K[lo_i:hi_i]^T) V[lo_i:hi_i]

Query rows are cut into tiles at absolute multiples of the tile height. In wide spans the keys that all rows
of a tile see form a panel without a mask, and the ragged edges carry a small mask; narrow spans are one
masked panel. Panels are views, and neighbouring tiles of equal shape run as one batch over overlapping views:
few large calls, which matters most where other work competes for the cores. Low tiles compute little beyond
what they keep, and stay fast as long as neighbours find each other's keys in the cache; so tiles follow each
other head by head. Only rows whose band slides need low tiles: at its ends they are joined. Cost: O(N (width
+ tile height)) score elements; memory O(N).

A span may run over every ``step``-th key from ``first`` (summary columns): lo and hi then count in that
series.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.contract import AttentionResult, Call, PackedResult, Segment
from kernels.math.accumulate import Accumulator, accumulator, result
from kernels.math.cache import MASKS, PLANS
from kernels.math.decode import attend_row
from kernels.math.dense import Mask, computed_elements, dense_part, make_mask
from kernels.math.merge import merge_into

if TYPE_CHECKING:
    from kernels._triton.spans import SpanTables

BATCH_ROWS = 4096
_JOINED_ROWS = 256
"""Where spans do not slide, tiles are joined up to multiples of so many rows."""
_SPLIT_ROWS = 96
_SPLIT_KEYS = 256
"""A tile of at least so many rows, with at least so many keys (and as many as rows) that all of them see, has
panels for its edges: a mask on every key costs a seventh of the time, a merge about as much as 12 keys."""
_GROUPED_ROWS, _TALL_ROWS = 192, 768
"""From so many rows on, torch's kernel takes 64, and 256, of them at a time, below 32. Heads that share keys
reach it together."""
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Span:
    """Row r of the call (position start + r) keeps lo[r] <= j < hi[r]; nothing where hi <= lo.

    ``hole`` drops the row's own position. ``first`` and ``step`` select the series of keys that lo and hi
    index. ``tile`` rows per tile where another height than the pattern's suits this span.
    """

    lo: Ints
    hi: Ints
    first: int = 0
    step: int = 1
    hole: bool = False
    tile: int | None = None


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
        """[Hk, M, D] -> [Hk, count, b - a, D]: the panels of ``count`` tiles. A view."""
        series = keys[:, self.first :: self.step] if self.step > 1 else keys
        if count == 1 or self.advance == 0:
            return series[:, None, self.a : self.b].expand(-1, count, -1, -1)
        stop = self.b + (count - 1) * self.advance
        return series[:, self.a : stop].unfold(1, self.b - self.a, self.advance).transpose(2, 3)


@dataclass(frozen=True)
class Tile:
    """``count`` neighbouring tiles of ``height`` rows, the first at row ``row`` of the call. ``joined``: the
    rows of the heads that share keys stand below each other, in the masks too."""

    row: int
    height: int
    count: int
    panels: tuple[Panel, ...]
    joined: bool = False

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.height * self.count)


@dataclass(frozen=True)
class Part:
    """The tiles of the spans that share a tile height; pairs per head."""

    tiles: tuple[Tile, ...]
    kept: int
    computed: int

    @property
    def overlaps(self) -> bool:
        """Whether panels of neighbouring tiles share keys."""
        panels = (panel for tile in self.tiles for panel in tile.panels)
        return any(0 < panel.advance < panel.b - panel.a for panel in panels)


@dataclass(frozen=True)
class SpanPlan:
    """Parts, or the runs of a single row, or under impl ``triton`` its kernel's tables; the range of keys
    that masked panels touch."""

    parts: tuple[Part, ...]
    runs: tuple[slice, ...] = ()
    masked: slice | None = None
    tables: SpanTables | None = None

    @property
    def nbytes(self) -> int:
        """With the masks, which live as long as a plan that has them, whatever their own cache forgets."""
        panels = [panel for part in self.parts for tile in part.tiles for panel in tile.panels]
        masks = {id(panel.mask): panel.mask.nbytes for panel in panels if panel.mask is not None}
        return 200 * (len(panels) + sum(len(part.tiles) for part in self.parts)) + sum(masks.values())


@dataclass(frozen=True)
class SpanPattern:
    """A pattern as spans: ``spans(rows, num_keys)`` of int64 positions; rows in ``cuts`` begin a new tile.
    ``tile``: rows per tile; for bands, which slide but for their ends, a function of how many heads share
    keys: at the ends tiles are joined."""

    key: Hashable
    spans: Callable[[Ints, int], Sequence[Span]]
    tile: int | Callable[[int], int] = 256
    cuts: tuple[int, ...] = field(default=())


@dataclass(frozen=True)
class RowRuns:
    """The keys that a single row keeps, as disjoint runs, and how many they are."""

    runs: tuple[slice, ...]
    kept: int

    @property
    def nbytes(self) -> int:
        return 200 * len(self.runs)


def row_runs(pattern: SpanPattern, position: int) -> RowRuns:
    """What a causal pattern says about the row at ``position``, cached: every layer asks again."""
    return PLANS.get(("row", pattern.key, position), lambda: _row_runs(pattern, position))


def _row_runs(pattern: SpanPattern, position: int) -> RowRuns:
    runs = _plan_of_row(pattern, np.array([position], dtype=np.int64), position + 1)
    return RowRuns(runs, num_keys_of(runs))


def num_keys_of(runs: Sequence[slice]) -> int:
    return sum(len(range(run.start, run.stop, run.step)) for run in runs)


def span_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: SpanPattern, call: Call, *, nothing_dropped: bool = False
) -> AttentionResult:
    """A whole call over a pattern that is nothing but spans. ``nothing_dropped``: every pair is kept, and the
    result says so."""
    if call.impl == "triton" and q.shape[2] > 1:
        from kernels._triton import spans

        return spans.span_attention(q, k, v, pattern, call, nothing_dropped=nothing_dropped)
    began = perf_counter()
    acc = accumulator(q, k, v, call)
    add_spans(acc, plan_for(acc, pattern))
    return result(acc, q, began, dropped=torch.zeros_like(acc.lse) if nothing_dropped else None)


def prefill_spans(
    q: Tensor,
    segments: Sequence[Segment],
    pattern: Callable[[Segment], SpanPattern],
    call: Call,
    *,
    nothing_dropped: bool = False,
) -> PackedResult:
    """Segments of a packed call in one launch, each over its own pattern (``contract.PrefillRows``)."""
    from kernels._triton.spans import packed_spans, span_part

    parts = [lambda segment: span_part(pattern(segment), call.causal)]
    return packed_spans(q, segments, parts, call, nothing_dropped=nothing_dropped)


def plan_for(acc: Accumulator, pattern: SpanPattern) -> SpanPlan:
    """The plan for these rows, cached. A causal one does not depend on how many keys follow the last row."""
    began = perf_counter()
    if acc.call.impl == "triton" and acc.q.shape[-2] > 1:
        from kernels._triton import spans

        tables = spans.tables_for(acc, pattern)
        acc.selection_s += perf_counter() - began
        return SpanPlan((), tables=tables)
    start, num_rows, causal = acc.call.start, acc.q.shape[-2], acc.call.causal
    num_keys = start + num_rows if causal else acc.k.shape[2]
    group = acc.q.shape[2]
    place = (acc.q.dtype, acc.q.device)
    key = (pattern.key, start, num_rows, num_keys, causal, group, place)
    plan = PLANS.get(key, lambda: _plan(pattern, start, num_rows, num_keys, _Target(group, *place)))
    acc.selection_s += perf_counter() - began
    return plan


def add_spans(acc: Accumulator, plan: SpanPlan) -> None:
    """Add the plan's rows to the accumulator."""
    if plan.tables is not None:
        from kernels._triton import spans

        spans.add_tables(acc, plan.tables)
        return
    if acc.q.shape[-2] == 1:
        _add_row(acc, plan)
        return
    guard = plan.masked is not None and not _finite(acc.k, acc.v, plan.masked)
    for part in plan.parts:
        for b in range(acc.q.shape[0]):
            for heads in _head_turns(acc, part):
                _add_part(acc, part, b, heads, guard)
        acc.complete(part.kept * acc.num_heads, part.computed * acc.num_heads)


def _add_row(acc: Accumulator, plan: SpanPlan) -> None:
    out, lse = acc.out, acc.lse
    if plan.runs:
        part = attend_row(acc.q, acc.k, acc.v, plan.runs, acc.call.scale, impl=acc.call.impl)
    else:
        part = torch.zeros_like(out), torch.full_like(lse, -math.inf)
    acc.put_into(out, lse, *part)
    kept = num_keys_of(plan.runs) * acc.num_heads
    acc.complete(kept, kept)


def _head_turns(acc: Accumulator, part: Part) -> list[slice]:
    """Key heads that run in one call. Overlapping panels of shared heads, and of keys that must be copied,
    take one at a time: a copy then is small, and neighbouring tiles meet their keys in the cache."""
    num_heads, group = acc.q.shape[1:3]
    if part.overlaps and (group > 1 or _scattered(acc)):
        return [slice(h, h + 1) for h in range(num_heads)]
    return [slice(0, num_heads)]


def _scattered(acc: Accumulator) -> bool:
    """Keys that overlapping panels would read, or convert, many times at a cost: those of a model's own
    layout, where heads alternate, and narrow ones."""
    return acc.k.dtype != acc.q.dtype or acc.k.stride(2) != acc.k.shape[3]


def _add_part(acc: Accumulator, part: Part, b: int, heads: slice, guard: bool) -> None:
    k, v = acc.k[b, heads], acc.v[b, heads]
    if part.overlaps and _scattered(acc):
        k, v = k.to(acc.q.dtype).contiguous(), v.to(acc.q.dtype).contiguous()
    rows = _Rows(acc.q[b, heads], k, v, acc.out[b, heads], acc.lse[b, heads])
    for tile in part.tiles:
        _add_tile(acc, rows, tile, guard)


@dataclass(frozen=True)
class _Rows:
    """One batch entry, some key heads: q [Hk, G, N, D], k [Hk, M, D], v [Hk, M, Dv], out and lse."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor


def _add_tile(acc: Accumulator, rows: _Rows, tile: Tile, guard: bool) -> None:
    to_out, to_lse = rows.out[:, :, tile.rows], rows.lse[:, :, tile.rows]
    if not tile.panels:
        if not acc.filled:
            to_out.zero_()
            to_lse.fill_(-math.inf)
        return
    q = _by_tile(rows.q[:, :, tile.rows], tile)
    parts = (_panel_part(q, rows.k, rows.v, panel, tile, acc.call.scale, guard) for panel in tile.panels)
    out, lse = next(parts)
    for part in parts:
        merge_into(out, lse, *part)
    acc.put_into(_rows_by_tile(to_out, tile), _rows_by_tile(to_lse.unsqueeze(-1), tile)[..., 0], out, lse)


def _rows_by_tile(rows: Tensor, tile: Tile) -> Tensor:
    """[Hk, G, count * R, D] -> [Hk, count, G, R, D], a view."""
    return torch.unflatten(rows, 2, (tile.count, tile.height)).transpose(1, 2)


def _by_tile(q: Tensor, tile: Tile) -> Tensor:
    """The same; where heads are joined [Hk, count, 1, G * R, D], a copy."""
    rows = _rows_by_tile(q, tile)
    return rows.flatten(2, 3).unsqueeze(2) if tile.joined else rows


def _panel_part(
    q: Tensor, k: Tensor, v: Tensor, panel: Panel, tile: Tile, scale: float, guard: bool
) -> tuple[Tensor, Tensor]:
    keys, values = panel.of(k, tile.count), panel.of(v, tile.count)
    out, lse = dense_part(q, keys, values, scale, mask=panel.mask, causal=panel.causal, guard=guard)
    if not tile.joined:
        return out, lse
    return torch.unflatten(out[:, :, 0], 2, (-1, tile.height)), torch.unflatten(
        lse[:, :, 0], 2, (-1, tile.height)
    )


def _finite(k: Tensor, v: Tensor, keys: slice) -> bool:
    """False sends masked panels the slow way round: a dropped key with NaN would spoil the rows beside it.
    A sum that overflows says False too, which costs time and nothing else."""
    return math.isfinite(
        float(k[:, :, keys].sum(dtype=torch.float32)) + float(v[:, :, keys].sum(dtype=torch.float32))
    )


@dataclass(frozen=True)
class _Target:
    """For whom a plan is made: query heads per key head, and where the masks live."""

    group: int
    dtype: torch.dtype
    device: torch.device


def _plan(pattern: SpanPattern, start: int, num_rows: int, num_keys: int, target: _Target) -> SpanPlan:
    rows = np.arange(start, start + num_rows, dtype=np.int64)
    if num_rows == 1:
        return SpanPlan((), _plan_of_row(pattern, rows, num_keys))
    spans = [s for s in pattern.spans(rows, num_keys) if bool((s.hi > s.lo).any())]
    height = pattern.tile if isinstance(pattern.tile, int) else pattern.tile(target.group)
    by_height: dict[int, list[Span]] = {} if spans else {height: []}
    for span in spans:
        by_height.setdefault(span.tile or height, []).append(span)
    cuts = [cut - start for cut in pattern.cuts]
    join = not isinstance(pattern.tile, int)
    parts = [_part(own, rows, tile, cuts, join, target) for tile, own in by_height.items()]
    return SpanPlan(tuple(parts), masked=_masked_range(parts))


def _plan_of_row(pattern: SpanPattern, row: Ints, num_keys: int) -> tuple[slice, ...]:
    return tuple(_runs(pattern.spans(row, num_keys), int(row[0])))


def _part(
    spans: Sequence[Span], rows: Ints, height: int, cuts: Sequence[int], join: bool, target: _Target
) -> Part:
    tiles: list[Tile] = []
    computed = 0
    for r0, r1 in _tile_rows(spans, rows, height, cuts, join):
        pieces = [piece for span in spans for piece in _pieces(span, rows, r0, r1)]
        slides = any(_slides(span, r0, r1) for span in spans)
        joined = join and slides and _joined(r1 - r0, target)
        tiles.append(Tile(r0, r1 - r0, 1, tuple(_panel(p, target, joined) for p in pieces), joined))
        computed += sum(computed_elements(r1 - r0, p.b - p.a, p.causal and not joined) for p in pieces)
    return Part(tuple(_batched(tiles)), sum(_num_kept(span, rows) for span in spans), computed)


def _joined(height: int, target: _Target) -> bool:
    """Whether heads that share keys run as one with more rows: where that makes torch's kernel take more rows
    at a time, and the copy of the rows stays small beside the work."""
    grows = height < _GROUPED_ROWS <= height * target.group or height < _TALL_ROWS <= height * target.group
    return grows and target.group > 2


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
    return replace(batch, count=batch.count + 1, panels=tuple(panels))


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


def _tile_rows(
    spans: Sequence[Span], rows: Ints, height: int, cuts: Sequence[int], join: bool
) -> Iterator[tuple[int, int]]:
    """Tiles at absolute multiples of ``height``; neighbours that do not slide may be joined."""
    start, num_rows = int(rows[0]), len(rows)
    cells = range(start // height * height - start, num_rows, height)
    borders = sorted({0, num_rows, *(x for x in (*cells, *cuts) if 0 < x < num_rows)})
    pending: tuple[int, int] | None = None
    for r0, r1 in zip(borders[:-1], borders[1:], strict=True):
        slides = not join or any(_slides(span, r0, r1) for span in spans)
        if pending is not None:
            same_cell = (start + pending[0]) // _JOINED_ROWS == (start + r0) // _JOINED_ROWS
            if not slides and same_cell and r0 not in cuts:
                pending = pending[0], r1
                continue
            yield pending
        pending = None if slides else (r0, r1)
        if slides:
            yield r0, r1
    if pending is not None:
        yield pending


def _slides(span: Span, r0: int, r1: int) -> bool:
    """Whether each of the rows sees the keys of the row before, moved by one."""
    lo, hi = span.lo[r0:r1], span.hi[r0:r1]
    moved = r1 - r0 - 1
    return bool(hi[0] > lo[0]) and int(lo[-1] - lo[0]) == moved and int(hi[-1] - hi[0]) == moved


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
    seen_by_all = int(hi.min()) - int(lo.max())
    if r1 - r0 >= _SPLIT_ROWS and seen_by_all >= max(_SPLIT_KEYS, r1 - r0):
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


def _panel(piece: _Piece, target: _Target, joined: bool) -> Panel:
    causal = piece.causal and not joined
    panel = Panel(piece.span.first, piece.span.step, piece.a, piece.b, causal=causal)
    if piece.full or causal:
        return panel
    width, copies = piece.b - piece.a, target.group if joined else 1
    key = (
        "span",
        piece.lo.tobytes(),
        piece.hi.tobytes(),
        piece.own,
        width,
        copies,
        target.dtype,
        target.device,
    )
    return replace(panel, mask=MASKS.get(key, lambda: _edge_mask(piece, width, copies, target)))


def _edge_mask(piece: _Piece, width: int, copies: int, target: _Target) -> Mask:
    columns = torch.arange(width)
    lo, hi = torch.from_numpy(piece.lo)[:, None], torch.from_numpy(piece.hi)[:, None]
    keep = (columns >= lo) & (columns < hi)
    if piece.own is not None:
        keep &= columns != torch.arange(len(piece.lo))[:, None] + piece.own
    return make_mask(keep.repeat(copies, 1).to(target.device), target.dtype)


def _masked_range(parts: Sequence[Part]) -> slice | None:
    found = [(p, tile.count - 1) for part in parts for tile in part.tiles for p in tile.panels]
    ragged = [(p, moves) for p, moves in found if p.mask is not None or p.causal]
    if not ragged:
        return None
    return slice(
        min(p.first + p.a * p.step for p, _ in ragged),
        max(p.first + (p.b - 1 + moves * p.advance) * p.step + 1 for p, moves in ragged),
    )
