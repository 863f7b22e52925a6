"""Requests share batches and never each other's attention: every answer equals the one it gets alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.e2e.conftest import Server

pytestmark = [pytest.mark.demo, pytest.mark.slow]

DECODER, ENCODER = "smollm2-135m", "nomic-embed-v1.5"
LENGTHS = (7, 64, 200, 600)


def generate(text_ids: list[int], backend: str, seed: int) -> dict[str, Any]:
    return {
        "model": DECODER,
        "prompt": {"token_ids": text_ids},
        "max_new_tokens": 6,
        "logprobs": 1,
        "attention": {"backend": backend, "seed": seed},
    }


def encode(text_ids: list[int], backend: str, seed: int) -> dict[str, Any]:
    return {
        "model": ENCODER,
        "input": {"token_ids": text_ids},
        "attention": {"backend": backend, "seed": seed},
    }


def mixed_requests(server: Server, text: str) -> list[tuple[str, dict[str, Any]]]:
    """32 requests: every backend that the model serves, in turns, four lengths, both endpoints, different
    parts of one text."""
    cards = {card["id"]: card["backends"] for card in server.get("/v1/models").json()["data"]}
    words = server.post("/v1/tokenize", {"model": DECODER, "input": text[:40_000]})["data"][0]["token_ids"]
    pieces = server.post("/v1/tokenize", {"model": ENCODER, "input": text[:40_000]})["data"][0]["token_ids"]
    requests: list[tuple[str, dict[str, Any]]] = []
    for i in range(32):
        backends = cards[ENCODER if i % 4 == 3 else DECODER]
        backend, length = backends[i % len(backends)], LENGTHS[(i + i // len(LENGTHS)) % len(LENGTHS)]
        if i % 4 == 3:
            requests.append(("/v1/encode", encode(pieces[i * 90 : i * 90 + length], backend, i)))
        else:
            requests.append(("/v1/generate", generate(words[i * 90 : i * 90 + length], backend, i)))
    return requests


def assert_same(alone: dict[str, Any], together: dict[str, Any]) -> None:
    for member in ("requested", "used", "params", "density", "applied_layers"):
        assert alone["attention"][member] == together["attention"][member]
    assert alone["usage"] == together["usage"]
    if "choices" in alone:
        assert alone["choices"][0]["text"] == together["choices"][0]["text"]
        a, b = (x["choices"][0]["logprobs"]["token_logprobs"] for x in (alone, together))
        assert a == pytest.approx(b, abs=1e-3)
    else:
        a, b = (x["data"][0]["embedding"] for x in (alone, together))
        assert a == pytest.approx(b, abs=1e-5)


def salted(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Nothing is taken over from the cache of the same request before."""
    return body | {"cache_salt": "together"} if path == "/v1/generate" else body


@pytest.mark.timeout(600)
def test_32_concurrent_requests_of_mixed_backends_and_lengths_answer_as_each_does_alone(
    server: Server, long_text: str
) -> None:
    requests = mixed_requests(server, long_text)
    alone = [server.post(path, body) for path, body in requests]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda r: server.post(r[0], salted(*r)), requests))
    assert max(answer["stats"]["batch_size"] for answer in together) > 1, "nothing ran together"
    for a, b in zip(alone, together, strict=True):
        assert_same(a, b)
