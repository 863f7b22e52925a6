"""Impl ``triton`` held against impl ``torch``: the same answer within rounding, the same account of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kernels import attend
from kernels.contract import AttentionResult

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that is allocated and not written holds NaN (integers: their largest value)."""
    filled = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), filled.fill_uninitialized_memory
    _deterministic(True)
    filled.fill_uninitialized_memory = True
    try:
        yield
    finally:
        _deterministic(before[0])
        filled.fill_uninitialized_memory = before[1]


def _deterministic(on: bool) -> None:
    """Torch's public switch imports its compiler first, which takes seconds in every process."""
    torch._C._set_deterministic_algorithms(on, warn_only=on)


def operands(
    N: int,
    M: int,
    *,
    B: int = 1,
    H: int = 2,
    Hk: int = 1,
    D: int = 32,
    Dv: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q [B, H, N, D], k [B, Hk, M, D], v [B, Hk, M, Dv]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, H, N, D), (B, Hk, M, D), (B, Hk, M, D if Dv is None else Dv)
    q, k, v = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes)
    return q, k, v


def agree(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    backend: str,
    params: dict[str, Any] | None = None,
    causal: bool = True,
    tolerance: float | None = None,
    **options: Any,
) -> AttentionResult:
    """``attend`` by triton; out, lse, dropped and the counts of pairs held against torch's in fp32 of the
    same numbers. Memory is poisoned meanwhile."""
    scale = options.pop("scale", q.shape[-1] ** -0.5)
    with poisoned():
        found = attend(
            q, k, v, backend=backend, params=params, causal=causal, scale=scale, impl="triton", **options
        )
        told = attend(
            q.float(),
            k.float(),
            v.float(),
            backend=backend,
            params=params,
            causal=causal,
            scale=scale,
            impl="torch",
            **options,
        )
    close = TOLERANCE[q.dtype] if tolerance is None else tolerance
    assert found.stats.impl == "triton" and found.out.dtype == q.dtype
    torch.testing.assert_close(found.out.float(), told.out, atol=close, rtol=close)
    assert (found.lse is None) == (told.lse is None) and (found.dropped is None) == (told.dropped is None)
    if found.lse is not None and told.lse is not None:
        torch.testing.assert_close(found.lse, told.lse, atol=close, rtol=close)
    if found.dropped is not None and told.dropped is not None:
        torch.testing.assert_close(found.dropped, told.dropped, atol=close, rtol=close)
    assert found.stats.pairs_kept == told.stats.pairs_kept
    assert found.stats.pairs_exact == told.stats.pairs_exact
    assert found.stats.kept_per_head == told.stats.kept_per_head
    return found
