"""What each attention, and ``auto``, loses and saves on real long texts.

    longreach bench quality --json long.json --markdown docs/quality-long.md --plot docs/quality-long

Every contender reads every document in every layer, as a server reads a prompt: perplexity, the time of the
prompt, and questions about planted facts, each against exact on the same document in the same run. Results
are written after every reading; ``--resume`` goes on after an interruption, and adds other contenders,
lengths and budgets to what is there. Trust times from an otherwise idle machine only.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from models.calibrate import Source
from models.contract import ModelError
from models.loader import load_model
from models.planned import exact
from models.profile import Profile
from models.quality_auto import (
    BUDGETS,
    auto_contender,
    budget,
    choice_of,
    profile_of,
    refuse_cut_chunks,
)
from models.quality_contenders import Contender, contenders_of, refuse_cut_tiles, refuse_unsupported
from models.quality_facts import NUM_CANDIDATES, Document, documents_of, sources_of
from models.quality_ladders import EXACT, LONG
from models.quality_long_report import markdown, panels
from models.quality_long_rows import LongResults, LongRow, lengths_within, load_long, row_of
from models.quality_options import (
    add_contenders,
    add_outputs,
    context_of,
    natural,
    parsed,
    positive,
)
from models.quality_plot import pyplot
from models.quality_prompt import Outcome, PromptReading, change, read_document, timed
from models.quality_run import guarded, tell, write_report
from models.quality_store import add_texts, begin, open_stored, save
from models.runner import Model

LENGTHS = (4096, 8192, 16384, 32768)


def main(argv: Sequence[str] | None = None) -> int:
    return guarded(run, read_options(argv))


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    told = "What each attention, and auto, loses and saves on real long texts."
    parser = argparse.ArgumentParser("longreach bench quality", description=told)
    add = parser.add_argument
    add_documents(parser, LENGTHS)
    add_contenders(parser)
    add("--turns", type=positive, default=4, metavar="N", help="exact is read again after so many others (4)")
    add_outputs(parser)
    return parsed(parser, argv)


def add_documents(parser: argparse.ArgumentParser, lengths: Sequence[int]) -> None:
    """The options that say what is read, and by which plans."""
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="decoder: demo model, directory, hub id or GGUF file")
    add(
        "--texts",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="plain texts; default: those in samples/ and a novel, fetched with npm",
    )
    shown = " ".join(map(str, lengths))
    add("--tokens", type=positive, nargs="+", default=[*lengths], metavar="N", help=f"lengths ({shown})")
    add("--documents", type=positive, default=1, metavar="N", help="per text and length (1)")
    add("--facts", type=facts, default=NUM_CANDIDATES, metavar="N", help="planted in each document, or 0 (8)")
    add(
        "--budgets",
        type=budget,
        nargs="*",
        default=[*BUDGETS],
        metavar="E",
        help="max_error of auto (0.05 0.1 0.2)",
    )
    add("--profile", type=Path, metavar="FILE", help="that auto plans with; default: the model's own")
    add("--chunk-tokens", type=natural, default=512, metavar="N", help="rows per step; 0: all at once")
    add("--seed", type=natural, default=0)


def facts(text: str) -> int:
    """An option's value: 0, or enough facts for each to have its wrong candidates."""
    value = int(text)
    if value and not NUM_CANDIDATES <= value <= 64:
        raise argparse.ArgumentTypeError(f"must be 0 or {NUM_CANDIDATES} to 64, got {value}")
    return value


def run(options: argparse.Namespace) -> None:
    """Measure what is not measured yet, then write tables and plots."""
    if options.plot:
        pyplot()
    contenders = contenders_of(LONG, True, options.backends, options.contenders)
    refuse_cut_tiles(contenders, options.chunk_tokens)
    sources = sources_of(options.texts, tell)
    context = context_of(options)
    fresh = LongResults(settings_of(options, sources), context)
    results = open_stored(options.json, options.resume, fresh, partial(_load, settings=fresh.settings))
    model = load_decoder(options.model)
    refuse_unsupported(model, contenders)
    profile = profile_of(model, options.profile, tell) if options.budgets else None
    if profile is not None:
        contenders += [auto_contender(each, profile) for each in options.budgets]
    began = perf_counter()
    Readings(options, contenders, results, model, profile, context).read(sources)
    tell(f"measured in {perf_counter() - began:.0f} s")
    write_report(options, results, markdown, panels)


