"""What runs in the next step: pure policy over plain objects, the clock passed in. No torch, no asyncio, no
locks.

A step serves one model and is filled to a token budget: one token for every decoding sequence, then chunks
of prompts that are being read, then new sequences in order of arrival. Bidirectional inputs cannot be
chunked: one that exceeds the budget runs alone, and shorter ones behind it may pass in at most
``MAX_PASSED_STEPS`` steps. The same bound holds for a sequence that waits for memory, and for one whose query
tile is larger than what others leave of the budget: after so many steps it reads before them. A prompt
already being read that got nothing in a step comes first in the next. So nothing starves. Models take turns
by the seconds that each has used."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from service.drain_rate import DrainRate

MAX_PASSED_STEPS = 8
CHUNK_MULTIPLE = 128
"""Chunks end at absolute multiples of this, or of the query tile of a backend that selects by tiles: where
other requests left it less room, its result would move with them otherwise."""


@dataclass(frozen=True)
class Limits:
    """The numbers that admission and steps are checked against."""

    max_queue_requests: int
    max_queue_tokens: int
    max_running: int
    step_tokens: int
    prefill_chunk_tokens: int
    memory_bytes: int


@dataclass(slots=True, eq=False)
class Entry:
    """One sequence as the policy sees it. ``tokens`` are the prompt's, ``read`` how many have been read."""

    key: int
    job: str
    model: str
    tokens: int
    chunkable: bool
    bytes: int
    deadline: float | None = None
    queue_deadline: float | None = None
    """When waiting must end although running might go on (a client's own read timeout)."""
    chunk_multiple: int = CHUNK_MULTIPLE
    read: int = 0
    decoding: bool = False
    dropped: bool = False
    passed_steps: int = 0
    """Steps in which it stood still: while it waits those in which one behind it read, once it runs those in
    which others took the whole budget."""

    @property
    def holds_cache(self) -> bool:
        """Keeps its place from step to step. What is read whole in one step holds nothing after it."""
        return self.chunkable


@dataclass(frozen=True)
class Step:
    """``parts``: each entry with the number of tokens it advances by."""

    model: str
    parts: tuple[tuple[Entry, int], ...]

    @property
    def tokens(self) -> int:
        return sum(tokens for _, tokens in self.parts)


