"""On a GPU: what a call takes beyond its inputs and its output grows with the length, never with its
square."""

from __future__ import annotations

import pytest
import torch

from kernels.contract import AttentionResult
from kernels.peak import peak_bytes
from kernels.registry import BACKENDS, load
from tests.kernels.kernel_cases import attend, make_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LENGTHS = (8192, 16384, 32768)
HEADS, WIDTH = (8, 2), 64
LINEAR = [name for name in BACKENDS if name not in ("nystrom", "topk", "sbm")]
"""``topk`` scores every block, ``sbm`` draws edges in proportion to N^2, ``nystrom`` has no causal form."""


@pytest.mark.parametrize("backend", LINEAR)
def test_memory_of_a_prefill_is_flat_per_token(backend: str) -> None:
    if "triton" not in load(backend).impls:
        pytest.skip(f"{backend} has no impl triton")
    taken = [_bytes(backend, N) for N in LENGTHS]
    for shorter, longer in zip(taken, taken[1:], strict=False):
        assert longer <= 2.3 * shorter + (8 << 20), f"{backend}: {taken} bytes at {LENGTHS}"


def _bytes(backend: str, N: int) -> int:
    q, k, v = (x.half().cuda() for x in make_inputs(1, HEADS, N, N, WIDTH))

    def run() -> AttentionResult:
        return attend(q, k, v, backend=backend, causal=True, scale=0.125, impl="triton")

    run()  # compiles, and fills the caches of plans
    found = peak_bytes(run, q.device, calls=2)
    assert found is not None
    return found
