"""Patterns of spans (``kernels.math.spans``) as tables for the block-sparse kernel, planned without a loop
over tiles.

    row i keeps lo_i <= j < hi_i of the series first, first + step, ...

A tile's keys, from the first that any of its rows sees, are cut into cells of ``block`` keys: cells that all
rows see form one range, or full entries; the others are entries under a mask. Cells are counted from the
tile's first key, so that a sliding window has the same few masks everywhere; equal masks are kept once.
Tiles of many sequences are put behind each other and go through one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels._triton.block_sparse import WORD_BITS, Lists, Tiles, launch_on, rows_for, tile_rows
from kernels._triton.operands import keys_of_call, keys_of_segments, rows_of
from kernels._triton.targets import interpreting, target_of
from kernels.contract import AttentionResult, Call, PackedResult, Segment, Stats
from kernels.math.accumulate import Accumulator
from kernels.math.cache import PLANS
from kernels.math.spans import Ints, Span, SpanPattern

Bits = npt.NDArray[np.int32]
_FAR = 1 << 40
_MASK_WEIGHT = 1.5
"""What an entry under a mask costs, over one without: for the order of tiles only."""


@dataclass(frozen=True)
class HostPlan:
    """Tiles of one sequence: ``first`` row and ``num`` rows [T]; ``ranges`` [T, 2]; full entries [nnz, 2] and
    masked ones [nnz, 3], tile after tile, with their numbers per tile; pairs per head.

    ``may_range`` and ``may_list``: whether the pattern has ranges, or full entries, at some length. The
    kernel's loops go by these, so that no length compiles a variant of its own."""

    rows: int
    step: int
    block: int
    first: Ints
    num: Ints
    ranges: Ints
    num_full: Ints
    full: Ints
    num_masked: Ints
    masked: Ints
    masks: Bits
    kept: int
    computed: int
    may_range: bool
    may_list: bool

    @property
    def nbytes(self) -> int:
        arrays = (self.first, self.num, self.ranges, self.num_full, self.full, self.num_masked, self.masked)
        return sum(array.nbytes for array in arrays) + self.masks.nbytes


@dataclass(frozen=True)
class SpanTables:
    """Plans on the device, ready to launch; pairs per head of all sequences."""

    tiles: Tiles
    lists: Lists
    kept: int
    computed: int

    @property
    def nbytes(self) -> int:
        tables = (x for x in vars(self.lists).values() if isinstance(x, Tensor))
        return self.tiles.table.nbytes + sum(table.nbytes for table in tables)


@dataclass(frozen=True)
class Place:
    """Rows of one sequence: ``num_rows`` from position ``start``, of ``num_keys`` keys; in the packed q they
    begin at ``row``."""

    start: int
    num_rows: int
    num_keys: int
    row: int = 0
    sequence: int = 0


HostPlanner = Callable[[Place, int], HostPlan]
"""The plan of some rows in kernel tiles of so many rows."""
Part = tuple[Hashable, HostPlanner]
"""What tells a part of a pattern from others (for the caches), and how it is planned."""


def span_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: SpanPattern, call: Call, *, nothing_dropped: bool = False
) -> AttentionResult:
    """A whole call over a pattern that is nothing but spans: one launch, with ``out`` in q's dtype."""
    began = perf_counter()
    B, H, N, _ = q.shape
    rows = rows_of(q, v.shape[-1])
    num_keys = call.start + N if call.causal else k.shape[2]
    places = [Place(call.start, N, num_keys, 0, b) for b in range(B)]
    height = rows_for(q, k.shape[1], max(k.shape[-1], v.shape[-1]))
    tables = _joined_tables(places, [span_part(pattern, call.causal)] * B, height, q.device)
    planned = perf_counter()
    _add(rows.q, rows.out, rows.lse, k, v, call, tables, filled=False)
    dropped = q.new_zeros(B, H, N, dtype=torch.float32) if nothing_dropped else None
    stats = Stats(
        pairs_kept=tables.kept * H,
        pairs_exact=B * H * _pairs_exact(places[0], call.causal),
        pairs_computed=tables.computed * H,
        selection_ms=(planned - began) * 1e3,
        compute_ms=(perf_counter() - planned) * 1e3,
        impl="triton",
        dropped_mass=0.0 if nothing_dropped else None,
    )
    return AttentionResult(rows.out, rows.lse, stats, dropped)


