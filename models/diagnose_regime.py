"""Which kind of approximation suits a head, and the spec that asks for it.

    sparse      the budget's heaviest keys hold 1 - tolerance of the mass
    low-rank    not sparse, and random features of the same memory misplace no more than tolerance of it
    both        neither alone, but half of each does (Scatterbrain)
    neither     none of the three: exact attention

``errors`` are means over rows that see more keys than the budget: others are kept whole by any support. A
sparse head is given the least dense candidate that was measured to keep 1 - tolerance of its mass, for what
an oracle can find a real selection may miss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kernels.api import parse_params
from models.contract import Choice
from models.diagnose_told import Asked, BudgetFigures, Candidate, Regime, Spec

EXACT: Spec = {"backend": "exact", "params": {}}
CENTRE_KEYS = 64
BLOCK = 64
"""Budgets of block-selecting backends are multiples of it."""


def regime_of(errors: BudgetFigures | None, tolerance: float) -> Regime | None:
    """None where no row sees more keys than the budget."""
    if errors is None:
        return None
    if errors.sparse <= tolerance:
        return "sparse"
    if errors.low_rank <= tolerance:
        return "low-rank"
    return "both" if errors.both <= tolerance else "neither"


def candidates_of(asked: Asked, able: Callable[[Choice], bool]) -> list[Choice]:
    """The support asked for, then the project's own: what the model cannot run is left out."""
    blocks = max(asked.budget // BLOCK, 1) * BLOCK
    told: list[tuple[str, dict[str, Any]]] = [
        ("sinks", {"window": asked.budget}),
        ("vertical_slash", {"num_verticals": asked.budget, "num_slashes": 4}),
        ("xattention", {"budget": blocks}),
        ("performer", _features(asked.budget // 2)),
        ("scatterbrain", _scatterbrain(asked)),
    ]
    own = [Choice(name, parse_params(name, params), asked.support.seed) for name, params in told]
    return list(dict.fromkeys([asked.support, *(choice for choice in own if able(choice))]))


def spec_of(choice: Choice) -> Spec:
    """As a request would name it, every default filled in."""
    spec: Spec = {"backend": choice.backend, "params": choice.params.model_dump(mode="json")}
    return {**spec, "seed": choice.seed} if choice.seed else spec


def recommend(
    regime: Regime | None, measured: Sequence[Candidate], kept: Sequence[float | None], asked: Asked
) -> tuple[Spec, str]:
    """A spec and why. ``kept``: the mass that each candidate keeps of what is asked about."""
    if regime is None:
        return EXACT, f"no sampled row sees more than the budget of {asked.budget} keys"
    if regime == "neither":
        return EXACT, "neither keys nor features of this budget come within the tolerance, nor half of each"
    if regime == "sparse":
        return _sparsest(measured, kept, asked)
    name = "performer" if regime == "low-rank" else "scatterbrain"
    found = next((each for each in measured if each.spec["backend"] == name), None)
    if found is None:
        return EXACT, f"{regime}, but the model cannot run {name}"
    return found.spec, f"{regime}: its output error was measured as {found.output_error:.3f}"


def _sparsest(measured: Sequence[Candidate], kept: Sequence[float | None], asked: Asked) -> tuple[Spec, str]:
    wanted = 1 - asked.tolerance
    good = [
        (c.density, i) for i, c in enumerate(measured) if (mass := kept[i]) is not None and mass >= wanted
    ]
    if not good:
        best = max((mass for mass in kept if mass is not None), default=0.0)
        return EXACT, f"sparse, but no candidate kept {wanted:.0%} of the mass (the best {best:.1%})"
    density, index = min(good)
    return measured[index].spec, f"keeps {kept[index]:.1%} of the mass at a density of {density:.3f}"


def _features(num_features: int) -> dict[str, int]:
    return {"num_features": num_features - num_features % 2, "centre_keys": CENTRE_KEYS}


def _scatterbrain(asked: Asked) -> dict[str, Any]:
    return {**_features(asked.budget // 4), "support_params": {"window": asked.budget // 2, "sinks": 4}}
