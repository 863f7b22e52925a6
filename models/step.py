"""The attention of one packed forward: every sequence of the stream under its own choice, over its own keys.

In each layer the sequences that share backend and params are one call of ``kernels.attend_packed``; where the
forward can be left, stretches of their rows are, with a yield point before each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

from kernels import attend_packed
from kernels.contract import Params, Segment, Stats
from kernels.math.kept import KeptStates
from kernels.math.summaries import BlockSummaries
from kernels.registry import load as load_backend
from models.contract import Choice, Work
from models.forward import can_be_left, offer_to_pause
from models.kv_cache import Cache
from models.new_rows import NewRow, NewRows
from models.seam import LayerPlan, Learned, window_params
from models.stretches import Piece, merged, one_after_another

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

NOTHING_LEARNED: Learned = {}


@dataclass
class Member:
    """One sequence's share of a step: its rows of the packed axis, where it stands, its cache (decoders
    only), the attention it asked for, and the work done for it."""

    rows: slice
    start: int
    choice: Choice
    cache: Cache | None
    work: Work = field(default_factory=Work)

    @cached_property
    def num_rows(self) -> int:
        return int(self.rows.stop) - int(self.rows.start)

    @cached_property
    def stop(self) -> int:
        return self.start + self.num_rows


class _Group:
    """Members that share backend and params, adjacent on the packed axis, and how their rows are run in each
    kind of layer."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = tuple(members)
        self.rows = slice(members[0].rows.start, members[-1].rows.stop)
        self.at_once = [[Piece(member, 0, member.num_rows) for member in members]]
        self._batches: dict[object, list[list[Piece]]] = {}

    @property
    def choice(self) -> Choice:
        """Any member's: they differ in their seeds alone."""
        return self.members[0].choice

    def batches(self, layer: _Layer, backend: str, params: Params) -> list[list[Piece]]:
        """What to run one after another where the forward may be left in between."""
        plan = layer.plan
        kind = plan.causal, plan.window, plan.num_heads, plan.shape
        if kind not in self._batches:
            sizes = layer.q.dtype.itemsize, layer.q.device.type == "cpu"
            self._batches[kind] = one_after_another(self.members, plan, load_backend(backend), params, *sizes)
        return self._batches[kind]


def _method(member: Member) -> tuple[str, str]:
    return member.choice.method


def in_groups(choices: Sequence[Choice]) -> list[int]:
    """An order of the sequences in which those that share backend and params are adjacent, otherwise as
    given."""
    first: dict[tuple[str, str], int] = {}
    for choice in choices:
        first.setdefault(choice.method, len(first))
    return sorted(range(len(choices)), key=lambda i: first[choices[i].method])


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
        runs = [tuple(run) for _, run in groupby(members, key=_method)]
        self._groups = [_Group(run) for run in runs]
        self._everyone = _Group(members)
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


def _run_chosen(layer: _Layer, group: _Group) -> Tensor:
    backend = group.choice.backend
    of_layers = layer.learned.get(backend)
    learned = None if of_layers is None else of_layers[layer.plan.ordinal]
    return _run(layer, group, backend, group.choice.params, learned)


def _run(layer: _Layer, group: _Group, backend: str, params: Params, learned: object | None = None) -> Tensor:
    """One group's rows of one layer, [1, rows, H, Dv]; each member's work is counted."""
    batches = group.batches(layer, backend, params) if layer.can_be_left else group.at_once
    run = partial(_attend, layer, backend=backend, params=params, learned=learned)
    if len(batches) == 1:
        offer_to_pause()
        keys = [_keys(layer, piece.member) for piece in batches[0]]
        out, stats = run(batches[0], keys)
        for member, each in zip(group.members, stats, strict=True):
            _count(member.work, each, layer.plan, member.num_rows)
        return out.contiguous()
    return _run_in_turns(layer, group, batches, run)


def _run_in_turns(
    layer: _Layer,
    group: _Group,
    batches: Sequence[Sequence[Piece]],
    run: Callable[[Sequence[Piece], Sequence[_Keys]], tuple[Tensor, Sequence[Stats]]],
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
        out, stats = run(batch, [keys[piece.member.rows.start] for piece in batch])
        begin = batch[0].member.rows.start + batch[0].begin - first
        whole[:, begin : begin + out.shape[1]] = out
        for piece, each in zip(batch, stats, strict=True):
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
) -> tuple[Tensor, Sequence[Stats]]:
    """Adjacent pieces of the packed axis in one call: [1, rows, H, Dv], a view, and their stats."""
    begin = pieces[0].member.rows.start + pieces[0].begin
    stop = pieces[-1].member.rows.start + pieces[-1].end
    plan = layer.plan
    result = attend_packed(
        layer.q[:, :, begin:stop],
        [_segment(plan, piece, of, begin) for piece, of in zip(pieces, keys, strict=True)],
        backend=backend,
        params=params,
        causal=plan.causal,
        scale=layer.scale,
        layer=plan.ordinal,
        learned=learned,
    )
    return result.out.transpose(1, 2), result.stats


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


def _count(work: Work, stats: Stats, layer: LayerPlan, num_rows: int) -> None:
    work.flops += layer.flops_per_pair * stats.pairs_computed + 2 * layer.shape.key_dim * stats.pairs_scored
    work.flops += stats.other_flops
    if layer.window is not None:  # what the network itself declares local costs the same under every choice
        work.flops_exact += layer.flops_per_pair * stats.pairs_computed
        return
    # A choice that keeps every pair and does nothing else is exact: what it computes beyond them is exact's
    # own cost. One that hashes or sums features as well has masked pairs of its own.
    as_exact = stats.pairs_kept == stats.pairs_exact and not stats.other_flops
    work.flops_exact += layer.flops_per_pair * (stats.pairs_computed if as_exact else stats.pairs_exact)
    work.pairs_kept += stats.pairs_kept
    work.pairs_exact += stats.pairs_exact
    work.pairs_computed += stats.pairs_computed
    work.pairs_dense += stats.pairs_dense
    if stats.dropped_mass is None:
        work.unmeasured_rows += num_rows
    else:  # a mean over the call's rows, or over some that stand for the others
        work.dropped_mass += stats.dropped_mass * num_rows
        work.dropped_rows += num_rows
    if stats.kept_per_head is not None:
        work.count_heads(layer.ordinal, stats.kept_per_head, stats.pairs_exact // layer.num_heads)
    work.selection_ms += stats.selection_ms
    work.attention_ms += stats.selection_ms + stats.compute_ms
    work.impl = stats.impl