class Rejected(Exception):
    """Not admitted: ``reason`` is queue_full, token_budget, too_many_tokens or never_fits."""

    def __init__(self, reason: str, *, value: int, limit: int, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.value = value
        self.limit = limit
        self.retry_after_s = retry_after_s


class Scheduler:
    """Waiting and running entries, the memory ledger, and the choice of the next step."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.rate = DrainRate()
        self._waiting: dict[int, Entry] = {}
        self._running: dict[int, Entry] = {}
        self._used_s: dict[str, float] = {}

    @property
    def reserved_bytes(self) -> int:
        return sum(entry.bytes for entry in self._running.values())

    def waiting(self, model: str | None = None) -> tuple[int, int]:
        """(requests, tokens) that wait, of one model or of all."""
        entries = [entry for entry in self._waiting.values() if model in (None, entry.model)]
        return len({entry.job for entry in entries}), sum(entry.tokens for entry in entries)

    def running(self, model: str) -> int:
        """Requests of a model that hold a place."""
        return len({entry.job for entry in self._running.values() if entry.model == model})

    def check_room(self, requests: int = 1, tokens: int = 0) -> None:
        """Rejected where ``requests`` more with ``tokens`` in all would overfill the queue."""
        queued_requests, queued_tokens = self.waiting()
        if tokens > self.limits.max_queue_tokens:
            raise Rejected("too_many_tokens", value=tokens, limit=self.limits.max_queue_tokens)
        wait_s = self.rate.seconds_for(queued_tokens / 2)
        if queued_requests + requests > self.limits.max_queue_requests:
            limit = self.limits.max_queue_requests
            raise Rejected("queue_full", value=queued_requests, limit=limit, retry_after_s=wait_s)
        if queued_tokens + tokens > self.limits.max_queue_tokens:
            limit = self.limits.max_queue_tokens
            raise Rejected("token_budget", value=queued_tokens, limit=limit, retry_after_s=wait_s)

    def admit(self, entries: Sequence[Entry]) -> None:
        """Queue all entries of one request, or none of them (Rejected)."""
        largest = max(entry.bytes for entry in entries)
        if largest > self.limits.memory_bytes:
            raise Rejected("never_fits", value=largest, limit=self.limits.memory_bytes)
        self.check_room(1, sum(entry.tokens for entry in entries))
        for entry in entries:
            self._catch_up(entry.model)
            self._waiting[entry.key] = entry

    def drop(self, job: str) -> None:
        """Forget a request: what waits leaves at once, what runs is never planned again and keeps its bytes
        until ``release``."""
        for key in [key for key, entry in self._waiting.items() if entry.job == job]:
            del self._waiting[key]
        for entry in self._running.values():
            entry.dropped = entry.dropped or entry.job == job

    def release(self, entry: Entry) -> None:
        """A running entry has ended and its memory is free."""
        self._running.pop(entry.key, None)

    def expired(self, now: float) -> list[tuple[str, str]]:
        """(request, stage) of every request whose deadline has passed."""
        found: dict[str, str] = {}
        started = {entry.job for entry in self._running.values() if not entry.dropped}
        for entry in self._entries():
            running = entry.job in started
            limits = (entry.deadline,) if running else (entry.deadline, entry.queue_deadline)
            if any(limit is not None and limit <= now for limit in limits):
                found[entry.job] = "running" if running else "queued"
        return list(found.items())

    def advance(self, step: Step, seconds: float) -> None:
        """A step has run: prompts have been read, the model is charged."""
        self._used_s[step.model] = self._used_s.get(step.model, 0.0) + seconds
        read = 0
        for entry, tokens in step.parts:
            if not entry.decoding:
                entry.read += tokens
                read += tokens
        self.rate.observe(read, seconds)

    def plan(self) -> Step | None:
        """The next step, its new entries moved to running; None where nothing can run."""
        models = {entry.model for entry in self._entries()}
        for model in sorted(models, key=lambda name: (self._used_s.get(name, 0.0), name)):
            parts = self._fill(model)
            if parts:
                return Step(model, tuple(parts))
        return None

    def _entries(self) -> Iterator[Entry]:
        yield from (entry for entry in self._running.values() if not entry.dropped)
        yield from self._waiting.values()

    def _catch_up(self, model: str) -> None:
        """A model that was idle starts level with the others: its idle time is not a credit."""
        active = {entry.model for entry in self._entries()}
        if model not in active:
            floor = min((self._used_s.get(name, 0.0) for name in active), default=0.0)
            self._used_s[model] = max(self._used_s.get(model, 0.0), floor)

    def _fill(self, model: str) -> list[tuple[Entry, int]]:
        mine = [entry for entry in self._running.values() if entry.model == model and not entry.dropped]
        parts = [(entry, 1) for entry in mine if entry.decoding]
        budget = self.limits.step_tokens - len(parts)
        reading: list[tuple[Entry, int]] = []
        for entry in self._readers(model, mine):
            tokens = self._chunk(entry, budget, must_read=not reading)
            if tokens:
                reading.append((entry, tokens))
                budget -= tokens
            entry.passed_steps = 0 if tokens else entry.passed_steps + 1
        return [*parts, *reading, *self._start(model, budget, reading, alone=not parts and not reading)]

    def _readers(self, model: str, mine: list[Entry]) -> list[Entry]:
        """Who is read on, in the order in which the budget is offered. A waiting entry that was passed too
        often begins ahead of them, unless one of them stood still as long."""
        readers = [entry for entry in mine if not entry.decoding]
        readers.sort(key=lambda entry: -entry.passed_steps)
        if readers and readers[0].passed_steps < MAX_PASSED_STEPS:
            overdue = self._overdue(model)
            if overdue is not None:
                self._running[overdue.key] = self._waiting.pop(overdue.key)
                return [overdue, *readers]
        return readers

    def _overdue(self, model: str) -> Entry | None:
        """The first chunkable entry that was passed too often, where a place and memory are free for it."""
        places = self.limits.max_running - sum(entry.holds_cache for entry in self._running.values())
        for entry in self._waiting.values():
            if entry.passed_steps < MAX_PASSED_STEPS:
                continue
            if self.reserved_bytes + entry.bytes > self.limits.memory_bytes:
                return None
            if entry.model == model and entry.chunkable and places > 0:
                return entry
        return None

    def _start(
        self, model: str, budget: int, reading: list[tuple[Entry, int]], alone: bool
    ) -> list[tuple[Entry, int]]:
        """New entries in order of arrival, as far as places, memory and budget allow beside those
        ``reading``."""
        started: list[tuple[Entry, int]] = []
        passed: list[Entry] = []
        reserved = self.reserved_bytes
        places = self.limits.max_running - sum(entry.holds_cache for entry in self._running.values())
        long: Entry | None = None
        for entry in self._waiting.values():
            if entry.holds_cache and places <= 0:
                continue
            blocked = reserved + entry.bytes > self.limits.memory_bytes
            patient = entry.passed_steps < MAX_PASSED_STEPS
            if blocked and not patient:
                break
            if entry.model != model:
                continue
            if blocked:
                passed.append(entry)
                continue
            if self._is_long(entry):
                if long is None and alone and not started:
                    long = entry
                    if not patient:
                        break
                passed.append(entry)
                continue
            tokens = self._chunk(entry, budget, must_read=not reading and not started)
            if not tokens:
                passed.append(entry)
                if budget <= 0 or not patient:
                    break
                continue
            started.append((entry, tokens))
            reserved += entry.bytes
            places -= entry.holds_cache
            budget -= tokens
        if long is not None and not started:
            started.append((long, long.tokens))
        self._note_passed(passed, [*reading, *started])
        for entry, _ in started:
            entry.passed_steps = 0
            self._running[entry.key] = self._waiting.pop(entry.key)
        return started

    def _note_passed(self, passed: list[Entry], reading: list[tuple[Entry, int]]) -> None:
        last = max((entry.key for entry, _ in reading), default=-math.inf)
        for entry in passed:
            if entry.key < last:
                entry.passed_steps += 1

    def _is_long(self, entry: Entry) -> bool:
        return not entry.chunkable and entry.tokens > self.limits.step_tokens

    def _chunk(self, entry: Entry, budget: int, must_read: bool) -> int:
        """Tokens that ``entry`` may read now. The first reader of a step always advances."""
        left = entry.tokens - entry.read
        if not entry.chunkable:
            return left if left <= budget or must_read else 0
        multiple = entry.chunk_multiple
        tokens = min(left, budget, max(self.limits.prefill_chunk_tokens, multiple))
        if tokens < left:
            tokens = (entry.read + max(tokens, 0)) // multiple * multiple - entry.read
        if tokens <= 0:
            return min(left, multiple) if must_read else 0
        return tokens
