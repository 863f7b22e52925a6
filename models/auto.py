"""The policy of ``auto``: per layer the cheapest attention whose calibrated error keeps a budget.

Plain objects in, plain objects out: a plan depends on the profile, the number of tokens and the budget alone,
never on what was served before.

    limit   = max( p95, median exp(z sigma sqrt(1 + 1/n)) )            a rung, a length with n documents
    sigma^2 = ( k u^2 + (n - 1) s^2 ) / ( k + n - 1 )
    total   = ( rest + attention / L sum_l share_l ) / ( rest + attention )      L layers, chosen rungs

``limit`` is what a new document keeps with a probability of 95 % (z = 1.645) where ln(error) is normal from
document to document; s is its measured spread, drawn toward an assumed u as if k more documents had shown
that: few documents that are alike say little of others. It is never below what 95 % of the calibration's own
documents kept. A rung may serve where limit <= budget at this length. Between calibrated lengths limits and
time shares lie on lines in log(tokens), milliseconds on lines in (log tokens, log ms).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from models.profile import EXACT, Ladder, Profile, Rung

Reason = Literal["chosen", "all layers need exact", "below the crossover", "too short", "too long"]


@dataclass(frozen=True)
class Policy:
    """The stated numbers behind a plan.

    ``z``, ``assumed_spread`` (u) and ``assumed_documents`` (k) as above. Beyond ``max_extrapolation`` times
    the longest calibrated length, and below the shortest, every layer is exact. A plan must be predicted to
    save ``min_saving`` of exact's time to first token, or every layer is exact: the prediction is of the
    attention alone, and planning and guard take 6 to 7 % at 4,096 and 8,192 tokens (docs/auto.md).
    """

    z: float = 1.645
    assumed_spread: float = 0.3
    assumed_documents: int = 2
    max_extrapolation: float = 1.5
    min_saving: float = 0.08

    def __post_init__(self) -> None:
        allowed = {
            "z": self.z >= 0,
            "assumed_spread": self.assumed_spread >= 0,
            "assumed_documents": self.assumed_documents >= 1,
            "max_extrapolation": self.max_extrapolation >= 1,
            "min_saving": 0 <= self.min_saving < 1,
        }
        wrong = [name for name, fine in allowed.items() if not fine]
        if wrong:
            raise ValueError(f"{wrong[0]} is out of range: {getattr(self, wrong[0])}")


DEFAULT_POLICY = Policy()


@dataclass(frozen=True)
class LayerChoice:
    """One layer's attention; ``layer`` is numbered as in ``ModelInfo.applied_layers``. Rows of the prompt
    from ``exact_from`` on run exactly (None: none), as they did where a repair was needed."""

    layer: int
    backend: str
    params: Mapping[str, Any] = field(default_factory=dict)
    exact_from: int | None = None


@dataclass(frozen=True)
class Plan:
    """``layers`` in order, and why they are as they are. ``max_limit`` is the largest calibrated limit of the
    chosen rungs; ``attention_share`` and ``time_share`` are predicted shares of exact's attention time and of
    its time to first token (1 where all layers are exact)."""

    layers: tuple[LayerChoice, ...]
    reason: Reason
    max_limit: float
    attention_share: float
    time_share: float

    @property
    def is_exact(self) -> bool:
        return all(each.backend == EXACT for each in self.layers)


def plan(profile: Profile, tokens: int, max_error: float, policy: Policy = DEFAULT_POLICY) -> Plan:
    """The cheapest plan for a document of ``tokens`` whose layers keep ``max_error``. ValueError naming the
    argument."""
    _check(tokens, max_error)
    if tokens < profile.lengths[0].tokens:
        return _all_exact(profile, "too short")
    if tokens > policy.max_extrapolation * profile.lengths[-1].tokens:
        return _all_exact(profile, "too long")
    chosen = [_cheapest(profile, ladder, tokens, max_error, policy) for ladder in profile.layers]
    if all(rung.is_exact for rung in chosen):
        return _all_exact(profile, "all layers need exact")
    found = _plan_of(profile, chosen, tokens, policy)
    if found.time_share > 1 - policy.min_saving:
        return _all_exact(profile, "below the crossover")
    return found


def limit(profile: Profile, rung: Rung, tokens: int, policy: Policy = DEFAULT_POLICY) -> float:
    """The error that this rung is trusted to keep on a document of ``tokens``. Beyond the longest calibrated
    length it goes on as between the last two, and never falls."""
    figures = zip(rung.median, rung.p95, rung.spread, profile.lengths, strict=True)
    limits = [
        max(p95, median * _margin(spread, length.documents, policy))
        for median, p95, spread, length in figures
    ]
    found = _at(profile, limits, tokens)
    return max(found, limits[-1]) if tokens > profile.lengths[-1].tokens else max(found, 0.0)


def _margin(spread: float | None, documents: int, policy: Policy) -> float:
    """Of a new document over the median of ``documents``."""
    known = 0 if spread is None else documents - 1
    assumed = policy.assumed_documents * policy.assumed_spread**2
    variance = (assumed + known * (spread or 0.0) ** 2) / (policy.assumed_documents + known)
    return math.exp(policy.z * math.sqrt(variance * (1 + 1 / documents)))


def rung_share(profile: Profile, rung: Rung, tokens: int) -> float:
    """Predicted attention time of this rung over exact's, in its layer."""
    return max(_at(profile, rung.time_share, tokens), 0.0)


