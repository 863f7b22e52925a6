"""Whole numbers that may differ by layer and key head: n, or [n, n, ...] per layer, or [[n, ...], n, ...]."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

MAX_COUNT = 1 << 20
_FORMS = "or a list with one entry per layer, each such a number or a list with one per key head"

CountForms = int | tuple[int | tuple[int, ...], ...]


def _read(value: Any) -> CountForms:
    if not isinstance(value, list | tuple):
        return _number(value, "it")
    return tuple(_layer(one, f"entry [{at}]") for at, one in enumerate(_filled(value, "it")))


def _layer(value: Any, place: str) -> int | tuple[int, ...]:
    if not isinstance(value, list | tuple):
        return _number(value, place)
    return tuple(_number(one, f"{place}[{at}]") for at, one in enumerate(_filled(value, place)))


def _filled(value: list[Any] | tuple[Any, ...], place: str) -> list[Any] | tuple[Any, ...]:
    return value if value else _refuse(f"{place} is an empty list: give one number from 0 to {MAX_COUNT}")


def _number(value: Any, place: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_COUNT:
        _refuse(f"{place} must be a whole number from 0 to {MAX_COUNT}")
    return int(value)


def _refuse(text: str) -> Any:
    raise PydanticCustomError("count", "{text}, " + _FORMS, {"text": text})


_NUMBER = {"type": "integer", "minimum": 0, "maximum": MAX_COUNT}
_HEADS = {"type": "array", "items": _NUMBER, "minItems": 1, "title": "per key head"}
_LAYERS = {"type": "array", "items": {"anyOf": [_NUMBER, _HEADS]}, "minItems": 1, "title": "per layer"}

Count = Annotated[
    CountForms,
    PlainValidator(_read),
    PlainSerializer(lambda value: value),
    WithJsonSchema({"anyOf": [_NUMBER, _LAYERS]}),
]


def count_problems(name: str, value: CountForms, num_layers: int, num_kv_heads: int) -> list[str]:
    """Why the lists do not fit a model of so many layers and key heads; [] where they do."""
    if isinstance(value, int):
        return []
    model = f"the choice applies to {num_layers} layers with {num_kv_heads} key heads each"
    problems = []
    if len(value) != num_layers:
        problems.append(f"{name} has {len(value)} entries, but {model}: give one number, or one per layer")
    for at, layer in enumerate(value):
        if isinstance(layer, tuple) and len(layer) != num_kv_heads:
            problems.append(
                f"{name}[{at}] has {len(layer)} entries, but {model}: give one number, or one per key head"
            )
    return problems


def count_of_layer(name: str, value: CountForms, layer: int, num_kv_heads: int) -> tuple[int, ...]:
    """One layer's numbers, an entry per key head. ValueError where a list is too short or of another
    length."""
    if isinstance(value, int):
        return (value,) * num_kv_heads
    if layer >= len(value):
        raise ValueError(f"{name} has {len(value)} entries, one per layer, but this is layer number {layer}")
    own = value[layer]
    if isinstance(own, int):
        return (own,) * num_kv_heads
    if len(own) != num_kv_heads:
        raise ValueError(f"{name}[{layer}] has {len(own)} entries, but there are {num_kv_heads} key heads")
    return own


def largest_count(value: CountForms) -> int:
    """The largest of them."""
    if isinstance(value, int):
        return value
    return max(layer if isinstance(layer, int) else max(layer) for layer in value)
