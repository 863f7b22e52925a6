"""Tables of a quality run, as markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from models.quality_choice import TIME_BUDGETS, RemainderGain, best_within, remainder_gains
from models.quality_contenders import key_of, setting
from models.quality_error import ErrorRow
from models.quality_perplexity import SKIPPED_TOKENS, PerplexityRow
from models.quality_store import Results

Columns = Sequence[tuple[str, str]]
"""Header and alignment of each column."""

DASH = "–"


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


def short(tokens: int) -> str:
    """A length as file names have it: 4k, 500."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def _head(results: Results) -> str:
    s, c = results.settings, results.context
    chunk = f"chunks of {s['chunk_tokens']} rows" if s["chunk_tokens"] else "one piece"
    least = f", the least of {s['repeat']} calls each" if s["repeat"] > 1 else ""
    return f"""# What each attention costs and loses

`{c["command"]}`,
{c["date"]}, {c["machine"]}.
Written by that command: run it again instead of editing.

Model `{s["model"]}`, text `{s["text"]}`, read in {chunk} over the cached keys, as the
server reads it.

- **error**: |(ô − o) W_O| / |o W_O| over all rows of a layer, o exact's output from the same queries, keys
  and values, along exact's own trajectory; the mean over the measured layers, and the worst of them. It is
  local to a layer and bounds no answer.
- **time**: attention time, selection included, over exact's in the same layers and chunks, run in
  turns{least}.
- **perplexity**: its change against exact with the backend in every layer, on its own trajectory, over all
  tokens after the first {SKIPPED_TOKENS}; ± one standard error of the paired difference. **served** is the
  attention time of that run over exact's, **total** the time of the whole run. A dash: not run at this
  length.
- **dropped**: softmax mass not attended, mean over rows and heads: the backend's own estimate, and the truth
  from the log-sum-exps (not known where left-out keys are put back as means).
- Backends that select by query tile choose for a tile's rows together: a row's choice may depend on rows
  after it, up to the tile's end."""


def _sections(errors: list[ErrorRow], perplexities: list[PerplexityRow]) -> Iterator[str]:
    read = {key_of(row.backend, row.full): row for row in perplexities}
    if errors:
        yield "### The best setting in a given time"
        yield _table(_EQUAL, (_equal_line(b, r, read) for b in TIME_BUDGETS for r in best_within(errors, b)))
    gains = remainder_gains(errors)
    if gains:
        yield "### What `remainder: mean` buys"
        yield (
            "`at equal choice` compares with the same blocks kept and the rest dropped, `at equal time`\n"
            "with the error that `remainder: none` reaches in the time of `mean`, read off between its own\n"
            "settings (a dash beyond them)."
        )
        yield _table(_GAIN, map(_gain_line, gains))
    yield "### Every setting"
    yield _table(_FULL, (_full_line(row, read) for row in errors))
    alone = [row for row in perplexities if key_of(row.backend, row.full) not in _keys(errors)]
    if alone:
        yield _table(_ALONE, map(_alone_line, alone))


def _keys(rows: Sequence[ErrorRow]) -> set[str]:
    return {key_of(row.backend, row.full) for row in rows}


def _table(columns: Columns, lines: Iterator[list[str]]) -> str:
    head = "| " + " | ".join(name for name, _ in columns) + " |\n|" + "|".join(a for _, a in columns) + "|"
    return "\n".join([head, *("| " + " | ".join(cells) + " |" for cells in lines)])


def _columns(text: str, numbers: str) -> Columns:
    left, right = [(name, "---") for name in text.split(", ")], [(n, "--:") for n in numbers.split(", ")]
    return [*left, *right]


_EQUAL = _columns("within, backend, setting", "error, worst layer, perplexity, density, time")
_GAIN = _columns(
    "backend, setting", "time none, time mean, error none, error mean, at equal choice, at equal time"
)
_FULL = _columns(
    "backend, setting",
    "error, worst layer, perplexity, time, selection, served, total, density, computed, "
    "dropped (estimate), dropped (true)",
)
_ALONE = _columns("backend, setting", "perplexity, served, total, density")


def _equal_line(budget: float, row: ErrorRow, read: dict[str, PerplexityRow]) -> list[str]:
    return [
        _percent(budget),
        row.backend,
        setting(row.params),
        _number(row.error),
        _number(row.worst_error),
        _change(read.get(key_of(row.backend, row.full))),
        f"{row.density:.3f}",
        _percent(row.time_share),
    ]


def _gain_line(gain: RemainderGain) -> list[str]:
    none, mean = gain.none, gain.mean
    return [
        none.backend,
        setting(none.params),
        _percent(none.time_share),
        _percent(mean.time_share),
        _number(none.error),
        _number(mean.error),
        _relative(mean.error, none.error),
        _relative(mean.error, gain.at_equal_time),
    ]


def _full_line(row: ErrorRow, read: dict[str, PerplexityRow]) -> list[str]:
    reading = read.get(key_of(row.backend, row.full))
    return [
        row.backend,
        setting(row.params),
        _number(row.error),
        _number(row.worst_error),
        _change(reading),
        _percent(row.time_share),
        _percent(row.selection_s / row.exact_attention_s),
        _percent(reading.time_share) if reading else DASH,
        _percent(reading.total_share) if reading else DASH,
        f"{row.density:.3f}",
        f"{row.density_computed:.3f}",
        _or_dash(row.dropped_estimate, _number),
        _or_dash(row.dropped_true, _number),
    ]


def _alone_line(row: PerplexityRow) -> list[str]:
    shares = [_percent(row.time_share), _percent(row.total_share), f"{row.density:.3f}"]
    return [row.backend, setting(row.params), _change(row), *shares]


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) >= 5e-5 else f"{value:.0e}" if value else "0"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _relative(value: float, base: float | None) -> str:
    return DASH if not base else f"{100 * (value / base - 1):+.0f} %"


def _change(row: PerplexityRow | None) -> str:
    if row is None:
        return DASH
    if row.perplexity == row.exact_perplexity:
        return f"{row.perplexity:.3f}"
    return f"{row.change_percent:+.2f} ± {row.standard_error_percent:.2f} %"


def _or_dash(value: float | None, shown: Callable[[float], str]) -> str:
    return DASH if value is None else shown(value)
