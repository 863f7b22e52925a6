"""The OpenAI routes, used as their users do: through OpenAI's own SDK."""

from __future__ import annotations

import base64
import json
import struct
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest
from fastapi.testclient import TestClient

from tests.service.conftest import Served, in_process, serving
from tests.service.fake_model import WIDTH, decoder, encoder

HI: list[Any] = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serving() as found:
        yield found


@pytest.fixture
def sdk(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0) as found:
        yield found


def test_embeddings_by_default_travel_as_base64_and_equal_the_floats(
    sdk: openai.OpenAI, server: Served
) -> None:
    found = sdk.embeddings.create(model="enc", input=["hello", "world"])
    assert [len(item.embedding) for item in found.data] == [WIDTH, WIDTH]
    floats = sdk.embeddings.create(model="enc", input=["hello", "world"], encoding_format="float")
    for a, b in zip(found.data, floats.data, strict=True):
        assert a.embedding == pytest.approx(b.embedding, abs=1e-7)
    assert found.usage.prompt_tokens == found.usage.total_tokens == 14
    raw = server.post(
        "/v1/embeddings", {"model": "enc", "input": "hello", "encoding_format": "base64"}
    ).json()
    packed = base64.b64decode(raw["data"][0]["embedding"])
    assert list(struct.unpack(f"<{WIDTH}f", packed)) == pytest.approx(floats.data[0].embedding, abs=1e-7)
    native = server.post("/v1/encode", {"input": "hello"}).json()["data"][0]["embedding"]
    assert native == floats.data[0].embedding


def test_embeddings_take_token_ids_one_list_or_many(sdk: openai.OpenAI, server: Served) -> None:
    ids = server.post("/v1/tokenize", {"model": "enc", "input": "hello"}).json()["data"][0]["token_ids"]
    text = sdk.embeddings.create(model="enc", input="hello").data[0].embedding
    assert sdk.embeddings.create(model="enc", input=ids).data[0].embedding == text
    many = sdk.embeddings.create(model="enc", input=[ids, [1, 2]])
    assert many.data[0].embedding == text and many.data[1].index == 1


def test_embeddings_keep_the_dimensions_asked_for(sdk: openai.OpenAI) -> None:
    found = sdk.embeddings.create(model="enc", input="x", dimensions=4, encoding_format="float")
    assert len(found.data[0].embedding) == 4
    assert sum(x * x for x in found.data[0].embedding) == pytest.approx(1, abs=1e-5)


def test_attention_rides_in_extra_body_and_is_told_in_the_answer(sdk: openai.OpenAI) -> None:
    spec = {"attention": {"backend": "window", "params": {"window": 4}}}
    found = sdk.embeddings.create(model="enc", input="hello", extra_body=spec)
    used = found.model_extra["attention"]  # type: ignore[index]
    assert used["used"] == "window" and used["params"]["window"] == 4
    chat = sdk.chat.completions.create(model="dec", messages=HI, max_tokens=2, extra_body=spec)
    assert chat.model_extra["attention"]["density"] < 1  # type: ignore[index]
    plain = sdk.embeddings.create(model="enc", input="hello")
    assert plain.data[0].embedding != found.data[0].embedding


def test_completions_answer_as_the_sdk_expects(sdk: openai.OpenAI) -> None:
    found = sdk.completions.create(model="dec", prompt="hello", max_tokens=5, temperature=0, logprobs=2, n=2)
    assert found.object == "text_completion" and len(found.choices) == 2
    choice = found.choices[0]
    assert choice.finish_reason == "length" and len(choice.text) == 5
    assert choice.logprobs is not None and choice.logprobs.text_offset == [0, 1, 2, 3, 4]
    assert (
        len(choice.logprobs.token_logprobs or []) == 5 and len((choice.logprobs.top_logprobs or [{}])[0]) == 2
    )
    assert found.usage is not None and found.usage.completion_tokens == 10
    assert len(sdk.completions.create(model="dec", prompt="x").choices[0].text) <= 16, "OpenAI's default"


