"""``auto`` as a request asks for it: a bound on the error of every layer, for which each input gets a plan by
its own length; or a plan from an answer, to be run again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from models.auto import LayerChoice, read_plan
from models.contract import Choice, ModelInfo, Verify
from models.planned import AUTO, planned
from service.attention_params import backend_of, bad_params, params_of
from service.chosen import AutoPlan, exact_choice
from service.errors import ApiError
from service.validation import first_problem
from service.verify_spec import MAX_LAYERS, parse_verify, shown_layers

AUTO_FIELDS = ("backend", "max_error", "plan", "fallback", "seed", "verify")
MAX_ROW = (1 << 31) - 1
_BUDGET = "a number above 0 and at most 1, the largest error that a layer may have"
_EXAMPLE = '{"backend": "auto", "max_error": 0.1}'


@dataclass(frozen=True)
class AutoSpec:
    """``max_error``, or the ``given`` plan. What runs is known once an input's length is."""

    max_error: float | None
    given: tuple[LayerChoice, ...] | None
    seed: int = 0
    path: str = "attention"
    verify: Verify | None = None

    @property
    def name(self) -> str:
        return AUTO


class _Envelope(BaseModel):
    """The fields of ``auto``, for their types alone."""

    model_config = ConfigDict(extra="forbid", strict=True)
    backend: str
    max_error: float | None = None
    plan: Any = None
    fallback: Literal["error", "exact"] = "error"
    seed: int = 0
    verify: Any = None


def is_auto(raw: Mapping[str, Any]) -> bool:
    return raw.get("backend") == AUTO


def parse_auto(raw: Mapping[str, Any], path: str, seed: int, max_seed: int) -> AutoSpec:
    """ApiError 400 names the field, its limits and what it may be. ``fallback`` changes nothing: a plan may
    be exact in every layer anyway."""
    if "params" in raw:
        way_out = f"write max_error beside backend: {_EXAMPLE}"
        raise bad_params(f"{path}.params", "'auto' has no params", way_out, {})
    try:
        envelope = _Envelope.model_validate(dict(raw))
    except ValidationError as error:
        where, message, limits = first_problem(error)
        at = f"{path}.{where}" if where else path
        told = f"must be {_BUDGET}" if where == "max_error" else message
        raise bad_params(at, told, f"fields of auto: {', '.join(AUTO_FIELDS)}", limits) from None
    if not 0 <= envelope.seed <= max_seed:
        limits = {"ge": 0, "le": max_seed}
        raise bad_params(f"{path}.seed", f"must be between 0 and {max_seed}", "choose another seed", limits)
    used_seed = envelope.seed if "seed" in raw else seed
    max_error, given = _asked(envelope, path)
    return AutoSpec(
        max_error, given, used_seed, path, parse_verify(envelope.verify, f"{path}.verify", used_seed)
    )


def check_plan(spec: AutoSpec, info: ModelInfo) -> None:
    """400 where the model has no layer to plan, or a given plan is not one of its layers."""
    applied = list(info.applied_layers)
    if not applied:
        raise ApiError(
            "attention_not_supported",
            f"{spec.path}: model {info.name!r} has no layer to which a request's attention applies, so there "
            "is nothing to plan; name 'exact'",
            param=spec.path,
            limits={"applied_layers": []},
        )
    if spec.given is not None and [each.layer for each in spec.given] != applied:
        given = shown_layers([each.layer for each in spec.given])
        message = f"has the layers {given}; those of model {info.name!r} are {shown_layers(applied)}"
        way_out = "send a plan from an answer of this model, or max_error"
        raise bad_params(f"{spec.path}.plan", message, way_out, {"applied_layers": applied})


def replayed(spec: AutoSpec) -> tuple[Choice, AutoPlan]:
    """What a given plan runs: its rows as they are, unguarded."""
    assert spec.given is not None
    return choice_of(spec.given, spec.seed, None), AutoPlan(spec.given, "replayed", None)


def choice_of(layers: tuple[LayerChoice, ...], seed: int, max_error: float | None) -> Choice:
    """Plain exact where every layer is: then nothing sets it apart from a request for ``exact``."""
    if all(each.backend == "exact" for each in layers):
        return exact_choice(seed)
    return planned(layers, seed=seed, max_error=max_error)


def _asked(envelope: _Envelope, path: str) -> tuple[float | None, tuple[LayerChoice, ...] | None]:
    budget = envelope.max_error
    limits = {"gt": 0, "le": 1}
    if envelope.plan is not None:
        if budget is not None:
            way_out = "leave out plan to have one made, or max_error to run this one"
            raise bad_params(f"{path}.plan", "was given beside max_error", way_out, {})
        return None, _read(envelope.plan, path)
    if budget is None:
        message = f"is required with 'auto': {_BUDGET}"
        raise bad_params(f"{path}.max_error", message, f"as in {_EXAMPLE}", limits)
    if not 0 < budget <= 1:
        way_out = "for no error at all name 'exact'"
        raise bad_params(f"{path}.max_error", f"must be {_BUDGET}", way_out, limits)
    return budget, None


def _read(raw: Any, path: str) -> tuple[LayerChoice, ...]:
    way_out = "send attention.plan of an answer as it is"
    if isinstance(raw, list) and len(raw) > MAX_LAYERS:
        limits = {"min_length": 1, "max_length": MAX_LAYERS}
        raise bad_params(f"{path}.plan", f"has {len(raw):,} entries", f"at most {MAX_LAYERS:,}", limits)
    try:
        layers = read_plan(raw)
    except ValueError as error:
        # What was sent stays out of the answer.
        where, _, message = str(error).partition(" ")
        raise bad_params(f"{path}.{where}", message.partition(", got ")[0], way_out, {}) from None
    for i, layer in enumerate(layers):
        at = f"{path}.plan[{i}]"
        if layer.layer > MAX_ROW:
            raise bad_params(f"{at}.layer", f"must be at most {MAX_ROW}", way_out, {"le": MAX_ROW})
        params_of(backend_of(layer.backend, f"{at}.backend"), layer.params, at)
        if layer.exact_from is not None and layer.exact_from > MAX_ROW:
            raise bad_params(f"{at}.exact_from", f"must be at most {MAX_ROW}", way_out, {"le": MAX_ROW})
    return layers
