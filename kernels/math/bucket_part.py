"""The bucket part of a call: panels of rows that share a bucket, multiplied, and merged by log-sum-exp.

    S = bias + scale Q K^T (bias: 0, or -inf for a pair that does not count),   P = softmax(S),   O = P V

per panel, in batches that stay in a core's cache; key heads side by side.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch
from torch import Tensor

from kernels.contract import Call
from kernels.math.accumulate import Accumulator
from kernels.math.buckets import BucketPanels, Codes, Reach, head_rounds
from kernels.math.dense import dense_part, make_mask
from kernels.math.merge import merge_into
from kernels.math.spans import Ints
from kernels.parallel import side_by_side

_MINUS_INFINITY_32, _MINUS_INFINITY_64 = -(1 << 23), -(1 << 52)
"""Its bits in fp32 and fp64 as integers."""


def add_buckets(acc: Accumulator, b: int, codes: Codes, reach: Reach) -> tuple[Ints, int]:
    """Add what sequence b's buckets keep beyond ``reach.base``; how many pairs each query head kept [H], and
    how many were computed. The base is there already."""
    jobs = [partial(_add_head, acc, b, codes, head, reach) for head in range(acc.k.shape[1])]
    counts = side_by_side(jobs, acc.q.device)
    return np.concatenate([kept for kept, _ in counts]), sum(computed for _, computed in counts)


def _add_head(acc: Accumulator, b: int, codes: Codes, head: int, reach: Reach) -> tuple[Ints, int]:
    """One key head of one sequence, round by round: no row stands twice in a round's panels."""
    k, v = acc.k[b, head].to(acc.q.dtype), acc.v[b, head].to(acc.q.dtype)
    q, out, lse = (x[b, head].flatten(0, 1) for x in (acc.q, acc.out, acc.lse))
    sound = math.isfinite(float(k.sum()) + float(v.sum()))
    part, part_lse = out.new_empty(len(out) + 1, out.shape[1]), lse.new_empty(len(lse) + 1)
    G, N = codes.rows.shape[1], codes.rows.shape[-1]
    kept, computed = torch.zeros(G, dtype=torch.int64, device=q.device), 0
    for round_panels in head_rounds(codes, head, reach, acc.call):
        part.zero_()
        part_lse.fill_(-math.inf)
        for panels in round_panels:
            rows, rows_lse = panel_part(q, k, v, panels, acc.call, sound)
            part.index_copy_(0, panels.into.view(-1), rows.flatten(0, 1))
            part_lse.index_copy_(0, panels.into.view(-1), rows_lse.view(-1))
            kept += panels.num_kept_per_head(G, N)
            computed += panels.drop.numel()
        merge_into(out, lse, part[:-1], part_lse[:-1])
    return kept.cpu().numpy(), computed


def panel_part(
    q: Tensor, k: Tensor, v: Tensor, panels: BucketPanels, call: Call, sound: bool
) -> tuple[Tensor, Tensor]:
    """[T, R, Dv] and [T, R] of q [G N, D], k [M, D], v [M, Dv]. ``sound``: all their numbers are finite."""
    (T, R), P = panels.rows.shape, panels.keys.shape[1]
    rows = q.index_select(0, panels.rows.view(-1)).view(T, R, -1)
    keys = k.index_select(0, panels.keys.view(-1)).view(T, P, -1)
    values = v.index_select(0, panels.keys.view(-1)).view(T, P, -1)
    if not sound:
        mask = make_mask(panels.keep[:, None], q.dtype)
        out, lse = dense_part(
            rows[:, None, None], keys[:, None], values[:, None], call.scale, mask=mask, guard=True
        )
        return out[:, 0, 0], lse[:, 0, 0]
    scores = _bias(panels.drop, q.dtype).baddbmm_(rows, keys.mT, alpha=call.scale)
    return _softmax(scores, values)


def _bias(drop: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where ``drop`` is 0, -inf where it is -1: the bits of -inf, masked. A masked fill would branch on
    every pair, which no processor can foretell. ``drop`` stays as it is."""
    if dtype == torch.float64:
        return drop.to(torch.int64, copy=True).bitwise_and_(_MINUS_INFINITY_64).view(dtype)
    return drop.to(torch.int32, copy=True).bitwise_and_(_MINUS_INFINITY_32).view(dtype)


def _softmax(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    top = scores.amax(-1)
    weights = torch.softmax(scores, -1)
    lse = top - torch.log(weights.amax(-1))
    out = torch.bmm(weights, values)
    nothing = top == -math.inf
    if bool(nothing.any()):
        out.masked_fill_(nothing.unsqueeze(-1), 0.0)
        lse.masked_fill_(nothing, -math.inf)
    return out, lse


def merge_rows(out: Tensor, lse: Tensor, into: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge the rows of some panels, part [T, R, Dv] and part_lse [T, R], into out [G N, Dv] and lse [G N];
    rows that only fill a panel are left out."""
    filled = (into < len(lse)).view(-1)
    rows = into.view(-1)[filled]
    old, old_lse = out.index_select(0, rows), lse.index_select(0, rows)
    merge_into(old, old_lse, part.flatten(0, 1)[filled], part_lse.view(-1)[filled])
    out.index_copy_(0, rows, old)
    lse.index_copy_(0, rows, old_lse)