def test_completions_take_lists_and_token_ids(sdk: openai.OpenAI) -> None:
    def texts(prompt: Any, n: int = 1) -> list[str]:
        found = sdk.completions.create(model="dec", prompt=prompt, max_tokens=4, temperature=0, n=n)
        assert [choice.index for choice in found.choices] == list(range(len(found.choices)))
        return [choice.text for choice in found.choices]

    one, two = texts("one")[0], texts("two")[0]
    assert texts(["one", "two"], n=2) == [one, one, two, two]
    assert texts([256, *b"one"])[0] == one and texts([[256, *b"one"], [256, *b"two"]]) == [one, two]


def test_a_completion_stream_concatenates_to_the_plain_answer(sdk: openai.OpenAI) -> None:
    ask: dict[str, Any] = {
        "model": "dec",
        "prompt": "hello",
        "max_tokens": 12,
        "seed": 4,
        "temperature": 1,
        "n": 2,
    }
    plain = sdk.completions.create(**ask)
    texts, reasons, usage = ["", ""], {}, None
    for chunk in sdk.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
        usage = chunk.usage or usage
    assert texts == [choice.text for choice in plain.choices] and reasons == {0: "length", 1: "length"}
    assert usage is not None and plain.usage is not None
    assert usage.completion_tokens == plain.usage.completion_tokens


def test_chat_answers_as_the_sdk_expects(sdk: openai.OpenAI) -> None:
    found = sdk.chat.completions.create(
        model="dec", messages=HI, max_completion_tokens=6, temperature=0, logprobs=True, top_logprobs=3
    )
    choice = found.choices[0]
    assert found.object == "chat.completion" and choice.message.role == "assistant"
    assert choice.finish_reason == "length" and len(choice.message.content or "") == 6
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert len(choice.logprobs.content) == 6 and len(choice.logprobs.content[0].top_logprobs) == 3
    assert found.usage is not None and found.usage.completion_tokens == 6
    parts: list[Any] = [
        {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}
    ]
    same = sdk.chat.completions.create(model="dec", messages=parts, max_tokens=6, temperature=0)
    whole: list[Any] = [{"role": "user", "content": "hi"}]
    joined = sdk.chat.completions.create(model="dec", messages=whole, max_tokens=6, temperature=0)
    assert same.choices[0].message.content == joined.choices[0].message.content


