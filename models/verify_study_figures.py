"""What many draws over the layers of one setting come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from models.quality_contenders import Contender
from models.verify_study_replay import Draws, bias, share, spread


@dataclass(frozen=True)
class SettingRow:
    """Shares over draws and relative figures over layers, of one backend at one setting.

    ``error`` is the true one, mean over layers, from ``least_error`` to ``worst_error``. ``bias``,
    ``spread``, ``upper_covers`` and ``bound_covers`` are means over layers, beside them the worst layer's.
    ``upper_over`` is the median of upper value / true error. The answer's figures are the largest over the
    layers of one request: ``answer_bias``, ``answer_covers``. ``denominators``: bias, worst
    layer's bias, spread and worst layer's spread by the way to the denominator."""

    model: str
    backend: str
    params: dict[str, Any]
    layers: int
    draws: int
    rows: float
    error: float
    least_error: float
    worst_error: float
    bias: float
    worst_bias: float
    spread: float
    worst_spread: float
    upper_covers: float
    worst_upper_covers: float
    upper_over: float
    bound_covers: float
    worst_bound_covers: float
    answer_bias: float
    answer_covers: float
    denominators: dict[str, tuple[float, float, float, float]]


def setting_row(model: str, its: Contender, layers: Sequence[Draws]) -> SettingRow:
    truths = [each.truth for each in layers]
    uppers = torch.stack([each.upper for each in layers])
    estimates = torch.stack([each.estimate for each in layers])
    ratios = torch.cat([each.upper / each.truth for each in layers])
    biases, spreads = [each.bias for each in layers], [each.spread for each in layers]
    covers, bounds = [each.upper_covers for each in layers], [each.bound_covers for each in layers]
    return SettingRow(
        model=model,
        backend=its.backend,
        params=its.params,
        layers=len(layers),
        draws=uppers.shape[1],
        rows=_mean([float(each.rows.mean()) for each in layers]),
        error=_mean(truths),
        least_error=min(truths),
        worst_error=max(truths),
        bias=_mean(biases),
        worst_bias=max(biases, key=abs),
        spread=_mean(spreads),
        worst_spread=max(spreads),
        upper_covers=_mean(covers),
        worst_upper_covers=min(covers),
        upper_over=float(ratios.nanmedian()),
        bound_covers=_mean(bounds),
        worst_bound_covers=min(bounds),
        answer_bias=bias(estimates.amax(0), max(truths)),
        answer_covers=share(uppers.amax(0) >= max(truths) * (1 - 1e-6)),
        denominators=_denominators(layers),
    )


def _denominators(layers: Sequence[Draws]) -> dict[str, tuple[float, float, float, float]]:
    found = {}
    for name in layers[0].by_denominator:
        draws = [(each.by_denominator[name], each.truth) for each in layers]
        biases, spreads = [bias(*each) for each in draws], [spread(*each) for each in draws]
        found[name] = (_mean(biases), max(biases, key=abs), _mean(spreads), max(spreads))
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