def packed_spans(
    q: Tensor,
    segments: Sequence[Segment],
    parts: Sequence[Callable[[Segment], Part]],
    call: Call,
    *,
    nothing_dropped: bool = False,
) -> PackedResult:
    """Segments of a packed call, a launch for each of ``parts``. q and result as
    ``contract.PrefillRows`` says."""
    began = perf_counter()
    heads, places = q.shape[1], [_place(number, segment, call) for number, segment in enumerate(segments)]
    rows = rows_of(q, segments[0].v.shape[-1], parts=len(parts))
    keys = keys_of_segments(segments)
    group = heads // keys.num_heads
    own_q, own_out, own_lse = (x.unflatten(1, (keys.num_heads, group)) for x in (rows.q, rows.out, rows.lse))
    height = rows_for(q, keys.num_heads, max(keys.key_dim, keys.value_dim))
    kept, computed, planning_s = [0] * len(places), [0] * len(places), 0.0
    for turn, part in enumerate(parts):
        planning = perf_counter()
        own = [part(segment) for segment in segments]
        tables = _joined_tables(places, own, height, q.device)
        for number, ((key, planner), place) in enumerate(zip(own, places, strict=True)):
            plan = _host_plan(key, planner, place, height)
            kept[number] += plan.kept * heads
            computed[number] += plan.computed * heads
        planning_s += perf_counter() - planning
        parted = tables.tiles, tables.lists
        launch_on(own_q, own_out, own_lse, keys, *parted, scale=call.scale, filled=turn > 0).run()
    share = 1e3 / len(places)
    spent = perf_counter() - began - planning_s
    dropped_mass = 0.0 if nothing_dropped else None
    stats = tuple(
        Stats(
            pairs_kept=kept[number],
            pairs_exact=heads * _pairs_exact(place, call.causal),
            pairs_computed=computed[number],
            selection_ms=planning_s * share,
            compute_ms=spent * share,
            impl="triton",
            dropped_mass=dropped_mass,
        )
        for number, place in enumerate(places)
    )
    dropped: tuple[Tensor | None, ...] = (None,) * len(places)
    if nothing_dropped:
        dropped = tuple(q.new_zeros(1, heads, place.num_rows, dtype=torch.float32) for place in places)
    return PackedResult(rows.result(), stats, dropped)


def span_part(pattern: SpanPattern, causal: bool) -> Part:
    """A part of a packed call that is a pattern of spans."""
    return (pattern.key, causal), lambda place, height: plan_spans(pattern, place, height)


def residue_part(stride: int, causal: bool) -> Part:
    """A part that is the residue classes of ``stride``."""
    return ("residues", stride, causal), lambda place, height: _plan_residues(stride, causal, place, height)


def same_part(part: Part) -> Callable[[Segment], Part]:
    """A part that is the same in every segment."""
    return lambda segment: part


def tables_for(acc: Accumulator, pattern: SpanPattern) -> SpanTables:
    """The tables for the accumulator's rows, cached."""
    return _accumulator_tables(acc, *span_part(pattern, acc.call.causal))


def add_tables(acc: Accumulator, tables: SpanTables) -> None:
    """Add their pairs to every row of the accumulator."""
    _add(acc.q, acc.out, acc.lse, acc.k, acc.v, acc.call, tables, filled=acc.filled)
    heads = acc.num_heads // acc.lse.shape[0]
    acc.complete(tables.kept * heads, tables.computed * heads)


