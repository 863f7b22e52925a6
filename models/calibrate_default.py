"""The profile that a model has without anybody asking for one: measured once, kept beside the models."""

from __future__ import annotations

import datetime
from pathlib import Path

from models.calibrate import QUICK, Source, calibrate
from models.calibrate_rungs import default_rungs
from models.contract import ModelError
from models.fetch import Progress
from models.files import locked
from models.profile import Profile, load, profile_file, save
from models.profile_stamp import stamp_of
from models.quality_options import DEFAULT_TEXT
from models.runner import Model


def profile_for(model: Model, cache_dir: Path, progress: Progress) -> Profile:
    """The model's profile on this machine: the one in the cache where it belongs to both, else a quick one,
    measured now (``QUICK.minutes`` at most, about) and kept. ModelError where there is no text to measure on.

    Whoever asks meanwhile, in this process or another, waits for it."""
    stamp = stamp_of(model)
    file = profile_file(cache_dir, stamp)
    with locked(file):
        if file.exists():
            try:
                return load(file, stamp)
            except ModelError as error:
                progress(f"{model.info.name}: {error}. Measuring a quick one now")
        profile = _quick(model, progress)
        save(profile, file)
    return profile


def _quick(model: Model, progress: Progress) -> Profile:
    sources = [
        Source(file.name, file.read_text(encoding="utf-8"))
        for file in sorted(DEFAULT_TEXT.parent.glob("*.txt"))
    ]
    if not sources:
        raise ModelError(
            f"{DEFAULT_TEXT.parent} holds no text to measure a profile on: run longreach calibrate "
            f"{model.info.name} TEXT with one of your own"
        )
    progress(f"{model.info.name}: measuring its profile, about {QUICK.minutes:g} minutes at most")
    measured = calibrate(
        model,
        sources,
        default_rungs(model, quick=True),
        QUICK,
        command="at first use",
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        progress=progress,
    )
    return measured.profile()
