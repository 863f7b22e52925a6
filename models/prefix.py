"""Which page of the cache holds which beginning of a text.

    key_0 = H(root, tokens of page 0)        key_i = H(key_(i - 1), tokens of page i)

so a page's key stands for everything up to its last token. Where a row's choice of keys looks at its whole
query tile, a page depends on all tokens of the tile: page i then takes those of its whole unit of pages. The
root stands for all else that keys and values depend on: the attention with its params, the seed where it
matters, a salt that keeps strangers apart. H is BLAKE2b of 128 bits over the tokens as 64-bit integers;
Python's own hash differs from process to process and collides by design.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Generic, TypeVar

import numpy as np

KEY_BYTES = 16

P = TypeVar("P")


def root_key(*parts: Hashable) -> bytes:
    """One key for a tuple of plain values; ``repr`` keeps apart what differs in type or place."""
    return blake2b(repr(parts).encode(), digest_size=KEY_BYTES).digest()


class Chain:
    """The keys of a sequence's full pages, made as its tokens come in."""

    def __init__(
        self, root: bytes, page_tokens: int, keys: Sequence[bytes] = (), unit_pages: int = 1
    ) -> None:
        """``keys``: of the pages that the sequence begins with, whole units. Pages of a unit depend on each
        other's tokens: they get their keys when all of it is there."""
        self.keys = list(keys)
        self._last = self.keys[-1] if keys else root
        self._page_tokens, self._unit_pages = page_tokens, unit_pages
        self._rest: list[int] = []

    def append(self, token_ids: Sequence[int]) -> None:
        """The next tokens of the sequence."""
        size = self._page_tokens * self._unit_pages
        self._rest.extend(token_ids)
        full = len(self._rest) // size
        if not full:
            return
        units = np.asarray(self._rest[: full * size], dtype=np.int64).reshape(full, size)
        for tokens in map(np.ndarray.tobytes, units):
            for _ in range(self._unit_pages):
                self._last = blake2b(self._last + tokens, digest_size=KEY_BYTES).digest()
                self.keys.append(self._last)
        self._rest = self._rest[full * size :]

    def copy(self) -> Chain:
        """The same so far, to go its own way from here."""
        other = Chain(self._last, self._page_tokens, self.keys, self._unit_pages)
        other._rest = list(self._rest)
        return other


@dataclass(slots=True)
class _Entry(Generic[P]):
    page: P
    parent: bytes | None
    children: set[bytes] = field(default_factory=set)


class PrefixIndex(Generic[P]):
    """Key -> page. The parent of an entry is always there too: a page whose beginning is gone could never be
    found. Entries that nobody holds rest, in the order of their last use."""

    def __init__(self) -> None:
        self._entries: dict[bytes, _Entry[P]] = {}
        self._resting: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    @property
    def num_resting(self) -> int:
        return len(self._resting)

    def find(self, keys: Iterable[bytes]) -> list[P]:
        """The pages of the longest beginning of ``keys`` that is known."""
        found = []
        for key in keys:
            entry = self._entries.get(key)
            if entry is None:
                break
            found.append(entry.page)
        return found

    def add(self, key: bytes, parent: bytes | None, page: P) -> None:
        """A page that somebody holds, after ``parent`` (None: the first)."""
        if key in self._entries:
            raise ValueError("a key stands for one page. This is a bug.")
        if parent is not None:
            self._entries[parent].children.add(key)
        self._entries[key] = _Entry(page, parent)

    def replace(self, key: bytes, page: P) -> P:
        """Another page with the same content stands for ``key``; the one that did."""
        entry = self._entries[key]
        before, entry.page = entry.page, page
        return before

    def remove(self, key: bytes) -> list[P]:
        """Forget a page and all that continue it; the pages, children first."""
        found = [key]
        for each in found:  # grows while it is walked
            found.extend(self._entries[each].children)
        parent = self._entries[key].parent
        if parent is not None:
            self._entries[parent].children.discard(key)
        for each in found:
            self._resting.pop(each, None)
        return [self._entries.pop(each).page for each in reversed(found)]

    def rest(self, key: bytes) -> None:
        """Nobody holds it any more: it is the last to be evicted."""
        self._resting[key] = None
        self._resting.move_to_end(key)

    def hold(self, key: bytes) -> None:
        """Somebody holds it: it is not evicted."""
        self._resting.pop(key, None)

    def touch(self, keys: Sequence[bytes]) -> None:
        """A chain was used just now. Its end ages before its beginning."""
        for key in reversed(keys):
            if key in self._resting:
                self._resting.move_to_end(key)

    def oldest(self) -> bytes | None:
        """What to evict next; None where nothing rests."""
        return next(iter(self._resting), None)

    def pages(self) -> dict[bytes, P]:
        """Every page that is known, by its key."""
        return {key: entry.page for key, entry in self._entries.items()}
