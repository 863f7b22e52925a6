"""A backend by its name and its params from JSON: what it refuses, as errors that name the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from kernels.api import too_many
from kernels.contract import Backend, Params
from kernels.registry import UnknownBackend, load
from service.errors import ApiError
from service.validation import first_problem, shown_name


def backend_of(name: str, path: str) -> Backend:
    try:
        return load(name)
    except UnknownBackend as error:
        raise ApiError(
            "attention_not_supported",
            f"{path}: there is no attention backend {shown_name(name)}; known: {', '.join(error.known)}",
            param=path,
            limits={"known": list(error.known)},
        ) from None


def params_of(backend: Backend, raw: Mapping[str, Any], path: str) -> Params:
    """``path`` is that of the object which holds ``params``."""
    known = ", ".join(backend.params.model_fields) or "none"
    if too_many(backend.params.model_fields, raw) is not None:
        message = f"has {len(raw):,} fields"
        raise bad_params(f"{path}.params", message, f"params of {backend.name}: {known}", {})
    try:
        return backend.params.model_validate(dict(raw))
    except ValidationError as error:
        where, message, limits = first_problem(error)
        at = f"{path}.params.{where}" if where else f"{path}.params"
        raise bad_params(at, message, f"params of {backend.name}: {known}", limits) from None


def bad_params(where: str, message: str, way_out: str, limits: Mapping[str, Any]) -> ApiError:
    detail = f"{where}: {message} ({way_out})"
    return ApiError("invalid_attention_params", detail, param=where, limits=limits)
