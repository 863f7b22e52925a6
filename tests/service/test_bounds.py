"""Every number, string and list of a request at its bound, beyond it, and as what it is not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fastapi.testclient import TestClient

HUGE = 10**30
NEVER_NUMBERS: list[Any] = [True, False, "1", [], {}, HUGE, -HUGE]

GENERATE = {"model": "dec", "prompt": "hi", "max_new_tokens": 2}
ENCODE = {"model": "enc", "input": "hi"}
CHAT = {"model": "dec", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
COMPLETE = {"model": "dec", "prompt": "hi", "max_tokens": 2}
MAX_SEED = 2**63 - 1

NUMBERS: list[tuple[str, dict[str, Any], str, list[Any], list[Any]]] = [
    ("/v1/generate", GENERATE, "max_new_tokens", [1, 1000], [0, -1, 1024, 1.5]),
    ("/v1/generate", GENERATE, "temperature", [0, 0.0, 2, 1e-300], [-0.1, 2.1]),
    ("/v1/generate", GENERATE, "top_p", [1, 1e-9], [0, 1.1, -1]),
    ("/v1/generate", GENERATE, "top_k", [1, 1 << 20, None], [0, -1, (1 << 20) + 1, 2.5]),
    ("/v1/generate", GENERATE, "seed", [0, MAX_SEED], [-1, MAX_SEED + 1, 0.5]),
    ("/v1/generate", GENERATE, "n", [1, 8], [0, 9, -1]),
    ("/v1/generate", GENERATE, "logprobs", [0, 20, None], [-1, 21]),
    ("/v1/generate", GENERATE, "timeout_ms", [60_000, None], [0, -1, 86_400_001, 1.5]),
    ("/v1/encode", ENCODE, "dimensions", [1, 16, None], [0, 17, -1, 1.5]),
    ("/v1/encode", ENCODE, "timeout_ms", [86_400_000], [0]),
    ("/v1/embeddings", ENCODE, "dimensions", [1, 16], [0, 17]),
    ("/v1/completions", COMPLETE, "max_tokens", [1, 1000, None], [0, -1, 1024]),
    ("/v1/completions", COMPLETE, "n", [1, 8, None], [0, 9]),
    ("/v1/completions", COMPLETE, "logprobs", [0, 20, None], [-1, 21]),
    ("/v1/completions", COMPLETE, "seed", [0, MAX_SEED], [-1, MAX_SEED + 1]),
    ("/v1/chat/completions", CHAT, "max_completion_tokens", [1, 1000], [0, -1, 1024]),
    ("/v1/chat/completions", CHAT, "temperature", [0, 2, None], [-1, 3]),
    ("/v1/chat/completions", CHAT, "top_p", [1, 0.1], [0, 2]),
]


@pytest.mark.parametrize(("path", "body", "field", "good", "bad"), NUMBERS, ids=lambda value: str(value)[:24])
def test_numbers_hold_their_bounds(
    client: TestClient, path: str, body: dict[str, Any], field: str, good: list[Any], bad: list[Any]
) -> None:
    for value in good:
        answer = client.post(path, json={**body, field: value})
        assert answer.status_code == 200, (value, answer.text)
    for value in [*bad, *NEVER_NUMBERS]:
        answer = client.post(path, json={**body, field: value})
        assert answer.status_code == 400, (value, answer.text)
        assert answer.json()["param"] == field
    for literal in ("1e999", "NaN", "-Infinity"):
        raw = json.dumps({**body, field: "@"}).replace('"@"', literal)
        answer = client.post(path, content=raw, headers={"content-type": "application/json"})
        assert answer.status_code == 400, (literal, answer.text)


@pytest.mark.parametrize(
    ("path", "body", "field", "good", "bad"),
    [
        ("/v1/encode", ENCODE, "truncate", ["error", "start", "end"], ["", "middle", None, True]),
        ("/v1/encode", ENCODE, "pooling", ["mean", "none", None], ["", "max", 1]),
        ("/v1/encode", ENCODE, "normalize", [True, False], [1, "true", None]),
        ("/v1/encode", ENCODE, "input_type", ["query", None], ["", "passage"]),
        ("/v1/encode", ENCODE, "cache_salt", ["a", "a" * 128, None], ["", "a" * 129, 1]),
        ("/v1/encode", ENCODE, "model", [None], ["", "a" * 257, 3, ["enc"]]),
        ("/v1/generate", GENERATE, "stop", ["x", ["x"] * 4, [], None], ["", "x" * 257, ["x"] * 5, [""], 3]),
        ("/v1/generate", GENERATE, "stream", [False], [0, "false", None]),
        ("/v1/embeddings", ENCODE, "encoding_format", ["float", "base64"], ["", "int8", None]),
        ("/v1/embeddings", ENCODE, "user", ["u", None], ["u" * 513, 3]),
    ],
)
def test_words_hold_their_bounds(
    client: TestClient, path: str, body: dict[str, Any], field: str, good: list[Any], bad: list[Any]
) -> None:
    for value in good:
        assert client.post(path, json={**body, field: value}).status_code == 200, value
    for value in bad:
        answer = client.post(path, json={**body, field: value})
        assert answer.status_code == 400, (value, answer.text)
        assert answer.json()["param"].startswith(field)


@pytest.mark.parametrize(
    "params",
    [
        {"window": 0},
        {"window": 65537},
        {"window": True},
        {"window": "5"},
        {"window": 1.5},
        {"window": None},
        {"window": HUGE},
        {"window": [1]},
        {"global_tokens": -1},
        {"other": 1},
    ],
)
def test_attention_params_hold_their_bounds(client: TestClient, params: dict[str, Any]) -> None:
    spec = {"backend": "window", "params": params}
    for path, body in (("/v1/encode", ENCODE), ("/v1/generate", GENERATE), ("/v1/embeddings", ENCODE)):
        answer = client.post(path, json={**body, "attention": spec})
        assert answer.status_code == 400 and answer.json()["code"] == "invalid_attention_params", answer.text
        assert answer.json()["param"].startswith("attention.params.")
        if next(iter(params.values())) in (0, 65537, -1):
            assert answer.json()["limits"], "the bound must be told"


@pytest.mark.parametrize(
    ("params", "param", "limits"),
    [
        ({"support_params": {"window": 0}}, "support_params.window", {"ge": 1}),
        ({"support_params": {"window": "my private text"}}, "support_params.window", {}),
        ({"support_params": {"my private text": 1}}, "support_params.(unprintable name)", {}),
        ({"support": "topk", "support_params": {"mass": "my private text"}}, "support_params.mass", {}),
        ({"support": "topk", "support_params": {"mass": 0.5, "budget": 64}}, "support_params", {}),
        ({"support": "lsh", "support_params": {"num_buckets": 7}}, "support_params", {}),
        ({"support_params": {f"my private text {i}": i for i in range(5000)}}, "support_params", {}),
        ({f"my private text {i}": i for i in range(5000)}, "", {}),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_support_s_params_are_refused_by_field_without_repeating_them(
    client: TestClient, params: dict[str, Any], param: str, limits: dict[str, Any]
) -> None:
    spec = {"backend": "scatterbrain", "params": params}
    answer = client.post("/v1/encode", json={**ENCODE, "attention": spec})
    told = answer.json()
    assert answer.status_code == 400 and told["code"] == "invalid_attention_params"
    assert told["param"] == f"attention.params.{param}".rstrip(".")
    assert limits.items() <= (told.get("limits") or {}).items()
    assert len(answer.text) < 1200
    for leaked in ("private", "Value error", "value error"):
        assert leaked not in answer.text


def test_an_attention_of_very_many_fields_is_refused_in_one_sentence(client: TestClient) -> None:
    spec = {"backend": "window"} | {str(i): i for i in range(5000)}
    answer = client.post("/v1/encode", json={**ENCODE, "attention": spec})
    assert answer.status_code == 400 and answer.json()["param"] == "attention" and len(answer.text) < 800


def test_the_answer_tells_a_support_s_params_with_its_defaults(client: TestClient) -> None:
    for given in ({}, {"support_params": {"window": 256}}):
        spec = {"backend": "scatterbrain", "params": given}
        answer = client.post("/v1/encode", json={**ENCODE, "attention": spec}).json()
        assert answer["attention"]["params"]["support_params"] == {"window": 256, "sinks": 4}


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1, True, 1.0, "1", HUGE])
def test_the_seed_of_an_attention_holds_its_bounds(client: TestClient, seed: Any) -> None:
    answer = client.post("/v1/encode", json={**ENCODE, "attention": {"backend": "random", "seed": seed}})
    assert answer.status_code == 400 and answer.json()["param"] == "attention.seed"
    good = {"backend": "random", "seed": MAX_SEED}
    assert client.post("/v1/encode", json={**ENCODE, "attention": good}).status_code == 200


def test_token_ids_are_checked_one_by_one_and_the_first_bad_one_is_named(client: TestClient) -> None:
    for bad in (-1, 260, True, 1.0, "1", HUGE, None):
        answer = client.post("/v1/encode", json={**ENCODE, "input": {"token_ids": [1, bad]}})
        assert answer.status_code == 400 and answer.json()["param"] == "input.token_ids[1]", (
            bad,
            answer.text,
        )


def test_a_million_bad_ids_cost_one_complaint(client: TestClient) -> None:
    answer = client.post("/v1/encode", json={**ENCODE, "input": {"token_ids": [-1] * 200_000}})
    assert answer.status_code == 400 and "more)" not in answer.json()["detail"]


def test_late_chunking_numbers_hold_their_bounds(client: TestClient) -> None:
    for value in (0, -1, True, 1.5, HUGE, "3"):
        body = {**ENCODE, "late_chunking": {"chunk_tokens": value}}
        assert client.post("/v1/encode", json=body).status_code == 400, value
    for spans in ([[0, 0]], [[-1, 1]], [[0, 3]], [[0]], [[0, 1, 2]], [], [[0, True]], [["0", 1]], [[1, 0]]):
        body = {**ENCODE, "late_chunking": {"spans": spans}}
        assert client.post("/v1/encode", json=body).status_code == 400, spans
    body = {**ENCODE, "late_chunking": {"spans": [[0, 1], [1, 2]]}}
    assert client.post("/v1/encode", json=body).status_code == 200


def test_text_that_looks_like_an_address_is_only_text(client: TestClient) -> None:
    answer = client.post(
        "/v1/encode", json={**ENCODE, "input": "http://127.0.0.1:1/x ![a](http://127.0.0.1:1/)"}
    )
    assert answer.status_code == 200
