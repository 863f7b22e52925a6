"""One buffer of pages: what every layer of a network caches for n * 128 positions."""

from __future__ import annotations

import sys
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from mmap import MADV_DONTNEED, MAP_ANONYMOUS, MAP_PRIVATE, PAGESIZE, mmap

import torch
from torch import Tensor

PAGE_TOKENS = 128
"""Positions of a page: a multiple of every block that a sparse attention chooses by."""

LayerViews = tuple[tuple[Tensor, Tensor], ...]
"""Layer by layer keys [Hk, positions, D] and values [Hk, positions, Dv]."""


@dataclass(frozen=True)
class LayerShape:
    """Hk key heads, D head_dim of the keys, Dv of the values: what one attention layer caches per token."""

    num_kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def elements_per_token(self) -> int:
        return self.num_kv_heads * (self.key_dim + self.value_dim)


@dataclass(slots=True, eq=False)
class Page:
    """A page's place, how many sequences hold it, and its key in the prefix index if it is known there.
    ``warm``: it may have been written since its memory came from the system."""

    arena: int
    number: int
    holders: int = 0
    key: bytes | None = None
    warm: bool = False

    @property
    def is_free(self) -> bool:
        return not self.holders and self.key is None

    def is_before(self, other: Page) -> bool:
        """Whether ``other`` follows directly in the same arena."""
        return (self.arena, self.number + 1) == (other.arena, other.number)


class FreeRuns:
    """Free page numbers of one arena, as runs [begin, stop) that never touch each other."""

    def __init__(self, num_pages: int) -> None:
        self._runs = [(0, num_pages)]

    def best(self, count: int) -> tuple[int, int] | None:
        """(length, begin) of the shortest run of at least ``count`` pages."""
        fitting = [(stop - begin, begin) for begin, stop in self._runs if stop - begin >= count]
        return min(fitting, default=None)

    def take(self, begin: int, count: int) -> None:
        """``count`` free pages from ``begin`` on are no longer free."""
        i = bisect(self._runs, begin, key=lambda run: run[0]) - 1
        first, last = self._runs[i]
        left = [(first, begin), (begin + count, last)]
        self._runs[i : i + 1] = [run for run in left if run[0] < run[1]]

    def give(self, number: int) -> None:
        """A page is free again."""
        begin, stop = number, number + 1
        i = bisect(self._runs, begin, key=lambda run: run[0])
        if i < len(self._runs) and self._runs[i][0] == stop:
            stop = self._runs.pop(i)[1]
        if i and self._runs[i - 1][1] == begin:
            i -= 1
            begin = self._runs.pop(i)[0]
        self._runs.insert(i, (begin, stop))

    def runs(self) -> list[tuple[int, int]]:
        """All of them in order, [begin, stop) each."""
        return list(self._runs)

    def numbers(self) -> list[int]:
        return [number for begin, stop in self._runs for number in range(begin, stop)]


class Arena:
    """``pages`` and the layers' ``views`` of all of them, and what the pool counts.

    On Linux a CPU's arena is mapped for itself alone: memory that no token has reached is never touched, and
    goes back to the system page by page (``cool``) or with the arena, where an allocator's heap would keep
    holes.
    """

    def __init__(
        self,
        serial: int,
        num_pages: int,
        shapes: Sequence[LayerShape],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """MemoryError where the system or the device has no room."""
        self._shapes, self._itemsize = tuple(shapes), dtype.itemsize
        self._positions = num_pages * PAGE_TOKENS
        elements = self._positions * sum(shape.elements_per_token for shape in self._shapes)
        self._mapped = _map(max(elements * dtype.itemsize, 1), device)
        self.views = self._cut(_buffer(self._mapped, elements, dtype, device))
        self.pages = tuple(Page(serial, number) for number in range(num_pages))
        self.free = FreeRuns(num_pages)
        self.num_free = num_pages
        self.num_held = 0
        self.num_warm = 0
        """Of the free pages."""
        self.last_use = 0

    @property
    def num_cached(self) -> int:
        return len(self.pages) - self.num_free - self.num_held

    @property
    def is_empty(self) -> bool:
        return self.num_free == len(self.pages)

    @property
    def can_cool(self) -> bool:
        return self._mapped is not None

    @property
    def num_kept_free(self) -> int:
        """Free pages that take up memory."""
        return self.num_warm if self.can_cool else self.num_free

    def cool(self) -> None:
        """Free pages keep their place and give their memory back to the system."""
        if self._mapped is None or not self.num_warm:
            return
        for begin, stop in self.free.runs():
            if any(page.warm for page in self.pages[begin:stop]):
                self._discard(self._mapped, begin, stop)
            for page in self.pages[begin:stop]:
                page.warm = False
        self.num_warm = 0

    def _discard(self, mapped: mmap, begin: int, stop: int) -> None:
        base = 0
        for shape in self._shapes:
            for width in (shape.key_dim, shape.value_dim):
                row_bytes = width * self._itemsize
                for _ in range(shape.num_kv_heads):
                    first = -(-(base + begin * PAGE_TOKENS * row_bytes) // PAGESIZE) * PAGESIZE
                    last = (base + stop * PAGE_TOKENS * row_bytes) // PAGESIZE * PAGESIZE
                    if first < last:
                        mapped.madvise(MADV_DONTNEED, first, last - first)
                    base += self._positions * row_bytes

    def _cut(self, buffer: Tensor) -> LayerViews:
        offset = 0

        def take(heads: int, width: int) -> Tensor:
            nonlocal offset
            size = heads * self._positions * width
            offset += size
            return buffer[offset - size : offset].view(heads, self._positions, width)

        return tuple(
            (take(shape.num_kv_heads, shape.key_dim), take(shape.num_kv_heads, shape.value_dim))
            for shape in self._shapes
        )


def reserves_addresses(device: torch.device) -> bool:
    """Whether an arena's memory comes from the system page by page, as it is written."""
    return device.type == "cpu" and sys.platform == "linux"


def _map(num_bytes: int, device: torch.device) -> mmap | None:
    if not reserves_addresses(device):
        return None
    try:
        return mmap(-1, num_bytes, flags=MAP_PRIVATE | MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"no room for {num_bytes} bytes of keys and values: {error}") from error


def _buffer(mapped: mmap | None, elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Not an inference tensor: steps write in inference mode, others outside."""
    with torch.inference_mode(False):
        if mapped is not None:
            return torch.frombuffer(mapped, dtype=dtype, count=elements) if elements else torch.empty(0)
        try:
            return torch.empty(elements, dtype=dtype, device=device)
        except RuntimeError as error:
            size = elements * dtype.itemsize
            raise MemoryError(f"no room for {size} bytes of keys and values: {error}") from error
