"""Servers over fake models: in-process for shapes and errors, on a loopback socket where a connection
matters.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import httpx2
import pytest
import uvicorn
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from service.app import create_app
from service.runtime import Runtime
from service.server import Server
from service.settings import Settings, load_settings
from tests.service.fake_model import FakeModel, decoder, encoder


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("LONGREACH_")]:
        monkeypatch.delenv(name)


def make_settings(**values: Any) -> Settings:
    return load_settings({"memory_limit_bytes": 1 << 40, **values})


@dataclass(frozen=True)
class Served:
    """A server on a loopback port."""

    url: str
    port: int
    runtime: Runtime
    models: dict[str, FakeModel]
    server: Server

    def post(self, path: str, body: dict[str, Any], **options: Any) -> httpx2.Response:
        return httpx2.post(self.url + path, json=body, timeout=60, **options)

    def get(self, path: str) -> httpx2.Response:
        return httpx2.get(self.url + path, timeout=60)


@contextmanager
def serving(*models: FakeModel, **settings: Any) -> Iterator[Served]:
    """Serve fake models until the block ends."""
    named = {model.info.name: model for model in models or (encoder(), decoder())}
    app = create_app(make_settings(**settings), named)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    config = uvicorn.Config(
        app, http="h11", ws="none", log_config=None, access_log=False, timeout_graceful_shutdown=5
    )
    server = Server(config, app.state.runtime)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="test-server")
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield Served(f"http://127.0.0.1:{port}", port, app.state.runtime, named, server)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not stop"
    for model in named.values():
        model.check_idle()


@contextmanager
def in_process(*models: FakeModel, **settings: Any) -> Iterator[TestClient]:
    named = {model.info.name: model for model in models or (encoder(), decoder())}
    with TestClient(create_app(make_settings(**settings), named)) as client:
        yield client
    for model in named.values():
        model.check_idle()


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    """One application for tests that only look at answers."""
    with in_process() as found:
        yield found


def wait_for(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Until ``condition`` holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


class Blocker:
    """An ``on_step`` hook that holds steps back until told to go on."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.release = threading.Event()

    def __call__(self, slices: object) -> None:
        self.entered.set()
        assert self.release.wait(30), "a step was never released"


@lru_cache(maxsize=4)
def _samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (found.name, frozenset(found.labels.items())): float(found.value)
        for family in text_string_to_metric_families(text)
        for found in family.samples
    }


def sample(text: str, name: str, **labels: str) -> float | None:
    """The value of one series in an exposition; None where it is not there."""
    return _samples(text).get((name, frozenset(labels.items())))
