"""A real server with the demo models, started as a user starts it: ``longreach serve`` in its own process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

START_SECONDS = 600
SAMPLES = Path(__file__).parents[2] / "samples"


@dataclass(frozen=True)
class Server:
    """A running server: ``post`` and ``get`` fail the test on any other status than the one asked for."""

    url: str
    process: subprocess.Popen[bytes]

    def post(self, path: str, body: dict[str, Any], *, status: int = 200) -> dict[str, Any]:
        answer = httpx2.post(self.url + path, json=body, timeout=600)
        assert answer.status_code == status, answer.text[:2000]
        return answer.json()  # type: ignore[no-any-return]

    def get(self, path: str, *, status: int = 200) -> httpx2.Response:
        answer = httpx2.get(self.url + path, timeout=60)
        assert answer.status_code == status, answer.text[:2000]
        return answer


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            said = log.read_text(errors="replace")[-3000:]
            if "could not be fetched" in said:
                pytest.skip("the demo models could not be fetched: " + said[-500:])
            pytest.fail(f"the server stopped with {process.returncode} while starting:\n{said}")
        try:
            if httpx2.get(url + "/readyz", timeout=5).status_code == 200:
                return
        except httpx2.HTTPError:
            pass
        time.sleep(0.5)
    pytest.fail("the server was not ready in time:\n" + log.read_text(errors="replace")[-3000:])


def serve(tmp: Path, *args: str) -> Iterator[Server]:
    port, log = free_port(), tmp / "server.log"
    command = [sys.executable, "-m", "service.cli", "serve", "--port", str(port), *args]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=dict(os.environ), cwd=tmp
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(url, process, log)
        yield Server(url, process)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from serve(tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="session")
def long_text() -> str:
    """A real long document in the public domain."""
    return max((p.read_text() for p in SAMPLES.glob("*.txt")), key=len)
