"""On a GPU: every backend's Triton kernels against its own definition in fp32, over the whole registry."""

from __future__ import annotations

import math

import pytest
import torch

from kernels.contract import Segment
from kernels.registry import load
from tests.kernels.kernel_cases import (
    Case,
    attend,
    attend_packed,
    every_decoding_case,
    every_served_case,
    make_inputs,
    query_tile,
    scale_of,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["fp32", "fp16", "bf16"])
PLACES = [(500, 500, 0), (63, 700, 637), (1, 300, 299), (1100, 1100, 0)]
"""(N, M, start)."""
SELECTING = 0.99
"""Share of the rows of a data-dependent choice that must agree: rounding may flip one between equals."""


@every_served_case
@DTYPES
def test_triton_equals_the_definition_in_fp32(case: Case, causal: bool, dtype: torch.dtype) -> None:
    backend, params = case
    if "triton" not in load(backend).impls:
        pytest.skip(f"{backend} has no impl triton")
    for number, (N, M, start) in enumerate(PLACES):
        if not causal and N != M:
            continue
        D = (64, 60, 128, 96)[number]
        heads = ((6, 2), (4, 4), (3, 1), (8, 2))[number]
        q, k, v = (x.to(dtype).cuda() for x in make_inputs(1, heads, N, M, D, seed=number))
        where = {"layer": number, "seed": number * 17, "start": start, "causal": causal}
        own = {"backend": backend, "params": params, "scale": scale_of(q), **where}
        found = attend(q, k, v, impl="triton", **own)
        told = attend(q.float(), k.float(), v.float(), impl="torch", **own)
        assert found.stats.impl == "triton" and torch.isfinite(found.out).all()
        _close(found.out.float(), told.out, TOLERANCE[dtype], load(backend).capabilities.selection)


@every_decoding_case
def test_decode_of_many_sequences_equals_one_call_each(case: Case) -> None:
    backend, params = case
    if "triton" not in load(backend).impls:
        pytest.skip(f"{backend} has no impl triton")
    lengths = [1, 64, 333, 1025]
    drawn = [make_inputs(1, (6, 2), 1, M, 64, seed=M) for M in lengths]
    rows = torch.cat([q for q, _, _ in drawn], 2).cuda()
    segments = [
        Segment(slice(n, n + 1), k.cuda(), v.cuda(), len_k - 1, seed=n)
        for n, ((_, k, v), len_k) in enumerate(zip(drawn, lengths, strict=True))
    ]
    own = {"backend": backend, "params": params, "causal": True, "scale": 0.125}
    together = attend_packed(rows, segments, impl="triton", **own)
    for n, segment in enumerate(segments):
        alone = attend(
            rows[:, :, n : n + 1], segment.k, segment.v, impl="torch", start=segment.start, seed=n, **own
        )
        _close(together.out[:, :, n : n + 1], alone.out, 1e-4, load(backend).capabilities.selection)
        assert together.stats[n].impl == "triton"


def _close(found: torch.Tensor, told: torch.Tensor, tolerance: float, selection: str) -> None:
    """Every row, or nearly every one where rows choose by scores that rounding can order otherwise."""
    apart = (found - told).abs().amax(-1) / told.abs().amax().clamp_min(1.0)
    needed = 1.0 if selection == "none" else SELECTING
    share = float((apart <= tolerance).float().mean())
    assert share >= needed, f"{share:.3f} of the rows agree, the worst is off by {float(apart.max()):.2e}"


@every_decoding_case
def test_a_key_that_a_row_may_not_see_is_not_felt(case: Case) -> None:
    backend, params = case
    if "triton" not in load(backend).impls or query_tile(case) > 1:
        pytest.skip("no impl triton, or its choice looks at whole tiles")
    q, k, v = (x.cuda() for x in make_inputs(1, (2, 1), 200, 200, 64))
    own = {"backend": backend, "params": params, "causal": True, "scale": 0.125, "impl": "triton"}
    before = attend(q, k, v, **own).out[:, :, :150]
    k[:, :, 150:], v[:, :, 150:] = math.nan, math.nan
    after = attend(q, k, v, **own).out[:, :, :150]
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
