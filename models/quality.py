"""What each attention backend costs and loses on a real decoder and a real text.

    python -m models.quality --json quality.json --markdown docs/quality.md --plot docs/quality

Two measurements per contender (a backend at one setting). Error: exact reads the text, the queries, keys and
values of its layers are kept, and every contender runs on them chunk by chunk in turns with exact
(``models.quality_error``). Perplexity: the contender reads the text in every layer, through the served model
(``models.quality_perplexity``). Results are written after every backend and every reading; ``--resume`` goes
on after an interruption, and adds other ``--backends`` to what is there. Trust times from an otherwise idle
machine only. Encoders have ``models.quality_encoder``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter

from models.contract import ModelError
from models.loader import load_model
from models.quality_contenders import (
    Contender,
    contender,
    contenders_of,
    refuse_cut_tiles,
    refuse_unsupported,
)
from models.quality_ladders import DECODER, EXACT
from models.quality_options import context_of, read_options, settings_of
from models.quality_perplexity import Reading, compare, read_text
from models.quality_plot import decoder_panels, pyplot
from models.quality_report import markdown
from models.quality_run import Pending, guarded, tell, write_report
from models.quality_store import Results, begin, open_results
from models.runner import Model

LONG_TOKENS = 4096
"""Beyond this many tokens the default run measures every third layer and reads with fewer contenders."""

READINGS_PER_EXACT = 8
"""The exact reading is repeated after so many others: a machine drifts."""


def main(argv: Sequence[str] | None = None) -> int:
    return guarded(run, read_options(argv))


def run(options: argparse.Namespace) -> None:
    """Measure what is not measured yet, then write tables and plots."""
    if options.plot:
        pyplot()
    contenders = contenders_of(DECODER, True, options.backends, options.contenders)
    context = context_of(options)
    refuse_cut_tiles(contenders, options.chunk_tokens)
    results = open_results(options.json, options.resume, settings_of(options), context)
    pending = PendingReadings(options, contenders, results)
    if pending:
        begin(results, context, os.getloadavg()[0])
        began = perf_counter()
        pending.measure(lambda: _load(options, contenders))
        tell(f"measured in {perf_counter() - began:.0f} s")
    write_report(options, results, markdown, decoder_panels)


class PendingReadings(Pending):
    """Errors and readings that are left."""

    def __init__(self, options: argparse.Namespace, contenders: list[Contender], results: Results) -> None:
        super().__init__(options, contenders, results, LONG_TOKENS, options.chunk_tokens)

    def __bool__(self) -> bool:
        return any(self.errors_left(n) or self._readings(n) for n in self._options.tokens)

    def measure(self, load: Callable[[], tuple[Model, list[int]]]) -> None:
        model, token_ids = load()
        for tokens in self._options.tokens:
            self.measure_errors(model, token_ids[:tokens])
            self._measure_perplexity(model, token_ids[: tokens + 1])

    def _readings(self, tokens: int) -> list[Contender]:
        wanted = {"all": True, "none": False}.get(self._options.perplexity)
        by_default = [tokens <= LONG_TOKENS or each.chosen for each in self._contenders]
        return [
            each
            for each, default in zip(self._contenders, by_default, strict=True)
            if (default if wanted is None else wanted) and not self._results.has_perplexity(tokens, each.key)
        ]

    def _measure_perplexity(self, model: Model, token_ids: list[int]) -> None:
        tokens = len(token_ids) - 1
        for number, (each, exact) in enumerate(self._with_exact(model, token_ids), 1):
            reading = exact
            if each.backend != EXACT:
                reading = self._read(model, token_ids, each)
            row = compare(tokens, each, reading, exact)
            self._results.perplexities.append(row)
            self.save()
            tell(
                f"{tokens} tokens: {number}. {each.label}: perplexity {row.perplexity:.3f} "
                f"({row.change_percent:+.2f} %), {row.total_s:.1f} s"
            )

    def _with_exact(self, model: Model, token_ids: list[int]) -> Iterator[tuple[Contender, Reading]]:
        """Each contender still to read, with the latest exact reading."""
        exact: Reading | None = None
        for number, each in enumerate(self._readings(len(token_ids) - 1)):
            if exact is None or number % READINGS_PER_EXACT == 0:
                exact = self._read(model, token_ids, contender(EXACT, {}))
            yield each, exact

    def _read(self, model: Model, token_ids: list[int], each: Contender) -> Reading:
        return read_text(model, token_ids, each.choice(self._options.seed), self._options.chunk_tokens)


def _load(options: argparse.Namespace, contenders: list[Contender]) -> tuple[Model, list[int]]:
    """The model and as many tokens of the text as the longest length needs, and one to predict."""
    model = load_model(options.model, options.model, progress=tell)
    assert isinstance(model, Model)
    if not model.info.causal:
        raise ModelError(
            f"{options.model!r} reads in both directions: measure it with python -m models.quality_encoder"
        )
    refuse_unsupported(model, contenders)
    token_ids = model.tokenizer.encode(options.text.read_text(encoding="utf-8")).token_ids
    longest = max(options.tokens)
    if longest > model.info.max_tokens:
        raise ModelError(f"--tokens {longest}: {options.model!r} reads {model.info.max_tokens} at most")
    if longest + 1 > len(token_ids):
        raise ModelError(
            f"--tokens {longest}: {options.text.name} has {len(token_ids)} tokens, of which the last is only "
            "predicted; give a longer --text"
        )
    return model, token_ids


if __name__ == "__main__":
    sys.exit(main())
