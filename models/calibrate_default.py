"""The profile that a model has without anybody asking for one: measured once, kept beside the models.

Where the model's errors are known, its times alone are measured: from a profile that ``longreach calibrate``
left in the cache, on another machine or with another torch, else from one that is shipped
(``models/profiles``). Else a quick one is made (``models.calibrate.QUICK``).
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Literal

from kernels.api import parse_params
from kernels.registry import UnknownBackend
from models.calibrate import QUICK, Sizes, Source, calibrate
from models.calibrate_measure import MAX_RECORDED_BYTES, layer_bytes, measured_chunks, recorded_layers
from models.calibrate_rungs import default_rungs
from models.calibrate_times import MINUTES, document_of, picked_layers, retime, rungs_of
from models.contract import Choice, ModelError
from models.fetch import Progress
from models.files import locked
from models.profile import EXACT, Profile, Stamp, load, profile_file, save
from models.profile_stamp import stamp_of
from models.quality_contenders import Contender
from models.quality_options import DEFAULT_TEXT
from models.runner import Model

CALIBRATE = "longreach calibrate "
"""What the command of such a profile begins with."""
SHIPPED = Path(__file__).resolve().parent / "profiles"
RECORDED_SHARE = 8
"""Layers' inputs are held together up to this part of the memory that there is."""
MEASURED_SHARE = 2
"""Lengths beyond the shortest are measured within this part of the memory: measuring holds it for minutes,
and requests must find room beside it."""

MeasurementSource = Literal["calibrated", "shipped", "measured"]
Run = Callable[[Progress, Progress, Callable[[], float]], Profile]


@dataclass(frozen=True)
class Measurement:
    """What is about to be measured: ``run(progress, watch, clock)`` does it, in about ``minutes`` at most.
    ``num_bytes`` and ``flops`` are predicted for the whole of it."""

    source: MeasurementSource
    minutes: float
    num_bytes: int
    flops: float
    run: Run


def profile_for(model: Model, cache_dir: Path, progress: Progress) -> Profile:
    """The model's profile on this machine: the one in the cache where it belongs to both, else one measured
    now and kept. ModelError where there is no text to measure on.

    Whoever asks meanwhile through this function, in this process or another, waits for it."""
    stamp = stamp_of(model)
    file = profile_file(cache_dir, stamp)
    with locked(file):
        found = cached(stamp, cache_dir, progress, model.info.applied_layers)
        if found is not None:
            return found
        todo = measurement_for(model, stamp, None, progress, cache_dir=cache_dir)
        profile = todo.run(progress, _ignore, perf_counter)
        save(profile, file)
    return profile


def cached(
    stamp: Stamp, cache_dir: Path, progress: Progress, layers: tuple[int, ...] | None = None
) -> Profile | None:
    """The profile in the cache, where it belongs to this model and machine, this release has its rungs and,
    where they are given, it is of these ``layers``; another one is told of."""
    file = profile_file(cache_dir, stamp)
    try:
        if not file.exists():
            return None
        found = load(file, stamp)
        rungs_of(found)
        of = tuple(each.layer for each in found.layers)
        if layers is not None and of != layers:
            raise ModelError(f"profile {file} is of layers {of}, attention is chosen in {layers}")
    except (ModelError, UnknownBackend, ValueError, OSError) as error:
        progress(f"{stamp.model}: {error}. Not used")
        return None
    return found


def keep(profile: Profile, cache_dir: Path, progress: Progress) -> None:
    """In the cache; a directory that cannot be written is told of."""
    file = profile_file(cache_dir, profile.stamp)
    try:
        save(profile, file)
    except OSError as error:
        progress(f"{profile.stamp.model}: its profile could not be kept: {error}")


def shipped_for(stamp: Stamp, progress: Progress, directory: Path | None = None) -> Profile | None:
    """A profile that came with this release and holds the errors of these weights in this dtype."""
    files = sorted((directory or SHIPPED).glob("*.json"))
    return next(_of_these_weights(stamp, files, progress), None)


