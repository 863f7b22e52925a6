"""A model whose one step is a diagnosis: what a server runs as it runs any long forward, leaving it for
shorter work and going on with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

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
from models.diagnose import diagnose, predicted_flops
from models.diagnose_told import Asked, Diagnosis
from models.forward import LeavableForward
from models.network import Network
from models.runner import Model

FP64_BYTES = 8
COPIES = 12
"""Numbers of fp64 per sampled pair that are held at once: logits, probabilities, their order, estimates."""


class DiagnoseState:
    """A text's place in its diagnosis; ``found`` once it has run."""

    def __init__(self) -> None:
        self.length = 0
        self.held_bytes = 0
        self.kept: tuple[Kept, ...] = ()
        self.found: Diagnosis | None = None

    def close(self) -> None:
        self.found = None


class DiagnosingModel:
    """``ServedModel`` for one diagnosis, under a name of its own: it shares no step with the model's other
    requests. It holds the network, so a model that is unloaded meanwhile lives until it is over."""

    def __init__(self, model: ServedModel, asked: Asked) -> None:
        self._model, self._asked = model, asked
        self._network = _network_of(model)
        self._info = replace(model.info, name=f"{model.info.name} (diagnose)", causal=False, tasks=())

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

    def open(self, capacity: int, prompt: Prompt | None = None) -> DiagnoseState:
        return DiagnoseState()

    def cached_tokens(self, prompt: Prompt) -> int:
        return 0

    def fork(self, sequence: SequenceState, capacity: int) -> SequenceState:
        raise ValueError("a diagnosis reads a text whole: there is nothing to fork")

    def meter(self, verify: Verify, choice: Choice, total: int, *, decode: bool = False) -> Meter:
        raise ValueError("verify: a diagnosis attends exactly, which has no error to measure")

    def step(self, slices: Sequence[Slice]) -> StepResult:
        result = self.begin(slices).advance(lambda: False)
        assert result is not None
        return result

    def begin(self, slices: Sequence[Slice]) -> LeavableForward:
        """ValueError where it is not one whole text."""
        if len(slices) != 1 or len(slices[0].token_ids) != slices[0].total:
            raise ValueError("a diagnosis reads one whole text in a step")
        return LeavableForward(partial(self._run, slices[0]), over=_nothing)

    def estimate_bytes(self, tokens: int, new_tokens: int, choice: Choice, chunk_tokens: int) -> int:
        """The forward read whole, and what is looked at of one layer at a time."""
        layers = self._network.plan.layers
        heads = max(layer.num_heads // layer.shape.num_kv_heads for layer in layers)
        rows = min(self._asked.rows, tokens) * tokens * heads * COPIES
        width = max(layer.num_heads * (2 * layer.shape.value_dim + layer.shape.key_dim) for layer in layers)
        forward = self._model.estimate_bytes(tokens, 0, choice, tokens)
        return forward + FP64_BYTES * (rows + tokens * width)

    def flops(self, rows: int, start: int, choice: Choice, want: Want) -> Flops:
        return Flops(predicted_flops(self._network, rows, self._asked), 0.0)

    def limit_cached(self, max_bytes: int) -> None:
        """Nothing is cached."""

    def cache_use(self) -> CacheUse:
        return CacheUse()

    def close(self) -> None:
        """Nothing is held."""

    def _run(self, slice_: Slice) -> StepResult:
        state = slice_.sequence
        assert isinstance(state, DiagnoseState), "a sequence opened by another model. This is a bug."
        able: Callable[[Choice], bool] = self._can_run
        state.found = diagnose(self._network, slice_.token_ids, self._asked, able)
        state.length = len(slice_.token_ids)
        return StepResult((SliceResult(Work()),), None)

    def _can_run(self, choice: Choice) -> bool:
        return not self._model.unsupported(choice)


def can_diagnose(model: ServedModel) -> bool:
    """Whether the model is one whose layers can be looked at."""
    return isinstance(model, Model)


def diagnosis_of(model: ServedModel, token_ids: Sequence[int], asked: Asked) -> Diagnosis:
    """At once, on this thread. ValueError as ``diagnose``."""
    with torch.inference_mode():
        return diagnose(_network_of(model), token_ids, asked, lambda choice: not model.unsupported(choice))


def _network_of(model: ServedModel) -> Network:
    if not isinstance(model, Model):
        raise ValueError(f"{model.info.name!r} has no network that can be looked at")
    return model._network


def _nothing() -> None:
    """No sequence belongs to anybody else."""
