"""Which single keys and which diagonals of key blocks a tile of queries looks at, told by a few of its rows.

    P = softmax(scale * q_p K^T)                     p: probe rows, spread evenly over the tile, and its last
    P_bj = mean of P[p, j] over p in query block b   b = floor(p / L)
    vertical_j = sqrt(mean over even b of P_bj * mean over odd b of P_bj)         of every candidate key j
    rest_bj = max(P_bj - vertical_j, 0) where j is a chosen vertical, else P_bj
    slash_d = mean over b of sum_{j in block b - d} rest_bj

Means weigh query blocks by their probe rows, and also run over the query heads of a key head; slash_d runs
over those b whose block at offset d is a candidate, so it is mass per computed pair: an offset that few query
blocks of the tile can use costs as little. A key that one probe row alone looks at has vertical_j near 0 and
counts for the slashes even where it is chosen: it says nothing of other rows, and diagonals are full of such
keys. Where probe rows lie in query blocks of one kind only, as in decode, vertical_j is the mean over all.

Jiang et al., MInference 1.0 (arXiv 2407.02490), probes the last 64 rows of the whole prompt. A tile of its
own rows serves chunks and reused prefixes, and rows spread over it tell columns from diagonals at the
granularity of blocks, which neighbouring rows cannot.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.contract import CallShape
from kernels.math.query_tiles import QueryTiles

_FP32 = 4

PROBE_BYTES = 4 << 20
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
    def candidate_keys(self) -> Tensor:
        """Bool [num_blocks * L]."""
        return self.candidates.repeat_interleave(self.block)

    @cached_property
    def offsets(self) -> Tensor:
        """Offsets d = query block - key block that some query block of the tile can use, ascending [nd]."""
        reached = torch.zeros(int(self.query_blocks[-1]) + self.num_blocks, dtype=torch.bool)
        blocks = self.candidates.nonzero().flatten()
        reached[(self.query_blocks[:, None] - blocks + self.num_blocks - 1)] = True
        return reached.nonzero().flatten() - (self.num_blocks - 1)

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
    ``whole`` [Hk] keeps every candidate as a column. ``dropped`` [Hk, nq]: the rest, beyond the slashes.
    ``scored``: the probe's logits (``Stats.pairs_scored``).
    """

    columns: Tensor
    slashes: Tensor
    whole: Tensor
    dropped: Tensor
    scored: int = 0

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
    return heads * one_head + mass


