"""The pairs that vertical-slash attention keeps, row by row: the specification of the fast choice.

    own keys  ∪  the num_verticals candidate keys of largest sqrt(mass from even * mass from odd query blocks)
              ∪  candidate blocks at the num_slashes offsets of largest mass per probe row that can use them

Equations as in ``kernels.math.vertical_slash``, whose code this does not share. Every logit of a probe row
exists, and Python loops over keys and offsets: for tests and small sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.contract import Call
from kernels.math.dense import accumulator_dtype


@dataclass(frozen=True)
class Sizes:
    """The knobs: L = ``block``; verticals and slashes per key head."""

    query_tile: int
    block: int
    probe_rows: int
    num_verticals: tuple[int, ...]
    num_slashes: tuple[int, ...]


@dataclass(frozen=True)
class _Tile:
    """One tile of one key head: q [G, R, D] in the accumulator's dtype, the rows' positions, k [M, D]."""

    q: Tensor
    k: Tensor
    positions: list[int]
    begin: int
    call: Call
    sizes: Sizes

    def visible(self, i: int) -> int:
        """How many keys, from the first, row i may see."""
        return i + 1 if self.call.causal else len(self.k)

    def own(self, j: Tensor) -> Tensor:
        whole = len(self.k) // self.sizes.block * self.sizes.block
        inside = (self.begin <= j) & (j < self.begin + self.sizes.query_tile)
        return inside if self.call.causal else inside | (j >= whole)

    def own_pairs(self) -> Tensor:
        """Bool [R, M]"""
        i, j = torch.tensor(self.positions)[:, None], torch.arange(len(self.k))
        return self.own(j) & ((j <= i) | (not self.call.causal))

    def candidates(self) -> list[int]:
        j = torch.arange(self.begin if self.call.causal else len(self.k))
        found: list[int] = j[~self.own(j)].tolist()
        return found

    def offsets(self) -> list[int]:
        L = self.sizes.block
        keys = {j // L for j in self.candidates()}
        return sorted({i // L - c for i in self.positions for c in keys})

    def probes(self) -> list[int]:
        """Indices into ``positions``."""
        num_rows = len(self.positions)
        count = min(self.sizes.probe_rows, num_rows)
        return [(p + 1) * num_rows // count - 1 for p in range(count)]

    def logits(self, row: int) -> Tensor:
        """[G, keys that the row may see]"""
        keys = self.k[: self.visible(self.positions[row])].to(self.q.dtype)
        return self.q[:, row] @ keys.mT * self.call.scale


def kept_pairs(q: Tensor, k: Tensor, sizes: Sizes, call: Call) -> tuple[Tensor, Tensor]:
    """Bool [H, N, M], and the mass left out as the probe saw it [H, N], of one sequence: q [H, N, D], k [Hk,
    M, D]."""
    H, N, _ = q.shape
    Hk, M, _ = k.shape
    group = H // Hk
    keep, dropped = torch.zeros(H, N, M, dtype=torch.bool), torch.zeros(H, N)
    for rows in _tiles(call.start, N, sizes.query_tile):
        positions = [call.start + row for row in rows]
        begin = positions[0] // sizes.query_tile * sizes.query_tile
        for head in range(Hk):
            heads = slice(head * group, (head + 1) * group)
            mine = q[heads, rows[0] : rows[-1] + 1].to(accumulator_dtype(q.dtype))
            tile = _Tile(mine, k[head], positions, begin, call, sizes)
            pairs, left_out = _tile_pairs(tile, head)
            keep[heads, rows[0] : rows[-1] + 1] = pairs
            dropped[heads, rows[0] : rows[-1] + 1] = left_out
    return keep, dropped


def _tiles(start: int, num_rows: int, height: int) -> Iterator[list[int]]:
    for tile in range(start // height, (start + num_rows - 1) // height + 1):
        yield [row for row in range(num_rows) if (start + row) // height == tile]


def _tile_pairs(tile: _Tile, head: int) -> tuple[Tensor, Tensor]:
    """Bool [R, M] and [R]."""
    keep = tile.own_pairs()
    candidates, offsets = tile.candidates(), tile.offsets()
    num_verticals, num_slashes = tile.sizes.num_verticals[head], tile.sizes.num_slashes[head]
    logits = {row: tile.logits(row) for row in tile.probes()}
    broken = not all(bool(torch.isfinite(x).all()) for x in logits.values())
    if broken or num_verticals >= len(candidates) or num_slashes >= len(offsets):
        keep[:, candidates] = True
        return keep, torch.zeros(len(keep))
    weights = {row: torch.softmax(x, -1).mean(0).tolist() for row, x in logits.items()}
    mass = _vertical_mass(tile, weights, candidates)
    verticals = sorted(candidates, key=lambda j: (-mass[j], j))[:num_verticals]
    rest = _rest(tile, weights, candidates, {j: mass[j] for j in verticals})
    slashes = _slashes(tile, rest, set(candidates), offsets, num_slashes)
    keep[:, verticals] = True
    L, j = tile.sizes.block, torch.tensor(candidates)
    for row, i in enumerate(tile.positions):
        at_slash = torch.isin(i // L - j // L, torch.tensor(sorted(slashes)))
        keep[row, j[at_slash]] = True
    return keep, _left_out(tile, rest, slashes)


Weights = dict[int, list[float]]
"""Of each probe row, the mean over heads of its softmax."""


@dataclass(frozen=True)
class _Rest:
    """One query block: how many probe rows it has, and their mean mass of every candidate key, less what the
    chosen verticals explain."""

    num_probes: int
    mass: dict[int, float]


def _vertical_mass(tile: _Tile, weights: Weights, candidates: list[int]) -> dict[int, float]:
    halves: tuple[Weights, Weights] = ({}, {})
    for row, found in weights.items():
        halves[tile.positions[row] // tile.sizes.block % 2][row] = found
    if not halves[0] or not halves[1]:
        return {j: _mean(weights, j) for j in candidates}
    return {j: math.sqrt(_mean(halves[0], j)) * math.sqrt(_mean(halves[1], j)) for j in candidates}


def _mean(weights: Weights, j: int) -> float:
    return sum(found[j] for found in weights.values()) / len(weights)


def _rest(
    tile: _Tile, weights: Weights, candidates: list[int], explained: dict[int, float]
) -> dict[int, _Rest]:
    by_block: dict[int, Weights] = {}
    for row, found in weights.items():
        by_block.setdefault(tile.positions[row] // tile.sizes.block, {})[row] = found
    return {
        block: _Rest(len(found), {j: max(0.0, _mean(found, j) - explained.get(j, 0.0)) for j in candidates})
        for block, found in by_block.items()
    }


def _slashes(
    tile: _Tile, rest: dict[int, _Rest], candidates: set[int], offsets: list[int], count: int
) -> set[int]:
    L = tile.sizes.block
    mass = {}
    for d in offsets:
        usable = [(b, one) for b, one in rest.items() if (b - d) * L in candidates]
        found = [one.num_probes * math.fsum(one.mass[j] for j in _keys(b - d, L)) for b, one in usable]
        num_probes = sum(one.num_probes for _, one in usable)
        mass[d] = math.fsum(found) / num_probes if num_probes else 0.0
    return set(sorted(offsets, key=lambda d: (-mass[d], d))[:count])


def _keys(block: int, L: int) -> range:
    return range(block * L, block * L + L)


def _left_out(tile: _Tile, rest: dict[int, _Rest], slashes: set[int]) -> Tensor:
    """Of each row: the rest beyond the slashes in its query block, or in the next one that was probed."""
    L = tile.sizes.block
    lost = {
        b: math.fsum(mass for j, mass in one.mass.items() if b - j // L not in slashes)
        for b, one in rest.items()
    }
    return torch.tensor([lost[min(b for b in lost if b >= i // L)] for i in tile.positions])
