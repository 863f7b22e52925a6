"""Random requests: whatever is sent, the answer is a result or a problem that blames the right side."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.record import OPERATIONS
from tests.service.conftest import in_process
from tests.service.fake_model import decoder, encoder

PATHS = [*OPERATIONS, "/v1/tokenize", "/v1/estimate"]
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    7,
    2**31,
    2**63,
    10**40,
    0.5,
    -0.0,
    1e-300,
    1e308,
    "",
    "a",
    "hello world",
    "\x00\x1f",
    "🐢" * 5,
    "a" * 300,
    "exact",
    "window",
    "bigbird",
    "mean",
    "none",
    "end",
    "enc",
    "dec",
    [],
    [[]],
    ["a", "b"],
    [1, 2, 3],
    [[1], [2]],
    [None],
    ["", "x"],
    {},
    {"token_ids": [1, 2]},
    {"token_ids": []},
    {"token_ids": "x"},
    {"backend": "window", "params": {"window": 3}},
    {"backend": "window", "params": []},
    {"prefill": "window", "decode": "sinks"},
    {"prefill": "window", "other": 1},
    ["window", {"prefill": "sinks", "decode": "exact"}],
    ["window"] * 33,
    {"chunk_tokens": 3, "overlap": 1},
    {"spans": [[0, 1]]},
    {"include_usage": True},
    [{"role": "user", "content": "hi"}],
    [{"role": "tool", "content": "hi"}],
    [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
    [{"role": "user", "content": None}],
]


@pytest.fixture(scope="module")
def small() -> Iterator[TestClient]:
    with in_process(encoder(max_tokens=64), decoder(max_tokens=96), max_new_tokens=32) as found:
        yield found


def fields_of(api: dict[str, Any], path: str) -> list[str]:
    schema = api["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return list(api["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]["properties"])


def sensible(path: str) -> dict[str, Any]:
    body: dict[str, Any] = {"model": "enc" if path in ("/v1/encode", "/v1/embeddings") else "dec"}
    if "chat" in path:
        return {**body, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    named = "prompt" if path in ("/v1/generate", "/v1/completions") else "input"
    return {**body, named: "hello"}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("path", PATHS)
def test_random_bodies_never_break_the_server(small: TestClient, path: str, seed: int) -> None:
    rng = random.Random(f"{path} {seed}")
    fields = fields_of(small.get("/openapi.json").json(), path)
    statuses = set()
    for _ in range(40):
        body = sensible(path)
        for name in rng.sample(fields, rng.randint(0, 3)):
            body[name] = rng.choice(VALUES)
        if rng.random() < 0.2 and body:
            del body[rng.choice(list(body))]
        answer = small.post(path, json=body)
        statuses.add(answer.status_code)
        allowed = (200, 400, 404, 504) if body.get("timeout_ms") else (200, 400, 404)
        assert answer.status_code in allowed, (body, answer.text)
        if answer.status_code != 200:
            problem = answer.json()
            assert problem["detail"] and problem["code"] == problem["error"]["code"], body
        elif answer.headers["content-type"].startswith("application/json"):
            json.loads(answer.text, parse_constant=lambda name: pytest.fail(f"{name} in an answer"))
    assert 400 in statuses


def test_mangled_json_never_breaks_the_server(small: TestClient) -> None:
    rng = random.Random(5)
    for _ in range(300):
        path = rng.choice(PATHS)
        raw = bytearray(json.dumps(sensible(path)).encode())
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(raw))
            raw[place : place + rng.randint(0, 3)] = bytes(
                rng.randrange(256) for _ in range(rng.randint(0, 3))
            )
        answer = small.post(path, content=bytes(raw), headers={"content-type": "application/json"})
        assert answer.status_code in (200, 400, 404), (bytes(raw), answer.text)
