"""Clients that leave and deadlines that pass: work stops before its next step and what it held is freed."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest

from service.jobs import Channel
from tests.service.bench import FixedCosts
from tests.service.conftest import Blocker, Served, in_process, sample, serving, wait_for
from tests.service.fake_model import decoder, encoder, slow

GENERATE = {"prompt": "x", "max_new_tokens": 900}


def send(server: Served, path: str, body: dict[str, Any]) -> socket.socket:
    """A request whose connection stays in our hands."""
    raw = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", server.port))
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
    return connection


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/generate", "/v1/completions", "/v1/chat/completions"])
def test_a_client_that_leaves_frees_its_cache_before_the_next_step(path: str, stream: bool) -> None:
    model = decoder(on_step=slow(0.01))
    body: dict[str, Any] = {"model": "dec", "stream": stream}
    body |= {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
    body |= {"max_new_tokens": 900} if path == "/v1/generate" else {"max_tokens": 900}
    with serving(model) as server:
        connection = send(server, path, body)
        wait_for(lambda: len(model.steps) > 3)
        connection.close()
        wait_for(lambda: not model.open_states)
        steps = len(model.steps)
        time.sleep(0.1)
        assert len(model.steps) == steps < 500, "steps went on after the client had left"
        assert server.runtime.engine.reserved_bytes == 0 and server.runtime.engine.num_jobs == 0
        operation = {"/v1/generate": "generate", "/v1/completions": "completions"}.get(path, "chat")
        stage = "streaming" if stream else "running"
        name = "longreach_requests_cancelled_total"
        wait_for(lambda: sample(server.get("/metrics").text, name, operation=operation, stage=stage) == 1)
        code = sample(
            server.get("/metrics").text,
            "longreach_requests_total",
            model="dec",
            operation=operation,
            attention="exact",
            code="499",
        )
        assert code == 1


def test_a_client_that_leaves_while_waiting_is_never_run() -> None:
    blocker = Blocker()
    model = encoder(on_step=blocker)
    with serving(model) as server, ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.post, "/v1/encode", {"input": "first"})
        blocker.entered.wait(20)
        connection = send(server, "/v1/encode", {"input": "second"})
        wait_for(lambda: server.runtime.engine.load("enc").queued_requests == 1)
        connection.close()
        wait_for(lambda: server.runtime.engine.load("enc").queued_requests == 0)
        blocker.release.set()
        assert first.result().status_code == 200
        assert len(model.steps) == 1
        text = server.get("/metrics").text
        assert sample(text, "longreach_requests_cancelled_total", operation="encode", stage="queued") == 1


def test_leaving_in_the_middle_of_a_long_step_answers_nobody_and_frees_all() -> None:
    blocker = Blocker()
    model = encoder(on_step=blocker)
    with serving(model) as server:
        connection = send(server, "/v1/encode", {"input": "long"})
        blocker.entered.wait(20)
        connection.close()
        wait_for(lambda: server.runtime.engine.num_jobs == 0)
        assert server.runtime.engine.reserved_bytes > 0, "its memory is in use until the step ends"
        blocker.release.set()
        wait_for(lambda: server.runtime.engine.reserved_bytes == 0)
        wait_for(lambda: not model.open_states)


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_while_a_long_prompt_is_read_ends_its_forward_where_it_may_be_left(
    stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.runtime.CostModel", FixedCosts)
    blocker = Blocker()
    pieces: list[int] = []

    def at_ten(piece: int) -> None:
        pieces.append(piece)
        if piece == 10:
            blocker(None)

    model = decoder(pieces=50, on_piece=at_ten, max_tokens=4096)
    with serving(model, short_ms=100, keep_alive_s=0.05) as server:
        body = {"prompt": "x" * 900, "stream": stream, "max_new_tokens": 5}
        connection = send(server, "/v1/generate", body)
        blocker.entered.wait(20)
        connection.close()
        wait_for(lambda: server.runtime.engine.num_jobs == 0)
        assert model.open_forwards and model.open_states
        blocker.release.set()
        wait_for(lambda: not model.open_states and server.runtime.engine.reserved_bytes == 0)
        assert pieces == list(range(11)) and not model.open_forwards
        text = server.get("/metrics").text
        assert (sample(text, "longreach_lane_seconds_total", lane="long") or 0) > 0, "in vain, but spent"
        assert sample(text, "longreach_long_step_pauses_total", model="dec") == 0
        assert server.post("/v1/generate", {"prompt": "y", "max_new_tokens": 2}).status_code == 200


def test_a_drain_lets_a_long_step_that_is_begun_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.runtime.CostModel", FixedCosts)
    blocker = Blocker()
    model = encoder(pieces=50, on_piece=lambda piece: blocker(None) if piece == 10 else None)
    with serving(model, short_ms=100) as server, ThreadPoolExecutor(1) as pool:
        long = pool.submit(server.post, "/v1/encode", {"input": "x" * 400})
        blocker.entered.wait(20)
        server.runtime.begin_drain()
        refused = server.post("/v1/encode", {"input": "y"})
        assert refused.status_code == 503 and refused.json()["code"] == "draining"
        blocker.release.set()
        assert long.result().status_code == 200


def test_a_deadline_holds_for_what_runs_and_for_what_waits() -> None:
    blocker = Blocker()
    model = encoder(on_step=blocker)
    with serving(model) as server, ThreadPoolExecutor(2) as pool:
        running = pool.submit(server.post, "/v1/encode", {"input": "a", "timeout_ms": 300})
        blocker.entered.wait(20)
        waiting = pool.submit(server.post, "/v1/encode", {"input": "b", "timeout_ms": 200})
        answers = running.result(), waiting.result()
        assert [answer.status_code for answer in answers] == [504, 504], (
            "answered although the step still runs"
        )
        text = server.get("/metrics").text
        for stage in ("queued", "running"):
            assert sample(text, "longreach_deadline_exceeded_total", operation="encode", stage=stage) == 1
        blocker.release.set()
        wait_for(lambda: server.runtime.engine.reserved_bytes == 0 and not model.open_states)


def test_an_sdks_read_timeout_bounds_waiting_but_not_running() -> None:
    blocker = Blocker()
    with serving(encoder(on_step=blocker)) as server, ThreadPoolExecutor(2) as pool:
        headers = {"x-stainless-read-timeout": "0.3"}
        running = pool.submit(server.post, "/v1/encode", {"input": "a"}, headers=headers)
        blocker.entered.wait(20)
        waiting = pool.submit(server.post, "/v1/encode", {"input": "b"}, headers=headers)
        assert waiting.result().status_code == 504
        blocker.release.set()
        assert running.result().status_code == 200
        for odd in ("nan", "-1", "x", "1e999", ""):
            assert (
                server.post(
                    "/v1/encode", {"input": "c"}, headers={"x-stainless-read-timeout": odd}
                ).status_code
                == 200
            )


def test_a_stream_that_fails_before_its_first_byte_answers_with_a_status() -> None:
    blocker = Blocker()
    with serving(decoder(on_step=blocker), max_queue_requests=1) as server, ThreadPoolExecutor(3) as pool:
        running = pool.submit(server.post, "/v1/generate", {"prompt": "a", "max_new_tokens": 1})
        blocker.entered.wait(20)
        waiting = pool.submit(
            server.post,
            "/v1/generate",
            {"prompt": "b", "stream": True, "timeout_ms": 400, "max_new_tokens": 1},
        )
        wait_for(lambda: server.runtime.engine.load("dec").queued_requests == 1)
        full = server.post("/v1/generate", {"prompt": "c", "stream": True})
        assert (
            full.status_code == 429 and full.json()["code"] == "queue_full" and "retry-after" in full.headers
        )
        assert waiting.result().status_code == 504
        blocker.release.set()
        assert running.result().status_code == 200


@pytest.mark.parametrize("path", ["/v1/generate", "/v1/completions"])
def test_a_stream_that_fails_later_says_so_in_an_event(path: str) -> None:
    model = decoder()
    calls = iter(range(10_000))

    def fail_at_five(slices: object) -> None:
        if next(calls) == 5:
            raise RuntimeError("secret")

    model.on_step = fail_at_five
    with in_process(model) as client:
        body = {"model": "dec", "prompt": "x", "stream": True}
        body |= {"max_new_tokens": 50} if path == "/v1/generate" else {"max_tokens": 50}
        answer = client.post(path, json=body)
        assert answer.status_code == 200 and "secret" not in answer.text
        blocks = answer.text.strip().split("\n\n")
        if path == "/v1/generate":
            assert blocks[-1].startswith("event: error\n")
            assert json.loads(blocks[-1].split("data: ")[1])["code"] == "internal_error"
        else:
            assert blocks[-1] == "data: [DONE]"
            assert json.loads(blocks[-2].removeprefix("data: "))["error"]["code"] == "internal_error"
        wait_for(lambda: not model.open_states)
        operation = "generate" if path == "/v1/generate" else "completions"
        labels = {"model": "dec", "operation": operation, "attention": "exact"}
        text = client.get("/metrics").text
        assert sample(text, "longreach_requests_total", **labels, code="500") == 1, (
            "a failure, whatever the status"
        )


def test_a_silent_stream_sends_keep_alive_comments() -> None:
    model = decoder(on_step=slow(0.15))
    with in_process(model, keep_alive_s=0.05) as client:
        text = client.post("/v1/generate", json={"prompt": "x", "stream": True, "max_new_tokens": 2}).text
    assert text.startswith(": ping\n\n") and text.count("event: token") == 2 and "event: done" in text


def test_a_full_queue_answers_429_with_the_time_to_come_back_and_recovers() -> None:
    blocker = Blocker()
    model = encoder(on_step=blocker)
    with serving(model, max_queue_requests=3) as server, ThreadPoolExecutor(4) as pool:
        running = pool.submit(server.post, "/v1/encode", {"input": "a"})
        blocker.entered.wait(20)
        waiting = [pool.submit(server.post, "/v1/encode", {"input": "b"}) for _ in range(3)]
        wait_for(lambda: server.runtime.engine.load("enc").queued_requests == 3)
        for _ in range(5):
            answer = server.post("/v1/encode", {"input": "c"})
            assert answer.status_code == 429 and answer.json()["limits"] == {"max_queue_requests": 3}
            assert int(answer.headers["retry-after"]) >= 1
        ready = server.get("/readyz")
        assert ready.status_code == 429 and server.get("/livez").status_code == 200
        blocker.release.set()
        assert [answer.result().status_code for answer in [running, *waiting]] == [200] * 4
        assert server.post("/v1/encode", {"input": "c"}).status_code == 200
        text = server.get("/metrics").text
        assert sample(text, "longreach_requests_rejected_total", operation="encode", reason="queue_full") == 5


def test_the_token_budget_of_the_queue_is_a_429_and_a_request_above_it_a_413() -> None:
    blocker = Blocker()
    with serving(encoder(on_step=blocker), max_queue_tokens=100) as server, ThreadPoolExecutor(2) as pool:
        running = pool.submit(server.post, "/v1/encode", {"input": "a"})
        blocker.entered.wait(20)
        waiting = pool.submit(server.post, "/v1/encode", {"input": "b" * 60})
        wait_for(lambda: server.runtime.engine.load("enc").queued_requests == 1)
        refused = server.post("/v1/encode", {"input": "c" * 60})
        assert refused.status_code == 429 and refused.json()["code"] == "token_budget_exhausted"
        assert server.post("/v1/encode", {"input": ["d" * 60] * 2}).status_code == 413
        blocker.release.set()
        assert running.result().status_code == waiting.result().status_code == 200


def test_many_clients_that_leave_at_random_lose_nothing() -> None:
    models = encoder(on_step=slow(0.002)), decoder(on_step=slow(0.002))
    with serving(*models) as server:

        def visit(i: int) -> int | None:
            body: dict[str, Any] = {"prompt": f"p{i}", "max_new_tokens": 60, "stream": i % 2 == 0}
            path, body = ("/v1/encode", {"input": ["x"] * 20}) if i % 5 == 0 else ("/v1/generate", body)
            timeout = 0.03 if i % 3 == 0 else 30
            try:
                return httpx2.post(server.url + path, json=body, timeout=timeout).status_code
            except httpx2.TimeoutException:
                return None

        with ThreadPoolExecutor(16) as pool:
            statuses = list(pool.map(visit, range(45)))
        assert {status for i, status in enumerate(statuses) if i % 3} == {200}
        wait_for(lambda: server.runtime.in_flight == 0 and server.runtime.engine.num_jobs == 0)
        wait_for(lambda: not any(model.open_states for model in models))
        assert server.runtime.engine.reserved_bytes == 0 and server.runtime.engine.healthy


def test_an_event_for_a_loop_that_is_gone_is_nobodys_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine thread outlives its readers: telling a dead event loop must not stop it, not even one that
    closes between the question and the call."""

    async def make() -> Channel:
        return Channel()

    loop = asyncio.new_event_loop()
    channel = loop.run_until_complete(make())
    loop.close()
    channel.put([None])
    monkeypatch.setattr(loop, "is_closed", lambda: False)
    channel.put([None])


def test_a_client_that_leaves_harms_no_later_request() -> None:
    model = decoder(on_step=slow(0.02))
    with serving(model) as server:
        connection = send(server, "/v1/generate", GENERATE)
        wait_for(lambda: model.steps)
        connection.close()
        assert server.post("/v1/generate", {"prompt": "y", "max_new_tokens": 2}).status_code == 200
