"""Which rows of a layer's attention are computed a second time, exactly, to measure the error of all of them.

    e_i     = 1 for the first and the last 16 positions of the prompt, else 0
    u_i     = n / P, where the n = 64 positions of U are drawn of the P that are computed, without replacement
    rho_i   = min(1, r/P (1/2 + 1/2 min(16, d_i / dbar_i)))
    dbar_i  = mean of d over the rows a .. i,    a = max(first, 256 (floor(i/256) - 1))
    pi_i    = 1 - (1 - e_i) (1 - u_i) (1 - rho_i)               probability that row i is looked at

d_i: the softmax mass that the selection says it left out of row i (mean over heads); rows without such an
estimate are drawn evenly (rho_i = r/P). It is held against what is usual there, in 256 to 511 rows before:
d grows along most prompts, and held against all rows before it would draw more rows than asked for, most of
them where rows cost most. first: the first position that is computed at all, P = total - first; a prefix that
the cache holds is never computed, so nothing is said about it. r = max(64, P/64 - 96), which with the other
two draws makes max(160, P/64) rows, or what the request says. Where P <= 128 or r >= P every row is taken.

Every draw is a pure function of (seed, layer, position) and of d at positions <= its own: neither chunking
nor what else is in the batch moves it. U is a bottom-k sample: the 64 computed positions with the smallest
keys of a hash, so a cached prefix only replaces the members that it swallowed. Sums of d are sums of
integers: exact in any order. The importance draw is a Poisson sample (Horvitz and Thompson, JASA 1952;
Särndal, Swensson, Wretman, "Model assisted survey sampling", 1992, ch. 3.5), so every pi_i is known when its
row is computed. As rho_i never exceeds 8.5 r/P, most positions can be told to be out of it before anything is
known of d; the others are listed once.

P computed positions, N = total positions of the prompt, R rows drawn, C positions listed.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.math.rng import bits, fold

EDGE_ROWS = 16
UNIFORM_ROWS = 64
ALL_ROWS_UP_TO = 128
MIN_ROWS = 64
ROWS_DIVISOR = 64
MAX_RATIO = 16.0
"""Of a row's dropped mass to what is usual there: bounds what the first rows after a run of zeros cost."""
USUAL_ROWS = 256
OTHER_ROWS = 2 * EDGE_ROWS + UNIFORM_ROWS
DECODE_PROBABILITY = 1.0 / 16.0

_STREAM, _UNIFORM, _IMPORTANCE, _DECODE = 0x524F5753, 1, 2, 3
_ONE = 1 << 32
"""Dropped mass 1.0 as an integer."""

Rows = int | Literal["all"] | None
_Integers = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]
_Flags = npt.NDArray[np.bool_]
_Position = TypeVar("_Position", int, _Integers)


@dataclass(frozen=True, eq=False)
class DrawnRows:
    """Rows to compute exactly: ``positions`` int64 [R], absolute and ascending; ``probability`` float64 [R],
    each row's chance of being drawn; ``uniform`` bool [R], True for members of the even draw. On the CPU."""

    positions: Tensor
    probability: Tensor
    uniform: Tensor

    def __len__(self) -> int:
        return len(self.positions)


def expected_rows(computed: int, rows: Rows = None) -> int:
    """About how many rows of a layer are looked at, of so many that are computed."""
    drawn = _importance_rows(computed, rows)
    return computed if _takes_all(computed, rows) else min(computed, OTHER_ROWS + drawn)


