"""What backends keep beside one sequence's cache, for one layer, from call to call.

A state tells something about the first ``length`` keys: a running sum, a code for each. It spares a decode
step from reading them again, and a result never depends on it: what is missing is computed from the keys.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from threading import Lock
from typing import Protocol, TypeVar, cast


class State(Protocol):
    @property
    def nbytes(self) -> int:
        """Bytes that it holds now."""

    def truncate(self, length: int) -> None:
        """Forget what depends on keys at ``length`` or later: other tokens may take their places."""


S = TypeVar("S", bound=State)


class KeptStates:
    """The states of one sequence's layer, by what they depend on: backend, params, seed."""

    def __init__(self) -> None:
        self._states: dict[Hashable, State] = {}
        self._lock = Lock()

    def get(self, key: Hashable, build: Callable[[], S]) -> S:
        """The state of that key, empty and new where there is none. ``key`` must hold everything that the
        state depends on beside the keys themselves."""
        with self._lock:
            if key not in self._states:
                self._states[key] = build()
            return cast(S, self._states[key])

    def truncate(self, length: int) -> None:
        with self._lock:
            for state in self._states.values():
                state.truncate(length)

    @property
    def nbytes(self) -> int:
        with self._lock:
            return sum(state.nbytes for state in self._states.values())
