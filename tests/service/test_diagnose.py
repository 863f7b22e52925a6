"""POST /v1/diagnose over a tiny network: through the engine, with the limits told, and without stalling
others."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient

from models.runner import Model
from models.tokenizer import load_tokenizer
from service.app import create_app
from service.cli import main
from service.cli_diagnose import told
from tests.models import tiny
from tests.service.conftest import make_settings, sample, wait_for
from tests.service.fake_model import decoder

TEXT = "call me ishmael. some years ago, never mind how long precisely. " * 2


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Model:
    directory = tmp_path_factory.mktemp("tokenizer")
    tiny.tokenizer_files(directory)
    served = tiny.serve(tiny.network(lambda: tiny.llama(max_position_embeddings=8192)), max_tokens=8192)
    info = replace(served.info, name="net", tasks=("generate", "score"))
    return Model(served._network, info, load_tokenizer(directory))


@pytest.fixture(scope="module")
def http(network: Model) -> Iterator[TestClient]:
    app = create_app(make_settings(short_ms=1, step_ms=1), {"net": network, "fake": decoder(name="fake")})
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def ask(http: TestClient, **more: Any) -> httpx2.Response:
    body = {"model": "net", "input": TEXT, "budget": 16, "arm_tokens": 16, **more}
    response: httpx2.Response = http.post("/v1/diagnose", json=body)
    return response


def test_every_layer_and_head_is_told_with_a_spec_that_can_be_sent(http: TestClient) -> None:
    answer = ask(http).json()
    assert answer["model"] == "net" and answer["tokens"] == answer["usage"]["prompt_tokens"] > 100
    assert [layer["layer"] for layer in answer["layers"]] == [0, 1, 2]
    assert all(len(layer["heads"]) == 6 for layer in answer["layers"])
    assert len(answer["rows"]) == 64
    assert len(answer["rank_collapse"]["residuals"]) == 4
    assert answer["asked"]["support"] == {
        "requested": "sinks",
        "used": "sinks",
        "params": {"sinks": 4, "window": 16},
        "fallback_reason": None,
    }
    specs = [answer["recommended"], *(h["recommended"] for layer in answer["layers"] for h in layer["heads"])]
    for spec in {json.dumps(spec, sort_keys=True) for spec in specs}:
        again = http.post("/v1/score", json={"model": "net", "input": TEXT, "attention": json.loads(spec)})
        assert again.status_code == 200, again.text
    assert answer["stats"]["batch_size"] == 1


def test_the_same_question_has_the_same_answer(http: TestClient) -> None:
    first, second = (ask(http, include_stats=False).json() for _ in range(2))
    assert "stats" not in first
    assert {**first, "id": ""} == {**second, "id": ""}
    assert ask(http, seed=1).json()["rows"] != first["rows"]


def test_token_ids_and_layers_may_be_named(http: TestClient) -> None:
    answer = ask(http, input={"token_ids": [5] * 40}, layers=[2, 0, 2]).json()
    assert answer["tokens"] == 40
    assert answer["asked"]["layers"] == [0, 2] == [layer["layer"] for layer in answer["layers"]]


def test_the_support_asked_for_is_the_one_whose_mass_is_told(http: TestClient) -> None:
    everything = ask(http, support={"backend": "window", "params": {"window": 4096}}).json()
    for layer in everything["layers"]:
        assert layer["candidates"][0]["spec"]["backend"] == "window"
        assert all(head["kept_mass"] == pytest.approx(1, abs=1e-5) for head in layer["heads"])


@pytest.mark.parametrize(
    ("more", "param", "said"),
    [
        ({"layers": [3]}, "layers", "attention cannot be chosen in layer 3"),
        ({"layers": []}, "layers", "1"),
        ({"support": "performer"}, "support", "approximates"),
        (
            {"support": {"backend": "pooled", "params": {"remainder": "mean"}}},
            "support.params.remainder",
            "'none'",
        ),
        ({"support": {"backend": "sinks", "verify": True}}, "support.verify", "exact"),
        ({"support": {"backend": "sinks", "params": {"window": 0}}}, "support.params.window", "1"),
        ({"support": "no-such"}, "support", "no attention backend"),
        ({"budget": 10}, "budget", "4"),
        ({"tolerance": 1}, "tolerance", "1"),
        ({"rows": 8}, "rows", "16"),
        ({"arm_tokens": 513}, "arm_tokens", "512"),
        ({"input": ""}, "input", "empty"),
        ({"model": "fake"}, "model", "cannot be diagnosed"),
        ({"truncate": "end"}, "truncate", "truncate"),
    ],
)
def test_bad_requests_name_the_field_and_the_way_out(
    http: TestClient, more: dict[str, Any], param: str, said: str
) -> None:
    response = ask(http, **more)
    assert response.status_code == 400, response.text
    assert response.json()["param"] == param
    assert said in response.json()["detail"]


@pytest.mark.parametrize("tokens", [4097, 9000])
def test_longer_texts_than_are_read_are_refused_with_the_limit(http: TestClient, tokens: int) -> None:
    """One limit, whether the model reads as many or not, and no way out that there is not."""
    response = ask(http, input={"token_ids": [5] * tokens})
    assert response.status_code == 400
    assert response.json()["code"] == "context_length_exceeded"
    assert response.json()["limits"] == {"max_tokens": 4096, "tokens": tokens}
    assert "for a diagnosis" in response.json()["detail"] and "truncate" not in response.json()["detail"]


def test_unknown_models_are_not_found(http: TestClient) -> None:
    assert ask(http, model="other").status_code == 404


def test_a_deadline_ends_it_and_nothing_is_held_afterwards(http: TestClient) -> None:
    response = ask(http, input={"token_ids": [5, 6, 7, 8] * 500}, timeout_ms=60, budget=256)
    assert response.status_code == 504, response.text
    assert ask(http).status_code == 200
    assert http.app.state.runtime.engine.reserved_bytes == 0  # type: ignore[attr-defined]


def test_other_requests_of_the_model_are_served_while_a_diagnosis_runs(http: TestClient) -> None:
    """Generation finishes before a diagnosis that began earlier, and says what it says alone."""
    body = {"model": "net", "prompt": {"token_ids": [5, 6, 7]}, "max_new_tokens": 5}
    alone = http.post("/v1/generate", json=body).json()["choices"]
    ended: list[str] = []

    def diagnose() -> None:
        assert ask(http, input={"token_ids": [5, 6, 7, 8] * 300}, budget=256).status_code == 200
        ended.append("diagnose")

    thread = threading.Thread(target=diagnose)
    thread.start()
    engine = http.app.state.runtime.engine  # type: ignore[attr-defined]
    while not engine.reserved_bytes and thread.is_alive():
        time.sleep(0.001)
    beside = http.post("/v1/generate", json=body).json()["choices"]
    ended.append("generate")
    thread.join()
    assert ended == ["generate", "diagnose"]
    assert beside == alone


def test_it_is_counted_under_its_model_once_and_under_no_attention(http: TestClient) -> None:
    def found(text: str, name: str, **labels: str) -> float:
        return sample(text, f"longreach_{name}", model="net", **labels) or 0

    before = http.get("/metrics").text
    response = ask(http)
    text = http.get("/metrics").text
    assert response.headers["x-attention-backend"] == "none"
    of_all = {"operation": "diagnose"}
    for name in ("queue_seconds_count", "tokenize_seconds_count", "input_tokens_count"):
        assert found(text, name, **of_all) - found(before, name, **of_all) == 1, name
    told = {**of_all, "attention": "none", "code": "200"}
    assert found(text, "requests_total", **told) - found(before, "requests_total", **told) == 1
    assert found(text, "step_seconds_count") - found(before, "step_seconds_count") == 1
    assert "(diagnose)" not in text


def test_a_model_is_not_unloaded_under_a_diagnosis_and_nothing_of_it_stays(network: Model) -> None:
    """The diagnosis is failed as other requests of the model are, and has ended when the model is gone."""
    model = Model(network._network, network.info, network.tokenizer)
    settings = make_settings(short_ms=1, step_ms=1, admin=True, drain_seconds=0.05)
    app = create_app(settings, {"net": model, "fake": decoder(name="fake")})
    with TestClient(app, raise_server_exceptions=False) as http, ThreadPoolExecutor(1) as threads:
        assert ask(http).status_code == 200
        engine, costs = app.state.runtime.engine, app.state.runtime.costs
        assert "net (diagnose)" in costs.summary()
        running = threads.submit(ask, http, input={"token_ids": [5, 6, 7, 8] * 1000}, rows=512)
        wait_for(lambda: engine.load("net").running_requests == 1)
        assert engine.has_work("net") and not engine.has_work("fake")
        assert http.delete("/v1/admin/models/net").status_code == 200
        assert engine.num_jobs == 0 and not engine.has_work("net") and engine.reserved_bytes == 0
        told = running.result()
        assert (told.status_code, told.json()["code"]) == (503, "model_unloaded")
        assert 'model="net' not in http.get("/metrics").text
        assert "net (diagnose)" not in costs.summary()


def test_a_text_that_needs_too_much_memory_is_told_so(network: Model) -> None:
    app = create_app(make_settings(memory_limit_bytes=1_000_000), {"net": network})
    with TestClient(app, raise_server_exceptions=False) as http:
        response = ask(http, input={"token_ids": [5] * 2000})
    problem = response.json()
    assert (response.status_code, problem["code"], problem["param"]) == (413, "never_fits_memory", "input")
    assert "shorter text" in problem["detail"] and problem["limits"]["memory_limit_bytes"] == 1_000_000


def test_the_command_prints_tables_and_json(
    http: TestClient, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[dict[str, Any]] = []

    def post(server: object, path: str, body: dict[str, Any]) -> dict[str, Any]:
        sent.append({"path": path, **body})
        return dict(http.post(path, json={**body, "arm_tokens": 16}).json())

    monkeypatch.setattr(
        "service.cli_diagnose.Server", lambda *_: SimpleNamespace(post=lambda p, b: post(None, p, b))
    )
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    flags = ["--model", "net", "--budget", "16", "--layers", "0,1", "--support", "window:window=9"]
    for more in ([], ["--heads"], ["--json"]):
        with pytest.raises(SystemExit) as status:
            main(["diagnose", str(file), *flags, *more])
        assert status.value.code == 0
    printed = capsys.readouterr().out
    assert "LOW-RANK" in printed and "window(window=9)" in printed and "residual by arm" in printed
    assert sent[0]["path"] == "/v1/diagnose" and sent[0]["layers"] == [0, 1] and sent[0]["budget"] == 16
    assert sent[0]["support"] == {"backend": "window", "params": {"window": 9}}
    assert json.loads(printed[printed.index("\n{") :])["model"] == "net"


def test_a_list_of_layers_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "text.txt"
    file.write_text("a")
    with pytest.raises(SystemExit) as status:
        main(["diagnose", str(file), "--layers", "a"])
    assert status.value.code == 2
    assert "--layers 'a' is no list of numbers" in capsys.readouterr().err


def test_networks_without_arms_are_told_too(http: TestClient) -> None:
    answer = ask(http, arm_tokens=0).json()
    assert answer["rank_collapse"]["arms"] is None
    assert "arms: none (arm_tokens is 0)" in told(answer)