def _importance_rows(computed: int, rows: Rows) -> int:
    """r."""
    return rows if isinstance(rows, int) else max(MIN_ROWS, computed // ROWS_DIVISOR - OTHER_ROWS)


def _takes_all(computed: int, rows: Rows) -> bool:
    return computed <= ALL_ROWS_UP_TO or rows == "all" or _importance_rows(computed, rows) >= computed


class RowSampler:
    """The draw for one layer of one sequence's prompt.

    ``layer`` is the ordinal among the layers to which the choice applies, ``total`` the prompt's length,
    ``rows`` the size r of the importance draw (None: max(64, P/64 - 96); "all": every row). ValueError where
    a number is out of range. What it remembers of one call for the next are the sums of d over the last 512
    positions; ``copy`` lets a step that failed begin again.
    """

    def __init__(self, seed: int, layer: int, total: int, rows: Rows = None) -> None:
        _check(layer, rows)
        if total < 1:
            raise ValueError(f"total is {total}: a prompt has at least one position")
        self.total = total
        self._rows = rows
        self._stream = fold(seed, _STREAM, layer)
        self._next: int | None = None
        self._listed: _Listed | None = None
        self._usual = _Usual(0)

    def copy(self) -> RowSampler:
        return copy.copy(self)

    def draw(self, start: int, n: int, dropped: Tensor | None) -> DrawnRows:
        """The rows to look at among the positions start .. start + n - 1.

        ``dropped`` [n]: their estimates of dropped mass, 0 .. 1, on any device (NaN counts as 1), or None.
        Calls go through the positions in order, without gaps; the first may begin anywhere (a cached prefix).
        """
        self._advance(start, n)
        if self._listed is None:
            return _every_row(torch.arange(start, start + n))
        units = None if dropped is None else _units(dropped, n)
        self._usual = self._usual.then(units, n)
        some = self._listed.between(start, start + n)
        rho = np.minimum(self._listed.rate * (0.5 + 0.5 * self._ratios(some, units, start)), 1.0)
        drawn = some.anyway | (some.unit < rho)
        probability = 1.0 - (1.0 - self._listed.evenly) * (1.0 - rho)
        probability = np.where(some.edge, 1.0, probability)
        columns = (some.positions, probability, some.uniform)
        return DrawnRows(*(torch.from_numpy(column[drawn]) for column in columns))

    def _ratios(self, some: _Listed, units: _Integers | None, start: int) -> _Floats:
        """d over what is usual, of some of the newest positions."""
        if units is None:
            return np.ones(len(some.positions))
        return self._usual.ratios(some.positions, units[some.positions - start])

    def _advance(self, start: int, n: int) -> None:
        if start < 0 or n < 1 or start + n > self.total:
            raise ValueError(
                f"rows {start} .. {start + n - 1} are not rows of a prompt of {self.total} positions"
            )
        if self._next is None:
            self._usual = _Usual(start)
            if not _takes_all(self.total - start, self._rows):
                self._listed = self._list(start)
        elif start != self._next:
            raise ValueError(f"rows are drawn in order: {self._next} comes next, not {start}")
        self._next = start + n

    def _list(self, first: int) -> _Listed:
        """The positions from ``first`` on that may be drawn."""
        positions = torch.arange(first, self.total)
        computed = len(positions)
        rate = _importance_rows(computed, self._rows) / computed
        keys = self._keys(_UNIFORM, positions)
        uniform = keys <= keys.kthvalue(UNIFORM_ROWS).values
        edge = (positions < EDGE_ROWS) | (positions >= self.total - EDGE_ROWS)
        unit = _unit(self._keys(_IMPORTANCE, positions))
        listed = uniform | edge | (unit < rate * (0.5 + 0.5 * MAX_RATIO))
        where, chance, at_edge, evenly = (each[listed].numpy() for each in (positions, unit, edge, uniform))
        return _Listed(where, chance, at_edge, evenly, rate, UNIFORM_ROWS / computed)

    def _keys(self, draw: int, positions: Tensor) -> Tensor:
        return bits(torch.tensor(fold(self._stream, draw)), positions)


@dataclass(frozen=True, eq=False)
class _Listed:
    """The positions [C], ascending, of which some are drawn once d is known: ``unit`` [C] is below rho_i
    where the importance draw takes one; ``edge`` and ``uniform`` bool [C]. ``rate`` is r/P, ``evenly`` the
    u_i of each."""

    positions: _Integers
    unit: _Floats
    edge: _Flags
    uniform: _Flags
    rate: float
    evenly: float

    @property
    def anyway(self) -> _Flags:
        """Drawn whatever d is."""
        return self.edge | self.uniform

    def between(self, start: int, stop: int) -> _Listed:
        a, b = np.searchsorted(self.positions, (start, stop))
        rows = slice(a, b)
        return replace(
            self,
            positions=self.positions[rows],
            unit=self.unit[rows],
            edge=self.edge[rows],
            uniform=self.uniform[rows],
        )


class _Usual:
    """Sums of d, as integers, and counts of rows that have one, before each of the positions begin .. begin +
    m - 1: int64 [2, m]. Never written to."""

    def __init__(self, begin: int, sums: _Integers | None = None) -> None:
        self._begin = begin
        self._sums = np.zeros((2, 1), np.int64) if sums is None else sums

    def then(self, units: _Integers | None, n: int) -> _Usual:
        """After n more positions, without those that are too far back to matter to what follows."""
        before, after = self._sums, np.zeros((2, n), np.int64)
        if units is not None:
            after[0], after[1] = np.cumsum(units), np.arange(1, n + 1)
        after += before[:, -1:]
        end = self._begin + before.shape[1] - 1  # of what was known: these n begin there
        begin = max(self._begin, _usual_from(end))
        return _Usual(begin, np.concatenate([before[:, begin - self._begin :], after], axis=1))

    def ratios(self, positions: _Integers, units: _Integers) -> _Floats:
        """min(16, d_i / dbar_i) of some of the newest positions; 1 where nothing was dropped at all."""
        begin = np.maximum(_usual_from(positions), self._begin)
        sums, counts = self._sums[:, positions + 1 - self._begin] - self._sums[:, begin - self._begin]
        ratio: _Floats = np.minimum(units * counts.astype(np.float64) / np.maximum(sums, 1), MAX_RATIO)
        ratio[sums == 0] = 1.0
        return ratio


def _usual_from(position: _Position) -> _Position:
    """Where the rows begin that a position is held against."""
    return (position // USUAL_ROWS - 1) * USUAL_ROWS


def _units(dropped: Tensor, n: int) -> _Integers:
    """d as integers [n]."""
    if dropped.shape != (n,):
        raise ValueError(
            f"dropped has shape {tuple(dropped.shape)}: one number for each of {n} rows is needed"
        )
    d = dropped.detach().to("cpu", torch.float64).nan_to_num(1.0, 1.0, 0.0).clamp(0.0, 1.0)
    units: _Integers = (d * _ONE).to(torch.int64).numpy()
    return units


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
