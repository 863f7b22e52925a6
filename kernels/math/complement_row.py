"""Decode of scatterbrain over buckets: one row, from sums that are kept and the few keys that it finds.

    T = sum over keys outside window and sinks of L_j [v_j, 1]     kept beside the cache, constant size
    B = the same over the keys whose code is the row's             found by comparing codes, gathered once
    complement = T - B                                             (``kernels.math.complement_difference``)

So a step reads its window, the codes and the keys it keeps. In fp64 like the rows of a prefill.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor

from kernels.contract import Call
from kernels.math.accumulate import Accumulator
from kernels.math.bucket_row import found_keys, padded_edges
from kernels.math.buckets import Codes, Reach
from kernels.math.complement import Features
from kernels.math.complement_difference import CANCELLATION, Difference
from kernels.math.features import FeatureMap
from kernels.math.kept import KeptStates, S
from kernels.math.linear_attention import KeptSums, feature_part
from kernels.math.merge import merge_into
from kernels.math.spans import Ints
from kernels.math.window import window_keep


class OneState(KeptStates):
    """Kept states that hand out one state, whatever they are asked for."""

    def __init__(self, state: KeptSums) -> None:
        super().__init__()
        self._state = state

    def get(self, key: Hashable, build: Callable[[], S]) -> S:
        return cast(S, self._state)


def shift_of(reach: Reach, causal: bool) -> int:
    """How far from the row the features' sum begins."""
    return reach.window + (not causal)


def joint_sums(acc: Accumulator, fmap: FeatureMap, reach: Reach) -> KeptSums | None:
    """T of all key heads of a sequence, beside its cache; None where there is none."""
    call, (_, heads, _, D), Dv = acc.call, acc.k.shape, acc.v.shape[3]
    if call.kept is None or not call.causal:
        return None
    key = ("scatterbrain", fmap.key, reach.sinks, shift_of(reach, True), heads, D, Dv, acc.k.device)
    return call.kept.get(key, lambda: KeptSums(reach.sinks, fmap.basis_keys))


def add_row_of_buckets(
    acc: Accumulator, b: int, features: Features, codes: Codes, reach: Reach, dropped: Tensor
) -> tuple[int, int]:
    """Merge the pairs that the buckets add, and the complement, into the only row of sequence b; fills its
    ``dropped`` [Hk, G, 1]. ``features``: fp64, of this sequence. Pairs kept and computed."""
    (_, heads, G, _, _), i = acc.q.shape, acc.call.start
    numbers = codes.keys.cpu().numpy(), codes.rows[..., 0].cpu().numpy()
    look = partial(found_keys, tables=codes.tables, i=i, causal=acc.call.causal, reach=reach)
    found = [look(numbers[0][h], numbers[1][h, g]) for h in range(heads) for g in range(G)]
    one, rows = _total(acc, b, features, reach)
    out, lse = acc.out[b].view(heads * G, -1), acc.lse[b].view(heads * G)
    most = max(len(keys) for keys in found)
    if most:
        edges, drop = (x.to(acc.q.device) for x in padded_edges(found, most, i))
        _add_edges(acc, b, features, edges, drop, (out, lse), one, rows)
    shift = features.shift(acc.q[b : b + 1].double())
    shift = shift.reshape(-1) if isinstance(shift, Tensor) else shift
    again = one.cancelled(lse, shift, CANCELLATION[acc.q.dtype]).nonzero()[:, 0]
    for row in again.tolist():
        _sum_again(acc, b, row, found[row], features, reach, one, rows)
    dropped[b].view(-1).copy_(one.merge(out, lse, shift))
    return sum(len(keys) for keys in found), heads * G * most


def _total(acc: Accumulator, b: int, features: Features, reach: Reach) -> tuple[Difference, Tensor]:
    """T of the row over every head, and the rows' exponents [Hk G, F]."""
    at, call = slice(b, b + 1), _kept_call(acc, features.map, reach)
    q = acc.q[at].double()
    part = feature_part(
        q,
        acc.k[at],
        acc.v[at],
        features.map,
        call,
        first=reach.sinks,
        shift=shift_of(reach, call.causal),
        centre=features.centre,
    )
    rows = part.denominator.numel()
    sums = torch.cat([part.numerator.view(rows, -1), part.denominator.view(rows, 1)], -1)
    one = Difference(sums, part.log_scale.reshape(rows), sums[:, -1].clone())
    return one, features.map.log_queries(q).view(rows, -1)


def _kept_call(acc: Accumulator, fmap: FeatureMap, reach: Reach) -> Call:
    sums = joint_sums(acc, fmap, reach)
    return replace(acc.call, kept=None if sums is None else OneState(sums))


def _add_edges(
    acc: Accumulator,
    b: int,
    features: Features,
    edges: Tensor,
    drop: Tensor,
    into: tuple[Tensor, Tensor],
    one: Difference,
    rows: Tensor,
) -> None:
    """Every row's own keys ``edges`` [Hk G, E], without those that ``drop`` marks: their exact softmax into
    the rows, their L off the sums."""
    head = torch.arange(acc.k.shape[1], device=edges.device).repeat_interleave(acc.q.shape[2])
    keys, values = (x[b][head[:, None], edges] for x in (acc.k, acc.v))
    q = acc.q[b].flatten(0, 2).unsqueeze(1) * acc.call.scale
    scores = torch.bmm(q, keys.to(q.dtype).mT)[:, 0].masked_fill_(drop, -math.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.softmax(scores, -1).masked_fill_((lse == -math.inf).unsqueeze(-1), 0.0)
    merge_into(*into, torch.bmm(weights.unsqueeze(1), values.to(q.dtype))[:, 0], lse)

    wide = keys.double()
    if features.centre is not None:
        wide = wide - features.centre[0, head]
    fmap = features.map
    exponents = torch.bmm(wide, fmap.directions[head].mT).mul_(fmap.key_root)
    exponents.sub_(fmap.half_norms(wide).unsqueeze(-1))
    # T's scale knows these keys: nothing here exceeds 0
    exponents.add_((rows - one.log_scale.unsqueeze(-1)).unsqueeze(1))
    pairs = exponents.exp_().sum(-1).masked_fill_(drop, 0.0)
    one.sums[:, :-1].sub_(torch.bmm(pairs.unsqueeze(1), values.double())[:, 0])
    one.sums[:, -1].sub_(pairs.sum(-1))


def _sum_again(
    acc: Accumulator,
    b: int,
    row: int,
    found: Ints,
    features: Features,
    reach: Reach,
    one: Difference,
    rows: Tensor,
) -> None:
    """The complement of one head's row over every key of it."""
    call, M, at = acc.call, acc.k.shape[2], slice(b, b + 1)
    own = slice(row // acc.q.shape[2], row // acc.q.shape[2] + 1)
    j = torch.arange(M, device=rows.device)[None]
    i = torch.full_like(j[:, :1], call.start)
    full = reach.exact_rows if call.causal else 0
    outside = ~window_keep(i, j, reach.window, reach.sinks, full, call.causal)
    outside[:, torch.from_numpy(np.asarray(found, np.int64)).to(rows.device)] = False
    of_head = Features(
        FeatureMap(features.map.directions[own], features.map.scale),
        None if features.centre is None else features.centre[:, own],
    )
    keys = of_head.map.log_keys(of_head.centred(acc.k[at, own]))[0, 0]
    values = torch.cat([acc.v[b, own.start].double(), rows.new_ones(M, 1)], -1)
    some = torch.tensor([row], device=rows.device)
    one.sum_again(some, rows[some], keys, values, outside)
