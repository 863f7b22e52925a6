"""The page that a study of measured errors writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from models import verify_study_words as words
from models.quality_contenders import setting
from models.quality_tables import DASH, Column, named, number, table
from models.verify_study_decode import DecodeRow
from models.verify_study_faults import FaultRow
from models.verify_study_figures import SettingRow

WAYS = {"used": "Ŷ", "difference": "Ŷ corrected", "sampled": "sampled", "regression": "regression"}


def markdown(
    settings: Mapping[str, Any],
    context: Mapping[str, Any],
    rows: Sequence[SettingRow],
    faults: Sequence[FaultRow],
    decode: Sequence[DecodeRow],
) -> str:
    parts = [_head(settings, context, rows, faults)]
    for model, its in groupby(rows, key=lambda row: row.model):
        parts += [f"## {model}", table(_FIGURES, list(its))]
    parts += [words.FAULTS, *_fault_tables(faults)]
    parts += [words.DECODE, table(_DECODE, decode)]
    parts += [words.DENOMINATORS, table(_DENOMINATORS, rows)]
    return "\n\n".join(parts) + "\n"


def _head(
    settings: Mapping[str, Any],
    context: Mapping[str, Any],
    rows: Sequence[SettingRow],
    faults: Sequence[FaultRow],
) -> str:
    s, c, around = settings, context, _chance(settings["seeds"])
    return f"""# How honest the measured error is

{words.PROMISES}

{_in_short(rows, faults)}

## How it was counted

`{c["command"]}`,
{c["date"]}, {c["processor"]}, torch {c["torch"]}, {c["seconds"]} s beside other work.
Written by the command above: run it again instead of editing; `--json FILE` writes every figure.

A decoder (in chunks of {s["chunk_tokens"]} rows, as the server reads) and an encoder (at once) read
{s["tokens"]:,} and {s["encoder_tokens"]:,} tokens of `{s["text"]}` with exact attention. In up to
{s["layers"]} layers of each, evenly spaced, the error of every row is computed under every setting. Then the
served sampler draws its rows {s["seeds"]} times, under as many seeds, and the served code turns them into
figures. The randomness of a backend itself is drawn once. By chance alone a share of 95 % in one layer comes
out within ±{around:.1f} points (two standard errors). One text and two models: other documents have other
rows.

{words.COLUMNS}"""


def _in_short(rows: Sequence[SettingRow], faults: Sequence[FaultRow]) -> str:
    """What the tables come to, in words."""
    low = min(rows, key=lambda row: row.worst_upper_covers)
    wide = max(rows, key=lambda row: row.worst_spread)
    least = min(row.broken for row in faults if row.broken)
    rare = [row for row in faults if row.broken == least]
    upper, bound = (_mean(rows, name) for name in ("upper_covers", "bound_covers"))
    worst_bound = min(row.worst_bound_covers for row in rows)
    alarms, covers = ([getattr(row, name) for row in rare] for name in ("upper_alarms", "covers"))
    return f"""## In short

- `approx_upper_95` aims at 95 % and lay above the true error of a layer in {_share(upper)} of the draws,
  mean of {len(rows)} settings. Worst in one layer of `{low.backend}` {setting(low.params)} ({low.model}):
  {_share(low.worst_upper_covers)}. Expect that where nearly all of the error sits in few rows.
- `row_bound` promises 95 % and kept its word in {_share(bound)} of the draws, in the worst layer in
  {_share(worst_bound)}.
- An `estimate` of one layer is off by {_span([row.spread for row in rows])} (standard deviation, means over
  layers); at worst by {_share(wide.worst_spread)}, in a layer of `{wide.backend}` {setting(wide.params)}
  ({wide.model}).
