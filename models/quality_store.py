"""The results file of a quality run: written after every step, read again to go on after an interruption."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from models.quality_contenders import key_of
from models.quality_error import ErrorRow
from models.quality_perplexity import PerplexityRow
from models.quality_retrieval import RetrievalRow

MACHINE = ("processor", "threads", "torch")
"""What of the context times depend on."""

Row = TypeVar("Row", ErrorRow, PerplexityRow, RetrievalRow)


class Stored(Protocol):
    """Results of any run: a dataclass with what decides them, and when and where they were taken."""

    settings: dict[str, Any]
    context: dict[str, Any]


R = TypeVar("R", bound=Stored)


@dataclass
class Results:
    """``settings`` decide what the figures mean and must agree on resuming; ``context`` says when and
    where, with the load of the machine at the start of the first run and of each that went on with it, and
    the commands of those that had others. Decoders have perplexities, encoders retrievals."""

    settings: dict[str, Any]
    context: dict[str, Any]
    errors: list[ErrorRow] = field(default_factory=list)
    perplexities: list[PerplexityRow] = field(default_factory=list)
    retrievals: list[RetrievalRow] = field(default_factory=list)

    def has_error(self, tokens: int, key: str) -> bool:
        return _has(self.errors, tokens, key)

    def has_perplexity(self, tokens: int, key: str) -> bool:
        return _has(self.perplexities, tokens, key)

    def has_retrieval(self, tokens: int, key: str) -> bool:
        return _has(self.retrievals, tokens, key)

    @property
    def lengths(self) -> list[int]:
        return sorted({row.tokens for row in self.rows})

    @property
    def rows(self) -> list[ErrorRow | PerplexityRow | RetrievalRow]:
        return [*self.errors, *self.perplexities, *self.retrievals]


def _has(rows: list[Row], tokens: int, key: str) -> bool:
    return any(row.tokens == tokens and key_of(row.backend, row.full) == key for row in rows)


def save(results: Stored, file: Path) -> None:
    """Write everything; an interruption leaves the former file whole."""
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(asdict(results), indent=1) + "\n", encoding="utf-8")  # type: ignore[call-overload]
    os.replace(part, file)


def load(file: Path) -> Results:
    """ValueError where the file is not one that ``save`` wrote."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        return Results(
            settings=dict(raw["settings"]),
            context=dict(raw["context"]),
            errors=[ErrorRow(**row) for row in raw["errors"]],
            perplexities=[PerplexityRow(**row) for row in raw["perplexities"]],
            retrievals=[RetrievalRow(**row) for row in raw.get("retrievals", [])],
        )
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} holds no results of models.quality: {error!r}") from None


def open_results(
    file: Path | None, resume: bool, settings: Mapping[str, Any], context: Mapping[str, Any]
) -> Results:
    """New results, or those of ``file`` to go on with. ValueError as ``open_stored``."""
    return open_stored(file, resume, Results(dict(settings), dict(context)), load)


def open_stored(file: Path | None, resume: bool, fresh: R, read: Callable[[Path], R]) -> R:
    """``fresh`` results, or those of ``file`` to go on with. ValueError where the file is there and
    ``resume`` was not asked for, or where its settings differ."""
    if file is None or not file.exists():
        return fresh
    if not resume:
        raise ValueError(f"{file} is there already: give --resume to go on with it, or another --json")
    found, settings = read(file), fresh.settings
    told = _differences(found.settings, settings, sorted({**found.settings, **settings}))
    if told:
        raise ValueError(f"{file} was measured with other settings: {told}. Give another --json")
    return found


def add_texts(held: dict[str, Any], now: Mapping[str, Any]) -> None:
    """Texts may be added to those of a file's settings: every row names its own."""
    if held.get("texts", {}).items() <= now["texts"].items():
        held["texts"] = now["texts"]


def begin(results: Stored, context: Mapping[str, Any], load: float) -> None:
    """Note a run that is about to measure. ValueError where it would add times of another machine to those in
    ``results``."""
    if told := _differences(results.context, context, MACHINE):
        raise ValueError(
            f"the results so far were measured on another machine: {told}. Times of two machines cannot be "
            "compared: go on there, or give another --json"
        )
    results.context["loads_at_start"].append(round(load, 2))
    command = context.get("command")
    added = results.context.setdefault("added_by", [])
    if command not in (results.context.get("command"), *added):
        added.append(command)


def _differences(held: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str]) -> str:
    """``name (held, now ...)`` of what differs once it has been through a file."""
    return ", ".join(
        f"{name} ({held.get(name)}, now {now.get(name)})"
        for name in names
        if held.get(name) != json.loads(json.dumps(now.get(name)))
    )
