"""Pydantic's complaints as one plain sentence that names the field and never repeats the input."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

TAGS = frozenset({"input_text", "input_list", "input_token_ids", "content_text", "content_parts"})
"""Names of union members: they appear in pydantic's paths but not in the request."""

_SAFE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def shown_name(name: object) -> str:
    """A name from the request, fit to be shown: quoted where harmless, else only described."""
    return repr(name) if isinstance(name, str) and _SAFE_NAME.fullmatch(name) else "of that name"


def param_path(location: Sequence[int | str]) -> str:
    """("input", 3, "token_ids", 7) -> "input[3].token_ids[7]"."""
    path = ""
    for part in location:
        if part in TAGS:
            continue
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            name = part if _SAFE_NAME.fullmatch(part) else "(unprintable name)"
            path += f".{name}" if path else name
    return path


def first_problem(error: ValidationError) -> tuple[str, str, dict[str, Any]]:
    """(path, message, bounds) of the first complaint."""
    problem = error.errors(include_input=False, include_url=False)[0]
    return param_path(problem["loc"]), message_of(problem), limits_of(problem)


def message_of(problem: Mapping[str, Any]) -> str:
    """Pydantic's sentence, lower case, without what the client sent."""
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        return "is not a known field; remove it"
    if kind == "missing":
        return "is required"
    if kind == "string_unicode":
        return "must be valid Unicode text (a lone surrogate cannot be encoded as UTF-8)"
    if kind == "int_parsing_size":
        return "is too large an integer"
    if kind in ("value_error", "assertion_error") and "error" in context:
        return str(context["error"])
    message = str(problem["msg"])
    return message[0].lower() + message[1:]


def limits_of(problem: Mapping[str, Any]) -> dict[str, Any]:
    """The numeric bounds that a complaint names."""
    context = problem.get("ctx", {})
    names = ("ge", "gt", "le", "lt", "min_length", "max_length")
    return {name: context[name] for name in names if isinstance(context.get(name), int | float)}
