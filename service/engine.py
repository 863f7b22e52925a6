"""One thread that runs steps: schedule -> model.step -> deliver. The event loop submits and cancels.

Everything that both sides touch is guarded by one condition; the lock is not held while a step runs.
Sequences are opened, stepped and closed by the engine thread alone. An exception in a step with several
sequences runs each of them once more alone, so that only the guilty request fails."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass

from models.contract import ServedModel, Slice, SliceResult
from service.errors import ApiError, internal
from service.failures import failure_of, refusal_of
from service.jobs import Event, Job
from service.logs import log_failure
from service.scheduler import CHUNK_MULTIPLE, Entry, Limits, Rejected, Scheduler, Step
from service.sequences import Sequence

log = logging.getLogger("longreach.engine")


@dataclass(frozen=True)
class StepSeen:
    """What a step was, for metrics."""

    model: str
    requests: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Load:
    """How full one model is now."""

    queued_requests: int
    queued_tokens: int
    running_requests: int


@dataclass(frozen=True)
class _Part:
    """One sequence in one step."""

    job: Job
    sequence: Sequence
    entry: Entry
    tokens: int
    slice: Slice


class Engine:
    def __init__(
        self, limits: Limits, clock: Callable[[], float], observe: Callable[[StepSeen], None]
    ) -> None:
        self.clock = clock
        self._observe = observe
        self._scheduler = Scheduler(limits)
        self._limits = limits
        self._changed = threading.Condition()
        self._jobs: dict[str, Job] = {}
        self._owners: dict[int, tuple[Job, Sequence]] = {}
        self._closing: list[Sequence] = []
        self._keys = itertools.count()
        self._stopping = False
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="longreach-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def abort(self) -> None:
        """Fail what is unfinished with ``draining`` and end the thread after its current step. Does not
        wait."""
        with self._changed:
            self._stopping = True
            self._fail_all(
                ApiError("draining", "The server stopped before this request was done; send it again.")
            )
            self._changed.notify_all()

    def stop(self, timeout_s: float = 10.0) -> bool:
        """``abort``, then wait for the thread. True where it ended."""
        self.abort()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def healthy(self) -> bool:
        return self._thread.is_alive() and not self._failed

    def check_room(self, requests: int = 1) -> None:
        """429 where the queue has no room for ``requests`` more: asked before a request is tokenised."""
        with self._changed:
            self._reject(lambda: self._scheduler.check_room(requests))

    def submit(self, job: Job) -> None:
        """Queue a request, or ApiError (429, 413, 503)."""
        with self._changed:
            if self._stopping:
                raise ApiError("draining", "The server is shutting down; try again elsewhere or later.")
            if not self.healthy:
                raise ApiError(
                    "engine_unhealthy", "The engine has stopped after a failure; restart the server."
                )
            entries = [self._entry(job, sequence) for sequence in job.sequences]
            self._reject(lambda: self._admit(job, entries), job)
            self._jobs[job.id] = job
            for entry, sequence in zip(entries, job.sequences, strict=True):
                self._owners[entry.key] = (job, sequence)
            job.times.submitted = self.clock()
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """Nobody waits for this request any more: it leaves before the next step. Idempotent."""
        with self._changed:
            self._end(
                job, ApiError("client_closed_request", "The client closed the request.", stage=job.stage)
            )

    def expire(self) -> None:
        """Fail every request whose deadline has passed. The only place where deadlines are judged."""
        with self._changed:
            for job_id, stage in self._scheduler.expired(self.clock()):
                detail = f"The request's deadline passed while it was {stage}; raise timeout_ms or send less."
                self._end(self._jobs[job_id], ApiError("deadline_exceeded", detail, stage=stage))

    def load(self, model: str) -> Load:
        with self._changed:
            requests, tokens = self._scheduler.waiting(model)
            return Load(requests, tokens, self._scheduler.running(model))

    @property
    def reserved_bytes(self) -> int:
        with self._changed:
            return self._scheduler.reserved_bytes

    @property
    def num_jobs(self) -> int:
        """Requests that have not ended."""
        return len(self._jobs)

    def _entry(self, job: Job, sequence: Sequence) -> Entry:
        sequence.entry = Entry(
            key=next(self._keys),
            job=job.id,
            model=job.model.info.name,
            tokens=sequence.prompt_tokens,
            chunkable=sequence.chunkable,
            bytes=sequence.estimated_bytes,
            deadline=job.deadline,
            queue_deadline=job.queue_deadline,
            chunk_multiple=max(CHUNK_MULTIPLE, sequence.choice.params.chunk_multiple()),
        )
        return sequence.entry

    def _admit(self, job: Job, entries: list[Entry]) -> None:
        """Queue the request, or Rejected: its last input must still fit beside what the others leave."""
        outputs = sum(sequence.output_bytes for sequence in job.sequences)
        needed = outputs + max(s.estimated_bytes - s.output_bytes for s in job.sequences)
        if needed > self._limits.memory_bytes:
            raise Rejected("never_fits", value=needed, limit=self._limits.memory_bytes)
        self._scheduler.admit(entries)

    def _reject(self, admit: Callable[[], None], job: Job | None = None) -> None:
        try:
            admit()
        except Rejected as error:
            raise refusal_of(error, job) from None

    def _run(self) -> None:
        try:
            while (step := self._next_step()) is not None:
                self._run_step(step)
        except BaseException as error:
            self._failed = True
            log_failure(log, "the engine thread failed", error)
            with self._changed:
                self._fail_all(internal())
        finally:
            with self._changed:
                self._close_ended()

    def _next_step(self) -> Step | None:
        """Wait for work; None when the engine stops."""
        with self._changed:
            while True:
                self._close_ended()
                if self._stopping:
                    return None
                step = self._scheduler.plan()
                if step is not None:
                    return step
                self._changed.wait()

    def _run_step(self, step: Step) -> None:
        started = self.clock()
        parts = [
            part for entry, tokens in step.parts if (part := self._open(entry, tokens, started)) is not None
        ]
        if not parts:
            return
        jobs = {part.job for part in parts}
        held_before = {job: job.held_bytes for job in jobs}
        results, peak_bytes = self._forward(parts)
        now = self.clock()
        with self._changed:
            self._scheduler.advance(step, now - started)
        for job in jobs:
            job.batch_requests = max(job.batch_requests, len(jobs))
            job.batch_tokens = max(job.batch_tokens, step.tokens)
            job.memory.note(held_before[job], job.held_bytes, peak_bytes, shared=len(jobs) > 1)
        for part, result in zip(parts, results, strict=True):
            self._deliver(part, result, now)
        self._observe(StepSeen(step.model, len(jobs), step.tokens, now - started))

    def _open(self, entry: Entry, tokens: int, now: float) -> _Part | None:
        job, sequence = self._owners[entry.key]
        if job.ended:
            return None
        if job.times.first_step is None:
            job.times.first_step = now
        try:
            if sequence.state is None:
                sequence.state = job.model.open(sequence.capacity)
            return _Part(job, sequence, entry, tokens, sequence.next_slice(sequence.state, tokens))
        except Exception as error:
            self._fail(job, error)
            return None

    def _forward(self, parts: list[_Part]) -> tuple[Items[SliceResult | Exception], int | None]:
        model = parts[0].job.model
        try:
            step = model.step([part.slice for part in parts])
            return step.results, step.peak_bytes
        except Exception as error:
            if len(parts) == 1:
                return [error], None
            log.warning(
                "a step of %d sequences failed (%s); running each alone", len(parts), type(error).__name__
            )
            return [self._alone(model, part) for part in parts], None

    def _alone(self, model: ServedModel, part: _Part) -> SliceResult | Exception:
        if part.job.ended:
            return internal()
        try:
            return model.step([part.slice]).results[0]
        except Exception as error:
            return error

    def _deliver(self, part: _Part, result: SliceResult | Exception, now: float) -> None:
        job, sequence, entry = part.job, part.sequence, part.entry
        if job.ended:
            return
        if isinstance(result, Exception):
            self._fail(job, result)
            return
        try:
            token = sequence.accept(result, entry.read)
        except Exception as error:
            self._fail(job, error)
            return
        if token is not None:
            entry.decoding = True
            job.note_token(now)
            if job.stream:
                job.channel.put([token])
        if sequence.finished:
            self._finish_sequence(job, sequence, entry)

    def _finish_sequence(self, job: Job, sequence: Sequence, entry: Entry) -> None:
        sequence.close()
        with self._changed:
            self._scheduler.release(entry)
            self._owners.pop(entry.key, None)
            if job.complete:
                self._end(job, None)
            else:
                _hand_on(job, sequence)

    def _fail(self, job: Job, error: Exception) -> None:
        log_failure(log, f"request {job.id} failed", error)
        with self._changed:
            self._end(job, failure_of(error, job))

    def _fail_all(self, error: ApiError) -> None:
        for job in list(self._jobs.values()):
            self._end(job, error)

    def _end(self, job: Job, error: ApiError | None) -> None:
        """The one way a request ends. Its caches are freed by the engine thread before the next step."""
        if job.ended:
            return
        job.ended, job.error, job.times.ended = True, error, self.clock()
        self._jobs.pop(job.id, None)
        self._scheduler.drop(job.id)
        self._closing.extend(job.sequences)
        self._changed.notify_all()
        event: Event = error
        job.channel.put([event])

    def _close_ended(self) -> None:
        for sequence in self._closing:
            sequence.close()
            if sequence.entry is not None:
                self._scheduler.release(sequence.entry)
                self._owners.pop(sequence.entry.key, None)
        self._closing.clear()


def _hand_on(job: Job, sequence: Sequence) -> None:
    """What a finished input leaves for the answer stays reserved: an input that is not done answers for it,
    one that runs before one that waits."""
    if not sequence.output_bytes:
        return
    pending = [other for other in job.sequences if not other.finished]
    heir = next((other for other in pending if other.state is not None), pending[0])
    heir.output_bytes += sequence.output_bytes
    if heir.entry is not None:
        heir.entry.bytes += sequence.output_bytes
    sequence.output_bytes = 0
