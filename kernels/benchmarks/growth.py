"""How time and work grow with the length, and from which length a backend is faster than dense attention.

exponent = least-squares slope of log t on log N over N >= 4096       t ~ N ** exponent
crossover: log ratio is taken as linear in log N between two benched lengths; ratio 1 is the crossing
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
DENSE = "dense SDPA"
Points = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Growth:
    """Of one backend at one shape and direction. None: fewer than two lengths from 4,096 on, or no crossing;
    ``crossover_note`` then says on which side."""

    backend: str
    impl: str
    params: str
    shape: str
    causal: bool
    time_exponent: float | None
    pairs_exponent: float | None
    documented_exponent: float
    fitted_lengths: tuple[int, ...]
    crossover_length: float | None
    crossover_note: str


def exponent(points: Points) -> float | None:
    """Slope of log y on log x over the points from ``FIT_FROM`` on; None for fewer than two."""
    large = [(N, y) for N, y in points if N >= FIT_FROM]
    if len({N for N, _ in large}) < 2:
        return None
    x, y = np.log(np.array(large, dtype=float)).T
    return float(np.polyfit(x, y, 1)[0])


def crossover(ratios: Points) -> tuple[float | None, str]:
    """From which length on every ratio to dense is above 1: ratios by ascending length, at least one."""
    slower = [number for number, (_, ratio) in enumerate(ratios) if ratio <= 1]
    if not slower:
        return None, f"faster from {ratios[0][0]} on, the shortest"
    if slower[-1] == len(ratios) - 1:
        return None, f"not faster at {ratios[-1][0]}, the longest"
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
    length, note = crossover([(row.length, row.ratio_to_dense) for row in rows])
    one = rows[0]
    return Growth(
        one.backend,
        one.impl,
        one.params,
        one.shape,
        one.causal,
        exponent([(row.length, row.time_ms) for row in rows]),
        exponent([(row.length, float(row.pairs_computed)) for row in rows]),
        load(one.backend).capabilities.exponent,
        tuple(row.length for row in rows if row.length >= FIT_FROM),
        length,
        note,
    )


def _dense(rows: Sequence[Row]) -> Growth:
    """Of the baseline, whose time is in every row of a length."""
    times = dict(sorted((row.length, row.dense_ms) for row in rows))
    fitted = tuple(N for N in times if N >= FIT_FROM)
    one = rows[0]
    return Growth(
        DENSE, "", "", one.shape, one.causal, exponent(list(times.items())), None, 2.0, fitted, None, "itself"
    )
