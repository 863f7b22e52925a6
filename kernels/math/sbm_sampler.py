"""Edges of a stochastic block model drawn row by row, without the probabilities of all pairs.

poisson      M_ij ~ Poisson(p_ij), independent:   the points of a unit-rate Poisson process on [0, E_i),
             m_i ~ Poisson(E_i) of them; x lies in the last cluster v with sum_{u < v} r_iu b_u <= x, and its
             distance to that sum, over r_iv, is a place in the prefix sums of cluster v, where one key lies.
             A key met twice is one edge: it is kept with probability 1 - e^(-p_ij).
bernoulli    keep ij where u_ij < min(1, p_ij):   the paper's dense form, O(N M C), tile by tile

The paper's sampler (arXiv 2210.15541, section 3.2, after Rohe et al., "A note on quickly sampling a sparse
matrix with low rank expectation") draws the same Poisson law for all rows at once: m ~ Poisson(sum E_i).
Here a row's random numbers depend on (seed, layer, head, its position) alone and its choice on the keys that
it may see, so that neither chunks nor later tokens move it. Cost O(N C^2 + M C + edges). ``exploration``
adds a constant to all p: one more cluster, of which every token is a member.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.math.rng import bits, fold
from kernels.math.sbm import ClusterParams, hidden, memberships

POINTS_AT_ONCE = 1 << 17
ROWS_AT_ONCE = 1024
_POISSON, _BERNOULLI = 5, 6
_SPARE = 8


@dataclass(frozen=True)
class Edges:
    """Of some rows in order: ``ends`` int64 [R + 1], ``keys`` int32 [n] ascending in each row, each once."""

    ends: Tensor
    keys: Tensor


@dataclass(frozen=True)
class Rates:
    """Of R rows over C clusters, fp64: ``rows`` r [R, C], ``sums`` b [R, C], ``upto`` [R, C + 1], the sums of
    r b over the clusters before each."""

    rows: Tensor
    sums: Tensor
    upto: Tensor

    @property
    def expected(self) -> Tensor:
        """E [R]."""
        return self.upto[:, -1]

    def take(self, rows: slice | Tensor) -> Rates:
        return Rates(self.rows[rows], self.sums[rows], self.upto[rows])


def row_rates(q: Tensor, learned: ClusterParams, head: int | slice, exploration: float) -> Tensor:
    """r = q^ S: q [R, D] of one head, or [H, R, D] of several -> [..., R, C] fp64, with ``exploration`` above
    0 a column more."""
    found = memberships(hidden(q, learned), learned.wide[0][head]) @ learned.affinities[head]
    if exploration == 0.0:
        return found
    return torch.cat([found, torch.full_like(found[..., :1], exploration)], -1)


def rates(rows: Tensor, sums: Tensor) -> Rates:
    upto = torch.nn.functional.pad((rows * sums).cumsum(-1), (1, 0))
    return Rates(rows, sums, upto)


def head_stream(seed: int, layer: int, head: int, *, bernoulli: bool = False) -> int:
    return fold(seed, layer, _BERNOULLI if bernoulli else _POISSON, head)


def row_streams(stream: int | Tensor, positions: Tensor) -> Tensor:
    """One stream per position [R] (and per stream, where those are a tensor [R])."""
    start = stream if isinstance(stream, Tensor) else torch.tensor(stream, device=positions.device)
    return bits(start, positions)


def batches(expected: Tensor) -> Iterator[slice]:
    """Stretches of rows that expect POINTS_AT_ONCE points together, or of one row."""
    first, held = 0, 0.0
    for row, points in enumerate((expected + _SPARE).tolist()):
        if row > first and held + points > POINTS_AT_ONCE:
            yield slice(first, row)
            first, held = row, 0.0
        held += points
    yield slice(first, len(expected))


@dataclass(frozen=True)
class Points:
    """Points in no order: ``row``, ``cluster`` int32 [n], ``place`` fp64 [n] in [0, b)."""

    row: Tensor
    cluster: Tensor
    place: Tensor


def draw_points(streams: Tensor, found: Rates) -> Points:
    """The points of rows with these streams [R]: some arrivals of every row, more of those that have not
    reached their E, and so on."""
    rows = torch.arange(len(streams), dtype=torch.int32, device=streams.device)
    parts, reached, first = [], torch.zeros_like(found.expected), 0
    while len(rows):
        own = found.take(rows)
        width = _SPARE + math.ceil(float((own.expected - reached).mean()))
        times = _arrivals(streams[rows], reached, first, width)
        parts.append(_located(rows, times, own))
        short = times[:, -1] < own.expected
        rows, reached, first = rows[short], times[short, -1], first + width
    return parts[0] if len(parts) == 1 else Points(*map(torch.cat, zip(*map(_fields, parts), strict=True)))


def _fields(points: Points) -> tuple[Tensor, Tensor, Tensor]:
    return points.row, points.cluster, points.place


def _arrivals(streams: Tensor, reached: Tensor, first: int, width: int) -> Tensor:
    """Arrival times [R, width] of unit-rate processes from number ``first`` on, the last before them at
    ``reached``."""
    waits = uniforms(streams[:, None], torch.arange(first, first + width, device=streams.device))
    waits.log_().neg_()
    waits[:, 0] += reached
    return waits.cumsum_(-1)


def _located(rows: Tensor, times: Tensor, found: Rates) -> Points:
    """Which of the arrivals lie before E, in which cluster, and where in its sums."""
    width, C = times.shape[1], found.rows.shape[1]
    clusters = torch.searchsorted(found.upto[:, 1:].contiguous(), times, right=True, out_int32=True)
    flat = (times < found.expected[:, None]).view(-1).nonzero()[:, 0].int()
    line = torch.div(flat, width, rounding_mode="floor")
    cluster = clusters.view(-1).index_select(0, flat)
    at = line * C + cluster
    place = times.view(-1).index_select(0, flat)
    place -= found.upto[:, :-1].reshape(-1).index_select(0, at)
    place /= found.rows.reshape(-1).index_select(0, at)
    below = torch.nextafter(found.sums, torch.zeros_like(found.sums)).reshape(
        -1
    )  # division may round up to b
    place = torch.minimum(place, below.index_select(0, at)).clamp_(min=0.0)
    return Points(rows.index_select(0, line), cluster, place)


def uniforms(streams: Tensor, counters: Tensor) -> Tensor:
    """fp64 in (0, 1), from the upper 53 of the bits."""
    drawn = bits(streams, counters).bitwise_right_shift_(11).bitwise_and_((1 << 53) - 1)
    return drawn.double().add_(0.5).mul_(2.0**-53)


def distinct(row: Tensor, key: Tensor, num_rows: int, num_keys: int) -> Edges:
    """Pairs [n] in any order, each as often as it was drawn -> edges, each once."""
    wide = num_rows * num_keys >= 1 << 31
    pairs = (row.long() if wide else row.int()) * num_keys + key
    if pairs.device.type == "cpu":
        pairs = torch.from_numpy(np.sort(pairs.numpy()))  # several times faster than torch's
        pairs = torch.unique_consecutive(pairs)
    else:
        pairs = torch.unique(pairs)
    ends = torch.searchsorted(
        pairs, torch.arange(num_rows + 1, device=row.device, dtype=pairs.dtype) * num_keys
    )
    begins = torch.arange(num_rows, device=row.device, dtype=pairs.dtype) * num_keys
    return Edges(ends, pairs.sub_(torch.repeat_interleave(begins, ends.diff())).int())


def bernoulli_edges(streams: Tensor, rows: Tensor, members: Tensor, positions: Tensor | None) -> Edges:
    """Rows r [R, C] over members [C, M] fp64; ``positions`` [R]: a row sees keys up to its own; None: all."""
    keys = torch.arange(members.shape[1], device=rows.device)
    keep = uniforms(streams[:, None], keys) < rows @ members
    if positions is not None:
        keep &= keys <= positions[:, None]
    counts = keep.sum(-1)
    return Edges(torch.nn.functional.pad(counts.cumsum(0), (1, 0)), keep.nonzero()[:, 1].int())
