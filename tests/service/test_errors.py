"""Every error arrives in one shape, names the field, the limit and the way out, and echoes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.errors import KINDS
from tests.service.conftest import in_process
from tests.service.fake_model import decoder, encoder, non_finite

SECRET = "canary 7f3a: not a name"


def check(answer: Any, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert body["status"] == status and body["code"] == code and body["title"] == KINDS[code].title
    assert body["type"].startswith("urn:longreach:error:")
    assert body["instance"] == f"/requests/{answer.headers['x-request-id']}"
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"] == body["detail"] and body["error"]["code"] == code
    assert body["error"]["param"] == body["param"]
    if param is not None:
        assert body["param"] == param
    assert SECRET not in answer.text
    if status in (429, 503):
        assert int(answer.headers["retry-after"]) >= 1 and int(answer.headers["retry-after-ms"]) >= 1
    return body


@pytest.mark.parametrize(
    ("path", "body", "code", "param"),
    [
        ("/v1/encode", {}, "invalid_request", "input"),
        ("/v1/encode", {"input": "a", SECRET: 1}, "invalid_request", None),
        ("/v1/encode", {"input": {"token_ids": [1], "x": SECRET}}, "invalid_request", "input.x"),
        ("/v1/encode", {"input": ["a", 3]}, "invalid_request", "input[1]"),
        (
            "/v1/encode",
            {"input": ["a", {"token_ids": [1, SECRET]}]},
            "invalid_request",
            "input[1].token_ids[1]",
        ),
        ("/v1/encode", {"input": ""}, "empty_input", "input"),
        ("/v1/encode", {"input": []}, "empty_input", "input"),
        ("/v1/encode", {"input": ["a", ""]}, "empty_input", "input[1]"),
        ("/v1/encode", {"input": {"token_ids": []}}, "empty_input", "input"),
        ("/v1/encode", {"input": {"token_ids": [5, 260]}}, "invalid_request", "input.token_ids[1]"),
        ("/v1/encode", {"input": "a" * 600}, "context_length_exceeded", "input"),
        ("/v1/encode", {"input": "a" * 50_000}, "context_length_exceeded", "input"),
        ("/v1/encode", {"input": "a", "attention": SECRET}, "attention_not_supported", "attention"),
        ("/v1/encode", {"input": "a", "attention": 3}, "invalid_request", "attention"),
        ("/v1/encode", {"input": "a", "attention": {}}, "invalid_attention_params", "attention.backend"),
        (
            "/v1/encode",
            {"input": "a", "attention": "auto"},
            "invalid_attention_params",
            "attention.max_error",
        ),
        (
            "/v1/encode",
            {"input": "a", "attention": {"backend": "window", "verify": {"rows": 15}}},
            "invalid_attention_params",
            "attention.verify.rows",
        ),
        (
            "/v1/encode",
            {"input": "a", "attention": {"backend": "window", "params": {"window": 0}}},
            "invalid_attention_params",
            "attention.params.window",
        ),
        (
            "/v1/encode",
            {"input": "a", "attention": {"backend": "window", "params": {SECRET: 0}}},
            "invalid_attention_params",
            None,
        ),
        (
            "/v1/encode",
            {"input": "a", "attention": {"backend": "window", "fallback": "dense"}},
            "invalid_attention_params",
            "attention.fallback",
        ),
        ("/v1/encode", {"input": "a", "dimensions": 17}, "invalid_request", "dimensions"),
        ("/v1/encode", {"input": "a", "late_chunking": {}}, "invalid_request", "late_chunking"),
        (
            "/v1/encode",
            {"input": "a", "late_chunking": {"chunk_tokens": 2, "overlap": 2}},
            "invalid_request",
            "late_chunking.overlap",
        ),
        (
            "/v1/encode",
            {"input": "abc", "late_chunking": {"spans": [[0, 1], [2, 4]]}},
            "invalid_request",
            "late_chunking.spans[1]",
        ),
        (
            "/v1/encode",
            {"input": "a", "pooling": "cls", "late_chunking": {"chunk_tokens": 2}},
            "invalid_request",
            "late_chunking",
        ),
        ("/v1/generate", {"prompt": "a", "max_new_tokens": 1024}, "invalid_request", "max_new_tokens"),
        ("/v1/generate", {"prompt": "a" * 1000, "max_new_tokens": 24}, "context_length_exceeded", "prompt"),
        (
            "/v1/generate",
            {
                "prompt": "a",
                "attention": {"prefill": "exact", "decode": {"backend": "window", "params": {"w": 1}}},
            },
            "invalid_attention_params",
            "attention.decode.params.w",
        ),
        ("/v1/generate", {"prompt": "a", "stop": ["a", "b", "c", "d", "e"]}, "invalid_request", None),
        ("/v1/score", {"input": {"token_ids": [5]}}, "invalid_request", "input"),
        ("/v1/embeddings", {"model": "enc", "input": []}, "empty_input", "input"),
        ("/v1/embeddings", {"model": "enc", "input": [[1], [999]]}, "invalid_request", None),
        ("/v1/chat/completions", {"model": "dec", "messages": []}, "invalid_request", "messages"),
        (
            "/v1/chat/completions",
            {
                "model": "dec",
                "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": SECRET}]}],
            },
            "invalid_request",
            None,
        ),
        (
            "/v1/chat/completions",
            {"model": "dec", "messages": [{"role": "user", "content": "x"}], "tools": [{"a": SECRET}]},
            "invalid_request",
            "tools",
        ),
        ("/v1/completions", {"model": "dec", "prompt": "x", "echo": True}, "invalid_request", "echo"),
    ],
)
def test_a_bad_request_is_told_what_is_wrong(
    client: TestClient, path: str, body: dict[str, Any], code: str, param: str | None
) -> None:
    check(client.post(path, json=body), KINDS[code].status, code, param)


def test_an_unknown_model_is_named_only_where_harmless(client: TestClient) -> None:
    body = check(
        client.post("/v1/encode", json={"model": "nope", "input": "a"}), 404, "model_not_found", "model"
    )
    assert "'nope'" in body["detail"] and body["limits"]["known"] == ["enc", "dec"]
    odd = client.post("/v1/encode", json={"model": "<b>é", "input": "a"})
    assert "<b>" not in odd.text and odd.status_code == 404


def test_routes_and_methods_that_are_not_there(client: TestClient) -> None:
    check(client.get("/v1/nothing"), 404, "not_found")
    answer = client.get("/v1/encode")
    check(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"
    check(client.get("/v1//models"), 404, "not_found")
    check(client.get("/livez/"), 404, "not_found")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"input": "a"',
        b'{"model":"dec","prompt":"a","temperature": 1e999}',
        b'{"model":"dec","prompt":"a","temperature": NaN}',
        b'{"model":"dec","prompt":"a","temperature": -Infinity}',
        b'{"model":"dec","prompt":"\\ud800"}',
        b'{"model":"dec","prompt":["\\udfff"]}',
        b'{"model":"\\ud800","prompt":"a"}',
        b'{"model":"dec","prompt":"a","\\ud800": 1}',
        b'{"model":"dec","prompt":"a","seed": ' + b"9" * 5000 + b"}",
        b'{"model":"dec","prompt":"a","attention": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model":"dec","prompt":"a","attention": ' + b'{"backend":' * 50_000 + b"1" + b"}" * 50_000 + b"}",
        b'{"model":"dec","prompt":"a","attention":{"backend":"\\ud800"}}',
        b'{"model":"dec","prompt":"a","attention":{"backend":"window","params":{"\\ud800":1}}}',
        b'{"model":"dec","prompt":"a","attention":{"backend":"window","params":{"window":1e999}}}',
    ],
    ids=lambda raw: raw[:24].decode("latin-1") + str(len(raw)),
)
def test_bodies_that_json_or_unicode_cannot_hold_are_the_clients_fault(
    client: TestClient, raw: bytes
) -> None:
    answer = client.post("/v1/generate", content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["code"] in ("invalid_request", "attention_not_supported", "invalid_attention_params")
    assert len(answer.content) < 4000, "an error must not grow with the input"


def test_openai_routes_refuse_what_json_cannot_hold(client: TestClient) -> None:
    for raw in (b'{"model":"dec","prompt":"a","logit_bias":1e999}', b'{"model":"dec","prompt":"\\ud800"}'):
        answer = client.post("/v1/completions", content=raw, headers={"content-type": "application/json"})
        assert answer.status_code == 400, answer.text


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": ""},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ],
)
def test_other_media_types_and_compressed_bodies_are_refused(
    client: TestClient, headers: dict[str, str]
) -> None:
    check(client.post("/v1/encode", content=b'{"input":"a"}', headers=headers), 415, "unsupported_media_type")


def test_a_body_over_the_limit_is_refused_with_and_without_a_declared_length() -> None:
    with in_process(max_body_bytes=2000) as client:
        big = json.dumps({"input": "a" * 3000}).encode()
        headers = {"content-type": "application/json"}
        body = check(client.post("/v1/encode", content=big, headers=headers), 413, "body_too_large")
        assert body["limits"] == {"max_body_bytes": 2000}

        def chunks() -> Iterator[bytes]:
            for start in range(0, len(big), 500):
                yield big[start : start + 500]

        check(client.post("/v1/encode", content=chunks(), headers=headers), 413, "body_too_large")
        assert client.post("/v1/encode", json={"input": "a" * 300}).status_code == 200


def test_too_many_inputs_are_refused_by_their_number() -> None:
    with in_process(max_batch_inputs=3) as client:
        assert client.post("/v1/encode", json={"input": ["a"] * 3}).status_code == 200
        body = check(client.post("/v1/encode", json={"input": ["a"] * 4}), 400, "invalid_request", "input")
        assert body["limits"]["max_batch_inputs"] == 3


def test_an_answer_of_too_many_numbers_is_refused_before_it_is_computed() -> None:
    model = encoder()
    with in_process(model, max_output_values=160) as client:
        assert client.post("/v1/encode", json={"input": "a" * 8, "pooling": "none"}).status_code == 200
        before = len(model.steps)
        body = {"input": "a" * 9, "pooling": "none"}
        check(client.post("/v1/encode", json=body), 400, "invalid_request", "pooling")
        assert len(model.steps) == before


def test_a_request_that_never_fits_in_memory_is_told_both_figures() -> None:
    with in_process(memory_limit_bytes=12_300) as client:
        body = {"model": "enc", "input": "a" * 10}  # 12 tokens
        assert client.post("/v1/encode", json={**body, "attention": "exact"}).status_code == 200
        refused = check(
            client.post("/v1/encode", json={**body, "attention": "window"}), 413, "never_fits_memory"
        )
        assert refused["limits"] == {
            "estimated_bytes": 12_600,
            "exact_bytes": 12_000,
            "memory_limit_bytes": 12_300,
            "backends_that_fit": ["exact"],
        }
        assert "'exact' would fit" in refused["detail"]
        too_long = {**body, "input": "a" * 20}
        refused = check(client.post("/v1/encode", json=too_long), 413, "never_fits_memory")
        assert refused["limits"]["backends_that_fit"] == []
        assert "No backend of this model would fit" in refused["detail"]


def test_choices_of_one_prompt_must_fit_together_and_the_way_out_counts_them_so() -> None:
    body = {"prompt": "a" * 9, "max_new_tokens": 2, "n": 3}  # 10 tokens and 2 new ones, three times
    with in_process(memory_limit_bytes=36_000) as client:
        assert client.post("/v1/generate", json=body).status_code == 200
        # The leader works on 10 tokens at once, each choice that follows it on one.
        refused = check(
            client.post("/v1/generate", json={**body, "attention": "window"}), 413, "never_fits_memory"
        )
    assert refused["limits"]["estimated_bytes"] == 36_000 + 10 * 50 + 2 * 50
    assert refused["limits"]["exact_bytes"] == 36_000
    assert refused["limits"]["backends_that_fit"] == ["exact"]


def test_what_all_inputs_leave_for_the_answer_must_fit_beside_the_last_of_them() -> None:
    one_input = 12 * 1000 + 12 * 16 * 4  # 12 tokens, and their vectors of width 16
    body = {"model": "enc", "input": ["a" * 10] * 3, "attention": "exact"}
    with in_process(memory_limit_bytes=one_input + 100) as client:
        assert client.post("/v1/encode", json=body).status_code == 200, "pooled inputs leave nothing"
        whole = check(client.post("/v1/encode", json={**body, "pooling": "none"}), 413, "never_fits_memory")
        assert whole["limits"]["estimated_bytes"] == one_input + 2 * 12 * 16 * 4
    with in_process(memory_limit_bytes=one_input + 2 * 12 * 16 * 4) as client:
        assert client.post("/v1/encode", json={**body, "pooling": "none"}).status_code == 200


def test_a_failing_step_is_an_internal_error_without_its_message() -> None:
    with in_process(decoder(poison=ord("!"))) as client:
        answer = client.post("/v1/generate", json={"prompt": "boom!"})
        check(answer, 500, "internal_error")
        assert "secret prompt text" not in answer.text
        assert client.post("/v1/generate", json={"prompt": "fine"}).status_code == 200


def test_non_finite_output_is_said_and_never_null() -> None:
    with in_process(decoder(poison=ord("!"), poison_error=non_finite)) as client:
        check(client.post("/v1/generate", json={"prompt": "boom!"}), 500, "non_finite_output")


def test_values_that_turn_infinite_on_the_way_are_caught_by_the_service_itself() -> None:
    import torch

    model = encoder()
    plain = model._advance

    def broken(part: Any) -> Any:
        result = plain(part)
        assert result.hidden is not None
        result.hidden[0, 0] = torch.inf if ord("!") in part.token_ids else 0.0
        return result

    model._advance = broken  # type: ignore[method-assign]
    with in_process(model) as client:
        check(client.post("/v1/encode", json={"input": "boom!"}), 500, "non_finite_output")
        assert client.post("/v1/encode", json={"input": "fine"}).status_code == 200


def test_a_deadline_that_passes_is_not_retried_by_sdks() -> None:
    from tests.service.fake_model import slow

    with in_process(decoder(on_step=slow(0.03))) as client:
        answer = client.post("/v1/generate", json={"prompt": "x", "max_new_tokens": 500, "timeout_ms": 100})
        check(answer, 504, "deadline_exceeded")
        assert answer.headers["x-should-retry"] == "false"


def test_a_model_without_chat_template_says_so() -> None:
    from tests.service.fake_model import BOS, ByteTokenizer

    with in_process(decoder(tokenizer=ByteTokenizer((BOS,), chat=False))) as client:
        body = {"model": "dec", "messages": [{"role": "user", "content": "x"}]}
        assert (
            "no chat template"
            in check(client.post("/v1/chat/completions", json=body), 400, "invalid_request")["detail"]
        )
