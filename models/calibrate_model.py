"""A model whose one step measures a profile: what a server runs as it runs any long forward, leaving it for
shorter work and going on with it. The time for which it stands still is in none of its figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter

from models.contract import Choice, Flops, ModelError, ServedModel, Slice, StepResult, Want
from models.forward import LeavableForward
from models.one_step import OneStepModel, OneStepState, nothing
from models.profile import Profile
from models.runner import Model

Measure = Callable[["WorkClock"], Profile]


class WorkClock:
    """Seconds, without those between ``stop`` and ``go``."""

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self._clock = clock
        self._away_s = 0.0
        self._stopped_at: float | None = None

    def __call__(self) -> float:
        return self._clock() - self._away_s

    def stop(self) -> None:
        self._stopped_at = self._clock()

    def go(self) -> None:
        if self._stopped_at is not None:
            self._away_s += self._clock() - self._stopped_at
            self._stopped_at = None


class _Leavable(LeavableForward):
    """Stops the clock where it is left."""

    def __init__(self, run: Callable[[], StepResult], clock: WorkClock) -> None:
        super().__init__(run, over=nothing, resume=clock.go)
        self._work_clock = clock

    def advance(self, pause: Callable[[], bool]) -> StepResult | None:
        try:
            return super().advance(pause)
        finally:
            self._work_clock.stop()


class CalibratingModel(OneStepModel[Profile]):
    """``num_bytes`` and ``flops`` are predicted for the whole."""

    def __init__(self, model: Model, measure: Measure, num_bytes: int, flops: float) -> None:
        super().__init__(model, "calibrate")
        self._measure, self._num_bytes, self._flops = measure, num_bytes, flops

    def begin(self, slices: Sequence[Slice]) -> LeavableForward:
        """ValueError where it is not one slice."""
        if len(slices) != 1:
            raise ValueError("a profile is measured in a step of its own")
        clock = WorkClock()
        return _Leavable(partial(self._run, slices[0], clock), clock)

    def estimate_bytes(self, tokens: int, new_tokens: int, choice: Choice, chunk_tokens: int) -> int:
        return self._num_bytes

    def flops(self, rows: int, start: int, choice: Choice, want: Want) -> Flops:
        return Flops(self._flops, 0.0)

    def _run(self, slice_: Slice, clock: WorkClock) -> StepResult:
        """What can be put right by who runs the server is told; other failures are the step's."""
        state = slice_.sequence
        assert isinstance(state, OneStepState), "a sequence opened by another model. This is a bug."
        try:
            state.found = self._measure(clock)
        except (ModelError, ValueError) as error:
            state.refused = error
        return state.answered(slice_)


def can_calibrate(model: ServedModel) -> bool:
    """Whether the model is one in whose layers attention can be chosen and measured."""
    return isinstance(model, Model) and bool(model.info.applied_layers)


def network_model(model: ServedModel) -> Model:
    if not isinstance(model, Model):
        raise ValueError(f"{model.info.name!r} has no network that can be measured")
    return model
