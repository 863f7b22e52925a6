"""How fast the queue drains, measured: prompt tokens per second of engine time, recent steps weighing
more."""

from __future__ import annotations

HALF_LIFE_S = 30.0
MIN_RETRY_S = 1.0
MAX_RETRY_S = 120.0
"""OpenAI's SDK does not wait longer than this."""


class DrainRate:
    """A decaying ratio of tokens to seconds."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        keep = 0.5 ** (seconds / HALF_LIFE_S)
        self._tokens = self._tokens * keep + tokens
        self._seconds = self._seconds * keep + seconds

    @property
    def tokens_per_s(self) -> float | None:
        """None before anything was measured."""
        return self._tokens / self._seconds if self._tokens > 0 and self._seconds > 0 else None

    def seconds_for(self, tokens: float) -> float:
        """Time to drain ``tokens``, within what a client can be asked to wait."""
        rate = self.tokens_per_s
        seconds = tokens / rate if rate else MIN_RETRY_S
        return min(max(seconds, MIN_RETRY_S), MAX_RETRY_S)
