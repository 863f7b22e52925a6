"""Plots of a quality run: error and change of perplexity against attention time, one file per length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kernels.api import backend_names
from models.contract import ModelError
from models.quality_contenders import EXACT, REMAINDER, key_of
from models.quality_error import ErrorRow
from models.quality_perplexity import PerplexityRow
from models.quality_report import short
from models.quality_store import Results

MARKERS = "osD^v<>PXphd*8"
COLOURS = ("C0", "C1", "C2", "C8", "C5", "C7", "C6", "C3", "C9", "C4", "black", "teal", "navy", "gold")
LINEAR_BELOW_PERCENT = 0.1
"""The perplexity axis is linear within +- this, logarithmic beyond: changes may be negative."""

LEAST_ERROR = 1e-4
"""Smaller errors (a setting that keeps every key) would squeeze all others together."""

_NOTE = (
    "joined to the same setting without: remainder mean (hollow, dotted), gated (half filled, dashed); "
    f"errors below {LEAST_ERROR:g} drawn there"
)

_HALF = {"fillstyle": "left", "markerfacecoloralt": "white"}
_MARKS: dict[str, dict[str, Any]] = {"none": {}, "mean": {"markerfacecolor": "white"}, "gated": _HALF}
_TWIN_LINES = {"mean": ":", "gated": "--"}
"""Looks of each remainder, and of the line to the same setting without."""

Rows = Sequence[ErrorRow] | Sequence[PerplexityRow]


def pyplot() -> Any:
    """matplotlib's pyplot without a display. ModelError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise ModelError(
            "--plot needs matplotlib, which is not installed: pip install 'longreach[bench]'"
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def write_plots(results: Results, prefix: Path) -> list[Path]:
    """``prefix``-4k.png and so on: one per length, in order."""
    plt = pyplot()
    written = []
    for tokens in results.lengths:
        file = prefix.with_name(f"{prefix.name}-{short(tokens)}.png")
        errors = [row for row in results.errors if row.tokens == tokens]
        perplexities = [row for row in results.perplexities if row.tokens == tokens]
        _write(plt, errors, perplexities, f"{results.settings['model']}, {tokens:,} tokens", file)
        written.append(file)
    return written


def _write(
    plt: Any, errors: list[ErrorRow], perplexities: list[PerplexityRow], title: str, file: Path
) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 6.2), layout="constrained")
    _error_axes(left)
    _scatter(left, errors, lambda row: row.time_share, lambda row: max(row.error, LEAST_ERROR))
    _perplexity_axes(right)
    _scatter(right, perplexities, lambda row: row.time_share, lambda row: row.change_percent)
    figure.suptitle(title)
    handles = {label: handle for axes in (left, right) for handle, label in _legend(axes)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, frameon=False)
    left.set_title(_NOTE, loc="left", fontsize=8, color="0.35")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _legend(axes: Any) -> list[tuple[Any, str]]:
    return list(zip(*axes.get_legend_handles_labels(), strict=True))


def _time_axis(axes: Any) -> None:
    ticks = (0.05, 0.1, 0.15, 0.25, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{100 * tick:.0f} %" for tick in ticks], fontsize=8)
    axes.set_xticks([], minor=True)
    axes.axvline(1.0, color="0.6", linewidth=1)
    axes.grid(True, color="0.92")


def _error_axes(axes: Any) -> None:
    _time_axis(axes)
    axes.set_yscale("log")
    axes.set_xlabel("attention time, share of exact (selection included)")
    axes.set_ylabel("relative error through W_O, mean over layers")


def _perplexity_axes(axes: Any) -> None:
    _time_axis(axes)
    axes.set_yscale("symlog", linthresh=LINEAR_BELOW_PERCENT)
    ticks = (-1, -0.1, 0, 0.1, 1, 10, 100, 1000)
    axes.set_yticks(ticks, [f"{tick:g} %" for tick in ticks])
    axes.axhline(0.0, color="0.6", linewidth=1)
    axes.set_xlabel("attention time as served, share of exact")
    axes.set_ylabel("change of perplexity against exact")


def _scatter(axes: Any, rows: Rows, x: Callable[[Any], float], y: Callable[[Any], float]) -> None:
    """One colour and marker per backend; its main ladder joined, remainder variants joined to their twins."""
    names = [name for name in backend_names() if name != EXACT]
    for number, name in enumerate(names):
        mine = [row for row in rows if row.backend == name]
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        for remainder, ladder in _ladders(mine):
            plain = remainder == "none"
            points = sorted((x(row), y(row)) for row in ladder)
            axes.plot(
                *zip(*points, strict=True),
                linestyle="-" if plain else "",
                linewidth=1,
                markersize=6,
                label=name if plain else None,
                color=colour,
                marker=marker,
                **_MARKS[remainder],
            )
        _join_twins(axes, mine, x, y, colour)
    _fit(axes, rows, x)


def _ladders(rows: list[Any]) -> list[tuple[str, list[Any]]]:
    """Settings that vary the same params, with the remainder they use."""
    groups: dict[tuple[str, tuple[str, ...]], list[Any]] = {}
    for row in rows:
        groups.setdefault((row.full.get(REMAINDER, "none"), tuple(row.params)), []).append(row)
    return [(remainder, group) for (remainder, _), group in groups.items()]


def _join_twins(axes: Any, rows: list[Any], x: Any, y: Any, colour: Any) -> None:
    """A dotted line between each remainder variant and the same setting without."""
    by_key = {key_of(row.backend, row.full): row for row in rows}
    for row in rows:
        none = by_key.get(key_of(row.backend, {**row.full, REMAINDER: "none"}))
        line = _TWIN_LINES.get(row.full.get(REMAINDER, "none"))
        if line is not None and none is not None:
            axes.plot([x(none), x(row)], [y(none), y(row)], line, color=colour, linewidth=1)


def _fit(axes: Any, rows: Rows, x: Callable[[Any], float]) -> None:
    shares = [x(row) for row in rows]
    if shares:
        axes.set_xlim(min(shares) / 1.2, max(1.1, max(shares) * 1.15))
