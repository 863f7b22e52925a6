"""Rows of an attention call computed a second time, exactly, for the members whose error is measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.contract import Stats
from kernels.math.dense import accumulator_dtype
from kernels.math.row_error import DrawnRows, exact_rows
from models.forward import can_be_left, offer_to_pause
from models.meter import Held, Reading
from models.stretches import STRETCH_FLOPS

if TYPE_CHECKING:
    from models.seam import LayerPlan


@dataclass(frozen=True)
class Computed:
    """What one call computed of one sequence in one layer: q [1, H, n, D] from position ``start`` on, over
    the keys k [1, Hk, M, D] and v [1, Hk, M, Dv], gave out [1, n, H, Dv]; ``dropped`` [1, H, n] is its own
    estimate of what it left out. ``exact``: every pair was kept and nothing approximated."""

    layer: int
    plan: LayerPlan
    scale: float
    start: int
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    dropped: Tensor | None
    exact: bool


def is_exact(stats: Stats, approximates: bool) -> bool:
    """Whether a call computed what exact attention would have."""
    return stats.pairs_kept == stats.pairs_exact and not approximates


def look(reading: Reading, computed: Computed) -> None:
    """Draw rows of a call, and compute exactly what is due; what comes of it goes to the reading. In a
    forward that can be left, with a yield point before every stretch of rows."""
    began = perf_counter()
    start, n = computed.start, computed.q.shape[2]
    drawn = reading.draw(computed.layer, start, n, computed.dropped, computed.exact)
    if drawn is not None:
        reading.hold(computed.layer, _held(drawn, computed))
    due = reading.due(computed.layer, start + n)
    reading.cost_s += perf_counter() - began
    for some in [] if due is None else _stretches(due, computed):
        began = perf_counter()
        reading.add(computed.layer, some.drawn, _exactly(some, computed), some.used)
        reading.cost_s += perf_counter() - began


def _held(drawn: DrawnRows, computed: Computed) -> Held:
    rows = (drawn.positions - computed.start).to(computed.q.device)
    exact = torch.full((len(drawn),), computed.exact)
    return Held(drawn, exact, computed.q[:, :, rows], computed.out[:, rows].transpose(1, 2))


def _exactly(held: Held, computed: Computed) -> Tensor:
    """[1, H, R, Dv]; rows of calls that were exact are not computed again."""
    used = held.used.to(accumulator_dtype(held.used.dtype))
    again = ~held.exact
    if not bool(again.any()):
        return used
    q, positions = held.q, held.drawn.positions
    if not bool(again.all()):
        q, positions = q[:, :, again.to(q.device)], positions[again]
    found = exact_rows(q, positions, computed.k, computed.v, computed.scale, computed.plan.causal)
    if len(positions) == len(held):
        return found
    return used.index_copy(2, again.nonzero()[:, 0].to(used.device), found)


def _stretches(due: Held, computed: Computed) -> Iterator[Held]:
    height = len(due)
    if can_be_left():
        pairs_per_row = computed.plan.num_heads * computed.k.shape[2]
        height = max(1, int(STRETCH_FLOPS // (computed.plan.flops_per_pair * pairs_per_row)))
    if height >= len(due):
        yield due
        return
    for begin in range(0, len(due), height):
        if begin:
            offer_to_pause()
        yield due.part(slice(begin, begin + height))
