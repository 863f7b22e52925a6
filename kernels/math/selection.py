"""How many key blocks a selection keeps, and which: the shared knobs, and the choice from scores.

    budget:  the budget / L candidates of largest score
    mass:    the fewest candidates C with  own + sum_{b in C} mass_b >= mass * (own + sum_b mass_b)

Per query tile (``kernels.math.query_tiles``) and key head; largest score first, ties to the lower block. A
block whose score is not finite goes before all others: a NaN in a key must reach the rows as it does with
``exact``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kernels.contract import Params
from kernels.math.per_layer import (
    AS_IT_IS,
    Forms,
    numbers,
    of_layer,
    reader,
    refused,
    schema,
    share,
    size_problems,
    whole_number,
)

MAX_BUDGET = 1 << 20
ABOVE_ALL = 2.0
"""More than any share of a mass."""

_KEYS = whole_number(MAX_BUDGET, " of keys")
_SHARE = share()

Budget = Annotated[Forms[int], reader(_KEYS), AS_IT_IS, schema(_KEYS)]
MaybeBudget = Annotated[
    Forms[int] | None, reader(_KEYS, optional=True), AS_IT_IS, schema(_KEYS, optional=True)
]
MaybeMass = Annotated[
    Forms[float] | None, reader(_SHARE, optional=True), AS_IT_IS, schema(_SHARE, optional=True)
]

_BUDGET_TEXT = (
    "Keys that each query tile reads beyond its own: a multiple of block_size, or a list with one entry per "
    "layer, each such a number or a list with one per key head."
)


@dataclass(frozen=True)
class Keep:
    """How much one layer keeps, an entry per key head: ``blocks`` per tile, or else ``mass``."""

    blocks: tuple[int, ...] | None = None
    mass: tuple[float, ...] | None = None

    def covers(self, num_candidates: int) -> bool:
        """Whether every head keeps all candidates of a tile that has so many, whatever their scores."""
        if self.blocks is not None:
            return min(self.blocks) >= num_candidates
        return num_candidates == 0 or min(self.mass or (0.0,)) == 1.0


class TileParams(Params):
    """What every block selection shares but how much it keeps."""

    query_tile: Literal[128, 256, 512] = Field(
        default=256, description="Rows, at absolute multiples, that share one choice of key blocks."
    )
    block_size: Literal[32, 64, 128] = Field(default=64, description="Keys that are chosen together.")
    remainder: Literal["none", "mean", "gated"] = Field(
        default="none",
        description="What becomes of the blocks left out. none: dropped. mean: each counts as its mean key "
        "and mean value. gated: as mean, scaled down per tile and head by how well means would have "
        "predicted the chosen blocks.",
    )
    skip: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Drop a chosen block if, for every row of the tile, its best key weighs less than this "
        "share of the row's best key. 0: never.",
    )

    def chunk_multiple(self) -> int:
        return self.query_tile

    def keep(self, layer: int, num_kv_heads: int) -> Keep:
        """How much layer number ``layer`` keeps. ValueError where a list is too short or of another
        length."""
        raise NotImplementedError


class BudgetParams(TileParams):
    """A selection that keeps a fixed number of keys."""

    budget: Budget = Field(default=1024, description=_BUDGET_TEXT)

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        _check_multiples(self.budget, self.block_size)
        return self

    def size_problems(self, num_layers: int, num_kv_heads: int) -> list[str]:
        return size_problems("budget", self.budget, num_layers, num_kv_heads)

    def keep(self, layer: int, num_kv_heads: int) -> Keep:
        return _blocks_kept(self.budget, self.block_size, layer, num_kv_heads)


class SelectParams(TileParams):
    """A selection that keeps a fixed number of keys, or as many as reach a share of the estimated mass."""

    budget: MaybeBudget = Field(default=1024, description=_BUDGET_TEXT + " Instead of mass.")
    mass: MaybeMass = Field(
        default=None,
        description="The share of the estimated softmax mass that each query tile keeps, with as few blocks "
        "as can be; or lists like those of budget. Instead of budget.",
    )

    @model_validator(mode="before")
    @classmethod
    def _mass_replaces_the_default(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("mass") is not None and "budget" not in data:
            return {**data, "budget": None}
        return data

    @model_validator(mode="after")
    def _check_amount(self) -> Self:
        if (self.budget is None) == (self.mass is None):
            neither, both = "neither is given: give one of them", "both are given: leave one of them out"
            given = neither if self.mass is None else both
            raise refused(f"exactly one of budget and mass must be given, {given}")
        _check_multiples(self.budget, self.block_size)
        return self

    def size_problems(self, num_layers: int, num_kv_heads: int) -> list[str]:
        return [
            *size_problems("budget", self.budget, num_layers, num_kv_heads),
            *size_problems("mass", self.mass, num_layers, num_kv_heads),
        ]

    def keep(self, layer: int, num_kv_heads: int) -> Keep:
        if self.mass is not None:
            return Keep(mass=of_layer("mass", self.mass, layer, num_kv_heads))
        assert self.budget is not None
        return _blocks_kept(self.budget, self.block_size, layer, num_kv_heads)


def _check_multiples(budget: Forms[int] | None, block_size: int) -> None:
    for place, keys in () if budget is None else numbers("budget", budget):
        if keys % block_size:
            raise refused(f"{place} must be a multiple of block_size ({block_size}), got {keys}")


def _blocks_kept(budget: Forms[int], block_size: int, layer: int, num_kv_heads: int) -> Keep:
    return Keep(blocks=tuple(n // block_size for n in of_layer("budget", budget, layer, num_kv_heads)))


@dataclass(frozen=True)
class BlockScores:
    """What a scoring says of one sequence. ``mass`` [Hk, num_tiles, num_blocks] and ``own`` [Hk, num_tiles]:
    estimated shares of the softmax mass, averaged over a tile's rows and a group's heads (what stands at
    blocks that are no candidates does not count). ``own`` None: the scores only rank. ``lse`` [Hk, G, N]:
    log-sum-exp over every visible key, where the scoring computed it. ``first_block``: block 0 is chosen
    before others of finite score, whatever its own, and under ``mass`` always. ``scored``: what it took, as
    ``Stats.pairs_scored`` counts."""

    mass: Tensor
    own: Tensor | None = None
    lse: Tensor | None = None
    first_block: bool = False
    scored: int = 0


def choose(scores: BlockScores, candidates: Tensor, keep: Keep) -> Tensor:
    """The blocks that each tile keeps, bool [Hk, num_tiles, num_blocks]; candidates [num_tiles, num_blocks].

    No tile keeps more candidates than it has.
    """
    broken = ~torch.isfinite(scores.mass) & candidates
    ranked = scores.mass.masked_fill(broken, math.inf)
    if scores.first_block:
        ranked[..., 0].clamp_(min=ABOVE_ALL)
    order = ranked.masked_fill_(~candidates, -math.inf).sort(dim=-1, descending=True, stable=True).indices
    if keep.blocks is not None:
        taken = torch.arange(order.shape[-1]) < torch.tensor(keep.blocks)[:, None, None]
    else:
        assert scores.own is not None and keep.mass is not None
        mass = scores.mass.masked_fill(~candidates, 0.0).gather(-1, order)
        taken = _until_mass(mass, scores.own, torch.tensor(keep.mass, dtype=torch.float64))
        taken |= (broken.any(-1) | ~torch.isfinite(scores.own))[..., None]
        if scores.first_block:
            taken |= order == 0
    chosen = torch.zeros_like(broken).scatter_(-1, order, taken.expand_as(order))
    return chosen & candidates


def _until_mass(mass: Tensor, own: Tensor, wanted: Tensor) -> Tensor:
    """Which of the blocks, in the order in which they are taken, are needed: those before which too little is
    gathered."""
    gained = mass.double()
    before = own.double()[..., None] + gained.cumsum(-1) - gained
    total = own.double() + gained.sum(-1)
    return (before < (wanted[:, None] * total)[..., None]) | (wanted == 1.0)[:, None, None]
