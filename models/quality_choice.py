"""What the figures say: the best setting within a time, and what putting back left-out keys buys."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from models.quality_contenders import key_of
from models.quality_error import ErrorRow
from models.quality_ladders import EXACT, REMAINDER

TIME_BUDGETS = (0.25, 0.35, 0.50, 0.75)
"""Shares of exact's attention time."""

R = TypeVar("R")


def best_within(rows: Sequence[ErrorRow], budget: float) -> list[ErrorRow]:
    """Of every backend the setting with the least error whose attention, selection included, takes at most
    ``budget`` of exact's time; least error first. Backends without such a setting are left out."""
    best: dict[str, ErrorRow] = {}
    for row in rows:
        if row.backend == EXACT or row.time_share > budget:
            continue
        held = best.get(row.backend)
        if held is None or (row.error, row.time_share) < (held.error, held.time_share):
            best[row.backend] = row
    return sorted(best.values(), key=lambda row: row.error)


@dataclass(frozen=True)
class Variant:
    """A setting that puts left-out blocks back. ``at_equal_time`` is the error that ``remainder: none`` would
    reach in its time: between its own settings that leave keys out, on a line in (log time, log error); None
    beyond them."""

    row: ErrorRow
    at_equal_time: float | None


@dataclass(frozen=True)
class RemainderGain:
    """One setting with left-out blocks dropped (``none``), and those of its twins that were measured: blocks
    put back as means (``mean``), and gated (``gated``)."""

    none: ErrorRow
    mean: Variant | None
    gated: Variant | None


def remainder_gains(rows: Sequence[ErrorRow]) -> list[RemainderGain]:
    """Every setting that was measured without a remainder and with one, in the order of ``rows``."""
    by_key = {key_of(row.backend, row.full): row for row in rows}
    found = []
    for none in rows:
        if none.full.get(REMAINDER) != "none":
            continue
        mine = [row for row in rows if row.backend == none.backend and row.density < 1]
        others = [row for row in mine if row.full.get(REMAINDER) == "none"]
        mean, gated = (_variant(none, what, by_key, others) for what in ("mean", "gated"))
        if mean or gated:
            found.append(RemainderGain(none, mean, gated))
    return found


def _variant(
    none: ErrorRow, remainder: str, by_key: Mapping[str, ErrorRow], others: Sequence[ErrorRow]
) -> Variant | None:
    row = by_key.get(key_of(none.backend, {**none.full, REMAINDER: remainder}))
    return Variant(row, error_in_time(others, row.time_share)) if row is not None else None


def error_in_time(rows: Sequence[ErrorRow], time_share: float) -> float | None:
    """The least error of these settings in ``time_share``, between the two nearest of those that nothing
    beats in both time and error. None outside their times, or where an error of 0 forbids a logarithm."""
    front = pareto(rows)
    for cheap, dear in zip(front, front[1:], strict=False):
        if cheap.time_share <= time_share <= dear.time_share and dear.error > 0:
            span = math.log(dear.time_share / cheap.time_share)
            part = math.log(time_share / cheap.time_share) / span if span else 1.0
            return math.exp((1 - part) * math.log(cheap.error) + part * math.log(dear.error))
    return None


def pareto(rows: Sequence[ErrorRow]) -> list[ErrorRow]:
    """The settings that no other beats in both time and error, cheapest first."""
    return front_of(rows, lambda row: row.time_share, lambda row: row.error)


def front_of(rows: Sequence[R], cost: Callable[[R], float], loss: Callable[[R], float]) -> list[R]:
    """Those that no other beats in both, cheapest first."""
    front: list[R] = []
    for row in sorted(rows, key=lambda row: (cost(row), loss(row))):
        if not front or loss(row) < loss(front[-1]):
            front.append(row)
    return front
