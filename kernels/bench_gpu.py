"""Times impl ``triton`` of every backend on a GPU against torch's SDPA, FlexAttention over the same mask, and
flash-attention where it is installed.

    python -m kernels.bench_gpu --json docs/kernels-gpu.json --plot docs/kernels-gpu.png      everything
    python -m kernels.bench_gpu --quick --backends window xattention                          a minute

Contenders of one length, shape, dtype and direction take turns; each time is the median of many by CUDA
events, and before each call the second-level cache is overwritten. Work is counted as 4 D FLOP per score
element computed. Selection counts: FlexAttention is handed the lists that were chosen beforehand.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels.api import backend_names
from kernels.benchmarks.cases import Case, Shape, why_not
from kernels.benchmarks.gpu_rows import GpuRecord, GpuRow, device_of, plot, table
from kernels.benchmarks.gpu_timing import CudaTimer, Timer
from kernels.benchmarks.gpu_turns import run_case_group

LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536)
SHAPES: tuple[Shape, ...] = ((32, 8, 128), (12, 12, 64))
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
QUICK_LENGTHS = (4096, 16384)


@dataclass(frozen=True)
class Options:
    lengths: tuple[int, ...]
    shapes: tuple[Shape, ...]
    backends: tuple[str, ...]
    dtypes: tuple[str, ...]
    rounds: int
    flex: bool
    json: Path | None
    plot: Path | None


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    asked = options(arguments)
    if not torch.cuda.is_available():
        print("bench_gpu: torch sees no CUDA device. On a CPU: python -m kernels.bench", file=sys.stderr)
        return 2
    record = GpuRecord(device_of(arguments))
    print(record.head())
    bench(asked, record, CudaTimer(asked.rounds), torch.device("cuda"), print)
    record.complete = True
    _finish(asked, record)
    return 1 if record.failures else 0


def bench(
    asked: Options,
    record: GpuRecord,
    timer: Timer,
    device: torch.device,
    say: Callable[[str], None],
) -> None:
    """Fill the record, group by group; what it has is written after each."""
    for cases, dtype in _groups(asked):
        for row in run_case_group(cases, DTYPES[dtype], dtype, timer, device, asked.flex, record):
            record.rows.append(row)
            say(row.line())
        if asked.json is not None:
            record.write(asked.json)


def _groups(asked: Options) -> list[tuple[list[Case], str]]:
    found = []
    for N in asked.lengths:
        for H, Hk, D in asked.shapes:
            for dtype in asked.dtypes:
                for causal in (True, False):
                    cases = [Case(name, {}, H, Hk, D, N, causal, "triton") for name in asked.backends]
                    found.append(([case for case in cases if why_not(case) is None], dtype))
    return found


def options(argv: Sequence[str]) -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench_gpu", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("--lengths", type=int, nargs="+", metavar="N", help=f"default {' '.join(map(str, LENGTHS))}")
    add("--shapes", type=_shape, nargs="+", metavar="HxHkxD", default=list(SHAPES))
    add("--backends", nargs="+", choices=backend_names(), metavar="NAME", default=list(backend_names()))
    add("--dtypes", nargs="+", choices=list(DTYPES), default=["bf16"])
    add("--rounds", type=int, default=30, help="timed calls of each (default 30)")
    add("--no-flex", action="store_true", help="leave FlexAttention out: each mask compiles anew")
    add("--quick", action="store_true", help="two lengths, one shape, 10 rounds")
    add("--json", type=Path, help="everything that was measured")
    add("--plot", type=Path, help="a PNG (needs the extra bench)")
    given = parser.parse_args(argv)
    if given.rounds < 1:
        parser.error("--rounds must be 1 or more")
    lengths = given.lengths or (QUICK_LENGTHS if given.quick else LENGTHS)
    if min(lengths) < 1:
        parser.error("--lengths must be 1 or more")
    return Options(
        tuple(sorted(set(lengths))),
        tuple(dict.fromkeys(given.shapes[: 1 if given.quick else None])),
        tuple(dict.fromkeys(given.backends)),
        tuple(dict.fromkeys(given.dtypes)),
        min(given.rounds, 10) if given.quick else given.rounds,
        not given.no_flex,
        given.json,
        given.plot,
    )


def _shape(text: str) -> Shape:
    try:
        H, Hk, D = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"a shape is HxHkxD, as 32x8x128; got {text!r}") from None
    if min(H, Hk, D) < 1 or H % Hk:
        raise argparse.ArgumentTypeError(f"H must be a multiple of Hk, and all above 0; got {text!r}")
    return H, Hk, D


def _finish(asked: Options, record: GpuRecord) -> None:
    print(table(record.rows))
    for failure in record.failures:
        print(f"failed: {failure}", file=sys.stderr)
    if asked.json is not None:
        record.write(asked.json)
    if asked.plot is not None:
        plot(record, asked.plot)


__all__ = ["GpuRow", "Options", "bench", "main", "options"]

if __name__ == "__main__":
    raise SystemExit(main())
