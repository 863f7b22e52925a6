"""The new rows of a decode step, of many sequences at once.

    keys[:, row_s] = k_s,  values[:, row_s] = v_s        for every sequence s whose pages lie in one arena

A copy of one row costs a call, not memory traffic: 16 sequences in 30 layers would be 960 calls a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from models.kv_cache import Cache, Slot

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class NewRow:
    """Row ``packed`` of the packed axis is the next of a sequence, at ``position``."""

    cache: Cache
    position: int
    packed: int


class NewRows:
    """Those of ``rows`` that can be placed together; ``placed`` are their rows of the packed axis. The others
    are written one by one, as everything else is (``Cache.write``)."""

    def __init__(self, rows: Sequence[NewRow], device: torch.device) -> None:
        slots = [(row, slot) for row in rows if (slot := row.cache.slot(row.position)) is not None]
        self._rows = [row for row, _ in slots]
        self.placed = frozenset(row.packed for row in self._rows)
        self._copies = [_Copy(each, device) for each in _by_arena(slots)]

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """k [Hk, T, D] and v [Hk, T, Dv] of the whole packed axis; their rows go to every cache."""
        for row in self._rows:
            row.cache.note_written(layer, row.position, row.position + 1)
        for copy in self._copies:
            copy(layer, k, v)


class _Copy:
    """The rows of one arena."""

    def __init__(self, slots: Sequence[tuple[NewRow, Slot]], device: torch.device) -> None:
        self._arena = slots[0][1].arena
        self._into = torch.tensor([slot.row for _, slot in slots], device=device)
        packed = [row.packed for row, _ in slots]
        self._first_rows = packed == list(range(len(packed)))
        self._picked = torch.tensor(packed, device=device)

    def __call__(self, layer: int, k: Tensor, v: Tensor) -> None:
        for kept, new in zip(self._arena[layer], (k, v), strict=True):
            everything = self._first_rows and len(self._picked) == new.shape[1]
            kept.index_copy_(1, self._into, new if everything else new.index_select(1, self._picked))


def _by_arena(slots: Sequence[tuple[NewRow, Slot]]) -> list[list[tuple[NewRow, Slot]]]:
    found: dict[int, list[tuple[NewRow, Slot]]] = {}
    for row, slot in slots:
        found.setdefault(id(slot.arena), []).append((row, slot))
    return list(found.values())
