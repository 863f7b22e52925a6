"""One client request inside the engine: its sequences, its clock times, and the channel its events travel
on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Literal

from models.contract import ServedModel
from service.errors import ApiError
from service.measured import Cause, Measured
from service.schedule import Entry
from service.sequences import GenerateSequence, Sequence, TokenOut

Stage = Literal["queued", "running"]
Event = TokenOut | ApiError | None
"""A token, the error that ended the request, or None: all its sequences are complete."""


class Channel:
    """Events from the engine thread to the event loop that created it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def put(self, events: Items[Event]) -> None:
        """From any thread. A loop that is gone has nobody to tell."""
        put_all([(self, events)])

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def put_here(self, events: Items[Event]) -> None:
        """On the event loop."""
        for event in events:
            self._events.put_nowait(event)

    async def next(self) -> TokenOut | None:
        """The next token; None where the request is complete. ApiError where it failed."""
        event = await self._events.get()
        if isinstance(event, ApiError):
            raise event
        return event


def put_all(told: Items[tuple[Channel, Items[Event]]]) -> None:
    """``Channel.put`` for many channels, which wakes their event loop once: woken for each, it would fight
    for the interpreter with a step that is not over yet."""

    def put() -> None:
        for channel, events in told:
            channel.put_here(events)

    if told:
        with contextlib.suppress(RuntimeError):  # what call_soon_threadsafe raises on a closed loop
            told[0][0].loop.call_soon_threadsafe(put)


@dataclass
class Times:
    """Seconds on the engine's monotonic clock."""

    arrival: float
    submitted: float = 0.0
    first_step: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    ended: float | None = None
    token_gaps: list[float] = field(default_factory=list)


@dataclass
class Memory:
    """What the request held at its high-water mark, where its steps can say: one of them at least must have
    been measured, and none shared with another request."""

    estimated_bytes: int = 0
    exact_bytes: int = 0
    _peak: int = 0
    _measured: bool = False
    _shared: bool = False

    def share(self) -> None:
        """A step has run that was not this request's alone."""
        self._shared = True

    def note(self, held_before: int, held_after: int, step_bytes: int | None) -> None:
        """A step of its own has run: bytes held before and after it, and what it took itself (None: not
        measured)."""
        self._measured = self._measured or step_bytes is not None
        self._peak = max(self._peak, held_after, held_before + (step_bytes or 0))

    @property
    def peak_bytes(self) -> int | None:
        return self._peak if self._measured and not self._shared else None


@dataclass(eq=False)
class Job:
    """``stream`` sends tokens as they come; without it only the end is told."""

    id: str
    model: ServedModel
    sequences: Items[Sequence]
    channel: Channel
    times: Times
    memory: Memory = field(default_factory=Memory)
    stream: bool = False
    priority: int = 0
    """Larger goes first, -10 to 10."""
    deadline: float | None = None
    queue_deadline: float | None = None
    teaches: bool = True
    """Whether the cost model learns from its steps: not from first use."""
    entries: Items[Entry] = ()
    """What the scheduler will see of it, where it has been prepared."""
    timers: list[asyncio.TimerHandle] = field(default_factory=list)
    """Wake-ups at the deadlines, belonging to the event loop."""
    batch_requests: int = 0
    batch_tokens: int = 0
    ended: bool = False
    error: ApiError | None = None
    measured: Measured = field(default_factory=Measured)
    """How wrong its attention was, once it is over and somebody has asked its meters."""
    verify_cause: Cause = "asked"
    """Why it has meters, where it has any."""

    @property
    def stage(self) -> Stage:
        return "queued" if self.times.first_step is None else "running"

    @property
    def complete(self) -> bool:
        return all(sequence.finished for sequence in self.sequences)

    @property
    def held_bytes(self) -> int:
        return sum(sequence.held_bytes for sequence in self.sequences)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that the cache held; a prompt with several choices counts once."""
        return sum(sequence.cached_tokens for sequence in self.sequences)

    def note_token(self, now: float) -> None:
        if self.times.first_token is None:
            self.times.first_token = now
        elif self.times.last_token is not None and len(self.sequences) == 1:
            self.times.token_gaps.append(now - self.times.last_token)
        self.times.last_token = now


def leads(sequence: Sequence) -> bool:
    """Whether it reads its prompt itself."""
    return not isinstance(sequence, GenerateSequence) or sequence.leader is None


def groups_of(job: Job) -> list[list[Sequence]]:
    """The sequences of each input: the one that reads it, then the choices that follow it."""
    groups: dict[Sequence, list[Sequence]] = {}
    for sequence in job.sequences:
        leader = sequence.leader if isinstance(sequence, GenerateSequence) else None
        groups.setdefault(leader or sequence, []).append(sequence)
    return list(groups.values())
