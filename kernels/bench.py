"""Times every backend against dense SDPA and compiled FlexAttention on the same pattern, in turns in one run.

    python -m kernels.bench --lengths 4096 16384 --shapes 12x12x64 9x3x64 --json bench.json

A shape is HxHkxD. Rounds alternate between all contenders, the median of each is reported: on a shared
machine only ratios within one run mean anything. Work is counted as 4 D FLOP per score element computed,
masked ones included. The error is against softmax under the dense mask (impl ``reference``), on sampled rows.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import bench_flex
from kernels.api import attend, backend_names, describe
from kernels.contract import AttentionResult

_ERROR_ROWS = 8


@dataclass(frozen=True)
class Case:
    """One pattern at one shape: H query heads over Hk key heads of width D, N positions."""

    backend: str
    params: dict[str, Any]
    H: int
    Hk: int
    D: int
    N: int
    causal: bool

    @property
    def scale(self) -> float:
        return 1.0 / math.sqrt(self.D)


@dataclass
class Row:
    """One line of the table. Ratios are dense or FlexAttention time over ours: above 1 we are faster."""

    backend: str
    params: str
    shape: str
    length: int
    causal: bool
    time_ms: float
    selection_ms: float
    gflops: float
    share_of_sgemm: float
    dense_ms: float
    dense_gflops: float
    ratio_to_dense: float
    flex_ms: float | None
    ratio_to_flex: float | None
    flex_note: str
    density: float
    density_computed: float
    max_abs_error: float


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    sgemm = sgemm_gflops()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, sgemm {sgemm:.0f} GFLOP/s\n")
    print(_HEADER)
    rows: list[Row] = []
    for cases in _groups(args):
        for row in run_group(cases, args.repeat, not args.no_flex, sgemm):
            rows.append(row)
            print(_line(row), flush=True)
    if args.json:
        _write(args, rows, sgemm)
    return 0


def run_group(cases: list[Case], repeat: int, flex: bool, sgemm: float) -> Iterable[Row]:
    """Cases of one shape, length and direction, timed in turns with dense SDPA and FlexAttention."""
    q, k, v = _tensors(cases[0])
    contenders: dict[str, Callable[[], Any]] = {"dense": lambda: _dense(cases[0], q, k, v)}
    first: dict[int, AttentionResult] = {}
    notes: dict[int, str] = {}
    for number, case in enumerate(cases):
        first[number] = _ours(case, q, k, v)
        contenders[f"ours {number}"] = lambda case=case: _ours(case, q, k, v)  # type: ignore[misc]
        notes[number] = "not asked for"
        if flex:
            runner = bench_flex.runner(case, q, k, v)
            if callable(runner):
                contenders[f"flex {number}"] = runner
            notes[number] = "" if callable(runner) else runner
    times = _interleaved(contenders, repeat)
    for number, case in enumerate(cases):
        error = _max_error(case, q, k, v, first[number].out)
        yield _row(case, first[number], times, number, notes[number], error, sgemm)


def sgemm_gflops(size: int = 2048) -> float:
    """Best rate of a square fp32 matrix product on this machine, now."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = min(_timed(lambda: a @ b) for _ in range(6))
    return 2 * size**3 / best / 1e6


