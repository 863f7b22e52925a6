"""Large answers: bounded before anything runs, built and written off the event loop."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from pydantic import BaseModel

from service import flow, generation
from tests.service.conftest import in_process
from tests.service.fake_model import decoder, encoder

LONG = {"model": "dec", "logprobs": 20}


@pytest.mark.parametrize(
    ("path", "body", "param", "values"),
    [
        ("/v1/generate", {"prompt": "a", "max_new_tokens": 100, "n": 3, "logprobs": 2}, "logprobs", 3000),
        ("/v1/generate", {"prompt": "a", "max_new_tokens": 900, "n": 2}, "max_new_tokens", 1800),
        (
            "/v1/generate",
            {"prompt": "a", "max_new_tokens": 900, "n": 2, "stream": True},
            "max_new_tokens",
            1800,
        ),
        ("/v1/completions", {"prompt": ["a"] * 4, "max_tokens": 50, "n": 2, "logprobs": 0}, "logprobs", 1600),
        (
            "/v1/chat/completions",
            {
                "messages": [{"role": "user", "content": "a"}],
                "max_completion_tokens": 50,
                "logprobs": True,
                "top_logprobs": 20,
            },
            "logprobs",
            3200,
        ),
    ],
)
def test_choices_times_tokens_times_alternatives_are_bounded(
    path: str, body: dict[str, Any], param: str, values: int
) -> None:
    model = decoder()
    with in_process(model, max_output_values=1500) as client:
        refused = client.post(path, json={"model": "dec", **body})
        assert refused.status_code == 400 and refused.json()["param"] == param, refused.text
        assert refused.json()["limits"] == {"max_output_values": 1500, "values": values}
        assert not model.steps
        fits = {**body, "n": 1, "prompt": "a"} if "prompt" in body else {**body, "top_logprobs": 1}
        fits |= {name: 20 for name in ("max_new_tokens", "max_tokens") if name in body}
        assert client.post(path, json={"model": "dec", **fits}).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/generate", {"prompt": "a", "max_new_tokens": 60, "logprobs": 20, "n": 2}),
        ("/v1/completions", {"prompt": "a", "max_tokens": 60, "logprobs": 20, "n": 2}),
        (
            "/v1/chat/completions",
            {
                "messages": [{"role": "user", "content": "a"}],
                "max_tokens": 60,
                "logprobs": True,
                "top_logprobs": 20,
                "n": 2,
            },
        ),
        ("/v1/encode", {"model": "enc", "input": "x" * 300, "late_chunking": {"chunk_tokens": 1}}),
        ("/v1/score", {"input": "x" * 5000}),
    ],
)
def test_a_large_answer_is_built_and_written_off_the_event_loop(
    path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrote: list[str] = []
    built: list[str] = []
    plain_dump, plain_text = BaseModel.model_dump_json, type(decoder().tokenizer).token_text

    def dump(self: BaseModel, **options: Any) -> str:
        wrote.append(threading.current_thread().name)
        return plain_dump(self, **options)

    def token_text(self: Any, token_id: int) -> str:
        built.append(threading.current_thread().name)
        return plain_text(self, token_id)

    monkeypatch.setattr(flow, "LARGE_ANSWER_VALUES", 4096)
    monkeypatch.setattr(BaseModel, "model_dump_json", dump)
    model = decoder(max_tokens=6000)
    monkeypatch.setattr(type(model.tokenizer), "token_text", token_text)
    with in_process(encoder(), model) as client:
        wrote.clear()
        answer = client.post(path, json={"model": "dec", **body})
        assert answer.status_code == 200, answer.text
    assert any("worker" in name for name in wrote), wrote
    assert all("worker" in name for name in built), "tables of log-probabilities are built there too"
    assert bool(built) == ("logprobs" in body)


def test_values_are_counted_as_they_are_bounded() -> None:
    from service.sampling import Sampled
    from service.sequences import TokenOut

    class Made:
        tokens = [TokenOut(0, 1, "a", Sampled(1, -0.5, ((1, -0.5), (2, -1.0)))) for _ in range(5)]

    assert generation.num_values([Made()]) == 5 * (4 + 3 * 2)  # type: ignore[list-item]
