"""The report and the pictures of an encoder's quality run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from models.quality_contenders import unsuitable
from models.quality_error import ErrorRow
from models.quality_ladders import EXACT
from models.quality_plot import Panel, error_panel, time_axis
from models.quality_retrieval import WITHIN, RetrievalRow
from models.quality_store import Results
from models.quality_tables import (
    Column,
    Extras,
    error_sections,
    joined,
    named,
    origin,
    percent,
    short,
    table,
    told_why,
)
from models.quality_texts import QUERY_WORDS

LEAST_DISTANCE = 1e-6
"""Smaller cosine distances are rounding and would squeeze all others together."""


def markdown(results: Results, plots: Sequence[str] = ()) -> str:
    """The whole report; ``plots`` are image paths relative to it."""
    parts = [_head(results)]
    for tokens in results.lengths:
        errors = [row for row in results.errors if row.tokens == tokens]
        retrievals = [row for row in results.retrievals if row.tokens == tokens]
        images = [plot for plot in plots if plot.endswith(f"-{short(tokens)}.png")]
        parts += [f"## {tokens:,} tokens"]
        parts += [f"![Error and retrieval against time at {tokens:,} tokens]({each})" for each in images]
        parts += _sections(errors, retrievals)
    return "\n\n".join(parts) + "\n"


def _head(results: Results) -> str:
    s = results.settings
    least = f", the least of {s['repeat']} calls each" if s["repeat"] > 1 else ""
    measured = {row.backend for row in results.rows}
    left_out = {name: why for name, why in unsuitable(causal=False).items() if name not in measured}
    return f"""# What each attention costs and loses in an encoder

{origin(s, results.context)}

Model `{s["model"]}`, text `{s["text"]}`, whole documents in both directions.{
        " " + told_why(left_out) if left_out else ""
    }

- **error**: |(ô − o) W_O| / |o W_O| over all rows of a layer, o exact's output from the same queries, keys
  and values, on one document along exact's own trajectory; the mean over the measured layers, and the worst
  of them.
- **time**: attention time, selection included, over exact's in the same layers, run in turns{least}.
- **recall@1**, **MRR@{WITHIN}**: {s["passages"]} passages of {s["retrieval_tokens"]:,} tokens from evenly
  spaced places of the text, encoded with the backend in every layer; {s["queries"]} queries for each,
  encoded with exact: whole sentences of it, {QUERY_WORDS} words or more, that no other passage has. A query's
  passage should come first by cosine. Every recall@1 is a share of {s["passages"] * s["queries"]} queries:
  differences of a few of them say little.
- **cosine**: of a passage's embedding with exact's, mean over the passages, and the **worst** of them: finer
  than ranks.
- **served**: attention time of that run over exact's in turns; **encode** the time of the whole run. A dash:
  not run.
- **the best setting in a given time** is picked after the fact, by the same figures that it is shown with: a
  backend with more **settings tried** has more chances, by noise in the times as well.
- **density**: the share of pairs kept exactly; what features or landmarks estimate is not in it.
- **dropped**: softmax mass not attended, mean over rows and heads: the backend's own estimate, and the truth
  from the log-sum-exps (not known where left-out keys are put back or estimated). **attention
  recall** is the rest of the truth: exact's softmax mass on the keys that were kept."""


def _sections(errors: list[ErrorRow], retrievals: list[RetrievalRow]) -> Iterator[str]:
    if retrievals:
        yield "### Retrieval"
        yield table([*named(), *_RETRIEVAL], sorted(retrievals, key=_by_cosine))
    columns = joined(_RETRIEVAL, retrievals)
    headline = [column for column in columns if column.name in ("recall@1", "cosine")]
    yield from error_sections(errors, Extras(headline, columns))


def _by_cosine(row: RetrievalRow) -> tuple[bool, float]:
    return row.backend != EXACT, -row.cosine


_RETRIEVAL: list[Column[RetrievalRow]] = [
    Column("recall@1", lambda row: f"{row.recall_at_1:.3f}"),
    Column(f"MRR@{WITHIN}", lambda row: f"{row.mrr_at_10:.3f}"),
    Column("cosine", lambda row: f"{row.cosine:.4f}"),
    Column("worst", lambda row: f"{row.worst_cosine:.4f}"),
    Column("served", lambda row: percent(row.attention_share)),
    Column("encode", lambda row: percent(row.encode_share)),
]


def encoder_panels(results: Results, tokens: int) -> list[Panel]:
    rows = [row for row in results.retrievals if row.tokens == tokens]
    exact = next((row.recall_at_1 for row in rows if row.backend == EXACT), None)

    def recall_axes(axes: Any) -> None:
        _encode_axis(axes)
        axes.set_ylabel("recall@1" + (" (line: exact)" if exact is not None else ""))
        if exact is not None:
            axes.axhline(exact, color="0.6", linewidth=1)

    return [
        error_panel(results, tokens),
        Panel(rows, _encode_share, lambda row: max(1 - row.cosine, LEAST_DISTANCE), _cosine_axes),
        Panel(rows, _encode_share, lambda row: float(row.recall_at_1), recall_axes),
    ]


def _encode_share(row: RetrievalRow) -> float:
    return row.encode_share


def _encode_axis(axes: Any) -> None:
    time_axis(axes)
    axes.set_xlabel("encoding time, share of exact")


def _cosine_axes(axes: Any) -> None:
    _encode_axis(axes)
    axes.set_yscale("log")
    axes.set_ylabel("1 - cosine to exact's embedding, mean over passages")
