"""The way of one request: open? -> model -> tokens -> engine -> answer, raced against its client leaving.

Starlette cancels a stream whose client has gone but lets a plain handler run to its end, so both are
watched here."""

from __future__ import annotations

import asyncio
import math
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel
from starlette.responses import Response

from models.contract import ServedModel, Task
from service.answers import Attended, attention_of
from service.chosen import ChosenAuto, exact_choice
from service.error_answers import largest_estimate
from service.errors import ApiError
from service.jobs import Channel, Job, Times, leads
from service.measured import SAMPLED
from service.meters import attach, is_measured, measured_of
from service.record import Record
from service.report import observe_auto, observe_job, observe_request
from service.runtime import Runtime
from service.sequences import Sequence, TokenOut
from service.sizes import sequence_bytes, with_way_out

T = TypeVar("T")
FP32_BYTES = 4
LARGE_ANSWER_VALUES = 4096
"""Numbers beyond which an answer is written in a worker thread."""
OFF_LOOP_TOKENS = 4096
"""Prompt tokens beyond which the cache is asked in a reader thread: hashing so many takes 0.3 ms."""


@dataclass(frozen=True)
class Asked:
    """What a request says about how it is run, whatever its route."""

    timeout_ms: int | None = None
    priority: int = 0
    stream: bool = False


