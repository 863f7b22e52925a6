"""The rungs that a calibration measures, from the settings that ``docs/quality.md`` finds on the border of
error and time."""

from __future__ import annotations

from collections.abc import Sequence

from models.quality_contenders import Contender, contender, contenders_of, refuse_unsupported, unsuitable
from models.quality_ladders import Ladders, Settings
from models.runner import Model


def _each(name: str, *values: int) -> Settings:
    return tuple({name: value} for value in values)


FULL = {
    "sinks": _each("window", 256, 512, 1024, 2048),
    "pooled": _each("budget", 256, 512, 1024, 1536, 2048),
    "vertical_slash": (
        {"num_verticals": 128, "num_slashes": 4},
        {"num_verticals": 256, "num_slashes": 8},
        {},
    ),
}
"""Tried on the demo decoder as well and never the cheapest at any budget: gated remainders, and a mass
instead of a budget (``pooled``, ``xattention``): budgets that differ by layer do what a mass does, without
the time that choosing by mass takes."""

QUICK = {
    "sinks": _each("window", 256, 1024),
    "pooled": _each("budget", 512, 1536),
    "vertical_slash": ({"num_verticals": 128, "num_slashes": 4}, {}),
}
"""For the profile that is made at first use."""


def default_rungs(model: Model, *, quick: bool = False) -> list[Contender]:
    """Those that this model can run."""
    cannot = unsuitable(model.info.causal)
    ladder = QUICK if quick else FULL
    found = [
        contender(name, params) for name, each in ladder.items() if name not in cannot for params in each
    ]
    return [each for each in found if not model.unsupported(each.choice(0))]


def asked_rungs(model: Model, text: str) -> list[Contender]:
    """``{"sinks": [{"window": 512}], ...}`` -> rungs. ValueError or ModelError where one is refused."""
    found = contenders_of(Ladders({}, {}), model.info.causal, None, text)
    _refuse_exact(found)
    refuse_unsupported(model, found)
    return found


def _refuse_exact(rungs: Sequence[Contender]) -> None:
    if any(each.backend == "exact" for each in rungs):
        raise ValueError("exact ends every ladder by itself: leave it out")
