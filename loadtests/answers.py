"""From an HTTP response to an outcome: answered, rejected, refused or failed, and with what times."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from loadtests.checks import BadAnswer, check_answer
from loadtests.events import read_events
from loadtests.report import Key, Outcome


def read_outcome(key: Key, response: Any, started: float) -> Outcome:
    """Read ``response`` (a FastHttpUser's) to its end. ``started`` is a perf_counter reading in seconds."""
    if retry_after_s(response) is not None:
        return Outcome("rejected", ms_since(started))
    if response.status_code == 413 and _body(response).get("code") == "never_fits_memory":
        return Outcome("refused", ms_since(started), reason="413 never_fits_memory")
    if response.status_code != 200:
        return Outcome("failed", ms_since(started), reason=_problem(response))
    read = _read_stream if key.endpoint == "generate" else _read
    try:
        return read(key, response, started)
    except Exception as error:  # whatever a server or a connection does wrong is a result here, never a crash
        return Outcome("failed", ms_since(started), reason=f"{type(error).__name__}: {error}"[:300])


def retry_after_s(response: Any) -> float | None:
    """The Retry-After of a 429 in seconds; None for any other answer, or where it is not readable."""
    if response.status_code != 429 or not response.headers:
        return None
    try:
        return max(0.0, float(response.headers.get("retry-after")))
    except (TypeError, ValueError):
        return None


def ms_since(started: float) -> float:
    return (time.perf_counter() - started) * 1000


def _read(key: Key, response: Any, started: float) -> Outcome:
    answer = response.json()
    total_ms = ms_since(started)
    check_answer(key.endpoint, key.backend, answer)
    return Outcome(
        "answered",
        total_ms,
        input_tokens=answer["usage"]["prompt_tokens"],
        density=answer["attention"]["density"],
    )


def _read_stream(key: Key, response: Any, started: float) -> Outcome:
    """Times of the tokens as they arrive; BadAnswer where the stream reports an error or lacks ``done``."""
    arrivals: list[float] = []
    for event, data in read_events(_lines(response)):
        if event == "token":
            arrivals.append(ms_since(started))
        elif event == "error":
            raise BadAnswer(f"the stream ended with an error: {data.get('detail', data)}")
        elif event == "done":
            total_ms = ms_since(started)
            check_answer(key.endpoint, key.backend, data)
            return Outcome(
                "answered",
                total_ms,
                input_tokens=data["usage"]["prompt_tokens"],
                output_tokens=data["usage"]["completion_tokens"],
                time_to_first_token_ms=arrivals[0] if arrivals else None,
                inter_token_ms=tuple(b - a for a, b in zip(arrivals, arrivals[1:], strict=False)),
                density=data["attention"]["density"],
            )
    raise BadAnswer(f"the stream ended after {len(arrivals)} tokens without a 'done' event")


def _lines(response: Any) -> Iterator[bytes]:
    # Not the client's iter_content and iter_lines: they wait until 1,024 bytes are there, which would make
    # every time to first token a lie, and they take a broken connection for the end of the stream.
    while line := response._response.readline(b"\n"):
        yield bytes(line)


def _body(response: Any) -> dict[str, Any]:
    try:
        parsed = response.json()
    except (ValueError, TypeError, OSError):
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _problem(response: Any) -> str:
    """One line for the summary: the status, the server's code and words, or the connection's error."""
    if not response.status_code:
        return f"no answer: {getattr(response, 'error', None)!r}"
    missing = " without Retry-After" if response.status_code == 429 else ""
    body = _body(response)
    return f"{response.status_code}{missing} {body.get('code', '')} {body.get('detail', '')}".strip()[:300]
