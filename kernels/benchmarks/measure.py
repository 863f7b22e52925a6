"""Times on a machine that drifts: contenders take turns, the median of each is reported.

Every contender is called once before the rounds. One whose call takes longer than ``LONG_MS`` is not called
again: that first call is its time (a baseline is called once more up to ``twice_up_to_ms``, and both count).
The others get as many rounds as fit into a budget of seconds, within bounds, and turns spread evenly over all
rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch

from kernels.contract import AttentionResult, PackedResult, Stats
from kernels.peak import PeakBytes, peak_bytes

_CPU = torch.device("cpu")
LONG_MS = 5000.0
_PEAK_AGAIN_MS = 2000.0
_SHORT_MS = 500.0


@dataclass(frozen=True)
class Budget:
    """Seconds that a contender's rounds may take, and the least and most there are."""

    seconds: float
    min_rounds: int = 2
    max_rounds: int = 7

    def rounds(self, call_ms: float) -> int:
        fitting = int(self.seconds * 1e3 / max(call_ms, 1e-3))
        return max(self.min_rounds, min(self.max_rounds, fitting))


@dataclass
class Contender:
    """``run`` is timed; ``prepares``: its first call prepares the later ones and says nothing about them;
    ``twice_up_to_ms``: a long call of at most that much is timed twice."""

    run: Callable[[], Any]
    prepares: bool = False
    twice_up_to_ms: float = 0.0
    times_ms: list[float] = field(default_factory=list)
    selections_ms: list[float] = field(default_factory=list)
    rounds: int = 0
    first_peak_bytes: int | None = None

    @property
    def time_ms(self) -> float:
        return statistics.median(self.times_ms)

    @property
    def selection_ms(self) -> float:
        return statistics.median(self.selections_ms) if self.selections_ms else 0.0

    def call(self) -> tuple[float, Any]:
        """Milliseconds of one call, and what it returned."""
        began = perf_counter()
        value = self.run()
        return (perf_counter() - began) * 1e3, value

    def record(self) -> None:
        """One timed call."""
        spent_ms, value = self.call()
        self._keep(spent_ms, stats_of(value))

    def begin(self, budget: Budget) -> Any:
        """The first call: how many rounds will follow. Returns what it returned."""
        peak = PeakBytes(_CPU)
        spent_ms, value = self.call()
        self.first_peak_bytes = peak.read()
        if self.prepares:
            spent_ms, value = self.call()
        if spent_ms > LONG_MS:
            self._keep(spent_ms, stats_of(value))
            self.rounds = 1 if spent_ms <= self.twice_up_to_ms else 0
        else:
            self.rounds = budget.rounds(spent_ms)
        return value

    def peak_bytes(self) -> int | None:
        """Of one call after the first, what it returns included; of the first where calls are long."""
        if self.time_ms > _PEAK_AGAIN_MS:
            return self.first_peak_bytes
        return peak_bytes(self.run, _CPU, calls=3 if self.time_ms < _SHORT_MS else 1)

    def _keep(self, spent_ms: float, stats: Stats | None) -> None:
        self.times_ms.append(spent_ms)
        if stats is not None:
            self.selections_ms.append(stats.selection_ms)


def take_turns(contenders: Sequence[Contender]) -> None:
    """All rounds of all contenders, one call each per turn."""
    last = max((each.rounds for each in contenders), default=0)
    for turn in range(last):
        for each in contenders:
            if (turn * each.rounds) // last != ((turn - 1) * each.rounds) // last:
                each.record()


def stats_of(value: Any) -> Stats | None:
    """The statistics of what a backend returned; None for other libraries."""
    if isinstance(value, AttentionResult):
        return value.stats
    return value.stats[0] if isinstance(value, PackedResult) else None


def sgemm_gflops(size: int = 2048) -> float:
    """Best rate of a square fp32 matrix product on this machine, now."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    product = Contender(lambda: a @ b)
    return 2 * size**3 / min(product.call()[0] for _ in range(6)) / 1e6
