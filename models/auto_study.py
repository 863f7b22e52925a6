"""Does ``auto`` keep its budget, and what does it save? Every row of every layer is computed exactly too.

    python -m models.auto_study --texts my-texts/*.txt --json auto.json --markdown docs/auto-study.md

For every document and budget: the error of each layer over all rows, on the trajectory of auto itself; the
perplexity against exact's; what the guard estimated and repaired. Then answers about facts planted in the
same documents, read once more, and times to first token, in turns with exact. Results are written as they
come; ``--resume`` goes on, and adds lengths and budgets, and times (``--repeat``) that were left for an idle
machine.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from models.auto_study_read import ask_document, study_document, time_document
from models.auto_study_report import markdown
from models.auto_study_rows import AutoRow, StudyResults, TimeRow, load_study
from models.calibrate import Source
from models.contract import ModelError
from models.planned import exact
from models.profile import Profile
from models.quality_auto import planned_choice, profile_id, profile_of, refuse_cut_chunks
from models.quality_facts import Document, documents_of, sources_of
from models.quality_long import add_documents, load_decoder, settings_of
from models.quality_long_rows import lengths_within
from models.quality_options import add_outputs, context_of, natural, parsed
from models.quality_prompt import read_document
from models.quality_run import guarded, tell, write_page
from models.quality_store import add_texts, begin, open_stored, save
from models.runner import Model

LENGTHS = (512, 1024, 2048, 4096, 8192)


def main(argv: Sequence[str] | None = None) -> int:
    return guarded(run, read_options(argv))


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    told = "Does auto keep its budget, and what does it save?"
    parser = argparse.ArgumentParser("python -m models.auto_study", description=told)
    add_documents(parser, LENGTHS)
    parser.add_argument(
        "--repeat", type=natural, default=2, metavar="N", help="turns of exact and auto timed; 0: none (2)"
    )
    add_outputs(parser, plot=False)
    options = parsed(parser, argv)
    if not options.budgets:
        parser.error("--budgets must name one or more")
    return options


def run(options: argparse.Namespace) -> None:
    """Measure what is not measured yet, then write the tables."""
    sources = sources_of(options.texts, tell)
    context = context_of(options)
    model = load_decoder(options.model)
    profile = profile_of(model, options.profile, tell)
    settings = {**settings_of(options, sources), **_told(profile, sources)}
    results = open_stored(
        options.json, options.resume, StudyResults(settings, context), partial(_load, settings=settings)
    )
    began = perf_counter()
    Study(options, results, model, profile, context).read(sources)
    tell(f"measured in {perf_counter() - began:.0f} s")
    write_page(options, markdown(results))


def _load(file: Path, settings: dict[str, Any]) -> StudyResults:
    """Facts may be asked where none were so far: nothing else depends on how many there are."""
    found = load_study(file)
    add_texts(found.settings, settings)
    if not found.facts:
        found.settings["facts"] = settings["facts"]
    return found


def _told(profile: Profile, sources: Sequence[Source]) -> dict[str, Any]:
    """Which profile, and which of the texts it was made of too: on those it is no test."""
    own = {text.sha256 for text in profile.made.texts}
    return {
        "profile": profile_id(profile),
        "profile_command": profile.made.command,
        "calibrated_on": [source.name for source in sources if source.told().sha256 in own],
    }


class Study:
    """What is left to measure, and its results."""

    def __init__(
        self,
        options: argparse.Namespace,
        results: StudyResults,
        model: Model,
        profile: Profile,
        context: dict[str, Any],
    ) -> None:
        self._options, self._results = options, results
        self._model, self._profile, self._context = model, profile, context
        self._begun = False

    def read(self, sources: Sequence[Source]) -> None:
        """Errors on the texts as they are, then facts in them; times last: nothing else cares what else the
        machine does."""
        documents = list(self._documents(sources, 0))
        if not documents:
            raise ModelError("no text has room for a document: give longer --texts or shorter --tokens")
        planted = list(self._documents(sources, self._options.facts)) if self._options.facts else []
        for document in documents:
            self._study(document)
        for document in planted:
            self._ask(document)
        for document in documents:
            self._time(document)

    def _documents(self, sources: Sequence[Source], facts: int) -> Iterator[Document]:
        o, model = self._options, self._model
        for tokens in lengths_within(model.info.max_tokens, o.tokens, self._leave_out):
            for document in documents_of(model, sources, tokens, o.documents, facts, o.seed, self._leave_out):
                plans = [planned_choice(self._profile, document.prompt_tokens, e, o.seed) for e in o.budgets]
                refuse_cut_chunks([choice for _, choice in plans], o.chunk_tokens)
                yield document

    def _leave_out(self, told: str) -> None:
        """What was asked for and is not read, and why."""
        tell(f"left out: {told}")
        noted = self._results.context.setdefault("left_out", [])
        if told not in noted:
            noted.append(told)

    def _study(self, document: Document) -> None:
        o = self._options
        left = [each for each in o.budgets if not self._results.has_row(document, each)]
        if not left:
            return
        self._begin()
        exact_outcome = read_document(self._model, document, exact(), o.chunk_tokens)
        for each in left:
            row = study_document(
                self._model, document, self._profile, each, exact_outcome, o.chunk_tokens, o.seed
            )
            self._results.rows.append(row)
            self._save()
            _tell_row(document, row)

    def _ask(self, document: Document) -> None:
        o = self._options
        left = [each for each in o.budgets if not self._results.has_facts(document, each)]
        if not left:
            return
        self._begin()
        exact_outcome = read_document(self._model, document, exact(), o.chunk_tokens)
        for each in left:
            row = ask_document(
                self._model, document, self._profile, each, exact_outcome, o.chunk_tokens, o.seed
            )
            self._results.facts.append(row)
            self._save()
            tell(
                f"{document.told}, max_error {each}: {sum(row.chosen)} of {len(row.chosen)} facts, exact "
                f"{sum(row.exact_chosen)}"
            )

    def _time(self, document: Document) -> None:
        o = self._options
        left = [each for each in o.budgets if not self._results.has_time(document, each)]
        if not left or not o.repeat:
            return
        self._begin()
        rows = time_document(self._model, document, self._profile, left, o.repeat, o.chunk_tokens, o.seed)
        self._results.times += rows
        self._save()
        for row in rows:
            _tell_time(document, row)

    def _begin(self) -> None:
        if not self._begun:
            begin(self._results, self._context, os.getloadavg()[0])
            self._begun = True

    def _save(self) -> None:
        if self._options.json:
            save(self._results, self._options.json)


def _tell_row(document: Document, row: AutoRow) -> None:
    repaired = sum(each is not None for each in row.exact_from)
    tell(
        f"{document.told}, max_error {row.max_error}: {row.reason}, worst layer {max(row.errors):.4f}, "
        f"{repaired} repaired, density {row.density:.2f}, perplexity {row.change_percent:+.2f} %"
    )


def _tell_time(document: Document, row: TimeRow) -> None:
    tell(
        f"{document.told}, max_error {row.max_error}: {100 * row.ratio:.0f} % of exact's "
        f"{min(row.exact_s):.1f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
