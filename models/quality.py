"""What each attention backend costs and loses on a real decoder and a real text.

    python -m models.quality --json quality.json --markdown docs/quality.md --plot docs/quality

Two measurements per contender (a backend at one setting). Error: exact reads the text, the queries, keys and
values of its layers are kept, and every contender runs on them chunk by chunk in turns with exact
(``models.quality_error``). Perplexity: the contender reads the text in every layer, through the served model
(``models.quality_perplexity``). Results are written after every backend and every reading; ``--resume`` goes
on after an interruption. Trust times from an otherwise idle machine only.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from time import perf_counter

from kernels.api import backend_names
from kernels.registry import UnknownBackend
from models.contract import ModelError
from models.errors import NonFiniteOutput
from models.loader import load_model
from models.quality_contenders import (
    EXACT,
    Contender,
    contender,
    default_contenders,
    read_contenders,
    refuse_cut_tiles,
    refuse_unsupported,
)
from models.quality_error import measure_errors
from models.quality_options import context_of, read_options, settings_of
from models.quality_perplexity import Reading, compare, read_text
from models.quality_plot import pyplot, write_plots
from models.quality_record import record_layers
from models.quality_report import markdown
from models.quality_store import Results, begin, open_results, save
from models.runner import Model

LONG_TOKENS = 4096
"""Beyond this many tokens the default run measures every third layer and reads with fewer contenders."""

READINGS_PER_EXACT = 8
"""The exact reading is repeated after so many others: a machine drifts."""


def main(argv: Sequence[str] | None = None) -> int:
    options = read_options(argv)
    try:
        run(options)
    except (ModelError, NonFiniteOutput, UnknownBackend, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    return 0


def run(options: argparse.Namespace) -> None:
    """Measure what is not measured yet, then write tables and plots."""
    if options.plot:
        pyplot()
    contenders, context = _contenders(options), context_of(options)
    refuse_cut_tiles(contenders, options.chunk_tokens)
    results = open_results(options.json, options.resume, settings_of(options), context)
    pending = Pending(options, contenders, results)
    if pending:
        begin(results, context, os.getloadavg()[0])
        began = perf_counter()
        pending.measure(lambda: _load(options, contenders))
        _tell(f"measured in {perf_counter() - began:.0f} s")
    write_report(options, results)


class Pending:
    """What is left to measure."""

    def __init__(self, options: argparse.Namespace, contenders: list[Contender], results: Results) -> None:
        self._options, self._contenders, self._results = options, contenders, results

    def __bool__(self) -> bool:
        return any(self._errors(n) or self._readings(n) for n in self._options.tokens)

    def measure(self, load: Callable[[], tuple[Model, list[int]]]) -> None:
        model, token_ids = load()
        for tokens in self._options.tokens:
            self._measure_errors(model, token_ids[:tokens])
            self._measure_perplexity(model, token_ids[: tokens + 1])

    def _errors(self, tokens: int) -> list[Contender]:
        return [each for each in self._contenders if not self._results.has_error(tokens, each.key)]

    def _readings(self, tokens: int) -> list[Contender]:
        wanted = {"all": True, "none": False}.get(self._options.perplexity)
        by_default = [tokens <= LONG_TOKENS or each.long for each in self._contenders]
        return [
            each
            for each, default in zip(self._contenders, by_default, strict=True)
            if (default if wanted is None else wanted) and not self._results.has_perplexity(tokens, each.key)
        ]

    def _measure_errors(self, model: Model, token_ids: list[int]) -> None:
        left, tokens = self._errors(len(token_ids)), len(token_ids)
        if not left:
            return
        layers = model.info.applied_layers[:: layer_step(self._options.layers, tokens)]
        _tell(f"{tokens} tokens: recording {len(layers)} layers")
        records = record_layers(model._network, token_ids, layers, self._options.chunk_tokens)
        for backend, group in groupby(left, key=lambda each: each.backend):
            rows = measure_errors(
                records,
                list(group),
                chunk_tokens=self._options.chunk_tokens,
                seed=self._options.seed,
                repeat=self._options.repeat,
            )
            self._results.errors += rows
            self._save()
            for row in rows:
                share = f"{100 * row.time_share:.0f} % of exact's {row.exact_attention_s:.1f} s"
                _tell(f"{tokens} tokens: {backend} {row.params}: error {row.error:.4f}, {share}")

    def _measure_perplexity(self, model: Model, token_ids: list[int]) -> None:
        tokens = len(token_ids) - 1
        for number, (each, exact) in enumerate(self._with_exact(model, token_ids), 1):
            reading = exact
            if each.backend != EXACT:
                reading = self._read(model, token_ids, each)
            row = compare(tokens, each, reading, exact)
            self._results.perplexities.append(row)
            self._save()
            _tell(
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

    def _save(self) -> None:
        if self._options.json:
            save(self._results, self._options.json)


def layer_step(asked: int | None, tokens: int) -> int:
    """Every how many of the layers the error is measured."""
    return asked or (1 if tokens <= LONG_TOKENS else 3)


def write_report(options: argparse.Namespace, results: Results) -> None:
    plots = write_plots(results, options.plot) if options.plot else []
    base = options.markdown.parent if options.markdown else Path()
    text = markdown(results, [os.path.relpath(plot, base) for plot in plots])
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")
    else:
        print(text)


def _contenders(options: argparse.Namespace) -> list[Contender]:
    """Sorted by registry order, so that those of one backend are measured together."""
    if options.contenders is None:
        return default_contenders(options.backends)
    order = backend_names().index
    return sorted(read_contenders(options.contenders), key=lambda each: order(each.backend))


def _load(options: argparse.Namespace, contenders: list[Contender]) -> tuple[Model, list[int]]:
    """The model and as many tokens of the text as the longest length needs, and one to predict."""
    model = load_model(options.model, options.model, progress=_tell)
    assert isinstance(model, Model)
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


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
