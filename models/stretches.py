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
from typing import TYPE_CHECKING

import torch

from kernels.contract import Backend, Params, Stats
from kernels.parallel import MIN_ROWS, summed

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
        return self.end - self.begin == self.member.num_rows


def one_after_another(
    members: Sequence[Member], layer: LayerPlan, backend: Backend, params: Params, itemsize: int, on_cpu: bool
) -> list[list[Piece]]:
    """The members' rows in order, in batches of about STRETCH_FLOPS with a yield point between."""
    batches: list[list[Piece]] = [[]]
    room = STRETCH_FLOPS
    for member in members:
        call = layer.call_shape(member.num_rows, member.stop, itemsize, on_cpu)
        flops = backend.flops(params, call)
        for piece in _pieces(member, layer, backend, params, flops):
            share = flops * (piece.end - piece.begin) / member.num_rows
            if batches[-1] and share > room:
                batches.append([])
                room = STRETCH_FLOPS
            batches[-1].append(piece)
            room -= share
    return batches


def _pieces(
    member: Member, layer: LayerPlan, backend: Backend, params: Params, flops: float
) -> Iterator[Piece]:
    cut = flops > STRETCH_FLOPS and permits(backend, params, layer.causal and member.cache is not None)
    for begin, end in pairwise(_borders(member, backend, params, flops) if cut else [0, member.num_rows]):
        yield Piece(member, begin, end)


def permits(backend: Backend, params: Params, goes_on: bool) -> bool:
    """Whether a layer's rows may be cut. ``goes_on``: causal, with states kept beside the keys."""
    able = backend.capabilities
    if able.selection == "prompt":
        return False
    return goes_on or (able.selection in ("none", "tile") and not able.approximates)


def _borders(member: Member, backend: Backend, params: Params, flops: float) -> list[int]:
    """Rows of the member where stretches begin and end."""
    unit = _unit(backend, params)
    height = max(1, int(member.num_rows * STRETCH_FLOPS / flops) // unit) * unit
    first = (member.start // height + 1) * height - member.start
    return [0, *range(first, member.num_rows, height), member.num_rows]


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
