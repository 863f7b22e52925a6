"""Decode: one query at the last of M positions, as a model's step over its cache asks for it.

Calls go through ``attend_packed``; block summaries and other states kept beside a cache are handed in and
already know its keys, as they do from step to step. Every call repeats the same step at the same position,
so plans kept per position, and draws kept per seed, are warm: a model's next step stands one position
further and makes its plan anew, which these times leave out. Times are medians of turns with torch's dense
SDPA over all M keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kernels.api import attend_packed
from kernels.benchmarks.cases import Case
from kernels.benchmarks.dense import sdpa
from kernels.benchmarks.inputs import Inputs, Tensors, make_inputs
from kernels.benchmarks.measure import Budget, Contender, take_turns
from kernels.contract import PackedResult, Segment, Stats
from kernels.math.kept import KeptStates
from kernels.math.summaries import BlockSummaries
from kernels.registry import load

LENGTHS = (8192, 16384, 32768)
MAX_ROUNDS = 101


@dataclass(frozen=True)
class DecodeRow:
    """``read_share``: share of the cache's keys and values that the attention read, pairs computed over H M;
    what a selection reads to choose comes on top. ``ratio_to_dense`` above 1: faster than dense."""

    backend: str
    params: str
    shape: str
    num_keys: int
    rounds: int
    time_us: float
    selection_us: float
    dense_us: float
    ratio_to_dense: float
    read_share: float


def why_no_decode(case: Case) -> str | None:
    """Why the case has no decode line; None where it has one."""
    if case.impl != "torch" or not case.causal:
        return "decode is causal, impl torch"
    backend = load(case.backend)
    if not (backend.capabilities.causal and backend.capabilities.decode):
        return "it has no decode form"
    return "; ".join(backend.unsupported(case.parsed, True)) or None


def run_decode(cases: Sequence[Case], inputs: Inputs, budget: Budget) -> Iterator[DecodeRow]:
    """Cases of one shape and number of keys, all of them able to decode."""
    one = cases[0]
    x = make_inputs(inputs, (one.H, one.Hk), one.N, one.D)
    last = x.q[:, :, -1:].contiguous()
    dense = Contender(lambda: sdpa(last, x.k, x.v, False, one.scale))
    dense.begin(budget)
    ours = []
    for case in cases:
        contender = Contender(_step(case, x, last), prepares=True)  # the first call fills the summaries
        first: PackedResult = contender.begin(budget)
        ours.append((case, contender, first.stats[0]))
    take_turns([dense, *(contender for _, contender, _ in ours)])
    for case, contender, stats in ours:
        yield _row(case, contender, stats, dense)


def _step(case: Case, x: Tensors, last: Any) -> Any:
    summaries = BlockSummaries() if load(case.backend).select is not None else None
    segment = Segment(slice(0, 1), x.k, x.v, start=case.N - 1, summaries=summaries, kept=KeptStates())
    params, learned = case.parsed, case.learned
    return lambda: attend_packed(
        last,
        [segment],
        backend=case.backend,
        params=params,
        causal=True,
        scale=case.scale,
        learned=learned,
    )


def _row(case: Case, contender: Contender, stats: Stats, dense: Contender) -> DecodeRow:
    return DecodeRow(
        backend=case.backend,
        params=case.told_params,
        shape=case.shape,
        num_keys=case.N,
        rounds=len(contender.times_ms),
        time_us=contender.time_ms * 1e3,
        selection_us=contender.selection_ms * 1e3,
        dense_us=dense.time_ms * 1e3,
        ratio_to_dense=dense.time_ms / contender.time_ms,
        read_share=stats.pairs_computed / (case.H * case.N),
    )
