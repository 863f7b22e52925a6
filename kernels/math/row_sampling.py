"""Which rows of a layer's attention are computed a second time, exactly, to measure the error of all of them.

    e_i     = 1 for the first and the last 16 positions of the prompt, else 0
    u_i     = n / P, where the n = 64 positions of U are drawn of the P that are computed, without replacement
    rho_i   = min(1, r/P (1/2 + 1/2 min(16, d_i / dbar_i))),    dbar_i = mean of d over the rows first .. i
    pi_i    = 1 - (1 - e_i) (1 - u_i) (1 - rho_i)               probability that row i is looked at

d_i: the softmax mass that the selection says it left out of row i (mean over heads); rows without such an
estimate are drawn evenly (rho_i = r/P). r = max(64, P/64), or what the request says; where d grows along
the prompt up to about 2 r rows are drawn. first: the first position that is computed at all, P = total -
first; a prefix that the cache holds is never computed, so nothing is said about it. Where P <= 128 or r >= P
every row is taken.

Every draw is a pure function of (seed, layer, position) and of d at positions <= its own: neither chunking
nor what else is in the batch moves it. U is a bottom-k sample: the 64 computed positions with the smallest
keys of a hash, so a cached prefix only replaces the members that it swallowed. Sums of d are sums of
integers: exact in any order. The importance draw is a Poisson sample (Horvitz and Thompson, JASA 1952;
Särndal, Swensson, Wretman, "Model assisted survey sampling", 1992, ch. 3.5), so every pi_i is known when its
row is computed.

P computed positions, N = total positions of the prompt, R rows drawn.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels.math.rng import bits, fold

EDGE_ROWS = 16
UNIFORM_ROWS = 64
ALL_ROWS_UP_TO = 128
MIN_ROWS = 64
ROWS_DIVISOR = 64
MAX_RATIO = 16.0
"""Of a row's dropped mass to the mean so far: bounds what the first rows after a run of zeros cost."""
DECODE_PROBABILITY = 1.0 / 16.0

_STREAM, _UNIFORM, _IMPORTANCE, _DECODE = 0x524F5753, 1, 2, 3
_ONE = 1 << 32
"""Dropped mass 1.0 as an integer."""

Rows = int | Literal["all"] | None


@dataclass(frozen=True, eq=False)
class DrawnRows:
    """Rows to compute exactly: ``positions`` int64 [R], absolute and ascending; ``probability`` float64 [R],
    each row's chance of being drawn; ``uniform`` bool [R], True for members of the even draw. On the CPU."""

    positions: Tensor
    probability: Tensor
    uniform: Tensor

    def __len__(self) -> int:
        return len(self.positions)


