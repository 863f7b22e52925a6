"""Rows of an attention call computed a second time, exactly, for the members whose error is measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

from torch import Tensor

from kernels.contract import Stats
from kernels.math.dense import accumulator_dtype
from kernels.math.row_error import DrawnRows, exact_rows
from models.forward import can_be_left, offer_to_pause
from models.meter import Reading, part
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
    """Draw rows of a call and compute them exactly; what comes of it goes to the reading. In a forward that
    can be left, with a yield point before every stretch of them."""
    began = perf_counter()
    start, n = computed.start, computed.q.shape[2]
    drawn = reading.draw(computed.layer, start, n, computed.dropped, computed.exact)
    reading.cost_s += perf_counter() - began
    for some in [] if drawn is None else _stretches(drawn, computed):
        began = perf_counter()
        _compare(reading, computed, some)
        reading.cost_s += perf_counter() - began


def _compare(reading: Reading, computed: Computed, drawn: DrawnRows) -> None:
    positions = drawn.positions.to(computed.q.device)
    rows = positions - computed.start
    used = computed.out[:, rows].transpose(1, 2)
    exact = used.to(accumulator_dtype(used.dtype)) if computed.exact else _exactly(computed, rows, positions)
    reading.add(computed.layer, drawn, exact, used)


def _exactly(computed: Computed, rows: Tensor, positions: Tensor) -> Tensor:
    q, plan = computed.q[:, :, rows], computed.plan
    return exact_rows(q, positions, computed.k, computed.v, computed.scale, plan.causal)


def _stretches(drawn: DrawnRows, computed: Computed) -> Iterator[DrawnRows]:
    height = len(drawn)
    if can_be_left() and not computed.exact:
        pairs_per_row = computed.plan.num_heads * computed.k.shape[2]
        height = max(1, int(STRETCH_FLOPS // (computed.plan.flops_per_pair * pairs_per_row)))
    for begin in range(0, len(drawn), height):
        if begin:
            offer_to_pause()
        yield part(drawn, slice(begin, begin + height))
