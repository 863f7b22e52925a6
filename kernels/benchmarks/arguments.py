"""The command line of the bench, checked before anything runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kernels.api import backend_names, parse_params
from kernels.benchmarks.cases import Shape, cpu_impls
from kernels.benchmarks.decode import LENGTHS as DECODE_LENGTHS
from kernels.benchmarks.edges import LENGTH as EDGES_LENGTH
from kernels.benchmarks.inputs import Inputs

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
SHAPES: tuple[Shape, ...] = ((12, 12, 64), (9, 3, 64), (4, 1, 256))
FLEX_LENGTHS = (4096, 16384)
QUICK_LENGTHS = (1024, 4096)
QUICK_SECONDS = 0.1
SECONDS = 0.4


@dataclass(frozen=True)
class Options:
    """What the command line asks for, defaults filled in."""

    lengths: tuple[int, ...]
    shapes: tuple[Shape, ...]
    backends: tuple[str, ...]
    impls: tuple[str, ...]
    params: tuple[dict[str, Any], ...]
    inputs: Inputs
    seconds: float
    max_rounds: int
    flex_at: frozenset[tuple[Shape, int]]
    """Shapes and lengths at which FlexAttention runs."""
    decode: bool
    prefill: bool
    decode_lengths: tuple[int, ...]
    edges: bool
    edges_length: int
    json: Path | None
    plot: Path | None


def options(argv: Sequence[str], described: str) -> Options:
    """Exits with a message that names the option where something is wrong."""
    parser = _parser(described)
    given = parser.parse_args(argv)
    quick = given.quick
    shapes = tuple(dict.fromkeys(given.shapes or SHAPES[: 1 if quick else None]))
    found = Options(
        lengths=tuple(sorted(set(given.lengths or (QUICK_LENGTHS if quick else LENGTHS)))),
        shapes=shapes,
        backends=tuple(dict.fromkeys(given.backends or backend_names())),
        impls=tuple(dict.fromkeys(given.impls or (["torch"] if quick else cpu_impls()))),
        params=tuple(given.params or [{}]),
        inputs=given.inputs,
        seconds=given.seconds if given.seconds is not None else (QUICK_SECONDS if quick else SECONDS),
        max_rounds=given.max_rounds,
        flex_at=_flex_at(given, shapes),
        decode=given.decode,
        prefill=not given.no_prefill,
        decode_lengths=tuple(sorted(set(given.decode_lengths))),
        edges=given.edges,
        edges_length=given.edges_length,
        json=given.json,
        plot=given.plot,
    )
    _check(parser, found)
    return found


def _flex_at(given: argparse.Namespace, shapes: Sequence[Shape]) -> frozenset[tuple[Shape, int]]:
    """The first shape alone unless every one is asked for: each mask compiles anew at each shape."""
    if given.no_flex or (given.quick and given.flex_lengths is None):
        return frozenset()
    lengths = FLEX_LENGTHS if given.flex_lengths is None else given.flex_lengths
    return frozenset((shape, N) for N in lengths for shape in shapes[: None if given.flex_every_shape else 1])


def _parser(described: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=described)
    add = parser.add_argument
    add("--lengths", type=_length, nargs="+", metavar="N", help=f"default {_told(LENGTHS)}")
    add("--shapes", type=_shape, nargs="+", metavar="HxHkxD", help="default 12x12x64 9x3x64 4x1x256")
    add("--backends", nargs="+", choices=backend_names(), metavar="NAME", help="default: all")
    add("--impls", nargs="+", choices=cpu_impls(), metavar="IMPL", help="default: all that run on a CPU")
    add("--params", type=_params, nargs="+", metavar="JSON", help="params to time; else the defaults")
    add(
        "--inputs",
        choices=("structured", "random"),
        default="structured",
        help="kernels/benchmarks/inputs.py",
    )
    add("--seconds", type=_positive, help=f"per contender and length, about; default {SECONDS}")
    add("--max-rounds", type=_length, default=7, metavar="COUNT", help="default 7")
    add("--flex-lengths", type=_length, nargs="*", metavar="N", help=f"default {_told(FLEX_LENGTHS)}")
    add(
        "--flex-every-shape",
        action="store_true",
        help="FlexAttention at every shape, else at the first alone",
    )
    add("--no-flex", action="store_true", help="without FlexAttention, which compiles for seconds per mask")
    add("--quick", action="store_true", help="1024 and 4096 tokens, one shape, impl torch, no FlexAttention")
    add("--decode", action="store_true", help="decode as well: one query over --decode-lengths keys")
    add("--decode-lengths", type=_length, nargs="+", default=DECODE_LENGTHS, metavar="M")
    add("--edges", action="store_true", help="learned backends' time against edges as well, at one length")
    add("--edges-length", type=_length, default=EDGES_LENGTH, metavar="N", help=f"default {EDGES_LENGTH}")
    add("--no-prefill", action="store_true", help="nothing but decode and edges")
    add("--json", type=_writable, metavar="FILE", help="everything, rewritten after every group")
    add("--plot", type=_writable, metavar="FILE.png", help="time against N (needs matplotlib)")
    return parser


def _check(parser: argparse.ArgumentParser, found: Options) -> None:
    if not (found.prefill or found.decode or found.edges):
        parser.error("--no-prefill leaves nothing to run: add --decode or --edges")
    if found.plot and not found.prefill:
        parser.error("--plot draws prefill times: leave --no-prefill out")
    if found.plot and find_spec("matplotlib") is None:
        parser.error(
            "--plot needs matplotlib, which is not installed: pip install 'matplotlib>=3.10', or make bench"
        )
    for name in found.backends:
        for params in found.params:
            try:
                parse_params(name, params)
            except ValueError as error:
                parser.error(f"--params {json.dumps(params)}: {error}")


def _shape(text: str) -> Shape:
    try:
        H, Hk, D = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected HxHkxD such as 12x12x64, got {text!r}") from None
    if min(H, Hk, D) < 1 or H % Hk:
        raise argparse.ArgumentTypeError(f"H must be a multiple of Hk and all at least 1, got {text!r}")
    return H, Hk, D


def _length(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _positive(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r}")
    return seconds


def _params(text: str) -> dict[str, Any]:
    try:
        params = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error}): {text!r}") from None
    if not isinstance(params, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return params


def _writable(text: str) -> Path:
    path = Path(text)
    if not path.resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no directory {path.resolve().parent}")
    return path


def _told(lengths: Sequence[int]) -> str:
    return " ".join(map(str, lengths))
