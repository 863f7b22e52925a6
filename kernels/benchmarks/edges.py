"""Time against edges at a fixed length, for backends that sample a graph with learned probabilities.

    exponent = least-squares slope of log t on log edges          t ~ edges ** exponent, 1: linear in edges

The random clusters of each case are shifted to another mean probability; edges are those that were really
kept. What does not depend on them, the memberships of N rows and keys, is in the time and flattens the slope
where edges are few. It is what the first case takes, which has next to none and is left out of the slope:
``exponent_beyond`` is that of the time beyond it, over the cases that take at least ``CLEAR`` times as long.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kernels.benchmarks.cases import Case, why_not
from kernels.benchmarks.dense import dense
from kernels.benchmarks.group import Effort, baseline_budget, calls
from kernels.benchmarks.inputs import make_inputs
from kernels.benchmarks.measure import Contender, take_turns
from kernels.contract import AttentionResult
from kernels.registry import load

DENSITIES = (1e-6, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16)
LENGTH = 4096
CLEAR = 1.25


@dataclass(frozen=True)
class EdgeRow:
    """``density``: share of the pairs that became edges; ``num_edges`` over all heads."""

    backend: str
    params: str
    shape: str
    length: int
    causal: bool
    density: float
    num_edges: int
    rounds: int
    time_ms: float
    selection_ms: float
    dense_ms: float
    ratio_to_dense: float


@dataclass(frozen=True)
class EdgeGrowth:
    """Of one backend at one shape, length and direction. None: fewer than two numbers of edges, or none
    clear of the fewest."""

    backend: str
    params: str
    shape: str
    length: int
    causal: bool
    exponent: float | None
    exponent_beyond: float | None


def edge_cases(cases: Sequence[Case]) -> list[Case]:
    """Those of learned backends that run, once per density."""
    able = [case for case in cases if load(case.backend).capabilities.learned and why_not(case) is None]
    return [replace(case, density=density) for case in able for density in DENSITIES]


def run_edges(cases: Sequence[Case], effort: Effort) -> Iterator[EdgeRow]:
    """Cases of one shape, length and direction, in turns with dense SDPA."""
    one = cases[0]
    x = make_inputs(effort.inputs, (one.H, one.Hk), one.N, one.D)
    baseline = dense(one, x)
    baseline.contender.begin(baseline_budget(effort, one.N))
    ours = []
    for case in cases:
        contender = Contender(calls(case, x))
        first: AttentionResult = contender.begin(effort.budget(case.N))
        ours.append((case, contender, first.stats))
    take_turns([baseline.contender, *(contender for _, contender, _ in ours)])
    for case, contender, stats in ours:
        yield EdgeRow(
            backend=case.backend,
            params=case.told_params,
            shape=case.shape,
            length=case.N,
            causal=case.causal,
            density=stats.density,
            num_edges=stats.pairs_kept,
            rounds=len(contender.times_ms),
            time_ms=contender.time_ms,
            selection_ms=contender.selection_ms,
            dense_ms=baseline.time_ms,
            ratio_to_dense=baseline.time_ms / contender.time_ms,
        )


def edge_growths(rows: Sequence[EdgeRow]) -> list[EdgeGrowth]:
    """One per backend, params, shape, length and direction, in the rows' order."""
    found = []
    for key in dict.fromkeys(_key(row) for row in rows):
        some = sorted((row for row in rows if _key(row) == key), key=lambda row: row.num_edges)
        points = [(row.num_edges, row.time_ms) for row in some]
        fewest, fixed_ms = points[0]
        beyond = [(edges - fewest, time - fixed_ms) for edges, time in points if time >= CLEAR * fixed_ms]
        found.append(EdgeGrowth(*key, _slope(points[1:]), _slope(beyond)))
    return found


def _key(row: EdgeRow) -> tuple[str, str, str, int, bool]:
    return row.backend, row.params, row.shape, row.length, row.causal


def _slope(points: Sequence[tuple[float, float]]) -> float | None:
    """Over the points at which both are above 0; None for fewer than two numbers of edges."""
    above = [(x, y) for x, y in points if x > 0 and y > 0]
    if len({x for x, _ in above}) < 2:
        return None
    x, y = np.log(np.array(above, dtype=float)).T
    slope = float(np.polyfit(x, y, 1)[0])
    return slope if math.isfinite(slope) else None
