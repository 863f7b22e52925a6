"""Tables of a quality run, as markdown: what decoders and encoders have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from models.quality_choice import TIME_BUDGETS, RemainderGain, Variant, best_within, remainder_gains
from models.quality_contenders import key_of, setting
from models.quality_error import ErrorRow

DASH = "–"
LAYERS_WITHIN = 0.5
"""Share of exact's time within which each backend's best setting shows its errors layer by layer."""

MOST_LAYERS = 12
"""Columns of the table of layers: of more layers it shows every other, every third and so on."""

R = TypeVar("R")


@dataclass(frozen=True)
class Column(Generic[R]):
    """One column: its header, and what it shows of a row."""

    name: str
    cell: Callable[[R], str]
    align: str = "--:"


@dataclass(frozen=True)
class Extras:
    """What a run measured beside errors: ``headline`` columns of the best settings, ``full`` ones of every
    setting."""

    headline: Sequence[Column[ErrorRow]]
    full: Sequence[Column[ErrorRow]]


def joined(columns: Sequence[Column[R]], readings: Iterable[R]) -> list[Column[ErrorRow]]:
    """Columns of another measurement, for rows of errors: a dash where there is none of the same setting."""
    read = {key_of_row(reading): reading for reading in readings}

    def column(its: Column[R]) -> Column[ErrorRow]:
        def cell(row: ErrorRow) -> str:
            found = read.get(key_of_row(row))
            return DASH if found is None else its.cell(found)

        return Column(its.name, cell, its.align)

    return [column(each) for each in columns]


def short(tokens: int) -> str:
    """A length as file names have it: 4k, 500."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def origin(settings: Mapping[str, Any], context: Mapping[str, Any]) -> str:
    """Where and when the figures were taken."""
    added = "".join(f", then\n`{command}`" for command in context.get("added_by", []))
    loads = ", ".join(f"{load:.2f}" for load in context["loads_at_start"])
    return f"""`{context["command"]}`{added},
{context["date"]}, {context["processor"]}, {context["threads"]} threads, torch {context["torch"]}.
Load of the machine when measuring began: {loads}. Above 0.5 or so others ran beside it, and times are worth
less. Written by the command above: run it again instead of editing."""


def told_why(left_out: Mapping[str, str]) -> str:
    """The backends that such a model cannot run, each with the reason."""
    return "Not measured: " + "; ".join(f"`{name}` {reason}" for name, reason in left_out.items()) + "."


def table(columns: Sequence[Column[R]], rows: Iterable[R]) -> str:
    head = "| " + " | ".join(column.name for column in columns) + " |"
    rule = "|" + "|".join(column.align for column in columns) + "|"
    lines = ("| " + " | ".join(column.cell(row) for column in columns) + " |" for row in rows)
    return "\n".join([head, rule, *lines])


def error_sections(errors: Sequence[ErrorRow], extras: Extras) -> Iterator[str]:
    """The best settings, layers, remainders and every setting of one length."""
    if any(best_within(errors, budget) for budget in TIME_BUDGETS):
        yield "### The best setting in a given time"
        yield _best_table(errors, extras)
    best = best_within(errors, LAYERS_WITHIN)
    if best:
        yield "### Layer by layer"
        yield _told_layers(best[0].layers)
        yield _layers_table(best)
    gains = remainder_gains(errors)
    if gains:
        yield "### What the remainder buys at equal time"
        yield _GAINS_TOLD
        yield table(_GAIN, gains)
    if errors:
        yield "### Every setting"
        yield table(_full(extras), errors)


def _best_table(errors: Sequence[ErrorRow], extras: Extras) -> str:
    tried = Counter(row.backend for row in errors)
    best = [(budget, row) for budget in TIME_BUDGETS for row in best_within(errors, budget)]
    within: list[Column[tuple[float, ErrorRow]]] = [
        Column("within", lambda each: percent(each[0]), "---"),
        *(_second(column) for column in named()),
        Column("settings tried", lambda each: str(tried[each[1].backend])),
        *(_second(column) for column in [*_ERRORS, *extras.headline, _DENSITY, _RECALL, _TIME]),
    ]
    return table(within, best)


def _second(column: Column[ErrorRow]) -> Column[tuple[float, ErrorRow]]:
    return Column(column.name, lambda each: column.cell(each[1]), column.align)


