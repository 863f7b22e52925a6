"""What the engine tells of its steps, for metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from service.schedule import Lane, Step, served_name


@dataclass(frozen=True)
class StepSeen:
    """What a step that is done was, for metrics. ``seconds`` are those it ran; a long one was left ``pauses``
    times."""

    model: str
    requests: int
    tokens: int
    seconds: float
    predicted_ms: float = 0.0
    long: bool = False
    pauses: int = 0


@dataclass(frozen=True)
class TimeSeen:
    """Seconds that the engine spent on a step at a stretch, whatever became of it, by the lane on whose
    account they are; ``left``: to be gone on with."""

    model: str
    seconds: Mapping[Lane, float]
    left: bool


def time_seen(step: Step, seconds: float, *, left: bool) -> TimeSeen:
    """Pieces of long prompts that a short step reads are on the long lane's account."""
    long_s = seconds * step.long_share
    return TimeSeen(served_name(step.model), {"short": seconds - long_s, "long": long_s}, left)
