"""Faults planted in rows, and how often the figures of a sample show them.

    P(some broken row in a uniform draw of n) = 1 - C(N - K, n) / C(N, n)         K of N rows broken

Every draw meets the fault at another place. It adds an error of 1.0 to the rows it breaks, and the backend's
own estimate of what it dropped knows nothing of it: the worst case for a draw that follows that estimate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import lgamma
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.math.row_error import DrawnRows
from models.quality_contenders import Contender
from models.verify_study_replay import Draws, judge, share
from models.verify_study_rows import RowLosses

SHARES = (0.01, 0.02, 0.05, 0.10, 0.20)
SHAPES = ("scattered", "stretch")

BOUND_ALARM = 0.5
"""``row_bound`` from here on is called an alarm."""

FALSE_ALARMS = 0.05
"""``approx_upper_95`` alarms above what so small a share of the draws without a fault exceeds."""


@dataclass(frozen=True)
class FaultRow:
    """How one fault shows in the draws over all layers of one setting. ``hit``: shares of draws with a broken
    row among the uniform ones, by formula and as counted. Alarms: shares of draws. ``covers``: the upper
    value lies above the true error, fault included (``error``, mean over layers)."""

    model: str
    backend: str
    params: dict[str, Any]
    broken: float
    shape: str
    error: float
    hit_formula: float
    hit: float
    bound_alarms: float
    upper_alarms: float
    covers: float


def hit_probability(total: int, broken: int, drawn: int) -> float:
    """Of ``drawn`` rows of ``total``, without replacement, at least one is among ``broken``."""
    left = total - broken
    if drawn > left:
        return 1.0
    none = lgamma(left + 1) - lgamma(left - drawn + 1) - lgamma(total + 1) + lgamma(total - drawn + 1)
    return -float(torch.expm1(torch.tensor(none, dtype=torch.float64)))


def broken_rows(total: int, part: float, shape: str, seed: int) -> Tensor:
    """Bool [N]: ``part`` of the rows (at least one, unless 0) anywhere (scattered) or in one stretch."""
    count, generator = max(1, round(part * total)) if part else 0, torch.Generator().manual_seed(seed)
    found = torch.zeros(total, dtype=torch.bool)
    if shape == "stretch":
        first = int(torch.randint(total - count + 1, (1,), generator=generator))
        found[first : first + count] = True
    else:
        found[torch.randperm(total, generator=generator)[:count]] = True
    return found


def measure_faults(
    model: str, its: Contender, healthy: Sequence[Draws], drawn: Sequence[Sequence[DrawnRows]]
) -> list[FaultRow]:
    """No fault, then every planted one, over the layers of one setting and the draws made of each."""
    cases = [(0.0, "none"), *((part, shape) for shape in SHAPES for part in SHARES)]
    return [
        _row(
            model,
            its,
            part,
            shape,
            [_counted(*each, part, shape) for each in zip(healthy, drawn, strict=True)],
        )
        for part, shape in cases
    ]


def _row(model: str, its: Contender, part: float, shape: str, layers: Sequence[_Counted]) -> FaultRow:
    means = {name: sum(getattr(each, name) for each in layers) / len(layers) for name in _Counted._fields}
    return FaultRow(model, its.backend, its.params, part, shape, **means)


class _Counted(NamedTuple):
    """One layer, as in FaultRow."""

    error: float
    hit_formula: float
    hit: float
    bound_alarms: float
    upper_alarms: float
    covers: float


def _counted(healthy: Draws, drawn: Sequence[DrawnRows], part: float, shape: str) -> _Counted:
    alarm = float(healthy.upper.nanquantile(1 - FALSE_ALARMS))
    seen = [_seen(healthy.losses, rows, part, shape, seed) for seed, rows in enumerate(drawn)]
    error, formula, hit, bound, upper = torch.tensor(seen, dtype=torch.float64).unbind(1)
    return _Counted(
        float(error.mean()),
        float(formula.mean()),
        float(hit.mean()),
        share(bound >= BOUND_ALARM),
        share(upper > alarm),
        share(upper >= error * (1 - 1e-6)),
    )


def _seen(
    losses: RowLosses, rows: DrawnRows, part: float, shape: str, seed: int
) -> tuple[float, float, float, float, float]:
    """True error, probability of a hit, hit, ``row_bound`` and ``approx_upper_95`` of one draw with a fault
    of its own."""
    broken = broken_rows(losses.total, part, shape, seed)
    faulty = losses.with_fault(broken)
    told = judge(faulty, rows, seed)
    formula = hit_probability(losses.total, int(broken.sum()), int(rows.uniform.sum()))
    hit = float(broken[rows.positions[rows.uniform]].any())
    bound, upper = (math.nan if each is None else each for each in (told.row_bound, told.approx_upper_95))
    return faulty.error, formula, hit, bound, upper