def calibrated_for(stamp: Stamp, cache_dir: Path, progress: Progress) -> Profile | None:
    """The newest profile in the cache that ``longreach calibrate`` made of these weights in this dtype."""
    try:
        files = sorted((cache_dir / "profiles").glob("*.json"), key=lambda f: f.stat().st_mtime, reverse=True)
    except OSError:
        return None
    found = _of_these_weights(stamp, files, progress)
    made = (each for each in found if each.made.times is None and each.made.command.startswith(CALIBRATE))
    return next(made, None)


def _of_these_weights(stamp: Stamp, files: Iterable[Path], progress: Progress) -> Iterator[Profile]:
    """Profiles of any machine whose errors hold here too."""
    for file in files:
        try:
            profile = load(file)
            rungs_of(profile)
        except (ModelError, UnknownBackend, ValueError) as error:
            progress(f"{file.name}: not used: {error}")
            continue
        if (profile.stamp.fingerprint, profile.stamp.dtype) == (stamp.fingerprint, stamp.dtype):
            yield profile


def measurement_for(
    model: Model,
    stamp: Stamp,
    max_bytes: int | None,
    progress: Progress,
    directory: Path | None = None,
    *,
    cache_dir: Path | None = None,
) -> Measurement:
    """What to measure of this model within ``max_bytes``: long lengths that need more are left out.
    ``directory``: of what is shipped, where that is not ``SHIPPED``. ModelError where there is no text to
    measure on."""
    sources = _sources(model)
    calibrated = None if cache_dir is None else calibrated_for(stamp, cache_dir, progress)
    if calibrated is not None:
        if _fits(model, calibrated, sources, max_bytes):
            return _times("calibrated", model, stamp, calibrated, sources, max_bytes, progress)
        shortest = calibrated.lengths[0].tokens
        progress(f"{stamp.model}: its calibration begins at {shortest:,} tokens, too many to time here")
    shipped = shipped_for(stamp, progress, directory)
    if shipped is not None:
        return _times("shipped", model, stamp, shipped, sources, max_bytes, progress)
    return _quick(model, sources, max_bytes, progress)


def _fits(model: Model, known: Profile, sources: list[Source], max_bytes: int | None) -> bool:
    """Whether its shortest length can be timed: by the model's limit, the texts' length and the memory."""
    shortest = known.lengths[0].tokens
    if shortest > model.info.max_tokens or document_of(model, sources, shortest) is None:
        return False
    return max_bytes is None or _times_bytes(model, known, shortest) <= max_bytes


def _sources(model: Model) -> list[Source]:
    sources = [
        Source(file.name, file.read_text(encoding="utf-8"))
        for file in sorted(DEFAULT_TEXT.parent.glob("*.txt"))
    ]
    if not sources:
        raise ModelError(
            f"{DEFAULT_TEXT.parent} holds no text to measure a profile on: run longreach calibrate "
            f"{model.info.name} TEXT with one of your own"
        )
    return sources