def time_share(profile: Profile, shares: Sequence[float], tokens: int) -> float:
    """Predicted time to first token over exact's; layer l's attention takes ``shares[l]`` of exact's."""
    attention, rest = exact_ms(profile, tokens)
    return (rest + attention * sum(shares) / len(shares)) / (rest + attention)


def exact_ms(profile: Profile, tokens: int) -> tuple[float, float]:
    """Milliseconds of exact's attention in the layers of the profile, and of the rest of the forward."""
    attention = [math.log(length.attention_ms) for length in profile.lengths]
    rest = [length.rest_ms for length in profile.lengths]
    if min(rest) <= 0:
        return math.exp(_at(profile, attention, tokens)), max(_at(profile, rest, tokens), 0.0)
    logs = [math.log(each) for each in rest]
    return math.exp(_at(profile, attention, tokens)), math.exp(_at(profile, logs, tokens))


def as_json(layers: Sequence[LayerChoice]) -> list[dict[str, Any]]:
    """The plan as the answer tells it, and as ``read_plan`` reads it back."""
    return [
        {
            "layer": each.layer,
            "backend": each.backend,
            "params": dict(each.params),
            "exact_from": each.exact_from,
        }
        for each in layers
    ]


def read_plan(raw: Any) -> tuple[LayerChoice, ...]:
    """What ``as_json`` wrote. ValueError naming the entry. Whether backends and params exist, and whether the
    layers are a model's, is for whoever runs it to check."""
    if not isinstance(raw, list) or not raw:
        raise ValueError('plan must be a list: one {"layer", "backend", "params", "exact_from"} per layer')
    layers = tuple(_read_entry(entry, f"plan[{place}]") for place, entry in enumerate(raw))
    for place, (one, other) in enumerate(zip(layers, layers[1:], strict=False), 1):
        if one.layer >= other.layer:
            raise ValueError(f"plan[{place}].layer is {other.layer} after {one.layer}: layers must ascend")
    return layers


def _read_entry(entry: Any, place: str) -> LayerChoice:
    needed = {"layer", "backend", "params"}
    if not isinstance(entry, dict) or not needed <= set(entry) <= needed | {"exact_from"}:
        raise ValueError(f'{place} must have "layer", "backend" and "params", and may have "exact_from"')
    layer, backend, params = entry["layer"], entry["backend"], entry["params"]
    exact_from = entry.get("exact_from")
    if not isinstance(layer, int) or isinstance(layer, bool) or layer < 0:
        raise ValueError(f"{place}.layer must be a whole number from 0, got {layer!r}")
    if not isinstance(backend, str):
        raise ValueError(f"{place}.backend must be the name of a backend, got {backend!r}")
    if not isinstance(params, dict):
        raise ValueError(f"{place}.params must be an object, got {params!r}")
    if exact_from is not None and (type(exact_from) is not int or exact_from < 0):
        raise ValueError(f"{place}.exact_from must be a row from 0, or null, got {exact_from!r}")
    return LayerChoice(layer, backend, params, exact_from)


def _check(tokens: int, max_error: float) -> None:
    if tokens < 1:
        raise ValueError(f"tokens must be 1 or more, got {tokens}")
    if not (math.isfinite(max_error) and max_error > 0):
        raise ValueError(f"max_error must be a number above 0, got {max_error}: for no error ask for exact")


def _cheapest(profile: Profile, ladder: Ladder, tokens: int, max_error: float, policy: Policy) -> Rung:
    """Of equal cost the one with the smaller limit, then the first."""
    options = [(rung, limit(profile, rung, tokens, policy)) for rung in ladder.rungs]
    allowed = [(rung, its) for rung, its in options if rung.is_exact or its <= max_error]
    return min(allowed, key=lambda each: (rung_share(profile, each[0], tokens), each[1]))[0]


def _plan_of(profile: Profile, chosen: Sequence[Rung], tokens: int, policy: Policy) -> Plan:
    shares = [rung_share(profile, rung, tokens) for rung in chosen]
    return Plan(
        _choices(profile, chosen),
        "chosen",
        max(limit(profile, rung, tokens, policy) for rung in chosen),
        sum(shares) / len(shares),
        time_share(profile, shares, tokens),
    )


def _all_exact(profile: Profile, reason: Reason) -> Plan:
    return Plan(_choices(profile, [ladder.rungs[-1] for ladder in profile.layers]), reason, 0.0, 1.0, 1.0)


def _choices(profile: Profile, rungs: Sequence[Rung]) -> tuple[LayerChoice, ...]:
    return tuple(
        LayerChoice(ladder.layer, rung.backend, rung.params)
        for ladder, rung in zip(profile.layers, rungs, strict=True)
    )


def _at(profile: Profile, values: Sequence[float], tokens: int) -> float:
    """The line through the two nearest calibrated lengths, in log(tokens)."""
    lengths = [length.tokens for length in profile.lengths]
    if len(lengths) == 1:
        return values[0]
    right = min(max(bisect_right(lengths, tokens), 1), len(lengths) - 1)
    low, high = lengths[right - 1], lengths[right]
    part = math.log(tokens / low) / math.log(high / low)
    return values[right - 1] + part * (values[right] - values[right - 1])
