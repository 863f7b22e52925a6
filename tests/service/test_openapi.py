"""The OpenAPI file tells the truth: real bounds, every backend, every error, no 422."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from fastapi.testclient import TestClient

from kernels.registry import BACKENDS
from service.record import OPERATIONS


@pytest.fixture(scope="module")
def api(client: TestClient) -> dict[str, Any]:
    return dict(client.get("/openapi.json").json())


def walk(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for item in value.values():
            yield from walk(item)
    elif isinstance(value, list):
        for item in value:
            yield from walk(item)


def test_every_reference_leads_somewhere(api: dict[str, Any]) -> None:
    known = {f"#/components/schemas/{name}" for name in api["components"]["schemas"]}
    assert {node["$ref"] for node in walk(api) if isinstance(node.get("$ref"), str)} <= known


def test_no_route_documents_422_and_all_document_problems(api: dict[str, Any]) -> None:
    for path, methods in api["paths"].items():
        for method, operation in methods.items():
            assert "422" not in operation["responses"], path
            assert "default" in operation["responses"], path
            for status, response in operation["responses"].items():
                if status not in ("200", "default"):
                    assert list(response["content"]) == ["application/problem+json"], (path, method, status)
    for path in OPERATIONS:
        statuses = set(api["paths"][path]["post"]["responses"])
        assert {"200", "400", "401", "404", "413", "415", "429", "500", "503", "504"} <= statuses, path
    assert "HTTPValidationError" not in api["components"]["schemas"]


def test_an_estimate_may_fail_as_the_measuring_of_a_profile_does(api: dict[str, Any]) -> None:
    responses = api["paths"]["/v1/estimate"]["post"]["responses"]
    for status, code in (("413", "never_fits_memory"), ("500", "internal_error"), ("503", "model_unloaded")):
        assert code in responses[status]["description"]


def test_every_backend_is_documented_with_its_bounds(api: dict[str, Any]) -> None:
    schemas = api["components"]["schemas"]
    for request in (
        "EncodeRequest",
        "GenerateRequest",
        "ScoreRequest",
        "EmbeddingsRequest",
        "ChatRequest",
        "EstimateRequest",
    ):
        told = json.dumps(schemas[request]["properties"]["attention"])
        for name in BACKENDS:
            assert f'"{name}": "#/components/schemas/{name.title().replace("_", "")}Attention"' in told
    params = schemas["WindowAttention"]["properties"]["params"]
    window = schemas[params["$ref"].rsplit("/", 1)[1]] if "$ref" in params else params
    assert window["properties"]["window"]["maximum"] == 65536
    for request in ("GenerateRequest", "EstimateRequest"):
        assert "PrefillDecodeAttention" in json.dumps(schemas[request]["properties"]["attention"])


def resolved(api: dict[str, Any], name: str) -> dict[str, Any]:
    text = json.dumps(api["components"]["schemas"]).replace("#/components/schemas/", "#/$defs/")
    return {"$ref": f"#/$defs/{name}", "$defs": json.loads(text)}


@pytest.mark.parametrize(
    ("schema", "path", "body"),
    [
        ("EncodeAnswer", "/v1/encode", {"input": ["a", "b"], "late_chunking": {"chunk_tokens": 2}}),
        ("GenerateAnswer", "/v1/generate", {"prompt": "a", "max_new_tokens": 2, "logprobs": 1}),
        ("ScoreAnswer", "/v1/score", {"input": "ab"}),
        ("EmbeddingsAnswer", "/v1/embeddings", {"model": "enc", "input": "a"}),
        ("CompletionAnswer", "/v1/completions", {"model": "dec", "prompt": "a", "logprobs": 1}),
        ("TokenizeAnswer", "/v1/tokenize", {"model": "enc", "input": "a"}),
        (
            "EstimateAnswer",
            "/v1/estimate",
            {
                "model": "dec",
                "input": "a",
                "max_new_tokens": 4,
                "attention": ["exact", {"prefill": "window"}],
            },
        ),
        ("Problem", "/v1/encode", {"input": 1}),
    ],
)
def test_answers_hold_to_their_schema(
    client: TestClient, api: dict[str, Any], schema: str, path: str, body: dict[str, Any]
) -> None:
    jsonschema.validate(client.post(path, json=body).json(), resolved(api, schema))


@pytest.mark.parametrize(
    ("attention", "good"),
    [
        ("window", True),
        ({"backend": "window", "params": {"window": 5}}, True),
        ({"backend": "bigbird", "seed": 5, "fallback": "exact"}, True),
        ({"backend": "window", "params": {"window": 0}}, False),
        ({"backend": "window", "params": {"unknown": 1}}, False),
        ({"backend": "window", "unknown": 1}, False),
        ("unknown", False),
        ({"backend": "window", "seed": -1}, False),
    ],
)
def test_schema_and_server_agree_on_what_an_attention_is(
    client: TestClient, api: dict[str, Any], attention: Any, good: bool
) -> None:
    body = {"input": "a", "attention": attention}
    valid = jsonschema.Draft202012Validator(resolved(api, "EncodeRequest")).is_valid(body)
    assert valid == good
    assert (client.post("/v1/encode", json=body).status_code == 200) == good


@pytest.mark.parametrize(
    ("attention", "good"),
    [
        ("window", True),
        ({"prefill": "window", "decode": "exact"}, True),
        (["window", {"backend": "exact"}, {"prefill": "window"}], True),
        (["exact"] * 32, True),
        (["exact"] * 33, False),
        ([], False),
        (["unknown"], False),
        ([["exact"]], False),
    ],
)
def test_schema_and_server_agree_on_lists_of_attentions(
    client: TestClient, api: dict[str, Any], attention: Any, good: bool
) -> None:
    body = {"model": "dec", "input": "a", "attention": attention}
    valid = jsonschema.Draft202012Validator(resolved(api, "EstimateRequest")).is_valid(body)
    assert valid == good
    assert (client.post("/v1/estimate", json=body).status_code == 200) == good


def test_priorities_are_documented_with_their_bounds(api: dict[str, Any]) -> None:
    for request in ("EncodeRequest", "GenerateRequest", "ScoreRequest"):
        field = api["components"]["schemas"][request]["properties"]["priority"]
        assert (field["minimum"], field["maximum"], field["default"]) == (-10, 10, 0)