- With {_share(least)} of the rows broken the upper value rose beyond what is usual in
  {_span(alarms)} of the draws, and lay above the true error in {_span(covers)}. Scattered
  rows and one stretch are found about equally often: the even draw cares for neither."""


def _mean(rows: Sequence[SettingRow], name: str) -> float:
    return float(sum(getattr(row, name) for row in rows) / len(rows))


def _span(values: Sequence[float]) -> str:
    return f"{_share(min(values))} to {_share(max(values))}"


def _chance(seeds: int) -> float:
    return float(200 * (0.95 * 0.05 / seeds) ** 0.5)


def _both(mean: float, worst: float, shown: str = "{:.0f}") -> str:
    return f"{shown.format(100 * mean)} / {shown.format(100 * worst)} %"


def _share(value: float) -> str:
    return DASH if value != value else f"{100 * value:.0f} %"


_FIGURES: list[Column[SettingRow]] = [
    *named(),
    Column("true error", lambda row: f"{number(row.error)} ({row.least_error:.3f}–{row.worst_error:.3f})"),
    Column("rows", lambda row: f"{row.rows:.0f}"),
    Column("bias", lambda row: _both(row.bias, row.worst_bias, "{:+.1f}")),
    Column("spread", lambda row: _both(row.spread, row.worst_spread)),
    Column("upper covers", lambda row: _both(row.upper_covers, row.worst_upper_covers)),
    Column("upper / true", lambda row: f"{row.upper_over:.2f}"),
    Column("bound covers", lambda row: _both(row.bound_covers, row.worst_bound_covers)),
    Column("answer: bias", lambda row: f"{100 * row.answer_bias:+.1f} %"),
    Column("answer: covers", lambda row: _share(row.answer_covers)),
]

_FAULTS: list[Column[list[FaultRow]]] = [
    Column("broken", lambda rows: _share(rows[0].broken)),
    Column("where", lambda rows: rows[0].shape if rows[0].broken else DASH, "---"),
    Column("hit (formula)", lambda rows: _share(rows[0].hit_formula)),
    Column("hit", lambda rows: _share(rows[0].hit)),
]


def _fault_tables(faults: Sequence[FaultRow]) -> Iterator[str]:
    """One table a model: a line for each fault, two columns for each setting."""
    for model, its in groupby(faults, key=lambda row: row.model):
        rows = list(its)
        names = list(dict.fromkeys((row.backend, setting(row.params)) for row in rows))
        cases: dict[tuple[float, str], list[FaultRow]] = {}
        for row in rows:
            cases.setdefault((row.broken, row.shape), []).append(row)
        yield f"### {model}"
        yield "\n".join(f"{n}. `{backend}` {told}" for n, (backend, told) in enumerate(names, 1))
        yield table([*_FAULTS, *(_alarms(n) for n in range(len(names)))], list(cases.values()))


def _alarms(number: int) -> Column[list[FaultRow]]:
    def cell(rows: list[FaultRow]) -> str:
        row = rows[number]
        return f"{_share(row.bound_alarms)} / {_share(row.upper_alarms)} / {_share(row.covers)}"

    return Column(f"{number + 1}: bound / upper / covers", cell)


def _way(name: str) -> Column[SettingRow]:
    def cell(row: SettingRow) -> str:
        mean, worst, spread, most = row.denominators[name]
        if mean != mean:
            return DASH
        return f"{100 * mean:+.1f} ({100 * worst:+.0f}) / {100 * spread:.0f} ({100 * most:.0f}) %"

    return Column(WAYS[name], cell)


_DECODE: list[Column[DecodeRow]] = [
    *named(),
    Column("steps", lambda row: f"{row.steps:,}"),
    Column("looked at", lambda row: f"{row.looked_at:.0f}"),
    Column("estimate: given", lambda row: _share(row.given)),
    Column("bias", lambda row: f"{100 * row.bias:+.1f} %"),
    Column("spread", lambda row: _share(row.spread)),
    Column("upper: given", lambda row: _share(row.upper_given)),
    Column("covers", lambda row: _share(row.upper_covers)),
    Column("bound: given", lambda row: _share(row.bound_given)),
    Column("covers", lambda row: _share(row.bound_covers)),
]

_DENOMINATORS: list[Column[SettingRow]] = [
    Column("model", lambda row: row.model, "---"),
    *named(),
    *map(_way, WAYS),
]
