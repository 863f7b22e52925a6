"""A comparison as a picture: measured error against the time to read the document.

Needs matplotlib (the extra ``bench``), of which only the Agg renderer: no display, no global state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.cli_compare_table import rows_of
from service.settings import ConfigError

SUFFIXES = (".png", ".svg", ".pdf")
MARKERS = "osD^v<>PXp*h"
INK, RULE, GRID = "#1b2a49", "#8a8f9c", "#e6e4de"


@dataclass(frozen=True)
class Point:
    """One choice: ``time`` in exact's, ``upper`` None where there is none."""

    name: str
    family: str
    time: float
    error: float
    upper: float | None


def check(file: Path) -> None:
    """ConfigError where nothing could be drawn into ``file``."""
    _figure_class()
    if file.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--plot {file}: write one of {', '.join(SUFFIXES)}")
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"--plot {file}: there is no directory {file.parent}")


def points_of(answer: dict[str, Any], asked: Sequence[str]) -> list[Point]:
    """Choices whose error and time were both measured."""
    exact_ms, found = answer["reference"]["prefill_ms"], []
    for name, row in rows_of(answer, asked)[1:]:
        measured = row["attention"]["measured_error"]
        error = None if measured is None else measured["estimate"]
        if error is None or not row["prefill_ms"] or not exact_ms:
            continue
        upper = measured["approx_upper_95"]
        found.append(Point(name, row["requested"], row["prefill_ms"] / exact_ms, error, upper))
    return found


def write(answer: dict[str, Any], asked: Sequence[str], file: Path) -> None:
    points = points_of(answer, asked)
    if not points:
        raise ConfigError(f"--plot {file}: no choice has both an error and a time; nothing was drawn")
    figure = _figure_class()(figsize=(8.4, 5.2), dpi=120, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    _dress(axes, answer)
    families = list(dict.fromkeys(point.family for point in points))
    for family in families:
        mine = [point for point in points if point.family == family]
        _draw(axes, mine, family, families.index(family))
    if min(point.error for point in points) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="y", which="minor", labelsize=7)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    try:
        figure.savefig(file)
    except OSError as error:
        raise ConfigError(f"--plot {file}: cannot be written: {error.strerror}") from None


def _draw(axes: Any, points: Sequence[Point], family: str, index: int) -> None:
    """The settings of one backend, joined in order of time, each with its limit above it."""
    inside = sorted(points, key=lambda point: point.time)
    times, errors = [p.time for p in inside], [p.error for p in inside]
    up = [max((p.upper or p.error) - p.error, 0.0) for p in inside]
    colour, marker = f"C{index % 10}", MARKERS[index % len(MARKERS)]
    axes.errorbar(
        times, errors, yerr=[[0.0] * len(up), up], fmt=marker, color=colour, label=family, capsize=3, zorder=3
    )
    axes.plot(times, errors, color=colour, linewidth=0.8, alpha=0.6, zorder=2)
    for point in inside:
        params = point.name.partition(":")[2]
        if params and len(params) <= 24:
            place = (6, 5 if index % 2 == 0 else -10)
            axes.annotate(
                params, (point.time, point.error), place, textcoords="offset points", fontsize=7, color=INK
            )


def _dress(axes: Any, answer: dict[str, Any]) -> None:
    axes.axvline(1.0, color=RULE, linewidth=1, linestyle="--", label="exact", zorder=1)
    axes.set_xlabel("time to read the document / exact's")
    axes.set_ylabel("measured error of the worst layer\n(bar: 95 % upper limit, approximate)")
    axes.set_title(f"{answer['model']}, {answer['tokens']:,} tokens", loc="left", color=INK)
    axes.grid(True, color=GRID, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--plot needs matplotlib, which is not installed: pip install matplotlib") from None
    return Figure
