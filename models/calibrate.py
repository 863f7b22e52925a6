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
from models.forward import offer_to_pause
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
    recorded_bytes: int | None = None
    """Of layers' inputs that are held at once; None: the usual."""


QUICK = Sizes(lengths=(1024, 2048, 4096, 8192), documents=2, minutes=3.0)
"""The profile that is made at first use."""


@dataclass
class _Measured:
    """So far. ``ahead`` are the lengths of the documents still to come."""

    sizes: Sizes
    progress: Progress
    watch: Progress
    clock: Callable[[], float]
    ahead: list[int]
    samples: list[Sample] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    seconds: dict[int, float] = field(default_factory=dict)
    """What the latest document of a length took."""
    began: float = 0.0

    @property
    def spent_s(self) -> float:
        return self.clock() - self.began

    def expected_s(self, tokens: int) -> float | None:
        """Of a document of this length: time grows with the square of the length at most. None while nothing
        is known."""
        known = self.seconds.get(tokens)
        if known is not None or not self.seconds:
            return known
        nearest = max(each for each in self.seconds if each < tokens or each == min(self.seconds))
        return self.seconds[nearest] * max(1.0, tokens / nearest) ** 2

    def left_s(self, tokens: int, since: float) -> float | None:
        """Of the document that is measured since then and of those ahead for which there is time; None while
        nothing is known."""
        spent, whole = self.spent_s, self.expected_s(tokens)
        if whole is None:
            return None
        left = max(whole - (self.began + spent - since), 0.0)
        for each in self.ahead:
            more = self.expected_s(each) or 0.0
            left += more if self.fits(spent + left + more) else 0.0
        return left

    def told_left(self, tokens: int, since: float) -> str:
        left, minutes = self.left_s(tokens, since), self.sizes.minutes
        if left is not None:
            return f", about {left:.0f} s left"
        return "" if minutes is None else f", at most about {max(60 * minutes - self.spent_s, 0):.0f} s left"

    def fits(self, seconds: float) -> bool:
        return self.sizes.minutes is None or seconds <= 60 * self.sizes.minutes


def calibrate(
    model: Model,
    sources: Sequence[Source],
    rungs: Sequence[Contender],
    sizes: Sizes,
    *,
    command: str,
    date: str,
    progress: Progress,
    watch: Progress = lambda what: None,
    clock: Callable[[], float] = perf_counter,
) -> Calibration:
    """Measure. ``progress`` is told what a person wants to read, ``watch`` every step of the way. ModelError
    where no text has room for any length; ValueError where ``sizes`` do not fit the model or the rungs."""
    lengths, chunk_tokens = _lengths(model, sizes), sizes.chunk_tokens if model.info.causal else 0
    refuse_cut_tiles(rungs, chunk_tokens)
    began = clock()
    documents = list(_documents(model, sources, lengths, sizes.documents, progress))
    ahead = [tokens for _, tokens, _ in documents]
    measured = _Measured(sizes, progress, watch, clock, ahead, began=began)
    for document, tokens, token_ids in documents:
        ahead.pop(0)
        if not _affordable(measured, tokens):
            progress(f"document {document + 1}, {tokens} tokens: left out, no time for it")
            continue
        _measure(model, document, token_ids, rungs, chunk_tokens, measured)
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
            offer_to_pause()
            try:
                passages = passages_of(source.text, model.tokenizer, prefix, tokens, of_source, source.name)
            except ModelError as error:
                progress(f"document {number + 1}, {tokens} tokens: left out, {error}")
                break
            yield number, tokens, passages[place].token_ids


def _affordable(measured: _Measured, tokens: int) -> bool:
    """Whether a document of this length is likely to end within the budget."""
    expected = measured.expected_s(tokens)
    return expected is None or measured.fits(measured.spent_s + expected)


def _measure(
    model: Model,
    document: int,
    token_ids: list[int],
    rungs: Sequence[Contender],
    chunk_tokens: int,
    measured: _Measured,
) -> None:
    tokens, sizes, began = len(token_ids), measured.sizes, measured.clock()
    told = f"document {document + 1}, {tokens} tokens"
    tell = _now_and_then(lambda what: measured.progress(f"{told}: {what}"))

    def look(what: str) -> None:
        tell(what)
        measured.watch(f"{what}, {tokens:,} tokens{measured.told_left(tokens, began)}")

    measured.watch(f"reading {tokens:,} tokens{measured.told_left(tokens, began)}")
    measured.timings.append(time_exact(model, token_ids, chunk_tokens, measured.clock))
    measured.samples += measure_document(
        model, document, token_ids, rungs, chunk_tokens, sizes.seed, look, sizes.recorded_bytes
    )
    measured.seconds[tokens] = measured.clock() - began
    measured.progress(f"{told}: {measured.seconds[tokens]:.1f} s")


def _now_and_then(tell: Callable[[str], object]) -> Callable[[str], None]:
    """What comes within ``TOLD_EVERY_S`` of the last that was told is not told."""
    last = perf_counter()

    def maybe(what: str) -> None:
        nonlocal last
        if perf_counter() - last >= TOLD_EVERY_S:
            last = perf_counter()
            tell(what)

    return maybe
