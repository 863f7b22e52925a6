"""Small things that several routes share."""

from __future__ import annotations

from typing import TypeVar, cast

from service.errors import ApiError, invalid
from service.flow import Flow
from service.openai_schemas import Lenient
from service.schemas import TokenInput

T = TypeVar("T")

ADMISSION_ERRORS = (
    "invalid_request",
    "invalid_api_key",
    "model_not_found",
    "body_too_large",
    "unsupported_media_type",
    "loading",
    "draining",
    "engine_unhealthy",
)
QUEUE_ERRORS = ("queue_full", "token_budget_exhausted", "cost_budget_exhausted")
PROFILE_ERRORS = ("never_fits_memory", "model_unloaded", "internal_error")
"""Also where nothing is run, while the profile is measured that ``auto`` plans with."""
RUN_ERRORS = (
    *ADMISSION_ERRORS,
    *QUEUE_ERRORS,
    *PROFILE_ERRORS,
    "invalid_attention_params",
    "attention_not_supported",
    "context_length_exceeded",
    "empty_input",
    "non_finite_output",
    "deadline_exceeded",
)
"""Codes that a route which runs a model can answer with."""


def input_list(source: T | list[T], path: str, limit: int) -> tuple[list[T], bool]:
    """(inputs, whether they came as a list). Errors name ``path[i]`` only where the client sent a list."""
    if not isinstance(source, list):
        return [source], False
    if not source:
        raise ApiError("empty_input", f"{path} is an empty list; send at least one input.", param=path)
    if len(source) > limit:
        detail = f"{path} has {len(source)} entries; the limit is {limit} (max_batch_inputs)."
        raise invalid(detail, path, max_batch_inputs=limit, inputs=len(source))
    return source, True


def as_inputs(
    source: str | list[int] | list[str | list[int]], path: str, limit: int
) -> tuple[list[str | TokenInput], bool]:
    """OpenAI's four forms of an input as ours."""
    if isinstance(source, list) and source and isinstance(source[0], int):
        return [_tokens(source)], False
    listed = (
        source
        if isinstance(source, str)
        else [item if isinstance(item, str) else _tokens(item) for item in source]
    )
    return input_list(listed, path, limit)


def _tokens(ids: object) -> TokenInput:
    return TokenInput.model_construct(token_ids=cast(list[int], ids))


def note_ignored(flow: Flow, body: Lenient) -> None:
    """Name the fields that change nothing in a header, so that nobody wonders why they do not."""
    names = body.ignored()[:32]
    if names:
        flow.record.extra_headers["x-ignored-params"] = ", ".join(names)
