"""Runs impl ``triton`` of every backend in Triton's interpreter and holds it against impl ``torch``.

    TRITON_INTERPRET=1 python -m kernels.interpret_report --json docs/kernels-interpreted.json

What the interpreter shows is that a kernel computes the right numbers, not how fast and not that it compiles
(``kernels.compile_report``). A row is one backend: the kernels that it launched, in how many calls, and the
largest difference from torch in fp32, of fp32 and of fp16 inputs. Small, awkward shapes: prefill, a later
chunk, decode of several sequences, both directions. Minutes on one core. Exits with 1 where a backend is off,
with 2 where nothing can be interpreted.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from kernels.api import attend_packed, backend_names, parse_params
from kernels.contract import Impl, PackedResult, Segment
from kernels.math.sbm import random_clusters
from kernels.registry import load

LIMITS = {torch.float32: 1e-4, torch.float16: 1e-2}
SMALL: dict[str, dict[str, Any]] = {
    "window": {"window": 24, "global_tokens": 3},
    "sinks": {"window": 20, "sinks": 5},
    "strided": {"stride": 7},
    "fixed": {"stride": 9},
    "star": {"window": 12},
    "random": {"num_random": 32, "block_size": 32},
    "bigbird": {"window": 9, "global_tokens": 3, "num_random": 32, "block_size": 32},
    "xattention": {"query_tile": 128, "block_size": 32, "budget": 32},
    "pooled": {"query_tile": 128, "block_size": 32, "budget": 32},
    "topk": {"query_tile": 128, "block_size": 32, "budget": 32},
    "pages": {"query_tile": 128, "block_size": 32, "budget": 32},
    "vertical_slash": {"query_tile": 256, "block_size": 32, "num_verticals": 16, "num_slashes": 1},
    "lsh": {"num_buckets": 4, "cluster_size": 16, "window": 3, "sinks": 1},
    "kmeans": {"num_clusters": 4, "cluster_size": 16, "window": 3, "sinks": 1, "train_keys": 40},
    "performer": {"num_features": 32},
    "nystrom": {"num_landmarks": 8},
    "scatterbrain": {"num_features": 16, "support_params": {"window": 9, "sinks": 1}},
}
"""Params that leave something out of 300 keys; defaults elsewhere."""


COMMAND = "TRITON_INTERPRET=1 python -m kernels.interpret_report --json docs/kernels-interpreted.json"


@dataclass(frozen=True)
class Call:
    """Rows of each sequence, the last of its keys."""

    rows: tuple[int, ...]
    keys: tuple[int, ...]
    causal: bool


CALLS = (
    Call((150, 21), (150, 21), True),
    Call((33,), (300,), True),
    Call((1, 1, 1), (300, 64, 1), True),
    Call((160,), (160,), False),
)


@dataclass(frozen=True)
class Row:
    """``fp32`` and ``fp16``: largest difference of an output from torch's in fp32."""

    backend: str
    kernels: tuple[str, ...]
    calls: int
    fp32: float
    fp16: float
    agrees: bool


def main(argv: Sequence[str] | None = None) -> int:
    asked = _parser().parse_args(argv)
    reason = why_not()
    if reason is not None:
        print(f"python -m kernels.interpret_report: {reason}", file=sys.stderr)
        return 2
    rows = []
    for row in report(asked.backends):
        print(f"{row.backend:15} {row.fp32:.1e} {row.fp16:.1e} {'' if row.agrees else 'OFF '}{row.kernels}")
        rows.append(row)
    if asked.json is not None:
        asked.json.write_text(json.dumps(_record(rows), indent=1) + "\n", encoding="utf-8")
    return 0 if all(row.agrees for row in rows) else 1


def why_not() -> str | None:
    from importlib.util import find_spec

    from kernels._triton.targets import interpreting

    if find_spec("triton") is None:
        return "the package triton is not installed: pip install 'longreach[gpu]'"
    return None if interpreting() else "set TRITON_INTERPRET=1 before it starts"


def report(names: Sequence[str]) -> Iterator[Row]:
    """One row for each that has an impl triton."""
    for name in names:
        if "triton" in load(name).impls:
            yield _row(name)


def _row(name: str) -> Row:
    from kernels._triton.launch import Launch

    launched: dict[str, None] = {}
    run = Launch.run

    def noted(launch: Launch) -> None:
        launched[launch.kernel] = None
        run(launch)

    able = load(name).capabilities
    calls = [call for call in CALLS if (able.causal if call.causal else able.bidirectional)]
    with patch.object(Launch, "run", noted):
        worst = {dtype: max(_difference(name, call, dtype) for call in calls) for dtype in LIMITS}
    agrees = all(worst[dtype] <= limit for dtype, limit in LIMITS.items())
    off = worst[torch.float32], worst[torch.float16]
    return Row(name, tuple(sorted(launched)), len(calls), *off, agrees)


def _difference(name: str, call: Call, dtype: torch.dtype) -> float:
    q, segments = _operands(call, dtype)
    found = _attend(name, q, segments, call.causal, "triton").out
    wide = [_wide(segment) for segment in segments]
    told = _attend(name, q.float(), wide, call.causal, "torch").out
    return float((found.float() - told).abs().max())


def _attend(name: str, q: Tensor, segments: Sequence[Segment], causal: bool, impl: Impl) -> PackedResult:
    learned = random_clusters(q.shape[1], q.shape[-1], 5, seed=7) if load(name).capabilities.learned else None
    return attend_packed(
        q,
        segments,
        backend=name,
        params=parse_params(name, SMALL.get(name)),
        causal=causal,
        scale=q.shape[-1] ** -0.5,
        impl=impl,
        learned=learned,
    )


def _operands(call: Call, dtype: torch.dtype) -> tuple[Tensor, list[Segment]]:
    """Two query heads over one key head of width 24, sequences side by side."""
    generator = torch.Generator().manual_seed(len(call.rows))

    def drawn(heads: int, length: int) -> Tensor:
        return torch.randn(1, heads, length, 24, generator=generator).to(dtype)

    segments, row = [], 0
    for rows, keys in zip(call.rows, call.keys, strict=True):
        segments.append(Segment(slice(row, row + rows), drawn(1, keys), drawn(1, keys), keys - rows))
        row += rows
    return drawn(2, row), segments


def _wide(segment: Segment) -> Segment:
    return Segment(segment.rows, segment.k.float(), segment.v.float(), segment.start)


def _record(rows: Sequence[Row]) -> dict[str, Any]:
    from kernels.compile_report import sources_hash

    return {
        "command": COMMAND,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "triton": version("triton"),
        "torch": torch.__version__,
        "sources": sources_hash(),
        "rows": [asdict(row) for row in rows],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.interpret_report", description=(__doc__ or "").split("\n")[0]
    )
    names = backend_names()
    parser.add_argument("--backends", nargs="+", choices=names, metavar="NAME", default=list(names))
    parser.add_argument("--json", type=Path)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
