"""The process as its operator sees it: starting, stopping, and what it says when it cannot."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import pytest

from tests.service.conftest import wait_for

ROOT = Path(__file__).parents[2]


@dataclass
class Process:
    popen: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    def said(self, words: str) -> bool:
        return any(words in line for line in self.lines)

    @property
    def url(self) -> str:
        wait_for(lambda: self.said("listening on") or self.popen.poll() is not None, 60)
        found = re.search(r"http://[\d.]+:\d+", "\n".join(self.lines))
        assert found, self.lines
        return found[0]

    def wait_ready(self) -> str:
        url = self.url
        wait_for(lambda: httpx2.get(url + "/readyz").status_code == 200, 60)
        return url

    def exit_status(self, timeout_s: float = 30) -> int:
        return self.popen.wait(timeout_s)


@contextmanager
def process(mode: str, *args: str) -> Iterator[Process]:
    command = [sys.executable, "-m", "tests.service.fake_server", mode, "--port", "0", *args]
    popen = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    stderr = popen.stderr
    assert stderr is not None
    found = Process(popen)
    reader = threading.Thread(target=lambda: found.lines.extend(iter(stderr.readline, "")))
    reader.start()
    try:
        yield found
    finally:
        if popen.poll() is None:
            popen.kill()
        popen.wait()
        reader.join()
        stderr.close()


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_requests_in_flight_then_exits_0(stop: signal.Signals) -> None:
    with process("slow", "--drain-seconds", "20") as server, ThreadPoolExecutor(3) as pool:
        url = server.wait_ready()

        def ask(stream: bool) -> httpx2.Response:
            body = {"prompt": "x", "max_new_tokens": 80, "stream": stream}
            return httpx2.post(url + "/v1/generate", json=body, timeout=60)

        running = [pool.submit(ask, stream) for stream in (False, True)]
        wait_for(lambda: 'running_requests{model="dec"} 2' in httpx2.get(url + "/metrics").text)
        server.popen.send_signal(stop)
        wait_for(lambda: httpx2.get(url + "/readyz").status_code == 503)
        ready = httpx2.get(url + "/readyz")
        assert ready.json()["code"] == "draining" and int(ready.headers["retry-after"]) >= 1
        assert httpx2.get(url + "/livez").status_code == 200
        refused = httpx2.post(url + "/v1/generate", json={"prompt": "late"})
        assert refused.status_code == 503 and refused.json()["code"] == "draining"
        assert 1 <= int(refused.headers["retry-after"]) <= 20
        plain, streamed = (call.result() for call in running)
        assert plain.status_code == 200 and plain.json()["usage"]["completion_tokens"] == 80
        assert "event: done" in streamed.text
        assert server.exit_status() == 0


def test_what_outlives_the_drain_is_told_and_the_process_still_exits_0() -> None:
    with process("slow", "--drain-seconds", "0.5") as server, ThreadPoolExecutor(2) as pool:
        url = server.wait_ready()
        body = {"prompt": "x", "max_new_tokens": 1000}
        plain = pool.submit(httpx2.post, url + "/v1/generate", json=body, timeout=60)
        streamed = pool.submit(httpx2.post, url + "/v1/generate", json={**body, "stream": True}, timeout=60)
        wait_for(lambda: 'running_requests{model="dec"} 2' in httpx2.get(url + "/metrics").text)
        server.popen.terminate()
        assert plain.result().status_code == 503 and plain.result().json()["code"] == "draining"
        assert "event: error" in streamed.result().text and "draining" in streamed.result().text
        assert server.exit_status() == 0


def test_the_port_is_open_while_models_load_and_a_signal_ends_that_too() -> None:
    with process("never") as server:
        url = server.url
        assert httpx2.get(url + "/livez").status_code == 200
        for path in ("/readyz", "/health"):
            ready = httpx2.get(url + path)
            assert (
                ready.status_code == 503
                and ready.json()["code"] == "loading"
                and "retry-after" in ready.headers
            )
        work = httpx2.post(url + "/v1/encode", json={"input": "x"})
        assert work.status_code == 503 and work.json()["code"] == "loading"
        assert httpx2.get(url + "/v1/models").json()["data"] == []
        server.popen.terminate()
        assert server.exit_status() == 0


@pytest.mark.parametrize(("mode", "words"), [("broken", "convert it to safetensors"), ("crash", "KeyError")])
def test_models_that_cannot_be_loaded_end_the_process_with_a_message(mode: str, words: str) -> None:
    with process(mode) as server:
        assert server.exit_status() == 1
        wait_for(lambda: server.said(words))
        assert not server.said("Traceback")


def test_a_port_in_use_is_said_in_a_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with process("fast", "--port", port) as server:
            assert server.exit_status() == 2
            wait_for(lambda: server.said(f"cannot listen on 127.0.0.1:{port}"))
            assert server.said("--port") and not server.said("Traceback")


def test_logs_hold_no_prompt_and_no_key() -> None:
    with process("fast", "--api-key", "s3cret-key", "--log-level", "debug") as server:
        url = server.wait_ready()
        headers = {"authorization": "Bearer s3cret-key"}
        for path, body in (
            ("/v1/encode", {"input": "canary one"}),
            ("/v1/encode", {"input": ["canary two", 3]}),
            ("/v1/generate", {"prompt": "canary three", "max_new_tokens": 2, "stream": True}),
            ("/v1/encode", {"input": "canary four", "attention": "canary"}),
        ):
            httpx2.post(url + path, json=body, headers=headers)
        httpx2.get(url + "/v1/models?q=canary", headers={"authorization": "Bearer canary-key"})
        wait_for(lambda: sum('"path": "/v1/' in line for line in server.lines) == 5)
        server.popen.terminate()
        assert server.exit_status() == 0
        text = "\n".join(server.lines)
        assert "canary" not in text and "s3cret" not in text
        access = [json.loads(line) for line in server.lines if '"path": "/v1/encode"' in line]
        assert {"request_id", "method", "status", "duration_ms", "model", "attention"} <= set(access[0])
        assert [line["status"] for line in access] == [200, 400, 400]


def raw_exchange(url: str, data: bytes, pause_s: float = 0.0) -> bytes:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        received = b""
        try:
            for start in range(0, len(data), 1 << 16):
                connection.sendall(data[start : start + (1 << 16)])
            time.sleep(pause_s)
            while chunk := connection.recv(1 << 16):
                received += chunk
        except (ConnectionResetError, BrokenPipeError):
            pass
        return received


def test_floods_and_oddities_on_the_wire_do_not_harm_the_server() -> None:
    with process("fast", "--body-timeout-s", "0.5") as server:
        url = server.wait_ready()
        flood = b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Big: " + b"a" * (20 << 20) + b"\r\n\r\n"
        assert b"200" not in raw_exchange(url, flood)[:20]
        many = (
            b"GET /livez HTTP/1.1\r\nHost: x\r\n"
            + b"".join(b"x-%d: y\r\n" % i for i in range(100_000))
            + b"\r\n"
        )
        assert b"200" not in raw_exchange(url, many)[:20]
        assert raw_exchange(url, b"nonsense\r\n\r\n").startswith(b"HTTP/1.1 400")
        head = b"POST /v1/encode HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        assert raw_exchange(url, head + b"Content-Length: 99\r\n\r\n{").startswith(b"HTTP/1.1 408")
        host = (
            b"POST /v1/encode HTTP/1.1\r\nHost: evil/livez?\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        )
        assert raw_exchange(url, host).startswith(b"HTTP/1.1 415")
        upgrade = (
            b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: upgrade, close\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        assert raw_exchange(url, upgrade).startswith(b"HTTP/1.1 200")
        big = b'{"input": "' + b"a" * (20 << 20) + b'"}'
        kind = {"content-type": "application/json"}
        pieces = (big[start : start + (1 << 16)] for start in range(0, len(big), 1 << 16))
        for content in (big, pieces):
            answer = httpx2.post(url + "/v1/encode", content=content, headers=kind, timeout=60)
            assert answer.status_code == 413 and answer.json()["code"] == "body_too_large"
        assert httpx2.post(url + "/v1/encode", json={"input": "x"}).status_code == 200
