"""The sequences of one packed step, and how those that share an attention are run together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from kernels.contract import Params
from kernels.registry import load as load_backend
from models.contract import Choice, Work
from models.kv_cache import Cache
from models.stretches import Piece, one_after_another

if TYPE_CHECKING:
    from torch import Tensor

    from models.meter import Reading
    from models.seam import LayerPlan


@dataclass
class Member:
    """One sequence's share of a step: its rows of the packed axis, where it stands, its cache (decoders
    only), the attention it asked for, the work done for it, and what its meter is told, if it has one."""

    rows: slice
    start: int
    choice: Choice
    cache: Cache | None
    work: Work = field(default_factory=Work)
    reading: Reading | None = None

    @cached_property
    def num_rows(self) -> int:
        return int(self.rows.stop) - int(self.rows.start)

    @cached_property
    def stop(self) -> int:
        return self.start + self.num_rows


class Group:
    """Members that share backend and params, adjacent on the packed axis, and how their rows are run in each
    kind of layer."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = tuple(members)
        self.rows = slice(members[0].rows.start, members[-1].rows.stop)
        self.at_once = [[Piece(member, 0, member.num_rows) for member in members]]
        self.measured = any(member.reading is not None for member in members)
        self._batches: dict[object, list[list[Piece]]] = {}

    @property
    def choice(self) -> Choice:
        """Any member's: they differ in their seeds alone."""
        return self.members[0].choice

    def batches(self, plan: LayerPlan, q: Tensor, backend: str, params: Params) -> list[list[Piece]]:
        """What to run one after another where the forward may be left in between."""
        kind = plan.causal, plan.window, plan.num_heads, plan.shape
        if kind not in self._batches:
            sizes = q.dtype.itemsize, q.device.type == "cpu"
            self._batches[kind] = one_after_another(self.members, plan, load_backend(backend), params, *sizes)
        return self._batches[kind]


def method(member: Member) -> tuple[str, str]:
    return member.choice.method


def in_groups(choices: Sequence[Choice]) -> list[int]:
    """An order of the sequences in which those that share backend and params are adjacent, otherwise as
    given."""
    first: dict[tuple[str, str], int] = {}
    for choice in choices:
        first.setdefault(choice.method, len(first))
    return sorted(range(len(choices)), key=lambda i: first[choices[i].method])