class Flow:
    def __init__(self, request: Request) -> None:
        self.request = request
        self.runtime: Runtime = request.app.state.runtime
        self.record: Record = request.scope["state"]["record"]
        self.loop = asyncio.get_running_loop()

    def begin(self, name: str | None, task: Task | None) -> ServedModel:
        """The model, if the server takes work at all."""
        self.runtime.check_open()
        model = self.runtime.model(name, task)
        self.record.model = model.info.name
        return model

    async def tokenise(self, read: Callable[[], T], timeout_ms: int | None = None) -> T:
        """``read`` in a reader thread, its time noted. ApiError: 429 where too many wait already, 504 at the
        deadline, 499 where the client leaves; what has not begun by then is never read."""
        self.runtime.check_open()
        return await self._in_reader(read, self.deadlines(timeout_ms))

    async def prepare(self, job: Job) -> None:
        """Before ``run`` or a stream: where prompts are long, the cache is asked about them in a reader
        thread, since that hashes every token. ApiError as ``tokenise``."""
        prompts = [sequence.prompt for sequence in job.sequences if leads(sequence)]
        if sum(len(prompt.token_ids) for prompt in prompts if prompt is not None) > OFF_LOOP_TOKENS:
            now, engine = self.runtime.clock(), self.runtime.engine
            await self._in_reader(lambda: engine.prepare(job, now), (job.deadline, job.queue_deadline))

    async def _in_reader(self, read: Callable[[], T], deadlines: Items[float | None]) -> T:
        runtime = self.runtime
        started = runtime.clock()
        reading = runtime.readers.submit(read)
        limits = [limit for limit in deadlines if limit is not None]
        try:
            left_s = max(min(limits) - started, 0)
            return await self._unless_gone(asyncio.wrap_future(reading), left_s, lambda: "queued")
        except TimeoutError:
            detail = (
                "The request's deadline passed while its input was tokenised; raise timeout_ms or send less."
            )
            raise ApiError("deadline_exceeded", detail, stage="queued") from None
        finally:
            reading.cancel()
            self.record.tokenize_s += runtime.clock() - started

    async def offload(self, work: Callable[[], T]) -> T:
        return await self.loop.run_in_executor(self.runtime.workers, work)

    def job(
        self,
        prefix: str,
        model: ServedModel,
        sequences: Items[Sequence],
        attended: Attended,
        asked: Asked,
    ) -> Job:
        """A job ready to submit: memory estimated, deadlines set."""
        record, arrival = self.record, self.record.started
        record.attention = attended.label
        name = f"{prefix}{uuid.uuid4().hex}"
        job = Job(
            name,
            model,
            sequences,
            Channel(),
            Times(arrival),
            stream=asked.stream,
            priority=asked.priority,
        )
        job.deadline, job.queue_deadline = self.deadlines(asked.timeout_ms)
        chunk = self.runtime.settings.prefill_chunk_tokens
        sampling = self.runtime.sampling if record.operation in SAMPLED else None
        job.verify_cause = attach(model, sequences, attended.prefill, attended.decode, sampling)
        for sequence in sequences:
            sequence.output_bytes = sequence.kept_vectors * model.info.embedding_dim * FP32_BYTES
            choices = dict.fromkeys((sequence.choice, sequence.decode_choice))
            sequence.estimated_bytes = sequence_bytes(model, sequence, [*choices], chunk)
            sequence.exact_bytes = sequence_bytes(model, sequence, [exact_choice()], chunk, measured=False)
        job.memory.estimated_bytes = sum(sequence.estimated_bytes for sequence in sequences)
        job.memory.exact_bytes = sum(sequence.exact_bytes for sequence in sequences)
        return job

    async def run(self, job: Job) -> None:
        """Submit and wait for the end. ApiError where it fails; cancelled where the client leaves."""
        self.submit(job)
        await self.next_event(job)
        await self.measure(job)

    async def measure(self, job: Job) -> None:
        """Ask the meters of a job that is complete, where it has any: off the event loop, since many rows
        take a while. Before ``finish``."""
        if is_measured(job.sequences):
            job.measured = await self.offload(lambda: measured_of(job.sequences))

    def submit(self, job: Job, served: ServedModel | None = None) -> None:
        """``served``: the model behind that of the job, where the latter was made for this request alone."""
        model = served or job.model
        if self.runtime.models.get(model.info.name) is not model:
            raise ApiError("model_not_found", "The model was unloaded meanwhile.", param="model")
        try:
            self.runtime.engine.submit(job)
            self.runtime.jobs.add(job)
        except ApiError as error:
            if error.code == "never_fits_memory" and served is None:
                backends = self.runtime.supported[job.model.info.name]
                chunk_tokens = self.runtime.settings.prefill_chunk_tokens
                raise with_way_out(error, job, backends, chunk_tokens) from None
            raise
        now = self.runtime.clock()
        for deadline in (job.deadline, job.queue_deadline):
            if deadline is not None:
                timer = self.loop.call_later(max(deadline - now, 0) + 0.001, self.runtime.engine.expire)
                job.timers.append(timer)

    async def next_event(self, job: Job, timeout_s: float | None = None) -> TokenOut | None:
        """The next token, or None at the end, unless the client leaves first. TimeoutError after
        ``timeout_s``, with nothing lost."""
        try:
            return await self._unless_gone(job.channel.next(), timeout_s, lambda: job.stage)
        except TimeoutError:
            raise
        except BaseException:
            self.abandon(job)
            raise

    def abandon(self, job: Job) -> None:
        """End the job if it has not ended. Idempotent."""
        self.runtime.engine.cancel(job)
        for timer in job.timers:
            timer.cancel()

    def finish(self, job: Job, attended: Attended, *, input_tokens: int, output_tokens: int = 0) -> float:
        """Note a completed job, and the request that it was, in record and metrics; returns the time now."""
        self.note_times(job, input_tokens, output_tokens)
        self.finish_job(job, attended)
        observe_request(self.runtime, self.record)
        return self.runtime.clock()

    def note_times(self, job: Job, input_tokens: int, output_tokens: int = 0) -> None:
        """What a completed job read and how long it took, in the record. Its deadlines are over."""
        record, times = self.record, job.times
        for timer in job.timers:
            timer.cancel()
        first_step = times.first_step if times.first_step is not None else times.submitted
        record.input_tokens, record.output_tokens, record.computed = input_tokens, output_tokens, True
        record.cached_tokens = job.cached_tokens
        record.queue_s = first_step - times.submitted
        record.inference_s = (times.ended or first_step) - first_step

    def finish_job(self, job: Job, attended: Attended) -> None:
        """Note how a completed job attended, which may be one of several of its request."""
        record = self.record
        told = attention_of(job, attended)
        record.density, record.impl = told.density, told.impl
        error = job.measured.prefill
        record.measured_error = None if error is None else largest_estimate(error)
        observe_job(self.runtime, record, job)
        if isinstance(attended.prefill, ChosenAuto):
            observe_auto(self.runtime, record, job, attended.prefill)
        for chosen in [attended.prefill, *([attended.decode] if attended.split else [])]:
            if chosen.fallback_reason is not None:
                self.runtime.metrics.fallback.labels(chosen.requested, chosen.used, "unsupported").inc()

    async def respond(
        self, build: Callable[[], BaseModel], values: int = 0, exclude: set[str] | None = None
    ) -> Response:
        """The answer as JSON; one of many ``values`` is built and written off the event loop."""

        def write() -> bytes:
            return build().model_dump_json(exclude=exclude).encode("utf-8")

        content = await self.offload(write) if values > LARGE_ANSWER_VALUES else write()
        return Response(content, media_type="application/json")

    def deadlines(self, timeout_ms: int | None) -> tuple[float, float | None]:
        """On the clock: of the whole request, and of its waiting where the client's SDK bounds that."""
        arrival = self.record.started
        timeout_s = self.runtime.settings.timeout_s if timeout_ms is None else timeout_ms / 1e3
        read_timeout_s = _read_timeout(self.request)
        return arrival + timeout_s, None if read_timeout_s is None else arrival + read_timeout_s

    async def _unless_gone(
        self, awaited: Awaitable[T], timeout_s: float | None, stage: Callable[[], str]
    ) -> T:
        """What ``awaited`` gives. ApiError 499 where the client leaves first, TimeoutError after
        ``timeout_s``."""
        event = asyncio.ensure_future(awaited)
        gone = asyncio.ensure_future(self._client_gone())
        both: set[asyncio.Future[Any]] = {event, gone}
        try:
            done, _ = await asyncio.wait(both, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if event in done:
                return event.result()
            if gone in done:
                raise ApiError("client_closed_request", "The client closed the request.", stage=stage())
            raise TimeoutError
        finally:
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)

    async def _client_gone(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass


async def tokens_of(
    flow: Flow, job: Job, first: TokenOut | None, started: bool
) -> AsyncIterator[TokenOut | None]:
    """Tokens as they come, None where a keep-alive is due. Ends when the job is complete; ApiError where it
    fails."""
    if started:
        if first is None:
            return
        yield first
    while True:
        try:
            async with asyncio.timeout(flow.runtime.settings.keep_alive_s):
                token = await job.channel.next()
        except TimeoutError:
            yield None
            continue
        if token is None:
            return
        yield token


def _read_timeout(request: Request) -> float | None:
    """Seconds that the client's SDK says it will wait for an answer; None where it does not say."""
    try:
        seconds = float(request.headers.get("x-stainless-read-timeout", ""))
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and 0 < seconds <= 86_400 else None
