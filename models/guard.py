"""Watches the error of every layer while a prompt is read, and says from which row on a layer must run
exactly so that it stays within its budget.

    x_j = |(o^_j - o_j) W_O|^2,   y_j = |o_j W_O|^2          of the rows j that are looked at
    spent_i   = sum_{j <= i} w_j x_j                         w_j: rows that j stands for
    allowed_i = (SHARE max_error)^2 N sum_{j <= i} w_j y_j / sum_{j <= i} w_j

One row of every block is looked at: blocks of 16 to 64 rows, at least 128 of them from 2,048 tokens on. A
layer's error over the prompt is sqrt(sum x / sum y), so max_error^2 sum y is what it may spend in all; y of
the rows to come is taken to be as so far. At the first i with spent_i > allowed_i the stratum that i lies in
(256 rows, or whole query tiles), and all that follow, run exactly: what was spent before stays, nothing is
added. A layer that spends little early on may spend it later.

Which rows are looked at depends on the seed, the layer and the position alone, strata are absolute, and rows
count in their order: chunks and other traffic move nothing.

N tokens of the prompt; H heads, Dv value head_dim, E model width, R rows looked at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from kernels.math.dense import accumulator_dtype
from kernels.math.rng import below, bits, fold
from models.contract import Kept
from models.places import Place, Places
from models.plan import ModelPlan
from models.planned import STRATUM, Planned, stratum_of
from models.profile import EXACT

MIN_BLOCK, MAX_BLOCK = 16, 64
MIN_ROWS = 128
SHARE = 0.9
"""Of the budget: the rows looked at are few, and the rest of the prompt may have smaller outputs."""

_STREAM = 0x47554152


@dataclass(frozen=True)
class LayerGuard:
    """One layer so far. ``weight`` rows stood for by the ``rows`` looked at; ``exact_from`` once it has had
    to be repaired."""

    spent: float = 0.0
    energy: float = 0.0
    weight: float = 0.0
    rows: int = 0
    exact_from: int | None = None

    def after(self, row: Looked, weight: int) -> LayerGuard:
        """With one row more, which stands for ``weight`` of them."""
        return replace(
            self,
            spent=self.spent + weight * row.spent,
            energy=self.energy + weight * row.energy,
            weight=self.weight + weight,
            rows=self.rows + 1,
        )

    @property
    def estimate(self) -> float:
        if self.energy == 0.0:
            return 0.0 if self.spent == 0.0 else math.inf
        return math.sqrt(self.spent / self.energy)


@dataclass(frozen=True)
class Looked:
    """One row that was looked at: its squared error, and that of its exact output, behind W_O."""

    position: int
    spent: float
    energy: float


class Reading:
    """What one step adds; the guard knows nothing of it until the step has succeeded."""

    def __init__(self, guard: SequenceGuard) -> None:
        self._guard = guard
        self.changed: dict[int, LayerGuard] = {}

    def of(self, layer: int) -> LayerGuard:
        return self.changed.get(layer) or self._guard.layers.get(layer) or LayerGuard()

    def watches(self, layer: int) -> bool:
        """Whether a layer is one that may err."""
        return layer in self._guard.places

    def exact_from(self, layer: int) -> int | None:
        """The row from which on a layer runs exactly, by repair."""
        return self.of(layer).exact_from

    def rows(self, layer: int, start: int, stop: int) -> Tensor:
        """Positions int64 [R] to look at among start .. stop - 1, ascending."""
        return self._guard.rows(layer, start, stop)

    def look(self, layer: int, start: int, positions: Tensor, exact: Tensor, used: Tensor) -> int | None:
        """exact and used [1, H, R, Dv] of the rows at ``positions``, of a call that began at ``start``. The
        row from which on the layer must run exactly, if that is so now."""
        before, w_o = self.of(layer), self._guard.places[layer].w_o
        looked = [Looked(*each) for each in zip(positions.tolist(), *_squares(exact, used, w_o), strict=True)]
        self.changed[layer] = after = self._guard.judge(before, looked, start, self._guard.stratum(layer))
        return after.exact_from if before.exact_from is None else None

    def commit(self) -> SequenceGuard:
        """The step has succeeded: the guard, which knows it now."""
        self._guard.layers |= self.changed
        return self._guard


class SequenceGuard:
    """Of one sequence's prompt of ``total`` tokens under a guarded choice. ``places``: by number of the
    layer, where the error of those that are not exact by plan is measured; ``ordinals``: of every layer to
    which the choice applies."""

    def __init__(
        self, choice: Planned, total: int, ordinals: Mapping[int, int], places: Mapping[int, Place]
    ) -> None:
        assert choice.guarded
        self.choice, self.total = choice, total
        self.places, self._ordinals = places, ordinals
        self.layers: dict[int, LayerGuard] = {}

    def copy(self) -> SequenceGuard:
        """Of another sequence that has read the same."""
        other = SequenceGuard(self.choice, self.total, self._ordinals, self.places)
        other.layers = dict(self.layers)
        return other

    def begin(self) -> Reading:
        return Reading(self)

    @property
    def kept(self) -> tuple[Kept, ...]:
        """Of every layer to which a choice applies."""
        found = {layer: self.layers.get(layer, LayerGuard()) for layer in self._ordinals}
        return tuple(
            Kept(layer, each.estimate, each.rows, each.exact_from) for layer, each in sorted(found.items())
        )

    def rows(self, layer: int, start: int, stop: int) -> Tensor:
        chosen = self._rows_of(self._ordinals[layer])
        return chosen[(chosen >= start) & (chosen < stop)]

    def stratum(self, layer: int) -> int:
        """Rows of a layer that are repaired together."""
        return stratum_of(self.choice.at(self._ordinals[layer]))

    def judge(
        self, before: LayerGuard, looked: Sequence[Looked], start: int, stratum: int = STRATUM
    ) -> LayerGuard:
        """The layer after these rows of a call that began at ``start``: no row before it can be repaired any
        more. An error that is no number is beyond any budget."""
        at = before
        for row in looked:
            at = at.after(row, self._weight(row.position))
            if at.exact_from is None and not at.spent <= self._allowed(at):
                first = max(row.position // stratum * stratum, start)
                repaired = replace(before, exact_from=first)
                return self.judge(repaired, _repaired(looked, first), start, stratum)
        return at

    def _allowed(self, at: LayerGuard) -> float:
        return (SHARE * self.max_error) ** 2 * self.total * at.energy / at.weight

    @cached_property
    def max_error(self) -> float:
        found = getattr(self.choice.params, "max_error", None)
        assert isinstance(found, float), "a guarded choice has a budget"
        return found

    @cached_property
    def block(self) -> int:
        """Rows of which one is looked at."""
        return min(max(self.total // MIN_ROWS, MIN_BLOCK), MAX_BLOCK)

    def _weight(self, position: int) -> int:
        """Rows of its block: the last one may be shorter."""
        first = position // self.block * self.block
        return min(self.block, self.total - first)

    def _rows_of(self, ordinal: int) -> Tensor:
        if ordinal not in self._drawn:
            blocks = torch.arange(-(-self.total // self.block))
            sizes = torch.clamp(self.total - blocks * self.block, max=self.block)
            stream = torch.tensor(fold(self.choice.seed, _STREAM, ordinal))
            self._drawn[ordinal] = blocks * self.block + below(bits(stream, blocks), sizes)
        return self._drawn[ordinal]

    @cached_property
    def _drawn(self) -> dict[int, Tensor]:
        return {}


def guard_of(choice: Planned, total: int, plan: ModelPlan, places: Places) -> SequenceGuard:
    """For one prompt under ``choice``. ValueError where the output projection of a layer that may err is not
    known."""
    ordinals = {layer: plan.layers[layer].ordinal for layer in plan.applied_layers}
    watched = {n: places[n] for n, ordinal in ordinals.items() if choice.layers[ordinal].backend != EXACT}
    return SequenceGuard(choice, total, ordinals, {n: known_place(place, n) for n, place in watched.items()})


def known_place(place: Place | str, layer: int) -> Place:
    if isinstance(place, str):
        raise ValueError(f"the output projection of layer {layer} is not known: {place}")
    return place


def _repaired(looked: Sequence[Looked], first: int) -> list[Looked]:
    """Rows from ``first`` on err no more."""
    return [row if row.position < first else replace(row, spent=0.0) for row in looked]


def _squares(exact: Tensor, used: Tensor, w_o: Tensor) -> tuple[list[float], list[float]]:
    """exact and used [1, H, R, Dv], w_o [E, H Dv] -> |(used - exact) W_O|^2 and |exact W_O|^2, row by row."""
    dtype = accumulator_dtype(exact.dtype)
    exact = exact.to(dtype)
    both = torch.cat([used.to(dtype) - exact, exact])  # [2, H, R, Dv]
    rows = both.transpose(1, 2).flatten(2) @ w_o.to(dtype).T
    spent, energy = rows.double().square().sum(-1).tolist()
    return spent, energy
