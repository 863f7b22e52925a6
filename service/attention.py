"""From a request's ``attention`` to a validated choice for one model, and its schema from the registry.

Two steps, since the first needs no model: ``parse`` turns JSON into a ``Spec``; ``choose`` checks it
against the model and applies ``fallback`` where the request permits it. Nothing is substituted otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from kernels.api import MAX_PROBLEMS, too_many
from kernels.contract import Backend, Params
from kernels.registry import BACKENDS, UnknownBackend, load
from models.contract import Choice, ServedModel, Verify
from service.errors import ApiError, invalid
from service.validation import first_problem, shown_name
from service.verify_spec import check_layers, parse_verify

MAX_SEED = (1 << 63) - 1
MAX_SPECS = 32
NOT_YET = ("auto",)
_FIELDS = ("backend", "params", "fallback", "seed", "verify")

Fallback = Literal["error", "exact"]


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


@dataclass(frozen=True)
class Chosen:
    """What a model will run for a spec: ``choice``, and why it is not what was asked for, where it is not;
    and how its error is to be measured, where ``path`` asks for it."""

    requested: str
    choice: Choice
    fallback_reason: str | None = None
    verify: Verify | None = None
    path: str = "attention"


@dataclass(frozen=True)
class SpecPair:
    """Attention of prefill and of decode. ``split`` where the request named them apart."""

    prefill: Spec
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


def parse(raw: object, *, path: str = "attention", seed: int = 0) -> Spec:
    """``None`` (exact), a backend's name, or an object -> Spec. ``seed`` where the spec names none."""
    if raw is None:
        raw = "exact"
    if isinstance(raw, str):
        raw = {"backend": raw}
    if not isinstance(raw, Mapping):
        raise invalid(f"{path} must be a backend's name or an object with 'backend'", path)
    _refuse_not_yet(raw, path)
    if len(raw) > len(_FIELDS) + MAX_PROBLEMS:
        raise _bad_params(path, f"has {len(raw):,} fields", f"allowed fields: {', '.join(_FIELDS)}", {})
    try:
        envelope = _Envelope.model_validate(dict(raw))
    except ValidationError as error:
        where, message, limits = first_problem(error)
        at = f"{path}.{where}" if where else path
        raise _bad_params(at, message, f"allowed fields: {', '.join(_FIELDS)}", limits) from None
    if not 0 <= envelope.seed <= MAX_SEED:
        limits = {"ge": 0, "le": MAX_SEED}
        raise _bad_params(f"{path}.seed", f"must be between 0 and {MAX_SEED}", "choose another seed", limits)
    backend = _backend(envelope.backend, path)
    params = _params(backend, envelope.params, path)
    used_seed = envelope.seed if "seed" in raw else seed
    verify = parse_verify(envelope.verify, f"{path}.verify", used_seed)
    return Spec(backend, params, envelope.fallback, used_seed, path, verify)


def parse_pair(raw: object, *, path: str = "attention", seed: int = 0) -> SpecPair:
    """As ``parse``; ``{"prefill": spec, "decode": spec}`` names them apart (a missing one is exact)."""
    if isinstance(raw, Mapping) and raw and set(raw) <= {"prefill", "decode"}:
        prefill = parse(raw.get("prefill"), path=f"{path}.prefill", seed=seed)
        return SpecPair(prefill, parse(raw.get("decode"), path=f"{path}.decode", seed=seed), split=True)
    spec = parse(raw, path=path, seed=seed)
    return SpecPair(spec, spec, split=False)


def parse_list(raw: object) -> list[SpecPair]:
    """As ``parse_pair``, for one or a list of up to ``MAX_SPECS``; errors name ``attention[i]``."""
    if not isinstance(raw, list):
        return [parse_pair(raw)]
    if not 1 <= len(raw) <= MAX_SPECS:
        detail = f"attention has {len(raw):,} entries; a list of them has 1 to {MAX_SPECS}"
        raise invalid(detail, "attention", min_length=1, max_length=MAX_SPECS)
    return [parse_pair(each, path=f"attention[{i}]") for i, each in enumerate(raw)]


def choose(spec: Spec, model: ServedModel, *, decodes: bool = False, scores: bool = False) -> Chosen:
    """The choice that ``model`` will run; 400 with every reason where it cannot and no fallback is
    permitted. ``decodes`` where it will have to read single tokens after a prompt, ``scores`` where the
    likelihood of the prompt itself is asked for."""
    choice = Choice(spec.backend.name, spec.params, spec.seed)
    if spec.verify is not None:
        check_layers(spec.verify, model.info, f"{spec.path}.verify.layers")
    reasons = list(model.unsupported(choice))
    able = spec.backend.capabilities
    if decodes and not able.decode and not reasons:
        reasons.append("it cannot decode: choose another for 'decode' beside 'prefill'")
    if scores and able.selection == "prompt" and (able.causal or not reasons):
        reasons.append(
            "it selects keys by looking at the whole prompt, so scores of earlier tokens would depend on "
            "later ones; score with a backend whose selection is none, row or tile"
        )
    if not reasons:
        return Chosen(spec.backend.name, choice, verify=spec.verify, path=spec.path)
    why = "; ".join(reasons)
    if spec.fallback == "exact" and spec.backend.name != "exact":
        return Chosen(spec.backend.name, exact_choice(spec.seed), why, spec.verify, spec.path)
    raise ApiError(
        "attention_not_supported",
        f"attention backend {spec.backend.name!r} cannot serve model {model.info.name!r}: {why}. "
        "Choose another backend (GET /v1/attention/backends) or permit 'fallback': 'exact'.",
        param=spec.path,
        limits={"reasons": list(reasons)},
    )


def exact_choice(seed: int = 0) -> Choice:
    return Choice("exact", load("exact").params(), seed)


def selects_by_tile(choice: Choice) -> bool:
    """Whether a row's keys may depend on later rows of its query tile."""
    return load(choice.backend).capabilities.selection == "tile" and choice.params.chunk_multiple() > 1


def _refuse_not_yet(raw: Mapping[str, Any], path: str) -> None:
    for name in NOT_YET:
        if raw.get("backend") == name or name in raw:
            raise ApiError(
                "attention_not_supported",
                f"{path}: {name!r} is not available in this version; name a backend "
                "(GET /v1/attention/backends lists them)",
                param=path if raw.get("backend") == name else f"{path}.{name}",
                limits={"known": list(BACKENDS)},
            )


def _backend(name: str, path: str) -> Backend:
    try:
        return load(name)
    except UnknownBackend as error:
        raise ApiError(
            "attention_not_supported",
            f"{path}: there is no attention backend {shown_name(name)}; known: {', '.join(error.known)}",
            param=path,
            limits={"known": list(error.known)},
        ) from None


def _params(backend: Backend, raw: Mapping[str, Any], path: str) -> Params:
    known = ", ".join(backend.params.model_fields) or "none"
    if too_many(backend.params.model_fields, raw) is not None:
        message = f"has {len(raw):,} fields"
        raise _bad_params(f"{path}.params", message, f"params of {backend.name}: {known}", {})
    try:
        return backend.params.model_validate(dict(raw))
    except ValidationError as error:
        where, message, limits = first_problem(error)
        at = f"{path}.params.{where}" if where else f"{path}.params"
        raise _bad_params(at, message, f"params of {backend.name}: {known}", limits) from None


def _bad_params(where: str, message: str, way_out: str, limits: Mapping[str, Any]) -> ApiError:
    detail = f"{where}: {message} ({way_out})"
    return ApiError("invalid_attention_params", detail, param=where, limits=limits)
