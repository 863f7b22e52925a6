"""/v1/estimate: what a request would take, told without running it, and true to what runs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from kernels.registry import BACKENDS, load
from models.contract import Choice, Flops
from service.attention import exact_choice
from service.cost import CostModel, Prior, SliceRun
from service.estimate import Plan, pieces_of, predict, summed
from tests.service.conftest import Blocker, in_process, serving, wait_for
from tests.service.fake_model import decoder, encoder


def ask(client: TestClient, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/estimate", json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_an_estimate_is_told_for_each_attention_in_the_order_asked() -> None:
    model = decoder()
    with in_process(model) as client:
        specs = [
            "window",
            {"backend": "exact"},
            {"prefill": {"backend": "sinks", "params": {"window": 9}}, "decode": "exact"},
            {"backend": "window", "params": {"window": 7}, "seed": 5},
        ]
        told = ask(client, input="a" * 299, max_new_tokens=20, attention=specs)
        assert not model.steps, "an estimate ran something"
    assert (told["model"], told["tokens"], told["truncated_tokens"]) == ("dec", 300, 0)
    found = [(each["attention"]["used"], each["attention"]["params"].get("window")) for each in told["data"]]
    assert found == [("window", 512), ("exact", None), ("sinks", 9), ("window", 7)]
    assert told["data"][2]["attention"]["decode"]["used"] == "exact"
    assert told["data"][0]["attention"]["decode"] is None
    for each in told["data"]:
        assert each["total_ms"] == pytest.approx(each["prefill_ms"] + each["decode_ms"], abs=2e-3)
        assert each["prefill_ms"] > 0 and each["decode_ms"] > 0 and each["fits"] is True
        assert each["exact_bytes"] == 320_000 and each["lane"] == "short"
        assert each["calibrated"] is False and each["basis"] == "assumed", "nothing was warmed up"
    assert told["data"][0]["estimated_bytes"] == 320_000 + 300 * 50
    assert told["limits"]["memory_limit_bytes"] == 1 << 40 and told["limits"]["max_queue_ms"] == 600_000


def test_one_attention_need_not_be_a_list_and_exact_is_the_default(client: TestClient) -> None:
    for attention in (None, "exact", {"backend": "exact"}, ["exact"], {"prefill": "exact"}):
        told = ask(client, model="dec", input="abc", attention=attention)
        [only] = told["data"]
        assert only["attention"]["used"] == "exact" and only["decode_ms"] == 0
    assert ask(client, model="enc", input={"token_ids": [1, 2, 3]})["tokens"] == 3


def test_memory_is_what_admission_counts_and_fits_says_what_admission_would() -> None:
    body = {"prompt": "a" * 99, "max_new_tokens": 4}
    with in_process(decoder(), memory_limit_bytes=105_000) as client:
        told = ask(client, input="a" * 99, max_new_tokens=4, attention=["exact", "window"])
        by_name = {each["attention"]["used"]: each for each in told["data"]}
        for name, each in by_name.items():
            answer = client.post("/v1/generate", json={**body, "attention": name})
            assert (answer.status_code == 200) == each["fits"]
            if each["fits"]:
                told_then = answer.json()["stats"]["memory"]
                assert told_then["estimated_bytes"] == each["estimated_bytes"]
                assert told_then["exact_bytes"] == each["exact_bytes"]
            else:
                assert answer.json()["limits"]["estimated_bytes"] == each["estimated_bytes"]
    assert [by_name["exact"]["fits"], by_name["window"]["fits"]] == [True, False]


def test_what_the_cache_holds_of_a_prompt_is_neither_read_nor_paid_for() -> None:
    with in_process(decoder()) as client:
        text = "".join(chr(97 + i % 26) for i in range(299))
        before = ask(client, input=text, max_new_tokens=2)["data"][0]
        body = {"prompt": text, "max_new_tokens": 2, "cache_salt": "s"}
        client.post("/v1/generate", json=body)
        after, other = (
            ask(client, input=text, max_new_tokens=2, cache_salt=salt)["data"][0] for salt in ("s", "t")
        )
        again = client.post("/v1/generate", json=body).json()["usage"]
    assert before["cached_tokens"] == other["cached_tokens"] == 0
    assert after["cached_tokens"] == again["cached_tokens"] == 256
    assert after["prefill_ms"] < other["prefill_ms"]


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"input": ""}, "empty_input", "input"),
        ({"input": ["a"]}, "invalid_request", "input"),
        ({"input": "a", "max_new_tokens": -1}, "invalid_request", "max_new_tokens"),
        ({"input": "a", "max_new_tokens": 1024}, "invalid_request", "max_new_tokens"),
        ({"input": "a" * 1020, "max_new_tokens": 8}, "context_length_exceeded", "input"),
        ({"input": "a", "attention": []}, "invalid_request", "attention"),
        ({"input": "a", "attention": ["exact"] * 33}, "invalid_request", "attention"),
        ({"input": "a", "attention": ["exact", "nystrom"]}, "attention_not_supported", "attention[1]"),
        ({"input": "a", "attention": ["exact", "nothing"]}, "attention_not_supported", "attention[1]"),
        (
            {"input": "a", "attention": ["exact", {"backend": "window", "params": {"window": 0}}]},
            "invalid_attention_params",
            "attention[1].params.window",
        ),
        (
            {"input": "a", "attention": [{"prefill": "exact", "decode": {"backend": "window", "x": 1}}]},
            "invalid_attention_params",
            "attention[0].decode.x",
        ),
        ({"input": "a", "attention": [["exact"]]}, "invalid_request", "attention[0]"),
        ({"input": "a", "model": "other"}, "model_not_found", "model"),
        ({"input": "a", "priority": 1}, "invalid_request", "priority"),
    ],
)
def test_what_cannot_be_estimated_is_refused_by_name(
    client: TestClient, body: dict[str, Any], code: str, param: str
) -> None:
    if code == "attention_not_supported" and "nystrom" in str(body):
        with in_process(
            decoder(unsupported=lambda choice: ["no"] if choice.backend == "nystrom" else [])
        ) as one:
            answer = one.post("/v1/estimate", json=body)
    else:
        answer = client.post("/v1/estimate", json={"model": "dec", **body})
    assert answer.json()["code"] == code and answer.json()["param"] == param, answer.text


def test_generation_needs_a_model_that_generates(client: TestClient) -> None:
    answer = client.post("/v1/estimate", json={"model": "enc", "input": "a", "max_new_tokens": 1})
    assert answer.status_code == 400 and "cannot generate" in answer.json()["detail"]


def test_a_permitted_fallback_is_told(client: TestClient) -> None:
    spec = {"backend": "strided", "fallback": "exact"}
    [only] = ask(client, model="enc", input="abc", attention=spec)["data"]
    assert only["attention"]["used"] == "exact" and "strided" in only["attention"]["fallback_reason"]


def test_truncation_is_asked_for_and_counted(client: TestClient) -> None:
    told = ask(client, model="dec", input="a" * 2000, max_new_tokens=24, truncate="end")
    assert (told["tokens"], told["truncated_tokens"]) == (1000, 1001)


def test_a_long_prompt_is_told_to_go_into_the_long_lane() -> None:
    with in_process(decoder(flops_per_token=1e9), short_ms=1000) as client:
        lanes = [ask(client, input="a" * n)["data"][0]["lane"] for n in (10, 900)]
    assert lanes == ["short", "long"]


def test_the_queue_is_told_as_it_is_now() -> None:
    blocker = Blocker()
    with serving(encoder(on_step=blocker)) as server, ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(server.post, "/v1/encode", {"input": "abc"})]
        blocker.entered.wait(20)
        calls += [pool.submit(server.post, "/v1/encode", {"input": "abc"}) for _ in range(2)]
        wait_for(lambda: server.runtime.engine.load("enc").queued_requests == 2)
        queue = server.post("/v1/estimate", {"input": "abc"}).json()["queue"]
        blocker.release.set()
        assert [call.result().status_code for call in calls] == [200] * 3
        idle = server.post("/v1/estimate", {"input": "abc"}).json()["queue"]
    assert queue["waiting_requests"] == 2 and queue["waiting_ms"] > 0 and queue["predicted_wait_ms"] > 0
    assert idle == {"waiting_requests": 0, "waiting_ms": 0, "predicted_wait_ms": 0}


@pytest.mark.parametrize("count", [0, 1, 2, 31, 32, 33, 100, 4095])
def test_sums_of_many_new_tokens_are_those_of_every_one(count: int) -> None:
    """Attention grows linearly with the position, or stops growing at a window."""
    assert summed(lambda i: 3.0 + 0.25 * i, count) == pytest.approx(sum(3.0 + 0.25 * i for i in range(count)))
    bent = sum(min(i, 500) + 1.0 for i in range(count))
    assert summed(lambda i: min(i, 500) + 1.0, count) == pytest.approx(bent, rel=0.01)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("start", "tokens"), [(0, 1), (0, 512), (0, 1300), (256, 1300), (1299, 1300)])
def test_pieces_are_the_prompt_once_and_end_where_the_scheduler_ends_them(
    backend: str, start: int, tokens: int
) -> None:
    choice = Choice(backend, load(backend).params())
    pieces = pieces_of(Plan(choice, choice, tokens, 0, 500), start, causal=True)
    assert [place for first, n in pieces for place in range(first, first + n)] == list(range(start, tokens))
    if load(backend).capabilities.selection == "prompt":
        assert len(pieces) == (start < tokens)
        return
    multiple = max(128, choice.params.chunk_multiple())
    assert all((first + n) % multiple == 0 for first, n in pieces[:-1])
    assert all(n <= max(500, multiple) for _, n in pieces)
    assert pieces_of(Plan(choice, choice, tokens, 0, 500), start, causal=False) == [(start, tokens - start)]


def test_milliseconds_are_those_of_the_cost_model_step_by_step() -> None:
    model, costs = decoder(), CostModel(Prior())
    choice = exact_choice()
    plan = Plan(choice, choice, tokens=700, new_tokens=5, chunk_tokens=256)
    found = predict(model, costs, plan, 0)
    by_hand = 0.0
    for start, tokens in ((0, 256), (256, 256), (512, 188)):
        run = SliceRun("exact", model.flops(tokens, start, choice, "nothing"))
        by_hand += costs.step_ms("dec", [run])
    assert found.prefill_ms == pytest.approx(by_hand)
    decoded = [SliceRun("exact", model.flops(1, 700 + i, choice, "logits")) for i in range(4)]
    assert found.decode_ms == pytest.approx(sum(costs.step_ms("dec", [run]) for run in decoded))
    assert found.basis == "assumed"
    for _ in range(50):
        run = SliceRun("exact", Flops(1e9, 1e8), attention_ms=3.0)
        costs.observe("dec", [run, run], 0.1)
        costs.observe("dec", [run], 0.05)
    assert predict(model, costs, plan, 0).basis == "measured"
    window = Choice("window", load("window").params())
    for pair in ((window, choice), (choice, window)):
        assert predict(model, costs, replace(plan, prefill=pair[0], decode=pair[1]), 0).basis == "predicted"


def test_an_estimate_demands_what_other_routes_demand() -> None:
    with in_process(api_key="key") as client:
        assert client.post("/v1/estimate", json={"input": "a"}).status_code == 401
