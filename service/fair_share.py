"""Turns by time used: whoever has used least, relative to its weight, is next (start-time fair queueing:
Goyal et al., SIGCOMM 1996)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


class FairShare:
    """Milliseconds used by name, divided by the name's weight (1 where none is given)."""

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = weights or {}
        self._used: dict[str, float] = {}
        self._active: frozenset[str] = frozenset()

    def used(self, name: str) -> float:
        return self._used.get(name, 0.0)

    def charge(self, name: str, ms: float) -> None:
        self._used[name] = self.used(name) + ms / self._weights.get(name, 1.0)

    def level(self, active: Iterable[str]) -> None:
        """Only these want turns now. One that did not before starts level with the others: idle time is not a
        credit."""
        names = frozenset(active)
        staying = names & self._active
        floor = min(map(self.used, staying)) if staying else max(self._used.values(), default=0.0)
        for name in names - staying:
            self._used[name] = max(self.used(name), floor)
        self._active = names

    @property
    def names(self) -> tuple[str, ...]:
        """Everybody who has an account."""
        return tuple(self._used)

    @property
    def active(self) -> frozenset[str]:
        return self._active

    def order(self, names: Iterable[str]) -> list[str]:
        return sorted(names, key=lambda name: (self.used(name), name))

    def forget(self, name: str) -> None:
        self._used.pop(name, None)
        self._active -= {name}
