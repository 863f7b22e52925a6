"""A request's ``verify``: which rows of which layers are computed exactly beside what was asked for, so that
the answer tells how wrong it was.

``true`` (the server's own number of rows, all layers), or an object with ``rows`` and ``layers``; ``false``
is as if it were not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from models.contract import ModelInfo, Verify
from service.errors import ApiError
from service.validation import shown_name

MIN_ROWS, MAX_ROWS = 16, 65_536
MAX_LAYERS = 1024
_FIELDS = ("rows", "layers")
_ROWS = f"a number from {MIN_ROWS} to {MAX_ROWS:,}, or 'all'"
_LAYERS = "'all', or a list of layers"


def parse_verify(raw: object, path: str, seed: int) -> Verify | None:
    """None where it is not asked for. ApiError 400 names the field, its limits and what it may be."""
    if raw is None or raw is False:
        return None
    if raw is True:
        return Verify(seed=seed)
    if not isinstance(raw, Mapping):
        raise _bad(path, "must be true, or an object", f"allowed fields: {', '.join(_FIELDS)}")
    for name in raw:
        if name not in _FIELDS:
            detail = f"has a field {shown_name(name)} that is not known"
            raise _bad(path, detail, f"allowed fields: {', '.join(_FIELDS)}")
    return Verify(_rows(raw.get("rows"), f"{path}.rows"), _layers(raw.get("layers"), f"{path}.layers"), seed)


def check_layers(verify: Verify, info: ModelInfo, path: str) -> None:
    """400 where it names a layer that has an attention of its own, or is none of the model's."""
    for layer in verify.layers or ():
        if layer not in info.applied_layers:
            detail = f"{layer} is no layer of model {info.name!r} to which a request's attention applies"
            known = list(info.applied_layers)
            raise _bad(path, detail, f"those are {shown_layers(known)}", applied_layers=known)


def _rows(raw: object, path: str) -> int | Literal["all"] | None:
    if raw is None:
        return None
    if raw == "all":
        return "all"
    if isinstance(raw, bool) or not isinstance(raw, int):
        raise _bad(path, f"must be {_ROWS}", "leave it out for the server's own", ge=MIN_ROWS, le=MAX_ROWS)
    if not MIN_ROWS <= raw <= MAX_ROWS:
        way_out = "ask for more, or leave it out" if raw < MIN_ROWS else "ask for fewer, or 'all'"
        raise _bad(path, f"must be {_ROWS}", way_out, ge=MIN_ROWS, le=MAX_ROWS)
    return raw


def _layers(raw: object, path: str) -> tuple[int, ...] | None:
    """None: all of them."""
    if raw is None or raw == "all":
        return None
    if not isinstance(raw, list) or not 1 <= len(raw) <= MAX_LAYERS:
        detail = f"must be {_LAYERS} (1 to {MAX_LAYERS:,} of them)"
        raise _bad(path, detail, "leave it out for all", min_length=1, max_length=MAX_LAYERS)
    for i, layer in enumerate(raw):
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
            raise _bad(f"{path}[{i}]", "must be the number of a layer, from 0 on", "see applied_layers", ge=0)
    if len(set(raw)) < len(raw):
        raise _bad(path, "names a layer twice", "name each once")
    return tuple(raw)


def shown_layers(layers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0 to 2, 5"."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs) or "none"


def _bad(path: str, message: str, way_out: str, **limits: Any) -> ApiError:
    return ApiError("invalid_attention_params", f"{path}: {message} ({way_out})", param=path, limits=limits)
