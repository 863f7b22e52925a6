"""Figures of decode steps: a draw of one step in sixteen over the last rows of a text, as if generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.math.row_error import DecodeSampler, DrawnRows
from models.quality_contenders import Contender
from models.verify_study_replay import Draws, bias, replay, share, spread
from models.verify_study_rows import RowLosses

STEPS = (64, 256, 1024, 2048)


@dataclass(frozen=True)
class DecodeRow:
    """Means over the layers of one setting: steps looked at; shares of draws that gave an estimate, an upper
    value, a bound; and how those that gave one kept their word. NaN where none did."""

    model: str
    backend: str
    params: dict[str, Any]
    steps: int
    looked_at: float
    given: float
    bias: float
    spread: float
    upper_given: float
    upper_covers: float
    bound_given: float
    bound_covers: float


def measure_decode(
    model: str, its: Contender, layers: Sequence[RowLosses], seeds: int, all_steps: Sequence[int] = STEPS
) -> list[DecodeRow]:
    """For every number of steps that the text is long enough for."""
    return [
        _row(model, its, steps, [_counted(losses, steps, seeds) for losses in layers])
        for steps in all_steps
        if steps <= layers[0].total
    ]


def _row(model: str, its: Contender, steps: int, layers: Sequence[list[float]]) -> DecodeRow:
    means = torch.tensor(layers, dtype=torch.float64).nanmean(0)
    return DecodeRow(model, its.backend, its.params, steps, *means.tolist())


def _counted(losses: RowLosses, steps: int, seeds: int) -> list[float]:
    """The figures of DecodeRow, of one layer."""
    last = losses.last(steps)
    drawn = [_draw(last, losses.total - steps, seed) for seed in range(seeds)]
    looked_at = sum(map(len, drawn)) / seeds
    told = [rows for rows in drawn if len(rows)]
    draws = replay(last, told)
    return [looked_at, len(told) / seeds, *_kept_word(draws)]


def _kept_word(draws: Draws) -> list[float]:
    upper, bound = (~each.isnan() for each in (draws.upper, draws.bound))
    covers = share(draws.upper[upper] >= draws.truth * (1 - 1e-6))
    return [
        bias(draws.estimate, draws.truth),
        spread(draws.estimate, draws.truth),
        share(upper),
        covers,
        share(bound),
        draws.bound_covers,
    ]


def _draw(last: RowLosses, first: int, seed: int) -> DrawnRows:
    """Positions counted from the first of these steps."""
    drawn = DecodeSampler(seed, last.layer).draw(first, last.total)
    moved: Tensor = drawn.positions - first
    return DrawnRows(moved, drawn.probability, drawn.uniform)
