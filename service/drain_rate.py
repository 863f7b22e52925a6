"""How fast the queue drains, measured: predicted milliseconds of reading that are done in a second of the
engine's busy time, recent steps weighing more. About 1000 where predictions are right and all the time goes
to reading."""

from __future__ import annotations

HALF_LIFE_S = 30.0
MIN_RETRY_S = 1.0
MAX_RETRY_S = 120.0
"""OpenAI's SDK does not wait longer than this."""


class DrainRate:
    """A decaying ratio of predicted ms to seconds."""

    def __init__(self) -> None:
        self._ms = 0.0
        self._seconds = 0.0

    def observe(self, ms: float, seconds: float) -> None:
        """The engine was busy for ``seconds``; ``ms`` of the work that was waiting are done."""
        keep = 0.5 ** (seconds / HALF_LIFE_S)
        self._ms = self._ms * keep + ms
        self._seconds = self._seconds * keep + seconds

    @property
    def ms_per_s(self) -> float | None:
        """None before anything was measured."""
        return self._ms / self._seconds if self._ms > 0 and self._seconds > 0 else None

    def seconds_for(self, ms: float) -> float:
        """Time to drain ``ms`` of predicted work, within what a client can be asked to wait."""
        rate = self.ms_per_s
        seconds = ms / rate if rate else MIN_RETRY_S
        return min(max(seconds, MIN_RETRY_S), MAX_RETRY_S)
