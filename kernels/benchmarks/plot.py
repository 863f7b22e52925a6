"""Time against N, one panel per shape and direction, both axes logarithmic. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kernels.benchmarks.machine import Machine
from kernels.benchmarks.rows import Row

_MARKERS = "osD^vP*X<>hp"
_COLOURS = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#bcbd22", "#17becf"),
    *("#0b3d91", "#005f3c", "#b8860b"),
)
_FLEX = "FlexAttention,\nsame mask"


def plot(rows: Sequence[Row], machine: Machine, path: Path) -> None:
    """Write a PNG: dense SDPA black, each backend's fast impl in its colour, FlexAttention on the same mask
    dashed in the backend's colour. Params beyond the first of a backend are not drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = _drawn(rows)
    styles = _styles(shown)
    directions, shapes = _unique(r.causal for r in shown), _unique(r.shape for r in shown)
    figure = Figure(figsize=(4.6 * len(shapes) + 2.2, 4.2 * len(directions) + 1.0), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(directions), len(shapes), squeeze=False, sharex=True, sharey="row")
    for causal, line in zip(directions, panels, strict=True):
        for shape, panel in zip(shapes, line, strict=True):
            _panel(panel, [r for r in shown if (r.causal, r.shape) == (causal, shape)], styles)
            panel.set_title(f"{shape}, {'causal' if causal else 'bidirectional'}", fontsize=11)
        line[0].set_ylabel("time of one call, ms")
    for panel in panels[-1]:
        panel.set_xlabel("N, tokens")
    figure.legend(
        handles=_legend(styles, any(r.flex_ms is not None for r in shown)),
        loc="outside right center",
        fontsize=10,
        frameon=False,
    )
    figure.suptitle(
        "One attention call over N (H x Hk x D; default params unless the legend says otherwise)\n"
        f"{machine.cpu}, {machine.threads} threads, torch {machine.torch}, {machine.date[:10]}",
        fontsize=11,
    )
    figure.savefig(path, dpi=120)


def _drawn(rows: Sequence[Row]) -> list[Row]:
    first = {row.backend: row.params for row in reversed(rows)}
    return [row for row in rows if row.impl != "reference" and row.params == first[row.backend]]


def _unique(values: Any) -> list[Any]:
    return list(dict.fromkeys(values))


def _styles(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Colour and marker by backend, the same in every panel; the params go into the label."""
    told = {row.backend: row.params for row in rows}
    plain: dict[str, Any] = {"color": "0.6", "marker": "."}
    coloured = [name for name in told if name != "exact"]
    return {
        name: {
            "label": name if params == "default" else f"{name} ({params})",
            **(plain if name == "exact" else _coloured(coloured.index(name))),
        }
        for name, params in told.items()
    }


def _coloured(number: int) -> dict[str, Any]:
    rounds, place = divmod(number, len(_COLOURS))
    return {"color": _COLOURS[place], "marker": _MARKERS[(number + rounds) % len(_MARKERS)]}


def _panel(panel: Any, rows: Sequence[Row], styles: dict[str, dict[str, Any]]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    for name in _unique(r.backend for r in rows):
        own = [r for r in rows if r.backend == name]
        style = {**styles[name], "markersize": 5}
        panel.plot([r.length for r in own], [r.time_ms for r in own], linewidth=1.4, **style)
        flex = [(r.length, r.flex_ms) for r in own if r.flex_ms is not None]
        if flex:
            panel.plot(
                *zip(*flex, strict=True), linestyle="--", linewidth=1.0, markerfacecolor="none", **style
            )
    dense = sorted({(r.length, r.dense_ms) for r in rows})
    panel.plot(*zip(*dense, strict=True), color="black", linewidth=2.2, zorder=5)
    lengths = sorted({r.length for r in rows})
    panel.set_xticks(lengths, [f"{N // 1024}k" if N % 1024 == 0 else str(N) for N in lengths], minor=False)
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=30))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:,g}"))
    panel.minorticks_off()
    panel.grid(alpha=0.3)


def _legend(styles: dict[str, dict[str, Any]], flex: bool) -> list[Any]:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color="black", linewidth=2.2, label="torch SDPA, dense")]
    handles += [Line2D([], [], linewidth=1.4, markersize=5, **style) for style in styles.values()]
    dashed: dict[str, Any] = {"linestyle": "--", "marker": "o", "markerfacecolor": "none"}
    return handles + ([Line2D([], [], color="0.3", label=_FLEX, **dashed)] if flex else [])
