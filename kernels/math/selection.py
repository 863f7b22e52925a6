"""How many key blocks a selection keeps, and which: the shared knobs, and the choice from scores.

    budget:  the budget / L candidates of largest score
    mass:    the fewest candidates C with  own + sum_{b in C} mass_b >= mass * (own + sum_b mass_b)

Per query tile (``kernels.math.query_tiles``) and key head; largest score first, ties to the lower block. A
block whose score is not finite goes before all others: a NaN in a key must reach the rows as it does with
``exact``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, TypeVar

import torch
from pydantic import Field, PlainSerializer, PlainValidator, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from kernels.contract import Params

MAX_BUDGET = 1 << 20
_ABOVE_ALL = 2.0
"""More than any share of a mass."""
_PER_LAYER = "or a list with one entry per layer, each such a number or a list with one per key head"

T = TypeVar("T", int, float)


def _budget(value: Any, place: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_BUDGET:
        raise _refused(f"{place} must be a whole number of keys from 0 to {MAX_BUDGET}, {_PER_LAYER}")
    return value


def _mass(value: Any, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise _refused(f"{place} must be a number above 0 and at most 1, {_PER_LAYER}")
    return float(value)


def _refused(text: str) -> PydanticCustomError:
    return PydanticCustomError("selection", "{text}", {"text": text})


def _nested(name: str, read: Callable[[Any, str], T]) -> Callable[[Any], T | tuple[T | tuple[T, ...], ...]]:
    """A validator for one number or lists of numbers, whose refusals are one sentence with the place."""

    def entries(value: Any, place: str) -> list[tuple[Any, str]]:
        if not value:
            raise _refused(f"{place} is an empty list: give one number, {_PER_LAYER}")
        return [(one, f"{place}[{at}]") for at, one in enumerate(value)]

    def layer(value: Any, place: str) -> T | tuple[T, ...]:
        if isinstance(value, list | tuple):
            return tuple(read(one, at) for one, at in entries(value, place))
        return read(value, place)

    def whole(value: Any) -> T | tuple[T | tuple[T, ...], ...]:
        if isinstance(value, list | tuple):
            return tuple(layer(one, at) for one, at in entries(value, name))
        return read(value, name)

    return whole


def _schema(number: dict[str, Any], optional: bool) -> dict[str, Any]:
    heads = {"type": "array", "items": number, "minItems": 1, "title": "per key head"}
    layers = {"type": "array", "items": {"anyOf": [number, heads]}, "minItems": 1, "title": "per layer"}
    return {"anyOf": [number, layers, *([{"type": "null"}] if optional else [])]}


def _optional(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else read(value)


_KEYS = {"type": "integer", "minimum": 0, "maximum": MAX_BUDGET}
_SHARE = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
_read_budget, _read_mass = _nested("budget", _budget), _nested("mass", _mass)

BudgetForms = int | tuple[int | tuple[int, ...], ...]
MassForms = float | tuple[float | tuple[float, ...], ...]
_AS_IT_IS = PlainSerializer(lambda value: value)
Budget = Annotated[
    BudgetForms, PlainValidator(_read_budget), _AS_IT_IS, WithJsonSchema(_schema(_KEYS, optional=False))
]
MaybeBudget = Annotated[
    BudgetForms | None,
    PlainValidator(_optional(_read_budget)),
    _AS_IT_IS,
    WithJsonSchema(_schema(_KEYS, optional=True)),
]
MaybeMass = Annotated[
    MassForms | None,
    PlainValidator(_optional(_read_mass)),
    _AS_IT_IS,
    WithJsonSchema(_schema(_SHARE, optional=True)),
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
        description="What becomes of the blocks left out: nothing; each counts as its mean key and value; or "
        "so, as far as means would have predicted the blocks that were chosen (gated).",
    )
    skip: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="A chosen block is passed over where it weighs less than this, against each row's best "
        "key, for every row of its tile; 0 never.",
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
        return _size_problems("budget", self.budget, num_layers, num_kv_heads)

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
            given = "neither is given" if self.mass is None else "both are given"
            raise _refused(f"exactly one of budget and mass must be given, {given}")
        _check_multiples(self.budget, self.block_size)
        return self

    def size_problems(self, num_layers: int, num_kv_heads: int) -> list[str]:
        return [
            *_size_problems("budget", self.budget, num_layers, num_kv_heads),
            *_size_problems("mass", self.mass, num_layers, num_kv_heads),
        ]

    def keep(self, layer: int, num_kv_heads: int) -> Keep:
        if self.mass is not None:
            return Keep(mass=_of_layer("mass", self.mass, layer, num_kv_heads))
        assert self.budget is not None
        return _blocks_kept(self.budget, self.block_size, layer, num_kv_heads)


def _check_multiples(budget: BudgetForms | None, block_size: int) -> None:
    for layer in budget if isinstance(budget, tuple) else (budget or 0,):
        for keys in layer if isinstance(layer, tuple) else (layer,):
            if keys % block_size:
                raise _refused(f"budget must be a multiple of block_size ({block_size}), got {keys}")


def _blocks_kept(budget: BudgetForms, block_size: int, layer: int, num_kv_heads: int) -> Keep:
    return Keep(blocks=tuple(n // block_size for n in _of_layer("budget", budget, layer, num_kv_heads)))


def _size_problems(
    name: str, value: BudgetForms | MassForms | None, num_layers: int, num_kv_heads: int
) -> list[str]:
    if not isinstance(value, tuple):
        return []
    model = f"the choice applies to {num_layers} layers with {num_kv_heads} key heads each"
    problems = []
    if len(value) != num_layers:
        problems.append(f"{name} has {len(value)} entries, but {model}: give one number, or one per layer")
    for at, layer in enumerate(value):
        if isinstance(layer, tuple) and len(layer) != num_kv_heads:
            problems.append(
                f"{name}[{at}] has {len(layer)} entries, but {model}: give one number, or one per key head"
            )
    return problems


def _of_layer(
    name: str, value: T | tuple[T | tuple[T, ...], ...], layer: int, num_kv_heads: int
) -> tuple[T, ...]:
    """One layer's numbers, an entry per key head."""
    if not isinstance(value, tuple):
        return (value,) * num_kv_heads
    if layer >= len(value):
        raise ValueError(f"{name} has {len(value)} entries, one per layer, but this is layer number {layer}")
    own = value[layer]
    if not isinstance(own, tuple):
        return (own,) * num_kv_heads
    if len(own) != num_kv_heads:
        raise ValueError(f"{name}[{layer}] has {len(own)} entries, but there are {num_kv_heads} key heads")
    return own


@dataclass(frozen=True)
class BlockScores:
    """What a scoring says of one sequence. ``mass`` [Hk, num_tiles, num_blocks] and ``own`` [Hk, num_tiles]:
    estimated shares of the softmax mass, averaged over a tile's rows and a group's heads (what stands at
    blocks that are no candidates does not count). ``own`` None: the scores only rank. ``lse`` [Hk, G, N]:
    log-sum-exp over every visible key, where the scoring computed it. ``first_block``: block 0 is chosen
    before others of finite score, whatever its own, and under ``mass`` always."""

    mass: Tensor
    own: Tensor | None = None
    lse: Tensor | None = None
    first_block: bool = False


def choose(scores: BlockScores, candidates: Tensor, keep: Keep) -> Tensor:
    """The blocks that each tile keeps, bool [Hk, num_tiles, num_blocks]; candidates [num_tiles, num_blocks].

    No tile keeps more candidates than it has.
    """
    broken = ~torch.isfinite(scores.mass) & candidates
    ranked = scores.mass.masked_fill(broken, math.inf)
    if scores.first_block:
        ranked[..., 0].clamp_(min=_ABOVE_ALL)
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
