"""Whole runs of the scheduler against a machine that takes as long as predicted: random requests arrive, are
dropped, fork and fail, and every rule is checked at every step."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from service.begun import CLEARLY_HIGHER, MAX_BEGUN
from service.scheduler import (
    CHUNK_MULTIPLE,
    LONG_SLICE_MS,
    MAX_PASSED_STEPS,
    Entry,
    Limits,
    Rejected,
    Scheduler,
    Step,
)
from tests.service.plain_ledger import PlainLedger

YIELD_S = 0.02
FIXED_MS = {"dec": 8.0, "enc": 3.0, "tiny": 1.0}
Log = list[tuple[str, bool, tuple[tuple[int, int], ...]]]


def may_be_above(below: Step, above: Step) -> bool:
    highest = [max(entry.priority for entry, _ in step.parts) for step in (below, above)]
    return above.predicted_ms <= below.predicted_ms / 2 or highest[1] >= highest[0] + CLEARLY_HIGHER


@dataclass
class Machine:
    """Runs what the scheduler plans, on a clock of its own; ``arrivals`` are (time, entries)."""

    limits: Limits
    arrivals: list[tuple[float, list[Entry]]]
    rng: random.Random
    failing: float = 0.0
    dropping: float = 0.0
    now: float = 0.0
    used: dict[bool, float] = field(default_factory=lambda: {False: 0.0, True: 0.0})
    log: Log = field(default_factory=list)
    finished: dict[int, float] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.limits, FIXED_MS.__getitem__)
        self.left: dict[int, int] = {}
        self.entries: dict[int, Entry] = {}
        self.begun: dict[Step, float] = {}
        self.first_read: dict[int, float] = {}
        self.keys = itertools.count(1_000_000)
        self.passed: list[int] = []

    def run(self, until: float = 1e9) -> None:
        while self.now < until:
            self._arrive()
            self._clear()
            step = self.scheduler.plan(self.now)
            if step is not None:
                alive = self.scheduler._ledger.alive()
                self.passed.append(sum(min(entry.passed_steps, MAX_PASSED_STEPS) for entry in alive))
                self._check(step)
                self._long(step) if step.long else self._short(step)
            elif self.arrivals:
                self.now = max(self.now, self.arrivals[0][0])
            else:
                return

    def _arrive(self) -> None:
        while self.arrivals and self.arrivals[0][0] <= self.now:
            _, entries = self.arrivals.pop(0)
            try:
                self.scheduler.admit(entries)
            except Rejected:
                continue
            self.entries.update((entry.key, entry) for entry in entries)
        if self.entries and self.rng.random() < self.dropping:
            job = self.rng.choice(list(self.entries.values())).job
            self.dropped.add(job)
            self.scheduler.drop(job)

    def _check(self, step: Step) -> None:
        scheduler, limits = self.scheduler, self.limits
        assert scheduler.reserved_bytes <= limits.memory_bytes
        running = scheduler._ledger.running.values()
        assert sum(entry.places for entry in running) <= limits.max_running
        assert len({entry.model for entry, _ in step.parts} | {step.model}) == 1
        for model in {found.model for found in scheduler.begun}:
            stack = [found for found in scheduler.begun if found.model == model]
            assert len(stack) <= MAX_BEGUN
            assert all(may_be_above(below, above) for below, above in pairwise(stack))
        if step in self.begun:
            return
        assert not any(entry.dropped for entry, _ in step.parts)
        inside = {entry.key for found in self.begun for entry, _ in found.parts}
        assert not inside & {entry.key for entry, _ in step.parts}
        solo = [entry for entry, _ in step.parts if entry.solo]
        assert not solo or len(step.parts) == 1
        self._check_parts(step)
        self.log.append((step.model, step.long, tuple((entry.key, n) for entry, n in step.parts)))

    def _check_parts(self, step: Step) -> None:
        limits, num_read = self.limits, 0
        for entry, tokens in step.parts:
            if entry.decoding:
                assert tokens == 1 and not step.long
                continue
            end = entry.read + tokens
            num_read += 1
            self.first_read.setdefault(entry.key, self.now)
            assert tokens > 0 and end <= entry.tokens
            assert end == entry.tokens or (entry.chunkable and end % entry.chunk_multiple == 0)
            assert tokens <= max(limits.prefill_chunk_tokens, entry.chunk_multiple) or not entry.chunkable
            assert entry.lane == "long" or not step.long
        over_ms = step.predicted_ms > max(limits.step_ms, 2 * FIXED_MS[step.model]) + 1e-6
        over = not step.long and (over_ms or step.tokens > limits.step_tokens)
        assert not over or num_read <= 1, "beyond the budget one prompt reads at most"

    def _long(self, step: Step) -> None:
        self.scheduler.resumed(step, self.now)
        left = self.begun.setdefault(step, step.predicted_ms / 1000)
        started, paused = self.now, False
        while left > 0 and not paused:
            piece = min(YIELD_S, left)
            self.now, left = self.now + piece, left - piece
            self._arrive()
            paused = left > 0 and self.scheduler.should_pause(step, self.now)
        seconds = self.now - started
        self.used[True] += seconds
        if paused:
            self.begun[step] = left
            self.scheduler.ran(step, seconds)
            return
        del self.begun[step]
        self._end(step, seconds)

    def _short(self, step: Step) -> None:
        seconds = step.predicted_ms / 1000
        self.now += seconds
        self.used[False] += seconds
        self._end(step, seconds)

    def _end(self, step: Step, seconds: float) -> None:
        if len(step.parts) > 1 and self.rng.random() < self.failing:
            self.scheduler.failed(step, seconds)
            return
        self.scheduler.advance(step, seconds)
        for entry, _ in step.parts:
            self._note(entry)

    def _note(self, entry: Entry) -> None:
        if entry.decoding:
            self.left[entry.key] -= 1
        elif entry.read == entry.tokens:
            self.finished[entry.key] = self.now
            entry.decoding = entry.places > 0
            self.left[entry.key] = self.rng.randint(1, 6) if entry.decoding else 0
            if entry.places > 1 and not entry.dropped:
                self._fork(entry)
        if self.left.get(entry.key) == 0:
            self.entries.pop(entry.key, None)
            more = any(other.job == entry.job for other in self.entries.values())
            self.scheduler.release(entry, keeps_output=more)
            if not more:
                self.scheduler.drop(entry.job)

    def _fork(self, leader: Entry) -> None:
        followers = [
            Entry(next(self.keys), leader.job, leader.model, leader.tokens, leader.chunkable, 0)
            for _ in range(leader.places - 1)
        ]
        before = self.scheduler.reserved_bytes
        self.scheduler.fork(leader, followers)
        assert self.scheduler.reserved_bytes == before
        for entry in followers:
            self.left[entry.key] = self.rng.randint(1, 6)
            self.entries[entry.key] = entry

    def _clear(self) -> None:
        """Forwards that nobody waits for are given up; what was dropped is released, unless it is in one."""
        for step in [step for step in self.begun if self.scheduler.abandoned(step)]:
            del self.begun[step]
            self.scheduler.failed(step, 0.0)
        held = {entry.key for step in self.begun for entry, _ in step.parts}
        for key, entry in list(self.entries.items()):
            if entry.job in self.dropped and key not in held:
                self.scheduler.release(entry)
                del self.entries[key]


def limits(rng: random.Random) -> Limits:
    return Limits(
        max_queue_requests=rng.choice([5, 1000]),
        max_queue_tokens=1_000_000,
        max_queue_ms=rng.choice([20_000.0, 1e9]),
        max_running=rng.choice([3, 8]),
        step_tokens=rng.choice([64, 200, 2048]),
        step_ms=rng.choice([20.0, 200.0]),
        prefill_chunk_tokens=rng.choice([64, 512]),
        short_ms=rng.choice([100.0, 2000.0]),
        short_weight=rng.choice([1.0, 4.0]),
        memory_bytes=60,
    )


def random_entry(key: int, job: str, rng: random.Random, now: float) -> Entry:
    model = rng.choice(["dec", "enc", "tiny"])
    chunkable = model != "enc" and rng.random() < 0.9
    tokens, rate, bend = rng.randint(1, 3000), rng.choice([0.0, 0.1, 2.0]), rng.choice([0.0, 1e-4])
    read = rng.randrange(tokens) if chunkable and rng.random() < 0.3 else 0

    def price(start: int, tokens: int) -> float:
        return 0.5 + rate * tokens + bend * tokens * start

    return Entry(
        key,
        job,
        model,
        tokens,
        chunkable,
        bytes=rng.randint(1, 60),
        price=price,
        arrived=now,
        priority=rng.randint(-10, 10),
        deadline=rng.choice([None, now + rng.randint(1, 100)]),
        chunk_multiple=rng.choice([CHUNK_MULTIPLE, CHUNK_MULTIPLE, 256, 1024]),
        places=0 if model == "enc" else rng.choice([1, 1, 3]),
        read=read,
    )


def machine(seed: int, count: int = 60, **chances: float) -> Machine:
    """``count`` requests; where there are several inputs, what they leave for the answer stays."""
    rng = random.Random(seed)
    bounds, keys = limits(rng), itertools.count()
    arrivals, now = [], 0.0
    for i in range(count):
        now += rng.choice([0.0, 0.01, 0.5, 3.0])
        parts = [random_entry(next(keys), f"j{i}", rng, now) for _ in range(rng.choice([1, 1, 2, 3]))]
        for part in parts:
            part.output_bytes = rng.choice([0, rng.randint(0, part.bytes)]) if part.model == "enc" else 0
            part.model = parts[0].model
            part.places = 0 if part.model == "enc" else max(part.places, 1)
        arrivals.append((now, parts))
    return Machine(bounds, arrivals, rng, **chances)


@pytest.mark.parametrize("seed", range(40))
def test_whatever_arrives_every_request_ends_within_its_limits(seed: int) -> None:
    run = machine(seed)
    run.run()
    assert not run.entries and not run.scheduler.begun and run.scheduler.waiting() == (0, 0)
    assert run.scheduler.reserved_bytes == 0 and len(run.finished) > 5


@pytest.mark.parametrize("seed", range(40))
def test_so_it_does_where_steps_fail_and_requests_are_dropped(seed: int) -> None:
    run = machine(1000 + seed, failing=0.1, dropping=0.05)
    run.run()
    assert run.scheduler.waiting() == (0, 0) and not run.scheduler.begun
    assert all(entry.job in run.dropped for entry in run.entries.values())


@pytest.mark.parametrize("seed", range(5))
def test_the_same_arrivals_make_the_same_steps(seed: int) -> None:
    runs = [machine(seed, failing=0.05) for _ in range(2)]
    for run in runs:
        run.run()
    assert runs[0].log == runs[1].log and runs[0].finished == runs[1].finished


@pytest.mark.parametrize("seed", range(24))
def test_steps_are_those_of_a_policy_that_sorts_everybody_anew(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chances = {"failing": 0.05 * (seed % 2), "dropping": 0.02 * (seed % 3)}
    fast = machine(5000 + seed, 150, **chances)
    fast.run()
    monkeypatch.setattr("service.scheduler.Ledger", PlainLedger)
    plain = machine(5000 + seed, 150, **chances)
    assert isinstance(plain.scheduler._ledger, PlainLedger)
    plain.run()
    assert fast.log == plain.log and fast.finished == plain.finished and fast.passed == plain.passed
    assert fast.scheduler.waiting() == (0, 0) and fast.scheduler.waiting_ms() == 0
    assert not fast.scheduler._ledger.collections and fast.scheduler.reserved_bytes == 0


def server_limits(**changes: float) -> Limits:
    values = {
        "max_queue_requests": 1000,
        "max_queue_tokens": 10_000_000,
        "max_queue_ms": 1e9,
        "max_running": 32,
        "step_tokens": 2048,
        "step_ms": 200.0,
        "prefill_chunk_tokens": 512,
        "short_ms": 2000.0,
        "short_weight": 4.0,
        "memory_bytes": 1000,
        **changes,
    }
    return Limits(**values)  # type: ignore[arg-type]


def prompt(key: int, tokens: int, now: float, model: str = "dec", **changes: int) -> Entry:
    return Entry(
        key,
        f"j{key}",
        model,
        tokens,
        True,
        1,
        lambda start, n: 0.5 * n,
        arrived=now,
        **{"places": 1, **changes},
    )


def test_short_requests_keep_their_latency_while_a_long_prompt_is_read() -> None:
    """One a second beside 32k tokens: each is read in the step after the next yield point."""
    arrivals = [(0.0, [prompt(0, 32_768, 0.0)])]
    arrivals += [(t, [prompt(100 + int(t), 128, t)]) for t in (0.37 + i for i in range(30))]
    run = Machine(server_limits(), sorted(arrivals, key=lambda pair: pair[0]), random.Random(0))
    run.run()
    waits = [run.finished[100 + i] - (0.37 + i) for i in range(30) if 100 + i in run.finished]
    step_s = (FIXED_MS["dec"] + 64) / 1000
    assert len(waits) == 30 and max(waits) <= YIELD_S + 1.5 * step_s
    alone_s = (64 * FIXED_MS["dec"] + 0.5 * 32_768) / 1000
    assert run.finished[0] <= alone_s + run.used[False] + 1e-6, "the long one pays for their time only"


@pytest.mark.parametrize("seed", range(5))
def test_a_short_prompt_that_comes_to_an_idle_lane_is_in_the_very_next_short_step(seed: int) -> None:
    rng = random.Random(seed)
    arrivals = [(0.0, [prompt(i, 30_000, 0.0, model=model)]) for i, model in enumerate(["dec", "enc"])]
    times = sorted(rng.uniform(0, 30) for _ in range(20))
    arrivals += [
        (t, [prompt(100 + i, 64, t, model=rng.choice(["dec", "tiny"]))]) for i, t in enumerate(times)
    ]
    run = Machine(server_limits(), arrivals, rng)
    run.run()
    for i, came in enumerate(times):
        assert run.first_read[100 + i] - came < 0.5, "never a whole slice of long work"
    assert run.finished[0] and run.finished[1]


@pytest.mark.parametrize("weight", [1.0, 4.0])
def test_each_lane_gets_its_share_where_both_are_busy(weight: float) -> None:
    arrivals = [(0.0, [prompt(i, 30_000, 0.0)]) for i in range(4)]
    arrivals += [(0.0, [prompt(100 + i, 3000, 0.0, model="tiny") for i in range(60)])]
    run = Machine(server_limits(short_weight=weight, max_running=200), arrivals, random.Random(0))
    run.run(until=40.0)
    assert run.used[False] / run.used[True] == pytest.approx(weight, rel=0.1)


def test_long_work_of_two_models_shares_its_lane_evenly() -> None:
    arrivals = [(0.0, [prompt(i, 60_000, 0.0, model=model)]) for i, model in enumerate(["dec", "tiny"])]
    run = Machine(server_limits(), arrivals, random.Random(0))
    run.run(until=20.0)
    read = {entry.model: entry.read for entry in run.entries.values()}
    assert abs(read["dec"] - read["tiny"]) * 0.5 <= 2 * LONG_SLICE_MS + 512


@pytest.mark.parametrize("rival_priority", [0, 5, 10])
def test_ageing_brings_the_lowest_priority_through_a_stream_of_higher_ones(rival_priority: int) -> None:
    """Rivals fill the machine for good; the other one waits about ten seconds for each point between them."""
    arrivals = [(0.0, [prompt(0, 400, 0.0, priority=-10)])]
    arrivals += [(0.2 * i, [prompt(100 + i, 400, 0.2 * i, priority=rival_priority)]) for i in range(1200)]
    run = Machine(server_limits(max_queue_requests=10_000), arrivals, random.Random(0))
    run.run(until=400.0)
    assert run.finished[0] == pytest.approx(10 * (10 + rival_priority), abs=25)
