"""Sparse plus low rank in numpy fp64: every pair weighs its exact exponential where the support keeps it,
else its estimate; one softmax over both. The support is another backend's oracle, the features are
performer's."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.kernels import oracles
from tests.kernels.oracles import Expected
from tests.kernels.oracles.performer import directions, exponents, key_centre

SELECTING = ("xattention", "pooled", "topk", "pages")
DEFAULT_TILE = 256


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
    drawn = {"num_features": 64, **params}
    kept = support(params, q, k, v, start=start, causal=causal, scale=scale, layer=layer, seed=seed)
    (B, H, N, D), (_, Hk, M, _) = q.shape, k.shape
    seen = np.arange(M) <= start + np.arange(N)[:, None] if causal else np.ones((N, M), dtype=bool)
    out = np.zeros((B, H, N, v.shape[-1]))
    for b in range(B):
        for h in range(H):
            g = h // (H // Hk)
            centre = key_centre(params, k[b, g], causal)
            weights = directions(drawn, seed, layer, g, D)
            of_keys = exponents(weights, k[b, g] - centre, scale, key=True)
            of_queries = exponents(weights, q[b, h], scale, key=False)
            logs = np.where(
                kept[b, h],
                scale * (q[b, h] @ k[b, g].T),
                _log_of_products(of_queries, of_keys) + scale * (q[b, h] @ centre)[:, None],
            )
            logs = np.where(seen, logs, -np.inf)
            share = np.exp(logs - logs.max(-1, keepdims=True))
            out[b, h] = share @ v[b, g] / share.sum(-1, keepdims=True)
    return Expected(out, None, kept)


def support(
    params: dict[str, Any],
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    start: int,
    causal: bool,
    **where: Any,
) -> np.ndarray:
    """[B, H, N, M]: the pairs that are exact."""
    name, own = params.get("support", "local"), dict(params.get("support_params", {}))
    if name == "local":
        name, own = "sinks", {"window": 256, "sinks": 4, **own}
    kept = oracles.expected(name, own, q, k, v, start=start, causal=causal, **where).kept
    assert kept is not None
    if not causal:
        return kept
    i = start + np.arange(q.shape[2])
    begin = i // own.get("query_tile", DEFAULT_TILE) * own.get("query_tile", DEFAULT_TILE)
    exact = (begin if name in SELECTING else i) < params.get("centre_keys", 0)
    visible = np.arange(k.shape[2]) <= i[:, None]
    return (kept | exact[:, None]) & visible


def _log_of_products(rows: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """log sum_r e^(rows_ir + keys_jr), [N, M]."""
    found = np.empty((len(rows), len(keys)))
    for i, row in enumerate(rows):
        sums = row + keys
        top = sums.max(-1)
        found[i] = top + np.log(np.exp(sums - top[:, None]).sum(-1))
    return found
