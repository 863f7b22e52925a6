"""A model's calibrated profile: what each attention costs and loses in each layer, by length.

``models.calibrate`` measures one and ``models.auto`` plans with it. A profile is frozen and versioned, and
belongs to the weights, the machine and the torch release it was measured with: with others its times, and
with other weights its errors, say nothing. Errors hold on other machines as well: where ``made.times`` is
given they come from one (``models.calibrate_times``).

Version 2 has ``made.times``; a file of version 1 is one without.

Figures by length are tuples in the order of ``Profile.lengths``. The error is that of
``models.quality_error``: |(o^ - o) W_O| / |o W_O| over all rows of a layer, along exact's own trajectory.
"""

from __future__ import annotations

import json
import os
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.contract import ModelError

SCHEMA_VERSION: Literal[2] = 2
READ_VERSIONS = (1, SCHEMA_VERSION)
EXACT = "exact"

Nonnegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class Stamp(_Part):
    """What the figures belong to. ``fingerprint`` of weights and configuration
    (``models.profile_stamp.fingerprint``)."""

    model: str
    fingerprint: str
    dtype: str
    device: str
    processor: str
    threads: int
    torch: str


class Text(_Part):
    """A text that documents were cut from; ``sha256`` of its UTF-8 bytes."""

    name: str
    sha256: str


class Times(_Part):
    """Where the times of a profile come from whose errors were measured elsewhere (with ``errors_from``):
    this machine, on ``texts`` at ``tokens`` and on the inputs of ``layers``. At the other lengths and in the
    other layers times are those of the errors' machine, raised or lowered as they were found to be here."""

    errors_from: Stamp
    date: str
    seconds: Nonnegative
    texts: tuple[Text, ...]
    tokens: Annotated[tuple[Count, ...], Field(min_length=1)]
    layers: Annotated[tuple[int, ...], Field(min_length=1)]


class Made(_Part):
    """How and when it was measured: everything, or errors alone where ``times`` says where those come
    from."""

    command: str
    date: str
    seconds: Nonnegative
    chunk_tokens: int
    seed: int
    texts: tuple[Text, ...]
    times: Times | None = None


class Length(_Part):
    """One calibrated length: the documents measured, and where exact's time goes while it reads one:
    ``attention_ms`` in the layers to which a choice applies, together, and ``rest_ms`` in everything else."""

    tokens: Count
    documents: Count
    attention_ms: Positive
    rest_ms: Nonnegative


class Rung(_Part):
    """One attention in one layer. Of its error over documents, by length: ``median``, ``p95`` (the smallest
    error that 95 % of the documents keep: the largest one for fewer than 20) and ``max``; ``time_share`` of
    exact's attention time, selection included. ``spread``: standard deviation of its ln(error) from document
    to document, within a layer, pooled over all layers; None where nothing can be said of it."""

    backend: str
    params: dict[str, Any]
    median: tuple[Nonnegative, ...]
    p95: tuple[Nonnegative, ...]
    max: tuple[Nonnegative, ...]
    spread: tuple[Nonnegative | None, ...]
    time_share: tuple[Positive, ...]

    @property
    def is_exact(self) -> bool:
        return self.backend == EXACT

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for median, p95, most in zip(self.median, self.p95, self.max, strict=False):
            if not median <= p95 <= most:
                raise ValueError(f"median <= p95 <= max does not hold for {median}, {p95}, {most}")
        return self


class Ladder(_Part):
    """The rungs of one layer from cheap to dear (at the longest length); the last is exact."""

    layer: Annotated[int, Field(ge=0)]
    rungs: tuple[Rung, ...]

    @model_validator(mode="after")
    def _ends_in_exact(self) -> Self:
        exact = [place for place, rung in enumerate(self.rungs) if rung.is_exact]
        if exact != [len(self.rungs) - 1]:
            raise ValueError(f"the rungs of layer {self.layer} do not end in exact")
        return self


class Profile(_Part):
    """The whole."""

    schema_version: Literal[1, 2] = SCHEMA_VERSION
    stamp: Stamp
    made: Made
    lengths: Annotated[tuple[Length, ...], Field(min_length=1)]
    layers: Annotated[tuple[Ladder, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.schema_version == 1 and self.made.times is not None:
            raise ValueError("a profile of schema version 1 has no made.times")
        for one, next_one in pairwise(self.lengths):
            if one.tokens >= next_one.tokens:
                raise ValueError(f"lengths do not ascend: {one.tokens} before {next_one.tokens}")
        for above, below in pairwise(self.layers):
            if above.layer >= below.layer:
                raise ValueError(f"layers do not ascend: {above.layer} before {below.layer}")
        for ladder in self.layers:
            for rung in ladder.rungs:
                figures = (rung.median, rung.p95, rung.max, rung.spread, rung.time_share)
                if any(len(each) != len(self.lengths) for each in figures):
                    raise ValueError(
                        f"{rung.backend} in layer {ladder.layer} has no figure for each of the "
                        f"{len(self.lengths)} lengths"
                    )
        return self


def save(profile: Profile, file: Path) -> None:
    """Write it; an interruption leaves a former file whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    part.write_text(profile.model_dump_json() + "\n", encoding="utf-8")
    os.replace(part, file)


def load(file: Path, stamp: Stamp | None = None) -> Profile:
    """Read a profile; with ``stamp`` only one that was measured with that model on that machine. ModelError
    says what differs, and what to do."""
    profile = _parse(file)
    if stamp is not None:
        _refuse_other(file, profile.stamp, stamp)
    return profile


def profile_file(cache_dir: Path, stamp: Stamp) -> Path:
    """Where the profile of a model on this machine is kept. What was measured elsewhere, or with another
    torch or dtype, has a file of its own: nothing takes its place."""
    name = "".join(c if c.isalnum() or c in "._-" else "-" for c in stamp.model)
    place = stamp.model_dump_json(exclude={"model", "fingerprint"})
    told = (stamp.fingerprint[:12], stamp.device.partition(":")[0], sha256(place.encode()).hexdigest()[:8])
    return cache_dir / "profiles" / f"{'-'.join((name, *told))}.json"


def _parse(file: Path) -> Profile:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"profile {file} cannot be read: {error}. {_ADVICE}") from None
    try:
        version = json.loads(text).get("schema_version")
    except (ValueError, AttributeError):
        raise ModelError(f"{file} is no profile: it holds no JSON object. {_ADVICE}") from None
    if version not in READ_VERSIONS:
        read = " and ".join(map(str, READ_VERSIONS))
        raise ModelError(f"profile {file} has schema version {version}, this release reads {read}. {_ADVICE}")
    try:
        return Profile.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise ModelError(f"profile {file} is damaged: {place}: {first['msg']}. {_ADVICE}") from None


def _refuse_other(file: Path, held: Stamp, wanted: Stamp) -> None:
    told = [
        f"{_TOLD.get(name, name)} {getattr(held, name)} there, {getattr(wanted, name)} here"
        for name in Stamp.model_fields
        if name != "model" and getattr(held, name) != getattr(wanted, name)
    ]
    if told:
        raise ModelError(
            f"profile {file} ({held.model!r}) was measured with something else: {'; '.join(told)}. {_ADVICE}"
        )


_TOLD = {"fingerprint": "weights and configuration", "torch": "torch release"}
_ADVICE = "Measure a new one: longreach calibrate MODEL TEXT"
