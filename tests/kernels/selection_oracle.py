"""What the selecting backends keep, written a second time in numpy fp64: row by row, tile by tile.

Shares no code with the package. The mask of ``vertical_slash`` is read from its reference, which has tests of
its own.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from kernels import attend

SELECTING = ("xattention", "pooled", "topk", "pages", "vertical_slash")


def selection_mask(
    backend: str,
    params: dict[str, Any],
    q: np.ndarray,
    k: np.ndarray,
    *,
    start: int,
    causal: bool,
    scale: float,
    layer: int = 0,
) -> np.ndarray:
    """[B, H, N, M] booleans for q [B, H, N, D] and k [B, Hk, M, D]."""
    if backend == "vertical_slash":
        return _from_reference(backend, params, q, k, start, causal, scale, layer)
    B, H, N, _ = q.shape
    Hk, M = k.shape[1:3]
    mask = np.zeros((B, H, N, M), dtype=bool)
    for b in range(B):
        for h in range(Hk):
            group = slice(h * H // Hk, (h + 1) * H // Hk)
            one = _one_head(
                backend, params, q[b, group].astype(float), k[b, h].astype(float), start, causal, scale
            )
            mask[b, group] = one
    return mask


def _one_head(
    backend: str, p: dict[str, Any], q: np.ndarray, k: np.ndarray, start: int, causal: bool, scale: float
) -> np.ndarray:
    """[N, M] for the query heads [G, N, D] of one key head [M, D]."""
    T, L = p.get("query_tile", 256), p.get("block_size", 64)
    N, M = q.shape[1], len(k)
    mask = np.zeros((N, M), dtype=bool)
    for first in range(start // T * T, start + N, T):
        rows = np.arange(max(first, start), min(first + T, start + N))
        if causal:
            own = set(range(first, rows[-1] + 1))
            blocks = list(range(first // L))
        else:
            own = set(range(first, min(first + T, M))) | set(range(M // L * L, M))
            blocks = [b for b in range(M // L) if not first <= b * L < first + T]
        scored = _scores(backend, p, q[:, rows - start], k, rows, sorted(own), blocks, causal, scale)
        for b in _chosen(p, L, blocks, *scored, first=backend in ("xattention", "pages")):
            mask[rows - start, b * L : b * L + L] = True
        mask[np.ix_(rows - start, sorted(own))] = True
    if causal:
        mask &= np.arange(M)[None] <= np.arange(start, start + N)[:, None]
    return mask


def _chosen(
    p: dict[str, Any], L: int, blocks: list[int], mass: dict[int, float], own: float, *, first: bool
) -> list[int]:
    """Largest first; what is not finite before everything; ties to the lower block. ``first``: block 0 before
    all that is finite, and under mass always."""
    broken = [b for b in blocks if not math.isfinite(mass[b])]
    sound = (b for b in blocks if b not in broken)
    order = broken + sorted(sound, key=lambda b: (not (first and b == 0), -mass[b], b))
    wanted = p.get("mass")
    if wanted is None:
        return order[: p.get("budget", 1024) // L]
    if broken or not math.isfinite(own) or wanted >= 1:
        return order
    kept, chosen = own, []
    for b in order:
        if kept >= wanted * (own + sum(mass.values())) and not (first and b == 0):
            break
        chosen.append(b)
        kept += mass[b]
    return chosen


def _scores(
    backend: str,
    p: dict[str, Any],
    q: np.ndarray,
    k: np.ndarray,
    rows: np.ndarray,
    own: list[int],
    blocks: list[int],
    causal: bool,
    scale: float,
) -> tuple[dict[int, float], float]:
    """Mass of each candidate block, and of the own keys, averaged over rows and heads. q [G, R, D]."""
    L = p.get("block_size", 64)
    if not blocks:
        return {}, 1.0
    if backend == "topk":
        logits = q @ k.T * scale
        seen = np.zeros((len(rows), len(k)), dtype=bool)
        seen[:, own] = True
        for b in blocks:
            seen[:, b * L : b * L + L] = True
        if causal:
            seen &= np.arange(len(k))[None] <= rows[:, None]
        weights = _softmax(np.where(seen, logits, -np.inf)).mean((0, 1))
        return {b: float(weights[b * L : b * L + L].sum()) for b in blocks}, float(weights[own].sum())
    if backend == "pages":
        bounds = np.stack([_page_bounds(q, k[b * L : b * L + L], scale) for b in blocks], -1)
        weights = _softmax(bounds).mean((0, 1))
        return dict(zip(blocks, weights.tolist(), strict=True)), 0.0
    if backend == "pooled":
        return _mean_query(p, q, k, rows, blocks, causal, scale)
    assert backend == "xattention", f"{backend} has no oracle: add one"
    return _antidiagonal(p, q, k, rows, own, blocks, causal, scale)


def _page_bounds(q: np.ndarray, page: np.ndarray, scale: float) -> np.ndarray:
    """[G, R]: sum over dims of the larger of q_d kmin_d and q_d kmax_d, scaled."""
    ends = np.stack([q * page.min(0) * scale, q * page.max(0) * scale])
    return ends.max(0).sum(-1)


def _antidiagonal(
    p: dict[str, Any],
    q: np.ndarray,
    k: np.ndarray,
    rows: np.ndarray,
    own: list[int],
    blocks: list[int],
    causal: bool,
    scale: float,
) -> tuple[dict[int, float], float]:
    L, S = p.get("block_size", 64), p.get("stride", 16)
    num_keys = int(rows[-1]) + 1 if causal else len(k)
    cells = range(-(-num_keys // S))
    groups = sorted({int(i) // S for i in rows})
    mass, mine = dict.fromkeys(blocks, 0.0), 0.0
    for head in q:
        for g in groups:
            members = [r for r, i in enumerate(rows) if i // S == g]
            logits = np.full(len(cells), -np.inf)
            for c in cells:
                if causal and c > g:
                    continue
                total = 0.0
                for r in members:
                    j = c * S + S - 1 - int(rows[r]) % S
                    total += float(head[r] @ k[j]) if j < num_keys else 0.0
                logits[c] = scale * total / len(members)
            weights = _softmax(logits) / (len(groups) * len(q))
            for c in cells:
                if c * S // L in mass:
                    mass[c * S // L] += weights[c]
                else:
                    mine += weights[c]
    return mass, mine


def _mean_query(
    p: dict[str, Any],
    q: np.ndarray,
    k: np.ndarray,
    rows: np.ndarray,
    blocks: list[int],
    causal: bool,
    scale: float,
) -> tuple[dict[int, float], float]:
    L, R = p.get("block_size", 64), p.get("pool_rows", 64)
    groups = [rows[rows // R == g] for g in np.unique(rows // R)]
    weights = np.zeros(len(k))
    for members in groups:
        means = q[:, members - rows[0]].mean(1)
        seen = np.arange(len(k)) <= (members[-1] if causal else len(k))
        weights += _softmax(np.where(seen, means @ k.T * scale, -np.inf)).mean(0) / len(groups)
    mass = {b: float(weights[b * L : b * L + L].sum()) for b in blocks}
    chosen_from = np.isin(np.arange(len(k)) // L, blocks)
    return mass, float(weights[~chosen_from].sum())


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis; what is not a number stays so and is not felt by the others."""
    broken = np.isnan(logits) | (logits == np.inf)
    finite = np.where(broken, -np.inf, logits)
    top = finite.max(-1, keepdims=True)
    weights = np.exp(finite - np.where(np.isfinite(top), top, 0.0))
    total = weights.sum(-1, keepdims=True)
    return np.where(broken, np.nan, weights / np.where(total > 0, total, 1.0))


def _from_reference(
    backend: str,
    params: dict[str, Any],
    q: np.ndarray,
    k: np.ndarray,
    start: int,
    causal: bool,
    scale: float,
    layer: int,
) -> np.ndarray:
    """A row's output over values that are unit vectors is its weights: kept where they are positive.

    The logits are shrunk for the weights only after the choice has been made by rank, which a positive factor
    on the scale would change: so the weights come from fp64, where nothing above -700 vanishes.
    """
    q64, k64 = (torch.from_numpy(x.astype(np.float64)) for x in (q, k))
    B, Hk, M, _ = k64.shape
    unit = torch.eye(M, dtype=torch.float64).expand(B, Hk, M, M)
    common: dict[str, Any] = {"params": params, "causal": causal, "scale": scale, "layer": layer}
    weights = attend(q64, k64, unit, backend=backend, impl="reference", start=start, **common).out
    return ((weights > 0) | torch.isnan(weights)).numpy()
