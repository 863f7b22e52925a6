"""Keys drawn from a stochastic block model that the model has learned.

    p_ij = q^_i S k^_j^T,    q^, k^ = sigmoid(MLP(.) C^T),    M_ij ~ Poisson(p_ij) or Bernoulli(min(1, p_ij))
    out_i = sum_{j: M_ij > 0} softmax_j(scale <q_i, k_j>) v_j,      0 for a row that drew nothing

Cho et al., "Transformers meet stochastic block models" (arXiv 2210.15541). Mathematics in
``kernels.math.sbm``, sampling in ``kernels.math.sbm_sampler``; no self loop is added, as in the paper. Each
row draws by itself, from numbers that belong to its place, so chunks and decode steps draw the edges of the
whole prefill. Linear in the edges: time grows with N^2 mean(p). Accumulates in fp32, returns q's dtype.

When not to use it: with a model that was not trained for it. Its memberships then say nothing, and at the
paper's initialisation keep a quarter of all pairs, which is slower than all of them at once.
"""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from kernels.contract import AttentionResult, Backend, Call, CallShape, Capabilities, Params, Workspace
from kernels.math.accumulate import accumulator, result
from kernels.math.dense import accumulator_dtype, grouped
from kernels.math.flops import attention_flops, halves, probe_flops
from kernels.math.masked import masked_attention
from kernels.math.probe_rows import probe_dropped_mass
from kernels.math.rng import bits
from kernels.math.sbm import MAX_CLUSTERS, clusters_for, hidden, memberships
from kernels.math.sbm_keys import GUIDED_AT_ONCE, KEYS_AT_ONCE, SUM_KEYS
from kernels.math.sbm_part import PAIRS_AT_ONCE, EdgePart
from kernels.math.sbm_sampler import POINTS_AT_ONCE, ROWS_AT_ONCE, head_stream, row_rates, uniforms

_FP32, _FP64 = 4, 8
_DENSITY = {"poisson": 0.22, "bernoulli": 0.25}
"""Of the pairs that rows may see, drawn where every probability is near a quarter."""
_POINT_BYTES = 90
"""A point while it is drawn, located and made an edge: waits, places, indices and their copies."""
_PAIR_BYTES = 28
"""A pair while it is decided: its random bits and their intermediates, its probability, its place."""


class SbmParams(Params):
    sampler: Literal["poisson", "bernoulli"] = Field(
        default="poisson",
        description=(
            "poisson: rows draw their keys, an edge is kept with probability 1 - e^-p; bernoulli: every pair "
            "is decided with probability p (the paper's dense form, O(N^2))."
        ),
    )
    exploration: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="Added to every edge's probability; the paper trains with 0.01.",
    )


def reference(q: Tensor, k: Tensor, v: Tensor, params: SbmParams, call: Call) -> AttentionResult:
    """Row by row, every point by itself."""
    learned = clusters_for(call.learned, q.shape[1], q.shape[3], q.device)
    keep = torch.zeros(*q.shape[:3], k.shape[2], dtype=torch.bool, device=q.device)
    for b, head in torch.cartesian_prod(torch.arange(len(q)), torch.arange(q.shape[1])).tolist():
        keys = k[b, head // (q.shape[1] // k.shape[1])]
        members = memberships(hidden(keys, learned), learned.wide[0][head]).float().double()
        rows = row_rates(q[b, head], learned, head, 0.0)
        if params.exploration > 0.0:
            members, rows = _with_column(members, 1.0), _with_column(rows, params.exploration)
        sums = members.cumsum(0)
        for row, r in enumerate(rows):
            seen = slice(call.start + row + 1 if call.causal else None)
            drawn = _row_keys(r, members[seen], sums[seen], call, params, head, call.start + row)
            keep[b, head, row, drawn] = True
    return _masked(q, k, v, keep, call)


def _with_column(x: Tensor, value: float) -> Tensor:
    return torch.cat([x, torch.full_like(x[:, :1], value)], 1)


def _row_keys(
    r: Tensor, members: Tensor, sums: Tensor, call: Call, params: SbmParams, head: int, position: int
) -> Tensor:
    """Keys of one row, some of them several times: r [C] over the memberships [M, C] that it may see, and
    their running sums."""
    bernoulli = params.sampler == "bernoulli"
    start = torch.tensor(head_stream(call.seed, call.layer, head, bernoulli=bernoulli))
    stream = bits(start, torch.tensor(position)).to(r.device)
    if bernoulli:
        drawn = uniforms(stream, torch.arange(len(members), device=r.device))
        return (drawn < members @ r).nonzero()[:, 0]
    ends = (r * sums[-1]).cumsum(0)
    times, t = torch.zeros(1, dtype=torch.float64, device=r.device), 0
    while float(times[-1]) < float(ends[-1]):
        waits = uniforms(stream, torch.arange(t, t + 64, device=r.device)).log().neg()
        times, t = torch.cat([times, times[-1] + waits.cumsum(0)]), t + 64
    times = times[1:][times[1:] < ends[-1]]
    cluster = torch.searchsorted(ends, times, right=True)
    place = (times - (ends - r * sums[-1])[cluster]) / r[cluster]
    return (sums[:, cluster] <= place).sum(0).clamp(max=len(members) - 1)


def _masked(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, call: Call) -> AttentionResult:
    parts = [masked_attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], keep[b], call) for b in range(len(q))]
    out, lse = torch.cat([part.out for part in parts]), torch.cat([p.lse for p in parts if p.lse is not None])
    rows, kept_lse = (grouped(x, k.shape[1]) for x in (q.to(accumulator_dtype(q.dtype)), lse.unsqueeze(-1)))
    probe = probe_dropped_mass(rows, k, kept_lse.squeeze(-1), call)
    told = [part.stats for part in parts]
    stats = replace(
        told[0],
        pairs_kept=sum(s.pairs_kept for s in told),
        pairs_exact=sum(s.pairs_exact for s in told),
        pairs_computed=sum(s.pairs_computed for s in told),
        compute_ms=sum(s.compute_ms for s in told),
        dropped_mass=probe.dropped_mass,
        kept_per_head=tuple(keep.sum((0, 2, 3)).tolist()),
    )
    return AttentionResult(out, lse, stats)


