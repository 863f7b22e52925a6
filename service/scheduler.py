"""What runs next: pure policy over plain objects, the clock passed in. No torch, no asyncio, no locks.

Two lanes share the time by weight: short prompts and every decoded token in one, prompts that take long to
read in the other. A step serves one model; models take turns by the time that they used. A short step is
filled to a predicted time. A long step can be left for short work and gone on with; a model has at most one.

Within a lane the order is effective priority, deadline, arrival, and nothing starves: priority grows with
waiting, and what was passed over ``MAX_PASSED_STEPS`` times (for memory, places, or the room that its
smallest piece needs) goes first, and keeps memory and places from those behind it (from long prompts alone
while it must wait for a long prompt that runs)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from service.admission import Admission
from service.begun import Begun
from service.drain_rate import DrainRate
from service.ledger import Ledger
from service.long_steps import LongSteps
from service.planner import Draft, Planner
from service.queue import Queue
from service.schedule import (
    AGE_S,
    CHUNK_MULTIPLE,
    MAX_PASSED_STEPS,
    Entry,
    Lane,
    Limits,
    Price,
    Rejected,
    Step,
    no_price,
)
from service.turns import LONG_SLICE_MS, Turns

__all__ = [
    "AGE_S",
    "CHUNK_MULTIPLE",
    "LONG_SLICE_MS",
    "MAX_PASSED_STEPS",
    "Entry",
    "Lane",
    "Limits",
    "Price",
    "Rejected",
    "Scheduler",
    "Step",
    "no_price",
]


class Scheduler:
    """Waiting and running entries, the memory ledger, and the choice of the next step."""

    def __init__(self, limits: Limits, fixed_ms: Callable[[str], float] = lambda model: 0.0) -> None:
        """``fixed_ms``: what a step of a model takes before its first token."""
        self.limits = limits
        self.rate = DrainRate()
        self._ledger = Ledger(limits)
        self._admission = Admission(self._ledger, self.rate)
        self._planner = Planner(self._ledger, fixed_ms)
        self._turns = Turns(limits.short_weight)
        self._begun = Begun()
        self._long = LongSteps(self._ledger, self._planner, self._turns, self._begun)
        self._served = 0
        self._stale = True
        self._short_ready = False
        self._others_ready: list[str] = []

    @property
    def reserved_bytes(self) -> int:
        return self._ledger.reserved_bytes

    @property
    def begun(self) -> tuple[Step, ...]:
        """Long steps that are not over."""
        return self._begun.steps

    def waiting(self, model: str | None = None) -> tuple[int, int]:
        """(requests, tokens) that wait, of one model or of all."""
        return self._ledger.num_waiting(model)

    def waiting_ms(self, lane: Lane | None = None) -> float:
        """Predicted time of the reading that waits, in one lane or in all."""
        return self._ledger.waiting_ms(lane)

    def running(self, model: str) -> int:
        """Requests of a model that hold memory."""
        return len({entry.job for entry in self._ledger.running.values() if entry.model == model})

    def check_room(self, requests: int = 1, tokens: int = 0, cost_ms: float = 0.0) -> None:
        """Rejected where ``requests`` more, of so many tokens and ms in all, would overfill the queue."""
        self._admission.check_room(requests, tokens, cost_ms)

    def admit(self, entries: Sequence[Entry]) -> None:
        """Queue all entries of one request, or none of them (Rejected, Unpriced)."""
        self._admission.admit(entries)
        self._stale = True

    def fork(self, leader: Entry, followers: Sequence[Entry]) -> None:
        """``followers`` have read what the running ``leader`` has, and decode from now on; they take even
        parts of its bytes and places."""
        if leader.key not in self._ledger.running:
            raise ValueError("only a running sequence can be forked")
        count = len(followers) + 1
        bytes_each, places_each = leader.bytes // count, leader.places // count
        for entry in followers:
            entry.bytes, entry.places, entry.read = bytes_each, places_each, entry.tokens
            entry.lane = leader.lane
            entry.decoding, entry.dropped = True, entry.dropped or leader.dropped
            self._ledger.start(entry)
        leader.bytes -= bytes_each * len(followers)
        leader.places -= places_each * len(followers)
        self._stale = True

    def found(self, entry: Entry, tokens: int) -> None:
        """The cache holds so many tokens of a prompt whose first step begins, more or fewer than when it was
        admitted. One that has become long leaves the short lane; a begun long step stays one."""
        entry.read = tokens
        if entry.lane == "short":
            self._admission.price(entry)
            self._stale = True

    def drop(self, job: str) -> None:
        """Forget a request: what waits leaves at once, what runs is never planned again and keeps its bytes
        until ``release``."""
        self._ledger.drop(job)
        self._stale = True

    def release(self, entry: Entry, *, keeps_output: bool = False) -> None:
        """A running entry has ended and its memory is free; with ``keeps_output``, but for its output, which
        stays until its request is dropped."""
        self._ledger.end(entry, keeps_output=keeps_output)
        self._planner.forget(entry)
        self._stale = True
        step = self._begun.of(entry) if entry.begun else None
        entry.begun = False
        if step is not None and not any(part.begun for part, _ in step.parts):
            self._begun.end(step)

    def abandoned(self, step: Step) -> bool:
        """Nobody waits for its results any more: give it up (``failed``)."""
        return step.abandoned

    def expired(self, now: float) -> list[tuple[str, str]]:
        """(request, stage) of every request whose deadline has passed."""
        found: dict[str, str] = {}
        started = {entry.job for entry in self._ledger.running.values() if not entry.dropped}
        for entry in self._ledger.alive():
            running = entry.job in started
            limits = (entry.deadline,) if running else (entry.deadline, entry.queue_deadline)
            if any(limit is not None and limit <= now for limit in limits):
                found[entry.job] = "running" if running else "queued"
        return list(found.items())

    def remove_model(self, model: str) -> None:
        """It leaves service: forget the time that it used."""
        self._turns.forget(model)

    def plan(self, now: float) -> Step | None:
        """The next step: a new one, its entries moved to running, or a long one to go on with (the same
        object). None where nothing can run. Unpriced, and nothing decided, where an entry's price fails:
        ``drop`` its request and ask again."""
        queue = self._ledger.queue(now)
        short, long = self._short(queue), self._long.next(queue)
        self._stale, self._short_ready = False, short is not None
        self._level(short is not None, long is not None)
        if long is None or (short is not None and self._turns.short_due):
            return None if short is None else self._decide(short, now)
        self._others_ready = self._long.others(long.model, queue)
        self._turns.start_slice(long.model, now)
        if isinstance(long, Draft):
            return self._decide(long, now)
        self._long.look(long.model, queue)
        return long

    def resumed(self, step: Step, now: float) -> None:
        """A slice of a long step starts now (some time after it was planned, where its sequences had to be
        opened)."""
        self._turns.start_slice(step.model, now)

    def should_pause(self, step: Step, now: float) -> bool:
        """Whether the long step that runs must be left: its lane has had its share and short work could run,
        or its model has and another one's long work could, or a long step of clearly higher priority or much
        shorter could, or nobody wants it any more. Cheap unless something came or went since it was asked
        last."""
        self._begun.ran(step, self._turns.charge_slice(step.model, now))
        if self._stale:
            self._refresh(step, now)
        if self._short_ready and self._turns.short_due:
            return True
        if self._others_ready and self._turns.is_over(step.model, self._others_ready):
            return True
        return self._long.should_leave(step)

    def ran(self, step: Step, seconds: float) -> None:
        """A slice of a long step ran, and it was left."""
        self._begun.ran(step, self._turns.charge(step, seconds))
        self._read_until(step, self._begun.ran_ms(step), seconds)

    def advance(self, step: Step, seconds: float) -> None:
        """A step is done: prompts have been read. ``seconds`` of its last slice, where it was left before."""
        self._turns.charge(step, seconds)
        self._read_until(step, math.inf, seconds)
        self._end(step)
        if not step.long:
            self._planner.ran(step)
        for entry, tokens in step.parts:
            entry.solo = False
            if entry.decoding:
                entry.decoded += 1
            else:
                entry.read = min(entry.tokens, entry.read + tokens)

    def failed(self, step: Step, seconds: float) -> None:
        """A step raised or was given up: nothing has been read. Entries that shared it run alone next."""
        self._turns.charge(step, seconds)
        self._read_until(step, self._begun.ran_ms(step), seconds)
        self._end(step)
        for entry, _ in step.parts:
            entry.solo = len(step.parts) > 1

    def _read_until(self, step: Step, ms: float, seconds: float) -> None:
        """A step, or a slice of one, took ``seconds``, and so much of its reading is done by now: of a long
        step as much as it has run, so that the drain rate does not fall until it ends (or is given up: the
        machine is no slower for that)."""
        read_ms = min(ms, step.reading_ms)
        self.rate.observe(read_ms - self._begun.counted_ms(step), seconds)
        self._begun.count(step, read_ms)

    def _end(self, step: Step) -> None:
        self._stale = True
        if step.long:
            self._begun.end(step)
            for entry, _ in step.parts:
                entry.begun = False

    def _short(self, queue: Queue) -> Draft | None:
        """The short step to run next."""
        models = self._turns.order("short", self._ledger.models("short"))
        drafts = (self._planner.short(model, queue, self._turns.lendable_ms) for model in models)
        return next((draft for draft in drafts if draft is not None), None)

    def _level(self, short: bool, long: bool) -> None:
        lanes: dict[Lane, bool] = {"short": short, "long": long}
        self._turns.level_lanes(lane for lane, ready in lanes.items() if ready)

    def _refresh(self, step: Step, now: float) -> None:
        """Something came or went while a long step runs: what could run instead?"""
        queue = self._ledger.queue(now)
        self._short_ready = self._short(queue) is not None
        self._others_ready = self._long.others(step.model, queue)
        self._long.look(step.model, queue)
        self._stale = False
        self._level(self._short_ready, True)

    def _decide(self, draft: Draft, now: float) -> Step:
        """The draft becomes a step: what it starts holds its memory from now on."""
        step = draft.step()
        for entry in draft.passed:
            entry.passed_steps += 1
            self._ledger.waiting.passed(entry)
        for entry, _ in step.parts:
            self._served += 1
            self._ledger.start(entry)
            entry.last_served, entry.passed_steps = self._served, 0
            entry.waits_since, entry.begun = now, step.long
        if step.long:
            self._long.begin(step)
        return step
