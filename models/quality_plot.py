"""Plots of a quality run: error and what comes of it against time, one file per length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from kernels.api import backend_names
from models.contract import ModelError
from models.quality_contenders import key_of
from models.quality_ladders import EXACT, REMAINDER
from models.quality_store import Results
from models.quality_tables import short

MARKERS = "osD^v<>PXphd*8H"
COLOURS = ("C0", "C1", "C2", "C8", "C5", "C7", "C6", "C3", "C9", "C4", "black", "teal", "navy", "gold")
"""Of different numbers, so that the pairs of them repeat late."""
LINEAR_BELOW_PERCENT = 0.1
"""The perplexity axis is linear within +- this, logarithmic beyond: changes may be negative."""

LEAST_ERROR = 1e-4
"""Smaller errors (a setting that keeps every key) would squeeze all others together."""

_LEAST_TOLD = f"errors below {LEAST_ERROR:g} drawn there"
_TWINS_TOLD = "joined to the same setting without: remainder mean (hollow, dotted), gated (half, dashed)"

_HALF = {"fillstyle": "left", "markerfacecoloralt": "white"}
_MARKS: dict[str, dict[str, Any]] = {"none": {}, "mean": {"markerfacecolor": "white"}, "gated": _HALF}
_TWIN_LINES = {"mean": ":", "gated": "--"}
"""Looks of each remainder, and of the line to the same setting without."""

_NO_BACKEND = ("red", "*", 13)
"""Look of what chooses among backends: colour, marker and its size."""

Number = Callable[[Any], float]


@dataclass(frozen=True)
class Panel:
    """One picture: what it shows of rows that have backend, params and full, and how its axes look."""

    rows: Sequence[Any]
    x: Number
    y: Number
    dress: Callable[[Any], None]
    note: str = ""


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


class Plotted(Protocol):
    """Results of any run that has lengths."""

    settings: dict[str, Any]

    @property
    def lengths(self) -> list[int]: ...


P = TypeVar("P", bound=Plotted)


def write_plots(results: P, prefix: Path, panels_of: Callable[[P, int], list[Panel]]) -> list[Path]:
    """``prefix``-4k.png and so on: one per length, in order."""
    plt = pyplot()
    written = []
    for tokens in results.lengths:
        file = prefix.with_name(f"{prefix.name}-{short(tokens)}.png")
        title = f"{results.settings['model']}, {tokens:,} tokens"
        _write(plt, [panel for panel in panels_of(results, tokens) if panel.rows], title, file)
        written.append(file)
    return written


def decoder_panels(results: Results, tokens: int) -> list[Panel]:
    perplexities = [row for row in results.perplexities if row.tokens == tokens]
    return [error_panel(results, tokens), Panel(perplexities, _time_share, _change, _perplexity_axes)]


def error_panel(results: Results, tokens: int) -> Panel:
    errors = [row for row in results.errors if row.tokens == tokens]
    return Panel(errors, _time_share, lambda row: max(row.error, LEAST_ERROR), _error_axes, _LEAST_TOLD)


def _time_share(row: Any) -> float:
    return float(row.time_share)


def _change(row: Any) -> float:
    return float(row.change_percent)


def _write(plt: Any, panels: Sequence[Panel], title: str, file: Path) -> None:
    figure, grid = plt.subplots(
        1, len(panels), figsize=(6.5 * len(panels), 6.2), layout="constrained", squeeze=False
    )
    for axes, panel in zip(grid[0], panels, strict=True):
        panel.dress(axes)
        _scatter(axes, panel.rows, panel.x, panel.y)
    figure.suptitle(title)
    handles = {label: handle for axes in grid[0] for handle, label in _legend(axes)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, frameon=False)
    twins = any(row.full.get(REMAINDER, "none") != "none" for panel in panels for row in panel.rows)
    notes = [_TWINS_TOLD] * twins + [panel.note for panel in panels if panel.note]
    grid[0][0].set_title("; ".join(notes), loc="left", fontsize=8, color="0.35")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _legend(axes: Any) -> list[tuple[Any, str]]:
    return list(zip(*axes.get_legend_handles_labels(), strict=True))


def time_axis(axes: Any) -> None:
    ticks = (0.05, 0.1, 0.15, 0.25, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{100 * tick:.0f} %" for tick in ticks], fontsize=8)
    axes.set_xticks([], minor=True)
    axes.axvline(1.0, color="0.6", linewidth=1)
    axes.grid(True, color="0.92")


def _error_axes(axes: Any) -> None:
    time_axis(axes)
    axes.set_yscale("log")
    axes.set_xlabel("attention time, share of exact (selection included)")
    axes.set_ylabel("relative error through W_O, mean over layers")


def _perplexity_axes(axes: Any) -> None:
    change_axes(axes)
    axes.set_xlabel("attention time as served, share of exact")


def change_axes(axes: Any) -> None:
    """The change of perplexity against a share of exact's time."""
    time_axis(axes)
    axes.set_yscale("symlog", linthresh=LINEAR_BELOW_PERCENT)
    ticks = (-1, -0.1, 0, 0.1, 1, 10, 100, 1000)
    axes.set_yticks(ticks, [f"{tick:g} %" for tick in ticks])
    axes.axhline(0.0, color="0.6", linewidth=1)
    axes.set_ylabel("change of perplexity against exact")


