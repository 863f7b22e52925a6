"""What the patterns mean, written a second time: one Python set of keys per row, and softmax in numpy fp64.

Shares no code with the package, so that a mistake would have to be made twice.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from tests.kernels.selection_oracle import SELECTING, selection_mask

WORD = (1 << 64) - 1


def kept_keys(
    backend: str,
    params: dict[str, Any],
    *,
    i: int,
    num_keys: int,
    causal: bool,
    head: int,
    key_head: int,
    layer: int,
    seed: int,
) -> set[int]:
    """The keys that query row i of one head keeps."""
    M = num_keys
    keys = _visible(backend, params, i, M, causal, head, key_head, layer, seed)
    return {j for j in keys if 0 <= j < M and (j <= i or not causal)}


def _visible(
    backend: str,
    p: dict[str, Any],
    i: int,
    M: int,
    causal: bool,
    head: int,
    key_head: int,
    layer: int,
    seed: int,
) -> set[int]:
    if backend == "exact":
        return set(range(M))
    if backend in ("window", "sinks"):
        columns = p.get("global_tokens", 0) if backend == "window" else p.get("sinks", 4)
        return _window(p.get("window", 512), columns, i, M, causal, rows_too=backend == "window")
    if backend == "star":
        return _star(p.get("window", 2), i, M, causal)
    if backend in ("strided", "fixed"):
        return _two_patterns(backend, p, i, M, causal, head, layer)
    if backend == "random":
        return {i} | _drawn(
            p.get("num_random", 64), p.get("block_size", 1), i, M, causal, head, key_head, layer, seed
        )
    assert backend == "bigbird", f"{backend} has no oracle: add one"
    near = _window(p.get("window", 256), p.get("global_tokens", 64), i, M, causal, rows_too=True)
    return near | _drawn(
        p.get("num_random", 192), p.get("block_size", 64), i, M, causal, head, key_head, layer, seed
    )


def _window(window: int, columns: int, i: int, M: int, causal: bool, rows_too: bool) -> set[int]:
    if causal:
        return set(range(i - window + 1, i + 1)) | set(range(columns))
    if rows_too and i < columns:
        return set(range(M))
    return set(range(i - window, i + window + 1)) | set(range(columns))


def _star(window: int, i: int, M: int, causal: bool) -> set[int]:
    if causal:
        return set(range(i - window + 1, i + 1)) | {0}
    relay, ring = M - 1, M - 1
    if i == relay:
        return set(range(M))
    return {relay} | {(i + step) % ring for step in range(-window, window + 1)}


def _two_patterns(
    backend: str, p: dict[str, Any], i: int, M: int, causal: bool, head: int, layer: int
) -> set[int]:
    w, combine = p.get("stride", 128), p.get("combine", "union")
    if backend == "strided":
        reach = w if causal else w // 2
        patterns = [set(range(i - reach, i + reach + 1)), set(range(i % w, M, w))]
    else:
        block = i // w * w
        patterns = [set(range(block, block + w)), {i} | set(range(w - 1, M, w))]
    if combine == "union":
        return patterns[0] | patterns[1]
    return patterns[(head if combine == "multihead" else layer) % 2]


def _drawn(
    num_random: int, L: int, i: int, M: int, causal: bool, head: int, key_head: int, layer: int, seed: int
) -> set[int]:
    if L == 1:
        bound = i + 1 if causal else M
        return {_draw(seed, layer, 0, head, i, t, bound) for t in range(num_random)}
    block = i // L
    bound = block if causal else -(-M // L)
    blocks = (
        {_draw(seed, layer, 1, key_head, block, t, bound) for t in range(num_random // L)} if bound else set()
    )
    return {j for b in blocks for j in range(b * L, b * L + L)}


def _draw(seed: int, layer: int, kind: int, head: int, place: int, t: int, bound: int) -> int:
    row = _splitmix(_head_stream(seed, layer, kind, head), place)
    return (_splitmix(row, t) >> 32) * bound >> 32


@cache
def _head_stream(seed: int, layer: int, kind: int, head: int) -> int:
    state = seed
    for counter in (layer, kind, head):
        state = _splitmix(state, counter)
    return state


def _splitmix(state: int, counter: int) -> int:
    """Output number ``counter`` of a SplitMix64 that starts at ``state``."""
    z = (state + (counter + 1) * 0x9E3779B97F4A7C15) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def dense_mask(
    backend: str,
    params: dict[str, Any],
    *,
    heads: tuple[int, int],
    num_rows: int,
    num_keys: int,
    start: int,
    causal: bool,
    layer: int = 0,
    seed: int = 0,
) -> np.ndarray:
    """[H, N, M] booleans. heads = (H, Hk)."""
    H, Hk = heads
    mask = np.zeros((H, num_rows, num_keys), dtype=bool)
    same_for_all = backend not in ("random", "bigbird") and params.get("combine") != "multihead"
    for h in range(H):
        if h and same_for_all:
            mask[h] = mask[0]
            continue
        for r in range(num_rows):
            keys = kept_keys(
                backend,
                params,
                i=start + r,
                num_keys=num_keys,
                causal=causal,
                head=h,
                key_head=h // (H // Hk),
                layer=layer,
                seed=seed,
            )
            mask[h, r, list(keys)] = True
    return mask


def kept_pairs(
    backend: str,
    params: dict[str, Any],
    q: np.ndarray,
    k: np.ndarray,
    *,
    start: int,
    causal: bool,
    scale: float,
    layer: int = 0,
    seed: int = 0,
) -> np.ndarray:
    """[B, H, N, M] booleans: what the backend keeps for these queries and keys."""
    if backend in SELECTING:
        return selection_mask(backend, params, q, k, start=start, causal=causal, scale=scale, layer=layer)
    (B, H, N, _), (_, Hk, M, _) = q.shape, k.shape
    fixed = dense_mask(
        backend,
        params,
        heads=(H, Hk),
        num_rows=N,
        num_keys=M,
        start=start,
        causal=causal,
        layer=layer,
        seed=seed,
    )
    return np.broadcast_to(fixed, (B, H, N, M))


def softmax_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """out [B, H, N, Dv] and lse [B, H, N] in fp64, for a mask [B or 1, H, N, M]; 0 and -inf for a row without
    any key."""
    group = q.shape[1] // k.shape[1]
    keys, values = (np.repeat(x.astype(np.float64), group, axis=1) for x in (k, v))
    scores = np.where(mask, q.astype(np.float64) @ keys.swapaxes(-1, -2) * scale, -np.inf)
    top = scores.max(-1, keepdims=True)
    top = np.where(top == -np.inf, 0.0, top)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = top + np.log(total)
    return weights @ values / np.where(total == 0.0, 1.0, total), lse[..., 0]
