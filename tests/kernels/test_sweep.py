"""Random parameters, shapes and places against the dense oracle: what no list of cases thinks of."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from kernels import attend, backend_names
from tests.kernels.kernel_cases import make_inputs, scale_of
from tests.kernels.kernel_oracle import kept_pairs, softmax_attention


def draw_params(backend: str, rng: random.Random) -> dict[str, Any]:
    width = rng.choice([1, 2, 3, 8, 31, 64, 65, 127, 200, 1000])
    few = rng.choice([0, 1, 5, 63, 64, 65, 300])
    combine = rng.choice(["union", "multihead", "sequential"])
    L = rng.choice([1, 32, 64, 128])
    block = rng.choice([32, 64, 128])
    blocks = {"query_tile": rng.choice([128, 256]), "block_size": block}
    budget = {"budget": block * rng.randint(1, 3)}
    much = budget if rng.random() < 0.5 else {"mass": rng.choice([0.3, 0.8, 0.95])}
    drawn = {"num_random": rng.randint(1, 40) if L == 1 else L * rng.randint(1, 4), "block_size": L}
    return {
        "exact": {},
        "window": {"window": width, "global_tokens": few},
        "sinks": {"window": width, "sinks": few},
        "strided": {"stride": max(2, width), "combine": combine},
        "fixed": {"stride": max(2, width), "combine": combine},
        "star": {"window": width},
        "random": drawn,
        "bigbird": {"window": width, "global_tokens": few, **drawn},
        "xattention": {**blocks, **much, "stride": rng.choice([4, 8, 16, 32])},
        "pooled": {**blocks, **much, "pool_rows": rng.choice([32, 64, 128])},
        "topk": {**blocks, **much},
        "pages": {**blocks, **budget},
        "vertical_slash": {
            "num_verticals": rng.randint(1, 90),
            "num_slashes": rng.randint(1, 3),
            "query_tile": 256,
        },
    }[backend]


@pytest.mark.parametrize("backend", backend_names())
def test_any_params_at_any_place_equal_the_dense_oracle(backend: str) -> None:
    rng = random.Random(f"sweep {backend}")
    for trial in range(24):
        params, causal = draw_params(backend, rng), rng.random() < 0.5
        M = rng.choice([1, 2, 40, 129, 256, 331, 645])
        N = rng.choice([1, M, rng.randint(1, M)])
        start = rng.randint(0, M - N)
        heads, D = rng.choice([(1, 1), (3, 3), (4, 2), (5, 1), (6, 2)]), rng.choice([4, 20, 32])
        where: dict[str, Any] = {"layer": rng.randint(0, 3), "seed": rng.randint(0, 2**63 - 1)}
        q, k, v = make_inputs(rng.choice([1, 2]), heads, N, M, D, seed=trial)
        told = f"{params} causal={causal} N={N} M={M} start={start} heads={heads} {where}"
        got = attend(
            q, k, v, backend=backend, params=params, causal=causal, scale=scale_of(q), start=start, **where
        )
        wide = (q.double().numpy(), k.double().numpy())
        mask = kept_pairs(backend, params, *wide, start=start, causal=causal, scale=scale_of(q), **where)
        out, _ = softmax_attention(q.numpy(), k.numpy(), v.numpy(), mask, scale_of(q))
        np.testing.assert_allclose(got.out.numpy(), out, atol=2e-5, err_msg=told)
        assert got.stats.pairs_kept == int(mask.sum()), told
