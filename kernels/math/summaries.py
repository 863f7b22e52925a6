"""What is known about whole blocks of keys without reading them again: bounds and means.

    kmin_b, kmax_b = least and greatest key of block b, coordinate by coordinate
    kmean_b, vmean_b = mean key and mean value of block b          block b = positions [b L, (b + 1) L)

The bounds are Quest's (arXiv 2406.10774, section 3.3), the means stand for blocks that are left out. Kept
from call to call they cost each key one reading and (3 D + Dv) / L numbers a position. A NaN or an infinity
in a key shows in the block's bounds and mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

from kernels.math.dense import accumulator_dtype


@dataclass(frozen=True)
class Summary:
    """Of the first blocks of one sequence, fp32 (fp64 for fp64 keys): ``bounds`` [Hk, blocks, 2 D] is kmax
    beside kmin, ``kmean`` [Hk, blocks, D], ``vmean`` [Hk, blocks, Dv]. Views: read them before the next
    ``get``."""

    block: int
    bounds: Tensor
    kmean: Tensor
    vmean: Tensor

    @property
    def kmax(self) -> Tensor:
        """[Hk, blocks, D]."""
        return self.bounds[..., : self.kmean.shape[-1]]

    @property
    def kmin(self) -> Tensor:
        """[Hk, blocks, D]."""
        return self.bounds[..., self.kmean.shape[-1] :]

    @property
    def num_blocks(self) -> int:
        return int(self.kmean.shape[1])

    @property
    def nbytes(self) -> int:
        return self.bounds.nbytes + self.kmean.nbytes + self.vmean.nbytes

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.bounds, self.kmean, self.vmean

    def first(self, num_blocks: int) -> Summary:
        """The same of the first ``num_blocks`` blocks."""
        return Summary(self.block, *(part[:, :num_blocks] for part in self.parts()))


class BlockSummaries:
    """The summaries of one sequence in one layer, grown as its keys come in, for every block size asked for.

    ``max_length``: positions the sequence will ever have, where that is known; storage then never exceeds it.
    """

    def __init__(self, max_length: int | None = None) -> None:
        self._max_length = max_length
        self._lock = Lock()
        self._stores: dict[int, _Store] = {}

    @property
    def nbytes(self) -> int:
        return sum(store.room.nbytes for store in self._stores.values())

    def get(self, k: Tensor, v: Tensor, block: int, num_blocks: int) -> Summary:
        """The first ``num_blocks`` whole blocks of k [Hk, M, D], v [Hk, M, Dv], which may be views of a
        growing cache: only blocks that are not known yet are read. ValueError where M has fewer whole
        blocks."""
        if num_blocks * block > k.shape[1]:
            raise ValueError(f"{num_blocks} blocks of {block} keys asked for, there are {k.shape[1]} keys")
        with self._lock:
            store = self._stores.get(block)
            if store is None:
                store = self._stores[block] = _Store(_room(k, v, block, num_blocks), 0)
            if num_blocks > store.num_known:
                store.grow(k, v, num_blocks, self._max_length)
                _summarise(k, v, store.num_known, store.room.first(num_blocks))
                store.num_known = num_blocks
            return store.room.first(num_blocks)

    def truncate(self, length: int) -> None:
        """Forget every block that is not whole within the first ``length`` positions: what follows them may
        be written anew."""
        for block, store in self._stores.items():
            store.num_known = min(store.num_known, length // block)


@dataclass
class _Store:
    """Room for some blocks, the first ``num_known`` of which are filled."""

    room: Summary
    num_known: int

    def grow(self, k: Tensor, v: Tensor, num_blocks: int, max_length: int | None) -> None:
        """Make room, twice as much as before: growing block by block copies each of them O(1) times."""
        if num_blocks <= self.room.num_blocks:
            return
        wanted = max(num_blocks, 2 * self.room.num_blocks)
        if max_length is not None:
            wanted = max(num_blocks, min(wanted, max_length // self.room.block))
        larger = _room(k, v, self.room.block, wanted)
        known = self.room.first(self.num_known).parts()
        for old, new in zip(known, larger.first(self.num_known).parts(), strict=True):
            new.copy_(old)
        self.room = larger


def _room(k: Tensor, v: Tensor, block: int, num_blocks: int) -> Summary:
    heads, D, dtype = k.shape[0], k.shape[2], accumulator_dtype(k.dtype)

    def empty(width: int) -> Tensor:
        return torch.empty(heads, num_blocks, width, dtype=dtype, device=k.device)

    return Summary(block, empty(2 * D), empty(D), empty(v.shape[2]))


def _summarise(k: Tensor, v: Tensor, begin: int, into: Summary) -> None:
    """Fill blocks ``begin`` .. of ``into``."""
    L, stop = into.block, into.num_blocks
    keys, values = (torch.unflatten(x[:, begin * L : stop * L], 1, (-1, L)) for x in (k, v))
    into.kmax[:, begin:].copy_(keys.amax(2))
    into.kmin[:, begin:].copy_(keys.amin(2))
    into.kmean[:, begin:].copy_(keys.mean(2, dtype=into.kmean.dtype))
    into.vmean[:, begin:].copy_(values.mean(2, dtype=into.vmean.dtype))
