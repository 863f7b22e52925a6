"""Server-sent events as the service streams them: ``event:`` and ``data:`` lines, comments, blank lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any


def read_events(lines: Iterable[bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, data) of each event; comments are skipped, an event that the stream cuts off is not delivered.

    Raises ValueError where ``data`` is not a JSON object.
    """
    name, data = "message", list[str]()
    for raw in lines:
        line = raw.decode("utf-8").rstrip("\r\n")
        if not line:
            if data:
                yield name, _parse("\n".join(data))
            name, data = "message", list[str]()
        elif not line.startswith(":"):
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if field == "event":
                name = value
            elif field == "data":
                data.append(value)


def _parse(text: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"an event's data is not JSON: {text[:120]!r}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"an event's data is not a JSON object: {text[:120]!r}")
    return parsed
