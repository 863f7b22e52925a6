"""Backend ``lsh`` as sets of keys per row, in numpy fp64."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from tests.kernels.kernel_oracle import _splitmix, softmax_attention
from tests.kernels.oracles import Expected

DEFAULTS = {
    "variant": "reformer",
    "num_hash_rounds": 2,
    "num_buckets": 64,
    "cluster_size": 128,
    "window": 64,
    "sinks": 4,
    "centre_keys": 64,
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
            visible = k[b, h, : start + N] if causal else k[b, h]
            rounds = buckets_of(p, q[b, group], visible, h, causal, scale, layer, seed)
            exact_rows = p["centre_keys"] if causal else 0
            whole = p["variant"] == "smyrf"
            kept[b, group, :, : len(visible)] = keep(
                p, rounds, N, start, causal, exact_rows=exact_rows, whole=whole
            )
    out, lse = softmax_attention(q, k, v, kept, scale)
    return Expected(out, lse, kept)


def keep(
    p: dict[str, Any],
    rounds: list[tuple[np.ndarray, np.ndarray]],
    num_rows: int,
    start: int,
    causal: bool,
    *,
    exact_rows: int,
    whole: bool = False,
) -> np.ndarray:
    """Booleans [G, N, M] from every round's buckets of keys [M] and of rows [G, N]."""
    num_keys, group = len(rounds[0][0]), len(rounds[0][1])
    kept = np.zeros((group, num_rows, num_keys), bool)
    for g in range(group):
        for n in range(num_rows):
            i = start + n
            keys = set(range(p["sinks"]))
            keys |= set(range(i - p["window"] + 1, i + 1)) if causal else _around(i, p["window"])
            if i < exact_rows:
                keys |= set(range(i + 1))
            for of_keys, of_rows in rounds:
                members = [
                    j for j in np.flatnonzero(of_keys == of_rows[g, n]).tolist() if j <= i or not causal
                ]
                keys |= set(_nearest(members, i, p["cluster_size"], causal, whole))
            kept[g, n, [j for j in keys if 0 <= j < num_keys and (j <= i or not causal)]] = True
    return kept


def _around(i: int, window: int) -> set[int]:
    return set(range(i - window, i + window + 1))


def _nearest(members: list[int], i: int, size: int, causal: bool, whole: bool) -> list[int]:
    if causal:
        return members[-size:]
    if whole:
        return members
    p = sum(j <= i for j in members)
    return [j for place, j in enumerate(members) if p - math.ceil(size / 2) <= place < p + size // 2]


def buckets_of(
    p: dict[str, Any],
    q: np.ndarray,
    k: np.ndarray,
    head: int,
    causal: bool,
    scale: float,
    layer: int,
    seed: int,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per round the buckets of keys [M] and of rows [G, N] of one key head: q [G, N, D], k [M, D]."""
    rows, keys = finite(q) * (-1.0 if scale < 0 else 1.0), finite(k)
    if p["centre_keys"]:
        keys = keys - (keys[: p["centre_keys"]] if causal else keys).mean(0)
    if p["variant"] == "smyrf":
        return _smyrf(p, rows, keys, _stream(seed, layer, head))
    if p["num_buckets"] == 1:
        return [(np.zeros(len(k), int), np.zeros(q.shape[:2], int))] * p["num_hash_rounds"]
    D, half = k.shape[1], p["num_buckets"] // 2
    drawn = normal_numbers(_stream(seed, layer, head), p["num_hash_rounds"] * D * half)
    rotations = drawn.reshape(p["num_hash_rounds"], D, half)
    return [(_hash(keys @ R), _hash(rows @ R)) for R in rotations]


def _hash(projected: np.ndarray) -> np.ndarray:
    return np.concatenate([projected, -projected], -1).argmax(-1)


def _smyrf(
    p: dict[str, Any], rows: np.ndarray, keys: np.ndarray, stream: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    D, clusters = keys.shape[1], -(-len(keys) // p["cluster_size"])
    longest = (rows**2).sum(-1).max() + (keys**2).sum(-1).max()

    def widened(x: np.ndarray, place: int) -> np.ndarray:
        wide = np.zeros((*x.shape[:-1], D + 2))
        wide[..., :D] = x
        wide[..., D + place] = np.sqrt(np.maximum(longest - (x**2).sum(-1), 0))
        return wide

    rounds = []
    for w in normal_numbers(stream, p["num_hash_rounds"] * (D + 2)).reshape(-1, D + 2):
        of_keys = _cut(widened(keys, 0) @ w, clusters)
        rounds.append((of_keys, np.stack([_cut(x @ w, clusters) for x in widened(rows, 1)])))
    return rounds


def _cut(projected: np.ndarray, clusters: int) -> np.ndarray:
    n = len(projected)
    order = np.argsort(projected, kind="stable")
    cluster = np.zeros(n, int)
    for place, index in enumerate(order):
        cluster[index] = int((place + 0.5) * clusters / n)
    return cluster


def finite(x: np.ndarray) -> np.ndarray:
    """Vectors with a number that is not finite as zeros."""
    return np.where(np.isfinite(x).all(-1, keepdims=True), x, 0.0)


def _stream(seed: int, layer: int, head: int) -> int:
    return stream(seed, layer, 3, head)


def stream(seed: int, *counters: int) -> int:
    for counter in counters:
        seed = _splitmix(seed, counter)
    return seed


@cache
def normal_numbers(state: int, count: int) -> np.ndarray:
    """Box-Muller, number t from draws 2 t and 2 t + 1."""
    uniform = (np.array([_splitmix(state, t) >> 11 for t in range(2 * count)], float) + 0.5) / 2**53
    return np.sqrt(-2 * np.log(uniform[::2])) * np.cos(2 * math.pi * uniform[1::2])
