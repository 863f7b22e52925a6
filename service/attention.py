"""From a request's ``attention`` to a validated choice for one model, and its schema from the registry.

Two steps, since the first needs no model: ``parse`` turns JSON into a ``Spec``; ``choose`` checks it
against the model and applies ``fallback`` where the request permits it. Nothing is substituted otherwise.
``auto`` takes a third, ``service.auto.resolve``: its choice depends on the length of each input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, overload

from pydantic import BaseModel, ConfigDict, ValidationError

from kernels.api import MAX_PROBLEMS
from kernels.contract import Backend, Params
from kernels.registry import load
from models.contract import Choice, ServedModel, Verify
from models.planned import AUTO
from service.attention_params import backend_of, bad_params, params_of
from service.auto_spec import AUTO_FIELDS, AutoSpec, check_plan, is_auto, parse_auto, replayed
from service.chosen import Chosen as Chosen
from service.chosen import ChosenAuto as ChosenAuto
from service.chosen import exact_choice as exact_choice
from service.errors import ApiError, invalid
from service.validation import first_problem
from service.verify_spec import check_layers, parse_verify

MAX_SEED = (1 << 63) - 1
MAX_SPECS = 32
_FIELDS = ("backend", "params", "fallback", "seed", "verify", "impl")
_OF_AUTO = ("max_error", "plan")

Fallback = Literal["error", "exact"]
AskedImpl = Literal["auto", "torch", "triton"]
"""Impl ``reference`` is for tests: its memory grows with the square of the length."""


@dataclass(frozen=True)
class Spec:
    """A request's attention, parsed: the backend with its params (all defaults filled in)."""

    backend: Backend
    params: Params
    fallback: Fallback = "error"
    seed: int = 0
    path: str = "attention"
    verify: Verify | None = None
    """How its error is to be measured; None where nobody asked."""
    impl: AskedImpl = "auto"

    @property
    def name(self) -> str:
        return self.backend.name


AnySpec = Spec | AutoSpec


@dataclass(frozen=True)
class SpecPair:
    """Attention of prefill and of decode. ``split`` where the request named them apart."""

    prefill: AnySpec
    decode: Spec
    split: bool


class _Envelope(BaseModel):
    """The fields around ``params``, for their types and bounds alone."""

    model_config = ConfigDict(extra="forbid", strict=True)
    backend: str
    params: dict[str, Any] = {}
    fallback: Fallback = "error"
    seed: int = 0
    verify: Any = None
    impl: AskedImpl = "auto"


def parse(raw: object, *, path: str = "attention", seed: int = 0) -> AnySpec:
    """``None`` (exact), a backend's name, or an object -> Spec. ``seed`` where the spec names none."""
    if raw is None:
        raw = "exact"
    if isinstance(raw, str):
        raw = {"backend": raw}
    if not isinstance(raw, Mapping):
        raise invalid(f"{path} must be a backend's name or an object with 'backend'", path)
    if len(raw) > len(_FIELDS) + MAX_PROBLEMS:
        allowed = AUTO_FIELDS if is_auto(raw) else _FIELDS
        raise bad_params(path, f"has {len(raw):,} fields", f"allowed fields: {', '.join(allowed)}", {})
    return parse_auto(raw, path, seed, MAX_SEED) if is_auto(raw) else _parse_one(raw, path, seed)


def _parse_one(raw: Mapping[str, Any], path: str, seed: int) -> Spec:
    _refuse_of_auto(raw, path)
    try:
        envelope = _Envelope.model_validate(dict(raw))
    except ValidationError as error:
        where, message, limits = first_problem(error)
        at = f"{path}.{where}" if where else path
        raise bad_params(at, message, f"allowed fields: {', '.join(_FIELDS)}", limits) from None
    if not 0 <= envelope.seed <= MAX_SEED:
        limits = {"ge": 0, "le": MAX_SEED}
        raise bad_params(f"{path}.seed", f"must be between 0 and {MAX_SEED}", "choose another seed", limits)
    backend = backend_of(envelope.backend, path)
    params = params_of(backend, envelope.params, path)
    used_seed = envelope.seed if "seed" in raw else seed
    verify = parse_verify(envelope.verify, f"{path}.verify", used_seed)
    return Spec(backend, params, envelope.fallback, used_seed, path, verify, envelope.impl)


def parse_pair(raw: object, *, path: str = "attention", seed: int = 0) -> SpecPair:
    """As ``parse``; ``{"prefill": spec, "decode": spec}`` names them apart (a missing one is exact). After a
    prompt under ``auto`` new tokens are read with exact, unless another is named."""
    if isinstance(raw, Mapping) and raw and set(raw) <= {"prefill", "decode"}:
        prefill = parse(raw.get("prefill"), path=f"{path}.prefill", seed=seed)
        decode = parse(raw.get("decode"), path=f"{path}.decode", seed=seed)
        if isinstance(decode, AutoSpec):
            raise _not_for(f"{path}.decode", "new tokens", "name a backend here, as 'exact'")
        return SpecPair(prefill, decode, split=True)
    spec = parse(raw, path=path, seed=seed)
    if isinstance(spec, AutoSpec):
        return SpecPair(spec, _exact(spec), split=False)
    return SpecPair(spec, spec, split=False)


