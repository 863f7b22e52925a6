"""Which single keys and which diagonals of key blocks a tile of queries looks at, told by a few of its rows.

    P = softmax(scale * q_p K^T)                     p: probe rows, spread evenly over the tile, and its last
    vertical_j = mean over p of P[p, j]              of every candidate key j
    slash_d    = mean over p of sum_{j in block b(p) - d, no chosen vertical} P[p, j]

b(p) = floor(p / L) is a row's query block. Means also run over the query heads of a key head; slash_d over
those probe rows whose block at offset d is a candidate, so that it is mass per computed pair: an offset that
only a few query blocks of the tile can use is as dear as its pairs. The verticals are chosen first and do not
count again for slashes: a heavy column would make a slash of its block.

Jiang et al., MInference 1.0 (arXiv 2407.02490), probes the last 64 rows of the whole prompt. A tile of its
own rows serves chunks and reused prefixes, and rows spread over it tell columns from diagonals at the
granularity of blocks, which neighbouring rows cannot.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from kernels.contract import CallShape
from kernels.math.query_tiles import QueryTiles

_FP32 = 4

PROBE_BYTES = 16 << 20
"""Scores that exist at once, of as many key heads as that allows (at least one)."""


@dataclass(frozen=True)
class TilePlace:
    """One query tile of a call: its rows ``first .. stop - 1`` (absolute), and the keys it may look at.

    ``num_keys`` keys from 0 are probed; ``runs`` of them, whole blocks, are candidates.
    """

    first: int
    stop: int
    block: int
    num_keys: int
    runs: tuple[slice, ...]
    causal: bool

    @property
    def num_candidates(self) -> int:
        return sum(run.stop - run.start for run in self.runs)

    @property
    def num_blocks(self) -> int:
        """Key blocks up to the last candidate."""
        return max((run.stop for run in self.runs), default=0) // self.block

    @cached_property
    def query_blocks(self) -> Tensor:
        """[nq]"""
        return torch.arange(self.first // self.block, (self.stop - 1) // self.block + 1)

    @cached_property
    def candidates(self) -> Tensor:
        """Bool [num_blocks]."""
        table = torch.zeros(self.num_blocks, dtype=torch.bool)
        for run in self.runs:
            table[run.start // self.block : run.stop // self.block] = True
        return table

    @cached_property
    def offsets(self) -> Tensor:
        """Offsets d = query block - key block that some query block of the tile can use, ascending [nd]."""
        blocks = self.candidates.nonzero().flatten()
        pairs = self.query_blocks[:, None] - blocks
        return pairs.unique()

    @cached_property
    def targets(self) -> tuple[Tensor, Tensor]:
        """Key blocks [nq, nd] at every offset, and where they are candidates."""
        blocks = self.query_blocks[:, None] - self.offsets
        inside = (blocks >= 0) & (blocks < self.num_blocks)
        blocks = blocks.clamp(0, max(self.num_blocks - 1, 0))
        return blocks, inside & self.candidates[blocks]

    def probe_rows(self, most: int) -> Tensor:
        """At most so many rows, counted from ``first``: evenly spread, the last one among them."""
        num_rows = self.stop - self.first
        count = min(most, num_rows)
        return torch.arange(1, count + 1) * num_rows // count - 1


def place_of(tiles: QueryTiles, tile: int) -> TilePlace:
    """Where tile number ``tile`` of a call lies."""
    rows, begin = tiles.rows(tile), tiles.first_key(tile)
    first, stop = tiles.start + rows.start, tiles.start + rows.stop
    if tiles.causal:
        bounds = [(0, begin)]
    else:
        bounds = [(0, begin), (begin + tiles.height, tiles.num_keys // tiles.block * tiles.block)]
    runs = tuple(slice(a, b) for a, b in bounds if b > a)
    return TilePlace(first, stop, tiles.block, stop if tiles.causal else tiles.num_keys, runs, tiles.causal)


@dataclass(frozen=True)
class TileChoice:
    """What the key heads of one tile keep beyond its own keys.

    ``columns`` bool [Hk, num_blocks * L], ``slashes`` bool [Hk, nd] over ``TilePlace.offsets``; a head in
    ``whole`` [Hk] keeps every candidate as a column. ``dropped`` [Hk, nq]: mass left out, the mean over the
    probe rows of each query block.
    """

    columns: Tensor
    slashes: Tensor
    whole: Tensor
    dropped: Tensor

    def dropped_by_row(self, place: TilePlace) -> Tensor:
        """``dropped`` of each row of the tile [Hk, R]."""
        rows = torch.arange(place.first, place.stop)
        return self.dropped[:, rows // place.block - place.first // place.block]


def choice_bytes(shape: CallShape, query_tile: int, block: int, probe_rows: int) -> int:
    """Bytes of one tile's choice: scores and weights of the probe rows of some key heads, the mass of every
    key from each query block, and its copy by blocks."""
    group = shape.num_heads // shape.num_kv_heads
    one_head = min(probe_rows, shape.num_rows) * group * shape.num_keys * _FP32
    heads = min(shape.num_kv_heads, max(1, PROBE_BYTES // max(1, one_head)))
    query_blocks = min(query_tile // block, -(-shape.num_rows // block) + 1)
    mass = (query_blocks + 2) * shape.num_kv_heads * shape.num_keys * _FP32
    return 2 * heads * one_head + mass


def choose_tile(
    q: Tensor,
    k: Tensor,
    place: TilePlace,
    *,
    num_verticals: tuple[int, ...],
    num_slashes: tuple[int, ...],
    probe_rows: int,
    scale: float,
) -> TileChoice:
    """The choice of a tile: q [Hk, G, R, D] its rows, k [Hk, M, D], an entry of the numbers per key head.

    Nothing is scored where every head keeps all candidates anyway. Chosen on the CPU, wherever the keys are.
    """
    num_heads, width = len(k), place.num_blocks * place.block
    whole = torch.tensor(
        [
            nv >= place.num_candidates or ns >= len(place.offsets)
            for nv, ns in zip(num_verticals, num_slashes, strict=True)
        ]
    )
    if bool(whole.all()):
        return _everything(place, num_heads)
    mass, share, finite = _probed(q, k, place, probe_rows, scale)
    whole |= ~finite
    mass[whole] = 0.0
    columns = _most(mass.sum(1), torch.tensor(num_verticals), place.candidates.repeat_interleave(place.block))
    mass.mul_(~columns[:, None])
    blocks = mass.view(num_heads, len(share), -1, place.block).sum(-1) * place.candidates
    targets, usable = place.targets
    at = torch.arange(len(share))[:, None], targets
    there = torch.where(usable, blocks[:, at[0], at[1]], 0.0).sum(1)
    reach = (usable * share[:, None]).sum(0)
    slashes = _most(
        torch.where(reach > 0, there / reach, 0.0),
        torch.tensor(num_slashes),
        torch.ones(len(reach), dtype=torch.bool),
    )
    head, block, offset = (slashes[:, None] & usable).nonzero(as_tuple=True)
    blocks[head, block, targets[block, offset]] = 0.0
    dropped = blocks.sum(-1) / share.clamp(min=1e-9)
    columns |= whole[:, None] & place.candidates.repeat_interleave(place.block)
    slashes &= ~whole[:, None]
    assert columns.shape == (num_heads, width)
    return TileChoice(columns, slashes, whole, _filled(dropped.clamp(0.0, 1.0), share))


def _everything(place: TilePlace, num_heads: int) -> TileChoice:
    return TileChoice(
        place.candidates.repeat_interleave(place.block).expand(num_heads, -1),
        torch.zeros(num_heads, len(place.offsets), dtype=torch.bool),
        torch.ones(num_heads, dtype=torch.bool),
        torch.zeros(num_heads, len(place.query_blocks)),
    )


def _probed(q: Tensor, k: Tensor, place: TilePlace, most: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mass [Hk, nq, num_blocks * L] of each key from the probe rows of each query block, as shares of the
    mean over all of them; those rows' share of the probe [nq]; and whether all scores are finite [Hk]."""
    rows = place.probe_rows(most)
    num_heads, group = q.shape[:2]
    owner = (place.first + rows) // place.block - int(place.query_blocks[0])
    weight = torch.zeros(len(place.query_blocks), len(rows), dtype=q.dtype)
    weight[owner, torch.arange(len(rows))] = 1.0 / len(rows)
    share = weight.sum(1)
    weight = (weight / group).repeat(1, group).to(q.device)
    probes = q[:, :, rows.to(q.device)].flatten(1, 2) * scale
    width = place.num_blocks * place.block
    mass = torch.empty(num_heads, len(share), width, dtype=q.dtype)
    finite = torch.empty(num_heads, dtype=torch.bool)
    step = max(1, PROBE_BYTES // (probes.shape[1] * place.num_keys * q.element_size()))
    for a in range(0, num_heads, step):
        some = slice(a, min(a + step, num_heads))
        weights, finite[some] = _weights(probes[some], k[some, : place.num_keys], place, rows)
        mass[some] = torch.matmul(weight, weights[..., :width]).cpu()
    return mass, share, finite & torch.isfinite(mass.sum((1, 2)))


def _weights(probes: Tensor, k: Tensor, place: TilePlace, rows: Tensor) -> tuple[Tensor, Tensor]:
    """softmax [h, G * n, num_keys], and whether the scores are finite [h]."""
    scores = torch.bmm(probes, k.to(probes.dtype).mT)
    if place.causal:
        own = scores[..., place.first :]
        later = torch.arange(own.shape[-1]) > rows[:, None]
        later = later.repeat(own.shape[1] // len(rows), 1).to(own.device)
        own.masked_fill_(later, 0.0)
    finite = torch.isfinite(scores.sum((1, 2))).cpu()
    if place.causal:
        own.masked_fill_(later, -math.inf)
    return torch.softmax(scores, -1), finite


def _most(mass: Tensor, counts: Tensor, allowed: Tensor) -> Tensor:
    """The ``counts`` [heads] largest of ``mass`` [heads, n] at ``allowed`` [n] places, bool [heads, n]; ties
    go to the lower place."""
    ranked = torch.where(allowed, mass, -1.0).numpy()
    keep = np.zeros(ranked.shape, bool)
    for head, count in enumerate(counts.tolist()):
        count = min(count, int(allowed.sum()))
        if count:
            keep[head] = _largest(ranked[head], count)
    return torch.from_numpy(keep) & allowed


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Where the ``count`` largest are: a partition finds the smallest of them, the lowest of its equals
    fill up."""
    least = np.partition(values, len(values) - count)[len(values) - count]
    keep = values > least
    equal = np.flatnonzero(values == least)
    keep[equal[: count - int(keep.sum())]] = True
    return keep


def _filled(dropped: Tensor, share: Tensor) -> Tensor:
    """A query block without a probe row takes the next one's: the last always has one."""
    probed = torch.where(share > 0, torch.arange(len(share)), len(share) - 1)
    return dropped[:, probed.flip(0).cummin(0).values.flip(0)]
