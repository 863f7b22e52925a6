"""From samples to ladders: figures over documents, time shares freed of noise, rungs nobody would choose left
out. Plain Python.

    share_l = selection + computing * density_l / mean density         layer l; selection, computing: medians
                                                                       over all layers and documents
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any

from models.profile import EXACT, Ladder, Length, Made, Profile, Rung, Stamp

LEAST_ERROR = 1e-6
"""Errors below it are rounding: their logarithms say nothing of documents."""


@dataclass(frozen=True)
class Sample:
    """One rung (by its place among them) in one layer on one document. Times selection included."""

    document: int
    tokens: int
    layer: int
    rung: int
    error: float
    attention_s: float
    selection_s: float
    exact_attention_s: float
    density: float


@dataclass(frozen=True)
class Timing:
    """Exact reading one document: milliseconds of attention in the layers to which a choice applies,
    together, and of the rest of the forward."""

    tokens: int
    attention_ms: float
    rest_ms: float


@dataclass(frozen=True)
class Calibration:
    """What was measured. ``rungs`` are backend and params by the place that samples name; document d came
    from text d mod the number of ``made.texts``."""

    stamp: Stamp
    made: Made
    samples: tuple[Sample, ...]
    timings: tuple[Timing, ...]
    rungs: tuple[tuple[str, Mapping[str, Any]], ...]

    def profile(self) -> Profile:
        return Profile(
            stamp=self.stamp,
            made=self.made,
            lengths=lengths_of(self.samples, self.timings),
            layers=ladders_of(self.samples, self.rungs),
        )

    def without(self, text: int) -> Calibration:
        """As if the documents of one text had not been measured. Exact's times are the machine's: they
        stay."""
        return replace(self, samples=tuple(each for each in self.samples if self.text_of(each) != text))

    def text_of(self, sample: Sample) -> int:
        return sample.document % len(self.made.texts)


def lengths_of(samples: Sequence[Sample], timings: Sequence[Timing]) -> tuple[Length, ...]:
    """Of each length the least times: everything else that ran on the machine only adds to them."""
    return tuple(
        Length(
            tokens=tokens,
            documents=len({sample.document for sample in samples if sample.tokens == tokens}),
            attention_ms=min(timing.attention_ms for timing in timings if timing.tokens == tokens),
            rest_ms=min(timing.rest_ms for timing in timings if timing.tokens == tokens),
        )
        for tokens in sorted({sample.tokens for sample in samples})
    )


def ladders_of(
    samples: Sequence[Sample], rungs: Sequence[tuple[str, Mapping[str, Any]]]
) -> tuple[Ladder, ...]:
    """Per layer the rungs (backend and params, by the place that samples name) that are worth keeping, from
    cheap to dear, then exact."""
    lengths = sorted({sample.tokens for sample in samples})
    shares = _time_shares(samples)
    spreads = _spreads(samples)
    errors: dict[tuple[int, int, int], list[float]] = defaultdict(list)
    for sample in samples:
        errors[sample.layer, sample.rung, sample.tokens].append(sample.error)

    def rung(layer: int, place: int) -> Rung:
        figures = [sorted(errors[layer, place, tokens]) for tokens in lengths]
        return Rung(
            backend=rungs[place][0],
            params=dict(rungs[place][1]),
            median=tuple(rounded(median(each)) for each in figures),
            p95=tuple(rounded(each[math.ceil(0.95 * len(each)) - 1]) for each in figures),
            max=tuple(rounded(each[-1]) for each in figures),
            spread=tuple(spreads[place, tokens] for tokens in lengths),
            time_share=tuple(rounded(shares[layer, place, tokens]) for tokens in lengths),
        )

    return tuple(
        Ladder(
            layer=layer,
            rungs=(*worth_keeping([rung(layer, at) for at in range(len(rungs))]), _exact(lengths)),
        )
        for layer in sorted({sample.layer for sample in samples})
    )


def spread_of(samples: Iterable[Sample]) -> float | None:
    """Standard deviation of ln(error) within a rung, a layer and a length, pooled over all of them; None
    where none was measured twice."""
    groups: dict[tuple[int, int, int], list[float]] = defaultdict(list)
    for sample in samples:
        if sample.error > LEAST_ERROR:
            groups[sample.layer, sample.rung, sample.tokens].append(math.log(sample.error))
    several = [each for each in groups.values() if len(each) > 1]
    if not several:
        return None
    squares = sum((value - fmean(each)) ** 2 for each in several for value in each)
    return math.sqrt(squares / sum(len(each) - 1 for each in several))


def _spreads(samples: Sequence[Sample]) -> dict[tuple[int, int], float | None]:
    """By rung and length."""
    together: dict[tuple[int, int], list[Sample]] = defaultdict(list)
    for sample in samples:
        together[sample.rung, sample.tokens].append(sample)
    found = {place: spread_of(some) for place, some in together.items()}
    return {place: None if spread is None else rounded(spread) for place, spread in found.items()}


def _time_shares(samples: Sequence[Sample]) -> dict[tuple[int, int, int], float]:
    """By layer, rung and length."""
    together: dict[tuple[int, int], list[Sample]] = defaultdict(list)
    for sample in samples:
        together[sample.rung, sample.tokens].append(sample)
    found = {}
    for (rung, tokens), some in together.items():
        selection = median(each.selection_s / each.exact_attention_s for each in some)
        computing = median((each.attention_s - each.selection_s) / each.exact_attention_s for each in some)
        mean_density = fmean(each.density for each in some)
        for layer in {each.layer for each in some}:
            density = fmean(each.density for each in some if each.layer == layer)
            found[layer, rung, tokens] = selection + computing * density / mean_density
    return found


def worth_keeping(rungs: Sequence[Rung]) -> list[Rung]:
    """From cheap to dear, without those that cost as much as exact at every length, or that another beats in
    every figure."""
    cheaper = [rung for rung in rungs if min(rung.time_share) < 1]
    kept = [
        rung
        for place, rung in enumerate(cheaper)
        if not any(_beats(other, rung, at < place) for at, other in enumerate(cheaper) if at != place)
    ]
    return sorted(kept, key=lambda rung: (rung.time_share[-1], rung.median[-1]))


def _beats(one: Rung, other: Rung, wins_ties: bool) -> bool:
    mine, theirs = _figures(one), _figures(other)
    if mine == theirs:
        return wins_ties
    return all(a <= b for a, b in zip(mine, theirs, strict=True))


def _figures(rung: Rung) -> tuple[float, ...]:
    return (*(each or 0.0 for each in rung.spread), *rung.time_share, *rung.median, *rung.p95, *rung.max)


def _exact(lengths: Sequence[int]) -> Rung:
    zero, one = (0.0,) * len(lengths), (1.0,) * len(lengths)
    return Rung(backend=EXACT, params={}, median=zero, p95=zero, max=zero, spread=zero, time_share=one)


def rounded(value: float) -> float:
    """Five digits: what a file holds is what a plan is made from."""
    return float(f"{value:.5g}")
