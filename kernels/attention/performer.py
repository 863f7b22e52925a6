"""Softmax attention estimated through positive random features (FAVOR+).

    out_i = sum_j L_ij v_j / sum_j L_ij,   L_ij = sum_r e^(a_ir + e_jr),   E[L_ij] = e^(t <q_i, k_j - c>)

over all keys j that row i sees; a, e: ``kernels.math.features``; c: the mean of the first ``centre_keys``
keys (bidirectional: of all), which a softmax does not see. Causal rows before position ``centre_keys`` attend
exactly: c holds keys that are later than theirs. Choromanski et al., "Rethinking attention with Performers"
(arXiv 2009.14794). Cost O((M + N) num_features (D + Dv)) time; O(num_features Dv) memory per key head, and as
much to decode, whatever the length.

t is the scale. L is unbiased, the quotient is not. The relative variance of L grows like e^(t |q + k|^2) and
falls like 1 / num_features: where a softmax is peaked, hundreds of features say little.

When not to use it: where attention must find one token among many; and below a few thousand tokens, where
``exact`` is as fast.
"""

from __future__ import annotations

import math
from dataclasses import replace
from time import perf_counter

import torch
from torch import Tensor

from kernels.contract import AttentionResult, Backend, Call, CallShape, Capabilities, Stats, Workspace
from kernels.math.accumulate import pairs_exact
from kernels.math.dense import accumulator_dtype, grouped
from kernels.math.features import FeatureParams, feature_map, key_centre
from kernels.math.flops import attention_flops, window_pairs
from kernels.math.linear_attention import feature_attention, feature_flops, feature_workspace
from kernels.math.masked import masked_attention
from kernels.math.spans import span_attention
from kernels.math.window import window_pattern
from kernels.math.workspace import windows


class PerformerParams(FeatureParams):
    """The random features that stand for all keys."""


def attend(q: Tensor, k: Tensor, v: Tensor, params: PerformerParams, call: Call) -> AttentionResult:
    began = perf_counter()
    rows, out = _rows(q, k, v, call)
    exact_rows = num_exact_rows(params, call, q.shape[2])
    pairs = (0, 0)
    if exact_rows:
        pairs = _exact(q[:, :, :exact_rows], k, v, params, call, out[..., :exact_rows, :])
    if exact_rows < q.shape[2]:
        own = replace(call, start=call.start + exact_rows)
        _estimated(rows[..., exact_rows:, :], k, v, params, own, out[..., exact_rows:, :])
    result = out.flatten(1, 2).to(q.dtype)
    return AttentionResult(result, None, _stats(q, k, v, params, call, pairs, began, call.impl))


