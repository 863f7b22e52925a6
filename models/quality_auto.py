"""``auto`` among the contenders: a budget, a profile, and the attention that they give a document."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable
from pathlib import Path

from models.auto import Plan, plan
from models.calibrate_default import profile_for
from models.contract import Choice, ModelError
from models.fetch import Progress
from models.files import default_cache_dir
from models.planned import AUTO, exact, planned
from models.profile import Profile, load
from models.profile_stamp import stamp_of
from models.quality_contenders import Contender
from models.runner import Model

BUDGETS = (0.05, 0.1, 0.2)


def budget(text: str) -> float:
    """An option's value, in (0, 1]."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {value}")
    return value


def auto_contender(max_error: float, profile: Profile) -> Contender:
    """With another profile it is another contender."""
    told = {"max_error": max_error}
    return Contender(AUTO, told, {**told, "profile": profile_id(profile)}, chosen=True)


def profile_id(profile: Profile) -> str:
    return hashlib.sha256(profile.model_dump_json().encode()).hexdigest()[:12]


def choice_of(contender: Contender, profile: Profile | None, tokens: int, seed: int) -> Choice:
    """What reads a document of ``tokens``; ``profile`` is needed for ``auto`` alone."""
    if contender.backend != AUTO:
        return contender.choice(seed)
    assert profile is not None, "auto without a profile. This is a bug."
    return planned_choice(profile, tokens, contender.params["max_error"], seed)[1]


def planned_choice(profile: Profile, tokens: int, max_error: float, seed: int) -> tuple[Plan, Choice]:
    """As requests are read: a plan that is exact in every layer runs as plain exact, without a guard."""
    found = plan(profile, tokens, max_error)
    return found, exact(seed) if found.is_exact else planned(found.layers, seed=seed, max_error=max_error)


def profile_of(model: Model, file: Path | None, progress: Progress) -> Profile:
    """``file``, or the model's own, which is measured where there is none. Of a file the errors must belong
    to the model; where its times come from another machine, that is told. ModelError."""
    if file is None:
        return profile_for(model, default_cache_dir(), progress)
    profile, here = load(file), stamp_of(model)
    held = profile.stamp
    if (held.fingerprint, held.dtype) != (here.fingerprint, here.dtype):
        raise ModelError(
            f"profile {file} was measured with other weights ({held.model!r}, {held.dtype}) than "
            f"{model.info.name!r} ({here.dtype}): give the profile of this model"
        )
    for name in ("device", "processor", "threads", "torch"):
        if getattr(held, name) != getattr(here, name):
            progress(f"the profile's times are of {name} {getattr(held, name)}, not {getattr(here, name)}")
    return profile


def refuse_cut_chunks(choices: Iterable[Choice], chunk_tokens: int) -> None:
    """ValueError where chunks would cut what must be read whole."""
    for choice in choices:
        multiple = choice.params.chunk_multiple()
        if chunk_tokens % multiple:
            raise ValueError(
                f"--chunk-tokens {chunk_tokens}: {choice.backend} is read in multiples of {multiple} rows: "
                f"give {-(-chunk_tokens // multiple) * multiple}, or 0"
            )
