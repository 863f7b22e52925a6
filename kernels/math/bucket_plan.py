"""Where a row's keys lie once keys are sorted by (bucket, position), and panels that hold them.

    place     of a key in that order of one table
    [lo, hi)  the places that a row keeps in one round; [hole_lo, hole_hi) those of them in its window

Rows that are sorted by (bucket, position) too have lo and hi that only move on, so neighbouring rows share
most of their keys: a panel takes neighbours as long as all their keys span at most ``width`` places.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.math.spans import Ints

PANEL_ELEMENTS = 1 << 18
"""Score elements of the panels that run as one batch: they stay in a core's cache."""
WIDTH_STEP = 32
Codes16 = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Sight:
    """What of a bucket a row may keep: ``kernels.math.buckets.Reach`` for one call."""

    cluster_size: int
    window: int
    sinks: int
    exact_rows: int
    whole: bool
    causal: bool


@dataclass(frozen=True)
class Table:
    """One order of a head's keys: ``order`` [M] positions by place, ``place`` [M] its inverse, ``starts``
    [buckets + 1] where buckets begin, ``tags`` [M] ascending (bucket, position) as one number."""

    order: Ints
    place: Ints
    starts: Ints
    tags: Ints
    after_sinks: Ints

    @property
    def unit(self) -> int:
        """What a bucket counts in a tag."""
        return len(self.order) + 1


