"""A bounded, thread-safe cache for selection plans: what a fixed pattern needs to know before it sees any
data.

An entry's key must hold everything that the entry depends on, and nothing else, so that layers, chunks and
sequences share what they can.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Protocol, TypeVar, cast


class Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=Sized)
_ENTRY_BYTES = 512
_MISSES_REMEMBERED = 2048


class BoundedCache:
    """Least recently used entries leave when the sum of their ``nbytes`` passes ``max_bytes``.

    An entry larger than the whole cache is built and handed out, but not kept. What may well be asked for
    only once is kept ``from_second_use``: where the same key was missing before, not too long ago.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.held_bytes = 0
        self._entries: OrderedDict[Hashable, tuple[Sized, int]] = OrderedDict()
        self._missed: OrderedDict[int, None] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable, build: Callable[[], T], *, from_second_use: bool = False) -> T:
        """The entry of that key, built where it is missing. Two threads may build the same one; one stays."""
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                self._entries.move_to_end(key)
                return cast(T, found[0])
            keep = not from_second_use or self._was_missed(hash(key))
        value = build()
        if keep:
            self._keep(key, value, value.nbytes + _ENTRY_BYTES)
        return value

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._missed.clear()
            self.held_bytes = 0

    def _was_missed(self, key: int) -> bool:
        """Was it missing before? It is remembered that it is now: of what comes once, a number stays."""
        before = key in self._missed
        self._missed[key] = None
        self._missed.move_to_end(key)
        if len(self._missed) > _MISSES_REMEMBERED:
            self._missed.popitem(last=False)
        return before

    def _keep(self, key: Hashable, value: Sized, size: int) -> None:
        with self._lock:
            if size > self.max_bytes or key in self._entries:
                return
            self._entries[key] = (value, size)
            self.held_bytes += size
            while self.held_bytes > self.max_bytes:
                _, (_, freed) = self._entries.popitem(last=False)
                self.held_bytes -= freed


PLANS = BoundedCache(64 << 20)
"""Which panels each query tile reads, per pattern, place and length."""
MASKS = BoundedCache(128 << 20)
"""Masks of panel edges by their shape alone: most tiles of a pattern share a few."""
DRAWS = BoundedCache(128 << 20)
"""Random keys per (seed, layer, rows), random projections per (seed, layer)."""
CACHES = {"plans": PLANS, "masks": MASKS, "draws": DRAWS}
