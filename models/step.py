"""The attention of one packed forward: every sequence of the stream under its own choice, over its own keys.

In each layer the sequences that share backend and params are one call of ``kernels.attend_packed``; where the
forward can be left, stretches of their rows are, with a yield point before each.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from kernels.contract import Params
from kernels.math.summaries import BlockSummaries
from kernels.registry import load as load_backend
from models.call import Done, Keys, Layer, attend_pieces, segment
from models.contract import Choice
from models.counting import count as _count
from models.forward import can_be_left, offer_to_pause
from models.measuring import Computed, is_exact, look
from models.members import Group, Groups, Member, in_groups
from models.new_rows import NewRow, NewRows
from models.repair import as_exact, is_repaired, repaired
from models.seam import LayerPlan, Learned, window_params
from models.stretches import Piece, merged

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["Member", "Step", "in_groups"]

NOTHING_LEARNED: Learned = {}


class Step:
    """The attention of one packed forward, layer by layer in the order in which the network calls it.

    ``members`` lie on the packed axis in order, those that share backend and params adjacent (``in_groups``).
    ``learned``: what the model carries for backends that need parameters of their own.
    """

    def __init__(
        self, layers: Sequence[LayerPlan], members: Sequence[Member], learned: Learned = NOTHING_LEARNED
    ) -> None:
        self._layers = tuple(layers)
        self._learned = learned
        self._next = 0
        self._groups = Groups(members)
        self._can_be_left = can_be_left()
        self._members = tuple(members)
        self._new_rows: NewRows | None = None
        """Known when the first layer has its keys: places are only taken by a forward that has begun."""

    def attend(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Any,
        scale: float,
        extra: dict[str, Any],
    ) -> Tensor:
        """q [1, H, T, D], k [1, Hk, T, D], v [1, Hk, T, Dv] -> [1, T, H, Dv]."""
        if self._next >= len(self._layers):
            raise RuntimeError("the network called attention more often than at load. This is a bug.")
        plan = self._layers[self._next]
        if self._new_rows is None:
            self._new_rows = _decoded(self._members, k.device)
        placed = self._new_rows.placed
        layer = Layer(self._next, plan, q, k, v, scale, self._learned, self._can_be_left, placed)
        self._new_rows.write(layer.index, layer.new_keys, layer.new_values)
        self._next += 1
        if layer.plan.window is not None:
            return _run(layer, self._groups.everyone, "window", window_params(layer.plan.window))
        groups = self._groups.of(layer.index, layer.plan.ordinal)
        if len(groups) == 1:
            return _run_chosen(layer, groups[0])
        out = q.new_empty(1, q.shape[2], q.shape[1], v.shape[-1])
        for group in groups:
            out[:, group.rows] = _run_chosen(layer, group)
        return out

    @property
    def num_served(self) -> int:
        """Attention calls so far."""
        return self._next

    def finish(self) -> None:
        """Called when the forward is over: every layer of the plan must have been served."""
        if self._next != len(self._layers):
            raise RuntimeError(
                f"the network called attention {self._next} times, {len(self._layers)} times at load. "
                "This is a bug."
            )


def _decoded(members: Sequence[Member], device: torch.device) -> NewRows:
    """The rows that come one by one, of several sequences."""
    rows = [
        NewRow(member.cache, member.start, member.rows.start)
        for member in members
        if member.cache is not None and member.num_rows == 1
    ]
    return NewRows(rows if len(rows) > 1 else [], device)


def _run_chosen(layer: Layer, group: Group) -> Tensor:
    return _run(layer, group, group.choice.backend, group.choice.params)


def _run(layer: Layer, group: Group, backend: str, params: Params) -> Tensor:
    """One group's rows of one layer, [1, rows, H, Dv]; each member's work is counted."""
    batches = group.batches(layer.plan, layer.q, backend, params) if layer.can_be_left else group.at_once
    if len(batches) > 1:
        out, done = _run_in_turns(layer, group, batches, backend, params)
        _count_all(layer, done)
        return out
    offer_to_pause()
    pieces = batches[0]
    keys = [_keys(layer, piece, group) for piece in pieces]
    if group.guarded or group.measured:
        out, done = _run_batch(layer, group, pieces, keys, backend, params)
        _count_all(layer, done)
        return out.contiguous()
    return _run_unwatched(layer, pieces, keys, backend, params)


def _run_unwatched(
    layer: Layer, pieces: Sequence[Piece], keys: Sequence[Keys], backend: str, params: Params
) -> Tensor:
    """Whole members in one call, which is all there is to it: a decode step of many has no time for more."""
    result = attend_pieces(layer, pieces, keys, backend, params)
    for piece, stats in zip(pieces, result.stats, strict=True):
        _count(piece.member.work, stats, layer.plan, piece.num_rows)
    return result.out.transpose(1, 2).contiguous()


def _run_in_turns(
    layer: Layer, group: Group, batches: Sequence[Sequence[Piece]], backend: str, params: Params
) -> tuple[Tensor, list[Done]]:
    """Batch by batch, with a yield point before each."""
    first, stop = group.rows.start, group.rows.stop
    whole = layer.q.new_empty(1, stop - first, layer.q.shape[1], layer.v.shape[-1])
    keys: dict[int, Keys] = {}
    done: list[Done] = []
    for batch in batches:
        offer_to_pause()
        for piece in batch:
            row = piece.member.rows.start
            if row not in keys:
                keys[row] = _keys(layer, piece, group, shared=not piece.whole)
        for some, now in _as_repaired(layer, batch, (backend, params)):
            of_some = [keys[piece.member.rows.start] for piece in some]
            out, each = _run_batch(layer, group, some, of_some, *now)
            whole[:, some[0].rows.start - first : some[-1].rows.stop - first] = out
            done += each
    return whole, done


def _run_batch(
    layer: Layer, group: Group, pieces: Sequence[Piece], keys: Sequence[Keys], backend: str, params: Params
) -> tuple[Tensor, list[Done]]:
    """Adjacent pieces in one call, repaired where their guards ask for it, and measured."""
    result = attend_pieces(layer, pieces, keys, backend, params)
    out = result.out.transpose(1, 2)
    dropped = result.dropped or [None] * len(pieces)
    approximates = load_backend(backend).capabilities.approximates
    done = [
        Done(piece, of, stats, its, backend, is_exact(stats, approximates))
        for piece, of, stats, its in zip(pieces, keys, result.stats, dropped, strict=True)
    ]
    if group.guarded and layer.plan.window is None:
        done = repaired(layer, out, done)
    if group.measured and layer.plan.window is None:
        _measure(layer, out, done)
    return out, done


def _as_repaired(
    layer: Layer, batch: Sequence[Piece], chosen: tuple[str, Params]
) -> list[tuple[list[Piece], tuple[str, Params]]]:
    """The batch in calls: what follows a repair in the same layer of the same sequence is exact."""
    if layer.plan.window is not None:
        return [(list(batch), chosen)]
    calls = groupby(batch, key=lambda piece: is_repaired(layer, piece))
    return [(list(pieces), as_exact() if repair else chosen) for repair, pieces in calls]


def _count_all(layer: Layer, done: Sequence[Done]) -> None:
    """Each member's work, of all its pieces; what was repaired apart, as in the steps that follow."""
    of_members: dict[tuple[int, str], list[Done]] = {}
    for each in done:
        of_members.setdefault((each.piece.member.rows.start, each.backend), []).append(each)
    for some in of_members.values():
        rows = sum(each.piece.num_rows for each in some)
        stats = merged([(each.stats, each.piece.num_rows) for each in some])
        _count(some[0].piece.member.work, stats, layer.plan, rows)


