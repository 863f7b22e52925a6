"""Cases of one length, shape and direction, timed in turns with dense SDPA and FlexAttention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, repeat
from typing import Any

from torch import Tensor

from kernels.api import attend
from kernels.benchmarks import flex as flex_attention
from kernels.benchmarks.cases import Case, Shape
from kernels.benchmarks.dense import MIN_ROUNDS, dense
from kernels.benchmarks.errors import ExactRows, exact_rows, own_error
from kernels.benchmarks.inputs import Inputs, Tensors, make_inputs
from kernels.benchmarks.measure import Budget, Contender, take_turns
from kernels.benchmarks.rows import NOT_ASKED_FOR, Flex, Measured, Row, row
from kernels.contract import AttentionResult
from kernels.registry import load


@dataclass(frozen=True)
class Effort:
    """What a group may cost: seconds and rounds of each contender, and where FlexAttention runs."""

    seconds: float
    max_rounds: int
    flex_at: frozenset[tuple[Shape, int]]
    inputs: Inputs

    def budget(self, length: int) -> Budget:
        return Budget(self.seconds, 2 if length <= TWO_ROUNDS_UP_TO else 1, self.max_rounds)


TWO_ROUNDS_UP_TO = 8192
"""Longer calls of more than the budget are timed once after the first."""


@dataclass
class Group:
    """``failures``: cases that raised, with what they said."""

    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def run_group(cases: Sequence[Case], effort: Effort, sgemm_gflops: float) -> Group:
    """Every case once for its errors, then all in turns, then once more each for memory."""
    one = cases[0]
    x = make_inputs(effort.inputs, (one.H, one.Hk), one.N, one.D)
    exact = exact_rows(x, one.causal, one.scale)
    group, baseline = Group(), dense(one, x)
    baseline.contender.begin(baseline_budget(effort, one.N))
    measured = []
    for case in cases:
        try:
            measured.append(_begin(case, x, exact, effort))
        except Exception as error:
            group.failures.append(f"{case}: {type(error).__name__}: {error}")
    contenders = [c for m in measured for c in (m.contender, m.flex.contender) if c is not None]
    take_turns([baseline.contender, *contenders])
    group.rows = [row(m, baseline, sgemm_gflops, _peak_bytes(m)) for m in measured]
    return group


def baseline_budget(effort: Effort, length: int) -> Budget:
    """Dense SDPA's: never a single round, since every ratio of the group rests on it."""
    return replace(effort.budget(length), min_rounds=MIN_ROUNDS)


def _begin(case: Case, x: Tensors, exact: ExactRows, effort: Effort) -> Measured:
    ours = Contender(calls(case, x))
    first: AttentionResult = ours.begin(_budget(case, effort))
    wrong, to_exact = own_error(case, x, first.out), exact.relative_error(first.out)
    flex = _flex(case, x, first.out, effort)
    return Measured(case, ours, first.stats, wrong, to_exact, flex)


def _budget(case: Case, effort: Effort) -> Budget:
    """Two rounds are enough of impl ``reference``, which is there to check and took most of a short group."""
    budget = effort.budget(case.N)
    return replace(budget, max_rounds=min(2, budget.max_rounds)) if case.impl == "reference" else budget


def _peak_bytes(measured: Measured) -> int | None:
    ours = measured.contender
    return ours.first_peak_bytes if measured.case.impl == "reference" else ours.peak_bytes()


def calls(case: Case, x: Tensors) -> Callable[[], AttentionResult]:
    """Calls with seed 0 first, which errors and FlexAttention's mask belong to. Where the seed matters every
    round has its own: draws are kept per seed, and a request brings a new one."""
    seeds = count() if load(case.backend).capabilities.random else repeat(0)
    learned = case.learned
    return lambda: _ours(case, x, next(seeds), learned)


def _ours(case: Case, x: Tensors, seed: int, learned: object | None) -> AttentionResult:
    impl: Any = case.impl
    return attend(
        x.q,
        x.k,
        x.v,
        backend=case.backend,
        params=case.parsed,
        causal=case.causal,
        scale=case.scale,
        seed=seed,
        impl=impl,
        learned=learned,
    )


def _flex(case: Case, x: Tensors, ours: Tensor, effort: Effort) -> Flex:
    if case.impl != "torch" or ((case.H, case.Hk, case.D), case.N) not in effort.flex_at:
        return Flex(NOT_ASKED_FOR)
    run = flex_attention.runner(case, x)
    if isinstance(run, str):
        return Flex(run)
    contender = Contender(run, prepares=True)
    try:
        out: Tensor = contender.begin(effort.budget(case.N))
    except Exception as error:  # a compiler that is missing or fails must not end the bench
        return Flex(f"it failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
    return Flex("", contender, float((out - ours).abs().max()))
