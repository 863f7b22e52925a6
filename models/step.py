"""The attention of one packed forward: every sequence of the stream under its own choice, over its own keys.

In each layer the sequences that share backend and params are one call of ``kernels.attend_packed``; where the
forward can be left, stretches of their rows are, with a yield point before each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

from kernels import attend_packed
from kernels.contract import PackedResult, Params, Segment, Stats
from kernels.math.kept import KeptStates
from kernels.math.summaries import BlockSummaries
from kernels.registry import load as load_backend
from models.contract import Choice
from models.counting import count as _count
from models.forward import can_be_left, offer_to_pause
from models.measuring import Computed, is_exact, look
from models.members import Group, Member, in_groups, method
from models.new_rows import NewRow, NewRows
from models.seam import LayerPlan, Learned, window_params
from models.stretches import Piece, merged

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["Member", "Step", "in_groups"]

NOTHING_LEARNED: Learned = {}


@dataclass(frozen=True)
class _Layer:
    """One attention call while it runs: its place in the forward, its plan, and the tensors of the whole
    pack."""

    index: int
    plan: LayerPlan
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    learned: Learned
    can_be_left: bool
    placed: frozenset[int]
    """Rows of the packed axis that are in their caches already."""

    @cached_property
    def new_keys(self) -> Tensor:
        """k of the pack without its batch dimension: one view for all members."""
        return self.k[0]

    @cached_property
    def new_values(self) -> Tensor:
        return self.v[0]


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
        runs = [tuple(run) for _, run in groupby(members, key=method)]
        self._groups = [Group(run) for run in runs]
        self._everyone = Group(members)
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
        layer = _Layer(self._next, plan, q, k, v, scale, self._learned, self._can_be_left, placed)
        self._new_rows.write(layer.index, layer.new_keys, layer.new_values)
        self._next += 1
        if layer.plan.window is not None:
            return _run(layer, self._everyone, "window", window_params(layer.plan.window))
        if len(self._groups) == 1:
            return _run_chosen(layer, self._groups[0])
        out = q.new_empty(1, q.shape[2], q.shape[1], v.shape[-1])
        for group in self._groups:
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


def _run_chosen(layer: _Layer, group: Group) -> Tensor:
    backend = group.choice.backend
    of_layers = layer.learned.get(backend)
    learned = None if of_layers is None else of_layers[layer.plan.ordinal]
    return _run(layer, group, backend, group.choice.params, learned)


def _run(layer: _Layer, group: Group, backend: str, params: Params, learned: object | None = None) -> Tensor:
    """One group's rows of one layer, [1, rows, H, Dv]; each member's work is counted."""
    batches = group.batches(layer.plan, layer.q, backend, params) if layer.can_be_left else group.at_once
    run = partial(_attend, layer, backend=backend, params=params, learned=learned)
    if len(batches) == 1:
        offer_to_pause()
        keys = [_keys(layer, piece.member) for piece in batches[0]]
        result = run(batches[0], keys)
        for member, each in zip(group.members, result.stats, strict=True):
            _count(member.work, each, layer.plan, member.num_rows)
        out = result.out.transpose(1, 2)
        _measure(layer, group, batches[0], keys, result, backend)
        return out.contiguous()
    return _run_in_turns(layer, group, batches, backend, run)


def _run_in_turns(
    layer: _Layer,
    group: Group,
    batches: Sequence[Sequence[Piece]],
    backend: str,
    run: Callable[[Sequence[Piece], Sequence[_Keys]], PackedResult],
) -> Tensor:
    """The same, batch by batch, with a yield point before each."""
    first, stop = group.rows.start, group.rows.stop
    whole = layer.q.new_empty(1, stop - first, layer.q.shape[1], layer.v.shape[-1])
    keys: dict[int, _Keys] = {}
    found: dict[int, list[tuple[Stats, int]]] = {}
    for batch in batches:
        offer_to_pause()
        for piece in batch:
            row = piece.member.rows.start
            if row not in keys:
                keys[row] = _keys(layer, piece.member, shared=not piece.whole)
        of_batch = [keys[piece.member.rows.start] for piece in batch]
        result = run(batch, of_batch)
        begin = batch[0].member.rows.start + batch[0].begin - first
        whole[:, begin : begin + result.out.shape[2]] = result.out.transpose(1, 2)
        _measure(layer, group, batch, of_batch, result, backend)
        for piece, each in zip(batch, result.stats, strict=True):
            found.setdefault(piece.member.rows.start, []).append((each, piece.end - piece.begin))
    for member in group.members:
        _count(member.work, merged(found[member.rows.start]), layer.plan, member.num_rows)
    return whole


def _attend(
    layer: _Layer,
    pieces: Sequence[Piece],
    keys: Sequence[_Keys],
    *,
    backend: str,
    params: Params,
    learned: object | None,
) -> PackedResult:
    """Adjacent pieces of the packed axis in one call."""
    begin = pieces[0].member.rows.start + pieces[0].begin
    stop = pieces[-1].member.rows.start + pieces[-1].end
    plan = layer.plan
    return attend_packed(
        layer.q[:, :, begin:stop],
        [_segment(plan, piece, of, begin) for piece, of in zip(pieces, keys, strict=True)],
        backend=backend,
        params=params,
        causal=plan.causal,
        scale=layer.scale,
        layer=plan.ordinal,
        learned=learned,
    )


def _measure(
    layer: _Layer,
    group: Group,
    pieces: Sequence[Piece],
    keys: Sequence[_Keys],
    result: PackedResult,
    backend: str,
) -> None:
    """Rows of a call again, for the members that have a reading."""
    if not group.measured or layer.plan.window is not None:
        return
    approximates = load_backend(backend).capabilities.approximates
    out, begin = result.out.transpose(1, 2), pieces[0].member.rows.start + pieces[0].begin
    dropped = result.dropped or [None] * len(pieces)
    for piece, of, stats, mass in zip(pieces, keys, result.stats, dropped, strict=True):
        reading = piece.member.reading
        if reading is not None and reading.measures(layer.index):
            first = piece.member.rows.start + piece.begin
            rows = slice(first, first + piece.end - piece.begin)
            seen = _segment(layer.plan, piece, of, begin)
            computed = Computed(
                layer=layer.index,
                plan=layer.plan,
                scale=layer.scale,
                start=seen.start,
                q=layer.q[:, :, rows],
                k=seen.k,
                v=seen.v,
                out=out[:, seen.rows],
                dropped=mass,
                exact=is_exact(stats, approximates),
            )
            look(reading, computed)


_Keys = tuple["Tensor", "Tensor", BlockSummaries | None, KeptStates | None]


def _keys(layer: _Layer, member: Member, shared: bool = False) -> _Keys:
    """A member's keys and values [1, Hk, M, D or Dv], its cache's once the new ones are in it, and what is
    known of them. ``shared``: several calls will read them, which one summary serves."""
    cache, rows = member.cache, member.rows
    if cache is None:
        known = BlockSummaries(member.num_rows) if shared else None
        return layer.k[:, :, rows], layer.v[:, :, rows], known, None
    if rows.start not in layer.placed:
        cache.write(layer.index, member.start, layer.new_keys[:, rows], layer.new_values[:, rows])
    keys, values = cache.keys_values(layer.index, member.stop)
    kept = cache.kept(layer.index, _owner(layer.plan, member.choice))
    return keys, values, cache.summaries(layer.index), kept


def _segment(plan: LayerPlan, piece: Piece, of: _Keys, begin: int) -> Segment:
    """A piece's rows, counted from the call's first, and the keys that they may see."""
    member = piece.member
    first = member.rows.start - begin
    keys, values, summaries, kept = of
    stop = member.start + piece.end
    if plan.causal and stop < keys.shape[2]:
        keys, values = keys[:, :, :stop], values[:, :, :stop]
    rows, start = slice(first + piece.begin, first + piece.end), member.start + piece.begin
    return Segment(rows, keys, values, start, member.choice.seed, summaries, kept)


def _owner(layer: LayerPlan, choice: Choice) -> tuple[object, int]:
    """Whose states lie beside a layer's keys."""
    return (choice.method, choice.seed) if layer.window is None else (layer.window, 0)
