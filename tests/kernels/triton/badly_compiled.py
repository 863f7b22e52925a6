"""Kernels that break the compile report's limits on purpose."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from kernels._triton.launch import Launch, Work
from kernels._triton.targets import Target


@triton.jit
def _softmax_of_one_warp(x, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    values = tl.load(x + at)
    weights = tl.exp2(values - tl.max(values, 1)[:, None])
    tl.store(out + at, weights / tl.sum(weights, 1)[:, None])


def examples(target: Target, dtype: torch.dtype, head_dim: int) -> Iterator[Launch]:
    """128 x 64 numbers are more than 32 threads have registers for, 32 x 32 are not. The first is said to
    multiply matrices, and does not."""
    for rows, columns, multiplies in ((128, 64, True), (32, 32, False)):
        x = torch.empty(rows, columns, device="meta", dtype=dtype)
        yield Launch(
            "softmax_of_one_warp",
            _softmax_of_one_warp,
            (1,),
            {"x": x, "out": x},
            {"ROWS": rows, "COLUMNS": columns},
            num_warps=1,
            multiplies=multiplies,
            work=Work(0.0, rows * columns, 2 * x.nbytes) if multiplies else None,
            notes={"rows": rows},
        )
