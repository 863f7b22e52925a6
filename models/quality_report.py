"""The report of a decoder's quality run, as markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from models.quality_contenders import unsuitable
from models.quality_error import ErrorRow
from models.quality_perplexity import BLOCK_TOKENS, SKIPPED_TOKENS, PerplexityRow
from models.quality_store import Results
from models.quality_tables import (
    Column,
    Extras,
    error_sections,
    joined,
    key_of_row,
    named,
    origin,
    percent,
    short,
    table,
    told_why,
)


def markdown(results: Results, plots: Sequence[str] = ()) -> str:
    """The whole report; ``plots`` are image paths relative to it."""
    parts = [_head(results)]
    for tokens in results.lengths:
        errors = [row for row in results.errors if row.tokens == tokens]
        perplexities = [row for row in results.perplexities if row.tokens == tokens]
        images = [plot for plot in plots if plot.endswith(f"-{short(tokens)}.png")]
        parts += [f"## {tokens:,} tokens"]
        parts += [f"![Error and perplexity against time at {tokens:,} tokens]({each})" for each in images]
        parts += _sections(errors, perplexities)
    return "\n\n".join(parts) + "\n"


def _head(results: Results) -> str:
    s = results.settings
    chunk = f"chunks of {s['chunk_tokens']} rows" if s["chunk_tokens"] else "one piece"
    least = f", the least of {s['repeat']} calls each" if s["repeat"] > 1 else ""
    measured = {row.backend for row in results.rows}
    left_out = {name: why for name, why in unsuitable(causal=True).items() if name not in measured}
    return f"""# What each attention costs and loses

{origin(s, results.context)}

Model `{s["model"]}`, text `{s["text"]}`, read in {chunk} over the cached keys, as the
server reads it.{" " + told_why(left_out) if left_out else ""}

- **error**: |(ô − o) W_O| / |o W_O| over all rows of a layer, o exact's output from the same queries, keys
  and values, along exact's own trajectory; the mean over the measured layers, and the worst of them. It is
  local to a layer and bounds no answer.
- **time**: attention time, selection included, over exact's in the same layers and chunks, run in
  turns{least}.
- **perplexity**: its change against exact with the backend in every layer, on its own trajectory, over all
  tokens after the first {SKIPPED_TOKENS}; ± one standard error of the paired difference, taking blocks of
  {BLOCK_TOKENS} tokens for independent (what hangs together over longer stretches makes it larger).
  **served** is the attention time of that run over exact's, **total** the time of the whole run: single
  readings, each against the nearest exact reading before it, and noisier than **time**. A dash: not run at
  this length.
- **the best setting in a given time** is picked after the fact, by the same figures that it is shown with: a
  backend with more **settings tried** has more chances, by noise in the times as well.
- **density**: the share of pairs kept exactly; what features estimate is not in it.
- **dropped**: softmax mass not attended, mean over rows and heads: the backend's own estimate, and the truth
  from the log-sum-exps (not known where left-out keys are put back or estimated). **attention
  recall** is the rest of the truth: exact's softmax mass on the keys that were kept.
- Backends that select by query tile choose for a tile's rows together: a row's choice may depend on rows
  after it, up to the tile's end."""


def _sections(errors: list[ErrorRow], perplexities: list[PerplexityRow]) -> Iterator[str]:
    yield from error_sections(errors, _extras(perplexities))
    shown = {key_of_row(row) for row in errors}
    alone = [row for row in perplexities if key_of_row(row) not in shown]
    if alone:
        yield table([*named(), *_PERPLEXITY, _DENSITY], alone)


def _extras(perplexities: Sequence[PerplexityRow]) -> Extras:
    full = joined(_PERPLEXITY, perplexities)
    return Extras(headline=full[:1], full=full)


def change(row: PerplexityRow) -> str:
    if row.perplexity == row.exact_perplexity:
        return f"{row.perplexity:.3f}"
    if row.standard_error_percent is None:
        return f"{row.change_percent:+.2f} %"
    return f"{row.change_percent:+.2f} ± {row.standard_error_percent:.2f} %"


_PERPLEXITY: list[Column[PerplexityRow]] = [
    Column("perplexity", change),
    Column("served", lambda row: percent(row.time_share)),
    Column("total", lambda row: percent(row.total_share)),
]
_DENSITY: Column[PerplexityRow] = Column("density", lambda row: f"{row.density:.3f}")
