"""Scatterbrain written out: the specification of every support.

    out_i = sum_j w_ij v_j / sum_j w_ij,   w_ij = e^(s_ij) where row i keeps j exactly, else L_ij
    log L_ij = log sum_r e^(a_r(q_i) + e_r(k_j - centre)) + scale <q_i, centre>

j over the keys that row i may see. Every weight of a call exists at once. What a row keeps is asked of the
support itself: fixed patterns and buckets by their own reference, block selections by their choice.
"""

from __future__ import annotations

import math
from dataclasses import replace
from time import perf_counter

import torch
from torch import Tensor

from kernels.contract import AttentionResult, Call, Stats
from kernels.math.accumulate import accumulator, pairs_exact
from kernels.math.bucket_reference import kept_pairs as bucket_pairs
from kernels.math.complement import Features, Support, exact_rows, features_of
from kernels.math.complement_buckets import bucketing
from kernels.math.dense import accumulator_dtype, grouped
from kernels.math.features import FeatureParams
from kernels.math.masked import positions, weighted
from kernels.math.query_tiles import query_tiles
from kernels.math.selection import TileParams

LOGS = 1 << 22
"""Exponents a_ir + e_jr that exist at once."""


def scatterbrain_reference(
    q: Tensor, k: Tensor, v: Tensor, params: FeatureParams, call: Call, support: Support
) -> AttentionResult:
    began = perf_counter()
    keep, visible = kept_pairs(q, k, params, call, support), seen_pairs(q, k, call)
    acc = accumulator(q, k, v, call)
    features = features_of(acc, params)
    keys, values = (x.to(acc.q.dtype)[:, :, None] for x in (k, v))
    exact = torch.matmul(acc.q, keys.mT) * call.scale
    estimated = log_estimates(acc.q, k, features) + torch.as_tensor(features.shift(acc.q)).unsqueeze(-1)
    keep = grouped(keep, k.shape[1])
    logs = torch.where(keep, exact, estimated).masked_fill(~visible, -math.inf)
    weights = torch.softmax(logs, -1).masked_fill(~visible, 0.0)
    out = weighted(weights, values.expand(-1, -1, acc.q.shape[2], -1, -1), visible.expand_as(weights))
    dropped = weights.masked_fill(keep, 0.0).sum(-1).nan_to_num_(nan=1.0).clamp_(0.0, 1.0)
    kept, F = int(keep.sum()), features.map.num_features
    stats = Stats(
        pairs_kept=kept,
        pairs_exact=pairs_exact(q, k.shape[2], call),
        pairs_computed=keep.numel(),
        selection_ms=0.0,
        compute_ms=(perf_counter() - began) * 1e3,
        impl="reference",
        dropped_mass=float(dropped.mean()),
        other_flops=2 * F * keep.numel(),
    )
    return AttentionResult(out.flatten(1, 2).to(q.dtype), None, stats, dropped.flatten(1, 2).float())


def log_estimates(q: Tensor, k: Tensor, features: Features) -> Tensor:
    """log L of rows q [B, Hk, G, N, D] and keys k [B, Hk, M, D], which are centred here: [B, Hk, G, N, M]."""
    rows, keys = features.map.log_queries(q), features.map.log_keys(features.centred(k))
    found = q.new_empty(*q.shape[:-1], k.shape[2])
    step = max(1, LOGS // max(1, found[..., 0, :].numel() * keys.shape[-1]))
    for a in range(0, q.shape[3], step):
        sums = rows[:, :, :, a : a + step, None] + keys[:, :, None, None]
        found[:, :, :, a : a + step] = torch.logsumexp(sums, -1)
    return found


def seen_pairs(q: Tensor, k: Tensor, call: Call) -> Tensor:
    """Bool [N, M]: what each row may see."""
    i, j = positions(q, k, call)
    return j <= i if call.causal else torch.ones_like(j <= i)


def kept_pairs(q: Tensor, k: Tensor, params: FeatureParams, call: Call, support: Support) -> Tensor:
    """Bool [B, H, N, M]: the pairs computed exactly."""
    i, _ = positions(q, k, call)
    if support.backend.select is not None:
        keep, whole = _selected(q, k, call, support), _tile_begin(i, support)
    elif support.name in ("lsh", "kmeans"):
        keep, whole = _in_buckets(q, k, call, support), i
    else:
        keep, whole = _one_hot(torch.zeros_like(q), torch.zeros_like(k), call, support), i
    return (keep | (whole < exact_rows(params, call))) & seen_pairs(q, k, call)


def _in_buckets(q: Tensor, k: Tensor, call: Call, support: Support) -> Tensor:
    how, keep = bucketing(support, 0), torch.zeros(*q.shape[:3], k.shape[2], dtype=torch.bool)
    stop = call.start + q.shape[2] if call.causal else k.shape[2]
    alone = replace(call, kept=None)
    for b, rows in enumerate(grouped(q.to(accumulator_dtype(q.dtype)), k.shape[1])):
        keep[b, ..., :stop] = bucket_pairs(how.codes(rows, k[b, :, :stop], alone), how.reach, alone)
    return keep


def _one_hot(q: Tensor, k: Tensor, call: Call, support: Support) -> Tensor:
    """Which weights a fixed pattern's reference gives to values that tell keys apart, at logits of 0."""
    B, Hk, M, _ = k.shape
    values = torch.eye(M, dtype=torch.float64, device=k.device).expand(B, Hk, M, M)
    made = support.backend.impls["reference"](q.double(), k.double(), values, support.params, call)
    return made.out > 0


def _tile_begin(i: Tensor, support: Support) -> Tensor:
    assert isinstance(support.params, TileParams)
    return i // support.params.query_tile * support.params.query_tile


def _selected(q: Tensor, k: Tensor, call: Call, support: Support) -> Tensor:
    """Own keys of the rows' tiles and the blocks that the support chooses."""
    knobs, select = support.params, support.backend.select
    assert isinstance(knobs, TileParams) and select is not None
    (B, H, N, _), M = q.shape, k.shape[2]
    tiles = query_tiles(call, N, M, knobs.query_tile, knobs.block_size)
    keep = torch.zeros(B, H, N, M, dtype=torch.bool)
    i, j = positions(q, k, call)
    begin = i // tiles.height * tiles.height
    own = begin <= j if call.causal else (begin <= j) & (j < begin + tiles.height)
    keep |= own if call.causal else own | (j >= M // tiles.block * tiles.block)
    for b in range(B):
        one = slice(b, b + 1)
        lists = select(q[one], k[one], k[one], knobs, call)
        for tile in range(tiles.num_tiles):
            for head in range(lists.heads):
                heads = slice(head * H // lists.heads, (head + 1) * H // lists.heads)
                for block in lists.indices[lists.indptr[head, tile] : lists.indptr[head, tile + 1]].tolist():
                    keys = slice(block * tiles.block, (block + 1) * tiles.block)
                    keep[b, heads, tiles.rows(tile), keys] = True
    return keep
