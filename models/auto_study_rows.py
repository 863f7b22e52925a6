"""Results of a study of ``auto``: what each document lost under each budget, and how long it took."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from models.quality_facts import Document
from models.quality_long_rows import read_stored


@dataclass(frozen=True)
class AutoRow:
    """One document under one budget, against exact on the same one. By layer, in order: the ``backends`` of
    the plan; the true ``errors`` over all rows, on auto's own trajectory; what the guard estimated, and the
    row from which on it ran exactly (None where it did not have to). ``plan`` can be replayed."""

    text: str
    document: int
    tokens: int
    prompt_tokens: int
    max_error: float
    reason: str
    layers: list[int]
    backends: list[str]
    plan: list[dict[str, Any]]
    errors: list[float]
    estimates: list[float]
    exact_from: list[int | None]
    guarded_rows: int
    density: float
    perplexity: float
    exact_perplexity: float
    change_percent: float
    standard_error_percent: float | None


@dataclass(frozen=True)
class FactRow:
    """Answers about the facts planted in one document, in their order, under one budget and under exact."""

    text: str
    document: int
    tokens: int
    prompt_tokens: int
    max_error: float
    chosen: list[bool]
    exact_chosen: list[bool]
    generated: list[bool]
    exact_generated: list[bool]


@dataclass(frozen=True)
class TimeRow:
    """Times to first token of one document, read in turns with exact: one of each per turn. Those of auto
    include making its plan."""

    text: str
    document: int
    tokens: int
    max_error: float
    exact_plan: bool
    auto_s: list[float]
    exact_s: list[float]

    @property
    def ratio(self) -> float:
        return median(auto / exact for auto, exact in zip(self.auto_s, self.exact_s, strict=True))

    @property
    def largest(self) -> float:
        return max(auto / exact for auto, exact in zip(self.auto_s, self.exact_s, strict=True))


@dataclass
class StudyResults:
    """``models.quality_store.Stored``."""

    settings: dict[str, Any]
    context: dict[str, Any]
    rows: list[AutoRow] = field(default_factory=list)
    facts: list[FactRow] = field(default_factory=list)
    times: list[TimeRow] = field(default_factory=list)

    def has_row(self, document: Document, max_error: float) -> bool:
        return any(_is_of(row, document, max_error) for row in self.rows)

    def has_facts(self, document: Document, max_error: float) -> bool:
        return any(_is_of(row, document, max_error) for row in self.facts)

    def has_time(self, document: Document, max_error: float) -> bool:
        return any(_is_of(row, document, max_error) for row in self.times)


def _is_of(row: AutoRow | FactRow | TimeRow, document: Document, max_error: float) -> bool:
    place = row.text, row.document, row.tokens, row.max_error
    return place == (document.text, document.number, document.tokens, max_error)


def load_study(file: Path) -> StudyResults:
    """ValueError where the file is not one of these."""

    def made(raw: dict[str, Any]) -> StudyResults:
        rows, facts = [AutoRow(**row) for row in raw["rows"]], [FactRow(**row) for row in raw["facts"]]
        times = [TimeRow(**row) for row in raw["times"]]
        return StudyResults(raw["settings"], raw["context"], rows, facts, times)

    return read_stored(file, made)
