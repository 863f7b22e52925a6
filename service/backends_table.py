"""``longreach backends``: the registry as a table, the graph conditions of its masks, and their pictures."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kernels.api import InvalidParams, describe, parse_params
from kernels.conditions import Conditions, conditions, directions, why_no_mask
from kernels.contract import Params, Unsupported
from kernels.registry import BACKENDS, UnknownBackend, load
from service.settings import ConfigError

HEAD = ("BACKEND", "SERVES", "SELECTION", "COST", "PARAMS (DEFAULTS)", "SUMMARY")
CONDITIONS_HEAD = (
    "BACKEND",
    "DIRECTION",
    "SELF LOOPS",
    "HAMILTONIAN PATH",
    "S",
    "CAUSAL S",
    "NNZ",
    "DENSITY",
    "PARAMS",
)
CONDITIONS_TOKENS = 1024

PrintTable = Callable[[Sequence[str], Sequence[Sequence[object]]], None]


def rows() -> list[tuple[str, ...]]:
    """(name, serves, selection, cost, params, summary) of every backend."""
    table: list[tuple[str, ...]] = []
    for name in BACKENDS:
        told = describe(name, graph=False)
        can = told["capabilities"]
        kinds = " ".join(kind for kind in ("causal", "bidirectional", "decode") if can[kind])
        table.append(
            (name, kinds, can["selection"], can["complexity"], _told(told["defaults"]), told["summary"])
        )
    return table


def markdown() -> str:
    """The README's table of backends."""
    lines = ["| backend | what a token sees | params (defaults) | cost | source |", "|---|---|---|---|---|"]
    for name, _, _, cost, params, summary in rows():
        knobs = "–" if params == "-" else f"`{params}`"
        lines.append(f"| `{name}` | {summary} | {knobs} | {cost} | {load(name).paper} |")
    return "\n".join(lines)


def run(options: argparse.Namespace, print_table: PrintTable) -> None:
    """``--conditions`` and ``--draw``, one or both. Raises ConfigError."""
    if options.json and not options.conditions:
        raise ConfigError("--json needs --conditions")
    try:
        chosen = _chosen(options.backend, options.params)
        if options.conditions:
            _tell_conditions(chosen, options, print_table)
        if options.draw:
            _draw(chosen, options)
        _tell_left_out(chosen, options)
    except UnknownBackend as error:
        raise ConfigError(f"--backend: {error}") from None
    except InvalidParams as error:
        raise ConfigError(f"--params: {error}") from None
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _chosen(backend: str | None, params: str | None) -> dict[str, Params | None]:
    """The backends asked for and their params, None where none were given: all that have a mask, where none
    was asked for by name."""
    if params is None:
        masked = [name for name in BACKENDS if why_no_mask(name) is None]
        return dict.fromkeys(masked if backend is None else [load(backend).name])
    if backend is None:
        raise ConfigError("--params needs --backend NAME: they are the params of one backend")
    try:
        given = json.loads(params)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--params is not JSON ({error}): {params}") from None
    except RecursionError:
        raise ConfigError("--params is nested too deeply to be read as JSON") from None
    parsed = parse_params(backend, given)
    if not directions(backend, parsed):
        raise Unsupported(backend, [*load(backend).unsupported(parsed, True)])
    return {backend: parsed}


def _tell_left_out(chosen: dict[str, Params | None], options: argparse.Namespace) -> None:
    """On stderr: stdout is for what was asked for."""
    if options.backend is None:
        for name in (name for name in BACKENDS if name not in chosen):
            print(f"{name} is left out: {why_no_mask(name)}", file=sys.stderr)


def _tell_conditions(
    chosen: dict[str, Params | None], options: argparse.Namespace, print_table: PrintTable
) -> None:
    num_tokens = CONDITIONS_TOKENS if options.num_tokens is None else options.num_tokens
    found = [
        (name, knobs, conditions(name, knobs, num_tokens=num_tokens, causal=causal))
        for name, knobs in ((name, params or load(name).params()) for name, params in chosen.items())
        for causal in directions(name, knobs).values()
    ]
    if options.json:
        print(json.dumps([_as_json(*each) for each in found], indent=2))
        return
    print_table(CONDITIONS_HEAD, [_row(*each) for each in found])
    print(f"\n{num_tokens} tokens. {_LEGEND}")
    if any(each.one_example for _, _, each in found):
        print(_ONE_EXAMPLE)


_LEGEND = (
    "s: layers until every token depends on every token; causal s: until it depends on all before it. "
    "The theorem of Yun et al. (arXiv 2006.04862) asks for self loops, a Hamiltonian path and a finite s."
)
_ONE_EXAMPLE = (
    "* one example: the first layer's draw, or its choice for one sample of normal queries and keys, "
    "repeated in every layer."
)


def _row(name: str, params: Params, found: Conditions) -> tuple[str, ...]:
    return (
        name + ("*" if found.one_example else ""),
        "causal" if found.causal else "bidirectional",
        "yes" if found.self_loops else "no",
        found.hamiltonian_path,
        _layers(found.s),
        _layers(found.causal_s) if found.causal else "-",
        " + ".join(map(str, found.nnz)),
        f"{found.density:.4f}",
        _told(params.model_dump(mode="json", exclude_none=True)),
    )


def _layers(depth: int | None) -> str:
    return "infinite" if depth is None else str(depth)


def _told(params: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in params.items()) or "-"


def _as_json(name: str, params: Params, found: Conditions) -> dict[str, Any]:
    return {"backend": name, "params": params.model_dump(mode="json")} | found.as_json()


def _draw(chosen: dict[str, Params | None], options: argparse.Namespace) -> None:
    """One picture per backend and direction, and an overview where there are several backends."""
    from kernels.drawing import MissingMatplotlib, draw, drawings, overview

    try:
        asked = [drawings(name, params, options.num_tokens) for name, params in chosen.items()]
        shown = [entry for entry in asked if entry]
        for drawing in (drawing for entry in shown for drawing in entry):
            _write(Path(options.draw), f"{drawing.backend}-{drawing.direction}.png", draw(drawing))
        if len(shown) > 1:
            _write(Path(options.draw), "overview.png", overview(shown))
    except MissingMatplotlib as error:
        raise ConfigError(str(error)) from None


def _write(folder: Path, name: str, picture: bytes) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture)
    except OSError as error:
        raise ConfigError(f"--draw: cannot write {folder / name}: {error.strerror}") from None
    print(folder / name)
