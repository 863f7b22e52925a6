"""Random parameters, shapes and places against the dense oracle: what no list of cases thinks of."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from kernels import backend_names
from tests.kernels.kernel_cases import answer, attend, make_inputs, scale_of, serves


def draw_params(backend: str, rng: random.Random) -> dict[str, Any]:
    width = rng.choice([1, 2, 3, 8, 31, 64, 65, 127, 200, 1000])
    few = rng.choice([0, 1, 5, 63, 64, 65, 300])
    combine = rng.choice(["union", "multihead", "sequential"])
    L = rng.choice([1, 32, 64, 128])
    block = rng.choice([32, 64, 128])
    blocks = {"query_tile": rng.choice([128, 256]), "block_size": block}
    budget = {"budget": block * rng.randint(1, 3)}
    much = budget if rng.random() < 0.5 else {"mass": rng.choice([0.3, 0.8, 0.95])}
    centre_keys = rng.choice([0, 1, 5, 64, 100])
    hyperbolic, num_features = rng.random() < 0.5, rng.choice([2, 5, 32, 90])
    features = {
        "num_features": 2 * num_features if hyperbolic else num_features,
        "features": "hyperbolic" if hyperbolic else "positive",
        "projection": rng.choice(["orthogonal", "iid"]),
        "centre_keys": centre_keys,
    }
    num_clusters = rng.choice([1, 2, 7, 40])
    near = {"window": width, "sinks": few, "cluster_size": 16 * rng.choice([1, 2, 5, 20])}
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
        "performer": features,
        "nystrom": {
            "num_landmarks": rng.choice([1, 2, 7, 40, 128, 300]),
            "pinv": rng.choice(["iterative", "exact"]),
            "num_iterations": rng.randint(1, 12),
        },
        "lsh": {
            **near,
            "variant": rng.choice(["reformer", "reformer", "smyrf"]),
            "num_hash_rounds": rng.randint(1, 4),
            "num_buckets": rng.choice([1, 2, 6, 16, 200]),
            "centre_keys": centre_keys,
        },
        "kmeans": {
            **near,
            "num_clusters": num_clusters,
            "num_probes": rng.randint(1, min(4, num_clusters)),
            "train_keys": rng.choice([40, 100, 512]),
            "iterations": rng.choice([1, 3, 8]),
        },
        "scatterbrain": features,
        "sbm": {
            "sampler": rng.choice(["poisson", "bernoulli"]),
            "exploration": rng.choice([0.0, 0.01, 0.3, 1.0]),
        },
    }[backend]


def draw_case(backend: str, rng: random.Random) -> dict[str, Any]:
    """Params that may hold those of another backend."""
    params = draw_params(backend, rng)
    if backend != "scatterbrain":
        return params
    support = rng.choice(SUPPORTS)
    inner = draw_params("sinks" if support == "local" else support, rng)
    return {**params, "support": support, "support_params": inner}


FIXED = ("local", "window", "star", "strided", "fixed", "random", "bigbird")
SUPPORTS = (*FIXED, "xattention", "pooled", "topk", "pages", "lsh", "kmeans")


@pytest.mark.parametrize("backend", backend_names())
def test_any_params_at_any_place_equal_the_dense_oracle(backend: str) -> None:
    rng = random.Random(f"sweep {backend}")
    for trial in range(24):
        params = draw_case(backend, rng)
        causal = rng.choice([way for way in (True, False) if serves((backend, params), way)])
        M = rng.choice([1, 2, 40, 129, 256, 331, 645])
        N = rng.choice([1, M, rng.randint(1, M)])
        heads, D = rng.choice([(1, 1), (3, 3), (4, 2), (5, 1), (6, 2)]), rng.choice([4, 20, 32])
        where: dict[str, Any] = {"layer": rng.randint(0, 3), "seed": rng.randint(0, 2**63 - 1)}
        where |= {"start": rng.randint(0, M - N), "causal": causal}
        q, k, v = make_inputs(rng.choice([1, 2]), heads, N, M, D, seed=trial)
        told = f"{params} N={N} M={M} heads={heads} {where}"
        got = attend(q, k, v, backend=backend, params=params, scale=scale_of(q), **where)
        want = answer((backend, params), q, k, v, **where)
        np.testing.assert_allclose(got.out.numpy(), want.out, atol=2e-5, err_msg=told)
        assert got.stats.pairs_kept == want.pairs_kept, told
