"""Server-sent events of a running job. Whatever could be refused has been refused before the first byte, so
a 429 or 504 arrives as one; what fails later is told as an event."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from pydantic import BaseModel
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from service.errors import ApiError, internal
from service.flow import Flow, tokens_of
from service.jobs import Job
from service.logs import log_failure
from service.sequences import TokenOut

_log = logging.getLogger("longreach.http")
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class EventFormat:
    """How one route writes its events."""

    def token(self, token: TokenOut) -> bytes:
        raise NotImplementedError

    def done(self) -> bytes:
        """Called once, when the job is complete."""
        raise NotImplementedError

    def error(self, problem: dict[str, Any]) -> bytes:
        raise NotImplementedError


class JobStream(StreamingResponse):
    """Ends its job when the response ends, however it ends."""

    media_type = "text/event-stream"

    def __init__(self, flow: Flow, job: Job, chunks: AsyncIterator[bytes]) -> None:
        super().__init__(chunks, headers=HEADERS)
        self._flow, self._job = flow, job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = self._flow.record
        record.streaming = True
        try:
            await super().__call__(scope, receive, send)
        finally:
            if not self._job.ended:
                record.error_code = "client_closed_request"
            self._flow.abandon(self._job)


async def stream_job(flow: Flow, job: Job, events: EventFormat, finish: Callable[[], None]) -> JobStream:
    """Submit, wait for the first event (or as long as a keep-alive allows), then stream."""
    flow.submit(job)
    first: TokenOut | None = None
    started = True
    try:
        first = await flow.next_event(job, timeout_s=flow.runtime.settings.keep_alive_s)
    except TimeoutError:
        started = False

    async def chunks() -> AsyncIterator[bytes]:
        try:
            async for token in tokens_of(flow, job, first, started):
                told = KEEPALIVE_COMMENT if token is None else events.token(token)
                if told:
                    yield told
            await flow.measure(job)
            finish()
            yield events.done()
        except ApiError as error:
            flow.record.error_code, flow.record.error_stage = error.code, error.stage
            yield events.error(error.problem(flow.record.request_id))
        except Exception as error:
            log_failure(_log, f"stream of {job.id} failed", error)
            flow.record.error_code = "internal_error"
            yield events.error(internal().problem(flow.record.request_id))

    return JobStream(flow, job, chunks())


def event(name: str | None, data: BaseModel | str) -> bytes:
    """One event: ``name`` for native routes, none for OpenAI's."""
    text = data if isinstance(data, str) else data.model_dump_json()
    return format_sse_event(data_str=text, event=name)
