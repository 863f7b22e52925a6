"""The slow, obvious softmax attention under a dense mask: the specification of every fixed pattern.

    out_i = sum_{j in A_i} e^(s_ij - lse_i) v_j,   s_ij = scale * <q_i, k_j>,   lse_i = log sum_{j in A_i}
    e^(s_ij)

O(N M) memory and time per head. Accumulates in fp32 (fp64 for fp64 inputs).
"""

from __future__ import annotations

import math
from time import perf_counter

import torch
from torch import Tensor

from kernels.contract import AttentionResult, Call, Stats
from kernels.math.accumulate import pairs_exact
from kernels.math.dense import accumulator_dtype


def positions(q: Tensor, k: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Query positions i as a column [N, 1], key positions j as a row [1, M]."""
    i = torch.arange(call.start, call.start + q.shape[2], device=q.device)
    j = torch.arange(k.shape[2], device=q.device)
    return i[:, None], j[None, :]


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, call: Call, *, dropped: Tensor | None = None
) -> AttentionResult:
    """Attention over the pairs where ``keep`` [H, N, M] or [N, M] is True; causal pairs j > i are dropped
    here. ``dropped`` [B, H, N]: the backend's own estimate of the softmax mass that is not kept.
    """
    began = perf_counter()
    B, H, N, _ = q.shape
    i, j = positions(q, k, call)
    keep = keep.expand(H, N, k.shape[2]) & (j <= i if call.causal else torch.ones_like(j <= i))
    dtype = accumulator_dtype(q.dtype)
    group = H // k.shape[1]
    keys = k.to(dtype).repeat_interleave(group, dim=1)
    values = v.to(dtype).repeat_interleave(group, dim=1)
    scores = (q.to(dtype) @ keys.mT * call.scale).masked_fill(~keep, -math.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.unsqueeze(-1)).masked_fill(~keep, 0.0)
    kept = B * int(keep.sum())
    spent_ms = (perf_counter() - began) * 1e3
    stats = Stats(
        pairs_kept=kept,
        pairs_exact=pairs_exact(q, k.shape[2], call),
        pairs_computed=B * keep.numel(),
        selection_ms=0.0,
        compute_ms=spent_ms,
        impl="reference",
        dropped_mass=None if dropped is None else float(dropped.mean()),
    )
    return AttentionResult(weighted(weights, values, keep).to(q.dtype), lse.float(), stats, dropped)


def weighted(weights: Tensor, values: Tensor, keep: Tensor) -> Tensor:
    """weights [..., N, M] @ values [..., M, Dv] in which a value that is not finite is felt by the rows that
    keep it alone: ``keep`` as ``weights``, which are 0 elsewhere. (0 * NaN would be NaN in all rows.)"""
    broken = ~torch.isfinite(values)
    if not bool(broken.any()):
        return weights @ values
    out = weights @ values.masked_fill(broken, 0.0)
    for j in broken.any(-1).view(-1, values.shape[-2]).any(0).nonzero()[:, 0].tolist():
        felt = keep[..., j : j + 1] & broken[..., j : j + 1, :]
        out += (weights[..., j : j + 1] * values[..., j : j + 1, :]).masked_fill_(~felt, 0.0)
    return out
