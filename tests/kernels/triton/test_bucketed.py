"""Buckets by kernels: rows and keys sorted, cut into tiles and attended to on the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels import attend
from kernels.contract import Call
from kernels.math.bucket_reference import kept_pairs
from kernels.math.buckets import Codes, Reach
from kernels.math.kept import KeptStates
from tests.kernels.triton.agree import DEVICE, agree, operands, poisoned

LSH: dict[str, Any] = {
    "num_hash_rounds": 2,
    "num_buckets": 4,
    "cluster_size": 16,
    "window": 3,
    "sinks": 2,
    "centre_keys": 5,
}
KMEANS: dict[str, Any] = {
    "num_clusters": 5,
    "num_probes": 2,
    "cluster_size": 16,
    "window": 3,
    "sinks": 2,
    "train_keys": 16,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_lsh_of_a_chunk_equals_torch_in_out_lse_and_counts(dtype: torch.dtype) -> None:
    agree(*operands(21, 50, H=3, Hk=1, D=24, Dv=20, dtype=dtype), backend="lsh", params=LSH)


def test_lsh_of_a_batch_in_both_directions_equals_torch() -> None:
    agree(*operands(17, 30, B=2, Hk=2, D=16), backend="lsh", params=LSH, causal=False)


def test_smyrf_clusters_are_seen_whole() -> None:
    params = LSH | {"variant": "smyrf"}
    agree(*operands(35, 35, D=16), backend="lsh", params=params, causal=False, scale=-0.3)


@pytest.mark.parametrize("causal", [True, False])
def test_kmeans_looks_into_several_clusters_of_one_table(causal: bool) -> None:
    agree(*operands(25, 45, D=16), backend="kmeans", params=KMEANS, causal=causal)


@pytest.mark.parametrize("backend", ["lsh", "kmeans"])
def test_a_single_row_finds_the_same_keys(backend: str) -> None:
    params = {"lsh": LSH, "kmeans": KMEANS}[backend]
    agree(*operands(1, 90, H=4, Hk=2, B=2), backend=backend, params=params)


def test_rows_that_buckets_add_nothing_to_are_left_as_they_are() -> None:
    agree(*operands(5, 5), backend="lsh", params=LSH | {"window": 8})


def test_a_value_that_is_not_a_number_reaches_the_rows_that_keep_its_key_alone() -> None:
    q, k, v = operands(40, 40, D=16)
    v[0, 0, 20, 3] = float("nan")
    params: Any = LSH | {"sinks": 0}
    with poisoned():
        found = attend(q, k, v, backend="lsh", params=params, causal=True, scale=0.25, impl="triton")
        told = attend(q, k, v, backend="lsh", params=params, causal=True, scale=0.25, impl="reference")
    assert torch.equal(found.out.isnan().any(-1), told.out.isnan().any(-1))
    by_buckets = [*range(20), *range(23, 40)]  # the window of others has the key
    broken = told.out[:, :, by_buckets].isnan()
    assert broken[..., 3].any() and not broken[..., 3].all() and not broken[..., :3].any()
    torch.testing.assert_close(
        found.out[:, :, by_buckets], told.out[:, :, by_buckets], equal_nan=True, atol=2e-5, rtol=2e-5
    )


def test_large_logits_stay_finite() -> None:
    q, k, v = operands(30, 30, D=16)
    agree(30 * q, 30 * k, v, backend="lsh", params=LSH, scale=1.0, tolerance=2e-3)


def test_two_runs_have_the_same_bits() -> None:
    q, k, v = operands(30, 50, D=16)
    one, other = (
        attend(q, k, v, backend="lsh", params=LSH, causal=True, scale=0.25, impl="triton") for _ in range(2)
    )
    assert torch.equal(one.out, other.out)


def test_tiles_hold_every_row_that_looks_somewhere_once_and_span_few_places() -> None:
    from kernels._triton.bucketed_plan import RUN_OF_CLUSTERS, Shape, plan_rounds

    generator = torch.Generator().manual_seed(3)
    for causal, N, M in ((True, 50, 90), (False, 77, 77), (True, 130, 130)):
        keys = (torch.rand(2, 2, M, generator=generator) ** 3 * 6).to(DEVICE, torch.int16)
        rows = (torch.rand(2, 3, 2, N, generator=generator) ** 3 * 6).to(DEVICE, torch.int16)
        shape = Shape(2, 3, N, M, 2, M - N if causal else 0)
        reach = Reach(16, 3, 2)
        plan = plan_rounds([Codes(keys, rows, (0, 1), 6)], shape, reach, causal, tile_rows=8)
        for x in range(2):
            for r in range(2):
                cuts = plan.tiles[x, r].tolist()
                lo, hi = plan.lo[x, r], plan.hi[x, r]
                assert cuts[0] == 0 and cuts[-1] == int((hi > lo).sum())
                assert sorted(plan.perm[x, r].tolist()) == list(range(3 * N))
                for a, b in zip(cuts, cuts[1:], strict=False):
                    some = plan.perm[x, r, a:b].long()
                    assert 0 <= b - a <= 8
                    if len(some):
                        assert int(hi[some].max() - lo[some].min()) <= (RUN_OF_CLUSTERS + 1) * 16


def test_places_of_a_row_are_the_keys_that_the_definition_keeps() -> None:
    from kernels._triton.bucketed_plan import Shape, plan_rounds

    generator = torch.Generator().manual_seed(4)
    N, M = 20, 60
    for causal in (True, False):
        start = M - N if causal else 7
        keys = (torch.rand(1, 1, M, generator=generator) * 3).to(torch.int16)
        rows = (torch.rand(1, 1, 1, N, generator=generator) * 3).to(torch.int16)
        codes, reach = Codes(keys, rows, (0,), 3), Reach(16, 2, 1)
        call = Call(causal, 1.0, 0, 0, start)
        on_device = Codes(keys.to(DEVICE), rows.to(DEVICE), (0,), 3)
        plan = plan_rounds([on_device], Shape(1, 1, N, M, 1, start), reach, causal, tile_rows=8)
        told = kept_pairs(codes, reach, call)[0]
        for n in range(N):
            places = slice(int(plan.lo[0, 0, n]), int(plan.hi[0, 0, n]))
            found = set(plan.order[0, 0, places].tolist())
            near = {j for j in range(M) if abs(start + n - j) <= (1 if causal else 2)} | {0}
            assert found - near == set(told[n].nonzero().flatten().tolist()) - near


def test_codes_kept_beside_the_cache_change_nothing() -> None:
    from kernels.api import attend_packed
    from kernels.contract import Segment

    q, k, v = operands(41, 41, D=16)
    kept, outs = KeptStates(), []
    for a, b in ((0, 40), (40, 41)):
        segment = Segment(slice(0, b - a), k[:, :, :b], v[:, :, :b], a, kept=kept)
        result = attend_packed(
            q[:, :, a:b], [segment], backend="lsh", params=LSH, causal=True, scale=0.25, impl="triton"
        )
        outs.append(result.out)
    whole = attend(q, k, v, backend="lsh", params=LSH, causal=True, scale=0.25, impl="torch")
    torch.testing.assert_close(torch.cat(outs, 2), whole.out, atol=2e-5, rtol=2e-5)
