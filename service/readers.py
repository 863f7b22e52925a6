"""The threads that tokenise. A request counts as waiting until its thread is free again: a client that has
left does not make room for the next one while its text is still being read."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class Readers:
    def __init__(self, num_threads: int) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="longreach-worker-read")
        self._lock = threading.Lock()
        self._num_reading = 0

    @property
    def num_reading(self) -> int:
        """Texts that are read or wait for a thread."""
        return self._num_reading

    def submit(self, read: Callable[[], T]) -> Future[T]:
        """``read`` in a thread. Cancelling the future before it has begun takes it out of the count at
        once."""
        with self._lock:
            self._num_reading += 1
        try:
            reading = self._threads.submit(read)
        except BaseException:
            self._done(None)
            raise
        reading.add_done_callback(self._done)
        return reading

    def shutdown(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _done(self, reading: Future[Any] | None) -> None:
        with self._lock:
            self._num_reading -= 1
