"""How time and work grow with the length, and from which length a backend is faster than dense attention.

exponent = least-squares slope of log t on log N over N >= 4096       t ~ N ** exponent
crossover: log ratio is taken as linear in log N between two benched lengths; ratio 1 is the crossing, told
           only where the longest length is faster by more than ``NOISE``
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from kernels.benchmarks.rows import Row
from kernels.registry import load

FIT_FROM = 4096
NOISE = 1.05
"""Ratios of one run between this and its inverse tell nothing."""
DENSE = "dense SDPA"
ITSELF = "itself"
Points = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Growth:
    """Of one backend at one shape and direction. None: fewer than two lengths from 4,096 on, or no crossing;
    ``crossover_note`` then says on which side. ``pairs_exponent`` is of the score elements computed (None: it
    computes none), ``work_exponent`` of all floating-point operations counted, those of a choice included.
    ``dense_extrapolated``: dense SDPA's exponent, or the crossover, rests on a dense time that was
    extrapolated."""

    backend: str
    impl: str
    params: str
    shape: str
    causal: bool
    time_exponent: float | None
    pairs_exponent: float | None
    work_exponent: float | None
    documented_exponent: float
    fitted_lengths: tuple[int, ...]
    crossover_length: float | None
    crossover_note: str
    dense_extrapolated: bool


def exponent(points: Points) -> float | None:
    """Slope of log y on log x over the points from ``FIT_FROM`` on; None for fewer than two, or where y is
    0."""
    large = [(N, y) for N, y in points if N >= FIT_FROM]
    if any(y <= 0 for _, y in large):
        return None
    if len({N for N, _ in large}) < 2:
        return None
    x, y = np.log(np.array(large, dtype=float)).T
    return float(np.polyfit(x, y, 1)[0])


def crossover(ratios: Points) -> tuple[float | None, str]:
    """From which length on every ratio to dense is above 1: ratios by ascending length, at least one. A
    longest length within ``NOISE`` of dense has no crossover: another run may turn it round."""
    longest, last = ratios[-1]
    if last < 1 / NOISE:
        return None, f"not faster at {longest}, the longest"
    if last <= NOISE:
        return None, f"within noise of dense at {longest}, the longest"
    slower = [number for number, (_, ratio) in enumerate(ratios) if ratio <= 1]
    if not slower:
        return None, f"faster from {ratios[0][0]} on, the shortest"
    (before, below), (after, above) = list(pairwise(ratios))[slower[-1]]
    weight = math.log(below) / (math.log(below) - math.log(above))
    return math.exp(math.log(before) + weight * (math.log(after) - math.log(before))), ""


def growths(rows: Sequence[Row]) -> list[Growth]:
    """One per backend, impl, params, shape and direction, in the rows' order; dense SDPA first of each.
    Impl ``reference`` is no method's speed and has none."""
    rows = [row for row in rows if row.impl != "reference"]
    found = []
    for shape, causal in dict.fromkeys((row.shape, row.causal) for row in rows):
        some = [row for row in rows if (row.shape, row.causal) == (shape, causal)]
        found.append(_dense(some))
        for key in dict.fromkeys(_key(row) for row in some):
            found.append(_of_one([row for row in some if _key(row) == key]))
    return found


def _key(row: Row) -> tuple[str, str, str]:
    return row.backend, row.impl, row.params


def _of_one(rows: Sequence[Row]) -> Growth:
    rows = sorted(rows, key=lambda row: row.length)
    one = rows[0]
    ratios = [(row.length, row.ratio_to_dense) for row in rows]
    length, note = (None, ITSELF) if one.backend == "exact" else crossover(ratios)
    return Growth(
        one.backend,
        one.impl,
        one.params,
        one.shape,
        one.causal,
        exponent([(row.length, row.time_ms) for row in rows]),
        exponent([(row.length, float(row.pairs_computed)) for row in rows]),
        exponent([(row.length, float(row.flops)) for row in rows]),
        load(one.backend).capabilities.exponent,
        tuple(row.length for row in rows if row.length >= FIT_FROM),
        length,
        note,
        note != ITSELF and _rests_on_extrapolated(rows, length),
    )


def _rests_on_extrapolated(rows: Sequence[Row], length: float | None) -> bool:
    """Whether a crossover at ``length``, or that there is none, was found with an extrapolated dense time."""
    timed = [row.length for row in rows if not row.dense_extrapolated]
    return len(timed) < len(rows) and (length is None or length > max(timed, default=0))


def _dense(rows: Sequence[Row]) -> Growth:
    """Of the baseline, whose time is in every row of a length."""
    times = dict(sorted((row.length, row.dense_ms) for row in rows))
    fitted = tuple(N for N in times if N >= FIT_FROM)
    one = rows[0]
    return Growth(
        backend=DENSE,
        impl="",
        params="",
        shape=one.shape,
        causal=one.causal,
        time_exponent=exponent(list(times.items())),
        pairs_exponent=None,
        work_exponent=None,
        documented_exponent=2.0,
        fitted_lengths=fitted,
        crossover_length=None,
        crossover_note=ITSELF,
        dense_extrapolated=any(row.dense_extrapolated for row in rows if row.length in fitted),
    )
