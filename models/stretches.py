"""Where the attention call of one layer may be left: stretches of a long sequence's rows.

    attend(q) = [attend(q_1); attend(q_2); ...]       cut at absolute multiples of the query tile

That is the contract of chunked prefill, so a result does not depend on it. What would be computed anew in
every stretch is not cut: what sums over all keys (``approximates``) or sorts them (``selection`` row) goes on
from kept states in a decoder and runs whole in an encoder; ``selection`` prompt runs whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import lcm
from typing import TYPE_CHECKING

import torch

from kernels.contract import Backend, Params, Stats
from kernels.parallel import MIN_ROWS, summed
from models.planned import STRATUM

if TYPE_CHECKING:
    from models.seam import LayerPlan
    from models.step import Member

STRETCH_FLOPS = 2e9
"""Operations of attention between two yield points: some 50 ms on a slow core."""
TIDY_ROWS = 128
DENSE_ROWS = 768
"""torch's CPU kernel takes blocks of 256 query rows from so many rows on, smaller and slower ones below:
exact attention in stretches of 128 rows took 1.4 times as long, in stretches of 768 1.03 times."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows ``begin`` .. ``end`` - 1 of one member's; ``whole`` where they are all of them."""

    member: Member
    begin: int
    end: int

    @property
    def whole(self) -> bool:
        return self.num_rows == self.member.num_rows

    @property
    def num_rows(self) -> int:
        return self.end - self.begin

    @property
    def rows(self) -> slice:
        """Of the packed axis."""
        first = self.member.rows.start
        return slice(first + self.begin, first + self.end)

    @property
    def start(self) -> int:
        """Position of its first row."""
        return self.member.start + self.begin

    @property
    def stop(self) -> int:
        return self.member.start + self.end


def one_after_another(
    wholes: Sequence[Piece], layer: LayerPlan, backend: Backend, params: Params, itemsize: int, on_cpu: bool
) -> list[list[Piece]]:
    """The rows of ``wholes`` in order, in batches of about STRETCH_FLOPS with a yield point between. A guard
    has looked at a piece before the next of its sequence begins, which may have to be exact."""
    batches: list[list[Piece]] = [[]]
    room = STRETCH_FLOPS
    for whole in wholes:
        num_keys = whole.stop if layer.causal else whole.member.stop
        flops = backend.flops(params, layer.call_shape(whole.num_rows, num_keys, itemsize, on_cpu))
        for piece in _pieces(whole, layer, backend, params, flops):
            share = flops * piece.num_rows / whole.num_rows
            if batches[-1] and (share > room or _waits(piece, batches[-1][-1])):
                batches.append([])
                room = STRETCH_FLOPS
            batches[-1].append(piece)
            room -= share
    return batches


def _waits(piece: Piece, last: Piece) -> bool:
    return piece.member is last.member and piece.member.guard is not None


def _pieces(
    whole: Piece, layer: LayerPlan, backend: Backend, params: Params, flops: float
) -> Iterator[Piece]:
    cut = flops > STRETCH_FLOPS and permits(backend, params, layer.causal and whole.member.cache is not None)
    borders = _borders(whole, backend, params, flops) if cut else [whole.begin, whole.end]
    for begin, end in pairwise(borders):
        yield Piece(whole.member, begin, end)


def permits(backend: Backend, params: Params, goes_on: bool) -> bool:
    """Whether a layer's rows may be cut. ``goes_on``: causal, with states kept beside the keys."""
    able = backend.capabilities
    if able.selection == "prompt":
        return False
    return goes_on or (able.selection in ("none", "tile") and not able.approximates)


def _borders(whole: Piece, backend: Backend, params: Params, flops: float) -> list[int]:
    """Rows of the member where stretches begin and end."""
    unit = _unit(backend, params)
    if whole.member.guard is not None:  # what is repaired together is computed together
        unit = lcm(unit, STRATUM)
    height = max(1, int(whole.num_rows * STRETCH_FLOPS / flops) // unit) * unit
    first = (whole.start // height + 1) * height - whole.member.start
    return [whole.begin, *range(first, whole.end, height), whole.end]


def _unit(backend: Backend, params: Params) -> int:
    """Rows that a stretch has at least: whole query tiles; where ``kernels.parallel`` shares a call among
    threads, enough for each of them; where every pair counts, as many as the dense kernel runs well with."""
    able = backend.capabilities
    least = DENSE_ROWS if able.exact else TIDY_ROWS
    if able.selection == "tile":
        least = MIN_ROWS * torch.get_num_threads()
    return -(-least // params.chunk_multiple()) * params.chunk_multiple()


def merged(parts: Sequence[tuple[Stats, int]]) -> Stats:
    """What the stretches (each with its number of rows) computed together."""
    if len(parts) == 1:
        return parts[0][0]
    measured = [(each.dropped_mass, rows) for each, rows in parts if each.dropped_mass is not None]
    rows = sum(rows for _, rows in measured)
    dropped_mass = sum(mass * n for mass, n in measured) / rows if rows else None
    return replace(summed([each for each, _ in parts]), dropped_mass=dropped_mass)
