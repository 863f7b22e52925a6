"""The engine's own promises: one thread, estimates kept, and an end that everybody hears of."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from models.contract import SliceResult, Work
from service.attention import exact_choice
from service.pooling import pool
from service.sequences import EncodeSequence
from tests.service.conftest import Blocker, in_process, serving, wait_for
from tests.service.fake_model import decoder, encoder


def test_an_engine_that_dies_answers_everybody_and_is_seen_by_the_probes() -> None:
    def die(slices: object) -> None:
        raise SystemExit("no step can go on")

    model = encoder(on_step=die)
    with serving(model, decoder()) as server:
        assert server.post("/v1/encode", {"input": "x"}).status_code == 500
        wait_for(lambda: not server.runtime.engine.healthy)
        for path in ("/livez", "/readyz"):
            answer = server.get(path)
            assert answer.status_code == 503 and answer.json()["code"] == "engine_unhealthy"
        refused = server.post("/v1/generate", {"prompt": "x"})
        assert refused.status_code == 503 and "retry-after" in refused.headers
        wait_for(lambda: not model.open_states)


def test_a_model_that_cannot_open_a_sequence_fails_that_request_alone() -> None:
    model = decoder()
    plain = model.open

    def refuse(capacity: int, prompt: object = None) -> object:
        if capacity > 100:
            raise MemoryError("no room")
        return plain(capacity)

    model.open = refuse  # type: ignore[method-assign, assignment]
    with in_process(model) as client:
        assert client.post("/v1/generate", json={"prompt": "x", "max_new_tokens": 200}).status_code == 500
        assert client.post("/v1/generate", json={"prompt": "x", "max_new_tokens": 2}).status_code == 200


def test_the_peak_is_told_only_where_no_step_was_shared() -> None:
    blocker = Blocker()
    with serving(encoder(on_step=blocker)) as server, ThreadPoolExecutor(3) as pool:
        alone = pool.submit(server.post, "/v1/encode", {"input": "first"})
        blocker.entered.wait(20)
        shared = [pool.submit(server.post, "/v1/encode", {"input": "other"}) for _ in range(2)]
        wait_for(lambda: server.runtime.engine.load("enc").queued_requests == 2)
        blocker.release.set()
        assert alone.result().json()["stats"]["memory"]["peak_bytes"] == 5000
        for call in shared:
            stats = call.result().json()["stats"]
            assert stats["batch_size"] == 2 and stats["batch_tokens"] == 14
            assert stats["memory"]["peak_bytes"] is None


def test_a_device_that_cannot_measure_gives_no_peak() -> None:
    with in_process(encoder(peak_bytes=None)) as client:
        memory = client.post("/v1/encode", json={"input": "x"}).json()["stats"]["memory"]
        assert memory["peak_bytes"] is None and memory["estimated_bytes"] > 0


def test_the_peak_of_a_generation_counts_what_its_cache_has_grown_to() -> None:
    """One measured step, then small ones that are not: the cache goes on growing."""
    body = {"prompt": "x" * 9, "max_new_tokens": 11}
    with in_process(decoder(peak_bytes=None)) as client:
        told = client.post("/v1/generate", json=body).json()
        assert told["stats"]["memory"]["peak_bytes"] is None, "no step was measured"
    model = decoder(script=b"0123456789ab")
    model.on_step = lambda slices: setattr(
        model, "peak_bytes", 5000 if len(slices[0].token_ids) > 1 else None
    )
    with in_process(model) as client:
        told = client.post("/v1/generate", json=body).json()
    read = told["usage"]["prompt_tokens"] + 11 - 1
    assert told["stats"]["memory"]["peak_bytes"] == read * 1000 > 5000


def test_vectors_kept_for_the_answer_stay_reserved_until_the_request_ends() -> None:
    seen: list[int] = []
    model = encoder()
    with serving(model, step_tokens=128, prefill_chunk_tokens=128) as server:
        model.on_step = lambda slices: seen.append(server.runtime.engine.reserved_bytes)
        inputs = ["a" * 98] * 3  # 100 tokens each: one input a step
        for pooling in ("mean", "none"):
            body = {"input": inputs, "pooling": pooling, "attention": "exact"}
            assert server.post("/v1/encode", body).status_code == 200
        wait_for(lambda: server.runtime.engine.reserved_bytes == 0)
    step, vectors = 100 * 1000, 100 * 16 * 4
    assert seen == [step] * 3 + [step + vectors, step + 2 * vectors, step + 3 * vectors]


@pytest.mark.parametrize(("pooling", "vectors"), [("mean", 1), ("cls", 1), ("last", 1), ("none", 10)])
def test_a_finished_input_keeps_only_what_its_answer_needs(pooling: str, vectors: int) -> None:
    """Read in chunks of 4, 4 and 2 tokens, as a causal model does."""
    rows = torch.randn(10, 16)
    sequence = EncodeSequence(0, list(range(10)), exact_choice(), chunkable=True, pooling=pooling)
    for first in range(0, 10, 4):
        part = rows[first : first + 4]
        sequence.accept(SliceResult(Work(), hidden=part), first + len(part))
    itemsize = 8 if pooling == "mean" else 4
    assert sequence.held_bytes == vectors * 16 * itemsize
    assert torch.allclose(pool(sequence.hidden, pooling), pool(rows, pooling), atol=1e-6)


def test_two_models_share_the_engine_and_both_get_turns() -> None:
    models = encoder(), decoder()
    with serving(*models) as server, ThreadPoolExecutor(8) as pool:
        calls = [
            pool.submit(server.post, "/v1/encode", {"input": "a"})
            if i % 2
            else pool.submit(server.post, "/v1/generate", {"prompt": "a", "max_new_tokens": 20})
            for i in range(16)
        ]
        assert {call.result().status_code for call in calls} == {200}
    assert models[0].step_thread is models[1].step_thread is not None


def test_a_long_prompt_lets_short_ones_decode_meanwhile() -> None:
    model = decoder(max_tokens=5000)
    with serving(model, step_tokens=256, prefill_chunk_tokens=256) as server, ThreadPoolExecutor(2) as pool:
        short = pool.submit(server.post, "/v1/generate", {"prompt": "s", "max_new_tokens": 4000})
        wait_for(lambda: len(model.steps) > 2)
        long = pool.submit(server.post, "/v1/generate", {"prompt": "x" * 4000, "max_new_tokens": 1})
        assert long.result().status_code == short.result().status_code == 200
    mixed = [step for step in model.steps if len(step) == 2]
    assert any(step[0][0] == 1 and step[1][0] > 1 for step in mixed), "decode and prefill shared a step"
    assert max(sum(tokens for tokens, _ in step) for step in model.steps) <= 256 + 1


def test_a_prompt_template_of_the_request_is_never_used() -> None:
    with in_process() as client:
        body = {"model": "dec", "max_tokens": 1, "messages": [{"role": "user", "content": "{{ 7 * 7 }}"}]}
        answer = client.post("/v1/chat/completions", json={**body, "chat_template": "{{ 1/0 }}"})
        assert answer.status_code == 200 and answer.headers["x-ignored-params"] == "chat_template"
        assert "49" not in json.dumps(answer.json()["choices"])


def test_a_backend_that_cannot_decode_is_refused_for_decode_and_allowed_for_prefill(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from kernels.registry import load
    from service import attention, attention_params

    real = load("window")
    prefill_only = replace(real, capabilities=replace(real.capabilities, decode=False, selection="tile"))
    leaky = replace(real, name="leaky", capabilities=replace(real.capabilities, selection="prompt"))
    known = {"window": prefill_only, "leaky": leaky, "exact": load("exact")}
    for module in (attention, attention_params):
        monkeypatch.setattr(module, "load", lambda name: known[name])
    with in_process() as client:
        body = {"prompt": "x", "max_new_tokens": 2}
        refused = client.post("/v1/generate", json={**body, "attention": "window"})
        assert refused.status_code == 400 and "cannot decode" in refused.json()["detail"]
        split = {**body, "attention": {"prefill": "window", "decode": "exact"}}
        assert client.post("/v1/generate", json=split).status_code == 200
        leak = client.post("/v1/score", json={"input": "abc", "attention": "leaky"})
        assert leak.status_code == 400 and leak.json()["code"] == "attention_not_supported"
        assert "whole prompt" in leak.json()["detail"] and leak.json()["param"] == "attention"
        kept = client.post(
            "/v1/score", json={"input": "abc", "attention": {"backend": "leaky", "fallback": "exact"}}
        )
        assert kept.status_code == 200 and kept.json()["warnings"] == []
        assert kept.json()["attention"]["used"] == "exact"
        assert "whole prompt" in kept.json()["attention"]["fallback_reason"]


@pytest.mark.parametrize(
    ("spec", "warned"),
    [
        ({"backend": "pooled"}, True),
        ({"backend": "vertical_slash"}, True),
        ({"backend": "scatterbrain"}, False),
        ({"backend": "scatterbrain", "params": {"support": "lsh"}}, False),
        ({"backend": "scatterbrain", "params": {"support": "topk"}}, True),
        ({"backend": "window"}, False),
    ],
    ids=str,
)
def test_scores_warn_of_later_tokens_only_where_query_tiles_choose(
    spec: dict[str, Any], warned: bool
) -> None:
    with in_process() as client:
        scored = client.post("/v1/score", json={"input": "abc", "attention": spec}).json()
        assert len(scored["warnings"]) == warned and all("tile" in told for told in scored["warnings"])


def test_what_replaces_a_refused_choice_is_what_scores_warn_of(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder()
    monkeypatch.setattr(type(model), "unsupported", lambda self, choice: ["it may not"])
    with in_process(model) as client:
        body = {"input": "abc", "attention": {"backend": "pooled", "fallback": "exact"}}
        scored = client.post("/v1/score", json=body).json()
        assert scored["attention"]["used"] == "exact" and scored["warnings"] == []


def test_a_backend_without_a_causal_form_is_refused_for_that_reason_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = decoder()
    monkeypatch.setattr(type(model), "unsupported", lambda self, choice: ["it has no causal form"])
    with in_process(model) as client:
        score = client.post("/v1/score", json={"input": "abc", "attention": "nystrom"}).json()
        told = client.post("/v1/generate", json={"prompt": "x", "max_new_tokens": 2, "attention": "nystrom"})
        for refusal in (score, told.json()):
            assert refusal["limits"]["reasons"] == ["it has no causal form"]
