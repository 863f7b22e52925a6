"""Predicted time of a step, learned from the steps that ran:

    step_ms  = fixed_ms[model] + sum over slices of slice_ms
    slice_ms = linear_ms_per_gflop[model] * linear + overhead_ms[model, backend]
             + ms_per_gflop[model, backend] * attention

Affine on purpose: the scheduler adds slices one by one. A forward says how much of its time was attention, so
both lines are fitted apart. Pure arithmetic; the numbers that it starts with are replaced by what the
machine shows at warm-up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from service.affine_fit import AffineFit
from service.schedule import served_name

if TYPE_CHECKING:
    from models.contract import Flops

GIGA = 1e9
LEAST_SHARE = 0.02
"""A step is never all attention, whatever its clock said."""
Basis = Literal["measured", "predicted", "assumed"]
"""Of a price. measured: the model's linear layers and this attention on it; predicted: the linear layers and
``exact``, whose rate stands in, raised by ``Prior.unseen_factor``, for the operations that this attention
saves or adds; assumed: nothing on this model yet."""


@dataclass(frozen=True)
class Prior:
    """What is assumed before anything was measured: about two CPU cores in fp32 (some 60 GFLOP/s in large
    matrix products, half of that in attention)."""

    fixed_ms: float = 5.0
    linear_ms_per_gflop: float = 16.0
    overhead_ms: float = 1.0
    attention_ms_per_gflop: float = 32.0
    unseen_factor: float = 1.5
    """A backend that has not run yet is assumed to be so much slower per FLOP than ``exact``."""


@dataclass(frozen=True)
class SliceRun:
    """A slice that ran: its backend, the FLOPs predicted for it and the ms that its attention took (0: not
    measured)."""

    backend: str
    flops: Flops
    attention_ms: float = 0.0


class CostModel:
    """Prices by model and backend. One thread observes; any may ask."""

    def __init__(self, prior: Prior | None = None) -> None:
        self._prior = prior or Prior()
        self._linear: dict[str, AffineFit] = {}
        self._attention: dict[tuple[str, str], AffineFit] = {}
        self._ratios: dict[str, float] = {}

    def fixed_ms(self, model: str) -> float:
        """Of any step, however small."""
        return self._linear_line(model)[0]

    def price(self, model: str, backend: str, flops: Flops) -> float:
        """Ms that a slice adds to a step of its model; grows with either kind of FLOPs."""
        overhead, rate = self._attention_line(model, backend)
        linear = self._linear_line(model)[1]
        return (linear * flops.linear + rate * flops.attention) / GIGA + overhead

    def step_ms(self, model: str, runs: Sequence[SliceRun]) -> float:
        return self.fixed_ms(model) + sum(self.price(model, run.backend, run.flops) for run in runs)

    def calibrated(self, model: str, backend: str | None = None) -> bool:
        """Whether enough steps were measured: of the model, and of the backend on it."""
        linear = self._linear.get(model)
        attention = self._attention.get((model, backend)) if backend is not None else linear
        return linear is not None and linear.calibrated and attention is not None and attention.calibrated

    def basis(self, model: str, *backends: str) -> Basis:
        """What prices of slices under these rest on; of several, the weakest."""
        if all(self.calibrated(model, backend) for backend in backends):
            return "measured"
        return "predicted" if self.calibrated(model, "exact") else "assumed"

    def ratio(self, model: str) -> float | None:
        """Predicted over measured time of the model's last step, as predicted before it was learned from."""
        return self._ratios.get(model)

    def observe(self, model: str, runs: Sequence[SliceRun], seconds: float) -> None:
        """A step of these slices took ``seconds`` in all (a step that was left: the sum of its slices of
        time). What is no positive finite number teaches nothing."""
        step_ms = seconds * 1000
        numbers = [step_ms, *(x for run in runs for x in (run.flops.linear, run.flops.attention))]
        if not runs or step_ms <= 0 or not all(math.isfinite(x) and x >= 0 for x in numbers):
            return
        self._ratios[model] = self.step_ms(model, runs) / step_ms
        attention_ms = self._observe_attention(model, runs, step_ms)
        rest_ms = max(step_ms - attention_ms, LEAST_SHARE * step_ms)
        if model not in self._linear:
            self._linear[model] = AffineFit(*self._linear_line(model))
        self._linear[model].observe(1, sum(run.flops.linear for run in runs) / GIGA, rest_ms)

    def remove_model(self, model: str) -> None:
        """Another model may come under its name."""
        for known in (self._linear, self._ratios):
            for name in [name for name in known if served_name(name) == model]:
                del known[name]
        for key in [key for key in self._attention if served_name(key[0]) == model]:
            del self._attention[key]

    def summary(self) -> dict[str, object]:
        """Plain JSON values by model."""
        return {model: self._summary_of(model, fit) for model, fit in sorted(self._linear.copy().items())}

    def _summary_of(self, model: str, fit: AffineFit) -> Mapping[str, object]:
        found = sorted((key[1], line) for key, line in self._attention.copy().items() if key[0] == model)
        return {
            "fixed_ms": fit.overhead,
            "linear_ms_per_gflop": fit.rate,
            "steps": fit.seen,
            "calibrated": fit.calibrated,
            "last_ratio": self._ratios.get(model),
            "backends": {
                backend: {
                    "overhead_ms": line.overhead,
                    "ms_per_gflop": line.rate,
                    "steps": line.seen,
                    "calibrated": line.calibrated,
                }
                for backend, line in found
            },
        }

    def _observe_attention(self, model: str, runs: Sequence[SliceRun], step_ms: float) -> float:
        """Learn each backend's line; ms of the step that were attention, predicted where not measured."""
        total = 0.0
        for backend in sorted({run.backend for run in runs}):
            mine = [run for run in runs if run.backend == backend]
            measured = sum(run.attention_ms for run in mine)
            overhead, rate = self._attention_line(model, backend)
            gflop = sum(run.flops.attention for run in mine) / GIGA
            if all(0 < run.attention_ms < math.inf for run in mine):
                total += measured
                fit = self._attention.setdefault((model, backend), AffineFit(overhead, rate))
                fit.observe(len(mine), gflop, measured)
            else:
                total += min(overhead * len(mine) + rate * gflop, step_ms)
        return total

    def _linear_line(self, model: str) -> tuple[float, float]:
        fit = self._linear.get(model)
        return fit.line if fit is not None else (self._prior.fixed_ms, self._prior.linear_ms_per_gflop)

    def _attention_line(self, model: str, backend: str) -> tuple[float, float]:
        """(overhead_ms, ms_per_gflop). What has not run costs some factor of ``exact``, and no less than its
        FLOPs in linear layers would."""
        fit = self._attention.get((model, backend))
        if fit is not None:
            return fit.line
        prior, linear = self._prior, self._linear_line(model)[1]
        exact = self._attention.get((model, "exact"))
        if exact is not None:
            overhead, rate = exact.line
        else:
            ratio = linear / prior.linear_ms_per_gflop
            overhead, rate = prior.overhead_ms, prior.attention_ms_per_gflop * ratio
        factor = 1.0 if backend == "exact" else prior.unseen_factor
        return overhead * factor, max(rate * factor, linear)
