"""A sign of life of the engine thread, noted at every place where a step may stop."""

from __future__ import annotations

from collections.abc import Callable


class Heartbeat:
    """Written by the engine thread, read from any."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._at: float | None = None

    def beat(self) -> float:
        """The step that runs is alive. Returns the time."""
        now = self._clock()
        self._at = now
        return now

    def rest(self) -> None:
        """No step runs, so none can hang."""
        self._at = None

    def age(self, now: float) -> float:
        """Seconds since the last sign of the step that runs; 0 where none runs."""
        at = self._at
        return 0.0 if at is None else max(now - at, 0.0)
