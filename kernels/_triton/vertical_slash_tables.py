"""Where the query tiles of a call lie, as tensors on its device: what the kernels of vertical_slash look up.

Nothing here depends on data: tables are made once per place and length, and kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.math.cache import PLANS
from kernels.math.query_tiles import QueryTiles
from kernels.math.vertical_slash import TilePlace, place_of

COLUMNS = (
    "first",
    "stop",
    "num_keys",
    "before",
    "after",
    "end",
    "num_probes",
    "num_blocks",
    "first_block",
    "scored",
)
"""Of ``Tables.places``: rows first .. stop - 1 (absolute); keys probed; candidates are 0 .. before - 1 and
after .. end - 1; probe rows; key blocks up to the last candidate; number of the first query block; 1 where
some head has to choose."""


@dataclass(frozen=True)
class Tables:
    """T tiles, ``places`` int32 [T, len(COLUMNS)] and the same numbers on the host ``told``; ``probes`` int32
    [T, P] rows of the call (-1: none) and ``probe_blocks`` [T, P] their query blocks in the tile; ``share``
    fp32 [T, nq] of each query block among probe rows; ``probed`` int64 [T, nq]: the query block, or the next
    one that has a probe row; ``rows`` int64 [T, nq] of the call in each; ``budget`` bool [T, Hk]: heads that
    keep every candidate anyway."""

    places: Tensor
    probes: Tensor
    probe_blocks: Tensor
    share: Tensor
    probed: Tensor
    rows: Tensor
    budget: Tensor
    told: tuple[dict[str, int], ...]

    @property
    def nbytes(self) -> int:
        held = (self.places, self.probes, self.probe_blocks, self.share, self.probed, self.rows, self.budget)
        return sum(one.nbytes for one in held)

    def most(self, name: str) -> int:
        return max(one[name] for one in self.told)


def tables_of(
    tiles: QueryTiles,
    numbers: Sequence[int],
    probe_rows: int,
    budgets: tuple[tuple[int, ...], tuple[int, ...]],
    device: torch.device,
) -> Tables:
    """Tables of the tiles with these numbers, which have candidates. ``budgets``: verticals and slashes of
    each key head."""
    key = ("vertical slash", tiles, tuple(numbers), probe_rows, budgets, device)
    return PLANS.get(key, lambda: _tables(tiles, numbers, probe_rows, budgets, device))


def _tables(
    tiles: QueryTiles,
    numbers: Sequence[int],
    probe_rows: int,
    budgets: tuple[tuple[int, ...], tuple[int, ...]],
    device: torch.device,
) -> Tables:
    T, nq = len(numbers), tiles.height // tiles.block
    probes, blocks = np.full((T, probe_rows), -1), np.zeros((T, probe_rows), np.int64)
    share, probed, rows = np.zeros((T, nq)), np.zeros((T, nq), np.int64), np.zeros((T, nq), np.int64)
    budget, told = np.zeros((T, len(budgets[0])), bool), []
    for t, number in enumerate(numbers):
        place = place_of(tiles, number)
        own = place.probe_rows(probe_rows).numpy()
        at = (place.first + own) // place.block - place.first // place.block
        probes[t, : len(own)], blocks[t, : len(own)] = own + place.first - tiles.start, at
        share[t] = np.bincount(at, minlength=nq) / len(own)
        have = np.where(share[t] > 0, np.arange(nq), nq - 1)
        probed[t] = np.minimum.accumulate(have[::-1])[::-1]
        inside = np.arange(place.first, place.stop) // place.block - place.first // place.block
        rows[t] = np.bincount(inside, minlength=nq)
        most = place.num_candidates, len(place.offsets)
        budget[t] = (np.array(budgets[0]) >= most[0]) | (np.array(budgets[1]) >= most[1])
        told.append(_told(place, len(own), not budget[t].all()))
    places = np.array([[one[name] for name in COLUMNS] for one in told])
    return Tables(
        _int32(places).to(device),
        _int32(probes).to(device),
        _int32(blocks).to(device),
        torch.from_numpy(share.astype(np.float32)).to(device),
        torch.from_numpy(probed).to(device),
        torch.from_numpy(rows).to(device),
        torch.from_numpy(budget).to(device),
        tuple(told),
    )


def _int32(numbers: npt.NDArray[np.integer]) -> Tensor:
    return torch.from_numpy(numbers.astype(np.int32))


def _told(place: TilePlace, num_probes: int, scored: bool) -> dict[str, int]:
    runs = {run.start: run.stop for run in place.runs}
    before = runs.get(0, 0) if place.runs and place.runs[0].start == 0 else 0
    later = [run for run in place.runs if run.start > 0]
    after, end = (later[0].start, later[0].stop) if later else (0, 0)
    return {
        "first": place.first,
        "stop": place.stop,
        "num_keys": place.num_keys,
        "before": before,
        "after": after,
        "end": end,
        "num_probes": num_probes,
        "num_blocks": place.num_blocks,
        "first_block": place.first // place.block,
        "scored": int(scored),
    }