def key_table(codes: Codes16, num_buckets: int, sinks: int) -> Table:
    """The order of keys with these codes [M] below ``num_buckets``."""
    order = np.argsort(codes, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    tags = codes[order].astype(np.int64) * (len(order) + 1) + order
    buckets = np.arange(num_buckets + 1) * (len(order) + 1)
    starts = np.searchsorted(tags, buckets)
    return Table(order, place, starts, tags, np.searchsorted(tags, buckets[:-1] + min(sinks, len(order))))


@dataclass(frozen=True)
class Round:
    """One round of one head: live rows in order, as g * N + n, with their places; and of every row [G N] the
    places ``all_lo``, ``all_hi`` for telling what this round has found."""

    table: Table
    number: int
    rows: Ints
    lo: Ints
    hi: Ints
    hole_lo: Ints | None
    hole_hi: Ints | None
    all_lo: Ints
    all_hi: Ints


def look(table: Table, number: int, codes: Codes16, start: int, sight: Sight) -> Round:
    """Where the rows with these codes [G, N] look; ``number`` tells tables apart."""
    G, N = codes.shape
    by_position = np.argsort(codes.T.reshape(-1), kind="stable")
    n, g = np.divmod(by_position, G)
    rows, i, code = g * N + n, n + start, codes[g, n].astype(np.int64)
    lo, hi, hole = _places(table, i, code, sight)
    all_lo, all_hi = np.zeros(G * N, np.int64), np.zeros(G * N, np.int64)
    all_lo[rows], all_hi[rows] = lo, hi
    live = hi > lo
    if hole is not None:
        live &= (hole[0] > lo) | (hole[1] < hi)
        hole = hole[0][live], hole[1][live]
    low, high = hole or (None, None)
    return Round(table, number, rows[live], lo[live], hi[live], low, high, all_lo, all_hi)


def _places(table: Table, i: Ints, code: Ints, sight: Sight) -> tuple[Ints, Ints, tuple[Ints, Ints] | None]:
    """lo, hi and the hole of rows at positions i; sinks are left out, exact rows have nothing."""
    tag, c, num_keys = code * table.unit, sight.cluster_size, len(table.order)
    seen = np.searchsorted(table.tags, tag + i, side="right")
    lo, hi = table.starts[code], table.starts[code + 1]
    hole = None
    if sight.causal:
        outside = np.searchsorted(table.tags, tag + np.maximum(i - sight.window + 1, 0))
        lo, hi = np.maximum(lo, seen - c), np.minimum(seen, outside)
        hi = np.where(i < sight.exact_rows, 0, hi)
    else:
        if not sight.whole:
            lo, hi = np.maximum(lo, seen - -(-c // 2)), np.minimum(hi, seen + c // 2)
        hole = (
            np.searchsorted(table.tags, tag + np.maximum(i - sight.window, 0)),
            np.searchsorted(table.tags, tag + np.minimum(i + sight.window, num_keys - 1), side="right"),
        )
    lo = np.maximum(lo, table.after_sinks[code])
    return lo, np.maximum(hi, lo), hole


def panel_rows(cluster_size: int) -> int:
    """Rows of a panel: more of them waste keys, fewer of them speed."""
    return 64 if cluster_size <= 128 else 128 if cluster_size <= 512 else 256


@dataclass(frozen=True)
class Batch:
    """T panels of R rows and P keys: what ``kernels.math.buckets.BucketPanels`` says, for one head."""

    rows: Tensor
    into: Tensor
    keys: Tensor
    drop: Tensor


def batches(round_: Round, earlier: list[Round], cluster_size: int, device: torch.device) -> Iterator[Batch]:
    """The pairs of a round that no earlier round of another table has found."""
    height = panel_rows(cluster_size)
    begins, ends = _cut(round_, height, cluster_size + height)
    widths = -(-(round_.hi[ends - 1] - round_.lo[begins]) // WIDTH_STEP) * WIDTH_STEP
    narrow_first = np.argsort(widths, kind="stable")
    others = [other for other in earlier if other.number != round_.number]
    for some in _batched(widths[narrow_first].tolist(), PANEL_ELEMENTS // height):
        panels = narrow_first[some]
        width = int(widths[panels[-1]])
        yield _batch(round_, others, begins[panels], ends[panels], height, width, device)


def _batched(widths: list[int], room: int) -> Iterator[slice]:
    """Runs of ascending widths whose sum, each counted as the widest, fits; at least one."""
    begin = 0
    for at, width in enumerate(widths):
        if at > begin and (at + 1 - begin) * width > room:
            yield slice(begin, at)
            begin = at
    if begin < len(widths):
        yield slice(begin, len(widths))


def _cut(round_: Round, height: int, width: int) -> tuple[Ints, Ints]:
    """Rows [begin, end) of each panel: as many neighbours as fit."""
    stops = np.searchsorted(round_.hi, round_.lo + width, side="right")
    follow = np.minimum(stops, np.arange(len(stops)) + height).tolist()
    borders = [0]
    while borders[-1] < len(follow):
        borders.append(follow[borders[-1]])
    return np.array(borders[:-1], np.int64), np.array(borders[1:], np.int64)


def _batch(
    round_: Round,
    others: list[Round],
    begins: Ints,
    ends: Ints,
    height: int,
    width: int,
    device: torch.device,
) -> Batch:
    table = round_.table
    at = begins[:, None] + np.arange(height)
    filled = at < ends[:, None]
    at = np.minimum(at, ends[:, None] - 1)
    rows, first = round_.rows[at], round_.lo[begins][:, None]
    keys = table.order[np.minimum(first + np.arange(width), len(table.order) - 1)]
    lo, hi = round_.lo[at] - first, np.where(filled, round_.hi[at] - first, 0)
    places = _Places(len(table.order), device)
    drop = places.outside(np.arange(width)[None], lo, hi)
    if round_.hole_lo is not None and round_.hole_hi is not None:
        drop |= ~places.outside(
            np.arange(width)[None], round_.hole_lo[at] - first, round_.hole_hi[at] - first
        )
    for other in others:
        drop |= ~places.outside(other.table.place[keys], other.all_lo[rows], other.all_hi[rows])
    into = np.where(filled, rows, len(round_.all_lo))
    on_device = [torch.from_numpy(x).to(device) for x in (rows, into, keys)]
    return Batch(on_device[0], on_device[1], on_device[2], drop)


class _Places:
    """Whether x lies outside lo <= x < hi, from the signs of x - lo and hi - 1 - x: on integers as small as
    the number of keys permits, that is many times faster than comparisons are."""

    def __init__(self, num_keys: int, device: torch.device) -> None:
        self._device = device
        self._narrow = num_keys < 1 << 15

    def outside(self, x: Ints, lo: Ints, hi: Ints) -> Tensor:
        """x [T or 1, P], lo and hi [T, R], none farther from 0 than num_keys -> [T, R, P]: -1 where x lies
        outside, else 0."""
        number = self._number(x)[:, None]
        sign = (number - self._number(lo)[..., None]).bitwise_or_(self._number(hi - 1)[..., None] - number)
        return sign.bitwise_right_shift_(15 if self._narrow else 31)

    def _number(self, x: Ints) -> Tensor:
        return torch.from_numpy(x.astype(np.int16 if self._narrow else np.int32)).to(self._device)