def attend(q: Tensor, k: Tensor, v: Tensor, params: SbmParams, call: Call) -> AttentionResult:
    began = perf_counter()
    learned = clusters_for(call.learned, q.shape[1], q.shape[3], q.device)
    part = EdgePart(accumulator(q, k, v, call), learned, params)
    part.add()
    probe = probe_dropped_mass(part.acc.q, k, part.acc.lse, call)
    part.count()
    found = result(part.acc, q, began)
    stats = replace(
        found.stats,
        dropped_mass=probe.dropped_mass,
        other_flops=part.flops + probe.flops,
        kept_per_head=tuple(part.kept),
    )
    return replace(found, stats=stats)


def workspace(params: SbmParams, shape: CallShape) -> Workspace:
    """As for MAX_CLUSTERS clusters and exploration; fewer take less. Keys' memberships stay beside a
    decoder's cache; a bidirectional call has them of one key head's query heads at a time."""
    C, H, keys = MAX_CLUSTERS + 1, shape.num_heads, shape.num_keys
    group = H // shape.num_kv_heads
    held = C * (keys * _FP32 + keys // SUM_KEYS * _FP64)
    all_heads = shape.causal or shape.num_rows == 1
    reading = (H if all_heads else group) * min(KEYS_AT_ONCE, keys) * (C * 3 * _FP64 + 4 * shape.key_dim)
    rows = shape.num_rows * H
    outputs = rows * (shape.value_dim + 1) * max(_FP32, shape.itemsize)
    if shape.itemsize < _FP32:
        outputs += rows * (shape.key_dim * _FP32 + shape.value_dim * shape.itemsize)
    drawing = 0 if shape.num_rows == 1 else _drawing(params, shape, C)
    members = 0 if shape.causal else (H if all_heads else group) * held
    return Workspace(outputs + members + max(reading, drawing), cache_bytes=H * held if shape.causal else 0)


def _drawing(params: SbmParams, shape: CallShape, C: int) -> int:
    """One head's sums and guide, or its members in fp64; a tile of rows with its rates; points and edges, or
    pairs; the head's keys where they are copied."""
    keys, rows = shape.num_keys, min(ROWS_AT_ONCE, shape.num_rows)
    tile = rows * (C * 7 * _FP64 + shape.key_dim * 3 * _FP64)
    copied = keys * (shape.key_dim + shape.value_dim) * _FP32
    if params.sampler == "bernoulli":
        return keys * C * _FP64 + tile + copied + min(PAIRS_AT_ONCE, rows * keys) * _PAIR_BYTES
    guiding = min(max(GUIDED_AT_ONCE, keys), C * keys) * 4 * _FP64
    sums = keys * C * (_FP64 + _FP32)
    return sums + max(guiding, tile + copied + min(POINTS_AT_ONCE, rows * keys) * _POINT_BYTES)


def flops(params: SbmParams, shape: CallShape) -> float:
    """What clusters a model has learned no size tells: assumes MAX_CLUSTERS of them, and of the pairs that
    rows may see the share ``_DENSITY`` that the paper's initialisation draws."""
    N, D, C = shape.num_rows, shape.key_dim, MAX_CLUSTERS
    seen = halves(shape, 1)
    share = min(1.0, _DENSITY[params.sampler] + params.exploration)
    new_keys = N if shape.causal else shape.num_keys
    group = shape.num_heads // shape.num_kv_heads
    keys = new_keys * shape.num_kv_heads * (4 * D * D + group * C * (2 * D + 1))
    rows = N * shape.num_heads * (4 * D * D + 2 * C * D + 2 * C * C + 2 * C)
    pairs = 2.0 * C * shape.num_heads * N * shape.num_keys if params.sampler == "bernoulli" else 0.0
    return attention_flops(shape, share * seen) + keys + rows + pairs + probe_flops(shape)


BACKEND = Backend(
    name="sbm",
    summary="Keys drawn at random with probabilities that the model has learned from clusters of tokens.",
    paper="Cho et al., Transformers meet stochastic block models (arXiv 2210.15541)",
    params=SbmParams,
    capabilities=Capabilities(
        causal=True,
        bidirectional=True,
        decode=True,
        exact=False,
        selection="row",
        random=True,
        learned=True,
        complexity="O(edges + N C^2 + M C), edges = N^2 mean(p)",
        exponent=2.0,
    ),
    impls={"reference": reference, "torch": attend, "triton": attend},
    workspace=workspace,
    flops=flops,
    conditions=(
        "The paper shows universality in expectation: with every p above 0, any pattern may be drawn. One "
        "draw need have no self loop, and a row may draw nothing; poisson keeps a pair with 1 - e^-p, a "
        "little below p."
    ),
)