def _measure(layer: Layer, out: Tensor, done: Sequence[Done]) -> None:
    """Rows of a call again, for the members that have a reading."""
    begin = done[0].piece.rows.start
    for each in done:
        piece, reading = each.piece, each.piece.member.reading
        if reading is None or not reading.measures(layer.index):
            continue
        seen = segment(layer.plan, piece, each.keys, begin)
        computed = Computed(
            layer=layer.index,
            plan=layer.plan,
            scale=layer.scale,
            start=seen.start,
            q=layer.q[:, :, piece.rows],
            k=seen.k,
            v=seen.v,
            out=out[:, seen.rows],
            dropped=each.dropped,
            exact=each.exact,
        )
        look(reading, computed)


def _keys(layer: Layer, piece: Piece, group: Group, shared: bool = False) -> Keys:
    """A member's keys and values [1, Hk, M, D or Dv], its cache's once the new ones are in it, and what is
    known of them. ``shared``: several calls will read them, which one summary serves."""
    member = piece.member
    cache, rows = member.cache, member.rows
    if cache is None:
        known = BlockSummaries(member.num_rows) if shared else None
        return layer.k[:, :, rows], layer.v[:, :, rows], known, None
    if rows.start not in layer.placed and not piece.begin:
        cache.write(layer.index, member.start, layer.new_keys[:, rows], layer.new_values[:, rows])
    keys, values = cache.keys_values(layer.index, member.stop)
    kept = cache.kept(layer.index, _owner(layer.plan, group.choice, member.choice.seed))
    return keys, values, cache.summaries(layer.index), kept


def _owner(layer: LayerPlan, choice: Choice, seed: int) -> tuple[object, int]:
    """Whose states lie beside a layer's keys."""
    return (choice.method, seed) if layer.window is None else (layer.window, 0)
