"""What a run measured: one row per endpoint, model, length class and backend, as a table and as JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

Verdict = Literal["answered", "rejected", "refused", "failed"]
"""answered: complete and checked. rejected: 429 with Retry-After. refused: 413, this choice can never fit the
memory of this server. failed: anything else."""


@dataclass(frozen=True, order=True)
class Key:
    endpoint: str
    model: str
    length: str
    backend: str


@dataclass(frozen=True)
class Outcome:
    """One request: times in milliseconds, ``density`` as the answer reported it."""

    verdict: Verdict
    total_ms: float
    input_tokens: int = 0
    output_tokens: int = 0
    time_to_first_token_ms: float | None = None
    inter_token_ms: tuple[float, ...] = ()
    density: float | None = None
    reason: str = ""


@dataclass
class Row:
    counts: Counter[str] = field(default_factory=Counter)
    answers: list[Outcome] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: Outcome) -> None:
        self.counts[outcome.verdict] += 1
        if outcome.verdict == "answered":
            self.answers.append(outcome)
        elif outcome.verdict != "rejected":
            self.reasons[outcome.reason] += 1


@dataclass(frozen=True)
class Line:
    """A row as it is printed and written. Percentiles are nearest-rank, over answered requests alone."""

    endpoint: str
    model: str
    length: str
    backend: str
    answered: int
    rejected: int
    refused: int
    failed: int
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    itl_p50_ms: float | None
    itl_p99_ms: float | None
    input_tokens_per_s: float
    output_tokens_per_s: float | None
    density_mean: float | None


HEADINGS = {
    "endpoint": "endpoint",
    "model": "model",
    "length": "length",
    "backend": "backend",
    "answered": "count",
    "rejected": "429",
    "refused": "413",
    "failed": "failed",
    "p50_ms": "p50 ms",
    "p95_ms": "p95 ms",
    "p99_ms": "p99 ms",
    "ttft_p50_ms": "TTFT p50",
    "ttft_p99_ms": "TTFT p99",
    "itl_p50_ms": "ITL p50",
    "itl_p99_ms": "ITL p99",
    "input_tokens_per_s": "in tok/s",
    "output_tokens_per_s": "out tok/s",
    "density_mean": "density",
}


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The nearest-rank percentile; None of nothing."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(percent * len(ranked) / 100) - 1)] if ranked else None


class Report:
    def __init__(self, max_unanswered: int = 0) -> None:
        self.rows: dict[Key, Row] = {}
        self.max_unanswered = max_unanswered
        """Requests that may be in flight when the run ends without failing it."""
        self.started = 0
        self.not_sent = 0
        """Arrivals of an open-loop run that found as many requests in flight as the run allows."""

    def add(self, key: Key, outcome: Outcome) -> None:
        self.rows.setdefault(key, Row()).add(outcome)

    def count(self, verdict: Verdict) -> int:
        return sum(row.counts[verdict] for row in self.rows.values())

    @property
    def unanswered(self) -> int:
        """Requests that were still in flight when the run ended."""
        return self.started - sum(row.counts.total() for row in self.rows.values())

    @property
    def passed(self) -> bool:
        """Nothing failed, something was answered, and nothing was left hanging beyond what is allowed."""
        in_time = self.unanswered <= self.max_unanswered
        return in_time and self.count("failed") == 0 and self.count("answered") > 0

    def lines(self, duration_s: float) -> list[Line]:
        return [_line(key, row, duration_s) for key, row in sorted(self.rows.items())]

    def as_json(self, duration_s: float) -> dict[str, Any]:
        return {
            "duration_s": round(duration_s, 3),
            "started": self.started,
            "unanswered": self.unanswered,
            "max_unanswered": self.max_unanswered,
            "not_sent": self.not_sent,
            "passed": self.passed,
            "rows": [asdict(line) for line in self.lines(duration_s)],
            "reasons": {
                _title(key): dict(row.reasons) for key, row in sorted(self.rows.items()) if row.reasons
            },
        }

    def render(self, duration_s: float) -> str:
        lines = [asdict(line) for line in self.lines(duration_s)]
        columns = [name for name in HEADINGS if any(line[name] is not None for line in lines)]
        cells = [[_cell(line[name]) for name in columns] for line in lines]
        table = [[HEADINGS[name] for name in columns], *cells]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        text = [
            "  ".join(
                cell.ljust(width) if place < 4 else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in table
        ]
        return "\n".join(["", *text, "", *self._notes(duration_s)])

    def _notes(self, duration_s: float) -> list[str]:
        answered, rejected, refused, failed = map(self.count, get_args(Verdict))
        notes = [
            f"{self.started} requests in {duration_s:.1f} s: {answered} answered, "
            f"{rejected} rejected (429 with Retry-After), {refused} refused (413, can never fit), "
            f"{failed} failed, {self.unanswered} still in flight at the end"
        ]
        if self.not_sent:
            notes.append(f"{self.not_sent} arrivals were not sent: --max-in-flight was reached")
        for key, row in sorted(self.rows.items()):
            notes += [f"{_title(key)}: {count}x {reason}" for reason, count in row.reasons.most_common(5)]
        if not self.count("answered"):
            notes.append("no request was answered")
        if self.unanswered > self.max_unanswered:
            notes.append(
                f"{self.unanswered} requests got no answer; --max-unanswered allows {self.max_unanswered} "
                "(--stop-timeout gives them longer)"
            )
        return notes


def _line(key: Key, row: Row, duration_s: float) -> Line:
    totals = [answer.total_ms for answer in row.answers]
    first = [each.time_to_first_token_ms for each in row.answers if each.time_to_first_token_ms is not None]
    gaps = [gap for answer in row.answers for gap in answer.inter_token_ms]
    outputs = [answer.output_tokens for answer in row.answers if answer.output_tokens]
    densities = [answer.density for answer in row.answers if answer.density is not None]
    return Line(
        **asdict(key),
        answered=row.counts["answered"],
        rejected=row.counts["rejected"],
        refused=row.counts["refused"],
        failed=row.counts["failed"],
        p50_ms=percentile(totals, 50),
        p95_ms=percentile(totals, 95),
        p99_ms=percentile(totals, 99),
        ttft_p50_ms=percentile(first, 50),
        ttft_p99_ms=percentile(first, 99),
        itl_p50_ms=percentile(gaps, 50),
        itl_p99_ms=percentile(gaps, 99),
        input_tokens_per_s=sum(answer.input_tokens for answer in row.answers) / max(duration_s, 1e-9),
        output_tokens_per_s=sum(outputs) / max(duration_s, 1e-9) if outputs else None,
        density_mean=sum(densities) / len(densities) if densities else None,
    )


def _title(key: Key) -> str:
    return f"{key.endpoint} {key.length} [{key.backend}] {key.model}"


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"
    return str(value)
