"""Keys and values of one sequence, held between steps, in pages of the network's pool.

A sequence takes its pages when it is first written: as many consecutive ones as its capacity asks for, so
that what the kernels read is a view: keys [1, Hk, M, D] of the first M positions. A sequence that goes on
from pages of others (a prompt that begins alike, a fork) has three ways, tried in this order:

    extended   the pages behind the shared ones are free: it takes those. Nothing is copied.
    moved      it takes a run for all its positions, and every layer's first write copies that layer's shared
               rows into it; then it lets the shared pages go. Scattered positions would be copied in every
               step: one copy pays from the first step on, and a forward can be left between the layers.
    gathered   memory for that run is not to be had: it takes pages for what follows alone, and every read
               copies.

Nothing is zeroed. Beside each layer's keys lie the summaries of their blocks, for attentions that choose
blocks by them, and the states that other attentions keep (running sums of features, hash codes).
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kernels.math.kept import KeptStates
from kernels.math.summaries import BlockSummaries
from models.arena import PAGE_TOKENS, LayerShape, LayerViews, Page
from models.pages import PagePool

CLOSED = "the sequence is closed: its cache was freed"

__all__ = ["Cache", "LayerShape", "Slot"]


@dataclass(frozen=True)
class Slot:
    """Where a new row goes: ``row`` of these keys and values, layer by layer, of a whole arena."""

    arena: LayerViews
    row: int


@dataclass(frozen=True)
class _Run:
    """Positions begin .. stop - 1 of a sequence in consecutive pages, and the views of these rows alone,
    [1, Hk, n, D]. Position ``begin`` is row ``first`` of the ``arena``."""

    begin: int
    stop: int
    arena: LayerViews
    first: int
    layers: LayerViews

    def rows(self, layer: int, begin: int, stop: int) -> tuple[Tensor, Tensor]:
        """Of those of its positions that lie in begin .. stop - 1: keys [Hk, n, D], values [Hk, n, Dv]."""
        keys, values = self.layers[layer]
        rows = slice(max(begin - self.begin, 0), max(stop - self.begin, 0))
        return keys[0, :, rows], values[0, :, rows]


class Cache:
    """The cache of one sequence. ``write`` places new rows, ``keys_values`` returns the first M.

    Rows beyond the sequence's length may be overwritten at any time, so a step that failed leaves no trace.
    The first ``length`` positions lie in ``pages`` already, which are held for this cache. Without a ``pool``
    it has one of its own.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        pool: PagePool | None = None,
        pages: Sequence[Page] = (),
        length: int = 0,
    ) -> None:
        self._pool = pool or PagePool(layers, dtype, device)
        self._shapes, self._dtype, self._device = tuple(layers), dtype, device
        self.capacity = capacity
        self._pages, self._shared_length = list(pages), length
        """The page table."""
        self._runs: list[_Run] = []
        self._moving: _Moving | None = None
        self._visible = length
        self._summaries: list[BlockSummaries] = []
        self._kept: list[KeptStates] = []
        self._owners: list[Hashable] = [None] * len(self._shapes)
        self._written = [length] * len(self._shapes)
        self._closed = False
        self._held = list(pages)
        self._finalizer = weakref.finalize(self, self._pool.abandon, self._held)
        self._finalizer.atexit = False

    @property
    def held_bytes(self) -> int:
        """Bytes that take up memory: of a CPU's pages the rows that have been written, by this sequence or by
        one whose pages it has, as the others were not touched for it; of any other device's whole pages; and
        the summaries and kept states."""
        if not self._held:
            return 0
        beside = sum(layer.nbytes for layer in self._summaries) + sum(layer.nbytes for layer in self._kept)
        if self._device.type != "cpu":
            return len(self._held) * self._pool.page_bytes + beside
        written = zip(self._shapes, self._written, strict=True)
        elements = sum(shape.elements_per_token * rows for shape, rows in written)
        return elements * self._dtype.itemsize + beside

    @property
    def shared_length(self) -> int:
        """Positions below lie in pages that others may read, and are written no more."""
        return self._visible

    def write(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        """Place k [Hk, n, D] and v [Hk, n, Dv] of one layer at positions start .. start + n - 1. What was
        known of positions beyond ``start`` is forgotten: a step that failed may be followed by other
        tokens."""
        if not self._runs:
            self._take_pages()
        if self._moving is not None:
            self._move(self._moving, layer)
        self.note_written(layer, start, start + k.shape[1])
        self._place(layer, start, k, v)

    def slot(self, position: int) -> Slot | None:
        """Where the row of a position goes in every layer, for a copy that places rows of many sequences at
        once; ``note_written`` is to be called for each. None where rows are on their way to other pages."""
        if not self._runs:
            self._take_pages()
        if self._moving is not None:
            return None
        run = next(run for run in self._runs if run.begin <= position < run.stop)
        return Slot(run.arena, run.first + position - run.begin)

    def note_written(self, layer: int, start: int, stop: int) -> None:
        """Positions start .. stop - 1 of a layer are written anew: nothing is known of them any more, nor of
        those that follow."""
        if self._closed:
            raise RuntimeError(CLOSED)
        if start < self._visible or stop > self.capacity:
            raise RuntimeError(f"positions {start} to {stop} are not for this sequence to write: a bug.")
        if start < self._written[layer]:
            self._summaries[layer].truncate(start)
            self._kept[layer].truncate(start)
        self._written[layer] = max(self._written[layer], stop)

    def keys_values(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """The first ``length`` positions: keys [1, Hk, length, D], values [1, Hk, length, Dv]. Views; copies
        where its pages are scattered. ``write`` comes first."""
        if len(self._runs) == 1:
            keys, values = self._runs[0].layers[layer]
            return keys.narrow(2, 0, length), values.narrow(2, 0, length)
        parts = [run.rows(layer, 0, length) for run in self._runs]
        keys, values = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        return keys[None], values[None]

    def summaries(self, layer: int) -> BlockSummaries:
        """What is known about the blocks of one layer's keys; kernels add to it. ``write`` comes first."""
        return self._summaries[layer]

    def kept(self, layer: int, owner: Hashable) -> KeptStates:
        """What backends keep of one layer's keys for ``owner``, the attention that reads them; kernels add to
        it. ``write`` comes first. A sequence that goes on under another attention than before rarely comes
        back: what was kept for the one before is dropped."""
        if self._owners[layer] != owner:
            self._owners[layer], self._kept[layer] = owner, KeptStates()
        return self._kept[layer]

    def publish(self, keys: Sequence[bytes]) -> None:
        """Its first ``len(keys)`` pages are full and may be found under these keys from now on."""
        self._pool.publish(keys, self._pages[: len(keys)])
        self._visible = max(self._visible, len(keys) * PAGE_TOKENS)

    def fork(self, capacity: int, length: int) -> Cache:
        """The cache of another sequence that begins with the first ``length`` positions of this one, which
        have been read. It holds their pages until it has its own; summaries and states are made anew."""
        if self._closed:
            raise RuntimeError(CLOSED)
        pages = self._pages[: _num_pages(length)]
        self._pool.hold(pages)
        return Cache(self._shapes, capacity, self._dtype, self._device, self._pool, pages, length)

    def close(self, keys: Sequence[bytes] = ()) -> None:
        """Give the pages back. ``keys``: the chain by which they may be found, which was in use until now.
        Idempotent."""
        self._closed = True
        self._pages, self._runs, self._moving = [], [], None
        self._summaries, self._kept = [], []
        self._finalizer.detach()
        held, self._held[:] = list(self._held), []
        self._pool.release(held, keys)

    def _take_pages(self) -> None:
        if self._closed:
            raise RuntimeError(CLOSED)
        shared, needed = self._pages, _num_pages(self.capacity)
        own, in_place = self._own_pages(shared, needed)
        self._held.extend(own)
        with torch.inference_mode(False):
            self._runs = _runs(self._pool, shared[:in_place] + own, self.capacity)
            sources = _runs(self._pool, shared, self._shared_length)
        if in_place * PAGE_TOKENS < self._shared_length:
            self._moving = _Moving(sources, in_place, own, set(range(len(self._shapes))))
        else:
            self._pages = shared[:in_place] + own
        self._summaries = [BlockSummaries(self.capacity) for _ in self._shapes]
        self._kept = [KeptStates() for _ in self._shapes]

    def _own_pages(self, shared: list[Page], needed: int) -> tuple[list[Page], int]:
        """Pages of its own, and how many of the shared ones stay before them: all (extended), none (moved or
        nothing shared), all full ones (gathered)."""
        full, rest = divmod(self._shared_length, PAGE_TOKENS)
        if shared and not rest and all(a.is_before(b) for a, b in pairwise(shared)):
            own = self._pool.extend(shared[-1], full, needed - full)
            if own is not None:
                return own, full
        try:
            return self._pool.allocate(needed), 0
        except MemoryError:
            if not full:
                raise
        return self._pool.allocate(needed - full), full

    def _move(self, moving: _Moving, layer: int) -> None:
        """Copy one layer's shared rows; the shared pages go when no layer needs them any more."""
        if layer in moving.layers:
            begin = moving.in_place * PAGE_TOKENS
            for run in moving.sources:
                if run.stop > begin:
                    self._place(layer, max(run.begin, begin), *run.rows(layer, begin, run.stop))
            moving.layers.discard(layer)
        if not moving.layers:
            self._moved(moving)

    def _moved(self, moving: _Moving) -> None:
        stay, go = self._pages[: moving.in_place], self._pages[moving.in_place :]
        self._pages, self._moving = stay + moving.own, None
        self._held[:] = self._pages
        whole = self._shared_length // PAGE_TOKENS - moving.in_place
        self._pool.move(go[:whole], moving.own[:whole])
        self._pool.release(go[whole:])

    def _place(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        """In every run its part."""
        stop = start + k.shape[1]
        if len(self._runs) == 1:
            keys, values = self._runs[0].layers[layer]
            keys[0, :, start:stop].copy_(k)
            values[0, :, start:stop].copy_(v)
            return
        for run in self._runs:
            if start < run.stop and run.begin < stop:
                keys, values = run.rows(layer, start, stop)
                part = slice(max(run.begin - start, 0), run.stop - start)
                keys.copy_(k[:, part])
                values.copy_(v[:, part])


@dataclass(frozen=True)
class _Moving:
    """Shared rows on their way to pages of the sequence's own."""

    sources: list[_Run]
    in_place: int
    """Shared pages that stay."""
    own: list[Page]
    layers: set[int]
    """Layers that are still to be copied."""


def _num_pages(tokens: int) -> int:
    return -(-tokens // PAGE_TOKENS)


def _runs(pool: PagePool, pages: Sequence[Page], length: int) -> list[_Run]:
    """The first ``length`` positions of a page table as runs of consecutive pages."""
    begins = [i for i, page in enumerate(pages) if not i or not pages[i - 1].is_before(page)]
    found = []
    for first, last in pairwise([*begins, len(pages)]):
        begin, stop = first * PAGE_TOKENS, min(last * PAGE_TOKENS, length)
        row = pages[first].number * PAGE_TOKENS
        rows, arena = slice(row, row + stop - begin), pool.views(pages[first])
        views = tuple((keys[None, :, rows], values[None, :, rows]) for keys, values in arena)
        found.append(_Run(begin, stop, arena, row, views))
    return found