def _rows(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Queries [B, Hk, G, N, D] and room for their answers [B, Hk, G, N, Dv]; kernels read and write narrow
    numbers as they are."""
    if call.impl == "triton":
        B, H, N, _ = q.shape
        out = q.new_empty(B, N, H, v.shape[-1]).transpose(1, 2)
        return grouped(q, k.shape[1]), grouped(out, k.shape[1])
    rows = grouped(q.to(accumulator_dtype(q.dtype)), k.shape[1])
    return rows, rows.new_empty(*rows.shape[:-1], v.shape[-1])


def _exact(
    q: Tensor, k: Tensor, v: Tensor, params: PerformerParams, call: Call, out: Tensor
) -> tuple[int, int]:
    """Softmax attention of the first rows into ``out``; the pairs that were kept and computed."""
    seen = call.start + q.shape[2]
    pattern = window_pattern(params.centre_keys, 0, 0, True)
    exact = span_attention(q, k[:, :, :seen], v[:, :, :seen], pattern, call)
    out.copy_(grouped(exact.out, k.shape[1]))
    return exact.stats.pairs_kept, exact.stats.pairs_computed


def num_exact_rows(params: FeatureParams, call: Call, num_rows: int) -> int:
    """How many of a call's rows come before the keys that the centre is made of."""
    return min(max(params.centre_keys - call.start, 0), num_rows) if call.causal else 0


def _estimated(q: Tensor, k: Tensor, v: Tensor, params: PerformerParams, call: Call, out: Tensor) -> None:
    fmap = feature_map(params, call, k.shape[1], k.shape[3], accumulator_dtype(q.dtype), k.device)
    feature_attention(q, k, v, fmap, call, centre=key_centre(k, params, call), out=out)


def reference(q: Tensor, k: Tensor, v: Tensor, params: PerformerParams, call: Call) -> AttentionResult:
    """Key by key: the sums of every feature relative to its own largest exponent so far."""
    began = perf_counter()
    exact_rows = num_exact_rows(params, call, q.shape[2])
    dtype = accumulator_dtype(q.dtype)
    rows = grouped(q.to(dtype), k.shape[1])
    out = rows.new_empty(*rows.shape[:-1], v.shape[-1])
    fmap = feature_map(params, call, k.shape[1], k.shape[3], dtype, k.device)
    centre = key_centre(k, params, call)
    logs = fmap.log_keys(k.to(dtype) if centre is None else k.to(dtype) - centre)
    queries = fmap.log_queries(rows)
    top = torch.full_like(logs[:, :, :1], -math.inf)
    sums = logs.new_zeros(*logs.shape[:2], logs.shape[-1], v.shape[-1] + 1)
    ones = v.new_ones(*v.shape[:3], 1)
    values = torch.cat([v, ones], -1).to(dtype)
    for j in range(min(k.shape[2], call.start + q.shape[2]) if call.causal else k.shape[2]):
        one = slice(j, j + 1)
        raised = torch.maximum(top, logs[:, :, one])
        sums = sums * torch.exp(top - raised).mT + torch.exp(logs[:, :, one] - raised).mT * values[:, :, one]
        top = raised
        if call.causal and j >= call.start + exact_rows:
            row = slice(j - call.start, j - call.start + 1)
            out[..., row, :] = _over(queries[..., row, :], top, sums)
    if not call.causal:
        out[:] = _over(queries, top, sums)
    out = out.flatten(1, 2).to(q.dtype)
    pairs = (0, 0)
    if exact_rows:
        first = q[:, :, :exact_rows]
        every = torch.ones(exact_rows, k.shape[2], dtype=torch.bool, device=q.device)
        exact = masked_attention(first, k, v, every, call)
        out[:, :, :exact_rows] = exact.out
        pairs = (exact.stats.pairs_kept, exact.stats.pairs_computed)
    return AttentionResult(out, None, _stats(q, k, v, params, call, pairs, began, "reference"))


def _over(queries: Tensor, top: Tensor, sums: Tensor) -> Tensor:
    """queries a [B, Hk, G, N, F] over a state [B, Hk, ...] -> [B, Hk, G, N, Dv]."""
    total = torch.softmax(queries + top[:, :, None], -1) @ sums[:, :, None]
    return total[..., :-1] / total[..., -1:]


def _stats(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    params: PerformerParams,
    call: Call,
    pairs: tuple[int, int],
    began: float,
    impl: str,
) -> Stats:
    B, H, N, D = q.shape
    rows = N - num_exact_rows(params, call, N)
    before = 0 if call.kept is None else call.start
    keys = (call.start + N if call.causal else k.shape[2]) - (before if call.causal else 0)
    sizes = (params.num_features, D, v.shape[-1])
    flops = feature_flops(rows, keys if rows else 0, H, k.shape[1], sizes, call.causal)
    return Stats(
        pairs_kept=pairs[0],
        pairs_exact=pairs_exact(q, k.shape[2], call),
        pairs_computed=pairs[1],
        selection_ms=0.0,
        compute_ms=(perf_counter() - began) * 1e3,
        impl=impl,
        other_flops=B * flops,
    )


def workspace(params: PerformerParams, shape: CallShape) -> Workspace:
    features = feature_workspace(shape, params.num_features, scaled=False)
    rows = shape.num_rows * shape.num_heads
    live = rows * (shape.value_dim + 1) * 4
    if shape.itemsize < 4:
        live += rows * (shape.key_dim * 4 + shape.value_dim * shape.itemsize)
    exact = replace(shape, num_rows=min(shape.num_rows, max(1, params.centre_keys)))
    first = windows(exact, max(1, params.centre_keys), 0) if shape.causal else Workspace(0)
    return replace(
        features,
        live_bytes=live + max(features.live_bytes, first.live_bytes),
        shared_bytes=first.shared_bytes if shape.causal and params.centre_keys else 0,
    )


def flops(params: PerformerParams, shape: CallShape) -> float:
    """Rows before ``centre_keys`` attend exactly, the others over features; a causal call adds its own keys
    to the sums that are kept."""
    N, start = shape.num_rows, shape.num_keys - shape.num_rows
    exact_rows = min(max(params.centre_keys - start, 0), N) if shape.causal else 0
    rows, keys = N - exact_rows, N if shape.causal else shape.num_keys
    exact = 0.0
    if exact_rows:
        first = replace(shape, num_rows=exact_rows, num_keys=start + exact_rows)
        exact = attention_flops(shape, window_pairs(first, params.centre_keys))
    dims = params.num_features, shape.key_dim, shape.value_dim
    heads = shape.num_heads, shape.num_kv_heads
    return exact + feature_flops(rows, keys if rows else 0, *heads, dims, shape.causal)


BACKEND = Backend(
    name="performer",
    summary="Softmax estimated through random features: linear time, constant memory to decode.",
    paper="Choromanski et al., Rethinking attention with Performers (arXiv 2009.14794)",
    params=PerformerParams,
    capabilities=Capabilities(
        causal=True,
        bidirectional=True,
        decode=True,
        exact=False,
        selection="row",
        random=True,
        approximates=True,
        complexity="O(N num_features head_dim)",
        exponent=1.0,
    ),
    impls={"reference": reference, "torch": attend, "triton": attend},
    workspace=workspace,
    flops=flops,
    conditions=(
        "The estimate of each kernel value is unbiased, with a relative variance that grows exponentially "
        "with scale |q + k|^2 and falls like 1 / num_features; their quotient is biased. Good for flat "
        "attention, poor for peaked attention: a model trained with softmax, as the demo models are, needs "
        "training with these features before they serve it."
    ),
)