def _interleaved(contenders: dict[str, Callable[[], Any]], repeat: int) -> dict[str, float]:
    """Median milliseconds of each, after one unmeasured call."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    for _ in range(repeat):
        for name, run in contenders.items():
            times[name].append(_timed(run))
    return {name: statistics.median(values) for name, values in times.items()}


def _timed(run: Callable[[], Any]) -> float:
    began = perf_counter()
    run()
    return (perf_counter() - began) * 1e3


def _tensors(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, case.H, case.N, case.D, generator=generator)
    k = torch.randn(1, case.Hk, case.N, case.D, generator=generator)
    v = torch.randn(1, case.Hk, case.N, case.D, generator=generator)
    return q, k, v


def _dense(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=case.causal, scale=case.scale, enable_gqa=case.Hk != case.H
    )


def _ours(case: Case, q: Tensor, k: Tensor, v: Tensor) -> AttentionResult:
    return attend(
        q, k, v, backend=case.backend, params=case.params, causal=case.causal, scale=case.scale, impl="torch"
    )


def _max_error(case: Case, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> float:
    """Largest difference from softmax under the dense mask over rows spread across the sequence."""
    worst = 0.0
    for i in torch.linspace(0, case.N - 1, _ERROR_ROWS).long().tolist():
        row = attend(
            q[:, :, i : i + 1],
            k,
            v,
            backend=case.backend,
            params=case.params,
            causal=case.causal,
            scale=case.scale,
            start=i,
            impl="reference",
        )
        worst = max(worst, float((row.out - out[:, :, i : i + 1]).abs().max()))
    return worst


def _row(
    case: Case,
    first: AttentionResult,
    times: dict[str, float],
    number: int,
    note: str,
    error: float,
    sgemm: float,
) -> Row:
    time_ms, dense_ms, flex_ms = times[f"ours {number}"], times["dense"], times.get(f"flex {number}")
    gflops = 4 * case.D * first.stats.pairs_computed / time_ms / 1e6
    return Row(
        backend=case.backend,
        params=", ".join(f"{name}={value}" for name, value in case.params.items()) or "default",
        shape=f"{case.H}x{case.Hk}x{case.D}",
        length=case.N,
        causal=case.causal,
        time_ms=time_ms,
        selection_ms=first.stats.selection_ms,
        gflops=gflops,
        share_of_sgemm=gflops / sgemm,
        dense_ms=dense_ms,
        dense_gflops=4 * case.D * first.stats.pairs_exact / dense_ms / 1e6,
        ratio_to_dense=dense_ms / time_ms,
        flex_ms=flex_ms,
        ratio_to_flex=None if flex_ms is None else flex_ms / time_ms,
        flex_note=note,
        density=first.stats.density,
        density_computed=first.stats.density_computed,
        max_abs_error=error,
    )


_HEADER = (
    "| backend | params | shape | N | causal | time_ms | selection_ms | GFLOP/s | of sgemm | dense_ms "
    "| x dense | x Flex | density | computed | max error |\n|---|---|---|--:|---|" + "--:|" * 10
)


def _line(r: Row) -> str:
    flex = f"- ({r.flex_note})" if r.ratio_to_flex is None else f"{r.ratio_to_flex:.2f}"
    return (
        f"| {r.backend} | {r.params} | {r.shape} | {r.length} | {'yes' if r.causal else 'no'} "
        f"| {r.time_ms:.1f} | {r.selection_ms:.1f} | {r.gflops:.0f} | {r.share_of_sgemm:.2f} "
        f"| {r.dense_ms:.0f} "
        f"| {r.ratio_to_dense:.2f} | {flex} | {r.density:.4f} | {r.density_computed:.4f} "
        f"| {r.max_abs_error:.1e} |"
    )


def _groups(args: argparse.Namespace) -> Iterable[list[Case]]:
    for length in args.lengths:
        for H, Hk, D in args.shapes:
            for causal in (True, False):
                cases = [
                    Case(name, params, H, Hk, D, length, causal)
                    for name in args.backends
                    for params in args.params or [{}]
                    if _able(name, causal)
                ]
                if cases:
                    yield cases


def _able(backend: str, causal: bool) -> bool:
    able = describe(backend)["capabilities"]
    return bool(able["causal"] if causal else able["bidirectional"])


def _write(args: argparse.Namespace, rows: list[Row], sgemm: float) -> None:
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m kernels.bench", *sys.argv[1:]]),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "sgemm_gflops": sgemm,
        "rows": [asdict(row) for row in rows],
    }
    with open(args.json, "w", encoding="utf-8") as file:
        json.dump(record, file, indent=1)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    told = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=told)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384], metavar="N")
    shapes = [(12, 12, 64), (9, 3, 64)]
    parser.add_argument("--shapes", type=_shape, nargs="+", default=shapes, metavar="HxHkxD")
    parser.add_argument("--backends", nargs="+", default=list(backend_names()), choices=backend_names())
    parser.add_argument(
        "--params", type=json.loads, nargs="+", metavar="JSON", help="params to time; else the defaults"
    )
    parser.add_argument("--repeat", type=int, default=3, help="rounds; the median is reported")
    parser.add_argument(
        "--no-flex", action="store_true", help="without FlexAttention (it compiles for minutes)"
    )
    parser.add_argument("--json", metavar="FILE", help="write everything there as well")
    return parser.parse_args(argv)


def _shape(text: str) -> tuple[int, int, int]:
    try:
        H, Hk, D = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected HxHkxD such as 12x12x64, got {text!r}") from None
    return H, Hk, D


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"error: {error}")
