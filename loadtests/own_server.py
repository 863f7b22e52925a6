"""A server of the script's own: started, told to stop while it answers, and waited for."""

from __future__ import annotations

import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep

from loadtests.client import Answer, Client
from loadtests.metrics import read_metrics, sum_of
from loadtests.server import Server, ServerProblem

STOP_SECONDS = 60.0
DEFAULT_COMMAND = f"{shlex.quote(sys.executable)} -m service.cli serve --prefix-cache-bytes {16 << 20}"
"""Its cache of prefixes is full before the first memory reading: what grows afterwards is something else."""


class OwnServer:
    def __init__(self, command: str, log: Path | None = None) -> None:
        self._port = _free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._log = open(log, "wb") if log else None  # noqa: SIM115 - closed by stop()
        out = self._log or subprocess.DEVNULL
        self.process = subprocess.Popen(
            [*shlex.split(command), "--port", str(self._port)], stdout=out, stderr=out
        )

    def wait_until_ready(self, wait_s: float) -> None:
        """ServerProblem where it stops, or is not ready in time."""
        end = monotonic() + wait_s
        while monotonic() < end:
            if self.process.poll() is not None:
                raise ServerProblem(f"the server stopped with {self.process.returncode} while it started")
            try:
                Server(self.url).call("/readyz")
                return
            except ServerProblem:
                sleep(0.3)
        raise ServerProblem(f"the server was not ready after {wait_s:g} s")

    def drains(self, body: dict[str, object], api_key: str) -> str:
        """SIGTERM once this request runs: "" where it is answered whole and the server ends with 0, else what
        went wrong."""
        path = "/v1/generate" if "prompt" in body else "/v1/encode"
        answers: list[Answer] = []
        asking = threading.Thread(target=lambda: answers.append(Client(self.url, api_key).post(path, body)))
        asking.start()
        self._wait_until_busy(asking)
        self.process.send_signal(signal.SIGTERM)
        asking.join(STOP_SECONDS)
        try:
            status = self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            return f"the server did not stop within {STOP_SECONDS:g} s of SIGTERM"
        if not answers or answers[0].problem:
            return f"the request in flight was not answered: {answers[0].problem if answers else 'silence'}"
        return "" if status == 0 else f"the server ended with {status}"

    def _wait_until_busy(self, asking: threading.Thread) -> None:
        end = monotonic() + STOP_SECONDS
        while asking.is_alive() and monotonic() < end:
            if sum_of(read_metrics(self.url), "longreach_running_requests"):
                return
            sleep(0.01)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self._log:
            self._log.close()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def own_server(command: str, wait_s: float, log: Path | None) -> Iterator[OwnServer]:
    """Ready to be asked; killed at the end where it still runs."""
    server = OwnServer(command, log)
    try:
        server.wait_until_ready(wait_s)
        yield server
    finally:
        server.stop()
