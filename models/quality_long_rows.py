"""Results of reading long texts: one row per document and contender, and what a contender's rows say."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean, median
from typing import Any, TypeVar

from models.contract import ModelError
from models.quality_answers import Answers, Paired, paired
from models.quality_contenders import Contender, key_of
from models.quality_facts import Document
from models.quality_perplexity import Change
from models.quality_prompt import PromptReading

R = TypeVar("R")


@dataclass(frozen=True)
class LongRow:
    """One contender on one document, against exact on the same one. ``prefill_s`` up to the last logits,
    ``exact_prefill_s`` of the latest exact reading before it. Answers by fact."""

    text: str
    document: int
    tokens: int
    prompt_tokens: int
    backend: str
    params: dict[str, Any]
    full: dict[str, Any]
    perplexity: float
    exact_perplexity: float
    change_percent: float
    standard_error_percent: float | None
    prefill_s: float
    exact_prefill_s: float
    attention_s: float
    exact_attention_s: float
    density: float
    chosen: list[bool]
    exact_chosen: list[bool]
    generated: list[bool]
    exact_generated: list[bool]

    @property
    def key(self) -> str:
        return key_of(self.backend, self.full)


def row_of(
    document: Document,
    its: Contender,
    change: Change,
    reading: PromptReading,
    exact: PromptReading,
    answers: Answers,
    exact_answers: Answers,
) -> LongRow:
    return LongRow(
        text=document.text,
        document=document.number,
        tokens=document.tokens,
        prompt_tokens=document.prompt_tokens,
        backend=its.backend,
        params=its.params,
        full=its.full,
        perplexity=change.perplexity,
        exact_perplexity=change.exact_perplexity,
        change_percent=change.percent,
        standard_error_percent=change.standard_error_percent,
        prefill_s=reading.seconds,
        exact_prefill_s=exact.seconds,
        attention_s=reading.work.attention_ms / 1e3,
        exact_attention_s=exact.work.attention_ms / 1e3,
        density=reading.work.pairs_kept / reading.work.pairs_exact,
        chosen=answers.chosen,
        exact_chosen=exact_answers.chosen,
        generated=answers.generated,
        exact_generated=exact_answers.generated,
    )


@dataclass
class LongResults:
    """``models.quality_store.Stored``."""

    settings: dict[str, Any]
    context: dict[str, Any]
    rows: list[LongRow] = field(default_factory=list)

    @property
    def lengths(self) -> list[int]:
        return sorted({row.tokens for row in self.rows})

    def has(self, document: Document, key: str) -> bool:
        place = document.text, document.number, document.tokens
        return any((row.text, row.document, row.tokens) == place and row.key == key for row in self.rows)


def load_long(file: Path) -> LongResults:
    """ValueError where the file is not one of these."""
    return read_stored(
        file,
        lambda raw: LongResults(raw["settings"], raw["context"], [LongRow(**row) for row in raw["rows"]]),
    )


def read_stored(file: Path, made: Callable[[dict[str, Any]], R]) -> R:
    try:
        return made(json.loads(file.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} holds no results of this command: {error!r}") from None


@dataclass(frozen=True)
class Summary:
    """One contender at one length, over its documents."""

    rows: tuple[LongRow, ...]

    @property
    def backend(self) -> str:
        return self.rows[0].backend

    @property
    def params(self) -> dict[str, Any]:
        return self.rows[0].params

    @property
    def full(self) -> dict[str, Any]:
        return self.rows[0].full

    @property
    def change_percent(self) -> float:
        return mean_change(self.rows)

    @property
    def worst_percent(self) -> float:
        return max(row.change_percent for row in self.rows)

    @property
    def prefill_share(self) -> float:
        return median(row.prefill_s / row.exact_prefill_s for row in self.rows)

    @property
    def largest_prefill_share(self) -> float:
        return max(row.prefill_s / row.exact_prefill_s for row in self.rows)

    @property
    def attention_share(self) -> float:
        return median(row.attention_s / row.exact_attention_s for row in self.rows)

    @property
    def density(self) -> float:
        return fmean(row.density for row in self.rows)

    @cached_property
    def chosen(self) -> Paired | None:
        return paired(_all(self.rows, "chosen"), _all(self.rows, "exact_chosen"))

    @cached_property
    def generated(self) -> Paired | None:
        return paired(_all(self.rows, "generated"), _all(self.rows, "exact_generated"))


def mean_change(rows: Sequence[LongRow]) -> float:
    """Of the logarithms of the perplexities, in percent of the perplexity."""
    return 100 * math.expm1(fmean(math.log1p(row.change_percent / 100) for row in rows))


def _all(rows: Sequence[LongRow], name: str) -> list[bool]:
    return [right for row in rows for right in getattr(row, name)]


def summaries(results: LongResults, tokens: int) -> list[Summary]:
    """By contender, in the order in which they were first measured."""
    groups: dict[str, list[LongRow]] = {}
    for row in results.rows:
        if row.tokens == tokens:
            groups.setdefault(row.key, []).append(row)
    return [Summary(tuple(group)) for group in groups.values()]


def lengths_within(max_tokens: int, asked: Sequence[int], left_out: Callable[[str], object]) -> list[int]:
    """The lengths that a model reads, ascending. ModelError where it reads none of them."""
    found = sorted({tokens for tokens in asked if tokens <= max_tokens})
    beyond = sorted(set(asked) - set(found))
    if not found:
        raise ModelError(f"--tokens {min(asked)}: the model reads {max_tokens} at most")
    if beyond:
        left_out(f"{', '.join(map(str, beyond))} tokens: the model reads {max_tokens}")
    return found
