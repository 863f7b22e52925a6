"""What the README promises, on the real demo models over real HTTP."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.e2e.conftest import Server

pytestmark = [pytest.mark.demo, pytest.mark.slow]

DECODER, ENCODER = "smollm2-135m", "nomic-embed-v1.5"


def ids(server: Server, model: str, text: str) -> list[int]:
    answer = server.post("/v1/tokenize", {"model": model, "input": text})
    return list(answer["data"][0]["token_ids"])


@pytest.fixture(scope="module")
def prompt(server: Server, long_text: str) -> list[int]:
    return ids(server, DECODER, long_text)[:4200]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("backend", ["exact", "window", "bigbird"])
def test_a_real_text_of_thousands_of_tokens_is_read_with_the_attention_asked_for(
    server: Server, prompt: list[int], backend: str
) -> None:
    body = {"model": DECODER, "prompt": {"token_ids": prompt}, "max_new_tokens": 8, "attention": backend}
    answer = server.post("/v1/generate", body)
    attention, stats = answer["attention"], answer["stats"]
    assert attention["used"] == backend
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    assert 0 < answer["usage"]["completion_tokens"] <= 8
    assert attention["density"] == 1 if backend == "exact" else attention["density"] < 0.35
    assert stats["prefill_ms"] > 0 and stats["time_to_first_token_ms"] <= stats["total_ms"]
    memory = stats["memory"]
    assert memory["estimated_bytes"] > 0 and memory["exact_bytes"] > 0
    # 30 layers x 3 KV heads x 64 x 2 x 4 bytes per cached token: the request held at least its cache
    assert memory["peak_bytes"] is None or memory["peak_bytes"] > len(prompt) * 30 * 3 * 64 * 2 * 4


@pytest.mark.timeout(600)
def test_the_same_long_text_is_encoded_under_two_attentions(server: Server, long_text: str) -> None:
    token_ids = ids(server, ENCODER, long_text)[:4000]

    def encode(backend: str) -> dict[str, Any]:
        body = {"model": ENCODER, "input": {"token_ids": token_ids}, "attention": backend}
        return server.post("/v1/encode", body)

    exact, window = encode("exact"), encode("window")
    a, b = exact["data"][0]["embedding"], window["data"][0]["embedding"]
    assert len(a) == len(b) == 768
    assert math.isclose(sum(x * x for x in a), 1, rel_tol=1e-4)
    cosine = sum(x * y for x, y in zip(a, b, strict=True))
    assert 0.7 < cosine < 0.99999  # another attention, another vector; not an unrelated one
    assert window["attention"]["density"] < 0.3 and exact["attention"]["density"] == 1
    assert window["attention"]["applied_layers"] == list(range(12))


def test_perplexity_of_english_prose_is_that_of_a_working_model(server: Server, long_text: str) -> None:
    token_ids = ids(server, DECODER, long_text)[:1024]
    answer = server.post("/v1/score", {"model": DECODER, "input": {"token_ids": token_ids}})
    data = answer["data"][0]
    assert 5 < data["perplexity"] < 60
    assert 0.4 < data["bits_per_byte"] < 1.5


def test_the_chat_route_answers_a_question(server: Server) -> None:
    message = {"role": "user", "content": "What is the capital of France? Answer in one sentence."}
    answer = server.post(
        "/v1/chat/completions", {"model": DECODER, "messages": [message], "max_tokens": 20, "temperature": 0}
    )
    assert "Paris" in answer["choices"][0]["message"]["content"]


def test_a_query_is_closer_to_its_own_document_than_to_another(server: Server) -> None:
    texts = [
        "The treasury reports a surplus of revenue over expenditure, and the public debt was reduced.",
        "The whale rose from the sea and broke the boat with a blow of its tail.",
    ]
    documents = server.post("/v1/encode", {"model": ENCODER, "input": texts, "input_type": "document"})
    query = server.post(
        "/v1/encode", {"model": ENCODER, "input": "How large is the national debt?", "input_type": "query"}
    )
    q = query["data"][0]["embedding"]
    money, whale = (sum(x * y for x, y in zip(q, d["embedding"], strict=True)) for d in documents["data"])
    assert money > whale + 0.1