def add_residues(acc: Accumulator, stride: int) -> None:
    """Add the classes j = i (mod stride) to every row: tiles of rows that are ``stride`` apart."""
    add_tables(acc, _accumulator_tables(acc, *residue_part(stride, acc.call.causal)))


def _accumulator_tables(acc: Accumulator, key: Hashable, planner: HostPlanner) -> SpanTables:
    call, num_rows = acc.call, acc.q.shape[-2]
    num_keys = call.start + num_rows if call.causal else acc.k.shape[2]
    places = [Place(call.start, num_rows, num_keys, 0, b) for b in range(acc.q.shape[0])]
    target, group = target_of(acc.q.device), acc.q.shape[2]
    height = tile_rows(target, acc.q.dtype, max(acc.k.shape[-1], acc.v.shape[-1]), group)
    return _joined_tables(places, [(key, planner)] * len(places), height, acc.q.device)


def _joined_tables(
    places: Sequence[Place],
    own: Sequence[Part],
    height: int,
    device: torch.device,
) -> SpanTables:
    """The plans of all places as one, cached: every layer asks again."""
    key = ("span tables", tuple(key for key, _ in own), tuple(places), height, device)

    def build() -> SpanTables:
        plans = [_host_plan(key, plan, place, height) for (key, plan), place in zip(own, places, strict=True)]
        return _on_device(plans, places, device)

    return PLANS.get(key, build)


def _host_plan(key: Hashable, planner: HostPlanner, place: Place, height: int) -> HostPlan:
    size = (place.start, place.num_rows, place.num_keys, height)
    return PLANS.get(("span plan", key, *size), lambda: planner(place, height))


def _place(number: int, segment: Segment, call: Call) -> Place:
    num_rows = segment.rows.stop - segment.rows.start
    num_keys = segment.start + num_rows if call.causal else segment.k.shape[2]
    return Place(segment.start, num_rows, num_keys, segment.rows.start, number)


def _pairs_exact(place: Place, causal: bool) -> int:
    N = place.num_rows
    return N * place.start + N * (N + 1) // 2 if causal else N * place.num_keys