def parse_list(raw: object) -> list[SpecPair]:
    """As ``parse_pair``, for one or a list of up to ``MAX_SPECS``; errors name ``attention[i]``."""
    if not isinstance(raw, list):
        return [parse_pair(raw)]
    if not 1 <= len(raw) <= MAX_SPECS:
        detail = f"attention has {len(raw):,} entries; a list of them has 1 to {MAX_SPECS}"
        raise invalid(detail, "attention", min_length=1, max_length=MAX_SPECS)
    return [parse_pair(each, path=f"attention[{i}]") for i, each in enumerate(raw)]


def backend_alone(spec: AnySpec, for_what: str) -> Spec:
    """400 where it is ``auto``."""
    if isinstance(spec, AutoSpec):
        raise _not_for(spec.path, for_what, "name a backend (GET /v1/attention/backends)")
    return spec


@overload
def choose(spec: Spec, model: ServedModel, *, decodes: bool = ..., scores: bool = ...) -> Chosen: ...
@overload
def choose(spec: AutoSpec, model: ServedModel, *, decodes: bool = ..., scores: bool = ...) -> ChosenAuto: ...
def choose(
    spec: AnySpec, model: ServedModel, *, decodes: bool = False, scores: bool = False
) -> Chosen | ChosenAuto:
    """The choice that ``model`` will run; 400 with every reason where it cannot and no fallback is
    permitted. ``decodes`` where it will have to read single tokens after a prompt, ``scores`` where the
    likelihood of the prompt itself is asked for. Of ``auto`` what can be said before anything is read."""
    if spec.verify is not None:
        check_layers(spec.verify, model.info, f"{spec.path}.verify.layers")
    if isinstance(spec, AutoSpec):
        return _choose_auto(spec, model, scores)
    choice = Choice(spec.name, spec.params, spec.seed, spec.impl)
    reasons = _reasons(choice, model, scores)
    if decodes and not spec.backend.capabilities.decode and not reasons:
        reasons.append("it cannot decode: choose another for 'decode' beside 'prefill'")
    if not reasons:
        return Chosen(spec.name, choice, verify=spec.verify, path=spec.path)
    if spec.fallback == "exact" and spec.name != "exact":
        return Chosen(spec.name, exact_choice(spec.seed), "; ".join(reasons), spec.verify, spec.path)
    way_out = "Choose another backend (GET /v1/attention/backends) or permit 'fallback': 'exact'."
    if spec.impl != "auto":
        way_out = f"Leave out 'impl' for what suits the device. {way_out}"
    raise unsupported(f"attention backend {spec.name!r}", model, reasons, way_out, spec.path)


def selects_by_tile(choice: Choice) -> bool:
    """Whether a row's keys may depend on later rows of its query tile, in some layer."""
    return any(
        load(part.backend).capabilities.selection == "tile" and part.params.chunk_multiple() > 1
        for part in choice.parts
    )


def _choose_auto(spec: AutoSpec, model: ServedModel, scores: bool) -> ChosenAuto:
    check_plan(spec, model.info)
    if spec.given is not None:
        choice, _ = replayed(spec)
        reasons = _reasons(choice, model, scores)
        if reasons:
            way_out = "Send a plan from an answer of this model to such a request, or max_error."
            raise unsupported("the plan given", model, reasons, way_out, f"{spec.path}.plan")
    return ChosenAuto(spec, scores)


def _reasons(choice: Choice, model: ServedModel, scores: bool) -> list[str]:
    """Every reason why it cannot be run."""
    reasons = list(model.unsupported(choice))
    of_prompt = [
        able for part in choice.parts if (able := load(part.backend).capabilities).selection == "prompt"
    ]
    if scores and of_prompt and (any(able.causal for able in of_prompt) or not reasons):
        reasons.append(
            "it selects keys by looking at the whole prompt, so scores of earlier tokens would depend on "
            "later ones; score with a backend whose selection is none, row or tile"
        )
    return reasons


def unsupported(what: str, model: ServedModel, reasons: list[str], way_out: str, param: str) -> ApiError:
    detail = f"{what} cannot serve model {model.info.name!r}: {'; '.join(reasons)}. {way_out}"
    return ApiError("attention_not_supported", detail, param=param, limits={"reasons": list(reasons)})


def _exact(spec: AutoSpec) -> Spec:
    """What reads new tokens after a prompt under ``auto``."""
    backend = load("exact")
    return Spec(backend, backend.params(), seed=spec.seed, path=spec.path, verify=spec.verify)


def _not_for(path: str, what: str, way_out: str) -> ApiError:
    detail = f"{path}: 'auto' plans how a prompt is read and is not for {what}; {way_out}"
    return ApiError("attention_not_supported", detail, param=path)


def _refuse_of_auto(raw: Mapping[str, Any], path: str) -> None:
    for name in _OF_AUTO:
        if name in raw:
            way_out = f"ask for 'backend': '{AUTO}', or leave it out"
            raise bad_params(f"{path}.{name}", f"goes with '{AUTO}' alone", way_out, {})
