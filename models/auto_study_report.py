"""The report of a study of ``auto``, as markdown: one line per length and budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, median

from models.auto_check import FAR
from models.auto_study_rows import AutoRow, FactRow, StudyResults, TimeRow
from models.profile import EXACT
from models.quality_answers import Paired, paired
from models.quality_long_report import points, share_of, told_facts, told_left_out
from models.quality_perplexity import SKIPPED_TOKENS
from models.quality_tables import DASH, Column, number, origin, table

WORST_SHOWN = 12


@dataclass(frozen=True)
class LayerDocument:
    """One layer on one document under one budget; ``repaired_rows`` of its ``rows``."""

    row: AutoRow
    layer: int
    backend: str
    error: float
    estimate: float
    exact_from: int | None

    @property
    def over(self) -> float:
        """Error over budget."""
        return self.error / self.row.max_error

    @property
    def repaired_rows(self) -> int:
        return 0 if self.exact_from is None else self.row.prompt_tokens - self.exact_from


@dataclass(frozen=True)
class Cell:
    """One length and budget."""

    tokens: int
    max_error: float
    rows: tuple[AutoRow, ...]
    facts: tuple[FactRow, ...]
    times: tuple[TimeRow, ...]

    @cached_property
    def layers(self) -> list[LayerDocument]:
        return [each for row in self.rows for each in layer_documents(row)]

    @property
    def approximated(self) -> list[LayerDocument]:
        """Those whose plan is not exact."""
        return [each for each in self.layers if each.backend != EXACT]

    @property
    def within(self) -> float:
        return fmean(each.over <= 1 for each in self.layers)

    @property
    def far_above(self) -> float:
        return fmean(each.over > FAR for each in self.layers)

    @property
    def repaired_rows_share(self) -> float | None:
        """Of the rows in layers that are not exact by plan; None where there are none."""
        rows = sum(each.row.prompt_tokens for each in self.approximated)
        return sum(each.repaired_rows for each in self.approximated) / rows if rows else None

    @property
    def ratios(self) -> list[float]:
        """The guard's estimate over the true error."""
        return [each.estimate / each.error for each in self.approximated if each.error > 0]

    def flagged(self, flag: bool, true: bool) -> int:
        """Layer-documents that the guard ends by calling violated or not, and that are or are not."""
        found = [(each.estimate > self.max_error, each.over > 1) for each in self.layers]
        return found.count((flag, true))

    @cached_property
    def chosen(self) -> Paired | None:
        return paired(
            [right for row in self.facts for right in row.chosen],
            [right for row in self.facts for right in row.exact_chosen],
        )

    @cached_property
    def generated(self) -> Paired | None:
        return paired(
            [right for row in self.facts for right in row.generated],
            [right for row in self.facts for right in row.exact_generated],
        )


def layer_documents(row: AutoRow) -> Iterator[LayerDocument]:
    figures = zip(row.layers, row.backends, row.errors, row.estimates, row.exact_from, strict=True)
    for layer, backend, error, estimate, exact_from in figures:
        yield LayerDocument(row, layer, backend, error, estimate, exact_from)


def cells(results: StudyResults) -> list[Cell]:
    """By length and budget, ascending; those with documents."""
    places = sorted({(row.tokens, row.max_error) for row in results.rows})
    return [
        Cell(
            *place,
            tuple(row for row in results.rows if (row.tokens, row.max_error) == place),
            tuple(row for row in results.facts if (row.tokens, row.max_error) == place),
            tuple(row for row in results.times if (row.tokens, row.max_error) == place),
        )
        for place in places
    ]


def markdown(results: StudyResults) -> str:
    found = cells(results)
    parts = [_head(results), "## Errors", table([*_PLACE, *_ERRORS], found)]
    parts += ["## Perplexity, facts and time", table([*_PLACE, *_LOSSES], found), *_over_lengths(found)]
    parts += ["## The guard", _GUARD_TOLD, table([*_PLACE, *_GUARD], found)]
    worst = _worst(found)
    if worst:
        parts += ["## Beyond the budget", _worst_told(found), table(_WORST, worst)]
    return "\n\n".join(parts) + "\n"


def _head(results: StudyResults) -> str:
    s = results.settings
    chunk = f"chunks of {s['chunk_tokens']} rows" if s["chunk_tokens"] else "one piece"
    documents = len({(row.text, row.document, row.tokens) for row in results.rows})
    lengths = sorted({row.prompt_tokens for row in results.facts if row.prompt_tokens != row.tokens})
    room = (
        f" Those with facts have {lengths[-1]:,} tokens at the model's limit, to leave a question room."
        if lengths
        else ""
    )
    return f"""# `auto` and its budget, all rows computed

{origin(s, results.context)}

Model `{s["model"]}`, {documents} documents of {", ".join(f"`{name}`" for name in s["texts"])}, read in {
        chunk
    }
over the cached keys, as a server reads a prompt. Profile `{s["profile"]}` (`{s["profile_command"]}`).{
        _own_texts(s["calibrated_on"])
    }{room}{told_left_out(results.context)}

- **layer-documents**: one layer on one document. **within**: its error |(ô − o) W_O| / |o W_O| over all rows,
  exact ones too, is at most `max_error`, o exact's output on the inputs that the layer has under `auto`.
- **exact by plan**: layer-documents that cannot err. **repaired**: those that went on exactly from some row
  on, and the share of rows that they did so for, of all rows of layers that are not exact by plan.
- **perplexity**: its change against exact on the same document, over the text's tokens after the first
  {SKIPPED_TOKENS}: median and worst over documents.
- **time**: time to first token over exact's, planning and guard included and nothing else measured, in turns
  with exact: the median of each document's median, and the largest single ratio.{
        told_facts(s["facts"], "in the same documents, which are read once more for them")
    }"""


