"""Long prompts are looked up in the cache off the event loop, and keep their turn."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from models.contract import Prompt
from service.flow import OFF_LOOP_TOKENS
from tests.service.conftest import Blocker, serving, wait_for
from tests.service.fake_model import FakeModel, decoder

LONG, SHORT = "x" * (OFF_LOOP_TOKENS + 10), "abc"
BODIES: list[tuple[str, Callable[[str], dict[str, Any]]]] = [
    ("/v1/generate", lambda text: {"prompt": text, "max_new_tokens": 1}),
    ("/v1/generate", lambda text: {"prompt": text, "max_new_tokens": 1, "stream": True}),
    ("/v1/completions", lambda text: {"model": "dec", "prompt": text, "max_tokens": 1, "n": 2}),
]


def watched(
    monkeypatch: pytest.MonkeyPatch, gate: threading.Event | None = None
) -> tuple[FakeModel, list[str]]:
    """A model, and the threads that ask its cache; about long prompts they must wait for ``gate``."""
    model, threads = decoder(max_tokens=1 << 15), list[str]()
    plain = model.cached_tokens

    def cached_tokens(prompt: Prompt) -> int:
        threads.append(threading.current_thread().name)
        if gate is not None and len(prompt.token_ids) > OFF_LOOP_TOKENS:
            assert gate.wait(30)
        return plain(prompt)

    monkeypatch.setattr(model, "cached_tokens", cached_tokens)
    return model, threads


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_the_cache_is_asked_about_a_long_prompt_off_the_event_loop(
    path: str, body: Callable[[str], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, threads = watched(monkeypatch)
    with serving(model) as server:
        assert server.post(path, body(SHORT)).status_code == 200
        assert threads == ["test-server"], "for few tokens another thread is not worth its while"
        assert server.post(path, body(LONG)).status_code == 200
    assert len(threads) == 2 and threads[1].startswith("longreach-worker-read"), "asked once"


def test_short_prompts_are_served_while_a_long_one_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    model, threads = watched(monkeypatch, gate)
    with serving(model) as server, ThreadPoolExecutor(1) as pool:
        try:
            long = pool.submit(server.post, "/v1/generate", {"prompt": LONG, "max_new_tokens": 1})
            wait_for(lambda: threads)
            assert server.post("/v1/generate", {"prompt": SHORT, "max_new_tokens": 1}).status_code == 200
            assert not long.done()
        finally:
            gate.set()
        assert long.result().status_code == 200


def test_a_prompt_keeps_the_turn_of_its_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, blocker = threading.Event(), Blocker()
    model, threads = watched(monkeypatch, gate)
    with serving(model, step_tokens=512) as server, ThreadPoolExecutor(3) as pool:
        generate: Callable[[str], Any] = lambda text: server.post(  # noqa: E731
            "/v1/generate", {"prompt": text, "max_new_tokens": 1}
        )
        try:
            model.on_step = blocker
            calls = [pool.submit(generate, SHORT)]
            assert blocker.entered.wait(20)
            calls.append(pool.submit(generate, LONG))
            wait_for(lambda: len(threads) == 2)
            calls.append(pool.submit(generate, "y" * 300))
            wait_for(lambda: server.runtime.engine.load("dec").queued_requests == 1)
            gate.set()
            wait_for(lambda: server.runtime.engine.load("dec").queued_requests == 2)
        finally:
            gate.set()
            blocker.release.set()
        assert all(call.result().status_code == 200 for call in calls)
    assert model.steps[1][0] == (512, 0), "the long one came first"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_or_a_deadline_that_passes_meanwhile_leaves_nothing_behind(
    stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    model, _ = watched(monkeypatch, gate)
    with serving(model) as server:
        try:
            body = {"prompt": LONG, "max_new_tokens": 1, "timeout_ms": 200, "stream": stream}
            answer = server.post("/v1/generate", body)
            assert answer.status_code == 504 and answer.json()["code"] == "deadline_exceeded"
        finally:
            gate.set()
        wait_for(lambda: server.runtime.readers.num_reading == 0)
        assert server.runtime.engine.num_jobs == 0 and not model.steps
