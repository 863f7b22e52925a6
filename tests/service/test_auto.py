"""``auto`` over HTTP: which plan each input gets, what the answer says of it, that nothing else decides."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from jsonschema import Draft202012Validator

from models.auto import as_json
from models.auto import plan as plan_of
from models.contract import Kept, ModelError
from models.planned import Planned
from models.profile import Ladder, Length, Made, Profile, Rung, Stamp
from service import auto as auto_module
from service.answers import Attended
from service.attention import choose, parse, parse_pair
from service.auto import chosen_of, without_prompt_selection
from service.auto_spec import AutoSpec
from service.chosen import ChosenAuto, is_guarded
from service.cli import main
from service.cli_compare import parse_spec
from service.errors import ApiError
from service.estimate import looks_ahead
from service.metrics import PROFILE_STATES, Metrics
from service.runtime import Runtime
from tests.service.conftest import in_process, sample, serving, wait_for
from tests.service.fake_model import BYTES_PER_TOKEN, WORKSPACE_PER_TOKEN, FakeModel, decoder, encoder
from tests.service.test_answers import events, post

LENGTHS = (64, 640)
MAX_TOKENS = 960
"""Longer documents are read exactly."""
WINDOW = ("window", {"window": 8})
SINKS = ("sinks", {"window": 64})
EXACT = ("exact", {})
TEXT = "the whale is a spouting fish with a horizontal tail; " * 8
STAMP = Stamp(model="m", fingerprint="f", dtype="float32", device="cpu", processor="p", threads=1, torch="2")
MADE = Made(command="c", date="2026-01-01", seconds=1.0, chunk_tokens=512, seed=0, texts=())


def rung(backend: str, params: dict[str, Any], error: float, share: float) -> Rung:
    figures = (error,) * len(LENGTHS)
    shares, spread = (share,) * len(LENGTHS), (0.0,) * len(LENGTHS)
    return Rung(
        backend=backend,
        params=params,
        median=figures,
        p95=figures,
        max=figures,
        spread=spread,
        time_share=shares,
    )


def profile(*layers: list[Rung]) -> Profile:
    """By default ``window`` serves layer 0 from a budget of 0.07 on and layer 1 from 0.3 on, ``sinks`` layer
    1 from 0.15 on."""
    exact = rung(*EXACT, 0.0, 1.0)
    ladders = layers or (
        [rung(*WINDOW, 0.05, 0.2)],
        [rung(*WINDOW, 0.2, 0.2), rung(*SINKS, 0.1, 0.5)],
    )
    return Profile(
        stamp=STAMP,
        made=MADE,
        lengths=tuple(Length(tokens=n, documents=8, attention_ms=9.0 * n, rest_ms=n) for n in LENGTHS),
        layers=tuple(Ladder(layer=i, rungs=(*rungs, exact)) for i, rungs in enumerate(ladders)),
    )


PROFILE = profile()


def runtime_of(client: TestClient) -> Runtime:
    found: Runtime = client.app.state.runtime  # type: ignore[attr-defined]
    return found


@contextmanager
def planning(*models: FakeModel, **settings: Any) -> Iterator[TestClient]:
    """A server whose models all have ``PROFILE``."""
    with in_process(*models, **settings) as client:
        for name in runtime_of(client).models:
            runtime_of(client).profiles.put(name, PROFILE)
        yield client


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with planning(encoder(), decoder()) as found:
        yield found


def auto(max_error: float = 0.1, **more: Any) -> dict[str, Any]:
    return {"backend": "auto", "max_error": max_error, **more}


def entry(layer: int, attention: tuple[str, dict[str, Any]], exact_from: int | None = None) -> dict[str, Any]:
    backend, params = attention
    return {"layer": layer, "backend": backend, "params": params, "exact_from": exact_from}


def ids(tokens: int, seed: int = 0) -> dict[str, list[int]]:
    draws = random.Random(seed)
    return {"token_ids": [draws.randrange(1, 120) for _ in range(tokens)]}


def repairing(row: int, estimate: float = 0.09, layer: int = 0) -> Any:
    """A guard that repairs ``layer`` from ``row`` on."""

    def guard(choice: Planned, total: int) -> tuple[Kept, ...]:
        return tuple(
            Kept(i, estimate, 9, row if i == layer and row < total else None)
            if each.backend != "exact"
            else Kept(i, 0.0, 0, None)
            for i, each in enumerate(choice.layers)
        )

    return guard


REQUESTS: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/encode", {"model": "dec", "input": TEXT}, "data"),
    ("/v1/generate", {"prompt": TEXT, "max_new_tokens": 6}, "choices"),
    ("/v1/generate", {"prompt": TEXT, "max_new_tokens": 6, "n": 3, "temperature": 1.0, "seed": 5}, "choices"),
    ("/v1/score", {"input": TEXT}, "data"),
    ("/v1/embeddings", {"model": "dec", "input": [TEXT, TEXT[:-2] + "z"]}, "data"),
    ("/v1/completions", {"model": "dec", "prompt": TEXT, "seed": 1, "max_tokens": 5}, "choices"),
    (
        "/v1/chat/completions",
        {"model": "dec", "messages": [{"role": "user", "content": TEXT}], "seed": 1, "max_tokens": 5},
        "choices",
    ),
]
ROUTES = [f"{path} {'n' if 'n' in body else ''}" for path, body, _ in REQUESTS]


def can_encode() -> FakeModel:
    """A decoder that also embeds, so that one model serves every route."""
    return decoder(tasks=("generate", "score", "encode"))


class TestPlan:
    @pytest.mark.parametrize(
        ("max_error", "layers", "reason"),
        [
            (0.01, (EXACT, EXACT), "all layers need exact"),
            (0.1, (WINDOW, EXACT), "chosen"),
            (0.2, (WINDOW, SINKS), "chosen"),
            (1, (WINDOW, WINDOW), "chosen"),
        ],
    )
    def test_each_layer_gets_the_cheapest_rung_that_keeps_the_budget(
        self,
        client: TestClient,
        max_error: float,
        layers: tuple[tuple[str, dict[str, Any]], ...],
        reason: str,
    ) -> None:
        answer = post(client, "/v1/generate", {"prompt": TEXT, "attention": auto(max_error)})
        told = answer["attention"]
        assert told["requested"] == told["used"] == "auto" and told["params"] == {"max_error": max_error}
        assert told["plan"] == [entry(i, each) for i, each in enumerate(layers)]
        assert told["plan_reason"] == reason and told["plans"] is told["plan_reasons"] is None
        estimate = 0.0 if all(each == EXACT for each in layers) else max_error / 2
        assert told["budget"].items() >= {"estimate": estimate, "within": True}.items()
        assert told["decode"] is None and told["measured_error"] is None

    def test_the_plan_is_that_of_the_policy_for_any_length_and_budget(self, client: TestClient) -> None:
        draws = random.Random(3)
        for _ in range(25):
            tokens, budget = draws.choice((1, 63, 64, 65, 255, 256, 257, 959, 961)), draws.uniform(0.01, 0.4)
            body = {"prompt": ids(tokens), "max_new_tokens": 2, "attention": auto(budget)}
            told = post(client, "/v1/generate", body)["attention"]
            expected = plan_of(PROFILE, tokens, budget)
            assert told["plan"] == as_json(expected.layers) and told["plan_reason"] == expected.reason
            kept = [each for each in expected.layers if each.backend != "exact"]
            assert told["budget"]["rows"] == len(kept) * -(-tokens // 64)
            assert (told["density"] == 1) == expected.is_exact

    def test_each_input_is_planned_by_its_own_length(self) -> None:
        lengths = [30, 300, 64, 1000, 300]
        with planning(can_encode()) as client:
            body = {"input": [ids(n, n) for n in lengths], "attention": auto(0.2)}
            answer = post(client, "/v1/encode", body)
            told = answer["attention"]
            assert told["plan"] is None and told["plan_reason"] is None
            assert told["plans"] == [as_json(plan_of(PROFILE, n, 0.2).layers) for n in lengths]
            assert told["plan_reasons"] == ["too short", "chosen", "chosen", "too long", "chosen"]
            for i, n in enumerate(lengths):
                alone = post(client, "/v1/encode", {"input": ids(n, n), "attention": auto(0.2)})
                assert alone["data"][0]["embedding"] == answer["data"][i]["embedding"]
                assert alone["attention"]["plan"] == told["plans"][i]

    def test_inputs_with_the_same_plan_have_it_told_once(self, client: TestClient) -> None:
        body = {"model": "enc", "input": [ids(70), ids(300)], "attention": auto()}
        told = post(client, "/v1/encode", body)["attention"]
        assert told["plan"] == [entry(0, WINDOW), entry(1, EXACT)] and told["plans"] is None
        body["input"] = [ids(9), ids(8)]
        told = post(client, "/v1/encode", body)["attention"]
        assert told["plan"] == [entry(0, EXACT), entry(1, EXACT)] and told["plan_reason"] == "too short"

    def test_inputs_that_were_repaired_at_different_rows_have_plans_of_their_own(self) -> None:
        with planning(can_encode()) as client:
            model = runtime_of(client).models["dec"]
            assert isinstance(model, FakeModel)
            model.guard = repairing(256)
            body = {"input": [ids(200), ids(300)], "attention": auto()}
            told = post(client, "/v1/encode", body)["attention"]
            assert told["plans"] == [
                [entry(0, WINDOW), entry(1, EXACT)],
                [entry(0, WINDOW, 256), entry(1, EXACT)],
            ]
            assert told["plan_reason"] == "chosen" and told["budget"]["repaired_layers"] == [0]
            assert told["budget"]["rows"] == 18

    @pytest.mark.parametrize(("path", "body", "made"), REQUESTS, ids=ROUTES)
    def test_what_was_served_before_changes_nothing(self, path: str, body: dict[str, Any], made: str) -> None:
        def ask(client: TestClient) -> tuple[Any, Any]:
            found = post(client, path, {**body, "attention": auto()})
            told = found["attention"]
            return found[made], [told[name] for name in ("plan", "plans", "budget", "density")]

        with planning(can_encode()) as client:
            alone = ask(client)
            others = [auto(0.3), "exact", "window", auto(0.01), {"backend": "auto", "plan": alone[1][0]}]
            for each in others:
                post(client, "/v1/generate", {"prompt": TEXT, "max_new_tokens": 3, "attention": each})
            with ThreadPoolExecutor(4) as pool:
                found = [
                    pool.submit(post, client, "/v1/generate", {"prompt": ids(500, i), "attention": auto(0.2)})
                    for i in range(3)
                ]
                assert ask(client) == alone
                assert all(each.result() for each in found)
            assert ask(client) == alone

    @pytest.mark.parametrize(("path", "body", "made"), REQUESTS, ids=ROUTES)
    @pytest.mark.parametrize("row", [256, 0, None])
    def test_a_plan_from_an_answer_run_again_gives_the_same(
        self, path: str, body: dict[str, Any], made: str, row: int | None
    ) -> None:
        model = can_encode()
        model.guard = None if row is None else repairing(row)
        with planning(model) as client:
            first = post(client, path, {**body, "attention": auto()})
            plan = first["attention"]["plan"]
            assert plan == [entry(0, WINDOW, row), entry(1, EXACT)]
            again = post(client, path, {**body, "attention": {"backend": "auto", "plan": plan}})
            assert again[made] == first[made]
            told = again["attention"]
            assert told["plan"] == plan and told["plan_reason"] == "replayed" and told["budget"] is None
            assert told["used"] == "auto" and told["params"] == {"max_error": None}

    def test_a_repair_changes_what_is_read(self) -> None:
        """Or the test above would say nothing."""
        answers = []
        for guard in (None, repairing(256)):
            with planning(decoder(guard=guard)) as client:
                body = {"prompt": ids(400), "max_new_tokens": 8, "attention": auto()}
                answers.append(post(client, "/v1/generate", body)["choices"][0]["text"])
        assert answers[0] != answers[1]

    def test_a_plan_that_is_exact_shares_the_cache_with_exact_and_a_guarded_one_with_nobody(self) -> None:
        body = {"prompt": ids(300), "max_new_tokens": 2}
        with planning(decoder()) as client:

            def cached(attention: Any) -> int:
                answer = post(client, "/v1/generate", {**body, "attention": attention})
                return int(answer["usage"]["cached_tokens"])

            assert cached("exact") == 0 and cached(auto(0.01)) == 256 == cached("exact")
            assert [cached(auto()) for _ in range(3)] == [0, 0, 0]
            given = {"backend": "auto", "plan": [entry(0, WINDOW), entry(1, EXACT)]}
            assert [cached(given), cached(given), cached(auto())] == [0, 256, 0]
            all_exact = {"backend": "auto", "plan": [entry(0, EXACT), entry(1, EXACT)]}
            assert cached(all_exact) == 256

    def test_the_seed_is_that_of_the_request(self, client: TestClient) -> None:
        spec = parse(auto(seed=3), seed=7)
        assert isinstance(spec, AutoSpec) and spec.seed == 3
        default = parse(auto(), seed=7)
        assert isinstance(default, AutoSpec) and default.seed == 7
        choice = chosen_of(default, PROFILE, 300).choice
        assert isinstance(choice, Planned) and choice.seed == 7
        assert {each.seed for each in choice.layers} == {7}

    def test_scores_never_look_ahead(self) -> None:
        looking = profile([rung("nystrom", {}, 0.05, 0.1), rung(*WINDOW, 0.05, 0.5)], [])
        spec = parse(auto())
        assert isinstance(spec, AutoSpec)
        assert looks_ahead(chosen_of(spec, looking, 300).choice)
        assert not looks_ahead(chosen_of(spec, without_prompt_selection(looking), 300).choice)
        with in_process(decoder()) as client:
            runtime_of(client).profiles.put("dec", looking)
            read = post(client, "/v1/generate", {"prompt": ids(300), "attention": auto()})["attention"]
            scored = post(client, "/v1/score", {"input": ids(300), "attention": auto()})["attention"]
            assert [read["plan"][0]["backend"], scored["plan"][0]["backend"]] == ["nystrom", "window"]
            given = {"backend": "auto", "plan": read["plan"]}
            refused = client.post("/v1/score", json={"input": ids(300), "attention": given}).json()
            assert refused["code"] == "attention_not_supported" and refused["param"] == "attention.plan"
            assert "whole prompt" in refused["detail"]

    def test_prefill_and_decode_can_be_named_apart(self, client: TestClient) -> None:
        decode = {"backend": "window", "params": {"window": 32}}
        body = {"prompt": TEXT, "max_new_tokens": 4, "attention": {"prefill": auto(), "decode": decode}}
        told = post(client, "/v1/generate", body)["attention"]
        assert told["used"] == "auto" and told["plan"] == [entry(0, WINDOW), entry(1, EXACT)]
        assert told["decode"]["used"] == "window" and told["decode"]["params"]["window"] == 32
        assert told["decode"]["plan"] is None and told["decode"]["budget"] is None

    def test_new_tokens_are_read_with_exact(self) -> None:
        seen: list[tuple[int, str]] = []
        model = decoder()
        model.on_step = lambda slices: seen.extend((len(s.token_ids), s.choice.backend) for s in slices)
        with planning(model) as client:
            post(client, "/v1/generate", {"prompt": ids(600), "max_new_tokens": 5, "attention": auto()})
        assert {backend for tokens, backend in seen if tokens > 1} == {"auto"}
        assert [backend for tokens, backend in seen if tokens == 1] == ["exact"] * 4


class TestAnswer:
    @pytest.mark.parametrize("attention", [None, "exact", "window"])
    def test_the_fields_are_null_without_auto(self, client: TestClient, attention: str | None) -> None:
        told = post(client, "/v1/generate", {"prompt": "a", "attention": attention})["attention"]
        for name in ("plan", "plans", "plan_reason", "plan_reasons", "budget"):
            assert told[name] is None

    @pytest.mark.parametrize(
        ("estimate", "row", "within", "outcome"),
        [
            (0.05, None, True, "within"),
            (0.1, None, True, "within"),
            (0.09, 0, True, "repaired"),
            (0.11, 0, False, "violated"),
            (0.11, None, False, "violated"),
            (float("inf"), None, False, "violated"),
        ],
    )
    def test_the_budget_says_what_the_guard_saw_and_metrics_count_it(
        self, estimate: float, row: int | None, within: bool, outcome: str
    ) -> None:
        guard = repairing(1 << 30 if row is None else row, estimate)
        with planning(decoder(guard=guard)) as client:
            told = post(client, "/v1/generate", {"prompt": TEXT, "attention": auto()})["attention"]
            known = estimate if estimate < 1 else None
            repaired = [] if row is None else [0]
            expected = {"estimate": known, "within": within, "rows": 9, "repaired_layers": repaired}
            assert told["budget"] == {"max_error": 0.1, **expected}
            text = client.get("/metrics").text
            for each in ("exact", "within", "repaired", "violated"):
                labels = {"model": "dec", "outcome": each}
                assert sample(text, "longreach_auto_requests_total", **labels) == (each == outcome)
            assert sample(text, "longreach_budget_violations_total", model="dec") == (not within)
            assert sample(text, "longreach_auto_repaired_layers_total", model="dec") == len(repaired)
            assert sample(text, "longreach_auto_error_ratio_count", model="dec") == (known is not None)
            if known is not None:
                ratio = sample(text, "longreach_auto_error_ratio_sum", model="dec")
                assert ratio == pytest.approx(estimate / 0.1)
            for backend in ("window", "exact"):
                labels = {"model": "dec", "backend": backend}
                assert sample(text, "longreach_auto_layers_total", **labels) == 1

    def test_next_to_no_budget_does_not_drown_the_ratio_of_others(self) -> None:
        with planning(decoder(guard=repairing(0, 0.5))) as client:
            runtime_of(client).profiles.put("dec", profile([rung(*WINDOW, 0.0, 0.2)], []))
            post(client, "/v1/generate", {"prompt": TEXT, "attention": auto(1e-300)})
            text = client.get("/metrics").text
        assert sample(text, "longreach_auto_error_ratio_sum", model="dec") == 100

    def test_exact_plans_replays_and_comparisons_are_no_measure_of_budgets(self) -> None:
        with planning(decoder()) as client:
            post(client, "/v1/score", {"input": TEXT, "attention": auto(0.01)})
            given = {"backend": "auto", "plan": [entry(0, WINDOW), entry(1, EXACT)]}
            post(client, "/v1/score", {"input": TEXT, "attention": given})
            post(client, "/v1/compare", {"input": TEXT, "attention": [auto()]})
            text = client.get("/metrics").text
            found = [
                sample(text, "longreach_auto_requests_total", model="dec", outcome=each)
                for each in ("exact", "within", "repaired", "violated")
            ]
            assert found == [1, 0, 0, 0]
            assert sample(text, "longreach_auto_error_ratio_count", model="dec") == 0
            labels = {"model": "dec", "backend": "exact"}
            assert sample(text, "longreach_auto_layers_total", **labels) == 2

    def test_metrics_headers_and_log_say_auto(self, caplog: pytest.LogCaptureFixture) -> None:
        with planning(decoder()) as client, caplog.at_level(logging.INFO, "longreach.access"):
            for budget in (0.1, 0.01):
                body = {"prompt": TEXT, "attention": auto(budget)}
                answer = client.post("/v1/generate", json=body)
                assert answer.headers["x-attention-backend"] == "auto"
            text = client.get("/metrics").text
            labels = {"model": "dec", "operation": "generate", "attention": "auto"}
            assert sample(text, "longreach_requests_total", code="200", **labels) == 2
            for name in ("time_to_first_token_seconds", "attention_density_ratio"):
                count = sample(text, f"longreach_{name}_count", model="dec", attention="auto")
                assert count == 2
        told = [record.fields for record in caplog.records if record.message == "request"]  # type: ignore[attr-defined]
        assert [each["attention"] for each in told if "attention" in each] == ["auto"] * 2

    def test_ordinary_traffic_creates_no_series_that_was_not_there_before(self) -> None:
        from tests.service.test_metrics import scrape, series

        with planning(can_encode()) as client:
            before = series(scrape(client))
            for path, body, _ in REQUESTS:
                post(client, path, {**body, "attention": auto()})
                post(client, path, {**body, "attention": auto(0.01, verify=True)})
                post(client, path, {**body, "attention": auto(0.2, verify=True)})
            post(client, "/v1/compare", {"input": TEXT, "attention": [auto()]})
            assert series(scrape(client)) == before

    def test_the_state_of_a_profile_is_one_of_four(self) -> None:
        metrics = Metrics()
        metrics.add_model(decoder().info, ["exact"])
        metrics.see_profile("dec", "ready")
        text = metrics.render("")[0].decode()
        for state in PROFILE_STATES:
            assert sample(text, "longreach_profile_state", model="dec", state=state) == (state == "ready")

    def test_streams_end_with_the_same_object(self, client: TestClient) -> None:
        body = {"prompt": TEXT, "max_new_tokens": 4, "n": 2, "attention": auto()}
        whole = post(client, "/v1/generate", body)
        streamed = events(client.post("/v1/generate", json={**body, "stream": True}).text)
        name, done = streamed[-1]
        assert name == "done" and done["attention"] == whole["attention"]
        assert done["attention"]["plan"] == [entry(0, WINDOW), entry(1, EXACT)]
        for i in range(2):
            text = "".join(told["text"] for kind, told in streamed if kind == "token" and told["index"] == i)
            assert text == whole["choices"][i]["text"]

    @pytest.mark.parametrize(
        ("path", "asked"),
        [
            ("/v1/completions", {"prompt": [TEXT, "short"]}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": TEXT}]}),
        ],
    )
    def test_openai_streams_carry_it_too(self, client: TestClient, path: str, asked: dict[str, Any]) -> None:
        body = {"model": "dec", "max_tokens": 3, "seed": 1, "attention": auto(), **asked}
        whole = post(client, path, body)["attention"]
        lines = client.post(path, json={**body, "stream": True}).text.split("\n\n")
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        [told] = [chunk["attention"] for chunk in chunks if "attention" in chunk]
        assert told == whole and told["used"] == "auto"
        if path == "/v1/completions":
            assert told["plans"] == [
                [entry(0, WINDOW), entry(1, EXACT)],
                [entry(0, EXACT), entry(1, EXACT)],
            ]
            assert told["plan_reasons"] == ["chosen", "too short"]

    def test_memory_is_that_of_each_inputs_own_choice(self) -> None:
        lengths = [30, 300]
        with planning(can_encode()) as client:
            body = {"input": [ids(n) for n in lengths], "attention": auto(), "pooling": "mean"}
            memory = post(client, "/v1/encode", body)["stats"]["memory"]
            expected = sum(n * BYTES_PER_TOKEN for n in lengths) + 300 * WORKSPACE_PER_TOKEN
            assert memory["estimated_bytes"] == expected
            assert memory["exact_bytes"] == sum(lengths) * BYTES_PER_TOKEN


class TestVerify:
    def test_a_plan_is_measured_as_what_it_is(self, client: TestClient) -> None:
        body = {"prompt": TEXT, "max_new_tokens": 4, "attention": auto(verify=True)}
        told = post(client, "/v1/generate", body)["attention"]
        error = told["measured_error"]
        assert error["estimate"] > 0 and [each["layer"] for each in error["layers"]] == [0, 1]
        assert error["decode"]["estimate"] == 0 and error["decode"]["rows_total"] == 3 * 2
        assert told["budget"]["estimate"] == 0.05

    def test_nothing_is_measured_of_an_exact_plan_and_the_error_is_none(self, client: TestClient) -> None:
        models = runtime_of(client).models
        model = models["dec"]
        assert isinstance(model, FakeModel)
        made = len(model.meters)
        told = post(client, "/v1/score", {"input": TEXT, "attention": auto(0.01, verify=True)})["attention"]
        assert told["measured_error"]["estimate"] == 0 and told["measured_error"]["rows"] == 0
        assert len(model.meters) == made

    def test_rows_of_exact_inputs_count_as_rows_without_error(self) -> None:
        with planning(can_encode()) as client:

            def error(*lengths: int) -> dict[str, Any]:
                body = {"input": [ids(n) for n in lengths], "attention": auto(verify={"layers": [1, 0]})}
                found: dict[str, Any] = post(client, "/v1/encode", body)["attention"]["measured_error"]
                return found

            both, alone, exact = error(30, 300), error(300), error(30)
            assert both["rows_total"] == 2 * 330 and both["rows"] == alone["rows"]
            assert both["estimate"] == alone["estimate"] and exact["estimate"] == 0
            assert [each["rows_total"] for each in both["layers"]] == [330, 330]

    def test_a_share_of_requests_is_measured_unasked(self) -> None:
        with planning(decoder(), verify_fraction=1.0) as client:
            told = post(client, "/v1/generate", {"prompt": TEXT, "attention": auto()})["attention"]
            assert told["measured_error"]["estimate"] > 0 and told["measured_error"]["layers"] is None
            exact = post(client, "/v1/generate", {"prompt": TEXT, "attention": auto(0.01)})["attention"]
            assert exact["measured_error"] is None
            text = client.get("/metrics").text
            labels = {"model": "dec", "attention": "auto"}
            assert sample(text, "longreach_verified_requests_total", cause="sampled", **labels) == 1
            assert sample(text, "longreach_measured_error_count", phase="prefill", **labels) == 1
            assert sample(text, "longreach_measured_error_count", phase="decode", **labels) == 0

    def test_completions_of_mixed_prompts_are_counted_once(self) -> None:
        with planning(decoder(), verify_fraction=1.0) as client:
            body = {"model": "dec", "prompt": ["short", TEXT], "max_tokens": 2, "attention": auto()}
            assert post(client, "/v1/completions", body)["attention"]["measured_error"]["estimate"] > 0
            text = client.get("/metrics").text
            labels = {"model": "dec", "attention": "auto", "phase": "prefill"}
            assert sample(text, "longreach_measured_error_count", **labels) == 1


PLAN = [entry(0, WINDOW), entry(1, EXACT)]


def given(*entries: Any, **more: Any) -> dict[str, Any]:
    return {"backend": "auto", "plan": [*entries], **more}


class TestErrors:
    @pytest.mark.parametrize(
        ("attention", "param", "told"),
        [
            ("auto", "attention.max_error", "required"),
            ({"backend": "auto"}, "attention.max_error", "required"),
            ({"backend": "auto", "max_error": None}, "attention.max_error", "required"),
            (auto(0), "attention.max_error", "above 0 and at most 1"),
            (auto(-0.1), "attention.max_error", "above 0 and at most 1"),
            (auto(1.0001), "attention.max_error", "above 0 and at most 1"),
            (auto(float("inf")), "attention.max_error", "above 0 and at most 1"),
            (auto(float("nan")), "attention.max_error", "above 0 and at most 1"),
            ({"backend": "auto", "max_error": True}, "attention.max_error", "a number"),
            ({"backend": "auto", "max_error": "0.1"}, "attention.max_error", "a number"),
            (auto(params={}), "attention.params", "no params"),
            (
                {"backend": "auto", "params": {"max_error": 0.1}},
                "attention.params",
                "max_error beside backend",
            ),
            ({"backend": "window", "max_error": 0.1}, "attention.max_error", "'auto' alone"),
            ({"backend": "exact", "plan": PLAN}, "attention.plan", "'auto' alone"),
            (auto(plan=PLAN), "attention.plan", "beside max_error"),
            (given(), "attention.plan", "list"),
            ({"backend": "auto", "plan": {"layer": 0}}, "attention.plan", "list"),
            (given(PLAN[0]), "attention.plan", "0 to 1"),
            (given(*PLAN, entry(2, EXACT)), "attention.plan", "0 to 2"),
            (given(*reversed(PLAN)), "attention.plan[1].layer", "ascend"),
            (given(PLAN[0], {"layer": 1}), "attention.plan[1]", "backend"),
            (given({**PLAN[0], "layer": True}, PLAN[1]), "attention.plan[0].layer", "whole number"),
            (given({**PLAN[0], "exact_from": -1}, PLAN[1]), "attention.plan[0].exact_from", "row"),
            (given({**PLAN[0], "exact_from": 1 << 40}, PLAN[1]), "attention.plan[0].exact_from", "most"),
            (given(entry(0, ("window", {"window": 0})), PLAN[1]), "attention.plan[0].params.window", "great"),
            (
                given(entry(0, ("window", {"width": 9})), PLAN[1]),
                "attention.plan[0].params.width",
                "params of window",
            ),
            (given(*([PLAN[0]] * 2000)), "attention.plan", "1,024"),
            (given(PLAN[0], {**PLAN[1], "layer": 10**400}), "attention.plan[1].layer", "most"),
            (auto(budget=1), "attention.budget", "max_error"),
            (auto(seed=-1), "attention.seed", "between"),
            (auto(fallback="none"), "attention.fallback", "exact"),
            (auto(verify={"layers": [7]}), "attention.verify.layers", "applies"),
        ],
    )
    def test_what_cannot_be_planned_names_its_field_the_limit_and_the_way_out(
        self, client: TestClient, attention: Any, param: str, told: str
    ) -> None:
        content = json.dumps({"prompt": "a", "attention": attention})
        headers = {"content-type": "application/json"}
        answer = client.post("/v1/generate", content=content, headers=headers)
        body = answer.json()
        assert answer.status_code == 400 and body["code"] == "invalid_attention_params", answer.text
        assert body["param"] == param and told in body["detail"] and "(" in body["detail"]

    @pytest.mark.parametrize(
        ("path", "body", "param", "told"),
        [
            (
                "/v1/generate",
                {"prompt": "a", "attention": {"decode": auto()}},
                "attention.decode",
                "new tokens",
            ),
            (
                "/v1/estimate",
                {"model": "dec", "input": "a", "attention": ["exact", {"decode": auto()}]},
                "attention[1].decode",
                "new tokens",
            ),
            ("/v1/diagnose", {"model": "dec", "input": "a", "support": auto()}, "support", "support"),
            (
                "/v1/generate",
                {"prompt": "a", "attention": given(entry(0, ("canary", {})), PLAN[1])},
                "attention.plan[0].backend",
                "known",
            ),
            (
                "/v1/encode",
                {"model": "enc", "input": "a", "attention": given(entry(0, ("strided", {})), PLAN[1])},
                "attention.plan",
                "this fake encoder does not do strided",
            ),
        ],
    )
    def test_where_it_cannot_stand(
        self, path: str, body: dict[str, Any], param: str, told: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("service.routes.diagnose.check_model", lambda model: None)
        with planning(encoder(), decoder()) as client:
            answer = client.post(path, json=body)
        assert answer.status_code == 400 and answer.json()["code"] == "attention_not_supported", answer.text
        assert answer.json()["param"] == param and told in answer.json()["detail"]

    def test_what_was_sent_is_not_repeated(self, client: TestClient) -> None:
        secret = "a secret"
        sent: list[Any] = [
            given(entry(0, (secret, {})), PLAN[1]),
            given({**PLAN[0], "layer": secret}, PLAN[1]),
            given({**PLAN[0], "params": secret}, PLAN[1]),
            given({**PLAN[0], "exact_from": secret}, PLAN[1]),
            given({**PLAN[0], "params": {"window": secret}}, PLAN[1]),
            {"backend": "auto", "plan": secret},
            {"backend": "auto", "max_error": secret},
        ]
        for attention in sent:
            answer = client.post("/v1/generate", json={"prompt": "a", "attention": attention})
            assert answer.status_code == 400 and secret not in answer.text

    def test_a_model_without_layers_to_plan_is_refused(self) -> None:
        with in_process(decoder(applied_layers=())) as client:
            for attention in (auto(), given(*PLAN)):
                body = {"prompt": "a", "attention": attention}
                answer = client.post("/v1/generate", json=body)
                assert answer.status_code == 400 and answer.json()["code"] == "attention_not_supported"
                assert answer.json()["param"] == "attention" and "'exact'" in answer.json()["detail"]
            metrics = client.get("/metrics").text
            assert 'attention="auto"' not in metrics

    @pytest.mark.parametrize(
        ("path", "text", "attention", "param"),
        [
            ("/v1/generate", "prompt", auto(), "attention.backend"),
            ("/v1/generate", "prompt", {"prefill": auto()}, "attention.prefill.backend"),
            ("/v1/estimate", "input", ["exact", auto()], "attention[1].backend"),
        ],
    )
    def test_a_model_without_a_profile_is_told_at_the_field_that_needs_it(
        self, path: str, text: str, attention: Any, param: str
    ) -> None:
        with in_process(decoder()) as client:
            answer = client.post(path, json={"model": "dec", text: "a", "attention": attention})
            assert answer.status_code == 400 and answer.json()["code"] == "attention_not_supported"
            assert answer.json()["param"] == param
            body = {"model": "dec", "input": "a", "attention": ["window", auto()]}
            _, found = post(client, "/v1/compare", body)["results"]
            assert found["error"]["param"] == "attention[1].backend"

    def test_a_model_that_cannot_run_its_plan_says_why(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = decoder()
        monkeypatch.setattr(
            type(model), "unsupported", lambda self, choice: ["no output projection"] * is_guarded(choice)
        )
        with planning(model) as client:
            answer = client.post("/v1/generate", json={"prompt": TEXT, "attention": auto()})
            assert answer.status_code == 400 and answer.json()["code"] == "attention_not_supported"
            assert "no output projection" in answer.json()["detail"]
            post(client, "/v1/generate", {"prompt": TEXT, "attention": auto(0.01)})

    def test_a_fallback_changes_nothing(self, client: TestClient) -> None:
        body = {"prompt": TEXT, "attention": auto(fallback="exact")}
        told = post(client, "/v1/generate", body)["attention"]
        assert told["fallback_reason"] is None and told["plan"] == PLAN

    def test_its_choice_cannot_be_read_before_it_is_resolved(self) -> None:
        model = decoder()
        spec = parse(auto())
        chosen = choose(spec, model)
        assert isinstance(chosen, ChosenAuto)
        for read in (lambda: chosen.of(0), lambda: chosen.resolved, lambda: chosen.plans):
            with pytest.raises(RuntimeError, match="before its plan was made"):
                read()
        with pytest.raises(AttributeError):
            chosen.choice  # type: ignore[attr-defined]  # noqa: B018
        attended = Attended.one(chosen)
        assert attended.label == "auto"
        pair = parse_pair(auto(verify=True))
        assert not pair.split and pair.decode.name == "exact" and pair.decode.verify is not None


class TestProfile:
    """What a request waits for where the model has no profile yet."""

    @staticmethod
    def hold(runtime: Runtime) -> None:
        """Measuring begins, and does not end."""

        async def look(model: FakeModel, of_it: Any) -> None:
            of_it.measuring, of_it.progress = True, "4,096 tokens, 1 of 2"
            await asyncio.sleep(3600)

        runtime.profiles._look = look  # type: ignore[method-assign,assignment]

    @pytest.fixture
    def held(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
        monkeypatch.setattr("service.profiles.can_calibrate", lambda model: True)
        with serving(decoder(), max_queue_requests=3) as served:
            self.hold(served.runtime)
            yield served

    def test_its_deadline_is_the_requests_own(self, held: Any) -> None:
        answer = held.post("/v1/generate", {"prompt": TEXT, "attention": auto(), "timeout_ms": 300})
        assert answer.status_code == 504 and answer.json()["code"] == "deadline_exceeded"
        detail = answer.json()["detail"]
        assert "easuring goes on" in detail and "1 of 2" in detail and "timeout_ms" in detail
        assert held.runtime.profiles.state("dec")["state"] == "measuring"
        assert held.post("/v1/generate", {"prompt": TEXT, "attention": "window"}).status_code == 200

    def test_who_leaves_waits_no_longer(self, held: Any) -> None:
        import httpx2

        body = {"prompt": TEXT, "attention": auto()}
        with pytest.raises(httpx2.TimeoutException):
            httpx2.post(held.url + "/v1/generate", json=body, timeout=0.4)

        def gone() -> bool:
            text = held.get("/metrics").text
            labels = {"operation": "generate", "stage": "queued"}
            return sample(text, "longreach_requests_cancelled_total", **labels) == 1

        wait_for(gone)
        assert held.runtime.profiles.state("dec")["state"] == "measuring"

    def test_those_that_wait_fill_the_queue_as_others_do(self, held: Any) -> None:
        body = {"prompt": TEXT, "attention": auto(), "timeout_ms": 1500}
        with ThreadPoolExecutor(8) as pool:
            found = [pool.submit(held.post, "/v1/generate", body) for _ in range(6)]
            codes = sorted(each.result().status_code for each in found)
        assert codes == [429] * 3 + [504] * 3

    def test_each_who_waits_is_told_a_failure_at_a_field_of_its_own(self, held: Any) -> None:
        profiles = held.runtime.profiles
        asked: list[Any] = [auto(), {"prefill": auto()}]
        go = threading.Event()

        async def look(model: FakeModel, of_it: Any) -> None:
            of_it.measuring = True
            await asyncio.to_thread(go.wait)
            raise ModelError("no text")

        profiles._look = look
        with ThreadPoolExecutor(2) as pool:
            found = [
                pool.submit(held.post, "/v1/generate", {"prompt": TEXT, "attention": each}) for each in asked
            ]
            wait_for(lambda: sum(auto_module._waiting.get(held.runtime, {}).values()) == 2)
            go.set()
            told = [each.result().json()["param"] for each in found]
        assert told == ["attention.backend", "attention.prefill.backend"]

    def test_a_model_that_was_unloaded_meanwhile_is_at_fault_itself(self, held: Any) -> None:
        async def gone(*given: Any) -> None:
            raise ApiError("model_not_found", "The model was unloaded meanwhile.", param="model")

        held.runtime.profiles.of = gone
        answer = held.post("/v1/generate", {"prompt": TEXT, "attention": auto()})
        assert (answer.status_code, answer.json()["param"]) == (404, "model")

    def test_what_was_given_up_does_not_end_what_began_after_it(self, held: Any) -> None:
        profiles, ends = held.runtime.profiles, threading.Event()
        begun: list[Any] = []

        async def look(model: FakeModel, of_it: Any) -> None:
            begun.append(of_it)
            of_it.measuring = True
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                await asyncio.to_thread(ends.wait)
                raise ModelError("too late") from None

        profiles._look = look
        body = {"prompt": TEXT, "attention": auto(), "timeout_ms": 500}
        assert held.post("/v1/generate", body).status_code == 504
        begun[0].task.get_loop().call_soon_threadsafe(profiles.give_up, "dec")
        wait_for(lambda: profiles.state("dec")["state"] == "none")
        assert held.post("/v1/generate", body).status_code == 504
        ends.set()
        wait_for(begun[0].task.done)
        assert len(begun) == 2 and profiles.state("dec")["state"] == "measuring"

    def test_a_replay_needs_no_profile(self, held: Any) -> None:
        answer = held.post("/v1/generate", {"prompt": TEXT, "attention": given(*PLAN)})
        assert answer.status_code == 200 and answer.json()["attention"]["plan"] == PLAN


class TestEstimate:
    def test_it_plans_as_a_request_would_and_runs_nothing(self) -> None:
        model = decoder()
        with planning(model) as client:
            asked = ["exact", auto(), auto(0.01), {"prefill": auto(0.2), "decode": "window"}, given(*PLAN)]
            body = {"input": ids(300), "max_new_tokens": 8, "attention": asked}
            exact, chosen, none, pair, again = post(client, "/v1/estimate", body)["data"]
            assert model.steps == []
        told = chosen["attention"]
        assert told["used"] == "auto" and told["params"] == {"max_error": 0.1} and told["plan"] == PLAN
        assert told["plan_reason"] == "chosen" and exact["attention"]["plan"] is None
        assert chosen["estimated_bytes"] == 308 * BYTES_PER_TOKEN + 300 * WORKSPACE_PER_TOKEN
        assert none["attention"]["plan_reason"] == "all layers need exact"
        assert none["estimated_bytes"] == exact["estimated_bytes"] == 308 * BYTES_PER_TOKEN
        assert none["prefill_ms"] == exact["prefill_ms"]
        assert pair["attention"]["decode"]["used"] == "window"
        assert [each["backend"] for each in pair["attention"]["plan"]] == ["window", "sinks"]
        assert again["attention"]["plan_reason"] == "replayed"

    def test_a_guarded_prompt_is_never_found_in_the_cache(self) -> None:
        with planning(decoder()) as client:
            for attention in (given(*PLAN), auto(0.01)):
                post(client, "/v1/generate", {"prompt": ids(300), "attention": attention})
            body = {"input": ids(300), "attention": [given(*PLAN), auto(0.01), auto()]}
            found = post(client, "/v1/estimate", body)["data"]
            assert [each["cached_tokens"] for each in found] == [256, 256, 0]


class TestCompare:
    def test_auto_is_planned_with_the_documents_length(self) -> None:
        with planning(decoder()) as client:
            asked = [auto(), auto(0.01), "window", given(*PLAN)]
            answer = post(client, "/v1/compare", {"input": ids(300), "attention": asked})
        chosen, none, window, again = answer["results"]
        assert chosen["requested"] == "auto" and chosen["attention"]["plan"] == PLAN
        assert (
            chosen["attention"]["budget"]["within"] and chosen["attention"]["measured_error"]["estimate"] > 0
        )
        assert chosen["kl"] > 0 and chosen["perplexity"] is not None and chosen["prefill_ms"] is not None
        assert none["kl"] == 0 and none["attention"]["used"] == "auto"
        assert none["attention"]["plan_reason"] == "all layers need exact"
        assert none["attention"]["params"] == {"max_error": 0.01}
        assert none["attention"]["budget"]["within"] and none["attention"]["budget"]["estimate"] == 0
        assert window["attention"]["plan"] is None and answer["reference"]["attention"]["plan"] is None
        assert again["kl"] == chosen["kl"] and again["attention"]["budget"] is None

    def test_a_plan_that_does_not_fit_the_model_runs_nothing(self) -> None:
        model = decoder()
        with planning(model) as client:
            body = {"input": TEXT, "attention": ["window", given(PLAN[0])]}
            answer = client.post("/v1/compare", json=body)
            assert answer.status_code == 400 and answer.json()["param"] == "attention[1].plan"
            assert model.steps == []

    def test_encoders_too(self) -> None:
        with planning(encoder()) as client:
            answer = post(client, "/v1/compare", {"input": ids(300), "attention": [auto(), auto(0.01)]})
        assert [each["attention"]["used"] for each in answer["results"]] == ["auto", "auto"]
        assert answer["results"][0]["cosine"] < 1 and answer["results"][1]["cosine"] == pytest.approx(1)

    def test_the_command_takes_it_and_tells_the_plan(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "text.txt"
        file.write_text(TEXT)
        spec = '{"backend":"auto","max_error":0.1}'
        with serving(decoder()) as served:
            served.runtime.profiles.put("dec", PROFILE)
            command = ["compare", str(file), "--url", served.url, "--attention", spec, "auto:max_error=0.01"]
            with pytest.raises(SystemExit, match="^0$"):
                main(command)
        told = capsys.readouterr().out
        assert f"{spec}: chosen: 1 x window window=8, 1 x exact; estimated error 0.0500, within 0.1" in told
        assert "auto:max_error=0.01: all layers need exact: 2 x exact" in told
        assert parse_spec("auto:max_error=0.01") == {"backend": "auto", "max_error": 0.01}


class TestSchema:
    def test_auto_is_documented_where_it_may_stand(self, client: TestClient) -> None:
        schemas = client.get("/openapi.json").json()["components"]["schemas"]
        fields = schemas["AutoAttention"]["properties"]
        assert set(fields) == {"backend", "max_error", "plan", "fallback", "seed", "verify"}
        assert fields["max_error"]["exclusiveMinimum"] == 0 and fields["max_error"]["maximum"] == 1
        assert "default" not in fields["max_error"] and "default" not in fields["plan"]
        pair = schemas["PrefillDecodeAttention"]["properties"]
        assert "AutoAttention" in json.dumps(pair["prefill"])
        assert "AutoAttention" not in json.dumps(pair["decode"])
        assert "AutoAttention" not in json.dumps(schemas["DiagnoseRequest"])

    @pytest.mark.parametrize(
        ("attention", "fits"),
        [
            (auto(), True),
            (auto(1, fallback="exact", seed=3, verify={"rows": "all"}), True),
            (given(*PLAN), True),
            (given({"layer": 0, "backend": "window", "params": {}}), True),
            ("auto", False),
            ({"backend": "auto"}, False),
            (auto(plan=PLAN), False),
            (auto(0), False),
            (auto(params={}), False),
            (given(), False),
            ({"prefill": auto(), "decode": "window"}, True),
            ({"prefill": "window", "decode": auto()}, False),
        ],
    )
    def test_the_schema_allows_what_is_taken_and_nothing_else(
        self, client: TestClient, attention: Any, fits: bool
    ) -> None:
        document = client.get("/openapi.json").json()
        schema = {"$ref": "#/components/schemas/GenerateRequest", "components": document["components"]}
        body = {"prompt": TEXT, "max_new_tokens": 1, "attention": attention}
        assert Draft202012Validator(schema).is_valid(body) == fits
        if fits and attention != given({"layer": 0, "backend": "window", "params": {}}):
            post(client, "/v1/generate", body)

    def test_auto_is_no_backend(self, client: TestClient) -> None:
        data = client.get("/v1/attention/backends").json()["data"]
        assert "auto" not in {each["name"] for each in data}
