"""One query row over a few runs of keys: decode. Reads the keys it keeps, as views, and nothing else.

    p = softmax(scale * q [K_1 | K_2 | ...]^T),   out = sum_r p_r V_r

The scores of the runs are joined, not the keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def attend_row(
    q: Tensor, k: Tensor, v: Tensor, runs: Sequence[slice], scale: float, *, impl: str = "torch"
) -> tuple[Tensor, Tensor]:
    """q [B, Hk, G, 1, D] over the keys of disjoint, non-empty ``runs`` -> out [B, Hk, G, 1, Dv], lse [B, Hk,
    G, 1]; under impl ``triton`` in fp32.
    """
    if impl == "triton":
        from kernels._triton.paged_rows import attend_row as by_kernels

        return by_kernels(q, k, v, runs, scale)
    if q.shape[0] > 1:
        rows = [attend_row(q[b : b + 1], k[b : b + 1], v[b : b + 1], runs, scale) for b in range(q.shape[0])]
        return torch.cat([out for out, _ in rows]), torch.cat([lse for _, lse in rows])
    scores = scores_of_runs(q[0, :, :, 0] * scale, k[0], runs)
    weights, lse = softmax_lse(scores)
    return values_of_runs(weights, v[0], runs)[None, :, :, None], lse[None, :, :, None]


def scores_of_runs(query: Tensor, keys: Tensor, runs: Sequence[slice]) -> Tensor:
    """query [Hk, G, D], already scaled, with keys [Hk, M, D] -> [Hk, G, the runs' keys in their order]."""
    scores = [torch.bmm(query, keys[:, run].to(query.dtype).mT) for run in runs]
    return scores[0] if len(scores) == 1 else torch.cat(scores, -1)


def values_of_runs(weights: Tensor, values: Tensor, runs: Sequence[slice]) -> Tensor:
    """weights as ``scores_of_runs`` orders them, values [Hk, M, Dv] -> [Hk, G, Dv]."""
    if len(runs) == 1:
        return torch.bmm(weights, values[:, runs[0]].to(weights.dtype))
    lengths = [len(range(run.start, run.stop, run.step or 1)) for run in runs]
    parts = torch.split(weights, lengths, -1)
    out = torch.bmm(parts[0], values[:, runs[0]].to(weights.dtype))
    for part, run in zip(parts[1:], runs[1:], strict=True):
        out.baddbmm_(part, values[:, run].to(weights.dtype))
    return out


def softmax_lse(scores: Tensor) -> tuple[Tensor, Tensor]:
    """softmax over the last dimension, and its log-sum-exp: max s - log max p, which needs no second pass."""
    weights = torch.softmax(scores, -1)
    return weights, scores.amax(-1) - torch.log(weights.amax(-1))