class Chooser:
    """Makes the choices of one sequence's tiles, in a buffer of bounded size that they share.

    An entry of ``num_verticals`` and ``num_slashes`` per key head; ``k`` [Hk, M, D].
    """

    def __init__(
        self,
        k: Tensor,
        *,
        group: int,
        num_verticals: tuple[int, ...],
        num_slashes: tuple[int, ...],
        probe_rows: int,
        scale: float,
    ) -> None:
        self._k, self._scale, self._probe_rows = k, scale, probe_rows
        self._num_verticals = torch.tensor(num_verticals)
        self._num_slashes = torch.tensor(num_slashes)
        one_head = probe_rows * group * k.shape[1]
        self._heads_at_once = max(1, min(len(k), PROBE_BYTES // (one_head * k.element_size())))
        self._buffer = k.new_empty(0)
        self._most_scores = self._heads_at_once * one_head

    def choose(self, q: Tensor, place: TilePlace) -> TileChoice:
        """The choice of a tile: q [Hk, G, R, D] its rows. Made on the CPU, wherever the keys are.

        Nothing is scored where every head keeps all candidates anyway.
        """
        whole = (self._num_verticals >= place.num_candidates) | (self._num_slashes >= len(place.offsets))
        if bool(whole.all()):
            return _everything(place, len(q))
        probe = self._probed(q, place)
        probe.mass[whole | ~probe.finite] = 0.0
        verticals = _verticals(probe)
        columns = _most(verticals, self._num_verticals, place.candidate_keys)
        probe.mass.sub_(probe.share[:, None] * (verticals * columns)[:, None]).clamp_(min=0.0)
        blocks = (
            torch.unflatten(probe.mass, 2, (-1, place.block)).sum(-1).masked_fill_(~place.candidates, 0.0)
        )
        slashes = _most(_by_offset(blocks, probe.share, place), self._num_slashes)
        dropped = _left_out(blocks, slashes, probe.share, place)
        whole |= ~probe.finite
        columns |= whole[:, None] & place.candidate_keys
        return TileChoice(columns, slashes & ~whole[:, None], whole, dropped, probe.scored)

    def _probed(self, q: Tensor, place: TilePlace) -> _Probe:
        rows = place.probe_rows(self._probe_rows)
        num_heads, group = q.shape[:2]
        weight = torch.zeros(len(place.query_blocks), len(rows), dtype=q.dtype)
        weight[(place.first + rows) // place.block - place.query_blocks[0], torch.arange(len(rows))] = 1.0
        weight /= len(rows)
        share = weight.sum(1)
        means = (weight / group).repeat(1, group).to(q.device)
        probes = q[:, :, rows.to(q.device)].flatten(1, 2) * self._scale
        mass = q.new_empty(num_heads, len(share), place.num_blocks * place.block)
        finite = torch.empty(num_heads, dtype=torch.bool)
        for a in range(0, num_heads, self._heads_at_once):
            some = slice(a, a + self._heads_at_once)
            weights, finite[some] = self._weights(probes[some], self._k[some], place, rows)
            torch.bmm(means.expand(len(weights), -1, -1), weights[..., : mass.shape[2]], out=mass[some])
        mass = mass.cpu()
        scored = num_heads * probes.shape[1] * place.num_keys
        return _Probe(mass, share, finite & torch.isfinite(mass.sum((1, 2))), scored)

    def _weights(self, probes: Tensor, k: Tensor, place: TilePlace, rows: Tensor) -> tuple[Tensor, Tensor]:
        """softmax [h, G * n, num_keys], and whether the scores are finite [h]."""
        if not len(self._buffer):
            self._buffer = probes.new_empty(self._most_scores)
        shape = (*probes.shape[:2], place.num_keys)
        scores = self._buffer[: math.prod(shape)].view(shape)
        torch.bmm(probes, k[:, : place.num_keys].mT, out=scores)
        later = own = None
        if place.causal:
            own = scores[..., place.first :]
            later = torch.arange(own.shape[-1]) > rows[:, None]
            later = later.repeat(own.shape[1] // len(rows), 1).to(own.device)
            own.masked_fill_(later, 0.0)
        finite = torch.isfinite(scores.flatten(1).sum(1)).cpu()
        if own is not None and later is not None:
            own.masked_fill_(later, -math.inf)
        return torch.softmax(scores, -1, out=scores), finite


@dataclass(frozen=True)
class _Probe:
    """``mass`` [Hk, nq, num_blocks * L] of each key from the probe rows of each query block, as shares of the
    mean over all of them; those rows' ``share`` of the probe [nq]; whether all scores are finite [Hk]; how
    many scores there were."""

    mass: Tensor
    share: Tensor
    finite: Tensor
    scored: int


def _verticals(probe: _Probe) -> Tensor:
    """[Hk, num_blocks * L]: by turns, query blocks are even and odd."""
    some, others = (probe.mass[:, turn::2].sum(1) for turn in (0, 1))
    some_share, others_share = (float(probe.share[turn::2].sum()) for turn in (0, 1))
    if some_share == 0.0 or others_share == 0.0:
        return some + others
    return some.div_(some_share).sqrt_().mul_(others.div_(others_share).sqrt_())


def _by_offset(blocks: Tensor, share: Tensor, place: TilePlace) -> Tensor:
    """Mass [Hk, nd] at each offset per probe row that can use it, from blocks [Hk, nq, num_blocks]."""
    targets, usable = place.targets
    mass = blocks[:, torch.arange(len(share))[:, None], targets].masked_fill_(~usable, 0.0).sum(1)
    reach = (usable * share[:, None]).sum(0)
    return torch.where(reach > 0, mass / reach, 0.0)


def _left_out(blocks: Tensor, slashes: Tensor, share: Tensor, place: TilePlace) -> Tensor:
    """[Hk, nq]: mass of the probe rows of each query block in blocks that no slash has. A query block without
    a probe row takes the next one's: the last always has one."""
    targets, usable = place.targets
    head, block, offset = (slashes[:, None] & usable).nonzero(as_tuple=True)
    blocks[head, block, targets[block, offset]] = 0.0
    dropped = (blocks.sum(-1) / share).clamp_(0.0, 1.0)
    probed = torch.where(share > 0, torch.arange(len(share)), len(share) - 1)
    return dropped[:, probed.flip(0).cummin(0).values.flip(0)]


def _everything(place: TilePlace, num_heads: int) -> TileChoice:
    return TileChoice(
        place.candidate_keys.expand(num_heads, -1),
        torch.zeros(num_heads, len(place.offsets), dtype=torch.bool),
        torch.ones(num_heads, dtype=torch.bool),
        torch.zeros(num_heads, len(place.query_blocks)),
    )


def _most(mass: Tensor, counts: Tensor, allowed: Tensor | None = None) -> Tensor:
    """The ``counts`` [heads] largest of ``mass`` [heads, n], at ``allowed`` [n] places; bool [heads, n]. Ties
    go to the lower place."""
    ranked = mass if allowed is None else mass.masked_fill(~allowed, -1.0)
    most = mass.shape[1] if allowed is None else int(allowed.sum())
    keep = np.zeros(ranked.shape, bool)
    for row, values, count in zip(keep, ranked.numpy(), counts.clamp(max=most).tolist(), strict=True):
        if count:
            row[:] = _largest(values, count)
    return torch.from_numpy(keep)


def _largest(values: npt.NDArray[Any], count: int) -> npt.NDArray[np.bool_]:
    """Where the ``count`` largest are: a partition finds the smallest of them, the lowest of its equals
    fill up."""
    least = np.partition(values, len(values) - count)[len(values) - count]
    keep: npt.NDArray[np.bool_] = values > least
    equal = np.flatnonzero(values == least)
    keep[equal[: count - int(keep.sum())]] = True
    return keep
