"""What each program of a decode step reads: the rows' runs of keys, cut into pieces of about equal work.

A row's keys are numbered through its runs; every ``length`` of them make an item, which one program per head
reads. Few rows over many keys make many items each, and their parts are merged; many short rows are one item
each, and nothing is merged. Made on the host and kept in ``kernels.math.cache.PLANS``: every layer of a step
asks again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels._triton.targets import target_of
from kernels.math.cache import PLANS

Ints = npt.NDArray[np.int64]
Run = tuple[int, int, int, int, int]
"""Row, first, step, count, list: keys first, first + step, ... where list is -1; else the entries first ..
first + count - 1 of that list."""

PROGRAMS_PER_SM = 4
MIN_KEYS = 256
"""Fewer keys than so many are no program's worth."""
KEYS_MULTIPLE = 128
PIECE_COLUMNS = 4
ITEM_COLUMNS = 3


@dataclass(frozen=True)
class DecodePlan:
    """``items`` int32 [I, 3]: row, first piece, piece after its last. ``pieces`` int32 [P, 4]: first, step,
    count, list. ``indptr`` int32 [rows + 1]: each row's items. ``single``: every row is one item."""

    items: Tensor
    pieces: Tensor
    indptr: Tensor
    single: bool

    @property
    def num_rows(self) -> int:
        return len(self.indptr) - 1

    @property
    def nbytes(self) -> int:
        return self.items.nbytes + self.pieces.nbytes + self.indptr.nbytes


def plan_runs(runs: Sequence[Run], num_rows: int, num_heads: int, device: torch.device) -> DecodePlan:
    """The plan of ``runs``, whose rows ascend, for ``num_heads`` programs an item; cached by what it is made
    of. A row may have no run."""
    table = np.array(runs, dtype=np.int64).reshape(-1, 5)
    key = ("decode", num_rows, num_heads, table.tobytes(), device)
    return PLANS.get(key, lambda: _plan(table, num_rows, num_heads, device))


def _plan(table: Ints, num_rows: int, num_heads: int, device: torch.device) -> DecodePlan:
    items, pieces, indptr = cut(table[table[:, 3] > 0], num_rows, _most_keys(table, num_heads, device))
    single = bool((np.diff(indptr) == 1).all())
    return DecodePlan(_told(items, device), _told(pieces, device), _told(indptr, device), single)


def _told(numbers: Ints, device: torch.device) -> Tensor:
    return torch.from_numpy(numbers.astype(np.int32)).to(device, non_blocking=True)


def _most_keys(table: Ints, num_heads: int, device: torch.device) -> int:
    """Keys of an item, so that there are enough of them for every multiprocessor."""
    wanted = PROGRAMS_PER_SM * target_of(device).num_sms
    return max(MIN_KEYS, -(-int(table[:, 3].sum()) * num_heads // wanted))


def cut(table: Ints, num_rows: int, most_keys: int) -> tuple[Ints, Ints, Ints]:
    """Items, pieces and indptr of the runs [R, 5]. A row of n keys makes ceil(n / most_keys) items or fewer,
    of equal length up to KEYS_MULTIPLE."""
    row, count = table[:, 0], table[:, 3]
    per_row = np.bincount(row, count, num_rows).astype(np.int64)
    shares = np.maximum(-(-per_row // most_keys), 1)
    length = np.maximum(-(-per_row // (shares * KEYS_MULTIPLE)), 1) * KEYS_MULTIPLE
    stop = np.cumsum(count)
    stop -= (np.cumsum(per_row) - per_row)[row]
    begin, length = stop - count, length[row]
    first_item = begin // length
    pieces_of_run = (stop - 1) // length - first_item + 1
    run = np.repeat(np.arange(len(table)), pieces_of_run)
    number = np.arange(len(run)) - np.repeat(np.cumsum(pieces_of_run) - pieces_of_run, pieces_of_run)
    item = first_item[run] + number
    lo = np.maximum(begin[run], item * length[run])
    hi = np.minimum(stop[run], (item + 1) * length[run])
    first = table[run, 1] + (lo - begin[run]) * np.where(table[run, 4] < 0, table[run, 2], 1)
    pieces = np.stack([first, table[run, 2], hi - lo, table[run, 4]], 1)
    items = _items(row[run], item)
    per_row = np.bincount(items[:, 0], minlength=num_rows)
    return items, pieces, np.concatenate([[0], np.cumsum(per_row)])


def _items(row: Ints, item: Ints) -> Ints:
    """Neighbouring pieces of the same item: [I, 3]."""
    new = np.ones(len(row), dtype=np.bool_)
    new[1:] = (row[1:] != row[:-1]) | (item[1:] != item[:-1])
    begins = np.flatnonzero(new)
    return np.stack([row[begins], begins, np.append(begins, len(row))[1:]], 1)
