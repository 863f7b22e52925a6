"""What the quality runs of decoders and encoders have in common: errors first, then the dear measurement."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

from kernels.registry import UnknownBackend
from models.contract import ModelError
from models.errors import NonFiniteOutput
from models.quality_contenders import Contender
from models.quality_error import ErrorRow, measure_errors
from models.quality_plot import P, Panel, write_plots
from models.quality_record import record_layers
from models.quality_store import Results, save
from models.runner import Model


def guarded(run: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> int:
    """A run whose refusals end the program with their sentence."""
    try:
        run(options)
    except (ModelError, NonFiniteOutput, UnknownBackend, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    return 0


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def layer_step(asked: int | None, tokens: int, usual_tokens: int) -> int:
    """Every how many of the layers the error is measured."""
    return asked or (1 if tokens <= usual_tokens else 3)


class Pending:
    """What is left to measure: errors here, and what a subclass adds.

    Beyond ``usual_tokens`` the default run measures every third layer, and no ``brief`` contenders.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        contenders: Sequence[Contender],
        results: Results,
        usual_tokens: int,
        chunk_tokens: int,
    ) -> None:
        self._options, self._contenders, self._results = options, contenders, results
        self._usual_tokens, self._chunk_tokens = usual_tokens, chunk_tokens

    def errors_left(self, tokens: int) -> list[Contender]:
        return [
            each
            for each in self._contenders
            if (tokens <= self._usual_tokens or not each.brief)
            and not self._results.has_error(tokens, each.key)
        ]

    def measure_errors(self, model: Model, token_ids: list[int]) -> None:
        left, tokens = self.errors_left(len(token_ids)), len(token_ids)
        if not left:
            return
        layers = model.info.applied_layers[:: layer_step(self._options.layers, tokens, self._usual_tokens)]
        tell(f"{tokens} tokens: recording {len(layers)} layers")
        records = record_layers(model._network, token_ids, layers, self._chunk_tokens)
        for _, group in groupby(left, key=lambda each: each.backend):
            rows = measure_errors(
                records,
                list(group),
                chunk_tokens=self._chunk_tokens,
                seed=self._options.seed,
                repeat=self._options.repeat,
            )
            self._results.errors += rows
            self.save()
            for row in rows:
                _tell_error(row)

    def save(self) -> None:
        if self._options.json:
            save(self._results, self._options.json)


def _tell_error(row: ErrorRow) -> None:
    share = f"{100 * row.time_share:.0f} % of exact's {row.exact_attention_s:.1f} s"
    tell(f"{row.tokens} tokens: {row.backend} {row.params}: error {row.error:.4f}, {share}")


def write_report(
    options: argparse.Namespace,
    results: P,
    markdown: Callable[[P, Sequence[str]], str],
    panels_of: Callable[[P, int], list[Panel]],
) -> None:
    plots = write_plots(results, options.plot, panels_of) if options.plot else []
    base = options.markdown.parent if options.markdown else Path()
    write_page(options, markdown(results, [os.path.relpath(plot, base) for plot in plots]))


def write_page(options: argparse.Namespace, text: str) -> None:
    """To --markdown, or the screen."""
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")
    else:
        print(text)
