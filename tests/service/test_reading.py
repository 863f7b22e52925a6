"""Tokenising is work like any other: counted, bounded in time, and nobody's reason to wait for /metrics."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from models.contract import Encoding
from service.readers import Readers
from tests.service.conftest import sample, serving, wait_for
from tests.service.fake_model import FakeModel, decoder, encoder
from tests.service.test_cancel import send

ROUTES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/encode", {"model": "enc", "input": "SLOW"}),
    ("/v1/embeddings", {"model": "enc", "input": "SLOW"}),
    ("/v1/generate", {"model": "dec", "prompt": "SLOW"}),
    ("/v1/score", {"model": "dec", "input": "SLOW"}),
    ("/v1/completions", {"model": "dec", "prompt": "SLOW"}),
    ("/v1/chat/completions", {"model": "dec", "messages": [{"role": "user", "content": "SLOW"}]}),
]


class Gate:
    """Holds the tokenising of texts that say SLOW."""

    def __init__(self, *models: FakeModel) -> None:
        self.held, self.begun, self.release = 0, [], threading.Event()  # type: int, list[str], threading.Event
        for model in models:
            self._guard(model)

    def _guard(self, model: FakeModel) -> None:
        plain = model.tokenizer.encode

        def encode(text: str, *, special_tokens: bool = True) -> Encoding:
            if "SLOW" in text:
                self.begun.append(text)
                assert self.release.wait(30), "never released"
            return plain(text, special_tokens=special_tokens)

        model.tokenizer.encode = encode  # type: ignore[method-assign]


@contextmanager
def gated(*models: FakeModel) -> Iterator[Gate]:
    gate = Gate(*models)
    try:
        yield gate
    finally:
        gate.release.set()


@pytest.mark.parametrize(("path", "body"), ROUTES, ids=lambda value: str(value)[:24])
def test_a_deadline_holds_while_the_input_is_tokenised(path: str, body: dict[str, Any]) -> None:
    models = encoder(), decoder()
    with serving(*models) as server, gated(*models) as gate:
        answer = server.post(path, {**body, "timeout_ms": 200})
        assert answer.status_code == 504 and answer.json()["code"] == "deadline_exceeded"
        assert answer.headers["x-should-retry"] == "false"
        waiting = server.post(path, body, headers={"x-stainless-read-timeout": "0.2"})
        assert waiting.status_code == 504
        gate.release.set()
        wait_for(lambda: server.runtime.readers.num_reading == 0)
        assert not models[0].steps and not models[1].steps, "what is late is not run"


def test_what_is_tokenised_counts_towards_the_queue_until_its_thread_is_free() -> None:
    model = encoder()
    with serving(model, max_queue_requests=2) as server, gated(model) as gate, ThreadPoolExecutor(2) as pool:
        slow = {"input": "SLOW", "timeout_ms": 300}
        late = [pool.submit(server.post, "/v1/encode", slow) for _ in range(2)]
        assert [call.result().status_code for call in late] == [504, 504]
        for path in ("/v1/encode", "/v1/tokenize"):
            refused = server.post(path, {"input": "x"})
            assert refused.status_code == 429 and refused.json()["code"] == "queue_full", path
            assert int(refused.headers["retry-after"]) >= 1
        assert server.get("/readyz").status_code == 429
        gate.release.set()
        wait_for(lambda: server.runtime.readers.num_reading == 0)
        assert server.post("/v1/encode", {"input": "x"}).status_code == 200


def test_a_client_that_leaves_before_its_input_is_tokenised_is_never_read() -> None:
    model = encoder()
    with serving(model) as server, gated(model) as gate:
        connections = [send(server, "/v1/encode", {"input": f"SLOW {i}"}) for i in range(6)]
        wait_for(lambda: server.runtime.readers.num_reading == 6 and len(gate.begun) == 4)
        for connection in connections:
            connection.close()
        wait_for(lambda: server.runtime.in_flight == 0)
        assert server.runtime.readers.num_reading == 4, "two had not begun"
        gate.release.set()
        wait_for(lambda: server.runtime.readers.num_reading == 0)
        assert len(gate.begun) == 4 and not model.steps
        text = server.get("/metrics").text
        assert sample(text, "longreach_requests_cancelled_total", operation="encode", stage="queued") == 6


def test_metrics_answer_while_every_reader_is_busy() -> None:
    model = encoder()
    with serving(model) as server, gated(model) as gate, ThreadPoolExecutor(8) as pool:
        busy = [pool.submit(server.post, "/v1/encode", {"input": "SLOW"}) for _ in range(8)]
        wait_for(lambda: len(gate.begun) == 4)
        assert server.get("/metrics").status_code == 200
        gate.release.set()
        assert {call.result().status_code for call in busy} == {200}


def test_a_reading_that_fails_or_is_refused_leaves_the_count() -> None:
    readers = Readers(1)
    with pytest.raises(ZeroDivisionError):
        readers.submit(lambda: 1 // 0).result(10)
    wait_for(lambda: readers.num_reading == 0)
    readers.shutdown()
    with pytest.raises(RuntimeError):
        readers.submit(lambda: 1)
    assert readers.num_reading == 0
