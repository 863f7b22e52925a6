"""A profile whose errors were measured elsewhere, made this machine's: its times are measured here.

Errors belong to the weights and the dtype; times to the machine. At a length n that is measured here, exact
is timed as it reads a document, and every rung of the profile on the inputs of a few layers, in turns with
exact:

    share'_l(n) = share_l(n) * r(n)          r(n) = median over measured layers of share'(n)
                                                    / median over layers that have the rung of share(n)

What differs between layers (how many pairs they keep) is the profile's.
Lengths are measured from short to long while the time allows. At a longer one that is left out, r is that of
the longest measured length, and exact's attention and rest grow from there as they do in the profile.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter

from models.calibrate import Source
from models.calibrate_ladders import Timing, rounded, worth_keeping
from models.calibrate_measure import measure_layer, time_exact
from models.contract import ModelError
from models.fetch import Progress
from models.profile import SCHEMA_VERSION, Ladder, Length, Profile, Rung, Stamp, Times
from models.quality_contenders import Contender, contender, key_of
from models.quality_record import record_layers
from models.quality_texts import passages_of
from models.runner import Model

MINUTES = 1.0
MAX_LAYERS = 3
CHEAP = 0.05
"""A length that took no more than this part of the time is measured twice: the least times of exact count,
and of the shares the median."""


@dataclass(frozen=True)
class _Found:
    """At one length: where exact's time goes, and the time share of every rung in every measured layer."""

    timings: tuple[Timing, ...]
    shares: dict[str, tuple[float, ...]]

    @property
    def attention_ms(self) -> float:
        return min(each.attention_ms for each in self.timings)

    @property
    def rest_ms(self) -> float:
        return min(each.rest_ms for each in self.timings)


def retime(
    shipped: Profile,
    model: Model,
    stamp: Stamp,
    sources: Sequence[Source],
    *,
    longest: int,
    progress: Progress,
    watch: Progress = lambda what: None,
    minutes: float = MINUTES,
    clock: Callable[[], float] = perf_counter,
) -> Profile:
    """The profile with this machine's times, in about ``minutes``: of lengths up to ``longest``, the shortest
    in any case. ModelError where no text has room for it; ValueError where a rung is not known here."""
    began, layers = clock(), picked_layers(shipped)
    found: dict[int, _Found] = {}
    for length in shipped.lengths:
        token_ids = document_of(model, sources, length.tokens) if length.tokens <= longest else None
        spent = clock() - began
        if token_ids is None or (found and spent + _expected_s(shipped, found, length) > 60 * minutes):
            progress(f"{length.tokens} tokens and more: not measured here, carried over from shorter ones")
            break
        allowed = 60 * minutes - spent
        found[length.tokens] = _measure(shipped, model, layers, token_ids, allowed, watch, clock)
        progress(f"{length.tokens} tokens: {clock() - began - spent:.1f} s")
    if not found:
        raise ModelError(f"no text has {shipped.lengths[0].tokens} tokens to measure times on")
    times = Times(
        errors_from=shipped.stamp,
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        seconds=round(clock() - began, 1),
        texts=tuple(source.told() for source in sources),
        tokens=tuple(found),
        layers=tuple(layers),
    )
    return _profile(shipped, stamp, times, found)


def picked_layers(shipped: Profile) -> list[int]:
    """Those measured: the first, the last and the one between."""
    layers = [ladder.layer for ladder in shipped.layers]
    places = {round(n * (len(layers) - 1) / (MAX_LAYERS - 1)) for n in range(MAX_LAYERS)}
    return [layers[place] for place in sorted(places)]


def rungs_of(profile: Profile) -> list[Contender]:
    """Every attention in it but exact, once. UnknownBackend or InvalidParams where this release does not have
    it."""
    found = {
        each.key: each
        for ladder in profile.layers
        for each in (contender(rung.backend, rung.params) for rung in ladder.rungs if not rung.is_exact)
    }
    return list(found.values())


def document_of(model: Model, sources: Sequence[Source], tokens: int) -> list[int] | None:
    """Of the first text that is long enough."""
    prefix = model.info.prompts.get("document", "")
    for source in sources:
        try:
            return passages_of(source.text, model.tokenizer, prefix, tokens, 1, source.name)[0].token_ids
        except ModelError:
            continue
    return None


def _expected_s(shipped: Profile, found: dict[int, _Found], length: Length) -> float:
    """Of measuring a longer one: what the last took, grown as exact's attention grows in the profile, which
    is faster than the rest."""
    last = max(found)
    grown = length.attention_ms / _length(shipped, last).attention_ms
    return _seconds(found[last], shipped) * max(grown, length.tokens / last)


