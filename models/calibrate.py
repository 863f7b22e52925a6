"""Measure a model's profile: rungs of attention on documents of several lengths, within a time budget.

Exact reads each document, and every rung runs on the inputs of every layer in turns with exact
(``models.quality_error``). Documents are taken in rounds, in each from short to long: a budget that ends
early leaves fewer documents at long lengths, and no gap between two lengths that have some.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter

from models.calibrate_ladders import Calibration, Sample, Timing
from models.calibrate_measure import measure_document, time_exact
from models.contract import ModelError
from models.fetch import Progress
from models.profile import Made, Text
from models.profile_stamp import stamp_of
from models.quality_contenders import Contender, refuse_cut_tiles
from models.quality_texts import passages_of
from models.runner import Model

LENGTHS = (512, 1024, 2048, 4096, 8192)
CHUNK_TOKENS = 512
TOLD_EVERY_S = 10.0


@dataclass(frozen=True)
class Source:
    """A text to cut documents from."""

    name: str
    text: str

    def told(self) -> Text:
        return Text(name=self.name, sha256=hashlib.sha256(self.text.encode()).hexdigest())


@dataclass(frozen=True)
class Sizes:
    """``documents`` at each length, as many as ``minutes`` (None: no limit) allow. The first document at the
    shortest length is always measured."""

    lengths: tuple[int, ...] = LENGTHS
    documents: int = 8
    minutes: float | None = None
    chunk_tokens: int = CHUNK_TOKENS
    seed: int = 0


QUICK = Sizes(lengths=(1024, 2048, 4096, 8192), documents=2, minutes=3.0)
"""The profile that is made at first use."""


@dataclass
class _Measured:
    samples: list[Sample] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    seconds: dict[int, float] = field(default_factory=dict)
    """What the latest document of a length took."""


def calibrate(
    model: Model,
    sources: Sequence[Source],
    rungs: Sequence[Contender],
    sizes: Sizes,
    *,
    command: str,
    date: str,
    progress: Progress,
    clock: Callable[[], float] = perf_counter,
) -> Calibration:
    """Measure. ModelError where no text has room for any length; ValueError where
    ``sizes`` do not fit the model or the rungs."""
    lengths, chunk_tokens = _lengths(model, sizes), sizes.chunk_tokens if model.info.causal else 0
    refuse_cut_tiles(rungs, chunk_tokens)
    measured, began = _Measured(), clock()
    for document, tokens, token_ids in _documents(model, sources, lengths, sizes.documents, progress):
        if not _affordable(measured, tokens, clock() - began, sizes.minutes):
            progress(f"document {document + 1}, {tokens} tokens: left out, no time for it")
            continue
        _measure(model, document, token_ids, rungs, chunk_tokens, sizes.seed, measured, progress, clock)
    if not measured.samples:
        raise ModelError(f"no text has {lengths[0]} tokens: give longer ones, or shorter --tokens")
    made = Made(
        command=command,
        date=date,
        seconds=round(clock() - began, 1),
        chunk_tokens=chunk_tokens,
        seed=sizes.seed,
        texts=tuple(source.told() for source in sources),
    )
    named = tuple((each.backend, each.params) for each in rungs)
    return Calibration(stamp_of(model), made, tuple(measured.samples), tuple(measured.timings), named)


def _lengths(model: Model, sizes: Sizes) -> list[int]:
    most = model.info.max_tokens
    found = sorted({tokens for tokens in sizes.lengths if tokens <= most})
    if not found or found[0] < 1:
        raise ValueError(
            f"--tokens must lie in 1 .. {most}, what {model.info.name!r} reads; got {sizes.lengths}"
        )
    return found


def _documents(
    model: Model, sources: Sequence[Source], lengths: Sequence[int], count: int, progress: Progress
) -> Iterator[tuple[int, int, list[int]]]:
    """Number, tokens and token ids: in rounds over the documents, each from short to long. Document d comes
    from text d mod the number of texts."""
    prefix = model.info.prompts.get("document", "")
    for number in range(count):
        source, place = sources[number % len(sources)], number // len(sources)
        of_source = len(range(number % len(sources), count, len(sources)))
        for tokens in lengths:
            try:
                passages = passages_of(source.text, model.tokenizer, prefix, tokens, of_source, source.name)
            except ModelError as error:
                progress(f"document {number + 1}, {tokens} tokens: left out, {error}")
                break
            yield number, tokens, passages[place].token_ids


def _affordable(measured: _Measured, tokens: int, spent_s: float, minutes: float | None) -> bool:
    """Whether a document of this length is likely to end within the budget: time grows with the square of
    the length at most."""
    if minutes is None or not measured.seconds:
        return True
    known = measured.seconds.get(tokens)
    if known is None:
        nearest = max(each for each in measured.seconds if each < tokens or each == min(measured.seconds))
        known = measured.seconds[nearest] * max(1.0, tokens / nearest) ** 2
    return spent_s + known <= 60 * minutes


def _measure(
    model: Model,
    document: int,
    token_ids: list[int],
    rungs: Sequence[Contender],
    chunk_tokens: int,
    seed: int,
    measured: _Measured,
    progress: Progress,
    clock: Callable[[], float],
) -> None:
    tokens, began = len(token_ids), clock()
    told = f"document {document + 1}, {tokens} tokens"
    tell = _now_and_then(lambda what: progress(f"{told}: {what}"))
    measured.timings.append(time_exact(model, token_ids, chunk_tokens))
    measured.samples += measure_document(model, document, token_ids, rungs, chunk_tokens, seed, tell)
    measured.seconds[tokens] = clock() - began
    progress(f"{told}: {measured.seconds[tokens]:.1f} s")


def _now_and_then(tell: Callable[[str], object]) -> Callable[[str], None]:
    """What comes within ``TOLD_EVERY_S`` of the last that was told is not told."""
    last = perf_counter()

    def maybe(what: str) -> None:
        nonlocal last
        if perf_counter() - last >= TOLD_EVERY_S:
            last = perf_counter()
            tell(what)

    return maybe
