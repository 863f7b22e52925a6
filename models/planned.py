"""A choice that differs from layer to layer: what ``auto`` runs, and what a plan replays.

In layer l the prompt's rows before ``exact_from[l]`` run ``layers[l]``, the rows from there on exact
attention. A guard (``models.guard``) watches the error while the prompt is read, and sets that row where a
layer is about to exceed the budget.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import Field

from kernels.contract import Params
from kernels.registry import load as load_backend
from models.auto import LayerChoice
from models.contract import Choice

AUTO = "auto"
STRATUM = 256
"""Rows of the prompt that are repaired together at least (``stratum_of``). A guarded prompt is read in chunks
of whole strata, so that how it was cut does not move a repair."""
WHOLE = 1 << 40
"""More rows than any prompt has: a layer is repaired from its first row on."""


class AutoParams(Params):
    """What ``auto`` was asked to keep; None for a plan that is replayed."""

    max_error: float | None = Field(None, gt=0, le=1)
    multiple: int = Field(1, exclude=True, ge=1)

    def chunk_multiple(self) -> int:
        return self.multiple


@dataclass(frozen=True)
class Planned(Choice):
    """``layers`` and ``exact_from`` by ordinal of the layers to which a choice applies. ``guarded``: while
    the prompt is read, a layer that is about to exceed ``params.max_error`` goes on exactly."""

    layers: tuple[Choice, ...] = ()
    exact_from: tuple[int | None, ...] = ()
    guarded: bool = False

    def at(self, ordinal: int) -> Choice:
        return self.layers[ordinal]

    @cached_property
    def parts(self) -> tuple[Choice, ...]:
        """Every different attention in it, exact first: any layer may have to be repaired."""
        found = {choice.method: choice for choice in (exact(self.seed), *self.layers)}
        return tuple(found.values())

    @cached_property
    def method(self) -> tuple[str, str]:
        methods = [choice.method for choice in self.layers]
        told = self.params.model_dump(mode="json")
        return AUTO, json.dumps([told, methods, self.exact_from, self.guarded], sort_keys=True)

    def __hash__(self) -> int:
        return hash((self.method, self.seed))


def planned(layers: Sequence[LayerChoice], *, seed: int = 0, max_error: float | None = None) -> Planned:
    """The choice for a plan, whose params are validated. With ``max_error`` it is guarded. What the registry
    and the backends raise where they refuse (UnknownBackend, pydantic's ValidationError)."""
    choices = tuple(_choice(each, seed) for each in layers)
    from_rows = tuple(each.exact_from for each in layers)
    guarded = max_error is not None and any(choice.backend != "exact" for choice in choices)
    multiple = math.lcm(*(stratum_of(each) if guarded else each.params.chunk_multiple() for each in choices))
    params = AutoParams(max_error=max_error, multiple=multiple)
    return Planned(AUTO, params, seed, layers=choices, exact_from=from_rows, guarded=guarded)


def stratum_of(choice: Choice) -> int:
    """Rows of the prompt that are repaired together in a layer that runs ``choice``: whole query tiles, for
    the rows of a tile before a repair would choose other keys without the rest of it."""
    return WHOLE if choice.params.reads_whole() else math.lcm(STRATUM, choice.params.chunk_multiple())


def exact(seed: int = 0) -> Choice:
    return Choice("exact", load_backend("exact").params(), seed)


def _choice(layer: LayerChoice, seed: int) -> Choice:
    params: dict[str, Any] = dict(layer.params)
    return Choice(layer.backend, load_backend(layer.backend).params.model_validate(params), seed)