def _seconds(found: _Found, shipped: Profile) -> float:
    """Two readings, and the rungs beside exact in a few of the layers."""
    reading_ms = found.attention_ms + found.rest_ms
    of_exact = 1 + sum(sum(shares) / len(shares) for shares in found.shares.values())
    part = len(picked_layers(shipped)) / len(shipped.layers)
    return (2 * reading_ms + part * of_exact * found.attention_ms) / 1e3


def _measure(
    shipped: Profile,
    model: Model,
    layers: Sequence[int],
    token_ids: list[int],
    allowed_s: float,
    watch: Progress,
    clock: Callable[[], float],
) -> _Found:
    began = clock()
    first = _once(shipped, model, layers, token_ids, watch, clock, lambda: allowed_s - (clock() - began))
    if clock() - began > CHEAP * allowed_s:
        return first
    again = _once(shipped, model, layers, token_ids, watch, clock, lambda: allowed_s - (clock() - began))
    shares = {key: (*first.shares[key], *again.shares[key]) for key in first.shares}
    return _Found((*first.timings, *again.timings), shares)


def _once(
    shipped: Profile,
    model: Model,
    layers: Sequence[int],
    token_ids: list[int],
    watch: Progress,
    clock: Callable[[], float],
    left_s: Callable[[], float],
) -> _Found:
    tokens, chunk_tokens = len(token_ids), shipped.made.chunk_tokens
    rungs, seed = rungs_of(shipped), shipped.made.seed
    shares: dict[str, list[float]] = {each.key: [] for each in rungs}
    tell = partial(_tell, watch, tokens, left_s)
    tell("reading")
    timing = time_exact(model, token_ids, chunk_tokens, clock)
    records = record_layers(model._network, token_ids, layers, chunk_tokens)
    while records:
        record = records.pop(0)
        for row in measure_layer(record, rungs, chunk_tokens, seed):
            shares[key_of(row.backend, row.full)].append(row.time_share)
        tell(f"layer {record.index}")
    return _Found((timing,), {key: tuple(each) for key, each in shares.items()})


def _tell(watch: Progress, tokens: int, left_s: Callable[[], float], what: str) -> None:
    watch(f"times: {what}, {tokens:,} tokens, at most about {max(left_s(), 0):.0f} s left")


def _profile(shipped: Profile, stamp: Stamp, times: Times, found: dict[int, _Found]) -> Profile:
    return shipped.model_copy(
        update={
            "schema_version": SCHEMA_VERSION,
            "stamp": stamp,
            "made": shipped.made.model_copy(update={"times": times}),
            "lengths": tuple(_retimed_length(shipped, found, length) for length in shipped.lengths),
            "layers": _ladders(shipped, found),
        }
    )


def _retimed_length(shipped: Profile, found: dict[int, _Found], length: Length) -> Length:
    near = _nearest(found, length.tokens)
    here, there = found[near], _length(shipped, near)
    rest = length.rest_ms / there.rest_ms if there.rest_ms > 0 else length.tokens / near
    return length.model_copy(
        update={
            "attention_ms": here.attention_ms * length.attention_ms / there.attention_ms,
            "rest_ms": here.rest_ms * rest,
        }
    )


def _ladders(shipped: Profile, found: dict[int, _Found]) -> tuple[Ladder, ...]:
    ratios = _ratios(shipped, found)

    def retimed(rung: Rung) -> Rung:
        key = contender(rung.backend, rung.params).key
        shares = zip(shipped.lengths, rung.time_share, strict=True)
        here = tuple(rounded(share * ratios[key, length.tokens]) for length, share in shares)
        return rung.model_copy(update={"time_share": here})

    return tuple(
        Ladder(
            layer=ladder.layer,
            rungs=(*worth_keeping([retimed(each) for each in ladder.rungs[:-1]]), ladder.rungs[-1]),
        )
        for ladder in shipped.layers
    )


def _ratios(shipped: Profile, found: dict[int, _Found]) -> dict[tuple[str, int], float]:
    """r by rung and length."""
    there: dict[str, list[Rung]] = {}
    for ladder in shipped.layers:
        for rung in ladder.rungs[:-1]:
            there.setdefault(contender(rung.backend, rung.params).key, []).append(rung)
    places = {length.tokens: place for place, length in enumerate(shipped.lengths)}
    return {
        (key, tokens): median(found[near].shares[key]) / median(each.time_share[places[near]] for each in of)
        for key, of in there.items()
        for tokens in places
        for near in (_nearest(found, tokens),)
    }


def _nearest(found: dict[int, _Found], tokens: int) -> int:
    """The length itself, or the longest that was measured."""
    return tokens if tokens in found else max(found)


def _length(profile: Profile, tokens: int) -> Length:
    return next(length for length in profile.lengths if length.tokens == tokens)
