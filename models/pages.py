"""The memory behind a network's caches: pages of 128 positions in arenas.

An arena is one buffer of n pages, laid out layer by layer as keys [Hk, n * 128, D], then values
[Hk, n * 128, Dv]: consecutive pages are a view of each layer, [Hk, M, D]. A page is

    held      by sequences whose page tables have it (a shared page counts once)
    cached    held by nobody, known to the prefix index; evicted least recently used first
    free      neither

Memory goes back to the system at once: an arena of nothing but free pages as a whole, free pages of another
where the system takes them one by one (``Arena.cool``). ``SPARE_BYTES`` of each may stay, so that short
requests find warm memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from threading import Lock

import torch

from models.arena import PAGE_TOKENS, Arena, LayerShape, LayerViews, Page, reserves_addresses
from models.contract import CacheUse
from models.prefix import PrefixIndex

SMALLEST_ARENA_PAGES = 8
SMALLEST_ARENA_BYTES = 16 << 20
"""A short sequence asks for an arena of 8 pages, or as many as 16 MiB hold, but at least what it needs."""

RESERVED_PAGES = 512
RESERVED_BYTES = 512 << 20
"""The same where an arena is addresses, which become memory as they are written: sequences that share an
arena write their new rows in one copy."""

SPARE_BYTES = 64 << 20

COPIES_PER_READ = 64
"""Pages that are copied in the time in which one is read by the network: 2 x parameters operations a token
against two passes over its keys and values. 100 to 150 on the demo decoder; fewer where a token's keys are
larger beside its network."""


class PagePool:
    """Pages of one network. Any thread may call; nothing is copied while the lock is held."""

    def __init__(self, shapes: Sequence[LayerShape], dtype: torch.dtype, device: torch.device) -> None:
        self.shapes, self.dtype, self.device = tuple(shapes), dtype, device
        elements = sum(shape.elements_per_token for shape in self.shapes)
        self.page_bytes = elements * PAGE_TOKENS * dtype.itemsize
        self._lock = Lock()
        self._index: PrefixIndex[Page] = PrefixIndex()
        self._arenas: dict[int, Arena] = {}
        self._abandoned: deque[list[Page]] = deque()
        self._max_cached_bytes = 0
        self._spare_bytes = SPARE_BYTES
        self._serial = self._clock = 0
        self._looked_up_tokens = self._found_tokens = self._evicted_pages = 0

    @property
    def caches(self) -> bool:
        """Whether pages are kept for prompts that begin alike."""
        return self._max_cached_bytes > 0

    def views(self, page: Page) -> LayerViews:
        """Keys and values of the whole arena in which ``page`` lies: its rows begin at number * 128."""
        return self._arenas[page.arena].views

    def allocate(self, count: int) -> list[Page]:
        """``count`` consecutive pages, held once: of the shortest free run that fits, else of a new arena.
        MemoryError where the system has none, not even without the cached pages."""
        if not count:
            return []
        with self._lock:
            self._collect()
            fitting = [(best, serial) for serial, a in self._arenas.items() if (best := a.free.best(count))]
            if fitting:
                (_, begin), serial = min(fitting)
                return self._take(self._arenas[serial], begin, count)
            return self._take(self._new_arena(count), 0, count)

    def extend(self, last: Page, prefix_pages: int, count: int) -> list[Page] | None:
        """The ``count`` pages that follow ``last`` in its arena, held once; None where they cannot be had.

        Cached pages give way where reading them anew costs less than copying the ``prefix_pages`` up to
        ``last`` to where there is room.
        """
        if not count:
            return []
        with self._lock:
            self._collect()
            arena, begin = self._arenas[last.arena], last.number + 1
            pages = arena.pages[begin : begin + count]
            cached = [page for page in pages if not page.holders and page.key is not None]
            in_the_way = any(page.holders for page in pages) or len(pages) < count
            if in_the_way or len(cached) * COPIES_PER_READ > prefix_pages:
                return None
            for page in cached:
                if page.key is not None:  # it may have gone with one before it
                    self._evict(page.key)
            return self._take(arena, begin, count)

    def hold(self, pages: Sequence[Page]) -> None:
        """One more sequence has these pages."""
        with self._lock:
            self._hold(pages)

    def release(self, pages: Sequence[Page], keys: Sequence[bytes] = ()) -> None:
        """A sequence gives its pages back. ``keys``: the chain that it used until now."""
        with self._lock:
            self._release(pages)
            self._index.touch(keys)
            gone = self._trim()
        del gone  # an arena goes when the lock is free: giving back some GB takes time

    def abandon(self, pages: list[Page]) -> None:
        """As ``release``, for the garbage collector, which may run while the lock is held."""
        self._abandoned.append(pages)
        if self._lock.acquire(blocking=False):
            try:
                self._trim()
            finally:
                self._lock.release()

    def move(self, old: Sequence[Page], new: Sequence[Page]) -> None:
        """``new``, which the caller holds, has the content of ``old``, which it gives back. What nobody else
        holds of ``old`` is free, and the index knows ``new`` in its stead."""
        with self._lock:
            for before, after in zip(old, new, strict=True):
                if before.holders == 1 and before.key is not None:
                    self._index.replace(before.key, after)
                    before.key, after.key = None, before.key
            self._release(old)
            gone = self._trim()
        del gone

    def find(self, keys: Sequence[bytes]) -> int:
        """How many pages of this chain are there."""
        with self._lock:
            return len(self._index.find(keys))

    def attach(self, keys: Sequence[bytes], multiple: int, tokens: int) -> list[Page]:
        """Hold the longest beginning of a chain that is there, a multiple of so many pages. ``tokens`` of a
        prompt are counted as looked up."""
        with self._lock:
            pages = self._index.find(keys)
            pages = pages[: len(pages) // multiple * multiple]
            self._hold(pages)
            self._index.touch(keys)
            self._looked_up_tokens += tokens
            self._found_tokens += len(pages) * PAGE_TOKENS
            return pages

    def publish(self, keys: Sequence[bytes], pages: Sequence[Page]) -> None:
        """Full pages that the caller holds and never writes again, and their chain from its beginning. Where
        a key is known the older page stays."""
        with self._lock:
            if not self._max_cached_bytes:
                return
            known = len(keys)
            while known and keys[known - 1] not in self._index:
                known -= 1
            for i in range(known, len(keys)):
                self._index.add(keys[i], keys[i - 1] if i else None, pages[i])
                pages[i].key = keys[i]

    def limit_cached(self, max_bytes: int) -> None:
        """Cached pages take no more than so many bytes; where free pages cannot be given back one by one,
        neither do arenas that are there for cached pages alone. 0: nothing is remembered any more."""
        with self._lock:
            self._max_cached_bytes = max_bytes
            if not max_bytes:
                self._forget()
            gone = self._trim()
        del gone

    def close(self) -> None:
        """Nothing stays that no sequence holds, now and later."""
        self._spare_bytes = 0
        self.limit_cached(0)

    def use(self) -> CacheUse:
        with self._lock:
            self._collect()
            arenas = self._arenas.values()
            return CacheUse(
                held_bytes=sum(arena.num_held for arena in arenas) * self.page_bytes,
                cached_bytes=self._index.num_resting * self.page_bytes,
                free_bytes=sum(arena.num_kept_free for arena in arenas) * self.page_bytes,
                looked_up_tokens=self._looked_up_tokens,
                found_tokens=self._found_tokens,
                evicted_pages=self._evicted_pages,
            )

    def check(self) -> None:
        """Recount everything. AssertionError where a page is in two places or a count is wrong."""
        with self._lock:
            for arena in self._arenas.values():
                free = [page for page in arena.pages if page.is_free]
                assert arena.free.numbers() == [page.number for page in free]
                assert arena.num_free == len(free) and arena.num_warm == sum(page.warm for page in free)
                assert arena.num_held == sum(page.holders > 0 for page in arena.pages)
            pages = [page for arena in self._arenas.values() for page in arena.pages]
            known = {page.key: page for page in pages if page.key is not None}
            assert known == self._index.pages() and all(page.holders >= 0 for page in pages)
            resting = sum(page.holders == 0 for page in known.values())
            assert resting == self._index.num_resting

    def is_idle(self) -> bool:
        """Whether every page of every arena is free."""
        self.check()
        return all(arena.is_empty for arena in self._arenas.values())

    def _new_arena(self, count: int) -> Arena:
        wanted = max(count, self._smallest_arena())
        self._serial += 1
        try:
            arena = Arena(self._serial, wanted, self.shapes, self.dtype, self.device)
        except MemoryError:
            while (oldest := self._index.oldest()) is not None:
                self._evict(oldest)
            self._drop_arenas(0)
            arena = Arena(self._serial, count, self.shapes, self.dtype, self.device)
        self._arenas[self._serial] = arena
        return arena

    def _smallest_arena(self) -> int:
        """Pages."""
        if reserves_addresses(self.device):
            return min(RESERVED_PAGES, RESERVED_BYTES // max(self.page_bytes, 1))
        return min(SMALLEST_ARENA_PAGES, SMALLEST_ARENA_BYTES // max(self.page_bytes, 1))

    def _take(self, arena: Arena, begin: int, count: int) -> list[Page]:
        arena.free.take(begin, count)
        arena.num_free -= count
        arena.num_held += count
        taken = list(arena.pages[begin : begin + count])
        for page in taken:
            arena.num_warm -= page.warm
            page.holders, page.warm = 1, True
        return taken

    def _hold(self, pages: Sequence[Page]) -> None:
        for page in pages:
            if not page.holders:
                self._arenas[page.arena].num_held += 1
                if page.key is not None:
                    self._index.hold(page.key)
            page.holders += 1

    def _release(self, pages: Sequence[Page]) -> None:
        """The last first: the end of a text ages before its beginning."""
        self._clock += 1
        for page in reversed(pages):
            page.holders -= 1
            if page.holders:
                continue
            arena = self._arenas[page.arena]
            arena.num_held -= 1
            arena.last_use = self._clock
            if page.key is None:
                self._free(arena, page)
            else:
                self._index.rest(page.key)

    def _free(self, arena: Arena, page: Page) -> None:
        arena.free.give(page.number)
        arena.num_free += 1
        arena.num_warm += page.warm

    def _collect(self) -> None:
        while self._abandoned:
            self._release(self._abandoned.popleft())

    def _evict(self, key: bytes) -> None:
        for page in self._index.remove(key):
            page.key = None
            if not page.holders:
                self._free(self._arenas[page.arena], page)
                self._evicted_pages += 1

    def _forget(self) -> None:
        for key in self._index.pages():
            if key in self._index:  # it may have gone with one before it
                self._evict(key)

    def _trim(self) -> list[Arena]:
        """Keep the limit, and give back what is free; arenas that go, for the caller to drop."""
        self._collect()
        while self._index.num_resting * self.page_bytes > self._max_cached_bytes:
            oldest = self._index.oldest()
            assert oldest is not None
            self._evict(oldest)
        for arena in self._beyond(self._max_cached_bytes):
            for page in arena.pages:
                if page.key is not None:
                    self._evict(page.key)
        gone = self._drop_arenas(self._spare_bytes)
        in_use = [arena for arena in self._arenas.values() if not arena.is_empty]
        if sum(arena.num_warm for arena in in_use) * self.page_bytes > self._spare_bytes:
            for arena in in_use:
                arena.cool()
        return gone

    def _beyond(self, max_bytes: int) -> list[Arena]:
        """Arenas that keep all their memory and are there for cached pages alone: the least recently used of
        them that together take more than ``max_bytes``."""
        kept = [a for a in self._arenas.values() if a.num_cached and not a.num_held and not a.can_cool]
        kept.sort(key=lambda arena: arena.last_use, reverse=True)
        total, beyond = 0, []
        for arena in kept:
            total += len(arena.pages) * self.page_bytes
            if total > max_bytes:
                beyond.append(arena)
        return beyond

    def _drop_arenas(self, spare_bytes: int) -> list[Arena]:
        empty = [(a.num_kept_free, serial) for serial, a in self._arenas.items() if a.is_empty]
        gone, kept = [], 0
        for num_pages, serial in sorted(empty):
            kept += num_pages * self.page_bytes
            if kept > spare_bytes or not num_pages:
                gone.append(self._arenas.pop(serial))
        return gone
