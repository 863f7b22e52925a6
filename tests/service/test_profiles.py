"""The profiles that ``auto`` plans with: looked for, measured once for all who wait, and gone with their
model."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from fastapi import Request
from fastapi.testclient import TestClient

from models import calibrate_default
from models.calibrate import Sizes
from models.calibrate_default import measurement_for
from models.calibrate_measure import time_exact
from models.calibrate_model import CalibratingModel, WorkClock, can_calibrate
from models.contract import ModelError, Slice
from models.forward import offer_to_pause
from models.profile import Profile, load, profile_file, save
from models.profile_stamp import stamp_of
from models.runner import Model
from models.tokenizer import load_tokenizer
from service import loading
from service.app import create_app
from service.attention import exact_choice
from service.errors import ApiError
from service.flow import Flow
from service.runtime import Runtime
from tests.models import tiny
from tests.service.conftest import make_settings, sample, wait_for
from tests.service.fake_model import decoder

TEXT = "call me ishmael. some years ago, never mind how long precisely. " * 12
SMALL = Sizes(lengths=(64, 128), documents=1, minutes=1.0)
QUICK_RUNGS = {"sinks": ({"window": 16},), "pooled": ({"budget": 32, "block_size": 32},)}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Model:
    directory = tmp_path_factory.mktemp("tokenizer")
    tiny.tokenizer_files(directory)
    served = tiny.serve(tiny.network(lambda: tiny.llama(max_position_embeddings=8192)), max_tokens=8192)
    info = replace(served.info, name="net", tasks=("generate", "score"))
    return Model(served._network, info, load_tokenizer(directory))


@pytest.fixture(autouse=True)
def small_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is measured where nothing is kept: a short text, few rungs."""
    text = tmp_path / "samples" / "text.txt"
    text.parent.mkdir()
    text.write_text(TEXT, encoding="utf-8")
    monkeypatch.setattr("models.calibrate_default.DEFAULT_TEXT", text)
    monkeypatch.setattr("models.calibrate_default.QUICK", SMALL)
    monkeypatch.setattr("models.calibrate_rungs.QUICK", QUICK_RUNGS)
    monkeypatch.setattr("models.calibrate_default.SHIPPED", tmp_path / "shipped")
    for place in ("calibrate_ladders", "calibrate_times"):  # which rungs are worth it is a matter of time
        monkeypatch.setattr(f"models.{place}.worth_keeping", list)
    return text


@dataclass
class Server:
    """A server that answers POST /want with the source of the model's profile."""

    http: TestClient
    runtime: Runtime
    cache_dir: Path

    def want(self, name: str = "net", **more: Any) -> httpx2.Response:
        response: httpx2.Response = self.http.post("/want", json={"model": name, **more})
        return response

    def state(self, name: str = "net") -> dict[str, Any]:
        (card,) = [each for each in self.http.get("/v1/models").json()["data"] if each["id"] == name]
        return dict(card["auto"])


@contextmanager
def serving(network: Model, cache_dir: Path, **settings: Any) -> Iterator[Server]:
    given = {"cache_dir": cache_dir, "short_ms": 1, "step_ms": 1, "admin": True, **settings}
    app = create_app(make_settings(**given), {"net": network, "fake": decoder(name="fake")})

    async def want(request: Request) -> dict[str, Any]:
        body = json.loads(await request.body())
        flow = Flow(request)
        model = flow.runtime.model(body["model"], None)
        profile = await flow.runtime.profiles.of(flow, model, body.get("timeout_ms"))
        return {"lengths": [length.tokens for length in profile.lengths], "command": profile.made.command}

    app.add_api_route("/want", want, methods=["POST"])
    with TestClient(app, raise_server_exceptions=False) as http:
        yield Server(http, app.state.runtime, cache_dir)


@pytest.fixture
def server(network: Model, tmp_path: Path) -> Iterator[Server]:
    with serving(again(network), tmp_path / "cache") as found:
        yield found
        wait_for(lambda: not found.runtime.engine.num_jobs)
        assert found.runtime.engine.reserved_bytes == 0


def again(network: Model) -> Model:
    """One that may be closed."""
    return Model(network._network, network.info, network.tokenizer)


