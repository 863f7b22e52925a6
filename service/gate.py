"""The outermost layer, plain ASGI: every request enters and every response leaves through here.

It gives the request its id, checks key, media type and size (counting bytes as they arrive), adds the
headers that every response carries, turns what nobody caught into a 500 without a word about its cause,
counts and logs."""

from __future__ import annotations

import asyncio
import logging
import re
import uuid

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.auth import Headers, KeyCheck
from service.errors import ApiError, internal
from service.logs import log_failure
from service.problems import problem_response
from service.record import Record
from service.report import report
from service.runtime import Runtime

log = logging.getLogger("longreach.http")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class BodyRefused(HTTPException):
    """Carries an ApiError through FastAPI's body reading, which lets only HTTP exceptions pass."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.status)
        self.error = error


class Gate:
    def __init__(self, app: ASGIApp, runtime: Runtime) -> None:
        self.app = app
        self.runtime = runtime
        self._keys = KeyCheck(runtime.settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._serve(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1003})

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        runtime = self.runtime
        record = Record(_request_id(scope["headers"]), scope["method"], scope["path"], runtime.clock())
        scope.setdefault("state", {})["record"] = record
        counts = record.operation is not None
        runtime.in_flight += counts
        try:
            await self._guarded(scope, self._counted(receive, record), self._stamped(send, record), record)
        finally:
            runtime.in_flight -= counts
            report(runtime, record, runtime.clock())

    async def _guarded(self, scope: Scope, receive: Receive, send: Send, record: Record) -> None:
        try:
            self._check(scope)
            await self.app(scope, receive, send)
        except ApiError as error:
            await problem_response(error, record)(scope, receive, send)
        except Exception as error:
            log_failure(log, f"request {record.request_id} failed", error)
            if record.status:
                raise RuntimeError("a response broke off; the log above says where") from None
            await problem_response(internal(), record)(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers: Headers = scope["headers"]
        self._keys.check(scope["path"], headers)
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return
        sent = {name: value.decode("latin-1") for name, value in headers}
        encoding = sent.get(b"content-encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            raise ApiError("unsupported_media_type", "Compressed bodies are not accepted; send plain JSON.")
        media_type = sent.get(b"content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json" and not re.fullmatch(
            r"application/[a-z0-9.-]{1,64}\+json", media_type
        ):
            raise ApiError(
                "unsupported_media_type", "Send the body as JSON with 'Content-Type: application/json'."
            )
        length = sent.get(b"content-length", "")
        if length.isdigit() and (len(length) > 15 or int(length) > self.runtime.settings.max_body_bytes):
            raise _too_large(self.runtime.settings.max_body_bytes)

    def _counted(self, receive: Receive, record: Record) -> Receive:
        limit, pause_s = self.runtime.settings.max_body_bytes, self.runtime.settings.body_timeout_s
        size, complete = 0, False

        async def counted() -> Message:
            nonlocal size, complete
            try:
                message = await (receive() if complete else asyncio.wait_for(receive(), pause_s))
            except TimeoutError:
                detail = f"No part of the body arrived for {pause_s:g} seconds."
                raise BodyRefused(ApiError("request_timeout", detail)) from None
            if message["type"] == "http.disconnect":
                record.disconnected = record.disconnected or not record.status
            size += len(message.get("body", b""))
            complete = complete or not message.get("more_body", False)
            if size > limit:
                raise BodyRefused(_too_large(limit))
            return message

        return counted

    def _stamped(self, send: Send, record: Record) -> Send:
        async def stamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                now = self.runtime.clock()
                message["headers"] = [*message.get("headers", []), *record.headers(now)]
            await send(message)

        return stamped


def _request_id(headers: Headers) -> str:
    """The client's own id where it is harmless, else a new one."""
    given = next((value.decode("latin-1") for name, value in headers if name == b"x-request-id"), "")
    return given if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"


def _too_large(limit: int) -> ApiError:
    detail = (
        f"The body is larger than {limit:,} bytes (max_body_bytes); send less, or token ids instead of text."
    )
    return ApiError("body_too_large", detail, limits={"max_body_bytes": limit})
