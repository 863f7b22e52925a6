"""The report of a run over long texts, as markdown and plots."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from models.quality_answers import Paired
from models.quality_choice import front_of
from models.quality_contenders import unsuitable
from models.quality_facts import NUM_CANDIDATES
from models.quality_ladders import EXACT
from models.quality_long_rows import LongResults, Summary, mean_change, summaries
from models.quality_perplexity import SKIPPED_TOKENS
from models.quality_plot import Panel, change_axes, time_axis
from models.quality_tables import DASH, Column, named, origin, percent, short, table, told_why


def markdown(results: LongResults, plots: Sequence[str] = ()) -> str:
    """The whole report; ``plots`` are image paths relative to it."""
    parts = [_head(results)]
    for tokens in results.lengths:
        found = summaries(results, tokens)
        parts += [f"## {tokens:,} tokens", _documents(results, tokens)]
        images = [plot for plot in plots if plot.endswith(f"-{short(tokens)}.png")]
        parts += [f"![Perplexity and facts against time at {tokens:,} tokens]({each})" for each in images]
        parts += _sections(found)
    return "\n\n".join(parts) + "\n"


def _head(results: LongResults) -> str:
    s = results.settings
    chunk = f"chunks of {s['chunk_tokens']} rows" if s["chunk_tokens"] else "one piece"
    measured = {row.backend for row in results.rows}
    left_out = {name: why for name, why in unsuitable(causal=True).items() if name not in measured}
    return f"""# Quality on long texts

{origin(s, results.context)}

Model `{s["model"]}`, texts {", ".join(f"`{name}`" for name in s["texts"])}, read in {chunk} over the cached
keys, as a server reads a prompt. Every figure is against exact on the same document in the same run.
{told_why(left_out)}{told_left_out(results.context)}

- **perplexity**: its change with the attention in every layer, on its own trajectory, over the text's tokens
  after the first {SKIPPED_TOKENS}; the mean over documents (of logarithms), and the worst of them.
- **prefill**: time up to the prompt's last logits over exact's, which is read again after every few others:
  the median over documents, and the largest. **attention**: the same of attention alone, selection included.
  One reading of each document: times vary from one to the next, perplexity and density do not.
- **density**: the share of pairs kept, repairs of `auto` included.
- `auto`: a profile's cheapest plan for a `max_error`, with its guard.{told_facts(s["facts"])}"""


def told_facts(facts: int, where: str = "and not counted in the perplexity") -> str:
    """What planted facts are, and how they are counted."""
    if not facts:
        return ""
    return f"""
- **facts**: {facts} sentences such as "The access code of the harbour office in Aarhus is 48213." are
  planted at evenly spaced depths, {where}. Questions ("The access code of the
  harbour office in Aarhus is") are put behind the document and read with *exact* attention over the cached
  keys, whatever read the document. **chosen**: the code is likelier than {NUM_CANDIDATES - 1} others from
  the same document; **generated**: the likeliest token at every place, none of it given wrong. Points are the
  difference to exact's share, p is McNemar's exact test on the questions that only one of both answers, which
  takes the questions of one document for independent."""


def told_left_out(context: dict[str, Any]) -> str:
    noted = context.get("left_out", [])
    return f" Left out: {'; '.join(noted)}." if noted else ""


def _documents(results: LongResults, tokens: int) -> str:
    rows = [row for row in results.rows if row.tokens == tokens]
    found = {(row.text, row.document): row for row in rows}.values()
    told = [f"`{row.text}` {row.document + 1} (exact: {row.exact_perplexity:.2f})" for row in found]
    prompts = sorted({row.prompt_tokens for row in found})
    shorter = [n for n in prompts if n != tokens]
    room = (
        f" They have {shorter[0]:,} tokens: the model's limit leaves a question no more room."
        if shorter
        else ""
    )
    return f"Documents, with exact's perplexity: {', '.join(told)}.{room}"


def _sections(found: Sequence[Summary]) -> Iterator[str]:
    yield table([*named(), *_FIGURES, *(_FACTS if found[0].chosen else [])], found)
    texts = list(dict.fromkeys(row.text for its in found for row in its.rows))
    others = [its for its in found if its.backend != EXACT]
    if len(texts) > 1 and others:
        yield "### Perplexity, text by text"
        yield table([*named(), *(Column(name, _of_text(name)) for name in texts)], others)


def _of_text(name: str) -> Callable[[Summary], str]:
    def cell(its: Summary) -> str:
        rows = [row for row in its.rows if row.text == name]
        if len(rows) == 1 and rows[0].standard_error_percent is not None:
            return f"{rows[0].change_percent:+.2f} ± {rows[0].standard_error_percent:.2f} %"
        return f"{mean_change(rows):+.2f} %" if rows else DASH

    return cell


def points(its: Paired | None) -> str:
    """The difference to exact, with what it rests on."""
    if its is None:
        return DASH
    return f"{its.points:+.1f} (−{its.lost} +{its.won}, p {its.p:.2f})"


def share_of(its: Paired | None) -> str:
    return DASH if its is None else f"{100 * its.share:.1f} %"


_FIGURES: list[Column[Summary]] = [
    Column("documents", lambda its: str(len(its.rows))),
    Column("perplexity", lambda its: f"{its.change_percent:+.2f} %"),
    Column("worst", lambda its: f"{its.worst_percent:+.2f} %"),
    Column("prefill", lambda its: percent(its.prefill_share)),
    Column("largest", lambda its: percent(its.largest_prefill_share)),
    Column("attention", lambda its: percent(its.attention_share)),
    Column("density", lambda its: f"{its.density:.3f}"),
]
_FACTS: list[Column[Summary]] = [
    Column("chosen", lambda its: share_of(its.chosen)),
    Column("points", lambda its: points(its.chosen)),
    Column("generated", lambda its: share_of(its.generated)),
    Column("points", lambda its: points(its.generated)),
]


def panels(results: LongResults, tokens: int) -> list[Panel]:
    """Perplexity, and facts where there are some, against the time of the prompt; what nothing beats in both
    is joined."""
    found = [its for its in summaries(results, tokens) if its.backend != EXACT]
    change = Panel(found, _time, _change, partial(_change_axes, found), "grey: nothing beats it in both")
    asked = [its for its in found if its.chosen is not None]
    return [change, Panel(asked, _time, _points, _fact_axes)]


def _time(its: Summary) -> float:
    return its.prefill_share


def _change(its: Summary) -> float:
    return its.change_percent


def _points(its: Summary) -> float:
    assert its.chosen is not None
    return its.chosen.points


_TIME_TOLD = "time up to the last logits of the prompt, share of exact (median)"


def _change_axes(found: Sequence[Summary], axes: Any) -> None:
    change_axes(axes)
    axes.set_xlabel(_TIME_TOLD)
    front = front_of(found, _time, _change)
    axes.plot([*map(_time, front)], [*map(_change, front)], color="0.7", linewidth=4, zorder=0)


def _fact_axes(axes: Any) -> None:
    time_axis(axes)
    axes.axhline(0.0, color="0.6", linewidth=1)
    axes.set_xlabel(_TIME_TOLD)
    axes.set_ylabel("planted facts: points against exact")