def _add(
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    tables: SpanTables,
    *,
    filled: bool,
) -> None:
    if q.dim() == 4:
        sizes = (k.shape[1], q.shape[1] // k.shape[1])
        q, out, lse = (x.unflatten(1, sizes) for x in (q, out, lse))
    keys = keys_of_call(k, v, call)
    launch_on(q, out, lse, keys, tables.tiles, tables.lists, scale=call.scale, filled=filled).run()


def plan_spans(pattern: SpanPattern, place: Place, height: int) -> HostPlan:
    """The pattern's tiles of at most ``height`` rows, cut at absolute multiples of it and where it says."""
    rows = np.arange(place.start, place.start + place.num_rows, dtype=np.int64)
    cells = range(place.start // height * height, place.start + place.num_rows, height)
    inside = {x - place.start for x in (*cells, *pattern.cuts) if 0 < x - place.start < place.num_rows}
    borders = np.array(sorted({0, place.num_rows, *inside}), dtype=np.int64)
    spans = [_Series.of(span, rows) for span in pattern.spans(rows, place.num_keys)]
    return _plan(spans, borders[:-1], borders[1:], borders[:-1], height, 1)


def _plan_residues(stride: int, causal: bool, place: Place, height: int) -> HostPlan:
    """Rows class by class; the keys of a row's class up to itself, or all of them."""
    rows = np.arange(place.num_rows, dtype=np.int64)
    rows = rows[np.lexsort((rows, rows % stride))]
    place_in_class, residue = np.divmod(place.start + rows, stride)
    all_keys = -(-(place.num_keys - residue) // stride)
    hi = place_in_class + 1 if causal else all_keys
    begins = np.flatnonzero(np.diff(rows % stride, prepend=-1))
    sizes = np.diff([*begins, len(rows)])
    height = min(height, 1 << (int(sizes.max()) - 1).bit_length())
    pieces = -(-sizes // height)
    number = np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    r0 = np.repeat(begins, pieces) + number * height
    r1 = np.minimum(r0 + height, np.repeat(begins + sizes, pieces))
    series = _Series(np.zeros_like(hi), hi, None, residue[r0], stride)
    return _plan([series], r0, r1, rows[r0], height, stride)


@dataclass(frozen=True)
class _Series:
    """A span with its keys' first as one number or one per tile; ``own``: the position that a hole
    leaves out."""

    lo: Ints
    hi: Ints
    own: Ints | None
    first: Ints | int
    step: int

    @classmethod
    def of(cls, span: Span, rows: Ints) -> _Series:
        return cls(span.lo, span.hi, rows if span.hole else None, span.first, span.step)

    def is_dense(self) -> bool:
        """Whether its keys follow each other, the same in all tiles."""
        return self.step == 1 and isinstance(self.first, int)

    def kept(self) -> int:
        width = np.maximum(self.hi - self.lo, 0)
        if self.own is None:
            return int(width.sum())
        return int(width.sum()) - int(((self.lo <= self.own) & (self.own < self.hi)).sum())


@dataclass(frozen=True)
class _Cells:
    """One series' cells: for each tile its first key ``a``, and five stretches of cells between six ends:
    masked, full, masked, full, masked. ``edges`` int16 [tiles, rows, 3] come with the masked ones."""

    series: _Series
    a: Ints
    ends: Ints
    low: Ints
    high: Ints
    own: Ints | None

    def num_first(self) -> int:
        """Cells of the first stretch of full ones."""
        return int((self.ends[:, 2] - self.ends[:, 1]).sum())

    def full(self, stretches: Sequence[int]) -> tuple[Ints, Ints]:
        return _expanded([(self.ends[:, s], self.ends[:, s + 1]) for s in stretches])

    def masked(self) -> tuple[Ints, Ints]:
        return self.full((0, 2, 4))

    def first_keys(self, tile: Ints, cell: Ints, block: int) -> Ints:
        """The first key of each cell as a position."""
        first = self.series.first if isinstance(self.series.first, int) else self.series.first[tile]
        return np.asarray(first + (self.a[tile] + cell * block) * self.series.step)

    def edges(self, tile: Ints, cell: Ints, block: int) -> npt.NDArray[np.int16]:
        """What each row sees of each cell: from, to, and the place of its hole or -1: [n, rows, 3]."""
        begin = (self.a[tile] + cell * block)[:, None]
        low = np.clip(self.low[tile] - begin, 0, block)
        high = np.clip(self.high[tile] - begin, 0, block)
        hole = np.full_like(low, -1)
        if self.own is not None:
            at = self.own[tile] - begin
            hole = np.where((at >= low) & (at < high), at, -1)
        nothing = high <= low
        low[nothing], high[nothing] = 0, 0
        return np.stack([low, high, hole], -1).astype(np.int16)


def _plan(
    series: Sequence[_Series], r0: Ints, r1: Ints, first_row: Ints, height: int, row_step: int
) -> HostPlan:
    """Tile t has rows r0[t] .. r1[t] - 1 of the series' arrays, ``first_row[t]`` and every ``row_step``-th of
    the call."""
    block = cell_width()
    cells = [_cells(one, r0, r1, height, block) for one in series]
    ranged = _ranged(cells)
    ranges = np.zeros((len(r0), 2), np.int64)
    if ranged is not None:
        ranges = series[ranged].first + cells[ranged].a[:, None] + cells[ranged].ends[:, 1:3] * block
    full = _full_entries(cells, ranged, block, len(r0))
    num_masked, masked, masks = _masked_entries(cells, block, height, len(r0))
    in_range = (ranges[:, 1] - ranges[:, 0]) // block
    num_cells = in_range + full[0] + num_masked
    return HostPlan(
        height,
        row_step,
        block,
        first_row,
        r1 - r0,
        ranges,
        *full,
        num_masked,
        masked,
        masks,
        sum(one.kept() for one in series),
        int((num_cells * (r1 - r0)).sum()) * block,
        any(one.is_dense() for one in series),
        len(series) > 1 or not series[0].is_dense() or series[0].own is not None,
    )


def cell_width() -> int:
    """Keys of a cell: as many as the kernel's loop takes at a time."""
    return 32 if interpreting() else 64


def _cells(series: _Series, r0: Ints, r1: Ints, height: int, block: int) -> _Cells:
    at = r0[:, None] + np.arange(height)
    real = at < r1[:, None]
    at = np.minimum(at, r1[:, None] - 1)
    low, high = series.lo[at], series.hi[at]
    live = real & (high > low)
    a = np.where(live, low, _FAR).min(1)
    b = np.where(live, high, 0).max(1)
    a = np.minimum(a, b)
    num = -(-(b - a) // block)
    begin = np.clip(-(-(np.where(real, low, 0).max(1) - a) // block), 0, num)
    end = np.clip((np.where(real, high, _FAR).min(1) - a) // block, begin, num)
    first_hole = last_hole = end
    own = None
    if series.own is not None:
        own = series.own[at]
        first_hole = np.clip((own.min(1) - a) // block, begin, end)
        last_hole = np.clip((own.max(1) - a) // block + 1, first_hole, end)
    ends = np.stack([np.zeros_like(num), begin, first_hole, last_hole, end, num], 1)
    return _Cells(series, a, ends, np.where(live, low, 0), np.where(live, high, 0), own)


def _ranged(cells: Sequence[_Cells]) -> int | None:
    """The series whose first stretches of full cells go by as ranges: the longest of every key."""
    dense = [n for n, one in enumerate(cells) if one.series.is_dense()]
    best = max(dense, key=lambda n: cells[n].num_first(), default=None)
    return best if best is not None and cells[best].num_first() else None


def _expanded(stretches: Sequence[tuple[Ints, Ints]]) -> tuple[Ints, Ints]:
    """Stretches begin .. end of every tile -> (tile, cell) one by one."""
    tiles, cells = [], []
    for begin, end in stretches:
        num = np.maximum(end - begin, 0)
        tile = np.repeat(np.arange(len(num)), num)
        tiles.append(tile)
        cells.append(np.arange(len(tile)) - np.repeat(np.cumsum(num) - num, num) + begin[tile])
    return np.concatenate(tiles), np.concatenate(cells)


def _full_entries(
    cells: Sequence[_Cells], ranged: int | None, block: int, num_tiles: int
) -> tuple[Ints, Ints]:
    """How many each tile has, and they."""
    tiles, entries = [np.zeros(0, np.int64)], [np.zeros((0, 2), np.int64)]
    for number, one in enumerate(cells):
        tile, cell = one.full((3,) if number == ranged else (1, 3))
        tiles.append(tile)
        entries.append(np.stack([one.first_keys(tile, cell, block), np.full_like(tile, one.series.step)], 1))
    tile, entry = np.concatenate(tiles), np.concatenate(entries)
    return np.bincount(tile, minlength=num_tiles), entry[np.argsort(tile, kind="stable")]


def _masked_entries(
    cells: Sequence[_Cells], block: int, height: int, num_tiles: int
) -> tuple[Ints, Ints, Bits]:
    """How many each tile has, they, and the masks that they number."""
    tiles, entries = [np.zeros(0, np.int64)], [np.zeros((0, 2), np.int64)]
    edges = [np.zeros((0, height, 3), np.int16)]
    for one in cells:
        tile, cell = one.masked()
        seen = one.edges(tile, cell, block)
        some = (seen[..., 1] > seen[..., 0]).any(1)
        tile, cell = tile[some], cell[some]
        tiles.append(tile)
        entries.append(np.stack([one.first_keys(tile, cell, block), np.full_like(tile, one.series.step)], 1))
        edges.append(seen[some])
    tile, entry = np.concatenate(tiles), np.concatenate(entries)
    masks, number = _distinct(np.concatenate(edges), block)
    order = np.argsort(tile, kind="stable")
    masked = np.concatenate([entry, number[:, None]], 1)
    return np.bincount(tile, minlength=num_tiles), masked[order], masks


def _distinct(edges: npt.NDArray[np.int16], block: int) -> tuple[Bits, Ints]:
    """Masks as bits [masks, rows, words], each once, and the number of each entry's."""
    n, height, _ = edges.shape
    if not n:
        return np.zeros((0, height, block // WORD_BITS), np.int32), np.zeros(0, np.int64)
    flat = np.ascontiguousarray(edges.reshape(n, -1))
    whole = flat.view(np.dtype((np.void, flat.shape[1] * flat.itemsize)))[:, 0]
    _, index, number = np.unique(whole, return_index=True, return_inverse=True)
    low, high, hole = (edges[index][..., i, None] for i in range(3))
    columns = np.arange(block, dtype=np.int16)
    return packed_bits((columns >= low) & (columns < high) & (columns != hole)), number.reshape(-1)


def packed_bits(keep: npt.NDArray[np.bool_]) -> Bits:
    """Bool [..., block] -> int32 [..., block / 32], bit n % 32 of word n // 32."""
    return np.packbits(keep, axis=-1, bitorder="little").view("<i4").astype(np.int32, copy=False)


def _on_device(plans: Sequence[HostPlan], places: Sequence[Place], device: torch.device) -> SpanTables:
    """Plans behind each other, the largest tiles first in the order."""
    table, masked, num_masks = [], [], 0
    height = max(plan.rows for plan in plans)
    for plan, place in zip(plans, places, strict=True):
        sequence = np.full_like(plan.num, place.sequence)
        table.append(np.stack([plan.first + place.row, plan.num, sequence], 1))
        masked.append(plan.masked + np.array([0, 0, num_masks]))
        num_masks += len(plan.masks)
    tiles = np.concatenate(table)
    tiles = np.concatenate([tiles, np.arange(len(tiles))[:, None]], 1)
    num_full, num_masked = (
        np.concatenate([getattr(p, n) for p in plans]) for n in ("num_full", "num_masked")
    )
    ranges = np.concatenate([plan.ranges for plan in plans])
    weight = (ranges[:, 1] - ranges[:, 0]) / plans[0].block + num_full + _MASK_WEIGHT * num_masked
    may_range, may_list = any(plan.may_range for plan in plans), any(plan.may_list for plan in plans)

    def put(array: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32)).to(device, non_blocking=True)

    lists = Lists(
        plans[0].block,
        ranges=put(ranges) if may_range else None,
        full_indptr=put(indptr_of(num_full[None])) if may_list else None,
        full=put(np.concatenate([plan.full for plan in plans])) if may_list else None,
        masked_indptr=put(indptr_of(num_masked[None])),
        masked=put(np.concatenate(masked)),
        masks=put(np.concatenate([_padded(plan.masks, height) for plan in plans])),
        order=put(np.argsort(-weight, kind="stable")[None]),
        whole=True,
    )
    return SpanTables(
        Tiles(height, put(tiles), plans[0].step),
        lists,
        sum(plan.kept for plan in plans),
        sum(plan.computed for plan in plans),
    )


def indptr_of(num: Ints) -> Ints:
    """Where lists of ``num`` [heads, lists] entries begin and end [heads, lists + 1], head after head."""
    ends = num.cumsum().reshape(num.shape)
    begins = np.concatenate([[0], ends.flat[:-1]]).reshape(ends.shape)
    return np.concatenate([begins, ends[:, -1:]], 1)


def _padded(masks: Bits, height: int) -> Bits:
    """Masks of lower tiles with rows that see nothing below."""
    return np.pad(masks, ((0, 0), (0, height - masks.shape[1]), (0, 0)))
