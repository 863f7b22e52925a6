"""Models whose one step answers a question about another model: a diagnosis, the measuring of a profile. A
server runs such a step as it runs any long forward, leaving it for shorter work and going on with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Generic, TypeVar

from models.contract import (
    CacheUse,
    Choice,
    Flops,
    Kept,
    Meter,
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

Found = TypeVar("Found")


class OneStepState(Generic[Found]):
    """The place of a question; ``found`` once it is answered, or ``refused``."""

    def __init__(self) -> None:
        self.length = 0
        self.held_bytes = 0
        self.kept: tuple[Kept, ...] = ()
        self.found: Found | None = None
        self.refused: Exception | None = None

    def answered(self, slice_: Slice) -> StepResult:
        self.length = len(slice_.token_ids)
        return StepResult((SliceResult(Work()),), None)

    def close(self) -> None:
        self.found = self.refused = None


class OneStepModel(ABC, Generic[Found]):
    """``ServedModel`` for one question, under a name of its own: it shares no step with the model's requests.
    It holds the model, so one that is unloaded meanwhile lives until it is over."""

    def __init__(self, model: ServedModel, name: str) -> None:
        self._served, self._name = model, name
        self._info = replace(model.info, name=f"{model.info.name} ({name})", causal=False, tasks=())

    @abstractmethod
    def begin(self, slices: Sequence[Slice]) -> LeavableForward:
        """ValueError where it is not one slice, as the question asks for it."""

    @abstractmethod
    def estimate_bytes(self, tokens: int, new_tokens: int, choice: Choice, chunk_tokens: int) -> int: ...

    @abstractmethod
    def flops(self, rows: int, start: int, choice: Choice, want: Want) -> Flops: ...

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def tokenizer(self) -> Tokenizer:
        return self._served.tokenizer

    def unsupported(self, choice: Choice) -> list[str]:
        return self._served.unsupported(choice)

    def warm_ups(self) -> Sequence[WarmUp]:
        return ()

    def open(self, capacity: int, prompt: Prompt | None = None) -> OneStepState[Found]:
        return OneStepState()

    def cached_tokens(self, prompt: Prompt) -> int:
        return 0

    def fork(self, sequence: SequenceState, capacity: int) -> SequenceState:
        raise ValueError(f"{self._name} takes one step: there is nothing to fork")

    def meter(self, verify: Verify, choice: Choice, total: int, *, decode: bool = False) -> Meter:
        raise ValueError(f"verify: {self._name} attends exactly, which has no error to measure")

    def step(self, slices: Sequence[Slice]) -> StepResult:
        result = self.begin(slices).advance(lambda: False)
        assert result is not None
        return result

    def limit_cached(self, max_bytes: int) -> None:
        """Nothing is cached."""

    def cache_use(self) -> CacheUse:
        return CacheUse()

    def close(self) -> None:
        """Nothing is held."""


def nothing() -> None:
    """When it is over: no sequence belongs to anybody else."""
