"""How a sequence's attention is measured against the exact one, and what is told of it: a part of
``models.contract``, from where it is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True)
class Verify:
    """How much of a request's attention is computed exactly a second time, to measure its error.

    ``rows`` of a prompt that each layer draws by what its selection left out (None: a 64th of the prompt less
    the 96 others, at least 64; ``"all"``: every row), beside its first and last 16 and 64 drawn evenly. Of
    generated tokens one in 16 is looked at, ``"all"``: each. ``layers`` numbered as in
    ``ModelInfo.applied_layers`` (None: all of them); ``seed`` of the draw.
    """

    rows: int | Literal["all"] | None = None
    layers: tuple[int, ...] | None = None
    seed: int = 0


@dataclass(frozen=True)
class LayerError:
    """The error of one layer's attention, sqrt(sum_i |(o^_i - o_i) W_O|^2 / sum_i |o_i W_O|^2): o exact, o^
    the one used, on the same q, k, v.

    ``estimate`` over ``rows_total`` rows, from ``rows`` of them that were computed exactly too; infinite
    where every exact output among them is 0. ``approx_upper_95``: an approximate upper 95 % limit. 95 % of
    all rows have |(o^ - o) W_O| <= ``row_bound`` |o W_O|, with 95 % confidence. Both are None where so few
    rows were drawn that nothing can be said, the upper limit also where none of those drawn errs.
    ``head_shares`` [H] splits the heads' own errors' squares and sums to 1 (all 0 where there is no error).
    ``of_residual``: the same difference relative to the residual stream that the layer adds to, None where
    that is not known.

    0 rows and an estimate of 0: every pair was kept and nothing approximated, so none needed a second look.
    """

    layer: int
    estimate: float
    approx_upper_95: float | None
    row_bound: float | None
    rows: int
    rows_total: int
    head_shares: tuple[float, ...]
    of_residual: float | None


@dataclass(frozen=True)
class MeasuredError:
    """What ``layers`` say together: the largest estimate, and the largest of each limit (None where a layer
    has none); rows summed over the layers. ``cost_ms``: the time of the forwards that measuring took."""

    estimate: float
    approx_upper_95: float | None
    row_bound: float | None
    rows: int
    rows_total: int
    cost_ms: float
    layers: tuple[LayerError, ...]


def largest_limit(limits: Sequence[float | None]) -> float | None:
    """None where one of them is not known: nothing can be said of all."""
    known = [each for each in limits if each is not None]
    return max(known) if len(known) == len(limits) else None


class Meter(Protocol):
    """Measures the error of one sequence's attention in the steps that it is given to (``Slice.meter``). A
    step that fails leaves it as it was."""

    def measured(self) -> MeasuredError | None:
        """So far; None while no row was looked at."""
