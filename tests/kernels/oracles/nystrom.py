"""Nyström attention, head by head: means by cumulative sums, the inverse by powers or by numpy's own."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.kernels.oracles import Expected


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
    assert not causal, "it has no causal form"
    group = q.shape[1] // k.shape[1]
    out = np.empty((*q.shape[:3], v.shape[3]))
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            out[b, h] = _head(params, q[b, h], k[b, h // group], v[b, h // group], scale)
    return Expected(out, None, None)


def _head(params: dict[str, Any], q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    landmarks = params.get("num_landmarks", 64)
    near_q, near_k = segment_means(q, landmarks), segment_means(k, landmarks)
    between = softmax(scale * near_q @ near_k.T)
    if params.get("pinv", "iterative") == "exact":
        inverse = np.linalg.pinv(between, rcond=1e-10)
    else:
        inverse = steps(between, params.get("num_iterations", 6))
    left, right = softmax(scale * q @ near_k.T), softmax(scale * near_q @ k.T)
    return left @ (inverse @ (right @ v))


def segment_means(x: np.ndarray, landmarks: int) -> np.ndarray:
    """[m, D]: position i of L belongs to the last segment that begins at or before it."""
    count = min(landmarks, len(x))
    begins = [len(x) * a // count for a in range(count)]
    own = np.searchsorted(begins, np.arange(len(x)), side="right") - 1
    means = np.zeros((count, x.shape[1]))
    np.add.at(means, own, x)
    return means / np.bincount(own, minlength=count)[:, None]


def steps(a: np.ndarray, count: int) -> np.ndarray:
    z = a.T / (np.abs(a).sum(0).max() * np.abs(a).sum(1).max())
    one = np.eye(len(a))
    for _ in range(count):
        z = z @ (13 * one - a @ z @ (15 * one - a @ z @ (7 * one - a @ z))) / 4
    return z


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)
