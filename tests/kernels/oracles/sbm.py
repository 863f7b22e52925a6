"""Edges of a stochastic block model, drawn key by key in numpy fp64 (arXiv 2210.15541, section 3).

For the Poisson law a row lays out its visible keys cluster by cluster on a line, key j of cluster v as an
interval of length r_v k^_jv; the points of a unit-rate process keep the keys that they fall upon. Points are
mapped to intervals relative to their cluster's own running sums, as documented: both sides round alike.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.kernels.kernel_oracle import WORD, _head_stream, softmax_attention
from tests.kernels.oracles import Expected

_POISSON, _BERNOULLI = 5, 6


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
    learned: Any,
) -> Expected:
    kept = edges(params, q, k, start=start, causal=causal, layer=layer, seed=seed, learned=learned)
    with np.errstate(invalid="ignore", divide="ignore"):
        out, lse = softmax_attention(q, k, v, kept, scale)
    empty = ~kept.any(-1)
    return Expected(np.where(empty[..., None], 0.0, out), np.where(empty, -np.inf, lse), kept)


def edges(
    params: dict[str, Any],
    q: np.ndarray,
    k: np.ndarray,
    *,
    start: int,
    causal: bool,
    layer: int,
    seed: int,
    learned: Any,
) -> np.ndarray:
    """bool [B, H, N, M]."""
    (B, H, N, _), (_, Hk, M, _) = q.shape, k.shape
    bernoulli = params.get("sampler", "poisson") == "bernoulli"
    kept = np.zeros((B, H, N, M), dtype=bool)
    for b in range(B):
        for h in range(H):
            rates, members = rates_and_members(params, q[b, h], k[b, h // (H // Hk)], learned, h)
            stream = _head_stream(seed, layer, _BERNOULLI if bernoulli else _POISSON, h) & WORD
            own = _splitmix(np.uint64(stream), np.arange(start, start + N, dtype=np.uint64))
            sums = np.ascontiguousarray(members.cumsum(0).T)
            for n in range(N):
                seen = start + n + 1 if causal else M
                if bernoulli:
                    drawn = _pairs(own[n], rates[n], members[:seen])
                else:
                    drawn = _points(own[n], rates[n], sums[:, :seen])
                kept[b, h, n, drawn] = True
    return kept


def probabilities(
    q: np.ndarray, k: np.ndarray, learned: Any, head: int, exploration: float = 0.0
) -> np.ndarray:
    """p [N, M] of one head, every pair."""
    rates, members = rates_and_members({"exploration": exploration}, q, k, learned, head)
    return rates @ members.T


def rates_and_members(
    params: dict[str, Any], q: np.ndarray, k: np.ndarray, learned: Any, head: int
) -> tuple[np.ndarray, np.ndarray]:
    """r [N, C] and k^ [M, C] (rounded to fp32, as they are kept)."""
    clusters = _array(learned.clusters)[head]
    if learned.affinity is None:
        products = clusters @ clusters.T
        affinity = np.exp(products - products.max())
        affinity /= affinity.sum()
    else:
        affinity = _array(learned.affinity)[head]
    rates = _memberships(q, clusters, learned) @ affinity
    members = _memberships(k, clusters, learned).astype(np.float32).astype(np.float64)
    exploration = params.get("exploration", 0.0)
    if exploration:
        rates = np.concatenate([rates, np.full((len(rates), 1), exploration)], 1)
        members = np.concatenate([members, np.ones((len(members), 1))], 1)
    return rates, members


def _memberships(x: np.ndarray, clusters: np.ndarray, learned: Any) -> np.ndarray:
    inner = np.maximum(x @ _array(learned.w1).T + _array(learned.b1), 0.0)
    logits = (inner @ _array(learned.w2).T + _array(learned.b2)) @ clusters.T
    with np.errstate(over="ignore"):
        return np.where(np.isnan(logits), 1.0, 1.0 / (1.0 + np.exp(-logits)))


def _array(x: Any) -> np.ndarray:
    wide: np.ndarray = x.double().numpy()
    return wide


def _points(stream: np.uint64, rates: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Keys of a row, some several times: sums [C, seen] are those of the keys that it may see."""
    upto = (rates * sums[:, -1]).cumsum()
    times, width = np.zeros(1), 8 + int(upto[-1] + 3 * np.sqrt(upto[-1]))
    while times[-1] < upto[-1]:
        waits = -np.log(_uniform(stream, np.arange(len(times) - 1, len(times) - 1 + width)))
        times = np.append(times, np.append(times[-1], waits).cumsum()[1:])
    times = times[1:][times[1:] < upto[-1]]
    clusters = np.searchsorted(upto, times, side="right")
    places = (times - np.append(0.0, upto)[clusters]) / rates[clusters]
    found = [
        np.searchsorted(sums[v], places[clusters == v], side="right") for v in np.unique(clusters).tolist()
    ]
    return np.minimum(np.concatenate([np.zeros(0, dtype=np.int64), *found]), sums.shape[1] - 1)


def _pairs(stream: np.uint64, rates: np.ndarray, members: np.ndarray) -> np.ndarray:
    return np.nonzero(_uniform(stream, np.arange(len(members))) < members @ rates)[0]


def _uniform(stream: np.uint64, counters: np.ndarray) -> np.ndarray:
    upper: np.ndarray = (_splitmix(stream, counters.astype(np.uint64)) >> np.uint64(11)).astype(np.float64)
    return (upper + 0.5) * 2.0**-53


def _splitmix(state: np.uint64, counters: np.ndarray) -> np.ndarray:
    """Outputs of a SplitMix64 that starts at ``state``."""
    with np.errstate(over="ignore"):
        z = state + (counters + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        out: np.ndarray = z ^ (z >> np.uint64(31))
    return out
