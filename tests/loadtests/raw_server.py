"""A socket that answers one connection with fixed bytes, or not at all."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def raw_server(answer: bytes, hold: bool = False) -> Iterator[tuple[str, list[bytes]]]:
    """Its address, and what it received until the client had sent all or was silent for a moment; with
    ``hold`` nothing is answered and the connection stays open until the client leaves."""
    received = [b""]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=_answer, args=(listener, answer, hold, received))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", received
        thread.join(20)


def _answer(listener: socket.socket, answer: bytes, hold: bool, received: list[bytes]) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.settimeout(10 if hold else 0.1)
        try:
            while part := connection.recv(1 << 16):
                received[0] += part
        except OSError:  # silence, or a reset
            pass
        if not hold:
            connection.sendall(answer)
