"""Edges of a stochastic block model drawn by kernels: the same edges as impl torch's, and their softmax."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels import attend, attend_packed
from kernels.contract import Segment
from kernels.math.kept import KeptStates
from kernels.math.sbm import ClusterParams, random_clusters
from tests.kernels.triton.agree import DEVICE, agree, operands

samplers = pytest.mark.parametrize("sampler", ["poisson", "bernoulli"])


def clusters(num_heads: int, density: float | None = None, head_dim: int = 32) -> ClusterParams:
    made = random_clusters(num_heads, head_dim, 5, seed=3, density=density)
    return ClusterParams(*(x.to(DEVICE) for x in (made.clusters, made.w1, made.b1, made.w2, made.b2)))


def adjacency(q: Tensor, k: Tensor, impl: str, causal: bool, learned: ClusterParams, sampler: str) -> Tensor:
    told = torch.eye(k.shape[2], device=k.device).expand(*k.shape[:2], -1, -1).contiguous()
    params = {"sampler": sampler, "exploration": 0.05}
    return attend(
        q, k, told, backend="sbm", params=params, learned=learned, causal=causal, scale=0.0, impl=impl
    ).out


@samplers
@pytest.mark.parametrize(("N", "M", "causal"), [(20, 100, True), (1, 100, True), (33, 33, False)])
def test_every_edge_is_drawn_that_impl_torch_draws(sampler: str, N: int, M: int, causal: bool) -> None:
    q, k, _ = operands(N, M)
    found, told = (adjacency(q, k, impl, causal, clusters(2), sampler) for impl in ("triton", "torch"))
    assert torch.equal(found > 0, told > 0)
    assert bool((found > 0).any(-1).any())


@samplers
def test_rows_that_drew_much_and_rows_that_drew_little_agree(sampler: str) -> None:
    """Tiles of the first kind run in blocks, those of the second as lists; both in one call."""
    q, k, v = operands(70, 150, H=1)
    learned = clusters(1, density=0.05)
    found = agree(q, k, v, backend="sbm", params={"sampler": sampler}, learned=learned)
    assert 0 < found.stats.pairs_dense < found.stats.pairs_computed


def test_groups_batches_and_half_precision_agree() -> None:
    q, k, v = operands(33, 33, B=2, H=4, Hk=2, dtype=torch.float16)
    agree(q, k, v, backend="sbm", learned=clusters(4), causal=False)


def test_rows_in_stretches_equal_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels._triton.edges_sbm.BITS_AT_ONCE", 1)
    agree(*operands(50, 60, H=1), backend="sbm", learned=clusters(1, density=0.05))


def test_a_decode_step_of_kept_sums_equals_a_call_of_its_own() -> None:
    q, k, v = operands(1, 70, H=4, Hk=2)
    learned, kept = clusters(4), KeptStates()
    alone = agree(q, k, v, backend="sbm", learned=learned)
    for impl in ("torch", "triton"):
        segment = Segment(slice(0, 1), k, v, 69, kept=kept)
        found = attend_packed(
            q, [segment], backend="sbm", learned=learned, causal=True, scale=q.shape[-1] ** -0.5, impl=impl
        )
        torch.testing.assert_close(found.out, alone.out, atol=2e-5, rtol=2e-5)


def test_a_row_that_draws_nothing_gives_zero() -> None:
    q, k, v = operands(5, 20, H=1)
    learned = clusters(1)
    nothing = ClusterParams(
        learned.clusters, learned.w1, learned.b1, learned.w2, learned.b2, torch.zeros(1, 5, 5, device=DEVICE)
    )
    found = agree(q, k, v, backend="sbm", learned=nothing)
    assert found.lse is not None and bool((found.lse == -math.inf).all()) and not bool(found.out.any())
