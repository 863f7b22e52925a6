"""The options of quality runs, and what their results say of when and where they were taken."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kernels.api import backend_names

DEFAULT_TEXT = Path(__file__).resolve().parents[1] / "samples" / "state-of-the-union-1901.txt"


def common_parser(prog: str, told: str) -> argparse.ArgumentParser:
    """The options of every quality run. Those that name files say nothing of what is measured."""
    parser = argparse.ArgumentParser(prog=prog, description=told)
    add = parser.add_argument
    add("--layers", type=positive, metavar="N", help="measure every N-th layer's error (1; long texts: 3)")
    add("--repeat", type=positive, default=1, metavar="N", help="calls per error time; the least counts")
    add("--seed", type=natural, default=0)
    add_contenders(parser)
    add_outputs(parser)
    return parser


def add_contenders(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--backends", nargs="+", choices=backend_names(), metavar="NAME", help="default: all")
    add("--contenders", metavar="JSON", help='instead of the ladders: {"window": [{"window": 512}], ...}')


def add_outputs(parser: argparse.ArgumentParser, plot: bool = True) -> None:
    """Files that are written: they say nothing of what is measured."""
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="results, written as they come")
    add("--resume", action="store_true", help="add to the results in --json what they lack")
    add("--markdown", type=Path, metavar="FILE", help="tables go there instead of to the screen")
    if plot:
        add("--plot", type=Path, metavar="PREFIX", help="writes PREFIX-4k.png and so on")


def _parser() -> argparse.ArgumentParser:
    told = "What each attention backend costs and loses on a real decoder and a real text."
    parser = common_parser("python -m models.quality", told)
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="decoder: demo model, directory, hub id or GGUF file")
    add("--text", type=Path, default=DEFAULT_TEXT, metavar="FILE")
    add("--tokens", type=positive, nargs="+", default=[4096, 8192], metavar="N")
    add("--chunk-tokens", type=natural, default=512, metavar="N", help="rows per step; 0: all at once")
    add("--perplexity", choices=("some", "all", "none"), default="some", help="some: fewer beyond 4,096")
    return parser


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    return parsed(_parser(), argv)


def parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked against each other, and ``command``: those of them that decide what is
    measured."""
    options = parser.parse_args(argv)
    if options.resume and options.json is None:
        parser.error("--resume needs --json")
    if getattr(options, "contenders", None) is not None and options.backends is not None:
        parser.error("--contenders already names its backends; give one of --contenders and --backends")
    options.command = _command(parser, options)
    return options


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {value}")
    return value


def natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {value}")
    return value


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": options.model,
        "text": options.text.name,
        "text_sha256": hashlib.sha256(options.text.read_bytes()).hexdigest(),
        "chunk_tokens": options.chunk_tokens,
        "layers": options.layers,
        "repeat": options.repeat,
        "seed": options.seed,
    }


def context_of(options: argparse.Namespace) -> dict[str, Any]:
    """When and where; the load is noted when measuring begins."""
    return {
        "command": options.command,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "loads_at_start": [],
    }


_WRITTEN = ("json", "resume", "markdown", "plot")
"""Where results were written to is nobody's business."""


def _command(parser: argparse.ArgumentParser, options: argparse.Namespace) -> str:
    words = [parser.prog]
    for name, value in vars(options).items():
        if name not in _WRITTEN and value != parser.get_default(name):
            values = value if isinstance(value, list) else [value]
            words.append(" ".join([f"--{name.replace('_', '-')}", *map(_word, values)]))
    return " ".join(words)


def _word(value: Any) -> str:
    """One argument, as a shell takes it; of a file its name alone."""
    return value.name if isinstance(value, Path) else shlex.quote(str(value))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()
