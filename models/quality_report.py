"""Tables of a quality run, as markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from models.quality_choice import TIME_BUDGETS, RemainderGain, Variant, best_within, remainder_gains
from models.quality_contenders import key_of, setting
from models.quality_error import ErrorRow
from models.quality_perplexity import BLOCK_TOKENS, SKIPPED_TOKENS, PerplexityRow
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
    loads = ", ".join(f"{load:.2f}" for load in c["loads_at_start"])
    return f"""# What each attention costs and loses

`{c["command"]}`,
{c["date"]}, {c["processor"]}, {c["threads"]} threads, torch {c["torch"]}.
Load of the machine when measuring began: {loads}. Above 0.5 or so others ran beside it, and times are worth
less. Written by the command above: run it again instead of editing.

Model `{s["model"]}`, text `{s["text"]}`, read in {chunk} over the cached keys, as the
server reads it.

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
- **dropped**: softmax mass not attended, mean over rows and heads: the backend's own estimate, and the truth
  from the log-sum-exps (not known where left-out keys are put back).
- Backends that select by query tile choose for a tile's rows together: a row's choice may depend on rows
  after it, up to the tile's end."""


def _sections(errors: list[ErrorRow], perplexities: list[PerplexityRow]) -> Iterator[str]:
    read = {key_of(row.backend, row.full): row for row in perplexities}
    tried = Counter(row.backend for row in errors)
    best = [(budget, row) for budget in TIME_BUDGETS for row in best_within(errors, budget)]
    if best:
        yield "### The best setting in a given time"
        yield _table(_EQUAL, (_equal_line(b, row, tried[row.backend], read) for b, row in best))
    gains = remainder_gains(errors)
    if gains:
        yield "### What the remainder buys at equal time"
        yield (
            "Left-out blocks put back as their means (`mean`), or as far as means would have predicted the\n"
            "chosen ones (`gated`). Each shows its time, its error, and the change of the error `at equal\n"
            "choice` (same blocks kept, the rest dropped) and `at equal time`: against the error that\n"
            "`remainder: none` reaches in that time, read off between its own settings (a dash beyond\n"
            "them). Below 0 the remainder is better."
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


_EQUAL = _columns("within, backend, setting", "settings tried, error, worst layer, perplexity, density, time")
_GAIN = _columns(
    "backend, setting",
    "none: time, none: error, mean: time, mean: error, mean: at equal choice, mean: at equal time, "
    "gated: time, gated: error, gated: at equal choice, gated: at equal time",
)
_FULL = _columns(
    "backend, setting",
    "error, worst layer, perplexity, time, selection, served, total, density, computed, "
    "dropped (estimate), dropped (true)",
)
_ALONE = _columns("backend, setting", "perplexity, served, total, density")


def _equal_line(budget: float, row: ErrorRow, tried: int, read: dict[str, PerplexityRow]) -> list[str]:
    return [
        _percent(budget),
        row.backend,
        setting(row.params),
        str(tried),
        _number(row.error),
        _number(row.worst_error),
        _change(read.get(key_of(row.backend, row.full))),
        f"{row.density:.3f}",
        _percent(row.time_share),
    ]


def _gain_line(gain: RemainderGain) -> list[str]:
    none = gain.none
    own = [_percent(none.time_share), _number(none.error)]
    twins = [cell for each in (gain.mean, gain.gated) for cell in _variant_cells(each, none)]
    return [none.backend, setting(none.params), *own, *twins]


def _variant_cells(variant: Variant | None, none: ErrorRow) -> list[str]:
    if variant is None:
        return [DASH] * 4
    row = variant.row
    changes = [_relative(row.error, none.error), _relative(row.error, variant.at_equal_time)]
    return [_percent(row.time_share), _number(row.error), *changes]


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
    if row.standard_error_percent is None:
        return f"{row.change_percent:+.2f} %"
    return f"{row.change_percent:+.2f} ± {row.standard_error_percent:.2f} %"


def _or_dash(value: float | None, shown: Callable[[float], str]) -> str:
    return DASH if value is None else shown(value)
