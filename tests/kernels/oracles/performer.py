"""Random-feature attention in numpy fp64, row by row: every feature relative to its largest exponent among
the keys that the row sees."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tests.kernels.kernel_oracle import WORD, _splitmix
from tests.kernels.oracles import Expected

FEATURE_STREAM = 2
_GAMMA = 0x9E3779B97F4A7C15


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
    (B, H, N, D), (_, Hk, M, _) = q.shape, k.shape
    out, kept = np.zeros((B, H, N, v.shape[-1])), np.zeros((B, H, N, M), dtype=bool)
    for b in range(B):
        for g in range(Hk):
            centre = key_centre(params, k[b, g], causal)
            weights = directions(params, seed, layer, g, D)
            of_keys = exponents(weights, k[b, g] - centre, scale, key=True)
            heads = range(g * (H // Hk), (g + 1) * (H // Hk))
            of_queries = [exponents(weights, q[b, h], scale, key=False) for h in heads]
            for r in range(N):
                seen = start + r + 1 if causal else M
                if causal and start + r < params.get("centre_keys", 0):
                    for h in heads:
                        out[b, h, r] = _softmax(scale * (k[b, g, :seen] @ q[b, h, r])) @ v[b, g, :seen]
                        kept[b, h, r, :seen] = True
                    continue
                top = of_keys[:seen].max(0)
                relative = np.exp(of_keys[:seen] - top)
                state = relative.T @ np.c_[v[b, g, :seen], np.ones(seen)]
                for h, of_query in zip(heads, of_queries, strict=True):
                    total = _softmax(of_query[r] + top) @ state
                    out[b, h, r] = total[:-1] / total[-1]
    return Expected(out, None, kept)


def key_centre(params: dict[str, Any], k: np.ndarray, causal: bool) -> np.ndarray:
    """What every key [M, D] of a head loses."""
    count = params.get("centre_keys", 0)
    if count == 0:
        return np.zeros(k.shape[-1])
    return (k[:count] if causal else k).mean(0)


def exponents(weights: np.ndarray, x: np.ndarray, scale: float, *, key: bool) -> np.ndarray:
    """x [n, D] -> [n, F]: phi_r(x) = e^exponent, with 1 / F on the queries' side."""
    root = math.sqrt(abs(scale)) * (1 if key or scale >= 0 else -1)
    found: np.ndarray = root * x @ weights.T - abs(scale) / 2 * (x**2).sum(-1, keepdims=True)
    return found if key else found - math.log(len(weights))


def directions(params: dict[str, Any], seed: int, layer: int, head: int, dim: int) -> np.ndarray:
    """W [F, D] of a key head."""
    both_signs = params.get("features", "hyperbolic") == "hyperbolic"
    rows = params.get("num_features", 256) // (2 if both_signs else 1)
    stream = fold(seed, layer, FEATURE_STREAM, head)
    if params.get("projection", "orthogonal") == "iid":
        drawn = normals(stream, rows, dim)
    else:
        blocks = -(-rows // dim)
        gaussian = normals(fold(stream, 0), blocks * dim, dim).reshape(blocks, dim, dim)
        found = []
        for block in gaussian:
            ortho, upper = np.linalg.qr(block)
            found.append((ortho * np.sign(np.diag(upper))).T)
        lengths = np.sqrt((normals(fold(stream, 1), rows, dim) ** 2).sum(-1, keepdims=True))
        drawn = np.concatenate(found)[:rows] * lengths
    return np.concatenate([drawn, -drawn]) if both_signs else drawn


def fold(stream: int, *counters: int) -> int:
    for counter in counters:
        stream = _splitmix(stream, counter)
    return stream


def normals(stream: int, rows: int, columns: int) -> np.ndarray:
    """Box-Muller on outputs 2 t and 2 t + 1 of a SplitMix64 that starts at ``stream``."""
    state = np.arange(1, 2 * rows * columns + 1, dtype=np.uint64) * np.uint64(_GAMMA) + np.uint64(
        stream & WORD
    )
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    uniform = ((state ^ (state >> np.uint64(31))) >> np.uint64(11)).astype(np.float64)
    first, second = ((uniform + 0.5) / 2.0**53).reshape(-1, 2).T
    found: np.ndarray = np.sqrt(-2 * np.log(first)) * np.cos(2 * math.pi * second)
    return found.reshape(rows, columns)


def _softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    found: np.ndarray = weights / weights.sum()
    return found
