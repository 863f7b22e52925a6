"""Error against beta, both axes logarithmic, one panel per budget and spread. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kernels.temperature_methods import LOW_RANK, ORACLES, REALISABLE, SCATTERBRAIN, SPARSE, Point
from kernels.temperature_told import series

_COLOURS = {SPARSE: "#d62728", LOW_RANK: "#1f77b4", SCATTERBRAIN: "#2ca02c"}
_ORACLE_STYLES = dict(zip(ORACLES, ({"color": "#2ca02c"}, {"color": "#d62728"}), strict=True))
_FLOOR = 1e-3
"""Errors below are drawn there: an oracle's may vanish."""


def plot(points: Sequence[Point], path: Path) -> None:
    """Write a PNG; scatterbrain's betas are shaded where it is the best of the three realisable ones."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    spreads = list(dict.fromkeys(point.spread for point in points))
    budgets = list(dict.fromkeys(point.budget for point in points))
    figure = Figure(figsize=(5.0 * len(budgets) + 2.6, 4.0 * len(spreads) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(spreads), len(budgets), squeeze=False, sharey=True)
    for some in series(points):
        panel = panels[spreads.index(some[0].spread)][budgets.index(some[0].budget)]
        _panel(panel, some)
    for row in panels:
        row[0].set_ylabel("error: mean row sum of |P^ - P|")
    for panel in panels[-1]:
        panel.set_xlabel("beta (below: entropy / ln n)")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=9, frameon=False)
    figure.suptitle("Attention weights at equal memory: error against inverse temperature", fontsize=11)
    figure.savefig(path, dpi=120, format="png")


def _panel(panel: Any, points: Sequence[Point]) -> None:
    betas = [point.beta for point in points]
    for name in REALISABLE:
        drawn = _drawn(points, name)
        panel.plot(betas, drawn, color=_COLOURS[name], marker="o", markersize=4, linewidth=1.8, label=name)
    for name in ORACLES:
        style = {"linestyle": ":", "linewidth": 1.2, **_ORACLE_STYLES[name]}
        panel.plot(betas, _drawn(points, name), label=name, **style)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xticks(betas, [f"{point.beta:g}\n{point.entropy:.2f}" for point in points], fontsize=8)
    panel.minorticks_off()
    _shade(panel, points)
    panel.grid(alpha=0.3)
    panel.set_title(f"budget {points[0].budget}, spread {points[0].spread:g}", fontsize=10)


def _drawn(points: Sequence[Point], name: str) -> list[float]:
    return [max(_FLOOR, point.error(name)) for point in points]


def _shade(panel: Any, points: Sequence[Point]) -> None:
    """Half the way, on the logarithmic axis, to the neighbouring betas."""
    for at, point in enumerate(points):
        if point.best != SCATTERBRAIN:
            continue
        below, above = points[max(0, at - 1)].beta, points[min(len(points) - 1, at + 1)].beta
        panel.axvspan(
            (below * point.beta) ** 0.5, (above * point.beta) ** 0.5, color="#2ca02c", alpha=0.12, linewidth=0
        )
