"""Requests of the measuring scripts over plain HTTP, one connection each, with the times of what arrives."""

from __future__ import annotations

import http.client
import json
import math
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

from loadtests.events import read_events


@dataclass
class Answer:
    """One request and what came of it. Times are seconds on the script's own clock."""

    sent_s: float
    status: int = 0
    """0: no answer came."""
    body: dict[str, Any] = field(default_factory=dict)
    """The answer, or the last event of a stream."""
    problem: str = ""
    """Why this is no answer to count; empty where it is one."""
    token_times_s: list[float] = field(default_factory=list)
    ended_s: float = 0.0

    @property
    def first_s(self) -> float:
        """Seconds until the first token, or the whole answer where nothing was streamed."""
        return (self.token_times_s[0] if self.token_times_s else self.ended_s) - self.sent_s

    @property
    def total_s(self) -> float:
        return self.ended_s - self.sent_s

    @property
    def busy_s(self) -> float:
        """Seconds between the request's first step and its last, as the server tells them."""
        stats = self.body.get("stats") or {}
        return float(stats.get("prefill_ms", math.nan) + stats.get("decode_ms", math.nan)) / 1e3

    @property
    def cached_tokens(self) -> int:
        return int((self.body.get("usage") or {}).get("cached_tokens", 0))


class Client:
    """``host`` as ``http://name:port``. Safe to use from many threads."""

    def __init__(self, host: str, api_key: str = "", timeout_s: float = 3600.0) -> None:
        address = urlsplit(host)
        self._where = (address.hostname or "127.0.0.1", address.port or 80)
        self._timeout_s = timeout_s
        self._headers = {"content-type": "application/json"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"

    def post(self, path: str, body: dict[str, Any]) -> Answer:
        """Send one request and read its answer to the end; what goes wrong is in ``problem``."""
        answer = Answer(perf_counter())
        connection = http.client.HTTPConnection(*self._where, timeout=self._timeout_s)
        try:
            connection.request("POST", path, json.dumps(body).encode(), self._headers)
            response = connection.getresponse()
            answer.status = response.status
            if body.get("stream") and response.status == 200:
                _read_stream(response, answer)
            else:
                answer.body = json.loads(response.read())
            if answer.status != 200:
                answer.problem = f"{answer.status} {answer.body.get('code')}: {answer.body.get('detail')}"
        except (OSError, http.client.HTTPException, ValueError) as error:
            answer.problem = f"{type(error).__name__}: {error}"
        finally:
            answer.ended_s = perf_counter()
            connection.close()
        return answer


def _read_stream(response: http.client.HTTPResponse, answer: Answer) -> None:
    for event, data in read_events(response):
        answer.body = data
        if event == "token":
            answer.token_times_s.append(perf_counter())
        elif event == "error":
            answer.problem = f"the stream ended with an error: {data.get('detail')}"
        elif event == "done":
            return
    answer.problem = answer.problem or "the stream ended without a 'done' event"
