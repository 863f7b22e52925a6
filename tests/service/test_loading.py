"""While models load the port is open: what is asked of them is told to come back, not that they are not
there."""

from __future__ import annotations

from fastapi.testclient import TestClient

from models.contract import ModelError, ServedModel
from service import loading
from service.app import create_app
from service.fleet import Load
from service.metrics import LOAD_OUTCOMES
from service.runtime import Runtime
from service.settings import Settings
from tests.service.conftest import make_settings, sample, wait_for
from tests.service.fake_model import encoder


async def never(runtime: Runtime) -> None:
    """A loader that is not done."""


def test_a_model_that_may_still_come_is_503_and_one_that_is_not_served_404() -> None:
    app = create_app(make_settings(), start=never)
    with TestClient(app) as client:
        early = client.get("/v1/models/enc")
        assert early.status_code == 503 and early.json()["code"] == "loading"
        assert int(early.headers["retry-after"]) >= 1
        runtime: Runtime = app.state.runtime
        runtime.add_models({"enc": encoder()})
        assert client.get("/v1/models/enc").status_code == 200, "loaded, although others still load"
        assert client.get("/v1/models/other").status_code == 503
        runtime.set_phase("ready")
        assert client.get("/v1/models/other").status_code == 404
        assert client.get("/v1/models/enc").status_code == 200


def test_probes_tell_how_far_loading_has_come() -> None:
    app = create_app(make_settings(), start=never)
    with TestClient(app) as client:
        runtime: Runtime = app.state.runtime
        for path in ("/readyz", "/health"):
            early = client.get(path)
            assert early.status_code == 503 and "loading the models" in early.json()["detail"]
        runtime.progress.enter("warming up enc", 8)
        runtime.progress.done = 3
        for path in ("/readyz", "/health"):
            told = client.get(path).json()
            assert "warming up enc (3 of 8)" in told["detail"]
            assert told["limits"] == {"done": 3, "total": 8}
        assert client.get("/livez").status_code == 200
        assert sample(client.get("/metrics").text, "longreach_warm_up_progress_ratio") == 3 / 8
        runtime.set_phase("ready")
        assert client.get("/readyz").status_code == 200


def test_loads_are_counted_by_how_they_ended() -> None:
    for load, outcome in ((lambda settings: {"enc": encoder()}, "loaded"), (no_models, "failed")):

        async def start(runtime: Runtime, load: Load = load) -> None:
            await loading.start(runtime, load)

        app = create_app(make_settings(), start=start)
        with TestClient(app) as client:
            wait_for(lambda app=app: app.state.runtime.phase != "loading")
            text = client.get("/metrics").text
        counted = {name: sample(text, "longreach_model_loads_total", outcome=name) for name in LOAD_OUTCOMES}
        assert counted == {name: float(name == outcome) for name in LOAD_OUTCOMES}


def no_models(settings: Settings) -> dict[str, ServedModel]:
    raise ModelError("there is none")


def test_a_route_documents_loading_only_where_it_can_say_so() -> None:
    with TestClient(create_app(make_settings(), start=never)) as client:
        paths = client.get("/openapi.json").json()["paths"]
        assert client.get("/v1/models").json() == {"object": "list", "data": []}
    assert "503" not in paths["/v1/models"]["get"]["responses"]
    assert "503" in paths["/v1/models/{name}"]["get"]["responses"]
