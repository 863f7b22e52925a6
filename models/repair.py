"""Repairs while a prompt is read: where the guard of a sequence finds that a layer is about to exceed its
budget, the rows from there on are computed again, exactly.

Every key counts in a repaired row, so nothing of what was computed before is used: that costs what the
attention had spent on these rows, and holds for any backend (docs/auto.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache

from torch import Tensor

from kernels.contract import Params, Stats
from kernels.math.dense import accumulator_dtype
from kernels.math.row_error import exact_rows
from kernels.registry import load as load_backend
from models.call import Done, Layer, attend_pieces, segment
from models.guard import Reading
from models.profile import EXACT
from models.stretches import Piece


@cache
def as_exact() -> tuple[str, Params]:
    return EXACT, load_backend(EXACT).params()


def is_repaired(layer: Layer, piece: Piece) -> bool:
    """Whether its rows lie behind a repair of the same layer."""
    guard = piece.member.guard
    first = None if guard is None else guard.exact_from(layer.index)
    return first is not None and first <= piece.start


def repaired(layer: Layer, out: Tensor, done: Sequence[Done]) -> list[Done]:
    """Look at some rows of every guarded piece of a call, whose out [1, rows, H, Dv] is changed where the
    guard wants exact rows; what was done, with such pieces cut in two."""
    begin = done[0].piece.rows.start
    return [part for each in done for part in _guarded(layer, out, each, begin)]


def _guarded(layer: Layer, out: Tensor, done: Done, begin: int) -> Iterator[Done]:
    guard, piece = done.piece.member.guard, done.piece
    if guard is None or not guard.watches(layer.index):
        yield done
        return
    first = _look(layer, guard, out, done, begin)
    if first is None:
        yield done
        return
    border = piece.begin + first - piece.start
    again = _exactly(layer, out, replace(done, piece=Piece(piece.member, border, piece.end)), begin)
    part = (border - piece.begin) / piece.num_rows
    if border > piece.begin:
        yield _before(done, Piece(piece.member, piece.begin, border), again.stats.pairs_exact, part)
    yield replace(again, stats=_with_waste(layer, again.stats, done.stats, 1 - part))


def _look(layer: Layer, guard: Reading, out: Tensor, done: Done, begin: int) -> int | None:
    piece = done.piece
    positions = guard.rows(layer.index, piece.start, piece.stop)
    if not len(positions):
        return None
    rows = positions - piece.start
    seen = segment(layer.plan, piece, done.keys, begin)
    used = out[:, seen.rows][:, rows].transpose(1, 2)
    if done.backend == EXACT:
        exact = used.to(accumulator_dtype(used.dtype))
    else:
        q = layer.q[:, :, piece.rows][:, :, rows]
        exact = exact_rows(q, positions, seen.k, seen.v, layer.scale, layer.plan.causal)
    return guard.look(layer.index, piece.start, positions, exact, used)


def _exactly(layer: Layer, out: Tensor, done: Done, begin: int) -> Done:
    """The piece again, into its rows of out."""
    backend, params = as_exact()
    result = attend_pieces(layer, [done.piece], [done.keys], backend, params)
    rows = done.piece.rows
    out[:, rows.start - begin : rows.stop - begin] = result.out.transpose(1, 2)
    dropped = result.dropped[0] if result.dropped else None
    return Done(done.piece, done.keys, result.stats[0], dropped, backend, exact=True)


def _before(done: Done, piece: Piece, pairs_repaired: int, part: float) -> Done:
    """The rows of a call before those that were repaired. What each row kept is not known: its share is."""
    stats = done.stats
    heads, pairs_exact = stats.kept_per_head, stats.pairs_exact - pairs_repaired
    scaled = _scaled(stats, part)
    told = replace(
        scaled,
        pairs_exact=pairs_exact,
        pairs_kept=min(scaled.pairs_kept, pairs_exact),
        kept_per_head=None if heads is None else tuple(round(pairs * part) for pairs in heads),
    )
    dropped = None if done.dropped is None else done.dropped[..., : piece.num_rows]
    return replace(done, piece=piece, stats=told, dropped=dropped)


def _with_waste(layer: Layer, stats: Stats, before: Stats, part: float) -> Stats:
    """A repair's own, and beside it, as other work, the part of the call before that was for nothing."""
    waste = _scaled(before, part)
    flops = layer.plan.flops_per_pair * waste.pairs_computed
    flops += 2 * layer.plan.shape.key_dim * waste.pairs_scored + waste.other_flops
    return replace(
        stats,
        other_flops=stats.other_flops + round(flops),
        selection_ms=stats.selection_ms + waste.selection_ms,
        compute_ms=stats.compute_ms + waste.compute_ms,
    )


def _scaled(stats: Stats, part: float) -> Stats:
    return replace(
        stats,
        pairs_kept=round(stats.pairs_kept * part),
        pairs_computed=round(stats.pairs_computed * part),
        pairs_dense=round(stats.pairs_dense * part),
        pairs_scored=round(stats.pairs_scored * part),
        other_flops=round(stats.other_flops * part),
        selection_ms=stats.selection_ms * part,
        compute_ms=stats.compute_ms * part,
    )
