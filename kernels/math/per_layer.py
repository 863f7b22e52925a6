"""Numbers that may differ by layer and key head: n, or [n, n, ...] per layer, or [[n, ...], n, ...].

The forms of a backend's knob: how they are read and refused, their JSON schema, whether they fit a model, and
one layer's numbers. Generic over whole numbers and fractions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar, Union

from pydantic import PlainSerializer, PlainValidator, ValidationInfo, WithJsonSchema
from pydantic_core import PydanticCustomError

T = TypeVar("T", int, float)
Forms = Union[T, tuple[T | tuple[T, ...], ...]]  # noqa: UP007  (mypy knows no alias T | ... of a variable)

MAX_COUNT = 1 << 20
MAX_ENTRIES = 1024
"""Of a list, per layer or per key head."""
_OF_WHAT = ("layer", "key head")
_ALSO = (
    ", or a list with one entry per layer, each such a number or a list with one per key head",
    ", or a list with one per key head",
    "",
)
"""What else may stand in a place: the whole, one layer's, one head's."""

AS_IT_IS = PlainSerializer(lambda value: value)


@dataclass(frozen=True)
class Number(Generic[T]):
    """One number of a knob: in words, as JSON schema, and how it is read (None where it is none)."""

    told: str
    schema: dict[str, Any]
    read: Callable[[Any], T | None]


def whole_number(most: int, of_what: str = "") -> Number[int]:
    """From 0 to ``most``."""

    def read(value: Any) -> int | None:
        fits = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most
        return value if fits else None

    told = f"a whole number{of_what} from 0 to {most}"
    return Number(told, {"type": "integer", "minimum": 0, "maximum": most}, read)


def share() -> Number[float]:
    """Above 0 and at most 1."""

    def read(value: Any) -> float | None:
        fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1
        return float(value) if fits else None

    told = "a number above 0 and at most 1"
    return Number(told, {"type": "number", "exclusiveMinimum": 0, "maximum": 1}, read)


def reader(number: Number[T], *, optional: bool = False) -> PlainValidator:
    """A field's validator: its forms, as tuples. Refusals are one sentence with the entry's place."""

    def read(value: Any, info: ValidationInfo) -> Forms[T] | None:
        return None if optional and value is None else _whole(number, value, info.field_name or "it")

    return PlainValidator(read)


def _whole(number: Number[T], value: Any, name: str) -> Forms[T]:
    if not isinstance(value, list | tuple):
        return _one(number, value, name, 0)
    return tuple(_layer(number, one, place) for one, place in _entries(number, value, name, 0))


def _layer(number: Number[T], value: Any, place: str) -> T | tuple[T, ...]:
    if not isinstance(value, list | tuple):
        return _one(number, value, place, 1)
    return tuple(_one(number, one, at, 2) for one, at in _entries(number, value, place, 1))


def _entries(
    number: Number[T], value: list[Any] | tuple[Any, ...], place: str, depth: int
) -> Iterator[tuple[Any, str]]:
    if not value:
        raise refused(f"{place} is an empty list: give {number.told}{_ALSO[depth]}")
    if len(value) > MAX_ENTRIES:
        raise refused(
            f"{place} has {len(value):,} entries, one per {_OF_WHAT[depth]}, but at most {MAX_ENTRIES} may "
            f"be given: give {number.told}, or a shorter list"
        )
    return ((one, f"{place}[{at}]") for at, one in enumerate(value))


def _one(number: Number[T], value: Any, place: str, depth: int) -> T:
    found = number.read(value)
    if found is None:
        raise refused(f"{place} must be {number.told}{_ALSO[depth]}")
    return found


def refused(text: str) -> PydanticCustomError:
    """What a validator raises; the text is shown as it is."""
    return PydanticCustomError("number", "{text}", {"text": text})


def schema(number: Number[T], *, optional: bool = False) -> WithJsonSchema:
    """The forms as JSON schema."""
    size = {"minItems": 1, "maxItems": MAX_ENTRIES}
    heads = {"type": "array", "items": number.schema, **size, "title": "per key head"}
    layers = {
        "type": "array",
        "items": {"anyOf": [number.schema, heads]},
        **size,
        "title": "per layer",
    }
    return WithJsonSchema({"anyOf": [number.schema, layers, *([{"type": "null"}] if optional else [])]})


_COUNT = whole_number(MAX_COUNT)
Count = Annotated[Forms[int], reader(_COUNT), AS_IT_IS, schema(_COUNT)]


def size_problems(name: str, value: Forms[T] | None, num_layers: int, num_kv_heads: int) -> list[str]:
    """Why the lists do not fit a model of so many layers and key heads, in one sentence; [] where they do."""
    if not isinstance(value, tuple):
        return []
    model = f"but the choice applies to {num_layers} layers with {num_kv_heads} key heads each"
    if len(value) != num_layers:
        return [f"{name} has {len(value)} entries, {model}: give one number, or one per layer"]
    wrong = [(at, len(x)) for at, x in enumerate(value) if isinstance(x, tuple) and len(x) != num_kv_heads]
    if not wrong:
        return []
    at, length = wrong[0]
    more = f" (and {len(wrong) - 1} more have a wrong number of them)" if len(wrong) > 1 else ""
    return [f"{name}[{at}] has {length} entries{more}, {model}: give one number, or one per key head"]


def of_layer(name: str, value: Forms[T], layer: int, num_kv_heads: int) -> tuple[T, ...]:
    """One layer's numbers, an entry per key head. ValueError where a list is too short or of another
    length."""
    if not isinstance(value, tuple):
        return (value,) * num_kv_heads
    if layer >= len(value):
        raise ValueError(f"{name} has {len(value)} entries, one per layer, but this is layer number {layer}")
    own = value[layer]
    if not isinstance(own, tuple):
        return (own,) * num_kv_heads
    if len(own) != num_kv_heads:
        raise ValueError(f"{name}[{layer}] has {len(own)} entries, but there are {num_kv_heads} key heads")
    return own


def numbers(name: str, value: Forms[T]) -> Iterator[tuple[str, T]]:
    """Every number with its place: ``name``, ``name[layer]`` or ``name[layer][head]``."""
    if not isinstance(value, tuple):
        yield name, value
        return
    for at, layer in enumerate(value):
        if isinstance(layer, tuple):
            yield from ((f"{name}[{at}][{head}]", one) for head, one in enumerate(layer))
        else:
            yield f"{name}[{at}]", layer


def largest(value: Forms[T]) -> T:
    """The largest of them."""
    return max(number for _, number in numbers("", value))
