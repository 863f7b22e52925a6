"""One group of the GPU bench: the backends of one length, shape, dtype and direction, and their opponents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.api import attend
from kernels.benchmarks import flex
from kernels.benchmarks.cases import Case
from kernels.benchmarks.gpu_rows import GpuRecord, GpuRow
from kernels.benchmarks.gpu_timing import Timer
from kernels.benchmarks.inputs import Tensors, make_inputs
from kernels.contract import AttentionResult
from kernels.peak import peak_bytes

CHECKED_UP_TO = 4096
"""Up to this length impl ``torch`` computes the case too, in fp32, and the largest difference is told."""


@dataclass(frozen=True)
class Dense:
    """Opponents over every pair: names and calls."""

    names: tuple[str, ...]
    runs: tuple[Callable[[], Any], ...]


def run_case_group(
    cases: Sequence[Case],
    dtype: torch.dtype,
    dtype_name: str,
    timer: Timer,
    device: torch.device,
    with_flex: bool,
    record: GpuRecord,
) -> Iterator[GpuRow]:
    """A row for each case that runs, beside the opponents that run; what raises is noted among the record's
    failures."""
    if not cases:
        return
    x = _inputs(cases[0], dtype, device)
    dense = _that_run(_dense(cases[0], x), f"{cases[0]} {dtype_name}", record)
    for case in cases:
        try:
            yield _row(case, x, dense, dtype_name, timer, with_flex)
        except Exception as error:  # one backend that fails must not lose the others' figures
            record.failures.append(f"{case} {dtype_name}: {type(error).__name__}: {error}")


def _inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Tensors:
    x = make_inputs("structured", (case.H, case.Hk), case.N, case.D)
    q, k, v = (tensor.to(device, dtype) for tensor in (x.q, x.k, x.v))
    return Tensors(q, k, v)


def _row(case: Case, x: Tensors, dense: Dense, dtype: str, timer: Timer, with_flex: bool) -> GpuRow:
    run = _runner(case, x)
    result = run()
    flex_run = flex.runner(case, x) if with_flex and x.q.is_cuda else "left out"
    others: list[Callable[[], Any]] = [] if isinstance(flex_run, str) else [flex_run]
    own_ms, *rest = timer([run, *dense.runs, *others])
    opponents = dict(zip(dense.names, rest, strict=False))
    stats = result.stats
    return GpuRow(
        backend=case.backend,
        shape=case.shape,
        dtype=dtype,
        length=case.N,
        causal=case.causal,
        ms=own_ms,
        opponents_ms=opponents,
        flex_ms=rest[-1] if others else None,
        flex_reason=flex_run if isinstance(flex_run, str) else "",
        density=stats.density,
        density_computed=stats.density_computed,
        tflops=4e-9 * case.D * stats.pairs_computed / own_ms,
        peak_bytes=peak_bytes(run, x.q.device),
        difference=_difference(case, x, result),
    )


def _runner(case: Case, x: Tensors, impl: str = "triton") -> Callable[[], AttentionResult]:
    call, learned = case.call, case.learned
    params = case.parsed

    def run() -> AttentionResult:
        return attend(
            x.q,
            x.k,
            x.v,
            backend=case.backend,
            params=params,
            causal=call.causal,
            scale=call.scale,
            impl=impl,  # type: ignore[arg-type]
            learned=learned,
        )

    return run


def _difference(case: Case, x: Tensors, result: AttentionResult) -> float | None:
    """Largest absolute difference from impl torch in fp32 on the same numbers."""
    if case.N > CHECKED_UP_TO:
        return None
    wide = Tensors(x.q.float(), x.k.float(), x.v.float())
    told = _runner(replace(case, impl="torch"), wide, "torch")()
    return float((result.out.float() - told.out).abs().max())


def _dense(case: Case, x: Tensors) -> Dense:
    """torch's SDPA, and flash-attention where it is installed."""
    shared = case.Hk != case.H

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(
            x.q, x.k, x.v, is_causal=case.causal, scale=case.scale, enable_gqa=shared
        )

    names, runs = ["SDPA"], [sdpa]
    flash = _flash(case, x)
    if flash is not None:
        names.append("flash-attention")
        runs.append(flash)
    return Dense(tuple(names), tuple(runs))


def _that_run(dense: Dense, where: str, record: GpuRecord) -> Dense:
    """Without those that raise: dense attention of long rows may not fit the memory."""
    able = []
    for name, run in zip(dense.names, dense.runs, strict=True):
        try:
            run()
            able.append((name, run))
        except Exception as error:  # an opponent that fails must not lose our own figures
            record.failures.append(f"{name}, {where}: {type(error).__name__}: {error}")
    return Dense(tuple(name for name, _ in able), tuple(run for _, run in able))


def _flash(case: Case, x: Tensors) -> Callable[[], Tensor] | None:
    if find_spec("flash_attn") is None or x.q.dtype == torch.float32 or not x.q.is_cuda:
        return None
    from flash_attn import flash_attn_func  # type: ignore[import-not-found,unused-ignore]

    q, k, v = (tensor.transpose(1, 2).contiguous() for tensor in (x.q, x.k, x.v))
    return lambda: flash_attn_func(q, k, v, softmax_scale=case.scale, causal=case.causal)