def _scatter(axes: Any, rows: Sequence[Any], x: Number, y: Number) -> None:
    """One colour and marker per backend; its main ladder joined, remainder variants joined to their twins."""
    names = dict.fromkeys([*backend_names(), *(row.backend for row in rows)])
    names.pop(EXACT, None)
    for number, name in enumerate(names):
        mine = [row for row in rows if row.backend == name]
        colour, marker, size = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)], 6
        if name not in backend_names():
            colour, marker, size = _NO_BACKEND
        for remainder, ladder in _ladders(mine):
            plain = remainder == "none"
            points = sorted((x(row), y(row)) for row in ladder)
            axes.plot(
                *zip(*points, strict=True),
                linestyle="-" if plain else "",
                linewidth=1,
                markersize=size,
                label=name if plain else None,
                color=colour,
                marker=marker,
                **_MARKS[remainder],
            )
        _join_twins(axes, mine, x, y, colour)
    _fit(axes, rows, x)


def _ladders(rows: Sequence[Any]) -> list[tuple[str, list[Any]]]:
    """Settings that vary the same numbers, with the remainder they use."""
    groups: dict[tuple[str, tuple[str, ...]], list[Any]] = {}
    for row in rows:
        varied = tuple(_varied(name, value) for name, value in row.params.items() if name != REMAINDER)
        groups.setdefault((row.full.get(REMAINDER, "none"), varied), []).append(row)
    return [(remainder, group) for (remainder, _), group in groups.items()]


def _varied(name: str, value: Any) -> str:
    """A number goes by its name; what is no number is another kind of setting for every value."""
    return f"{name}={value}" if isinstance(value, str) else name


def _join_twins(axes: Any, rows: Sequence[Any], x: Number, y: Number, colour: Any) -> None:
    """A dotted line between each remainder variant and the same setting without."""
    by_key = {key_of(row.backend, row.full): row for row in rows}
    for row in rows:
        none = by_key.get(key_of(row.backend, {**row.full, REMAINDER: "none"}))
        line = _TWIN_LINES.get(row.full.get(REMAINDER, "none"))
        if line is not None and none is not None:
            axes.plot([x(none), x(row)], [y(none), y(row)], line, color=colour, linewidth=1)


def _fit(axes: Any, rows: Sequence[Any], x: Number) -> None:
    shares = [x(row) for row in rows]
    if shares:
        axes.set_xlim(min(shares) / 1.2, max(1.1, max(shares) * 1.15))