@dataclass
class Gate:
    """Holds measuring back at its first document, on the engine's thread, at a yield point."""

    held: threading.Event = field(default_factory=threading.Event)
    go: threading.Event = field(default_factory=threading.Event)
    calls: int = 0

    def install(self, monkeypatch: pytest.MonkeyPatch, wrong: Exception | None = None) -> Gate:
        def gated(*given: Any) -> Any:
            self.calls += 1
            self.held.set()
            while not self.go.is_set():
                offer_to_pause()
            if wrong is not None and self.calls == 1:
                raise wrong
            return time_exact(*given)

        monkeypatch.setattr("models.calibrate.time_exact", gated)
        return self


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate().install(monkeypatch)
    yield made
    made.go.set()


def test_the_first_use_measures_and_the_next_finds_it_in_memory_and_after_a_restart_in_the_cache(
    server: Server, network: Model, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="longreach.profiles")
    assert server.state() == {"state": "none", "progress": "", "lengths": [], "source": None}
    first = server.want()
    assert first.json() == {"lengths": [64, 128], "command": "at first use"}
    assert server.state() == {"state": "ready", "progress": "", "lengths": [64, 128], "source": "measured"}
    assert any("measuring its profile" in line for line in caplog.messages)
    assert any(line.startswith("document 1, 128 tokens:") for line in caplog.messages)
    kept = load(profile_file(server.cache_dir, stamp_of(network)), stamp_of(network))
    assert [ladder.layer for ladder in kept.layers] == [0, 1, 2]
    assert server.want().json() == first.json()
    with serving(network, server.cache_dir, auto_profile="never") as other:
        assert other.want().json() == first.json()
        assert other.state()["source"] == "cache"


def test_many_who_wait_are_served_by_one_measuring(server: Server, gate: Gate) -> None:
    with ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(server.want) for _ in range(4)]
        assert gate.held.wait(20)
        assert server.state()["state"] == "measuring"
        gate.go.set()
        assert {each.result().status_code for each in asked} == {200}
    assert gate.calls == len(SMALL.lengths)


def test_a_deadline_is_told_how_far_it_is_and_measuring_goes_on(server: Server, gate: Gate) -> None:
    assert server.want(timeout_ms=100).status_code == 504
    assert gate.held.wait(20)
    late = server.want(timeout_ms=100)
    assert (late.status_code, late.json()["code"]) == (504, "deadline_exceeded")
    assert "reading 64 tokens" in late.json()["detail"] and "Measuring goes on" in late.json()["detail"]
    assert server.state()["state"] == "measuring" and "64 tokens" in server.state()["progress"]
    gate.go.set()
    wait_for(lambda: server.state()["state"] == "ready")
    assert server.want(timeout_ms=1000).status_code == 200
    assert gate.calls == len(SMALL.lengths)


def test_other_requests_of_the_model_run_while_it_is_measured(server: Server, gate: Gate) -> None:
    body = {"model": "net", "prompt": {"token_ids": [5, 6, 7]}, "max_new_tokens": 5}
    alone = server.http.post("/v1/generate", json=body).json()["choices"]
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(server.want)
        assert gate.held.wait(20)
        assert server.runtime.engine.reserved_bytes > 0
        beside = server.http.post("/v1/generate", json=body).json()["choices"]
        assert not asked.done()
        gate.go.set()
        assert asked.result().status_code == 200
    assert beside == alone


def test_what_is_measured_beside_other_work_has_the_errors_of_what_is_measured_alone(
    server: Server, network: Model, tmp_path: Path
) -> None:
    """Left at every yield point, with other steps of the same network between."""
    stop = threading.Event()
    body = {"model": "net", "prompt": {"token_ids": [5, 6, 7] * 40}, "max_new_tokens": 4}

    def others() -> None:
        while not stop.is_set():
            assert server.http.post("/v1/generate", json=body).status_code == 200

    with ThreadPoolExecutor(2) as threads:
        busy = threads.submit(others)
        assert server.want().status_code == 200
        stop.set()
        busy.result()
    with serving(network, tmp_path / "alone") as quiet:
        assert quiet.want().status_code == 200
    stamp = stamp_of(network)
    beside, alone = (load(profile_file(each, stamp)) for each in (server.cache_dir, tmp_path / "alone"))
    assert errors_of(beside) == pytest.approx(errors_of(alone), rel=1e-3)
    assert len(errors_of(alone)) == 3 * 3 * len(SMALL.lengths) and max(errors_of(alone).values()) > 0


def errors_of(profile: Profile) -> dict[tuple[int, str, int], float]:
    return {
        (ladder.layer, rung.backend, place): error
        for ladder in profile.layers
        for rung in ladder.rungs
        for place, error in enumerate(rung.median)
    }


