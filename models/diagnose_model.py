"""A model whose one step is a diagnosis: what a server runs as it runs any long forward, leaving it for
shorter work and going on with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from models.contract import Choice, Flops, ServedModel, Slice, StepResult, Want
from models.diagnose import diagnose, predicted_flops
from models.diagnose_paths import path_bytes
from models.diagnose_told import Asked, Diagnosis
from models.forward import LeavableForward
from models.network import Network
from models.one_step import OneStepModel, OneStepState, nothing
from models.runner import Model

FP64_BYTES = 8
COPIES = 12
"""Numbers of fp64 per sampled pair that are held at once: logits, probabilities, their order, estimates."""


class DiagnosingModel(OneStepModel[Diagnosis]):
    """A text is read whole, in one step."""

    def __init__(self, model: ServedModel, asked: Asked) -> None:
        super().__init__(model, "diagnose")
        self._network, self._asked = _network_of(model), asked

    def begin(self, slices: Sequence[Slice]) -> LeavableForward:
        """ValueError where it is not one whole text."""
        if len(slices) != 1 or len(slices[0].token_ids) != slices[0].total:
            raise ValueError("a diagnosis reads one whole text in a step")
        return LeavableForward(partial(self._run, slices[0]), over=nothing)

    def estimate_bytes(self, tokens: int, new_tokens: int, choice: Choice, chunk_tokens: int) -> int:
        """The forward read whole, and what is looked at of one layer at a time or, after it, the arms."""
        layers = self._network.plan.layers
        heads = max(layer.num_heads // layer.shape.num_kv_heads for layer in layers)
        rows = min(self._asked.rows, tokens) * tokens * heads * COPIES
        width = max(layer.num_heads * (2 * layer.shape.value_dim + layer.shape.key_dim) for layer in layers)
        forward = self._served.estimate_bytes(tokens, 0, choice, tokens)
        return max(forward + FP64_BYTES * (rows + tokens * width), self._arms_bytes(tokens, choice))

    def _arms_bytes(self, tokens: int, choice: Choice) -> int:
        """A short forward, and the paths through it."""
        network, first = self._network, min(self._asked.arm_tokens, tokens)
        if not first:
            return 0
        layers, width = network.plan.layers, network.sizes.hidden_size
        itemsize = network.body.dtype.itemsize
        paths = path_bytes(len(layers), layers[0].num_heads, first, width, itemsize)
        return self._served.estimate_bytes(first, 0, choice, first) + paths

    def flops(self, rows: int, start: int, choice: Choice, want: Want) -> Flops:
        return Flops(predicted_flops(self._network, rows, self._asked), 0.0)

    def _run(self, slice_: Slice) -> StepResult:
        state = slice_.sequence
        assert isinstance(state, OneStepState), "a sequence opened by another model. This is a bug."
        able: Callable[[Choice], bool] = self._can_run
        state.found = diagnose(self._network, slice_.token_ids, self._asked, able)
        return state.answered(slice_)

    def _can_run(self, choice: Choice) -> bool:
        return not self._served.unsupported(choice)


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
