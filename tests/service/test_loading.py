"""While models load the port is open: what is asked of them is told to come back, not that they are not
there."""

from __future__ import annotations

from fastapi.testclient import TestClient

from service.app import create_app
from service.runtime import Runtime
from tests.service.conftest import make_settings
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


def test_a_route_documents_loading_only_where_it_can_say_so() -> None:
    with TestClient(create_app(make_settings(), start=never)) as client:
        paths = client.get("/openapi.json").json()["paths"]
        assert client.get("/v1/models").json() == {"object": "list", "data": []}
    assert "503" not in paths["/v1/models"]["get"]["responses"]
    assert "503" in paths["/v1/models/{name}"]["get"]["responses"]
