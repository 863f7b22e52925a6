"""What the server under test offers: its models, their tasks and limits, and the backends each can run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

ENDPOINTS = ("encode", "generate", "score")


class ServerProblem(Exception):
    """The run cannot begin; the message says why and what to do."""


@dataclass
class Target:
    """One endpoint of one model."""

    endpoint: str
    model: str
    max_tokens: int
    backends: tuple[str, ...]
    characters_per_token: float

    def num_characters(self, tokens: int) -> int:
        """Characters of about ``tokens`` tokens, a tenth less: denser text must not break the limit."""
        return max(1, int(tokens * self.characters_per_token * 0.9))

    def observe(self, num_characters: int, tokens: int) -> None:
        """Correct downwards only, so that the margin holds for the densest text seen. Short texts say little:
        special tokens weigh too much in them."""
        if tokens >= 500:
            self.characters_per_token = min(self.characters_per_token, num_characters / tokens)


class Server:
    """The few plain calls that a run makes before its users start."""

    def __init__(self, host: str, api_key: str | None = None, timeout_s: float = 600.0) -> None:
        self._host = host.rstrip("/")
        self._timeout_s = timeout_s
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def call(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        headers = self.headers | ({"Content-Type": "application/json"} if data else {})
        request = Request(self._host + path, data=data, headers=headers)
        try:
            with urlopen(request, timeout=self._timeout_s) as response:
                parsed = json.load(response)
        except HTTPError as error:
            words = error.read(500).decode(errors="replace")
            raise ServerProblem(f"{path} answered {error.code}: {words}") from error
        except json.JSONDecodeError:
            parsed = None
        except OSError as error:  # refused, unreachable, timed out
            way_out = "start a server with 'make serve' or name one: HOST=http://..."
            raise ServerProblem(f"no answer from {self._host}{path} ({error}); {way_out}") from error
        if not isinstance(parsed, dict):
            raise ServerProblem(f"{self._host}{path} did not answer with JSON; is that a Longreach server?")
        return parsed

    def wait_until_ready(self, wait_s: float, sleep: Callable[[float], None] = time.sleep) -> None:
        """Until ``/readyz`` answers 200; ServerProblem with its last answer after ``wait_s``."""
        end = time.monotonic() + wait_s
        while True:
            try:
                self.call("/readyz")
                return
            except ServerProblem as problem:
                if time.monotonic() >= end:
                    raise ServerProblem(f"not ready after {wait_s:g} s: {problem}") from problem
            sleep(1.0)


def discover(
    server: Server, text: str, *, endpoints: Sequence[str], models: Sequence[str], backends: Sequence[str]
) -> list[Target]:
    """Every endpoint, model and backend that go together; empty ``models`` or ``backends`` mean all.

    A short request to each model shows that it answers, and how many characters a token has there.
    """
    known = [each["name"] for each in server.call("/v1/attention/backends")["data"]]
    offered = {each["id"]: each for each in server.call("/v1/models")["data"]}
    _all_known("endpoint", endpoints, ENDPOINTS)
    _all_known("model", models, offered)
    _all_known("backend", backends, known)
    targets = []
    for name, model in offered.items():
        usable = tuple(each for each in known if each in model["backends"] and each in (backends or known))
        tasks = [each for each in endpoints if each in model["tasks"]]
        if usable and tasks and name in (models or offered):
            ratio = _characters_per_token(server, tasks[0], model, usable[0], text)
            targets += [Target(task, name, model["max_tokens"], usable, ratio) for task in tasks]
    if not targets:
        raise ServerProblem("no model there serves that: leave out some of --endpoints, --models, --backends")
    return targets


def body_of(endpoint: str, model: str, text: str, backend: str, max_new_tokens: int) -> dict[str, Any]:
    """The request that a run sends: native routes, ``fallback: error`` (the default), nothing truncated."""
    body: dict[str, Any] = {"model": model, "attention": {"backend": backend}}
    if endpoint == "generate":
        return body | {"prompt": text, "max_new_tokens": max_new_tokens}
    return body | {"input": text}


def _characters_per_token(
    server: Server, endpoint: str, model: dict[str, Any], backend: str, text: str
) -> float:
    sample = text[: min(2000, model["max_tokens"] // 2)]
    answer = server.call(f"/v1/{endpoint}", body_of(endpoint, model["id"], sample, backend, 1))
    tokens: int = answer["usage"]["prompt_tokens"]
    return len(sample) / max(1, tokens)


def _all_known(what: str, asked: Sequence[str], known: Sequence[str] | dict[str, Any]) -> None:
    for each in asked:
        if each not in known:
            raise ServerProblem(f"unknown {what} {each!r}; there are: {', '.join(known)}")
