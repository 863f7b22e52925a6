"""The default runs: a ladder of settings per attention backend, from cheap to dear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

EXACT = "exact"
REMAINDER = "remainder"
BUDGETS = (256, 512, 1024, 2048)

Settings = tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Ladders:
    """Settings by backend. ``chosen``: those of them whose dear measurement (perplexity at long lengths,
    retrieval) is made where it is made of some; a backend that has a ladder and is missing there has none.
    ``brief``: those of them that are measured at the usual length alone. A registered backend without a
    ladder runs at its defaults, with everything."""

    settings: dict[str, Settings]
    chosen: dict[str, Settings]
    brief: dict[str, Settings] = field(default_factory=dict)


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


def _support(name: str, num_features: int = 64, **params: int) -> dict[str, Any]:
    """Exact attention on what ``name`` keeps, so many features on the rest."""
    told: dict[str, Any] = {"support": name, "num_features": num_features}
    return {**told, "support_params": params} if params else told


_NEAR = _support("local", window=256)
_NEAR_FINER = _support("local", 256, window=256)
_FAR = _support("local", window=1024)
_HASHED = _support("lsh")
_POOLED = _support("pooled", budget=512)

DECODER = Ladders(
    settings={
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
        "performer": _each("num_features", (64, 256, 1024)),
        "lsh": _each("num_hash_rounds", (1, 2, 4)),
        "kmeans": _each("num_probes", (1, 2, 4)),
        "scatterbrain": (_NEAR, _NEAR_FINER, _FAR, _HASHED, _POOLED),
    },
    chosen={
        EXACT: ({},),
        "sinks": _each("window", (512,)),
        "xattention": (*_remainders(_each("budget", (1024,)), "gated"), {"budget": 2048}),
        "pooled": (*_remainders(_each("budget", (1024,)), "gated"), {"budget": 2048}),
        "pages": _each("budget", (1024,)),
        "vertical_slash": ({"num_verticals": 1024, "num_slashes": 16},),
        "scatterbrain": (_POOLED,),
    },
    brief={
        "performer": _each("num_features", (64, 1024)),
        "lsh": _each("num_hash_rounds", (1,)),
        "kmeans": _each("num_probes", (1,)),
        "scatterbrain": (_NEAR_FINER,),
    },
)
"""A causal model over a text in chunks. What is too far from exact to be worth the minutes is not read at
long lengths."""

_LONG_BRIEF: dict[str, Settings] = {
    "strided": _each("stride", (64, 512)),
    "fixed": _each("stride", (64, 512)),
    "star": _each("window", (2, 512)),
    "random": ({"num_random": 256}, {"num_random": 1024, "block_size": 64}),
    "topk": _each("budget", (256, 1024)),
    "performer": _each("num_features", (64, 256)),
    "lsh": _each("num_hash_rounds", (2, 4)),
    "kmeans": _each("num_probes", (2, 4)),
    "scatterbrain": (_NEAR, _POOLED),
}
_LONG_ALWAYS: dict[str, Settings] = {
    EXACT: ({},),
    "window": _each("window", (1024, 2048)),
    "sinks": _each("window", (512, 1024, 2048)),
    "bigbird": ({"window": 512, "num_random": 512}, {"window": 1024, "num_random": 1024}),
    "xattention": _each("budget", (1024, 2048)),
    "pooled": (*_remainders(_each("budget", (1024,)), "gated"), {"budget": 2048}),
    "pages": _each("budget", (1024, 2048)),
    "vertical_slash": ({}, {"num_verticals": 1024, "num_slashes": 16}),
}

LONG = Ladders(
    settings={**_LONG_ALWAYS, **_LONG_BRIEF},
    chosen={},
    brief=_LONG_BRIEF,
)
"""A causal model over several long texts: what is slower than exact, or far from it, is read at the shortest
length alone."""

ENCODER = Ladders(
    settings={
        EXACT: ({},),
        "window": _each("window", (128, 512)),
        "sinks": _each("window", (128, 512)),
        "strided": _each("stride", (64,)),
        "fixed": _each("stride", (64,)),
        "star": _each("window", (128,)),
        "random": ({"num_random": 512, "block_size": 64},),
        "bigbird": ({}, {"window": 256, "num_random": 256}),
        "xattention": _each("budget", (256, 1024)),
        "pooled": _each("budget", (256, 1024)),
        "topk": _each("budget", (256,)),
        "pages": _each("budget", (256, 1024)),
        "vertical_slash": ({"num_verticals": 128, "num_slashes": 4}, {}),
        "performer": _each("num_features", (64, 256, 1024)),
        "nystrom": _each("num_landmarks", (32, 64, 256)),
        "lsh": (
            *_each("num_hash_rounds", (1, 2, 4)),
            *_each("num_hash_rounds", (1, 2, 4), variant="smyrf"),
        ),
        "kmeans": _each("num_probes", (1, 2, 4)),
        "scatterbrain": (_NEAR, _NEAR_FINER, _POOLED),
    },
    chosen={
        EXACT: ({},),
        "sinks": _each("window", (512,)),
        "bigbird": ({},),
        "pooled": _each("budget", (256,)),
        "pages": _each("budget", (256,)),
        "vertical_slash": ({"num_verticals": 128, "num_slashes": 4},),
        "performer": _each("num_features", (256,)),
        "nystrom": _each("num_landmarks", (64, 256)),
        "lsh": ({"num_hash_rounds": 2}, {"num_hash_rounds": 2, "variant": "smyrf"}),
        "kmeans": _each("num_probes", (2,)),
        "scatterbrain": (_NEAR, _POOLED),
    },
    brief={
        "performer": _each("num_features", (64,)),
        "nystrom": _each("num_landmarks", (32,)),
        "lsh": ({"num_hash_rounds": 1}, {"num_hash_rounds": 1, "variant": "smyrf"}),
        "kmeans": _each("num_probes", (1,)),
        "strided": _each("stride", (64,)),
        "fixed": _each("stride", (64,)),
        "random": ({"num_random": 512, "block_size": 64},),
        "topk": _each("budget", (256,)),
    },
)
"""A bidirectional model over whole documents, 2,048 tokens as usual."""
