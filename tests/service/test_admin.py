"""Models come and go while the server serves: nobody is told wrong, nothing of them stays."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx2
import pytest
import uvicorn
from fastapi.testclient import TestClient

from models.contract import ModelError, ServedModel
from service.app import create_app
from service.server import Server
from service.settings import Settings, parse_model
from tests.service.conftest import Blocker, Served, in_process, make_settings, sample, wait_for
from tests.service.fake_model import FakeModel, decoder, encoder, slow


@dataclass
class Loader:
    """Makes the models that ``make`` knows by their source."""

    models: list[weakref.ref[FakeModel]] = field(default_factory=list)
    gate: threading.Event | None = None
    entered: threading.Event = field(default_factory=threading.Event)
    hook: Any = None

    def __call__(self, settings: Settings) -> dict[str, ServedModel]:
        [item] = settings.models
        name, source = parse_model(item)
        self.entered.set()
        if self.gate is not None:
            assert self.gate.wait(30)
        if source == "missing":
            raise ModelError("there is no such directory; name one with config.json")
        if source == "broken":
            raise KeyError("secret")
        model = (encoder if source == "encoder" else decoder)(name, on_step=self.hook)
        self.models.append(weakref.ref(model))
        return {name: model}


@contextmanager
def administered(loader: Loader, *models: FakeModel, **settings: Any) -> Iterator[Served]:
    """A server on a loopback port that may load and unload models."""
    import socket

    named = {model.info.name: model for model in models}
    app = create_app(make_settings(admin=True, **settings), named, load=loader)
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app, http="h11", ws="none", log_config=None, access_log=False, timeout_graceful_shutdown=5
    )
    server = Server(config, app.state.runtime)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="test-server")
    thread.start()
    try:
        wait_for(lambda: server.started)
        port = listener.getsockname()[1]
        yield Served(f"http://127.0.0.1:{port}", port, app.state.runtime, {}, server)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not stop"


def add(server: Served, name: str, source: str = "decoder") -> httpx2.Response:
    return server.post("/v1/admin/models", {"name": name, "source": source})


def delete(server: Served, name: str) -> httpx2.Response:
    return httpx2.delete(f"{server.url}/v1/admin/models/{name}", timeout=60)


def check(answer: Any, status: int, code: str) -> dict[str, Any]:
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    return dict(answer.json())


def test_without_the_setting_the_routes_are_not_there() -> None:
    with in_process() as client:
        body = {"name": "a", "source": "b"}
        assert client.post("/v1/admin/models", json=body).json()["code"] == "not_found"
        assert client.delete("/v1/admin/models/dec").json()["code"] == "not_found"
        assert not [path for path in client.get("/openapi.json").json()["paths"] if "admin" in path]
        assert client.post("/v1/generate", json={"prompt": "a", "max_new_tokens": 1}).status_code == 200


def test_the_routes_are_documented_and_demand_the_key_where_there_is_one() -> None:
    app = create_app(make_settings(admin=True, api_key="key"), {"dec": decoder()}, load=Loader())
    with TestClient(app) as client:
        paths = client.get("/openapi.json").json()["paths"]
        assert {"201", "400", "401", "409"} <= set(paths["/v1/admin/models"]["post"]["responses"])
        assert {"200", "401", "404", "409"} <= set(paths["/v1/admin/models/{name}"]["delete"]["responses"])
        body = {"name": "a", "source": "decoder"}
        check(client.post("/v1/admin/models", json=body), 401, "invalid_api_key")
        check(client.delete("/v1/admin/models/dec"), 401, "invalid_api_key")
        key = {"authorization": "Bearer key"}
        assert client.post("/v1/admin/models", json=body, headers=key).status_code == 201
        assert client.delete("/v1/admin/models/dec", headers=key).status_code == 200


def test_a_model_is_loaded_warmed_up_and_served_while_others_run() -> None:
    loader = Loader(gate=threading.Event())
    with administered(loader, decoder()) as server, ThreadPoolExecutor(2) as pool:
        adding = pool.submit(add, server, "new@v2")
        loader.entered.wait(20)
        assert server.post("/v1/generate", {"prompt": "a", "max_new_tokens": 2}).status_code == 200
        check(server.get("/v1/models/new@v2"), 404, "model_not_found")
        loader.gate.set()  # type: ignore[union-attr]
        answer = adding.result()
        assert answer.status_code == 201 and answer.json() == server.get("/v1/models/new@v2").json()
        [model] = loader.models
        assert (made := model()) is not None and made.steps, "it was not warmed up"
        body = {"model": "new@v2", "prompt": "a", "max_new_tokens": 2}
        assert server.post("/v1/generate", body).status_code == 200
        text = server.get("/metrics").text
        assert sample(text, "longreach_model_loads_total", outcome="loaded") == 2
        told = {"operation": "generate", "attention": "exact", "code": "200"}
        assert sample(text, "longreach_requests_total", model="new@v2", **told) == 1


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"name": "dec", "source": "decoder"}, 409, "model_exists", "name"),
        ({"name": "new", "source": "missing"}, 400, "model_refused", "source"),
        ({"name": "new", "source": "broken"}, 400, "model_refused", "source"),
        ({"name": "no spaces", "source": "decoder"}, 400, "invalid_request", "name"),
        ({"name": "=x", "source": "decoder"}, 400, "invalid_request", "name"),
        ({"name": "", "source": "decoder"}, 400, "invalid_request", "name"),
        ({"name": "new", "source": ""}, 400, "invalid_request", "source"),
        ({"name": "new"}, 400, "invalid_request", "source"),
        ({"name": "new", "source": "decoder", "trust_remote_code": True}, 400, "invalid_request", None),
    ],
)
def test_what_cannot_be_loaded_is_refused_and_leaves_nothing(
    body: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    app = create_app(make_settings(admin=True), {"dec": decoder()}, load=Loader())
    with TestClient(app) as client:
        before = client.get("/metrics").text
        told = check(client.post("/v1/admin/models", json=body), status, code)
        assert "secret" not in str(told) and (param is None or told["param"] == param)
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["dec"]
        after = client.get("/metrics").text
        assert 'model="new"' not in after and before.count("model=") == after.count("model=")


def test_a_model_whose_warm_up_fails_is_not_served() -> None:
    def fail(slices: object) -> None:
        raise RuntimeError("no")

    loader = Loader(hook=fail)
    with administered(loader, decoder()) as server:
        assert add(server, "new").status_code >= 400
        check(server.get("/v1/models/new"), 404, "model_not_found")
        text = server.get("/metrics").text
        assert 'model="new"' not in text
        assert sample(text, "longreach_model_loads_total", outcome="failed") == 1
        loader.hook = None
        assert add(server, "new").status_code == 201, "a second try is a try"


def test_one_change_at_a_time() -> None:
    loader = Loader(gate=threading.Event())
    with administered(loader, decoder()) as server, ThreadPoolExecutor(2) as pool:
        adding = pool.submit(add, server, "new")
        loader.entered.wait(20)
        check(add(server, "other"), 409, "model_changing")
        check(delete(server, "dec"), 409, "model_changing")
        loader.gate.set()  # type: ignore[union-attr]
        assert adding.result().status_code == 201
        assert delete(server, "dec").status_code == 200


def test_an_unloaded_model_leaves_nothing_behind() -> None:
    loader = Loader()
    with administered(loader, encoder()) as server:
        before = {line.split(" ")[0] for line in server.get("/metrics").text.splitlines() if "model=" in line}
        for _ in range(2):
            assert add(server, "new").status_code == 201
            server.post("/v1/generate", {"model": "new", "prompt": "a" * 300, "max_new_tokens": 3})
            assert delete(server, "new").json() == {"id": "new", "object": "model", "deleted": True}
            check(server.post("/v1/generate", {"model": "new", "prompt": "a"}), 404, "model_not_found")
            check(delete(server, "new"), 404, "model_not_found")
            server.post("/v1/encode", {"input": "a"})
        gc.collect()
        assert [model() for model in loader.models] == [None, None], "somebody still refers to it"
        text = server.get("/metrics").text
        assert {line.split(" ")[0] for line in text.splitlines() if "model=" in line} == before
        assert server.runtime.engine.reserved_bytes == 0 and server.runtime.costs.summary().keys() == {"enc"}


def test_the_last_model_may_go_and_another_come() -> None:
    with administered(Loader(), decoder()) as server:
        assert delete(server, "dec").status_code == 200
        assert server.get("/v1/models").json()["data"] == []
        check(server.post("/v1/generate", {"prompt": "a"}), 400, "invalid_request")
        assert server.get("/readyz").status_code == 200
        assert add(server, "dec").status_code == 201
        body = {"prompt": "a", "max_new_tokens": 1}
        assert server.post("/v1/generate", body).status_code == 200


def test_running_requests_finish_before_their_model_goes() -> None:
    blocker = Blocker()
    with administered(Loader(), decoder(on_step=blocker), encoder()) as server, ThreadPoolExecutor(3) as pool:
        running = pool.submit(server.post, "/v1/generate", {"prompt": "a", "max_new_tokens": 4})
        blocker.entered.wait(20)
        going = pool.submit(delete, server, "dec")
        wait_for(lambda: "dec" not in server.runtime.models)
        check(server.post("/v1/generate", {"model": "dec", "prompt": "a"}), 404, "model_not_found")
        assert not going.done()
        blocker.release.set()
        assert running.result().status_code == 200 and going.result().status_code == 200
        assert server.post("/v1/encode", {"input": "a"}).status_code == 200


def test_requests_that_take_too_long_are_failed_when_their_model_goes() -> None:
    blocker = Blocker()
    model = decoder(on_step=blocker)
    with administered(Loader(), model, drain_seconds=0.1) as server, ThreadPoolExecutor(4) as pool:
        body = {"prompt": "a", "max_new_tokens": 500}
        plain = pool.submit(server.post, "/v1/generate", body)
        stream = pool.submit(server.post, "/v1/generate", {**body, "stream": True})
        blocker.entered.wait(20)
        wait_for(lambda: server.runtime.engine.num_jobs == 2)
        going = pool.submit(delete, server, "dec")
        check(plain.result(), 503, "model_unloaded")
        check(stream.result(), 503, "model_unloaded")
        assert not going.done(), "its step is still running"
        blocker.release.set()
        assert going.result().status_code == 200
        model.check_idle()
        assert model.closed and server.runtime.engine.num_jobs == 0


def test_a_model_whose_step_hangs_cannot_go_until_it_goes_on() -> None:
    blocker = Blocker()
    model = decoder(on_step=blocker)
    with administered(Loader(), model, drain_seconds=0.1) as server, ThreadPoolExecutor(2) as pool:
        hanging = pool.submit(server.post, "/v1/generate", {"prompt": "a", "max_new_tokens": 4})
        blocker.entered.wait(20)
        going = pool.submit(delete, server, "dec")
        wait_for(lambda: not server.runtime.models)
        server.runtime.engine.give_up()
        assert hanging.result().status_code == 503
        check(going.result(), 503, "engine_unhealthy")
        assert "dec" in server.runtime.models and not model.closed
        blocker.release.set()
        server.runtime.engine.take_back()
        assert server.post("/v1/generate", {"prompt": "a", "max_new_tokens": 2}).status_code == 200
        assert delete(server, "dec").status_code == 200 and model.closed


def test_a_stream_that_takes_too_long_ends_with_the_error_as_its_last_event() -> None:
    model = decoder(on_step=slow(0.02))
    with administered(Loader(), model, drain_seconds=0.1) as server, ThreadPoolExecutor(1) as pool:
        body = {"prompt": "a", "max_new_tokens": 500, "stream": True}
        stream = pool.submit(server.post, "/v1/generate", body)
        wait_for(lambda: len(model.steps) > 3)
        assert delete(server, "dec").status_code == 200
        answer = stream.result()
        assert answer.status_code == 200 and answer.text.count("event: token") >= 3
        last = answer.text.strip().split("\n\n")[-1]
        assert last.startswith("event: error") and '"model_unloaded"' in last
        text = server.get("/metrics").text
        assert 'model="dec"' not in text, "what ended late must not bring its series back"
        model.check_idle()


def test_the_prefix_cache_is_shared_evenly_among_the_models_that_have_prefixes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = [decoder("first"), encoder(), decoder("third")]
    limits: dict[str, int] = {}
    for model in models:
        monkeypatch.setattr(model, "limit_cached", partial(limits.__setitem__, model.info.name))
    with in_process(*models, prefix_cache_bytes=1000) as client:
        runtime = client.app.state.runtime  # type: ignore[attr-defined]
        assert limits == {"first": 500, "third": 500}
        runtime.remove_model("third")
        assert limits["first"] == 1000