def _quick(model: Model, sources: list[Source], max_bytes: int | None, progress: Progress) -> Measurement:
    rungs = default_rungs(model, quick=True)
    recorded = None if max_bytes is None else min(max_bytes // RECORDED_SHARE, MAX_RECORDED_BYTES)
    chunk_tokens = QUICK.chunk_tokens if model.info.causal else 0

    def num_bytes(tokens: int) -> int:
        at_once = recorded_layers(model, tokens, recorded)
        return _bytes(model, tokens, rungs, chunk_tokens, at_once)

    most = model.info.max_tokens
    readable = [tokens for tokens in QUICK.lengths if tokens <= most] or [most]
    lengths = _fitting(model, readable, num_bytes, max_bytes, progress)
    sizes = replace(QUICK, lengths=tuple(lengths), recorded_bytes=recorded)

    def run(progress: Progress, watch: Progress, clock: Callable[[], float]) -> Profile:
        told = f"{model.info.name}: measuring its profile, about {sizes.minutes:g} minutes at most"
        progress(told)
        return _calibrated(model, sources, rungs, sizes, progress, watch, clock)

    flops = sizes.documents * sum(_flops(model, n, chunk_tokens, len(rungs), 1.0) for n in lengths)
    assert sizes.minutes is not None
    return Measurement("measured", sizes.minutes, num_bytes(lengths[-1]), flops, run)


def _calibrated(
    model: Model,
    sources: list[Source],
    rungs: list[Contender],
    sizes: Sizes,
    progress: Progress,
    watch: Progress,
    clock: Callable[[], float],
) -> Profile:
    measured = calibrate(
        model,
        sources,
        rungs,
        sizes,
        command="at first use",
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        progress=progress,
        watch=watch,
        clock=clock,
    )
    return measured.profile()


def _times(
    source: MeasurementSource,
    model: Model,
    stamp: Stamp,
    known: Profile,
    sources: list[Source],
    max_bytes: int | None,
    progress: Progress,
) -> Measurement:
    """``known``: the profile whose errors are taken."""
    rungs, layers = rungs_of(known), picked_layers(known)
    chunk_tokens = known.made.chunk_tokens
    readable = [each.tokens for each in known.lengths if each.tokens <= model.info.max_tokens]
    if not readable:
        return _quick(model, sources, max_bytes, progress)

    num_bytes = partial(_times_bytes, model, known)
    lengths = _fitting(model, readable, num_bytes, max_bytes, progress)

    def run(progress: Progress, watch: Progress, clock: Callable[[], float]) -> Profile:
        told = f"{model.info.name}: measuring the times of its profile, about {60 * MINUTES:.0f} s"
        progress(told)
        longest = lengths[-1]
        return retime(
            known, model, stamp, sources, longest=longest, progress=progress, watch=watch, clock=clock
        )

    share = len(layers) / len(known.layers)
    flops = sum(_flops(model, n, chunk_tokens, len(rungs), share) for n in lengths)
    return Measurement(source, MINUTES, num_bytes(lengths[-1]), flops, run)


def _times_bytes(model: Model, known: Profile, tokens: int) -> int:
    return _bytes(model, tokens, rungs_of(known), known.made.chunk_tokens, len(picked_layers(known)))


def _fitting(
    model: Model,
    lengths: list[int],
    num_bytes: Callable[[int], int],
    max_bytes: int | None,
    progress: Progress,
) -> list[int]:
    """The lengths, ascending, that need no more than their share of ``max_bytes``. ModelError where the
    shortest needs more than that."""
    if max_bytes is None:
        return lengths
    shortest, *longer = lengths
    if num_bytes(shortest) > max_bytes:
        raise ModelError(
            f"measuring {shortest:,} tokens needs about {num_bytes(shortest):,} bytes, requests may hold "
            f"{max_bytes:,} (memory_limit_bytes): raise it, or run longreach calibrate {model.info.name} TEXT"
        )
    found = [shortest, *(tokens for tokens in longer if num_bytes(tokens) <= max_bytes // MEASURED_SHARE)]
    if len(found) < len(lengths):
        progress(f"{model.info.name}: no memory for more than {found[-1]} tokens")
    return found


def _bytes(model: Model, tokens: int, rungs: list[Contender], chunk_tokens: int, layers: int) -> int:
    """The dearest reading, beside it the inputs of layers, one of them in pieces and whole."""
    choices = [Choice(EXACT, parse_params(EXACT)), *(each.choice(0) for each in rungs)]
    rows = min(chunk_tokens or tokens, tokens)
    reading = max(model.estimate_bytes(tokens, 0, choice, rows) for choice in choices)
    one = max(layer_bytes(model, layer, tokens) for layer in model.info.applied_layers)
    return reading + (layers + 1) * one


def _flops(model: Model, tokens: int, chunk_tokens: int, num_rungs: int, share: float) -> float:
    """Of one document: two readings, and in a share of the layers exact and the rungs, each as exact, on the
    rows measured."""
    one = model.flops(tokens, 0, Choice(EXACT, parse_params(EXACT)), "nothing")
    rows: int = sum(piece.stop - piece.start for piece in measured_chunks(tokens, chunk_tokens, 0))
    return 2 * (one.linear + one.attention) + share * (1 + num_rungs) * one.attention * rows / tokens


def _ignore(what: str) -> None:
    """Nobody watches."""
