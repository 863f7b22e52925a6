"""The served sampling, drawn again and again over rows whose true errors are known.

One draw is what one request is told of one layer: the same sampler, the same sums, the same figures
(``kernels.math.row_error``), under another seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.math.row_error import DrawnRows, ErrorFigures, RowErrors, RowSampler
from models.verify_study_rows import RowLosses, triangles

ROW_SHARE = 0.95
"""Share of the rows that ``row_bound`` speaks of."""

_UNIT = torch.eye(3)


@dataclass(frozen=True)
class Draws:
    """Many draws over one layer, one after another [S]: the served figures (NaN where none was given), rows
    looked at, and the estimate under each way to the denominator."""

    losses: RowLosses
    estimate: Tensor
    upper: Tensor
    bound: Tensor
    rows: Tensor
    by_denominator: dict[str, Tensor]

    @property
    def truth(self) -> float:
        return self.losses.error

    @property
    def bias(self) -> float:
        return bias(self.estimate, self.truth)

    @property
    def spread(self) -> float:
        return spread(self.estimate, self.truth)

    @property
    def upper_covers(self) -> float:
        return share(self.upper >= self.truth * (1 - 1e-6))

    @property
    def bound_covers(self) -> float:
        """Share of the draws whose bound lies above ROW_SHARE of all rows; NaN where none gave a bound."""
        given = self.bound[~self.bound.isnan()]
        below = torch.searchsorted(self.losses.ratios.sort().values, given * (1 + 1e-6), right=True)
        return share(below >= ROW_SHARE * self.losses.total)


def bias(found: Tensor, truth: float) -> float:
    """How far the mean is off, relative to the truth."""
    return float(found.mean()) / truth - 1


def spread(found: Tensor, truth: float) -> float:
    """Standard deviation relative to the truth."""
    return float(found.std(correction=0)) / truth


def share(which: Tensor) -> float:
    """NaN where there is nothing to count."""
    return float(which.double().mean())


def replay(losses: RowLosses, drawn: Sequence[DrawnRows]) -> Draws:
    """What each draw says of ``losses``. Draw number s has seed s."""
    told = [judge(losses, rows, seed) for seed, rows in enumerate(drawn)]
    ways = [_by_denominator(losses, rows) for rows in drawn]
    return Draws(
        losses,
        _column([each.estimate for each in told]),
        _column([each.approx_upper_95 for each in told]),
        _column([each.row_bound for each in told]),
        _column([each.rows for each in told]),
        {name: _column([way[name] for way in ways]) for name in ways[0]},
    )


def _column(values: Sequence[float | None]) -> Tensor:
    return torch.tensor([float("nan") if each is None else each for each in values], dtype=torch.float64)


def draw(losses: RowLosses, rows: int | None, seed: int) -> DrawnRows:
    """The rows that a request with this seed would look at, in whatever chunks its prompt was read."""
    return RowSampler(seed, losses.layer, losses.total, rows).draw(0, losses.total, losses.dropped)


def judge(losses: RowLosses, drawn: DrawnRows, seed: int) -> ErrorFigures:
    """The served figures of one draw."""
    errors = RowErrors()
    exact, used = triangles(losses, drawn.positions)
    errors.add(drawn, exact, used, _UNIT)
    errors.add_totals(losses.total, None)
    return errors.figures(seed)


def _by_denominator(losses: RowLosses, drawn: DrawnRows) -> dict[str, float]:
    """The estimate with sum y replaced by sum u; by sum u corrected on the rows looked at; by what these rows
    alone say of it; and with both sums corrected by how far these rows are off in sum u, along the regression
    on u that leaves a Poisson draw the least variance. NaN where a sum is not above 0."""
    x, y, u = (each[drawn.positions] for each in (losses.x, losses.y, losses.u))
    X, Y, size = _expanded(x, drawn), _expanded(y, drawn), float(losses.u.sum())
    missed = size - _expanded(u, drawn)
    sums = {
        "used": (X, size),
        "difference": (X, size + _expanded(y - u, drawn)),
        "sampled": (X, Y),
        "regression": (X + missed * _slope(x, u, drawn), Y + missed * _slope(y, u, drawn)),
    }
    return {name: (a / b) ** 0.5 if a > 0 and b > 0 else float("nan") for name, (a, b) in sums.items()}


def _slope(values: Tensor, u: Tensor, drawn: DrawnRows) -> float:
    weight = (1 - drawn.probability) / drawn.probability.square()
    return float((weight * u * values).sum() / (weight * u * u).sum().clamp_min(1e-300))


def _expanded(values: Tensor, drawn: DrawnRows) -> float:
    """Horvitz-Thompson: the sum over all rows from those drawn."""
    return float((values / drawn.probability).sum())
