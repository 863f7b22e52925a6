"""Keys and values of one sequence, held between steps.

One contiguous buffer per sequence, laid out layer by layer as keys [Hk, capacity, D] then values
[Hk, capacity, Dv], so that what the kernels read is a view: keys [1, Hk, M, D] of the first M positions.
Nothing is zeroed: pages of memory that no token has reached are never touched. Beside each layer's keys lie
the summaries of their blocks, for attentions that choose blocks by them, and the states that other attentions
keep (running sums of features, hash codes).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from kernels.math.kept import KeptStates
from kernels.math.summaries import BlockSummaries


@dataclass(frozen=True)
class LayerShape:
    """Hk key heads, D head_dim of the keys, Dv of the values: what one attention layer caches per token."""

    num_kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def elements_per_token(self) -> int:
        return self.num_kv_heads * (self.key_dim + self.value_dim)


class Cache:
    """The cache of one sequence. ``write`` places new rows, ``keys_values`` returns views of the first M.

    Rows beyond the sequence's length may be overwritten at any time, so a step that failed leaves no trace.
    """

    def __init__(
        self, layers: Sequence[LayerShape], capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._shapes = tuple(layers)
        self.capacity = capacity
        self._dtype, self._device = dtype, device
        self._views: list[tuple[Tensor, Tensor]] = []
        self._summaries: list[BlockSummaries] = []
        self._kept: list[KeptStates] = []
        self._owners: list[Hashable] = [None] * len(self._shapes)
        self._written = [0] * len(self._shapes)
        self._closed = False

    @property
    def full_bytes(self) -> int:
        """Bytes of the buffer once it is there."""
        elements = sum(shape.elements_per_token for shape in self._shapes)
        return elements * self.capacity * self._dtype.itemsize

    @property
    def held_bytes(self) -> int:
        """Bytes that take up memory: of a CPU's buffer what has been written, as its other pages were never
        touched; of any other device's the whole; and the summaries and kept states."""
        if not self._views:
            return 0
        beside = sum(layer.nbytes for layer in self._summaries) + sum(layer.nbytes for layer in self._kept)
        if self._device.type != "cpu":
            return self.full_bytes + beside
        written = zip(self._shapes, self._written, strict=True)
        elements = sum(shape.elements_per_token * rows for shape, rows in written)
        return elements * self._dtype.itemsize + beside

    def write(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        """Place k [Hk, n, D] and v [Hk, n, Dv] of one layer at positions start .. start + n - 1. What was
        known of positions beyond ``start`` is forgotten: a step that failed may be followed by other
        tokens."""
        if not self._views:
            self._allocate()
        self._summaries[layer].truncate(start)
        self._kept[layer].truncate(start)
        keys, values = self._views[layer]
        keys[:, start : start + k.shape[1]].copy_(k)
        values[:, start : start + v.shape[1]].copy_(v)
        self._written[layer] = max(self._written[layer], start + k.shape[1])

    def keys_values(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """Views of the first ``length`` positions: keys [1, Hk, length, D], values [1, Hk, length, Dv]."""
        keys, values = self._views[layer]
        return keys[None, :, :length], values[None, :, :length]

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

    def close(self) -> None:
        self._views, self._summaries, self._kept = [], [], []
        self._closed = True

    def _allocate(self) -> None:
        if self._closed:
            raise RuntimeError("the sequence is closed: its cache was freed")
        buffer = torch.empty(self.full_bytes // self._dtype.itemsize, dtype=self._dtype, device=self._device)
        offset = 0

        def take(*shape: int) -> Tensor:
            nonlocal offset
            view = buffer[offset : offset + prod(shape)].view(shape)
            offset += prod(shape)
            return view

        for shape in self._shapes:
            keys = take(shape.num_kv_heads, self.capacity, shape.key_dim)
            values = take(shape.num_kv_heads, self.capacity, shape.value_dim)
            self._views.append((keys, values))
        self._summaries = [BlockSummaries(self.capacity) for _ in self._shapes]
        self._kept = [KeptStates() for _ in self._shapes]
