"""A model whose one step measures a profile: what a server runs as it runs any long forward, leaving it for
shorter work and going on with it. The time for which it stands still is in none of its figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter

from models.contract import (
    CacheUse,
    Choice,
    Flops,
    Kept,
    Meter,
    ModelError,
    ModelInfo,
    Prompt,
    SequenceState,
    ServedModel,
    Slice,
    SliceResult,
    StepResult,
    Tokenizer,
    Verify,
    Want,
    WarmUp,
    Work,
)
from models.forward import LeavableForward
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


class CalibrateState:
    """A profile's place in its measuring; ``found`` once it is there, or ``refused``."""

    def __init__(self) -> None:
        self.length = 0
        self.held_bytes = 0
        self.kept: tuple[Kept, ...] = ()
        self.found: Profile | None = None
        self.refused: Exception | None = None

    def close(self) -> None:
        self.found = self.refused = None


class _Leavable(LeavableForward):
    """Stops the clock where it is left."""

    def __init__(self, run: Callable[[], StepResult], clock: WorkClock) -> None:
        super().__init__(run, over=_nothing, resume=clock.go)
        self._work_clock = clock

    def advance(self, pause: Callable[[], bool]) -> StepResult | None:
        try:
            return super().advance(pause)
        finally:
            self._work_clock.stop()


class CalibratingModel:
    """``ServedModel`` for one measuring of a profile, under a name of its own: it shares no step with the
    model's requests. ``num_bytes`` and ``flops`` are predicted for the whole."""

    def __init__(self, model: Model, measure: Measure, num_bytes: int, flops: float) -> None:
        self._model, self._measure = model, measure
        self._num_bytes, self._flops = num_bytes, flops
        self._info = replace(model.info, name=f"{model.info.name} (calibrate)", causal=False, tasks=())

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def tokenizer(self) -> Tokenizer:
        return self._model.tokenizer

    def unsupported(self, choice: Choice) -> list[str]:
        return self._model.unsupported(choice)

    def warm_ups(self) -> Sequence[WarmUp]:
        return ()

    def open(self, capacity: int, prompt: Prompt | None = None) -> CalibrateState:
        return CalibrateState()

    def cached_tokens(self, prompt: Prompt) -> int:
        return 0

    def fork(self, sequence: SequenceState, capacity: int) -> SequenceState:
        raise ValueError("a profile is measured once: there is nothing to fork")

    def meter(self, verify: Verify, choice: Choice, total: int, *, decode: bool = False) -> Meter:
        raise ValueError("verify: measuring a profile answers nothing whose error could be measured")

    def step(self, slices: Sequence[Slice]) -> StepResult:
        result = self.begin(slices).advance(lambda: False)
        assert result is not None
        return result

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

    def limit_cached(self, max_bytes: int) -> None:
        """Nothing is cached."""

    def cache_use(self) -> CacheUse:
        return CacheUse()

    def close(self) -> None:
        """Nothing is held."""

    def _run(self, slice_: Slice, clock: WorkClock) -> StepResult:
        """What can be put right by who runs the server is told; other failures are the step's."""
        state = slice_.sequence
        assert isinstance(state, CalibrateState), "a sequence opened by another model. This is a bug."
        try:
            state.found = self._measure(clock)
        except (ModelError, ValueError) as error:
            state.refused = error
        state.length = len(slice_.token_ids)
        return StepResult((SliceResult(Work()),), None)


def can_calibrate(model: ServedModel) -> bool:
    """Whether the model is one in whose layers attention can be chosen and measured."""
    return isinstance(model, Model) and bool(model.info.applied_layers)


def network_model(model: ServedModel) -> Model:
    if not isinstance(model, Model):
        raise ValueError(f"{model.info.name!r} has no network that can be measured")
    return model


def _nothing() -> None:
    """No sequence belongs to anybody else."""