def test_a_failure_is_told_and_the_next_request_tries_again(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    gate.go.set()
    gate.install(monkeypatch, RuntimeError("secret"))
    failed = server.want()
    assert (failed.status_code, failed.json()["code"]) == (500, "internal_error")
    assert "secret" not in failed.text and "profile" in failed.json()["detail"]
    assert server.state()["state"] == "failed"
    assert "could not be measured" in server.state()["progress"]
    text = server.http.get("/metrics").text
    assert sample(text, "longreach_profile_state", model="net", state="failed") == 1
    assert server.want().status_code == 200
    assert server.state()["state"] == "ready"
    text = server.http.get("/metrics").text
    assert sample(text, "longreach_profile_state", model="net", state="failed") == 0
    assert sample(text, "longreach_profile_state", model="net", state="ready") == 1


def test_what_who_runs_the_server_can_put_right_is_told(
    server: Server, small_samples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_samples.unlink()
    told = server.want()
    assert (told.status_code, told.json()["param"]) == (400, "attention.backend")
    assert "longreach calibrate net TEXT" in told.json()["detail"] == server.state()["progress"]
    small_samples.write_text("short", encoding="utf-8")
    told = server.want()
    assert told.status_code == 400 and "no text has 64 tokens" in told.json()["detail"]
    small_samples.write_text(TEXT, encoding="utf-8")
    Gate(go=set_event()).install(monkeypatch, ModelError("this layer has no name"))
    assert "this layer has no name" in server.want().json()["detail"]
    assert server.want().status_code == 200


def set_event() -> threading.Event:
    event = threading.Event()
    event.set()
    return event


def test_where_none_may_be_measured_a_request_is_told_what_to_do(network: Model, tmp_path: Path) -> None:
    with serving(network, tmp_path / "cache", auto_profile="never") as server:
        told = server.want()
        assert (told.status_code, told.json()["param"]) == (400, "attention.backend")
        assert "longreach calibrate net TEXT" in told.json()["detail"]
        assert "auto_profile" in told.json()["detail"]
        assert server.state()["state"] == "none"


def test_a_profile_of_another_machine_is_not_used(server: Server, network: Model) -> None:
    assert server.want().status_code == 200
    stamp = stamp_of(network)
    file = profile_file(server.cache_dir, stamp)
    kept = load(file)
    save(kept.model_copy(update={"stamp": stamp.model_copy(update={"threads": 999})}), file)
    with serving(network, server.cache_dir) as other:
        assert other.want().status_code == 200
        assert other.state()["source"] == "measured"
    assert load(file).stamp == stamp


def test_errors_that_were_shipped_need_their_times_alone(
    server: Server, network: Model, tmp_path: Path
) -> None:
    assert server.want().status_code == 200
    kept = load(profile_file(server.cache_dir, stamp_of(network)))
    theirs = kept.model_copy(update={"stamp": kept.stamp.model_copy(update={"processor": "another"})})
    save(theirs, tmp_path / "shipped" / "net.json")
    with serving(network, tmp_path / "new") as other:
        assert other.want().status_code == 200
        assert other.state()["source"] == "shipped"
    found = load(profile_file(tmp_path / "new", stamp_of(network)), stamp_of(network))
    assert found.made.times is not None and found.made.times.errors_from.processor == "another"


def test_errors_that_were_calibrated_elsewhere_are_kept_and_need_their_times_alone(
    server: Server, network: Model, tmp_path: Path
) -> None:
    """After an upgrade, say. What is measured then does not take the calibration's place."""
    assert server.want().status_code == 200
    kept = load(profile_file(server.cache_dir, stamp_of(network)))
    theirs = kept.model_copy(update={"stamp": kept.stamp.model_copy(update={"torch": "1.0"})})

    def calibrated(date: str) -> Profile:
        made = theirs.made.model_copy(update={"command": "longreach calibrate net book.txt", "date": date})
        return theirs.model_copy(update={"made": made})

    cache = tmp_path / "new"
    file = profile_file(cache, theirs.stamp)
    save(calibrated("2026-01-02"), file)
    save(calibrated("2026-01-01"), file.with_name("older.json"))
    os.utime(file.with_name("older.json"), (1, 1))
    save(theirs, tmp_path / "shipped" / "net.json")
    with serving(network, cache) as other:
        assert other.want().status_code == 200
        assert other.state()["source"] == "calibrated"
    found = load(profile_file(cache, stamp_of(network)), stamp_of(network))
    assert found.made.date == "2026-01-02" and found.made.times is not None
    assert load(file) == calibrated("2026-01-02")
    with serving(network, cache) as again:
        assert again.want().status_code == 200 and again.state()["source"] == "cache"


def test_a_model_without_layers_to_choose_in_is_refused(server: Server) -> None:
    told = server.want("fake")
    assert (told.status_code, told.json()["param"]) == (400, "attention.backend")
    assert "no layer" in told.json()["detail"]
    assert not can_calibrate(decoder(name="fake"))


def test_a_profile_that_was_put_there_is_used(server: Server, network: Model) -> None:
    assert server.want().status_code == 200
    profile = load(profile_file(server.cache_dir, stamp_of(network)))
    server.runtime.profiles.put("fake", profile)
    assert server.want("fake").json()["lengths"] == [64, 128]
    assert server.state("fake")["source"] == "put"


def test_with_its_model_a_profile_leaves_memory_and_stays_in_its_file(server: Server, network: Model) -> None:
    assert server.want().status_code == 200
    file = profile_file(server.cache_dir, stamp_of(network))
    assert server.http.delete("/v1/admin/models/net").status_code == 200
    assert server.runtime.profiles.state("net")["state"] == "none"
    assert file.exists()
    assert 'model="net"' not in server.http.get("/metrics").text


def test_a_model_that_is_unloaded_is_not_measured_to_the_end(server: Server, gate: Gate) -> None:
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(server.want)
        assert gate.held.wait(20)
        assert server.http.delete("/v1/admin/models/net").status_code == 200
        told = asked.result()
    assert (told.status_code, told.json()["code"]) == (503, "model_unloaded")
    assert not server.runtime.engine.has_work("net") and server.runtime.engine.reserved_bytes == 0
    assert server.runtime.profiles.state("net")["state"] == "none"
    assert gate.calls == 1


def test_who_asked_first_does_not_take_the_measuring_along(server: Server, gate: Gate) -> None:
    assert server.want(timeout_ms=100).status_code == 504
    assert gate.held.wait(20)
    assert server.runtime.engine.num_jobs == 1
    gate.go.set()
    wait_for(lambda: server.state()["state"] == "ready")


def test_memory_that_it_needs_is_reserved_and_lengths_without_room_are_left_out(
    network: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="longreach.profiles")
    with serving(network, tmp_path / "a", memory_limit_bytes=20_000) as server:
        told = server.want()
        assert told.status_code == 400 and "memory_limit_bytes" in told.json()["detail"]
    needed = bytes_for(network, (64,))
    with serving(network, tmp_path / "b", memory_limit_bytes=needed + 1000) as server:
        assert server.want().json()["lengths"] == [64]
    assert any("no memory for more than 64 tokens" in line for line in caplog.messages)


def bytes_for(network: Model, lengths: tuple[int, ...]) -> int:
    usual = calibrate_default.QUICK
    calibrate_default.QUICK = replace(usual, lengths=lengths)
    try:
        return measurement_for(network, stamp_of(network), None, lambda _: None).num_bytes
    finally:
        calibrate_default.QUICK = usual


def test_a_comparison_that_waits_for_a_profile_keeps_no_other_out(server: Server, gate: Gate) -> None:
    def compare(attention: object) -> httpx2.Response:
        body = {"model": "net", "input": TEXT, "attention": [attention]}
        response: httpx2.Response = server.http.post("/v1/compare", json=body)
        return response

    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(compare, {"backend": "auto", "max_error": 0.5})
        assert gate.held.wait(20)
        assert compare("sinks").status_code == 200
        gate.go.set()
        found = waiting.result()
    assert found.status_code == 200, found.text
    assert found.json()["results"][0]["error"] is None


def test_another_model_of_the_same_name_is_not_planned_for(server: Server, network: Model) -> None:
    """A request found its model before it was unloaded, and another one was loaded in its place."""
    assert server.want().status_code == 200
    find = server.runtime.model
    server.runtime.model = lambda name, task: again(network)  # type: ignore[method-assign]
    told = server.want()
    server.runtime.model = find  # type: ignore[method-assign]
    assert (told.status_code, told.json()["code"]) == (404, "model_not_found")


def test_a_full_queue_is_told_as_any_request_is(network: Model, tmp_path: Path) -> None:
    with serving(network, tmp_path / "cache", max_queue_requests=1) as server:

        def full(job: object) -> None:
            raise ApiError("queue_full", "1 requests are waiting.", retry_after_s=7)

        submit, server.runtime.engine.submit = server.runtime.engine.submit, full  # type: ignore[method-assign]
        told = server.want()
        assert (told.status_code, told.headers["retry-after"]) == (429, "7")
        server.runtime.engine.submit = submit  # type: ignore[method-assign]
        assert server.want().status_code == 200


def start_with(model: Model, cache_dir: Path, **settings: Any) -> Any:
    async def start(runtime: Runtime) -> None:
        await loading.start(runtime, lambda settings: {"net": model, "fake": decoder(name="fake")})

    given = {"cache_dir": cache_dir, "short_ms": 1, **settings}
    return create_app(make_settings(**given), start=start)


def test_at_startup_it_is_measured_before_the_server_is_ready(
    network: Model, tmp_path: Path, gate: Gate, capsys: pytest.CaptureFixture[str]
) -> None:
    app = start_with(again(network), tmp_path / "cache", auto_profile="startup")
    with TestClient(app) as http:
        assert gate.held.wait(60)
        wait_for(lambda: "64 tokens" in http.get("/readyz").text)
        early = http.get("/readyz")
        assert early.status_code == 503 and "measuring the profile of net: reading 64" in early.text
        gate.go.set()
        wait_for(lambda: http.get("/readyz").status_code == 200)
        assert http.get("/v1/models/net").json()["auto"]["state"] == "ready"
        assert http.get("/v1/models/fake").json()["auto"]["state"] == "none"
    assert "net: has a profile (measured" in capsys.readouterr().err


def test_one_that_cannot_be_measured_at_startup_is_told_and_the_server_serves(
    network: Model, tmp_path: Path, small_samples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_samples.unlink()
    app = start_with(again(network), tmp_path / "cache", auto_profile="startup")
    with TestClient(app) as http:
        wait_for(lambda: http.get("/readyz").status_code == 200)
        assert http.get("/v1/models/net").json()["auto"]["state"] == "failed"
    assert "net: has no profile" in capsys.readouterr().err


def test_by_default_nothing_is_measured_at_startup(network: Model, tmp_path: Path, gate: Gate) -> None:
    with TestClient(start_with(again(network), tmp_path / "cache")) as http:
        wait_for(lambda: http.get("/readyz").status_code == 200)
        assert http.get("/v1/models/net").json()["auto"]["state"] == "none"
    assert not gate.calls


def test_a_server_that_stops_while_it_measures_stops(network: Model, tmp_path: Path, gate: Gate) -> None:
    with serving(again(network), tmp_path / "cache") as server:
        assert server.want(timeout_ms=100).status_code == 504
        assert gate.held.wait(20)
    assert not server.runtime.engine.healthy


def test_modes_of_torch_are_as_they_were_wherever_measuring_is_left(network: Model) -> None:
    """Readings enter inference mode within the forward; outside it is what it was before."""
    todo = measurement_for(network, stamp_of(network), None, lambda _: None)

    def measure(clock: Callable[[], float]) -> Profile:
        return todo.run(lambda _: None, lambda _: None, clock)

    model = CalibratingModel(network, measure, 0, 0.0)
    state = model.open(1)
    forward = model.begin([Slice(state, [0], exact_choice(), "nothing", 1)])
    weight, pauses = torch.ones(1, requires_grad=True), 0
    while forward.advance(lambda: True) is None:
        pauses += 1
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert (2 * weight).requires_grad
    assert state.found is not None and pauses > 50
    given_up = model.begin([Slice(model.open(1), [0], exact_choice(), "nothing", 1)])
    for _ in range(5):
        assert given_up.advance(lambda: True) is None
    given_up.close()
    assert not torch.is_inference_mode_enabled()
    assert not network._sequences.use().cached_bytes


def test_the_time_for_which_measuring_is_left_is_in_none_of_its_figures(
    network: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("models.calibrate_model.WorkClock", partial(WorkClock, lambda: now))
    seen: list[float] = []

    def measure(clock: Callable[[], float]) -> Profile:
        nonlocal now
        for _ in range(3):
            seen.append(clock())
            now += 1
            offer_to_pause()
        raise ModelError("enough")

    forward = CalibratingModel(network, measure, 0, 0.0)
    begun = forward.begin([Slice(forward.open(1), [0], exact_choice(), "nothing", 1)])
    while begun.advance(lambda: True) is None:
        now += 100
    assert [each - seen[0] for each in seen] == [0, 1, 2]
