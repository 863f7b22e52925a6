"""Who is measured: a ladder of settings per attention backend, from cheap to dear."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kernels.api import backend_names, parse_params
from models.contract import Choice, ModelError
from models.runner import Model

EXACT = "exact"
REMAINDER = "remainder"
BUDGETS = (256, 512, 1024, 2048)

Settings = tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Contender:
    """One backend at one setting. ``params`` as asked for; ``full`` with every default filled in, which is
    what identifies it. ``long``: its perplexity is measured at long lengths too."""

    backend: str
    params: dict[str, Any]
    full: dict[str, Any] = field(compare=False)
    long: bool = False

    @property
    def key(self) -> str:
        return key_of(self.backend, self.full)

    @property
    def label(self) -> str:
        return f"{self.backend} {setting(self.params)}"

    def choice(self, seed: int) -> Choice:
        return Choice(self.backend, parse_params(self.backend, self.full), seed)


def key_of(backend: str, full: Mapping[str, Any]) -> str:
    return f"{backend} {json.dumps(full, sort_keys=True)}"


def setting(params: Mapping[str, Any]) -> str:
    """Params as tables show them."""
    return ", ".join(f"{name}={value}" for name, value in params.items()) or "default"


def contender(backend: str, params: Mapping[str, Any], long: bool = True) -> Contender:
    """Raises UnknownBackend and InvalidParams."""
    full = parse_params(backend, params).model_dump(mode="json", exclude_none=True)
    return Contender(backend, dict(params), full, long)


def _each(name: str, values: Sequence[int], **more: Any) -> Settings:
    return tuple({name: value, **more} for value in values)


def _remainders(settings: Settings, *remainders: str) -> Settings:
    """The settings, and each with these remainders."""
    return (*settings, *({**each, REMAINDER: what} for what in remainders for each in settings))


def _selecting(budgets: Sequence[int]) -> Settings:
    """Budgets from cheap to dear, two of them with every remainder."""
    tried = tuple(budget for budget in budgets if budget in (256, 1024))
    rest = tuple(budget for budget in budgets if budget not in tried)
    return (*_remainders(_each("budget", tried), "mean", "gated"), *_each("budget", rest))


LADDERS: dict[str, Settings] = {
    EXACT: ({},),
    "window": _each("window", (512, 1024, 2048)),
    "sinks": _each("window", BUDGETS),
    "strided": _each("stride", (64, 512)),
    "fixed": _each("stride", (64, 512)),
    "star": _each("window", (2, 512)),
    "random": ({"num_random": 256}, {"num_random": 1024, "block_size": 64}),
    "bigbird": (
        {},
        {"window": 512, "num_random": 512},
        {"window": 1024, "num_random": 1024},
    ),
    "xattention": (
        *_selecting(BUDGETS),
        *_remainders(({"mass": 0.9},), "gated"),
        {"mass": 1.0, "skip": 0.001},
    ),
    "pooled": (*_selecting(BUDGETS), *_remainders(({"mass": 0.9},), "gated")),
    "topk": _selecting((256, 1024, 2048)),
    "pages": _selecting(BUDGETS),
    "vertical_slash": (
        {"num_verticals": 128, "num_slashes": 4},
        {},
        {"num_verticals": 1024, "num_slashes": 16},
    ),
}
"""The default run. A registered backend without a ladder runs at its defaults."""

LONG: dict[str, Settings] = {
    EXACT: ({},),
    "sinks": _each("window", (512,)),
    "xattention": (*_remainders(_each("budget", (1024,)), "gated"), {"budget": 2048}),
    "pooled": (*_remainders(_each("budget", (1024,)), "gated"), {"budget": 2048}),
    "pages": _each("budget", (1024,)),
    "vertical_slash": ({"num_verticals": 1024, "num_slashes": 16},),
}
"""The settings whose perplexity is measured beyond 4,096 tokens in the default run. A backend that has a
ladder and is missing here has none: too far from exact to be worth the minutes. One without a ladder has."""


def default_contenders(backends: Sequence[str] | None = None) -> list[Contender]:
    """The ladders of the registered backends, or of those named; in registry order."""
    found = []
    for backend in backends or backend_names():
        for params in LADDERS.get(backend, ({},)):
            long = backend not in LADDERS or params in LONG.get(backend, ())
            found.append(contender(backend, params, long))
    return found


def read_contenders(text: str) -> list[Contender]:
    """``{"window": [{"window": 512}], ...}`` -> contenders. ValueError where it is not of that form, or where
    a backend or its params are refused."""
    try:
        ladders = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--contenders is not JSON: {error}") from None
    if not isinstance(ladders, dict) or not all(_is_settings(each) for each in ladders.values()):
        raise ValueError('--contenders must be {"backend": [{params}, ...], ...}')
    return [contender(backend, params) for backend, settings in ladders.items() for params in settings]


def _is_settings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, dict) for each in value)


def refuse_cut_tiles(contenders: Sequence[Contender], chunk_tokens: int) -> None:
    """ValueError naming every contender whose query tiles would be cut by chunks of ``chunk_tokens`` rows: a
    cut tile chooses twice, which serving never does. 0, the whole text at once, cuts none."""
    tiles = {each.label: each.choice(0).params.chunk_multiple() for each in contenders}
    cut = {label: tile for label, tile in tiles.items() if chunk_tokens % tile}
    if cut:
        multiple = math.lcm(*tiles.values())
        fits = -(-chunk_tokens // multiple) * multiple
        told = ", ".join(f"{label} (tiles of {tile})" for label, tile in cut.items())
        raise ValueError(f"--chunk-tokens {chunk_tokens} cuts the query tiles of {told}: give {fits}, or 0")


def refuse_unsupported(model: Model, contenders: Sequence[Contender]) -> None:
    """ModelError naming every contender that the model cannot run, with the reasons."""
    network = model._network
    heads = network.plan.layers[0].shape.num_kv_heads
    told = []
    for each in contenders:
        choice = each.choice(0)
        reasons = [*model.unsupported(choice)]
        reasons += choice.params.size_problems(len(network.plan.applied_layers), heads)
        told += [f"{each.label}: {reason}" for reason in reasons]
    if told:
        raise ModelError("some contenders cannot run; leave them out with --contenders: " + "; ".join(told))
