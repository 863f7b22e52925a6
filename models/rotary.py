"""Length-dependent rotary embeddings, made a pure function of each sequence.

Dynamic NTK (theta' = theta * (s L / M - (s - 1))^(d / (d - 2)) for a sequence of L > M tokens) and LongRoPE
(two sets of factors, by whether L exceeds the training length) depend on the length of *the* sequence.
transformers takes the maximum over everything in the forward and keeps it for later calls, which is wrong as
soon as sequences are packed or follow each other. Here every token carries its own sequence's length: the
whole prompt's for prompt tokens, position + 1 beyond the prompt, as transformers has it for one sequence
alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from models.contract import ModelError

LENGTH_DEPENDENT = {"dynamic", "longrope"}

_lengths: ContextVar[Tensor | None] = ContextVar("longreach_lengths", default=None)


@contextmanager
def sequence_lengths(lengths: Tensor) -> Iterator[None]:
    """Within the block the rotary modules take each token's sequence length from ``lengths`` [1, T]."""
    token = _lengths.set(lengths)
    try:
        yield
    finally:
        _lengths.reset(token)


class PerSequenceRotary(nn.Module):
    """A rotary module of transformers with the frequencies of each token's own sequence, and without
    state."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self._original = original
        self._forward = _undecorated_forward(original)

    def forward(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> tuple[Tensor, Tensor]:
        arguments = () if layer_type is None else (layer_type,)
        lengths = self._effective_lengths(position_ids, layer_type)
        unique = sorted(set(lengths[0].tolist()))
        if len(unique) == 1:
            return self._at(unique[0], x, position_ids, layer_type, arguments)
        cos_sin: list[Tensor] = []
        for length in unique:
            rows = (lengths[0] == length).nonzero()[:, 0]
            part = self._at(length, x[:, rows], position_ids[:, rows], layer_type, arguments)
            if not cos_sin:
                cos_sin = [t.new_empty(t.shape[0], x.shape[1], *t.shape[2:]) for t in part]
            for whole, piece in zip(cos_sin, part, strict=True):
                whole[:, rows] = piece
        return cos_sin[0], cos_sin[1]

    def _effective_lengths(self, position_ids: Tensor, layer_type: str | None) -> Tensor:
        """Lengths [1, T] with all that give the same frequencies made equal."""
        lengths = _lengths.get()
        if lengths is None:
            lengths = (position_ids.max() + 1).expand(position_ids.shape)
        shortest, longest = _told_apart(*self._rope(layer_type), self._original.config)
        return lengths.clamp(shortest, longest)

    def _at(
        self, length: int, x: Tensor, position_ids: Tensor, layer_type: str | None, arguments: tuple[str, ...]
    ) -> tuple[Tensor, Tensor]:
        """cos and sin by the original's own formula, on a copy that holds the frequencies of this length."""
        rope_type, _ = self._rope(layer_type)
        module = self._original
        if rope_type in LENGTH_DEPENDENT:
            of_layer = {} if layer_type is None else {"layer_type": layer_type}
            frequencies, scaling = ROPE_INIT_FUNCTIONS[rope_type](
                module.config, x.device, seq_len=length, **of_layer
            )
            prefix = "" if layer_type is None else f"{layer_type}_"
            module = copy.copy(module)
            module._buffers = {**module._buffers, f"{prefix}inv_freq": frequencies}
            setattr(module, f"{prefix}attention_scaling", scaling)
        with torch.no_grad():
            cos, sin = self._forward(module, x, position_ids, *arguments)
        return cos, sin

    def _rope(self, layer_type: str | None) -> tuple[str, dict[str, Any]]:
        original: Any = self._original
        if layer_type is None:
            return original.rope_type, original.config.rope_parameters
        return original.rope_type[layer_type], original.config.rope_parameters[layer_type]


def _undecorated_forward(module: nn.Module) -> Any:
    """The module's own forward without the wrapper that updates its frequencies in place."""
    forward: Any = type(module).forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    return forward


def rope_types(module: nn.Module) -> set[str]:
    """Rope types of a rotary module; empty for any other module."""
    found = getattr(module, "rope_type", None)
    if isinstance(found, str):
        return {found}
    return set(found.values()) if isinstance(found, dict) else set()


def effective_length(body: nn.Module) -> Callable[[int], tuple[int, ...]]:
    """What the length-dependent rotary modules of a network make of a text's length: equal for lengths under
    which it computes the same."""
    bounds = [
        _told_apart(kind, parameters, module.config)
        for module in body.modules()
        if rope_types(module) & LENGTH_DEPENDENT
        for kind, parameters in _ropes(module)
    ]
    return lambda length: tuple(_clamp(length, *each) for each in bounds)


def _ropes(module: Any) -> list[tuple[str, dict[str, Any]]]:
    """Every kind of position of a rotary module, and its parameters."""
    kinds, parameters = module.rope_type, module.config.rope_parameters
    if isinstance(kinds, str):
        return [(kinds, parameters)]
    return [(kind, parameters[layer_type]) for layer_type, kind in kinds.items()]


def _told_apart(rope_type: str, parameters: dict[str, Any], config: Any) -> tuple[int, int | None]:
    """The shortest and the longest length that matter: shorter and longer ones give the same frequencies."""
    if rope_type == "longrope":
        trained = int(parameters["original_max_position_embeddings"])
        return trained, trained + 1
    if rope_type == "dynamic":
        return int(config.max_position_embeddings), None
    return 0, 0


def _clamp(length: int, shortest: int, longest: int | None) -> int:
    return max(length, shortest) if longest is None else min(max(length, shortest), longest)


def is_length_dependent(model: nn.Module) -> bool:
    return any(rope_types(module) & LENGTH_DEPENDENT for module in model.modules())


def replace_rotary(model: nn.Module) -> int:
    """Replace every length-dependent rotary module of ``model``; how many there were. ModelError where one
    cannot be."""
    found = [
        (parent, name, child)
        for parent in model.modules()
        if not isinstance(parent, PerSequenceRotary)
        for name, child in parent.named_children()
        if rope_types(child) & LENGTH_DEPENDENT
    ]
    for parent, name, child in found:
        buffers = [b for b, _ in child.named_buffers() if b.endswith("inv_freq")]
        if not buffers or not hasattr(child, "config"):
            raise ModelError(
                f"{type(child).__name__} computes length-dependent positions in a way that is not known"
            )
        setattr(parent, name, PerSequenceRotary(child))
    return len(found)
