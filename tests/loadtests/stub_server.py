"""A server with the shapes of the real one and no models: what the load tests need to be tested against.

A token is four characters. ``Stub.faults`` names what it does wrong, so that every verdict can be provoked.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BACKENDS = ["exact", "window", "sinks", "star"]
MODELS = [
    {"id": "encoder", "tasks": ["encode"], "max_tokens": 512, "backends": ["exact", "window"]},
    {
        "id": "decoder",
        "tasks": ["generate", "score"],
        "max_tokens": 4096,
        "backends": ["exact", "window", "sinks"],
    },
]
DENSITY = {"exact": 1.0, "window": 0.25, "sinks": 0.125, "star": 0.0625}


class Stub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, faults: set[str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults = faults
        self.lock = threading.Lock()
        self.num_posts = 0
        self.in_flight = 0
        self.most_in_flight = 0
        self.bodies: list[tuple[str, dict[str, Any]]] = []
        self.authorizations: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is part of the test, not news."""


@contextmanager
def stub_server(*faults: str) -> Iterator[Stub]:
    stub = Stub(set(faults))
    thread = threading.Thread(target=stub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        stub.shutdown()
        stub.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    server: Stub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""

    def do_GET(self) -> None:
        if self.path == "/livez":
            self._send(500 if "dying" in self.server.faults else 200, {"status": "alive"})
        elif self.path == "/readyz":
            self._send(503 if "loading" in self.server.faults else 200, {"status": "ready"})
        elif self.path == "/v1/models":
            self._send(200, {"object": "list", "data": MODELS})
        elif self.path == "/v1/attention/backends":
            self._send(200, {"object": "list", "data": [{"name": name} for name in BACKENDS]})
        else:
            self._send(404, {"code": "not_found", "detail": self.path})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.num_posts += 1
            turn = self.server.num_posts
            self.server.in_flight += 1
            self.server.most_in_flight = max(self.server.most_in_flight, self.server.in_flight)
            self.server.bodies.append((self.path, body))
            self.server.authorizations.add(self.headers["Authorization"])
        try:
            self._answer(self.path.removeprefix("/v1/"), body, turn)
        finally:
            with self.server.lock:
                self.server.in_flight -= 1

    def _answer(self, endpoint: str, body: dict[str, Any], turn: int) -> None:
        faults = self.server.faults
        warm_up = turn <= 2  # a call to each model, with which a run learns how long a token is
        if "slow" in faults and not warm_up:
            time.sleep(0.5)
        if "busy" in faults and turn % 3 == 0 and not warm_up:
            return self._send(429, _problem("queue_full"), {"Retry-After": "0"})
        if "busy for ever" in faults and not warm_up:
            return self._send(429, _problem("queue_full"))
        if "small" in faults and not warm_up and body["attention"]["backend"] == "exact":
            return self._send(413, _problem("never_fits_memory"))
        if "broken" in faults and not warm_up:
            return self._send(500, _problem("internal_error"))
        text = body.get("prompt") or body["input"]
        used = "exact" if "substitutes" in faults and not warm_up else body["attention"]["backend"]
        answer = {
            "model": body["model"],
            "usage": {"prompt_tokens": max(1, len(text) // 4), "completion_tokens": 0},
            "attention": {"requested": body["attention"]["backend"], "used": used, "density": DENSITY[used]},
        }
        if endpoint == "generate" and body.get("stream"):
            return self._stream(answer, body["max_new_tokens"])
        if endpoint == "encode":
            answer["data"] = [{"embedding": [0.6, 0.8], "tokens": 1, "truncated_tokens": 0}]
        elif endpoint == "score":
            answer["data"] = [{"token_logprobs": [None, -1.0], "perplexity": 2.7}]
        self._send(200, answer)

    def _send(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        payload = json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def _stream(self, answer: dict[str, Any], num_tokens: int) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._chunk(": keep-alive\n\n")
        for index in range(num_tokens):
            self._event("token", {"index": 0, "text": "é", "token_id": index})
            if index == 0 and "pauses" in self.server.faults:
                time.sleep(0.4)
            if "cut off" in self.server.faults and index == 1:
                self.close_connection = True
                return
        if "stream error" in self.server.faults:
            self._event("error", _problem("deadline_exceeded"))
        else:
            answer["usage"]["completion_tokens"] = num_tokens
            self._event("done", answer | {"finish_reason": "length"})
        self.wfile.write(b"0\r\n\r\n")

    def _event(self, name: str, data: dict[str, Any]) -> None:
        self._chunk(f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n")

    def _chunk(self, text: str) -> None:
        payload = text.encode()
        self.wfile.write(f"{len(payload):x}\r\n".encode() + payload + b"\r\n")
        self.wfile.flush()


def _problem(code: str) -> dict[str, Any]:
    return {"code": code, "detail": f"this is {code}"}
