"""How wrong was it? What a request may ask, what its answer says, what measuring costs, what is counted."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest
from fastapi.testclient import TestClient

from models.contract import Choice, LayerError, MeasuredError, Verify
from service.attention import Chosen, exact_choice
from service.errors import ApiError
from service.measured import Effort, worst
from service.meters import Sampling, effort_of, rows_share
from service.verify_spec import MAX_LAYERS, MAX_ROWS, MIN_ROWS, parse_verify
from tests.service.conftest import in_process, sample
from tests.service.fake_model import FakeModel, decoder, encoder, params
from tests.service.test_answers import events, post

ERROR = {
    "estimate",
    "approx_upper_95",
    "row_bound",
    "rows",
    "rows_total",
    "cost_ms",
    "layers",
    "decode",
}
LAYER = {
    "layer",
    "estimate",
    "approx_upper_95",
    "row_bound",
    "rows",
    "rows_total",
    "head_shares",
    "of_residual",
}


def window(**verify: Any) -> dict[str, Any]:
    return {"backend": "window", "params": {"window": 8}, "verify": verify or True}


@pytest.mark.parametrize(
    ("raw", "meant"),
    [
        (None, None),
        (False, None),
        (True, Verify(seed=7)),
        ({}, Verify(seed=7)),
        ({"rows": MIN_ROWS}, Verify(rows=MIN_ROWS, seed=7)),
        ({"rows": MAX_ROWS, "layers": "all"}, Verify(rows=MAX_ROWS, seed=7)),
        ({"rows": "all", "layers": [1, 0]}, Verify(rows="all", layers=(1, 0), seed=7)),
    ],
)
def test_what_may_be_asked_is_understood(raw: object, meant: Verify | None) -> None:
    assert parse_verify(raw, "attention.verify", 7) == meant


@pytest.mark.parametrize(
    ("raw", "param", "limits", "said"),
    [
        (1, "verify", {}, "true, or an object"),
        ("all", "verify", {}, "rows, layers"),
        ([], "verify", {}, "true, or an object"),
        ({"row": 64}, "verify", {}, "'row' that is not known"),
        ({"rows": MIN_ROWS - 1}, "verify.rows", {"ge": MIN_ROWS, "le": MAX_ROWS}, "16 to 65,536, or 'all'"),
        ({"rows": MAX_ROWS + 1}, "verify.rows", {"ge": MIN_ROWS, "le": MAX_ROWS}, "fewer, or 'all'"),
        ({"rows": True}, "verify.rows", {"ge": MIN_ROWS, "le": MAX_ROWS}, "16 to 65,536, or 'all'"),
        ({"rows": 64.0}, "verify.rows", {"ge": MIN_ROWS, "le": MAX_ROWS}, "16 to 65,536, or 'all'"),
        ({"rows": "every"}, "verify.rows", {"ge": MIN_ROWS, "le": MAX_ROWS}, "16 to 65,536, or 'all'"),
        (
            {"layers": []},
            "verify.layers",
            {"min_length": 1, "max_length": MAX_LAYERS},
            "leave it out for all",
        ),
        ({"layers": 0}, "verify.layers", {"min_length": 1, "max_length": MAX_LAYERS}, "leave it out for all"),
        ({"layers": [0, -1]}, "verify.layers[1]", {"ge": 0}, "from 0 on"),
        ({"layers": [True]}, "verify.layers[0]", {"ge": 0}, "from 0 on"),
        ({"layers": [1, 1]}, "verify.layers", {}, "twice"),
        (
            {"layers": list(range(MAX_LAYERS + 1))},
            "verify.layers",
            {"min_length": 1, "max_length": MAX_LAYERS},
            "1 to 1,024",
        ),
    ],
)
def test_what_may_not_is_refused_with_field_limit_and_way_out(
    raw: object, param: str, limits: dict[str, int], said: str
) -> None:
    with pytest.raises(ApiError) as caught:
        parse_verify(raw, "verify", 0)
    error = caught.value
    assert (error.code, error.param, error.limits) == ("invalid_attention_params", param, limits)
    assert error.detail.startswith(f"{param}: ") and said in error.detail


def test_layers_that_are_not_the_choices_are_refused_by_name() -> None:
    with in_process(decoder(applied_layers=(0, 1, 2, 5), num_layers=6)) as client:
        body = {"prompt": "hello", "attention": {"prefill": window(), "decode": window(layers=[5, 3])}}
        answer = client.post("/v1/generate", json=body)
        assert answer.status_code == 400
        told = answer.json()
        assert told["code"] == "invalid_attention_params"
        assert told["param"] == "attention.decode.verify.layers"
        assert told["limits"] == {"applied_layers": [0, 1, 2, 5]}
        assert "3 is no layer of model 'dec'" in told["detail"] and "0 to 2, 5" in told["detail"]


def test_a_model_that_cannot_be_measured_says_so_instead_of_guessing() -> None:
    model = decoder()

    def refuse(*arguments: object, **more: object) -> None:
        raise ValueError("its output projection is not known")

    model.meter = refuse  # type: ignore[method-assign, assignment]
    with in_process(model, verify_fraction=1) as client:
        answer = client.post("/v1/score", json={"input": "hello", "attention": window()})
        assert answer.status_code == 400 and answer.json()["param"] == "attention.verify"
        assert "output projection is not known. Leave verify out" in answer.json()["detail"]
        unasked = post(client, "/v1/score", {"input": "hello", "attention": "window"})
        assert unasked["attention"]["measured_error"] is None


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/encode", {"model": "enc", "input": "a" * 500}),
        ("/v1/embeddings", {"model": "enc", "input": "a" * 500}),
        ("/v1/score", {"input": "a" * 500}),
        ("/v1/generate", {"prompt": "a" * 500, "max_new_tokens": 1}),
        ("/v1/completions", {"model": "dec", "prompt": "a" * 500, "max_tokens": 1}),
        (
            "/v1/chat/completions",
            {"model": "dec", "messages": [{"role": "user", "content": "a" * 500}], "max_tokens": 1},
        ),
    ],
)
def test_every_route_that_computes_tells_the_error(
    client: TestClient, path: str, body: dict[str, Any]
) -> None:
    body = {**body, "cache_salt": path[-20:]}
    attention = post(client, path, {**body, "attention": window()})["attention"]
    error = attention["measured_error"]
    assert set(error) == ERROR and error["decode"] is None
    assert [layer["layer"] for layer in error["layers"]] == attention["applied_layers"]
    for layer in error["layers"]:
        assert set(layer) == LAYER and sum(layer["head_shares"]) == pytest.approx(1)
        assert 59 <= layer["rows"] < layer["rows_total"]
    for name in ("estimate", "approx_upper_95", "row_bound"):
        assert error[name] == max(layer[name] for layer in error["layers"]) > 0
    assert error["rows"] == sum(layer["rows"] for layer in error["layers"])
    assert error["cost_ms"] > 0
    assert post(client, path, {**body, "attention": "window"})["attention"]["measured_error"] is None


def test_rows_layers_and_seed_reach_the_meter() -> None:
    model = decoder()
    spec = {**window(rows="all", layers=[1]), "seed": 42}
    with in_process(model) as client:
        error = post(client, "/v1/score", {"input": "a" * 99, "attention": spec})["attention"][
            "measured_error"
        ]
        inherits = {"prompt": "a", "attention": window(rows=16), "seed": 9, "max_new_tokens": 1}
        post(client, "/v1/generate", inherits)
    assert model.meters[0].verify == Verify(rows="all", layers=(1,), seed=42)
    assert model.meters[-1].verify == Verify(rows=16, layers=None, seed=9)
    assert [layer["layer"] for layer in error["layers"]] == [1]
    assert error["rows"] == error["rows_total"] == 99


def test_an_exact_attention_is_told_as_not_wrong_and_nobody_looks() -> None:
    model = decoder()
    spec = {"backend": "exact", "verify": True}
    with in_process(model) as client:
        error = post(client, "/v1/score", {"input": "a" * 99, "attention": spec})["attention"][
            "measured_error"
        ]
        body = {
            "prompt": "a" * 600,
            "max_new_tokens": 5,
            "n": 2,
            "attention": {**spec, "verify": {"layers": [1]}},
        }
        post(client, "/v1/generate", body)
        told = post(client, "/v1/generate", body)
        refused = client.post("/v1/score", json={"input": "a", "attention": window(layers=[2])})
    assert (error["estimate"], error["approx_upper_95"], error["row_bound"]) == (0, 0, 0)
    assert error["rows"] == 0 == error["cost_ms"] and error["rows_total"] == 2 * 99
    assert [(layer["layer"], layer["rows"], layer["rows_total"]) for layer in error["layers"]] == [
        (0, 0, 99),
        (1, 0, 99),
    ]
    error = told["attention"]["measured_error"]
    assert error["rows_total"] == 601 - told["usage"]["cached_tokens"] < 601
    assert error["decode"]["rows_total"] == 2 * 4 and error["decode"]["layers"][0]["layer"] == 1
    assert refused.status_code == 400 and refused.json()["param"] == "attention.verify.layers"
    assert model.meters == []


def test_a_permitted_fallback_is_measured_as_what_ran(client: TestClient) -> None:
    spec = {"backend": "strided", "fallback": "exact", "verify": True}
    attention = post(client, "/v1/encode", {"input": "a" * 99, "attention": spec})["attention"]
    assert attention["used"] == "exact" and attention["fallback_reason"]
    assert attention["measured_error"]["estimate"] == 0 == attention["measured_error"]["rows"]


def test_new_tokens_are_measured_apart_from_the_prompt(client: TestClient) -> None:
    body = {"prompt": "a" * 90, "max_new_tokens": 40, "attention": window()}
    attention = post(client, "/v1/generate", body)["attention"]
    error = attention["measured_error"]
    assert attention["decode"] is None
    assert error["rows_total"] == 2 * 91 and error["decode"]["rows_total"] == 2 * 39
    assert error["decode"]["rows"] == 2 * sum(row % 16 == 0 for row in range(91, 130))
    assert error["decode"]["row_bound"] is None and error["decode"]["decode"] is None


def test_what_was_chosen_apart_is_told_apart(client: TestClient) -> None:
    body = {"prompt": "a" * 90, "max_new_tokens": 40}
    pair = {"prefill": window(), "decode": {"backend": "sinks", "verify": {"rows": "all", "layers": [0]}}}
    attention = post(client, "/v1/generate", {**body, "attention": pair})["attention"]
    assert attention["measured_error"]["decode"] is None
    assert len(attention["measured_error"]["layers"]) == 2
    decoded = attention["decode"]["measured_error"]
    assert decoded["rows"] == decoded["rows_total"] == 39 and len(decoded["layers"]) == 1
    half = {"prefill": "window", "decode": pair["decode"]}
    attention = post(client, "/v1/generate", {**body, "attention": half})["attention"]
    assert attention["measured_error"] is None and attention["decode"]["measured_error"] == {
        **decoded,
        "cost_ms": attention["decode"]["measured_error"]["cost_ms"],
    }


def test_choices_of_one_prompt_measure_it_once_and_their_own_tokens_each() -> None:
    model = decoder()
    body = {"prompt": "a" * 90, "max_new_tokens": 20, "n": 3, "temperature": 1, "attention": window()}
    with in_process(model) as client:
        error = post(client, "/v1/generate", body)["attention"]["measured_error"]
    assert sorted(meter.decode for meter in model.meters) == [False, True, True, True]
    assert error["rows_total"] == 2 * 91 and error["decode"]["rows_total"] == 3 * 2 * 19


def test_a_batch_is_as_wrong_as_its_worst_input_and_counts_all_rows() -> None:
    model = encoder()
    with in_process(model) as client:
        body = {"input": ["a" * 30, "b" * 400], "attention": window()}
        error = post(client, "/v1/encode", body)["attention"]["measured_error"]
    assert error["rows_total"] == 2 * (32 + 402)
    assert error["rows"] == 2 * sum(meter.rows for meter in model.meters)
    assert error["row_bound"] is None, "of the short input nothing can be said, so not of both"


@pytest.mark.parametrize("chunk", [128, 256, 512])
def test_chunking_does_not_move_a_figure(chunk: int) -> None:
    found = []
    for size in (128, chunk):
        with in_process(prefill_chunk_tokens=size) as client:
            body = {"input": "a" * 700, "attention": window()}
            found.append(post(client, "/v1/score", body)["attention"]["measured_error"])
    assert found[0] == found[1]


def test_a_stream_tells_the_error_in_its_last_event(client: TestClient) -> None:
    body = {"prompt": "b" * 90, "max_new_tokens": 20, "attention": window()}
    plain = post(client, "/v1/generate", body)["attention"]
    name, told = events(client.post("/v1/generate", json={**body, "stream": True}).text)[-1]
    assert name == "done" and told["attention"]["measured_error"] is not None
    # The prefix cache spared the second one some rows, and those it cannot measure.
    assert told["attention"]["measured_error"]["rows_total"] <= plain["measured_error"]["rows_total"]
    openai = {"model": "dec", "prompt": "c" * 90, "max_tokens": 20, "stream": True, "attention": window()}
    lines = [
        json.loads(line.removeprefix("data: "))
        for line in client.post("/v1/completions", json=openai).text.split("\n\n")
        if line.startswith("data: {")
    ]
    (attention,) = [line["attention"] for line in lines if "attention" in line]
    assert set(attention["measured_error"]) == ERROR and attention["measured_error"]["rows_total"] == 2 * 91


def test_rows_from_the_cache_are_not_measured_and_not_claimed() -> None:
    with in_process(decoder()) as client:
        body = {"prompt": "a" * 600, "max_new_tokens": 1, "attention": window()}
        first = post(client, "/v1/generate", body)
        again = post(client, "/v1/generate", body)
    cached = again["usage"]["cached_tokens"]
    assert cached > 0
    assert first["attention"]["measured_error"]["rows_total"] == 2 * 601
    assert again["attention"]["measured_error"]["rows_total"] == 2 * (601 - cached)


def test_a_step_that_failed_and_ran_again_is_measured_once() -> None:
    """The poisoned input fails its step; the other one runs again alone."""
    model = encoder(poison=ord("!"))
    with in_process(model) as client:
        spec = window(rows="all")
        assert (
            client.post("/v1/encode", json={"input": ["fine", "bad!"], "attention": spec}).status_code == 500
        )
        error = post(client, "/v1/encode", {"input": "fine", "attention": spec})["attention"][
            "measured_error"
        ]
    assert error["rows"] == error["rows_total"] == 2 * 6


def test_traffic_is_measured_unasked_where_the_server_says_so() -> None:
    model = decoder()
    with in_process(model, verify_fraction=1.0) as client:
        error = post(client, "/v1/score", {"input": "a" * 300, "attention": "window"})["attention"][
            "measured_error"
        ]
        assert error["estimate"] > 0 and error["layers"] is None
        exact = post(client, "/v1/score", {"input": "a" * 300})["attention"]
        assert exact["measured_error"] is None
        pair = {"prefill": "exact", "decode": "window"}
        body = {"prompt": "a", "max_new_tokens": 40, "attention": pair}
        apart = post(client, "/v1/generate", body)["attention"]
        assert apart["measured_error"] is None and apart["decode"]["measured_error"]["layers"] is None
        text = client.get("/metrics").text
    assert {meter.choice.backend for meter in model.meters} == {"window"}
    assert len({meter.verify.seed for meter in model.meters}) == 2, "each request draws rows of its own"
    counted = {"model": "dec", "attention": "window"}
    assert sample(text, "longreach_verified_requests_total", **counted, cause="sampled") == 2
    assert sample(text, "longreach_verified_requests_total", **counted, cause="asked") == 0


def test_the_share_of_traffic_is_kept_and_does_not_hang_on_what_is_asked() -> None:
    sampling = Sampling(0.25, random.Random(5))
    drawn = [sampling.draw() for _ in range(4000)]
    assert 900 < sum(each is not None for each in drawn) < 1100
    assert all(Sampling(0.0).draw() is None for _ in range(1000))
    assert len({each.seed for each in drawn if each is not None}) > 900


def test_errors_are_counted_by_attention_and_phase() -> None:
    with in_process() as client:
        body = {"prompt": "a" * 600, "max_new_tokens": 40, "attention": window()}
        error = post(client, "/v1/generate", body)["attention"]["measured_error"]
        post(client, "/v1/score", {"input": "a" * 99, "attention": {"backend": "exact", "verify": True}})
        text = client.get("/metrics").text
    for phase, told in (("prefill", error), ("decode", error["decode"])):
        labels = {"model": "dec", "attention": "window", "phase": phase}
        assert sample(text, "longreach_measured_error_count", **labels) == 1
        assert sample(text, "longreach_measured_error_sum", **labels) == pytest.approx(told["estimate"])
        assert sample(text, "longreach_verified_rows_total", **labels) == told["rows"]
        bounds = sample(text, "longreach_measured_row_bound_count", **labels)
        assert bounds == (0 if told["row_bound"] is None else 1)
    labels = {"model": "dec", "attention": "window", "cause": "asked"}
    assert sample(text, "longreach_verified_requests_total", **labels) == 1
    assert (
        sample(text, "longreach_measured_error_count", model="dec", attention="exact", phase="prefill")
        is None
    )


def estimate(client: TestClient, attention: Any) -> list[dict[str, Any]]:
    body = {"model": "dec", "input": "a" * 1000, "max_new_tokens": 20, "attention": attention}
    return list(post(client, "/v1/estimate", body)["data"])


def test_measuring_is_priced_as_the_part_of_exact_that_it_is() -> None:
    """With a model whose costs nobody has measured, so that they follow from operations alone."""
    with in_process(decoder(), step_tokens=2048, prefill_chunk_tokens=2048) as client:
        plain, some, half, everything, exact = estimate(
            client,
            ["window", window(), window(rows="all", layers=[0]), window(rows="all"), "exact"],
        )
        bare, exact_verified = estimate(client, ["exact", {"backend": "exact", "verify": {"rows": "all"}}])
    extra = everything["prefill_ms"] - plain["prefill_ms"]
    assert 0 < some["prefill_ms"] - plain["prefill_ms"] < extra
    assert 0 < half["prefill_ms"] - plain["prefill_ms"] < extra
    assert everything["decode_ms"] > some["decode_ms"] > plain["decode_ms"]
    assert bare["total_ms"] == exact_verified["total_ms"] == exact["total_ms"]
    assert everything["estimated_bytes"] > some["estimated_bytes"] > plain["estimated_bytes"]
    assert everything["exact_bytes"] == exact["exact_bytes"] == exact_verified["estimated_bytes"]


def test_a_verified_request_counts_as_more_work_in_the_queue() -> None:
    model = decoder(flops_per_token=1.0)
    with in_process(model) as client:
        runtime = client.app.state.runtime  # type: ignore[attr-defined]
        priced: dict[str, float] = {}
        admit = runtime.engine.submit

        def submit(job: Any) -> None:
            admit(job)
            entry = job.sequences[0].entry
            priced[job.id] = entry.price(0, entry.tokens)

        runtime.engine.submit, runtime.costs.observe = submit, lambda *seen: None
        found = []
        for attention in ("window", window(), window(rows="all")):
            body = {"input": "a" * 1000, "attention": attention}
            found.append(priced[post(client, "/v1/score", body)["id"]])
    assert found[0] < found[1] < found[2]


@pytest.mark.parametrize("tokens", [1, 60, 128, 1000, 50_000])
def test_the_predicted_share_is_never_more_than_all_and_less_for_longer_documents(tokens: int) -> None:
    model = decoder(applied_layers=(0, 1, 2, 3))
    exact = Chosen("exact", exact_choice(), verify=Verify())

    def effort(verify: Verify | None) -> Effort:
        chosen = Chosen("window", Choice("window", params()), verify=verify)
        return effort_of(model, chosen, chosen, tokens)

    some = effort(Verify())
    assert 0 < some.prefill == some.rows <= 1 and some.decode == 1 / 16
    assert some.rows >= rows_share(Verify(), 2 * tokens)
    assert effort(Verify(layers=(0,))) == Effort(some.rows / 4, 1 / 64, some.rows)
    assert effort(Verify(rows="all")) == Effort(1, 1, 1)
    assert effort(None) == Effort() == effort_of(model, exact, exact, tokens)


def test_steps_that_measure_do_not_teach_the_cost_model() -> None:
    """Their time is not that of the attention which they are named for."""
    with in_process(decoder()) as client:
        runtime = client.app.state.runtime  # type: ignore[attr-defined]
        taught: list[object] = []
        runtime.costs.observe = lambda *seen: taught.append(seen)
        post(client, "/v1/score", {"input": "a" * 99, "attention": window()})
        assert not taught
        post(client, "/v1/score", {"input": "a" * 99, "attention": "window"})
        assert taught


def layer_error(layer: int, estimate: float, upper: float | None, rows: int) -> LayerError:
    return LayerError(layer, estimate, upper, None, rows, 100, (1.0,), estimate)


class Said:
    """A meter that says what it is told."""

    def __init__(self, *layers: LayerError) -> None:
        self._layers = layers

    def measured(self) -> MeasuredError | None:
        if not self._layers:
            return None
        estimate = max(layer.estimate for layer in self._layers)
        return MeasuredError(estimate, estimate, None, 1, 100, 2.0, self._layers)


def test_the_worst_of_several_is_taken_layer_by_layer() -> None:
    first = Said(layer_error(0, 0.1, 0.2, 10), layer_error(3, 0.5, None, 10))
    second = Said(layer_error(0, 0.3, 0.4, 20), layer_error(3, 0.2, 0.9, 20))
    found = worst([first, None, Said(), second])
    assert found is not None
    assert (found.estimate, found.approx_upper_95, found.row_bound, found.cost_ms) == (0.5, 0.5, None, 4)
    assert [
        (one.layer, one.estimate, one.approx_upper_95, one.rows, one.rows_total) for one in found.layers
    ] == [
        (0, 0.3, 0.4, 30, 200),
        (3, 0.5, None, 30, 200),
    ]
    assert worst([None, Said()]) is None


def test_what_is_no_number_is_told_as_null_and_kept_out_of_the_metrics() -> None:
    """As where the outputs themselves are not finite, or exact's are all 0."""
    model = decoder()
    layers = (layer_error(0, math.inf, math.nan, 60), layer_error(1, 0.1, 0.2, 60))
    meter = Said(*layers)
    with in_process(model) as client:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                type(model.meter(Verify(), exact_choice(), 1)), "measured", lambda self: meter.measured()
            )
            body = {"model": "dec", "prompt": "abc", "max_tokens": 1, "attention": window()}
            told = post(client, "/v1/completions", body)["attention"]["measured_error"]
            streamed = client.post("/v1/completions", json={**body, "stream": True}).text
        text = client.get("/metrics").text
    assert told["estimate"] is None and [each["estimate"] for each in told["layers"]] == [None, 0.1]
    assert told["layers"][0]["approx_upper_95"] is None
    assert '"estimate": null' in streamed and streamed.rstrip().endswith("[DONE]")
    labels = {"model": "dec", "attention": "window", "phase": "prefill"}
    assert sample(text, "longreach_measured_error_count", **labels) == 0
    assert (
        sample(text, "longreach_verified_requests_total", model="dec", attention="window", cause="asked") == 2
    )


def test_models_are_left_without_meters_where_nobody_asks() -> None:
    model: FakeModel = decoder()
    with in_process(model) as client:
        post(client, "/v1/generate", {"prompt": "a" * 90, "attention": "window"})
    assert model.meters == []