def test_a_chat_stream_begins_with_the_role_and_ends_with_done(sdk: openai.OpenAI, server: Served) -> None:
    ask: dict[str, Any] = {"model": "dec", "messages": HI, "max_tokens": 8, "temperature": 0}
    plain = sdk.chat.completions.create(**ask)
    chunks = list(sdk.chat.completions.create(**ask, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].object == "chat.completion.chunk"
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == plain.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length" and chunks[-1].usage is None
    raw = server.post("/v1/chat/completions", {**ask, "stream": True}).text
    assert raw.endswith("data: [DONE]\n\n") and all(
        line.startswith("data: ") for line in raw.strip().split("\n\n")
    )


def test_chat_without_a_limit_ends_at_eos_or_the_context() -> None:
    with in_process(decoder(script=b"all said")) as client:
        answer = client.post("/v1/chat/completions", json={"model": "dec", "messages": HI}).json()
        assert answer["choices"][0]["message"]["content"] == "all said"
        assert answer["choices"][0]["finish_reason"] == "stop"
    with in_process(decoder(max_tokens=64)) as client:
        answer = client.post(
            "/v1/chat/completions", json={"model": "dec", "messages": HI, "temperature": 0}
        ).json()
        assert answer["usage"]["total_tokens"] <= 64


def test_a_seed_repeats_and_no_seed_does_not(sdk: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": "dec", "prompt": "x", "max_tokens": 16}
    assert len({sdk.completions.create(**ask, seed=1).choices[0].text for _ in range(2)}) == 1
    assert len({sdk.completions.create(**ask).choices[0].text for _ in range(4)}) > 1


def test_models_are_listed(sdk: openai.OpenAI) -> None:
    now = time.time()
    cards = list(sdk.models.list())
    assert [model.id for model in cards] == ["enc", "dec"]
    assert all(isinstance(card.created, int) and now - 3600 < card.created <= now for card in cards)
    assert sdk.models.retrieve("dec") == cards[1]
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("gone")


@pytest.mark.parametrize(
    ("ask", "error", "code", "param"),
    [
        ({"model": "gone", "input": "x"}, openai.NotFoundError, "model_not_found", "model"),
        ({"model": "enc", "input": "x" * 600}, openai.BadRequestError, "context_length_exceeded", "input"),
        ({"model": "enc", "input": ["x", ""]}, openai.BadRequestError, "empty_input", "input[1]"),
        (
            {"model": "enc", "input": "x", "dimensions": 99},
            openai.BadRequestError,
            "invalid_request",
            "dimensions",
        ),
    ],
)
def test_errors_become_the_sdks_own_classes(
    sdk: openai.OpenAI, ask: dict[str, Any], error: type[openai.APIStatusError], code: str, param: str
) -> None:
    with pytest.raises(error) as caught:
        sdk.embeddings.create(**ask)
    assert caught.value.code == code and caught.value.param == param
    assert caught.value.request_id is not None and caught.value.type == "invalid_request_error"
    assert caught.value.body["message"]  # type: ignore[index]


def test_harmless_fields_are_accepted_and_named(client: TestClient) -> None:
    body = {
        "model": "dec",
        "messages": HI,
        "max_tokens": 1,
        "user": "u",
        "store": False,
        "metadata": {},
        "zz": 1,
    }
    answer = client.post(
        "/v1/chat/completions", json={**body, "presence_penalty": 0, "tools": [], "bad name\n": 1}
    )
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-ignored-params"] == "metadata, of that name, store, zz"
    many = {f"f{i}": 1 for i in range(500)}
    answer = client.post("/v1/embeddings", json={"model": "enc", "input": "x", **many})
    assert answer.status_code == 200 and len(answer.headers["x-ignored-params"].split(", ")) == 32


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("presence_penalty", 0.5),
        ("frequency_penalty", True),
        ("logit_bias", {"5": 1}),
        ("response_format", {"type": "json_object"}),
        ("tools", [{"type": "function"}]),
        ("best_of", 2),
    ],
)
def test_fields_that_would_change_the_answer_are_refused(client: TestClient, field: str, value: Any) -> None:
    answer = client.post("/v1/completions", json={"model": "dec", "prompt": "x", field: value})
    assert answer.status_code == 400 and answer.json()["param"] == field


def test_unknown_keys_inside_attention_are_refused_here_too(client: TestClient) -> None:
    body = {"model": "enc", "input": "x", "attention": {"backend": "window", "extra": 1}}
    assert client.post("/v1/embeddings", json=body).status_code == 400


def test_a_reader_of_the_raw_stream_gets_json_on_every_line(server: Served) -> None:
    body = {"model": "dec", "prompt": "x", "max_tokens": 5, "stream": True, "logprobs": 1}
    with httpx2.stream("POST", server.url + "/v1/completions", json=body) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert len({chunk["id"] for chunk in chunks}) == 1 and "attention" in chunks[-1]
    assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks[:-1]] == [
        [0],
        [1],
        [2],
        [3],
        [4],
    ]


def test_a_template_that_refuses_the_messages_is_the_clients_fault() -> None:
    """Its own words may repeat the messages, so they are not passed on."""

    def refuse(messages: Any) -> str:
        raise ValueError(f"the template says: secret words about {messages[0]['content']}")

    model = decoder()
    model.tokenizer.chat = refuse  # type: ignore[method-assign, assignment]
    with in_process(model) as client:
        body = {"model": "dec", "messages": [{"role": "user", "content": "canary"}]}
        for stream in (False, True):
            answer = client.post("/v1/chat/completions", json={**body, "stream": stream})
            assert answer.status_code == 400 and answer.json()["code"] == "invalid_request", answer.text
            assert answer.json()["param"] == "messages" and "chat template" in answer.json()["detail"]
            assert "secret" not in answer.text and "canary" not in answer.text


def test_the_encoder_cannot_chat_and_says_who_can(client: TestClient) -> None:
    answer = client.post("/v1/chat/completions", json={"model": "enc", "messages": HI})
    assert answer.status_code == 400 and "dec" in answer.json()["detail"]
    assert encoder().info.name == "enc"
