"""One step after another: sequences opened, the forward run, results delivered.

A short step is one call of the model. A long one is begun, left whenever the scheduler wants its place, and
gone on with later; its sequences belong to its forward until that is over, so they are closed after it. A
step of several sequences that raises has advanced none of them: the scheduler plans each alone, and only the
guilty one fails."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from models.contract import Forward, SliceResult, StepResult
from service.cost import CostModel, SliceRun
from service.delivery import Delivery, Part
from service.heartbeat import Heartbeat
from service.logs import log_failure
from service.opening import Opener
from service.pricing import Prices
from service.roster import Roster
from service.schedule import Entry, Step, Unpriced, served_name
from service.seen import StepSeen, TimeSeen, time_seen
from service.sequences import Sequence

log = logging.getLogger("longreach.engine")


@dataclass(eq=False)
class Running:
    """A step between its beginning and its end."""

    step: Step
    parts: list[Part]
    held_before: int = 0
    """Bytes that its request held, where it has the step for itself."""
    forward: Forward | None = None
    seconds: float = 0.0
    pauses: int = 0

    @property
    def abandoned(self) -> bool:
        return all(part.job.ended for part in self.parts)


class Steps:
    """Engine thread only."""

    def __init__(
        self,
        roster: Roster,
        costs: CostModel,
        heartbeat: Heartbeat,
        clock: Callable[[], float],
        observe: Callable[[StepSeen], None],
        observe_time: Callable[[TimeSeen], None],
    ) -> None:
        self._roster = roster
        self._costs = costs
        self._heartbeat = heartbeat
        self._clock = clock
        self._observe = observe
        self._observe_time = observe_time
        self._delivery = Delivery(roster)
        self._opener = Opener(roster, self._delivery)
        self._begun: dict[Step, Running] = {}

    def run(self, step: Step) -> None:
        """A whole short step, or a long one until it is left or done."""
        started = self._heartbeat.beat()
        try:
            running = self._begun.get(step) or self._open(step, started)
            self._go_on(running, started)
        finally:
            self._heartbeat.rest()

    def give_up(self, *, everything: bool = False) -> None:
        """End begun forwards that nobody waits for any more."""
        for running in [r for r in self._begun.values() if everything or r.abandoned]:
            self._over(running)
            with self._roster.changed:
                self._roster.scheduler.failed(running.step, 0.0)

    def unpriced(self, error: Unpriced) -> None:
        """Nothing can be planned with an entry whose price fails: its request fails, the others go on."""
        owner = self._roster.owner(error.entry)
        if owner is not None:
            cause = error.__cause__
            self._delivery.fail(owner[0], cause if isinstance(cause, Exception) else error)
        with self._roster.changed:
            self._roster.scheduler.drop(error.entry.job)

    @property
    def held(self) -> set[Sequence]:
        """Sequences that belong to a begun forward."""
        return {part.sequence for running in self._begun.values() for part in running.parts}

    def has_begun(self, model: str) -> bool:
        return any(served_name(step.model) == model for step in list(self._begun))

    def _open(self, step: Step, now: float) -> Running:
        parts = self._opener.open(step, now)
        jobs = {part.job for part in parts}
        return Running(step, parts, held_before=jobs.pop().held_bytes if len(jobs) == 1 else 0)

    def _go_on(self, running: Running, started: float) -> None:
        step, result = running.step, None
        failure: Exception | None = None
        try:
            if running.parts:
                result = self._advance(running)
        except Exception as error:
            failure = error
        now = self._heartbeat.beat()
        seconds = now - started
        running.seconds += seconds
        left = result is None and failure is None and not running.abandoned
        self._observe_time(time_seen(step, seconds, left=left))
        if failure is not None or not running.parts:
            self._raised(running, failure, seconds)
        elif result is None:
            running.pauses += 1
            with self._roster.changed:
                self._roster.scheduler.ran(step, seconds)
        else:
            self._done(running, result, seconds, now)

    def _advance(self, running: Running) -> StepResult | None:
        """The step's result, or None where it was left."""
        model, step = running.parts[0].job.model, running.step
        slices = [part.slice for part in running.parts]
        if not step.long:
            return model.step(slices)
        if running.forward is None:
            running.forward = model.begin(slices)
            self._begun[step] = running
        with self._roster.changed:
            self._roster.scheduler.resumed(step, self._clock())
        return running.forward.advance(lambda: self._should_pause(running))

    def _should_pause(self, running: Running) -> bool:
        """Asked at every yield point of a long step."""
        now = self._heartbeat.beat()
        if running.abandoned:
            return True
        with self._roster.changed:
            while True:
                try:
                    return self._roster.scheduler.should_pause(running.step, now)
                except Unpriced as error:
                    self.unpriced(error)

    def _over(self, running: Running) -> None:
        """The forward is closed before any of its sequences can be."""
        if running.forward is not None:
            running.forward.close()
        self._begun.pop(running.step, None)

    def _raised(self, running: Running, failure: Exception | None, seconds: float) -> None:
        self._over(running)
        with self._roster.changed:
            self._roster.scheduler.failed(running.step, seconds)
        if failure is None:
            return
        if len(running.parts) == 1:
            self._delivery.fail(running.parts[0].job, failure)
            return
        name, count = type(failure).__name__, len(running.parts)
        log.warning("a step of %d sequences failed (%s); each will run alone", count, name)

    def _done(self, running: Running, result: StepResult, seconds: float, now: float) -> None:
        step, parts = running.step, running.parts
        self._over(running)
        runs = _runs_of(parts, result)
        with self._roster.changed:
            self._roster.scheduler.advance(step, seconds)
            if runs is not None and all(part.job.teaches and part.slice.meter is None for part in parts):
                self._costs.observe(step.model, runs, running.seconds)
            for entry, _ in step.parts:
                self._note_read(entry)
        jobs = {part.job for part in parts}
        tokens = sum(len(part.slice.token_ids) for part in parts)
        for job in jobs:
            job.batch_requests = max(job.batch_requests, len(jobs))
            job.batch_tokens = max(job.batch_tokens, tokens)
            if len(jobs) > 1:
                job.memory.share()
            else:
                peak_bytes = None if running.pauses else result.peak_bytes
                job.memory.note(running.held_before, job.held_bytes, peak_bytes)
        self._delivery.deliver_all(zip(parts, result.results, strict=True), now)
        lane = (step.predicted_ms, step.long, running.pauses)
        self._observe(StepSeen(served_name(step.model), len(jobs), tokens, running.seconds, *lane))

    def _note_read(self, entry: Entry) -> None:
        """What has been read of a prompt is what its state says: the cache may have held more or less of it
        than was planned with."""
        owner = self._roster.owner(entry)
        if owner is not None and owner[1].state is not None and not entry.decoding:
            entry.read = min(owner[1].state.length, entry.tokens)


def _runs_of(parts: list[Part], result: StepResult) -> list[SliceRun] | None:
    """The slices of a step as the cost model learns from it; None where their FLOPs cannot be told."""
    try:
        return [_run_of(part, found) for part, found in zip(parts, result.results, strict=True)]
    except Exception as error:
        log_failure(log, "a step teaches nothing: its FLOPs could not be predicted", error)
        return None


def _run_of(part: Part, result: SliceResult) -> SliceRun:
    prices = part.entry.price
    assert isinstance(prices, Prices)
    flops = prices.flops(part.start, len(part.slice.token_ids))
    return SliceRun(part.slice.choice.backend, flops, result.work.attention_ms)
