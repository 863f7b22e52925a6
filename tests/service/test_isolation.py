"""What a request gets depends on that request alone, whatever runs beside it."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.service.bench import FixedCosts
from tests.service.conftest import Served, in_process, sample, serving, wait_for
from tests.service.fake_model import decoder, encoder, slow

BACKENDS = ["exact", "window", "bigbird", {"backend": "window", "params": {"window": 9}, "seed": 4}, "random"]


def mixed_requests(count: int) -> list[tuple[str, dict[str, Any]]]:
    rng = random.Random(11)
    requests: list[tuple[str, dict[str, Any]]] = []
    for i in range(count):
        text = "".join(rng.choice("abcdefgh ") for _ in range(rng.choice([1, 20, 300, 480])))
        attention = BACKENDS[i % len(BACKENDS)]
        kind = i % 5
        if kind == 0:
            requests.append(("/v1/encode", {"input": [text, text[::-1], "x"], "attention": attention}))
        elif kind == 1:
            sampling = {"temperature": 1.5, "seed": i, "n": 3, "top_k": 50}
            body = {"prompt": text, "max_new_tokens": 12, "attention": attention, "logprobs": 2, **sampling}
            requests.append(("/v1/generate", body))
        elif kind == 2:
            pair = {"prefill": attention, "decode": "exact"}
            requests.append(("/v1/generate", {"prompt": text, "max_new_tokens": 7, "attention": pair}))
        elif kind == 3:
            requests.append(("/v1/score", {"input": text + "ab", "attention": attention}))
        else:
            body = {"input": text, "attention": attention, "late_chunking": {"chunk_tokens": 50}}
            requests.append(("/v1/encode", body))
    return requests


def essence(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer without its id and its times."""
    return {name: value for name, value in answer.items() if name not in ("id", "stats")}


@pytest.mark.parametrize("short_ms", [1e6, 100], ids=["all short", "some long"])
def test_32_concurrent_mixed_requests_answer_exactly_as_each_does_alone(
    short_ms: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.runtime.CostModel", FixedCosts)
    requests = mixed_requests(32)
    with in_process(prefill_chunk_tokens=1024) as client:
        alone = [essence(client.post(path, json=body).json()) for path, body in requests]
    models = (
        encoder(on_step=slow(0.002), pieces=7),
        decoder(on_step=slow(0.002), pieces=7),
    )
    with (
        serving(*models, step_tokens=512, prefill_chunk_tokens=128, short_ms=short_ms) as server,
        ThreadPoolExecutor(32) as pool,
    ):
        together = list(pool.map(lambda request: server.post(*request).json(), requests))
        lane = sample(server.get("/metrics").text, "longreach_lane_seconds_total", lane="long")
    assert (lane or 0) > 0 if short_ms == 100 else lane == 0
    assert max(answer["stats"]["batch_size"] for answer in together) > 1, (
        "nothing ran together: nothing was tested"
    )
    for expected, answer in zip(alone, together, strict=True):
        assert essence(answer) == expected
    wait_for(lambda: not any(model.open_states for model in models))


def test_a_seed_gives_the_same_text_whatever_else_runs() -> None:
    body = {"prompt": "once upon", "max_new_tokens": 30, "temperature": 1.2, "seed": 99, "n": 4}
    with serving(decoder(on_step=slow(0.001))) as server:
        alone = server.post("/v1/generate", body).json()["choices"]
        assert len({choice["text"] for choice in alone}) == 4
        stop = threading.Event()

        def noise(i: int) -> None:
            while not stop.is_set():
                server.post(
                    "/v1/generate", {"prompt": f"noise {i}", "max_new_tokens": 9, "temperature": 2, "seed": i}
                )

        with ThreadPoolExecutor(6) as pool:
            for i in range(6):
                pool.submit(noise, i)
            try:
                for _ in range(3):
                    assert server.post("/v1/generate", body).json()["choices"] == alone
            finally:
                stop.set()


def test_the_number_of_choices_does_not_move_a_draw() -> None:
    body = {"prompt": "once", "max_new_tokens": 10, "temperature": 1, "seed": 3}
    with in_process() as client:
        one = client.post("/v1/generate", json=body).json()["choices"][0]["text"]
        many = client.post("/v1/generate", json={**body, "n": 8}).json()["choices"]
    assert many[0]["text"] == one


def test_only_the_guilty_request_of_a_batch_fails() -> None:
    model = encoder(poison=ord("!"))
    gate = threading.Event()
    first = threading.Event()

    def hold(slices: object) -> None:
        first.set()
        gate.wait(20)

    model.on_step = hold
    with serving(model) as server, ThreadPoolExecutor(8) as pool:
        opener = pool.submit(server.post, "/v1/encode", {"input": "opener"})
        first.wait(20)
        texts = ["good", "bad!", "fine", "also good"]
        waiting = [pool.submit(server.post, "/v1/encode", {"input": text}) for text in texts]
        _until_queued(server, 4)
        gate.set()
        statuses = [answer.result().status_code for answer in waiting]
        assert opener.result().status_code == 200
        assert statuses == [200, 500, 200, 200]
        assert [len(step) for step in model.steps][1] == 4, "they did share a step"
        expected = [server.post("/v1/encode", {"input": text}).json()["data"] for text in ("good", "fine")]
        assert [waiting[i].result().json()["data"] for i in (0, 2)] == expected
        wait_for(lambda: not model.open_states)


def test_one_bad_input_of_a_list_fails_its_own_request_whole() -> None:
    model = encoder(poison=ord("!"))
    with in_process(model) as client:
        assert client.post("/v1/encode", json={"input": ["a", "b!", "c"]}).status_code == 500
        wait_for(lambda: not model.open_states)
        assert client.post("/v1/encode", json={"input": ["a", "b", "c"]}).status_code == 200


@pytest.mark.parametrize("chunk", [128, 200, 1024])
def test_scores_do_not_depend_on_how_the_prompt_was_cut(chunk: int) -> None:
    with in_process(prefill_chunk_tokens=chunk) as client:
        answer = client.post("/v1/score", json={"input": "some words " * 60}).json()
    with in_process(step_tokens=4096, prefill_chunk_tokens=4096) as client:
        assert answer["data"] == client.post("/v1/score", json={"input": "some words " * 60}).json()["data"]


def _until_queued(server: Served, count: int) -> None:
    wait_for(lambda: server.runtime.engine.load("enc").queued_requests >= count)
