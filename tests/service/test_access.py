"""Who may call: a key guards every route not named public; browsers are kept out unless let in."""

from __future__ import annotations

import pytest

from service.auth import PUBLIC_PATHS
from tests.service.conftest import in_process, sample

KEY = {"authorization": "Bearer right-key"}


def test_every_route_but_the_public_ones_demands_the_key() -> None:
    with in_process(api_key="right-key") as client:
        routes = [
            (path, method)
            for path, methods in client.get("/openapi.json").json()["paths"].items()
            for method in methods
        ]
        assert ("/v1/encode", "post") in routes and ("/metrics", "get") in routes
        for path, method in [*routes, ("/v1/nothing", "get"), ("/docs", "get"), ("/v1/models/x", "get")]:
            answer = client.request(method.upper(), path, json={} if method == "post" else None)
            if path in PUBLIC_PATHS or path == "/metrics":
                assert answer.status_code == 200, path
            else:
                assert answer.status_code == 401, path
                assert (
                    answer.json()["code"] == "invalid_api_key"
                    and answer.headers["www-authenticate"] == "Bearer"
                )
        assert client.post("/v1/encode", json={"input": "x"}, headers=KEY).status_code == 200
        text = client.get("/metrics").text
        assert sample(text, "longreach_requests_rejected_total", operation="encode", reason="auth") == 1


@pytest.mark.parametrize(
    "value",
    [
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        "Bearer right-key2",
        "Bearer right-ke",
        "Basic right-key",
        "right-key",
    ],
)
def test_wrong_keys_are_refused(value: str) -> None:
    with in_process(api_key="right-key") as client:
        assert client.get("/v1/models", headers={"authorization": value}).status_code == 401


def test_two_authorization_headers_are_refused() -> None:
    with in_process(api_key="right-key") as client:
        headers = [("authorization", "Bearer right-key"), ("authorization", "Bearer other")]
        assert client.get("/v1/models", headers=headers).status_code == 401


@pytest.mark.parametrize(
    "path", ["/livez/../v1/models", "//v1/models", "/v1/models/", "/%761/models", "/livez%2f..%2fv1/models"]
)
def test_odd_paths_do_not_slip_past_the_key(path: str) -> None:
    with in_process(api_key="right-key") as client:
        assert client.get(path, headers={"host": "x/livez?"}).status_code == 401


def test_metrics_can_be_closed() -> None:
    with in_process(api_key="right-key", metrics_public=False) as client:
        assert client.get("/metrics").status_code == 401
        assert client.get("/metrics", headers=KEY).status_code == 200


def test_browsers_are_let_in_only_from_named_origins() -> None:
    origin = {"origin": "https://app.example"}
    with in_process() as client:
        assert "access-control-allow-origin" not in client.get("/v1/models", headers=origin).headers
    with in_process(cors_origins=["https://app.example"], api_key="right-key") as client:
        ask = {
            **origin,
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization",
        }
        assert (
            client.options("/v1/encode", headers=ask).headers["access-control-allow-origin"]
            == "https://app.example"
        )
        sdk = {**ask, "access-control-request-headers": "authorization,content-type,x-stainless-os"}
        allowed = client.options("/v1/encode", headers=sdk)
        assert allowed.status_code == 200
        assert "x-stainless-os" in allowed.headers["access-control-allow-headers"]
        other = {**ask, "origin": "https://evil.example"}
        assert "access-control-allow-origin" not in client.options("/v1/encode", headers=other).headers
        answer = client.get("/v1/models", headers={**origin, **KEY})
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        assert "access-control-allow-credentials" not in answer.headers
