"""The sequences of one packed step, and how those that share an attention are run together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING

from kernels.contract import Params
from kernels.registry import load as load_backend
from models.contract import Choice, Work
from models.kv_cache import Cache
from models.planned import Planned, exact
from models.stretches import Piece, one_after_another

if TYPE_CHECKING:
    from torch import Tensor

    from models.guard import Reading as GuardReading
    from models.meter import Reading
    from models.seam import LayerPlan


@dataclass
class Member:
    """One sequence's share of a step: its rows of the packed axis, where it stands, its cache (decoders
    only), the attention it asked for, the work done for it, and what its meter and its guard are told, if it
    has them."""

    rows: slice
    start: int
    choice: Choice
    cache: Cache | None
    work: Work = field(default_factory=Work)
    reading: Reading | None = None
    guard: GuardReading | None = None

    @cached_property
    def num_rows(self) -> int:
        return int(self.rows.stop) - int(self.rows.start)

    @cached_property
    def stop(self) -> int:
        return self.start + self.num_rows


class Group:
    """Rows under one backend with one set of params, adjacent on the packed axis, and how they are run in
    each kind of layer."""

    def __init__(self, pieces: Sequence[Piece], choice: Choice) -> None:
        """``choice``: any of theirs; they differ in their seeds alone."""
        self.pieces, self.choice = tuple(pieces), choice
        self.rows = slice(pieces[0].rows.start, pieces[-1].rows.stop)
        self.at_once = [list(pieces)]
        self.measured = any(piece.member.reading is not None for piece in pieces)
        self.guarded = any(piece.member.guard is not None for piece in pieces)
        self._batches: dict[object, list[list[Piece]]] = {}

    def batches(self, plan: LayerPlan, q: Tensor, backend: str, params: Params) -> list[list[Piece]]:
        """What to run one after another where the forward may be left in between."""
        kind = plan.causal, plan.window, plan.num_heads, plan.shape
        if kind not in self._batches:
            sizes = q.dtype.itemsize, q.device.type == "cpu"
            self._batches[kind] = one_after_another(self.pieces, plan, load_backend(backend), params, *sizes)
        return self._batches[kind]


class Groups:
    """How a step's members, in their order on the packed axis, are grouped in a layer: alike in every layer,
    unless some have a plan."""

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = tuple(members)
        self._planned = any(isinstance(member.choice, Planned) for member in members)
        self.everyone = Group([_whole(member) for member in members], members[0].choice)
        self._alike = () if self._planned else _runs((m.choice, _whole(m)) for m in members)

    def of(self, layer: int, ordinal: int) -> Sequence[Group]:
        """``ordinal`` among the layers to which a choice applies."""
        if not self._planned:
            return self._alike
        return _runs(part for member in self._members for part in _parts(member, layer, ordinal))


def _whole(member: Member) -> Piece:
    return Piece(member, 0, member.num_rows)


def _parts(member: Member, layer: int, ordinal: int) -> Iterator[tuple[Choice, Piece]]:
    """A member's rows under what its plan says of the layer: those from some row on may be exact."""
    choice = member.choice.at(ordinal)
    border = _border(member, layer, ordinal)
    if border > 0:
        yield choice, Piece(member, 0, border)
    if border < member.num_rows:
        yield exact(choice.seed), Piece(member, border, member.num_rows)


def _border(member: Member, layer: int, ordinal: int) -> int:
    """Row of the member from which on it is exact."""
    if not isinstance(member.choice, Planned):
        return member.num_rows
    repaired = None if member.guard is None else member.guard.exact_from(layer)
    found = [row for row in (member.choice.exact_from[ordinal], repaired) if row is not None]
    return min([member.num_rows, *(max(row - member.start, 0) for row in found)])


def _runs(parts: Iterable[tuple[Choice, Piece]]) -> tuple[Group, ...]:
    """Neighbours under one method are a group."""
    runs = [list(run) for _, run in groupby(parts, key=lambda part: part[0].method)]
    return tuple(Group([piece for _, piece in run], run[0][0]) for run in runs)


def in_groups(choices: Sequence[Choice]) -> list[int]:
    """An order of the sequences in which those that share backend and params are adjacent, otherwise as
    given."""
    first: dict[tuple[str, str], int] = {}
    for choice in choices:
        first.setdefault(choice.method, len(first))
    return sorted(range(len(choices)), key=lambda i: first[choices[i].method])
