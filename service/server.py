"""The process: a socket, uvicorn around the application, and a stop that lets running requests finish.

uvicorn closes its socket at the first signal; here a signal first turns readiness off and new work away,
and the socket closes when nothing is in flight any more or ``drain_seconds`` have passed."""

from __future__ import annotations

import os
import socket
import sys
from importlib.metadata import PackageNotFoundError, distribution
from types import FrameType

import uvicorn

from service import loading, logs
from service.app import Start, create_app
from service.runtime import Runtime
from service.settings import ConfigError, Settings, resolved

EXIT_OK, EXIT_FAILED = 0, 1
LAST_ANSWERS_S = 5


class Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, runtime: Runtime) -> None:
        super().__init__(config)
        self.runtime = runtime
        self._signals = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain. Second: stop now. Only counted here: a signal may interrupt any lock's
        holder."""
        self._signals += 1

    async def on_tick(self, counter: int) -> bool:
        runtime = self.runtime
        if self._signals and runtime.drain_until is None:
            runtime.begin_drain()
            drain_s = runtime.settings.drain_seconds
            loading.say(f"stopping: {runtime.in_flight} requests in flight, {drain_s:g} s to finish")
        if runtime.drain_until is not None:
            overdue = runtime.clock() >= runtime.drain_until
            if overdue or self._signals > 1:
                runtime.engine.abort()
            self.should_exit = overdue or self._signals > 1 or runtime.in_flight == 0
        if runtime.failure is not None:
            self.should_exit = True
        return await super().on_tick(counter)


def refuse_other_kernels() -> None:
    """Hugging Face's distribution ``kernels`` has the import name of our package: only one can be in a
    process."""
    try:
        found = distribution("kernels")
    except PackageNotFoundError:
        return
    raise ConfigError(
        f"the distribution 'kernels' {found.version} (Hugging Face) is installed in this environment and "
        "would be confused with Longreach's own package of that name. Remove it (pip uninstall kernels) or "
        "install Longreach in an environment of its own."
    )


def open_socket(settings: Settings) -> socket.socket:
    """The listening socket. ConfigError where the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(2048)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}. "
            "Choose another address with --host and --port (LONGREACH_HOST, LONGREACH_PORT); port 0 takes a "
            "free one."
        ) from None
    return listener


def serve(settings: Settings, start: Start = loading.start) -> int:
    """Serve until a signal; returns the exit status."""
    logs.configure(settings.log_level)
    refuse_other_kernels()
    settings = resolved(settings)
    listener = open_socket(settings)
    app = create_app(settings, start=start)
    runtime: Runtime = app.state.runtime
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=LAST_ANSWERS_S,
    )
    loading.say(f"listening on {address_of(listener)} (loading; /readyz tells when ready)")
    Server(config, runtime).run(sockets=[listener])
    if runtime.failure is not None:
        loading.say(f"error: {runtime.failure}")
        return EXIT_FAILED
    loading.say("stopped")
    return EXIT_OK


def address_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def leave(status: int) -> None:
    """Exit at once: a thread that still loads or computes must not hold or crash the interpreter's own
    exit."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