def shown_layers(layers: Sequence[int]) -> list[int]:
    """Places of at most MOST_LAYERS of the measured layers, evenly spaced."""
    step = -(-len(layers) // MOST_LAYERS)
    return list(range(0, len(layers), step))


def _told_layers(layers: Sequence[int]) -> str:
    some = "the measured layers" if len(shown_layers(layers)) == len(layers) else "some of the layers"
    return (
        f"Error of each backend's best setting within {percent(LAYERS_WITHIN)} of exact's attention time, "
        f"{some};\nall of them are in the file that `--json` writes."
    )


def _layers_table(best: Sequence[ErrorRow]) -> str:
    places = shown_layers(best[0].layers)
    columns = [Column(str(best[0].layers[i]), _layer_cell(i)) for i in places]
    return table([*named(), *columns], best)


def _layer_cell(place: int) -> Callable[[ErrorRow], str]:
    return lambda row: f"{row.layer_errors[place]:.3f}"


def _full(extras: Extras) -> list[Column[ErrorRow]]:
    return [*named(), *_ERRORS, *extras.full, _TIME, *_COSTS, *_DROPPED, _RECALL]


def named() -> list[Column[Any]]:
    """Backend and setting of any row."""
    return [
        Column("backend", lambda row: row.backend, "---"),
        Column("setting", lambda row: setting(row.params), "---"),
    ]


def key_of_row(row: Any) -> str:
    return key_of(row.backend, row.full)


def number(value: float) -> str:
    return f"{value:.4f}" if abs(value) >= 5e-5 or value != value else f"{value:.0e}" if value else "0"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def or_dash(value: float | None, shown: Callable[[float], str] = number) -> str:
    return DASH if value is None else shown(value)


_ERRORS: list[Column[ErrorRow]] = [
    Column("error", lambda row: number(row.error)),
    Column("worst layer", lambda row: number(row.worst_error)),
]
_TIME: Column[ErrorRow] = Column("time", lambda row: percent(row.time_share))
_DENSITY: Column[ErrorRow] = Column("density", lambda row: f"{row.density:.3f}")
_COSTS: list[Column[ErrorRow]] = [
    Column("selection", lambda row: percent(row.selection_s / row.exact_attention_s)),
    _DENSITY,
    Column("computed", lambda row: f"{row.density_computed:.3f}"),
]
_DROPPED: list[Column[ErrorRow]] = [
    Column("dropped (estimate)", lambda row: or_dash(row.dropped_estimate)),
    Column("dropped (true)", lambda row: or_dash(row.dropped_true)),
]
_RECALL: Column[ErrorRow] = Column(
    "attention recall", lambda row: or_dash(row.recall, lambda share: f"{share:.3f}")
)

_GAINS_TOLD = """Left-out blocks put back as their means (`mean`), or as far as means would have predicted the
chosen ones (`gated`). Each shows its time, its error, and the change of the error `at equal
choice` (same blocks kept, the rest dropped) and `at equal time`: against the error that
`remainder: none` reaches in that time, read off between its own settings (a dash beyond
them). Below 0 the remainder is better."""


def _variant_columns(name: str, of: Callable[[RemainderGain], Variant | None]) -> list[Column[RemainderGain]]:
    def shown(cell: Callable[[Variant, ErrorRow], str]) -> Callable[[RemainderGain], str]:
        def show(gain: RemainderGain) -> str:
            variant = of(gain)
            return DASH if variant is None else cell(variant, gain.none)

        return show

    return [
        Column(f"{name}: time", shown(lambda its, none: percent(its.row.time_share))),
        Column(f"{name}: error", shown(lambda its, none: number(its.row.error))),
        Column(f"{name}: at equal choice", shown(lambda its, none: _relative(its.row.error, none.error))),
        Column(
            f"{name}: at equal time", shown(lambda its, none: _relative(its.row.error, its.at_equal_time))
        ),
    ]


def _relative(value: float, base: float | None) -> str:
    return DASH if not base else f"{100 * (value / base - 1):+.0f} %"


_GAIN: list[Column[RemainderGain]] = [
    Column("backend", lambda gain: gain.none.backend, "---"),
    Column("setting", lambda gain: setting(gain.none.params), "---"),
    Column("none: time", lambda gain: percent(gain.none.time_share)),
    Column("none: error", lambda gain: number(gain.none.error)),
    *_variant_columns("mean", lambda gain: gain.mean),
    *_variant_columns("gated", lambda gain: gain.gated),
]