class RowSampler:
    """The draw for one layer of one sequence's prompt.

    ``layer`` is the ordinal among the layers to which the choice applies, ``total`` the prompt's length,
    ``rows`` the size r of the importance draw (None: max(64, P/64); "all": every row). ValueError where a
    number is out of range. Apart from the running mean it holds no state; ``copy`` lets a step that failed
    begin again.
    """

    def __init__(self, seed: int, layer: int, total: int, rows: Rows = None) -> None:
        _check(layer, rows)
        if total < 1:
            raise ValueError(f"total is {total}: a prompt has at least one position")
        self.total = total
        self._rows = rows
        self._stream = fold(seed, _STREAM, layer)
        self._first: int | None = None
        self._next = 0
        self._dropped_sum = 0
        self._dropped_rows = 0
        self._last_key = 0

    def copy(self) -> RowSampler:
        return copy.copy(self)

    def draw(self, start: int, n: int, dropped: Tensor | None) -> DrawnRows:
        """The rows to look at among the positions start .. start + n - 1.

        ``dropped`` [n]: their estimates of dropped mass, 0 .. 1, on any device (NaN counts as 1), or None.
        Calls go through the positions in order, without gaps; the first may begin anywhere (a cached prefix).
        """
        self._advance(start, n)
        positions = torch.arange(start, start + n)
        if self._takes_all:
            return _every_row(positions)
        edge = (positions < EDGE_ROWS) | (positions >= self.total - EDGE_ROWS)
        uniform = self._keys(_UNIFORM, positions) <= self._last_key
        rho = self._importance(n, dropped)
        drawn = edge | uniform | (self._unit(_IMPORTANCE, positions) < rho)
        probability = 1.0 - (1.0 - UNIFORM_ROWS / self._computed) * (1.0 - rho)
        probability.masked_fill_(edge, 1.0)
        return DrawnRows(positions[drawn], probability[drawn], uniform[drawn])

    @property
    def _computed(self) -> int:
        """P."""
        return self.total - (self._first or 0)

    @property
    def _takes_all(self) -> bool:
        return self._computed <= ALL_ROWS_UP_TO or self._rows == "all" or self._r >= self._computed

    @property
    def _r(self) -> int:
        if isinstance(self._rows, int):
            return self._rows
        return max(MIN_ROWS, self._computed // ROWS_DIVISOR)

    def _advance(self, start: int, n: int) -> None:
        if start < 0 or n < 1 or start + n > self.total:
            raise ValueError(
                f"rows {start} .. {start + n - 1} are not rows of a prompt of {self.total} positions"
            )
        if self._first is None:
            self._first = start
            if not self._takes_all:
                keys = self._keys(_UNIFORM, torch.arange(start, self.total))
                self._last_key = int(keys.kthvalue(UNIFORM_ROWS).values)
        elif start != self._next:
            raise ValueError(f"rows are drawn in order: {self._next} comes next, not {start}")
        self._next = start + n

    def _importance(self, n: int, dropped: Tensor | None) -> Tensor:
        """rho [n] in fp64."""
        rate = self._r / self._computed
        if dropped is None:
            return torch.full((n,), min(1.0, rate), dtype=torch.float64)
        if dropped.shape != (n,):
            raise ValueError(
                f"dropped has shape {tuple(dropped.shape)}: one number for each of {n} rows is needed"
            )
        d = dropped.detach().to("cpu", torch.float64).nan_to_num(1.0, 1.0, 0.0).clamp(0.0, 1.0)
        units = (d * _ONE).to(torch.int64)
        sums = units.cumsum(0) + self._dropped_sum
        counts = torch.arange(1, n + 1) + self._dropped_rows
        self._dropped_sum, self._dropped_rows = int(sums[-1]), int(counts[-1])
        ratio = (units.double() * counts / sums.clamp(min=1)).clamp(max=MAX_RATIO)
        ratio.masked_fill_(sums == 0, 1.0)
        return (rate * (0.5 + 0.5 * ratio)).clamp(max=1.0)

    def _keys(self, draw: int, positions: Tensor) -> Tensor:
        return bits(torch.tensor(fold(self._stream, draw)), positions)

    def _unit(self, draw: int, positions: Tensor) -> Tensor:
        return _unit(self._keys(draw, positions))


class DecodeSampler:
    """The draw for one layer of one sequence's decode steps: each position with probability 1/16, ("all":
    each), by (seed, layer, position). A number of ``rows`` speaks of the prompt and changes nothing here, for
    how many steps there will be is not known. Given how many were drawn, they are an even draw of the steps.
    """

    def __init__(self, seed: int, layer: int, rows: Rows = None) -> None:
        _check(layer, rows)
        self._all = rows == "all"
        self._stream = torch.tensor(fold(seed, _STREAM, layer, _DECODE))

    def copy(self) -> DecodeSampler:
        return copy.copy(self)

    def draw(self, start: int, n: int = 1, dropped: Tensor | None = None) -> DrawnRows:
        """The steps to look at among the positions start .. start + n - 1, asked in any order."""
        if start < 0 or n < 1:
            raise ValueError(f"there are no {n} positions from {start} on")
        positions = torch.arange(start, start + n)
        if self._all:
            return _every_row(positions)
        some = positions[_unit(bits(self._stream, positions)) < DECODE_PROBABILITY]
        chance = torch.full((len(some),), DECODE_PROBABILITY, dtype=torch.float64)
        return DrawnRows(some, chance, torch.ones(len(some), dtype=torch.bool))


def _every_row(positions: Tensor) -> DrawnRows:
    chance = torch.ones(len(positions), dtype=torch.float64)
    return DrawnRows(positions, chance, torch.ones(len(positions), dtype=torch.bool))


def _unit(random_bits: Tensor) -> Tensor:
    """Uniform in [0, 1), fp64, from the upper 53 bits."""
    return ((random_bits >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def _check(layer: int, rows: Rows) -> None:
    if layer < 0:
        raise ValueError(f"layer is {layer}: an ordinal from 0 on")
    if isinstance(rows, str) and rows != "all":
        raise ValueError(f"rows is {rows!r}: a number, 'all', or None for the default")
    if isinstance(rows, int) and rows < 1:
        raise ValueError(f"rows is {rows}: at least 1, 'all', or None for the default")
