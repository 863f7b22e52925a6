"""One request of the chaos run on a connection of its own, down to the moment at which its sender leaves."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

from loadtests.chaos_requests import Request
from loadtests.events import read_events

Leave = Literal["half_head", "half_body", "before_answer", "mid_stream"]
LAST_EVENTS = ("done", "error")


@dataclass(frozen=True)
class Outcome:
    """``status`` 0: none came. ``problem``: what the server did wrong; empty where nothing was."""

    status: int = 0
    code: str = ""
    left: bool = False
    problem: str = ""


class Unanswered(Exception):
    """The connection or the stream ended before the answer was whole; the message says how."""


class ChaosClient:
    """Sends to ``host``; an answer must be whole within ``timeout_s``."""

    def __init__(self, host: str, api_key: str, timeout_s: float) -> None:
        address = urlsplit(host)
        self._host, self._port = address.hostname or "127.0.0.1", address.port or 80
        self._key, self._timeout_s = api_key, timeout_s

    async def send(self, request: Request, leave: Leave | None = None, after_s: float = 0.0) -> Outcome:
        """The outcome; with ``leave``, the connection is closed at that point, ``after_s`` later."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._exchange(request, leave, after_s)
        except TimeoutError:
            return Outcome(problem=f"{request.path}: no whole answer within {self._timeout_s:g} s")
        except (Unanswered, OSError, ValueError, asyncio.IncompleteReadError) as error:
            return Outcome(problem=f"{request.path}: {type(error).__name__}: {error}")

    async def _exchange(self, request: Request, leave: Leave | None, after_s: float) -> Outcome:
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            content = self._head(request) + request.content
            writer.write(content[: _sent_bytes(len(content), len(request.content), leave)])
            if leave in ("half_head", "half_body", "before_answer"):
                await asyncio.sleep(after_s)
                return Outcome(left=True)
            status, headers = await _read_head(reader)
            if leave == "mid_stream" and status == 200:
                await reader.read(1)
                await asyncio.sleep(after_s)
                return Outcome(status, left=True)
            return _judged(request, status, headers, await _read_body(reader, headers))
        finally:
            writer.transport.abort() if leave and after_s > 0 else writer.close()

    def _head(self, request: Request) -> bytes:
        length = len(request.content) if request.announced is None else request.announced
        lines = [
            f"{request.method} {request.path} HTTP/1.1",
            f"Host: {self._host}:{self._port}",
            "Connection: close",
            f"Content-Type: {request.media_type}",
            f"Content-Length: {length}",
            *([f"Authorization: Bearer {self._key}"] if self._key else []),
        ]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()


def departure(draw: random.Random) -> tuple[Leave, float]:
    """Where and how late a client leaves; one that waited closes its connection with a reset."""
    points: tuple[Leave, ...] = ("half_head", "half_body", "before_answer", "before_answer", "mid_stream")
    return draw.choice(points), draw.choice([0.0, 0.0, 0.002, 0.02, 0.2])


def _sent_bytes(whole: int, content: int, leave: Leave | None) -> int:
    if leave == "half_head":
        return (whole - content) // 2
    return whole - (content + 1) // 2 if leave == "half_body" else whole


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines if line)
    return int(first.split()[1]), {name.lower(): value.strip() for name, _, value in pairs}


async def _read_body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if "content-length" in headers:
        return await reader.readexactly(int(headers["content-length"]))
    if headers.get("transfer-encoding") != "chunked":
        return await reader.read()
    body = bytearray()
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += await reader.readexactly(size)
        await reader.readexactly(2)
    return bytes(body)


def _judged(request: Request, status: int, headers: dict[str, str], body: bytes) -> Outcome:
    """The answer's outcome, with what is wrong about it."""
    where = f"{request.method} {request.path}"
    if request.stream and status == 200:
        return _judged_stream(where, body)
    told: Any = json.loads(body) if "json" in headers.get("content-type", "") else None
    code = str(told.get("code", "")) if isinstance(told, dict) and status >= 400 else ""
    problem = ""
    if status == 500:
        problem = f"{where}: 500 {code}"
    elif request.bad and status < 400:
        problem = f"{where}: bad input was answered {status}: {request.content[:120]!r}"
    elif not request.bad and 400 <= status < 500 and status != 429:
        problem = (
            f"{where}: a valid request was refused: {status} {told.get('detail') if told else body[:120]!r}"
        )
    elif status == 429 and "retry-after" not in headers:
        problem = f"{where}: 429 without Retry-After"
    return Outcome(status, code, problem=problem)


def _judged_stream(where: str, body: bytes) -> Outcome:
    if body.rstrip().endswith(b"data: [DONE]"):
        return Outcome(200)
    events = list(read_events(body.splitlines(keepends=True)))
    if not events or (events[-1][0] not in LAST_EVENTS and "error" not in events[-1][1]):
        raise Unanswered("the stream ended without a last event")
    code = str(events[-1][1].get("code", ""))
    wrong = code in ("internal_error", "non_finite_output")
    return Outcome(200, code, problem=f"{where}: the stream ended with {code}" if wrong else "")