def _own_texts(names: Sequence[str]) -> str:
    """Where the profile's documents may be among those studied."""
    return f" It was made of {', '.join(f'`{name}`' for name in names)} too." if names else ""


def _over_lengths(found: Sequence[Cell]) -> Iterator[str]:
    """The facts of all lengths together: those of one are few."""
    budgets = sorted({cell.max_error for cell in found})
    pooled = [
        Cell(
            0, budget, (), tuple(row for cell in found if cell.max_error == budget for row in cell.facts), ()
        )
        for budget in budgets
    ]
    if len({cell.tokens for cell in found}) > 1 and pooled[0].chosen:
        yield "Facts of all lengths together:"
        yield table(_POOLED, pooled)


_GUARD_TOLD = """The guard's last estimate over the true error, in layers that are not exact by plan: median,
smallest and largest. Violated: layer-documents that end above the budget by the guard's estimate, and by the
truth."""


def _share(value: float | None) -> str:
    return DASH if value is None else f"{100 * value:.1f} %"


def _ratio(values: Sequence[float], pick: object) -> str:
    assert callable(pick)
    return f"{pick(values):.2f}" if values else DASH


_PLACE: list[Column[Cell]] = [
    Column("tokens", lambda its: f"{its.tokens:,}"),
    Column("max_error", lambda its: f"{its.max_error:g}"),
    Column("documents", lambda its: str(len(its.rows))),
]
_ERRORS: list[Column[Cell]] = [
    Column("layer-documents", lambda its: f"{len(its.layers):,}"),
    Column("within", lambda its: _share(its.within)),
    Column(f"above {FAR:g}x", lambda its: _share(its.far_above)),
    Column("worst / budget", lambda its: f"{max(each.over for each in its.layers):.2f}"),
    Column("exact by plan", lambda its: _share(1 - len(its.approximated) / len(its.layers))),
    Column("repaired", lambda its: str(sum(each.exact_from is not None for each in its.layers))),
    Column("rows repaired", lambda its: _share(its.repaired_rows_share)),
    Column("density", lambda its: f"{fmean(row.density for row in its.rows):.3f}"),
]
_FACTS: list[Column[Cell]] = [
    Column("chosen", lambda its: share_of(its.chosen)),
    Column("points", lambda its: points(its.chosen)),
    Column("generated", lambda its: share_of(its.generated)),
    Column("points", lambda its: points(its.generated)),
]
_POOLED: list[Column[Cell]] = [
    Column("max_error", lambda its: f"{its.max_error:g}"),
    Column("questions", lambda its: str(sum(len(row.chosen) for row in its.facts))),
    *_FACTS,
]
_LOSSES: list[Column[Cell]] = [
    Column("perplexity", lambda its: f"{median(row.change_percent for row in its.rows):+.2f} %"),
    Column("worst", lambda its: f"{max(row.change_percent for row in its.rows):+.2f} %"),
    *_FACTS,
    Column("time", lambda its: _ratio([row.ratio for row in its.times], median)),
    Column("largest", lambda its: _ratio([row.largest for row in its.times], max)),
    Column("timed", lambda its: str(len(its.times))),
]
_GUARD: list[Column[Cell]] = [
    Column("rows computed", lambda its: f"{sum(row.guarded_rows for row in its.rows):,}"),
    Column("estimate / true", lambda its: _ratio(its.ratios, median)),
    Column("smallest", lambda its: _ratio(its.ratios, min)),
    Column("largest", lambda its: _ratio(its.ratios, max)),
    Column("violated, both", lambda its: str(its.flagged(True, True))),
    Column("estimate alone", lambda its: str(its.flagged(True, False))),
    Column("truth alone", lambda its: str(its.flagged(False, True))),
]


def _worst(found: Sequence[Cell]) -> list[LayerDocument]:
    beyond = [each for cell in found for each in cell.layers if each.over > 1]
    return sorted(beyond, key=lambda each: -each.over)[:WORST_SHOWN]


def _worst_told(found: Sequence[Cell]) -> str:
    count = sum(each.over > 1 for cell in found for each in cell.layers)
    return f"The {min(count, WORST_SHOWN)} worst of {count}."


_WORST: list[Column[LayerDocument]] = [
    Column("text", lambda its: f"{its.row.text} {its.row.document + 1}", "---"),
    Column("tokens", lambda its: f"{its.row.tokens:,}"),
    Column("max_error", lambda its: f"{its.row.max_error:g}"),
    Column("layer", lambda its: str(its.layer)),
    Column("plan", lambda its: its.backend, "---"),
    Column("error", lambda its: number(its.error)),
    Column("/ budget", lambda its: f"{its.over:.2f}"),
    Column("guard's estimate", lambda its: number(its.estimate)),
    Column("exact from", lambda its: DASH if its.exact_from is None else f"{its.exact_from:,}"),
]
