"""Backend ``kmeans`` as sets of keys per row, in numpy fp64."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.kernels.kernel_oracle import _splitmix, softmax_attention
from tests.kernels.oracles import Expected
from tests.kernels.oracles.lsh import finite, keep, stream

DEFAULTS = {
    "num_clusters": 64,
    "num_probes": 2,
    "cluster_size": 128,
    "window": 64,
    "sinks": 4,
    "train_keys": 512,
    "iterations": 8,
}


def expected(
    params: dict[str, Any],
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    start: int,
    causal: bool,
    scale: float,
    layer: int,
    seed: int,
    learned: Any = None,
) -> Expected:
    p = DEFAULTS | params
    (B, H, N, _), Hk = q.shape, k.shape[1]
    kept = np.zeros((B, H, N, k.shape[2]), bool)
    for b in range(B):
        for h in range(Hk):
            group = slice(h * (H // Hk), (h + 1) * (H // Hk))
            keys = finite(k[b, h, : start + N] if causal else k[b, h])
            means = fitted(p, keys[: p["train_keys"]] if causal else spread(keys), stream(seed, layer, 4, h))
            distance = (means**2).sum(-1) - 2 * keys @ means.T
            of_keys = distance.argmin(-1)
            liking = finite(q[b, group]) @ means.T * (-1.0 if scale < 0 else 1.0)
            best = np.argsort(-liking, axis=-1, kind="stable")[..., : p["num_probes"]]
            rounds = [(of_keys, best[..., r]) for r in range(best.shape[-1])]
            exact_rows = p["train_keys"] if causal else 0
            kept[b, group, :, : len(keys)] = keep(p, rounds, N, start, causal, exact_rows=exact_rows)
    out, lse = softmax_attention(q, k, v, kept, scale)
    return Expected(out, lse, kept)


def spread(keys: np.ndarray) -> np.ndarray:
    taken = min(len(keys), 4096)
    return keys[[t * len(keys) // taken for t in range(taken)]]


def fitted(p: dict[str, Any], keys: np.ndarray, state: int) -> np.ndarray:
    words = [_splitmix(state, t) for t in range(len(keys))]
    signed = np.array([w - (1 << 64) if w >> 63 else w for w in words])
    means = keys[np.argsort(signed, kind="stable")[: p["num_clusters"]]]
    for _ in range(p["iterations"]):
        nearest = ((means**2).sum(-1) - 2 * keys @ means.T).argmin(-1)
        means = np.stack(
            [keys[nearest == c].mean(0) if (nearest == c).any() else mean for c, mean in enumerate(means)]
        )
    return means