def _load(file: Path, settings: dict[str, Any]) -> LongResults:
    found = load_long(file)
    add_texts(found.settings, settings)
    return found


def settings_of(options: argparse.Namespace, sources: Sequence[Source]) -> dict[str, Any]:
    """What must not differ between the rows of one file."""
    return {
        "model": options.model,
        "texts": {source.name: hashlib.sha256(source.text.encode()).hexdigest() for source in sources},
        "documents": options.documents,
        "facts": options.facts,
        "chunk_tokens": options.chunk_tokens,
        "seed": options.seed,
    }


def load_decoder(name: str) -> Model:
    model = load_model(name, name, progress=tell)
    assert isinstance(model, Model)
    if "generate" not in model.info.tasks:
        raise ModelError(f"{name!r} predicts no tokens: give a decoder with a language-model head")
    return model


class Readings:
    """What is left to read, and its results."""

    def __init__(
        self,
        options: argparse.Namespace,
        contenders: Sequence[Contender],
        results: LongResults,
        model: Model,
        profile: Profile | None,
        context: dict[str, Any],
    ) -> None:
        self._options, self._contenders, self._results = options, contenders, results
        self._model, self._profile, self._context = model, profile, context
        self._begun = False

    def read(self, sources: Sequence[Source]) -> None:
        lengths = lengths_within(self._model.info.max_tokens, self._options.tokens, self._leave_out)
        documents = [document for tokens in lengths for document in self._documents(sources, tokens)]
        if not documents:
            raise ModelError("no text has room for a document: give longer --texts or shorter --tokens")
        for document in documents:
            self._refuse_cut_plans(document)
        shortest = min([*lengths, *self._results.lengths])
        for document in documents:
            left = [
                each
                for each in self._contenders
                if (document.tokens == shortest or not each.brief)
                and not self._results.has(document, each.key)
            ]
            if left:
                self._read(document, left)

    def _documents(self, sources: Sequence[Source], tokens: int) -> list[Document]:
        o = self._options
        return documents_of(self._model, sources, tokens, o.documents, o.facts, o.seed, self._leave_out)

    def _leave_out(self, told: str) -> None:
        """What was asked for and is not read, and why."""
        tell(f"left out: {told}")
        noted = self._results.context.setdefault("left_out", [])
        if told not in noted:
            noted.append(told)

    def _refuse_cut_plans(self, document: Document) -> None:
        choices = [self._choice(each, document) for each in self._contenders]
        refuse_cut_chunks(choices, self._options.chunk_tokens)

    def _choice(self, each: Contender, document: Document) -> Any:
        return choice_of(each, self._profile, document.prompt_tokens, self._options.seed)

    def _read(self, document: Document, left: Sequence[Contender]) -> None:
        if not self._begun:
            begin(self._results, self._context, os.getloadavg()[0])
            self._begun = True
        read = partial(read_document, self._model, document, chunk_tokens=self._options.chunk_tokens)
        exact_outcome = read(exact())
        exact_time = exact_outcome.reading
        for number, each in enumerate(left):
            if number and number % self._options.turns == 0:
                chunk_tokens = self._options.chunk_tokens
                exact_time = timed(self._model, document.token_ids, exact(), chunk_tokens, scored=True)
            its = exact_outcome if each.backend == EXACT else read(self._choice(each, document))
            time = exact_time if each.backend == EXACT else its.reading
            self._keep(document, each, its, exact_outcome, time, exact_time)

    def _keep(
        self,
        document: Document,
        each: Contender,
        its: Outcome,
        exact_outcome: Outcome,
        time: PromptReading,
        exact_time: PromptReading,
    ) -> None:
        changed = change(document, its.reading, exact_outcome.reading)
        row = row_of(document, each, changed, time, exact_time, its.answers, exact_outcome.answers)
        self._results.rows.append(row)
        if self._options.json:
            save(self._results, self._options.json)
        _tell(document, each, row)


def _tell(document: Document, each: Contender, row: LongRow) -> None:
    share = 100 * row.prefill_s / row.exact_prefill_s
    answered = f", {sum(row.chosen)} of {len(row.chosen)} facts" if row.chosen else ""
    tell(
        f"{document.told}: {each.label}: perplexity {row.perplexity:.3f} ({row.change_percent:+.2f} %), "
        f"{share:.0f} % of exact's {row.exact_prefill_s:.1f} s{answered}"
    )


if __name__ == "__main__":
    sys.exit(main())
