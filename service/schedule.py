"""What the scheduling policy looks at: one sequence, one step, the limits, a refusal. Plain data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

Lane = Literal["short", "long"]

CHUNK_MULTIPLE = 128
"""Chunks end at absolute multiples of this, or of the query tile of a backend that selects by tiles: where
other requests left it less room, its result would move with them otherwise."""
MAX_PASSED_STEPS = 8
AGE_S = 10.0
"""Waiting so long is worth one point of priority."""

SLACK = 0.25
"""A deadline presses where what is left of a long prompt could take so much longer than predicted and just
meet it."""

Price = Callable[[int, int], float]
"""(start, tokens) -> predicted ms of that slice alone; from the end of the prompt on: of one decoded token.
No smaller for more tokens."""


def served_name(model: str) -> str:
    """The served model behind one that was made for a single request: ``"name (diagnose)"`` -> ``"name"``.
    Names of served models have no spaces."""
    return model.partition(" ")[0]


class Unpriced(Exception):
    """What an entry's next tokens take cannot be told: its request fails, and nothing was decided."""

    def __init__(self, entry: Entry) -> None:
        super().__init__(f"a price of request {entry.job} failed")
        self.entry = entry


Claim = tuple[float, float, float, int]
Turn = tuple[float, float, float, float, float, int]


def no_price(start: int, tokens: int) -> float:
    """Nothing is known about costs: steps are bounded by their tokens alone."""
    return 0.0


@dataclass(slots=True, eq=False)
class Entry:
    """One sequence as the policy sees it. ``tokens`` are the prompt's, ``read`` how many are read (above
    0 from the start where a cache holds a beginning of the prompt)."""

    key: int
    job: str
    model: str
    tokens: int
    chunkable: bool
    bytes: int
    price: Price = no_price
    arrived: float = 0.0
    waits_since: float = field(default=0.0, init=False)
    """When it arrived, or last had a part in a step: from then on it ages."""
    priority: int = 0
    """Larger goes first."""
    output_bytes: int = 0
    """Of ``bytes``: what stays after it has been read, until its whole request ends."""
    deadline: float | None = None
    queue_deadline: float | None = None
    """When waiting must end although running might go on (a client's own read timeout)."""
    chunk_multiple: int = CHUNK_MULTIPLE
    places: int = 1
    """Sequences that hold a cache from step to step: the choices that decode from this prompt. 0 for what is
    read whole and leaves no cache (an encoder's input)."""
    read: int = 0
    decoding: bool = False
    dropped: bool = False
    solo: bool = False
    """A step that it shared has failed: it runs alone next, so that a guilty one fails alone."""
    lane: Lane = field(default="short", init=False)
    cost_ms: float = field(default=0.0, init=False)
    """Predicted for the whole rest of the prompt when it was admitted."""
    read_before: int = field(default=0, init=False)
    """How much of the prompt the cache held then."""
    begun: bool = field(default=False, init=False)
    """In a long step that is not over."""
    passed_steps: int = field(default=0, init=False)
    """Steps in which it got nothing while one behind it did, or while it stood first."""
    decoded: int = field(default=0, init=False)
    last_served: int = field(default=0, init=False)
    """A count that grows with every part of every step."""

    @property
    def due(self) -> bool:
        return self.passed_steps >= MAX_PASSED_STEPS

    @property
    def left(self) -> int:
        """Prompt tokens still to be read."""
        return self.tokens - self.read

    @property
    def lane_now(self) -> Lane:
        """Decoding is short work whatever the prompt was."""
        return "short" if self.decoding else self.lane

    def __post_init__(self) -> None:
        self.waits_since = self.arrived

    @property
    def left_ms(self) -> float:
        """About what the rest of the prompt takes."""
        return self.cost_ms * self.left / max(self.tokens - self.read_before, 1)

    def ms(self, start: int, tokens: int) -> float:
        """The price of a slice. Unpriced where it raises, or is no number that sums can hold."""
        try:
            ms = self.price(start, tokens)
        except Exception as error:
            raise Unpriced(self) from error
        if not 0 <= ms < math.inf:
            raise Unpriced(self) from ValueError(f"the price of {tokens} tokens from {start} on is {ms} ms")
        return ms

    def points(self, now: float) -> int:
        """Effective priority: one point more for every ``AGE_S`` since it last began or went on waiting."""
        return self.priority + math.floor(max(now - self.waits_since, 0.0) / AGE_S)

    def claim(self, now: float) -> Claim:
        """What sorts entries by their right to memory and places: effective priority, then deadline, then
        arrival."""
        return -self.points(now), math.inf if self.deadline is None else self.deadline, self.arrived, self.key

    def turn(self, now: float) -> Turn:
        """What sorts entries for a step: as their claims, but a deadline that leaves little slack goes before
        others, and long prompts then go by what is left of them: a chapter does not wait for a library."""
        points, deadline, arrived, key = self.claim(now)
        left_ms = self.left_ms if self.lane == "long" else 0.0
        pressing = deadline if 0 <= deadline - now - left_ms / 1000 < SLACK * left_ms / 1000 else math.inf
        return points, pressing, left_ms, deadline, arrived, key

    def changes_at(self, now: float) -> list[float]:
        """When its claim or its turn may change from now on, should nothing happen to it but waiting; some
        moments may have passed."""
        points = max(now - self.waits_since, 0.0) // AGE_S
        moments = [self.waits_since + AGE_S * k for k in (points, points + 1) if k > 0]
        if self.deadline is not None and self.lane == "long":
            left_s = self.left_ms / 1000
            moments += [self.deadline - left_s - SLACK * left_s, self.deadline - left_s]
        return moments


@dataclass(frozen=True, eq=False)
class Step:
    """``parts``: each entry with the number of tokens it advances by. A ``long`` one can be left and gone on
    with."""

    model: str
    parts: tuple[tuple[Entry, int], ...]
    long: bool = False
    predicted_ms: float = 0.0
    reading_ms: float = 0.0
    """Share of ``predicted_ms`` that reads prompts."""
    lent_ms: float = 0.0
    """Share of a short step that reads prompts of the long lane."""

    @property
    def tokens(self) -> int:
        return sum(tokens for _, tokens in self.parts)

    @property
    def abandoned(self) -> bool:
        """Nobody waits for its results any more."""
        return all(entry.dropped for entry, _ in self.parts)

    @property
    def long_share(self) -> float:
        """Of its time: on the account of the long lane."""
        if self.long:
            return 1.0
        return self.lent_ms / self.predicted_ms if self.predicted_ms > 0 else 0.0


@dataclass(frozen=True)
class Limits:
    """The numbers that admission and steps are checked against."""

    max_queue_requests: int
    max_queue_tokens: int
    max_queue_ms: float
    """Predicted work that may wait."""
    max_running: int
    step_tokens: int
    step_ms: float
    """Predicted time that a short step is filled to."""
    prefill_chunk_tokens: int
    short_ms: float
    """A prompt that is predicted to take longer goes into the long lane."""
    short_weight: float
    """Share of the short lane where both lanes have work; the long lane's is 1."""
    memory_bytes: int


class Rejected(Exception):
    """Not admitted: ``reason`` is queue_full, token_budget, cost_budget (ms), too_many_tokens,
    too_many_places or never_fits (bytes)."""

    def __init__(self, reason: str, *, value: int, limit: int, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.value = value
        self.limit = limit
        self.retry_after_s = retry_after_s
