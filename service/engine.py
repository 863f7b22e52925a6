"""One thread that runs steps: close what ended -> schedule -> run. The event loop submits and cancels.

What both sides touch is in the roster and guarded by its condition; the lock is not held while a step runs.
Sequences are opened, stepped and closed by the engine thread alone."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from service.cost import CostModel
from service.errors import ApiError, internal
from service.failures import refusal_of
from service.heartbeat import Heartbeat
from service.jobs import Job
from service.logs import log_failure
from service.pricing import Entries
from service.roster import Roster
from service.running import Steps
from service.schedule import Limits, Rejected, Step, Unpriced
from service.scheduler import Scheduler
from service.seen import StepSeen, TimeSeen

__all__ = ["Engine", "Load"]

log = logging.getLogger("longreach.engine")
WATCHDOG_S = 120.0


@dataclass(frozen=True)
class Load:
    """How full one model is now."""

    queued_requests: int
    queued_tokens: int
    running_requests: int


class Engine:
    """``costs`` prices what is submitted and learns from every step; a step without a sign of life for
    ``watchdog_s`` has stalled."""

    def __init__(
        self,
        limits: Limits,
        clock: Callable[[], float],
        observe: Callable[[StepSeen], None],
        costs: CostModel | None = None,
        watchdog_s: float = WATCHDOG_S,
        observe_time: Callable[[TimeSeen], None] = lambda seen: None,
    ) -> None:
        self.clock = clock
        self.costs = costs if costs is not None else CostModel()
        self.given_up = False
        """The watchdog has given up the step that runs, and nothing has been heard of it since."""
        self._watchdog_s = watchdog_s
        self._scheduler = Scheduler(limits, self.costs.fixed_ms)
        self._roster = Roster(self._scheduler, Entries(self.costs), clock)
        self._heartbeat = Heartbeat(clock)
        self._steps = Steps(self._roster, self.costs, self._heartbeat, clock, observe, observe_time)
        self._changed = self._roster.changed
        self._stopping = False
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="longreach-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def abort(self) -> None:
        """Fail what is unfinished with ``draining`` and end the thread after its current step, a long one
        where it may be left next. Does not wait."""
        with self._changed:
            self._stopping = True
            detail = "The server stopped before this request was done; send it again."
            self._roster.end_all(ApiError("draining", detail))
            self._changed.notify_all()

    def stop(self, timeout_s: float = 10.0) -> bool:
        """``abort``, then wait for the thread. True where it ended."""
        self.abort()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def healthy(self) -> bool:
        return self._thread.is_alive() and not self._failed and not self.given_up

    @property
    def thread_id(self) -> int | None:
        return self._thread.ident

    def heartbeat_age(self, now: float | None = None) -> float:
        """Seconds since the step that runs gave a sign of life; 0 where none runs."""
        return self._heartbeat.age(self.clock() if now is None else now)

    @property
    def stalled(self) -> bool:
        """A step has run for longer than ``watchdog_s`` without a sign of life."""
        return self._thread.is_alive() and self.heartbeat_age() > self._watchdog_s

    def give_up(self) -> None:
        """Fail what is unfinished and take no work until ``take_back``: the step that runs has stalled."""
        with self._changed:
            self.given_up = True
            self._roster.end_all(_stalled())

    def take_back(self) -> None:
        """The step that had stalled goes on or has ended."""
        with self._changed:
            self.given_up = False

    def check_room(self, requests: int = 1) -> None:
        """429 where the queue has no room for ``requests`` more: asked before a request is tokenised."""
        with self._changed:
            self._reject(lambda: self._scheduler.check_room(requests))

    def prepare(self, job: Job, arrived: float) -> None:
        """What of ``submit`` takes time that grows with the prompt; from any thread. The request's turn is
        that of its arrival."""
        job.entries = self._roster.entries_of(job, arrived)

    def submit(self, job: Job) -> None:
        """Queue a request, or ApiError (429, 413, 503). A long step that runs sees it where it may be left
        next."""
        entries = job.entries or self._roster.entries_of(job, self.clock())
        with self._changed:
            if self._stopping:
                raise ApiError("draining", "The server is shutting down; try again elsewhere or later.")
            if self.given_up:
                raise _stalled()
            if not self.healthy:
                raise ApiError(
                    "engine_unhealthy", "The engine has stopped after a failure; restart the server."
                )
            self._reject(lambda: self._roster.admit(job, entries), job)

    def cancel(self, job: Job) -> None:
        """Nobody waits for this request any more: it leaves before the next step. Idempotent."""
        gone = ApiError("client_closed_request", "The client closed the request.", stage=job.stage)
        with self._changed:
            self._roster.end(job, gone)

    def expire(self) -> None:
        """Fail every request whose deadline has passed. The only place where deadlines are judged."""
        with self._changed:
            for job_id, stage in self._scheduler.expired(self.clock()):
                detail = f"The request's deadline passed while it was {stage}; raise timeout_ms or send less."
                self._roster.end(
                    self._roster.jobs[job_id], ApiError("deadline_exceeded", detail, stage=stage)
                )

    def load(self, model: str) -> Load:
        with self._changed:
            names = self._roster.names_of(model)
            waiting = [self._scheduler.waiting(name) for name in names]
            requests, tokens = (sum(counts) for counts in zip(*waiting, strict=True))
            return Load(requests, tokens, sum(map(self._scheduler.running, names)))

    def waiting_ms(self) -> float:
        """Predicted ms of work that waits."""
        with self._changed:
            return self._scheduler.waiting_ms()

    @property
    def reserved_bytes(self) -> int:
        with self._changed:
            return self._scheduler.reserved_bytes

    @property
    def num_jobs(self) -> int:
        """Requests that have not ended."""
        return len(self._roster.jobs)

    def has_work(self, model: str) -> bool:
        """Whether anything of this model runs, waits or is still open: until it is False the model must not
        be closed, and no request of it may be submitted meanwhile."""
        with self._changed:
            return self._roster.has_work(model) or self._steps.has_begun(model)

    def remove_model(self, model: str) -> None:
        """The model has left service: forget the time it used."""
        with self._changed:
            self._scheduler.remove_model(model)

    def _reject(self, admit: Callable[[], None], job: Job | None = None) -> None:
        try:
            admit()
        except Rejected as error:
            raise refusal_of(error, job) from None

    def _run(self) -> None:
        try:
            while self._run_next():
                pass
        except BaseException as error:
            self._failed = True
            log_failure(log, "the engine thread failed", error)
            with self._changed:
                self._roster.end_all(internal())
        finally:
            with self._changed:
                self._steps.give_up(everything=True)
                self._roster.close_ended(())

    def _run_next(self) -> bool:
        """Wait for a step and run it; False when the engine stops. Nothing of it is held while waiting for
        the next: an unloaded model must be free to go."""
        step = self._next_step()
        if step is not None:
            self._steps.run(step)
        return step is not None

    def _next_step(self) -> Step | None:
        """Wait for work; None when the engine stops."""
        with self._changed:
            while True:
                self._steps.give_up()
                self._roster.close_ended(self._steps.held)
                if self._stopping:
                    return None
                try:
                    step = self._scheduler.plan(self.clock())
                except Unpriced as error:
                    self._steps.unpriced(error)
                    continue
                if step is not None:
                    return step
                self._changed.wait()


def _stalled() -> ApiError:
    detail = "The engine has stalled in a step; nothing is served until it goes on. Try again later."
    return ApiError("engine_unhealthy", detail)
