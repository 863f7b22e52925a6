"""Scatterbrain over buckets, whose pairs have no shape that sums could go around: total minus support.

    T_i = sum over j outside window and sinks of L_ij [v_j, 1]          (kernels.math.linear_attention)
    B_i = sum over j that buckets add to window and sinks of L_ij [v_j, 1]
    complement_i = T_i - B_i

Both are made in fp64 from the same fp64 features, whatever the inputs. A difference loses as many digits as
T_i is larger than the row's whole normaliser Z_i (exact part and complement): rows with T_i / Z_i above
``CANCELLATION``, and rows that some later key's features outweigh beyond e^LIMIT, are summed again key by
key over the complement itself, O(M num_features) each. So the result is within rounding of the direct sum.
Buckets are visited as panels of rows that share one; exact scores and L of a panel go together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter

import torch
from torch import Tensor

from kernels.contract import AttentionResult, Call
from kernels.math.accumulate import Accumulator, accumulator
from kernels.math.bucket_attention import Bucketing
from kernels.math.bucket_part import merge_rows, panel_part
from kernels.math.bucket_threads import side_by_side
from kernels.math.buckets import BucketPanels, Codes, Reach, head_panels, looks_beyond_base
from kernels.math.clusters import KMeansParams, kmeans_codes, kmeans_flops, kmeans_reach
from kernels.math.complement import Features, Support, exact_rows, features_of, map_flops, together
from kernels.math.features import FeatureMap, FeatureParams, feature_map
from kernels.math.hashing import LshParams, lsh_codes, lsh_flops, lsh_reach
from kernels.math.linear_attention import feature_part
from kernels.math.masked import weighted
from kernels.math.spans import add_spans, plan_for
from kernels.math.window import window_keep

CANCELLATION = {torch.float32: 1e7, torch.float64: 10.0}
"""The largest T_i / Z_i, by the accumulator's type: 2e-16 of T_i stays below that type's own rounding."""
LIMIT = 500.0
"""Largest exponent of a row's feature, relative to T_i's scale, that is multiplied in fp64."""
AGAIN = 1 << 21
"""Exponents that exist at once while rows are summed again."""


def bucketing(support: Support, exact: int) -> Bucketing:
    """How ``lsh`` or ``kmeans`` finds its pairs, rows below ``exact`` seeing all they may."""
    params = support.params
    if isinstance(params, LshParams):
        how = Bucketing(partial(lsh_codes, params), lsh_reach(params), partial(lsh_flops, params))
    else:
        assert isinstance(params, KMeansParams)
        how = Bucketing(partial(kmeans_codes, params), kmeans_reach(params), partial(kmeans_flops, params))
    return replace(how, reach=replace(how.reach, exact_rows=max(how.reach.exact_rows, exact)))


def buckets_attention(
    q: Tensor, k: Tensor, v: Tensor, params: FeatureParams, call: Call, support: Support
) -> AttentionResult:
    """A whole call; sequences of a batch are independent, and so are key heads."""
    began = perf_counter()
    if call.causal:  # a key after the last row chooses nothing
        k, v = (x[:, :, : call.start + q.shape[2]] for x in (k, v))
    acc = accumulator(q, k, v, call if len(q) == 1 else replace(call, kept=None))
    how = bucketing(support, exact_rows(params, call))
    add_spans(acc, plan_for(acc, how.reach.base(call.causal)))
    dropped = torch.zeros_like(acc.lse)
    features = features_of(acc, params)
    if looks_beyond_base(how.reach, call, q.shape[2], k.shape[2]):
        _add_sequences(acc, how, params, dropped, features)
    return together(acc, q, began, features, dropped)


def _add_sequences(
    acc: Accumulator, how: Bucketing, params: FeatureParams, dropped: Tensor, features: Features
) -> None:
    B, Hk, G, N, D = acc.q.shape
    wide = feature_map(params, acc.call, Hk, D, torch.float64, acc.q.device)
    for b in range(B):
        began = perf_counter()
        codes = how.codes(acc.q[b], acc.k[b], acc.call)
        acc.selection_s += perf_counter() - began
        jobs = [
            partial(_add_head, acc, b, head, _of_head(wide, features, b, head), codes, how.reach, dropped)
            for head in range(Hk)
        ]
        counts = side_by_side(jobs, acc.q.device)
        kept, computed = (sum(pairs) for pairs in zip(*counts, strict=True))
        acc.complete(kept, computed)
        features.flops += Hk * how.flops(G * N, acc.k.shape[2], D)
        features.flops += _flops(features, acc, computed)


def _of_head(wide: FeatureMap, features: Features, b: int, head: int) -> Features:
    """The fp64 features of one key head; its sums are kept under a key of its own."""
    own = FeatureMap(wide.directions[head : head + 1], wide.scale, (wide.key, "head", head))
    if features.centre is None:
        return Features(own, None)
    return Features(own, features.centre[b : b + 1, head : head + 1].double())


def _flops(features: Features, acc: Accumulator, computed: int) -> int:
    """Of one sequence: features of keys and rows, T, and L in the panels."""
    (_, Hk, G, N, _), M = acc.q.shape, acc.k.shape[2]
    F, width = features.map.num_features, acc.v.shape[3] + 1
    once = Hk * (map_flops(features, M) + G * map_flops(features, N))
    return once + 2 * Hk * (M + G * N) * F * width + 2 * computed * (F + width)


@dataclass
class _Head:
    """One key head of one sequence in fp64: rows of the group below each other. ``sums`` [G N + 1, Dv + 1]
    are T, later the complement, relative to ``log_scale`` [G N]; the last column is the sum without values,
    the last row belongs to nobody. ``total`` [G N] is T's last column as it was. ``rows`` and ``keys``:
    exponents [G N, F] and [M, F]; ``values`` [M, Dv + 1] end in a one."""

    sums: Tensor
    total: Tensor
    log_scale: Tensor
    rows: Tensor
    keys: Tensor
    values: Tensor
    sound: bool

    @property
    def denominator(self) -> Tensor:
        return self.sums[:-1, -1]


def _add_head(
    acc: Accumulator,
    b: int,
    head: int,
    features: Features,
    codes: Codes,
    reach: Reach,
    dropped: Tensor,
) -> tuple[int, int]:
    """Merge the exact pairs of the buckets and the complement into the head's rows; pairs kept and
    computed."""
    one = _total(acc, b, head, features, reach)
    kept, computed, lost = _visit_panels(acc, b, head, one, codes, reach)
    out, lse = acc.out[b, head].flatten(0, 1), acc.lse[b, head].flatten(0, 1)
    shift = features.shift(acc.q[b : b + 1, head : head + 1].double())
    shift = shift.view(-1) if isinstance(shift, Tensor) else shift
    again = _cancelled(one, lse.double(), shift, CANCELLATION[acc.q.dtype]) | lost
    if bool(again.any()):
        _sum_again(one, again.nonzero()[:, 0], head_panels(codes, head, reach, acc.call), reach, acc)
    dropped[b, head].flatten(0, 1).copy_(_merge(out, lse, one, shift))
    return kept, computed


def _total(acc: Accumulator, b: int, head: int, features: Features, reach: Reach) -> _Head:
    """T of all rows, but for those that are exact."""
    call, at = acc.call, (slice(b, b + 1), slice(head, head + 1))
    q = acc.q[at].double()
    shift = reach.window + (not call.causal)
    part = feature_part(
        q, acc.k[at], acc.v[at], features.map, call, first=reach.sinks, shift=shift, centre=features.centre
    )
    whole = slice(0, max(0, reach.exact_rows - call.start) if call.causal else 0)
    part.numerator[..., whole, :] = 0.0
    part.denominator[..., whole] = 0.0
    part.log_scale[..., whole] = -math.inf
    Dv, rows = acc.v.shape[3], part.denominator.numel()
    sums = q.new_zeros(rows + 1, Dv + 1)
    sums[:-1, :-1] = part.numerator.view(rows, Dv)
    sums[:-1, -1] = part.denominator.view(rows)
    values = q.new_ones(acc.v.shape[2], Dv + 1)
    values[:, :-1] = acc.v[b, head]
    return _Head(
        sums,
        sums[:-1, -1].clone(),
        part.log_scale.reshape(rows),
        features.map.log_queries(q)[0, 0].flatten(0, 1),
        features.map.log_keys(features.centred(acc.k[at]))[0, 0],
        values,
        math.isfinite(float(values.sum()) + float(acc.k[at].sum())),
    )


def _visit_panels(
    acc: Accumulator, b: int, head: int, one: _Head, codes: Codes, reach: Reach
) -> tuple[int, int, Tensor]:
    """Add the panels' exact pairs to the rows and take their L off T. Pairs kept and computed, and the rows
    [G N] whose L is beyond what is multiplied."""
    k, v = acc.k[b, head].to(acc.q.dtype), acc.v[b, head].to(acc.q.dtype)
    q = acc.q[b, head].flatten(0, 1)
    out, lse = acc.out[b, head].flatten(0, 1), acc.lse[b, head].flatten(0, 1)
    top = torch.where(torch.isfinite(one.keys), one.keys, -math.inf).amax(0)
    keys = torch.cat([torch.exp(one.keys - top), one.values], -1)
    scale = one.log_scale.masked_fill(one.log_scale == -math.inf, 0.0)
    exponents = (one.rows + top).sub_(scale.unsqueeze(-1))
    lost = (exponents.amax(-1) > LIMIT) & (one.denominator > 0)
    rows = exponents.clamp_(max=LIMIT).exp_()
    kept = computed = 0
    for panels in head_panels(codes, head, reach, acc.call):
        part, part_lse = panel_part(q, k, v, panels, acc.call, one.sound)
        merge_rows(out, lse, panels.into, part, part_lse)
        _take_off(one, rows, keys, panels)
        kept, computed = kept + int(torch.count_nonzero(panels.keep)), computed + panels.keep.numel()
    return kept, computed, lost


def _take_off(one: _Head, rows: Tensor, keys: Tensor, panels: BucketPanels) -> None:
    """T less the panels' L. ``rows`` [G N, F], ``keys`` [M, F + Dv + 1]: features, and values beside them."""
    (T, R), P, F = panels.rows.shape, panels.keys.shape[1], rows.shape[1]
    own = rows.index_select(0, panels.rows.view(-1)).view(T, R, F)
    theirs = keys.index_select(0, panels.keys.reshape(-1)).view(T, P, -1)
    pairs = torch.bmm(own, theirs[..., :F].mT).masked_fill_(~panels.keep, 0.0)
    values = theirs[..., F:]
    found = torch.bmm(pairs, values) if one.sound else weighted(pairs, values, panels.keep)
    one.sums.index_add_(0, panels.into.view(-1), found.flatten(0, 1), alpha=-1.0)


def _cancelled(one: _Head, lse: Tensor, shift: Tensor | float, most: float) -> Tensor:
    """Rows [G N] whose difference has lost too much, or is none."""
    scale = one.log_scale + shift
    top = torch.maximum(lse, scale)
    weight = torch.exp(scale - top)
    normaliser = torch.exp(lse - top) + one.denominator * weight
    sane = torch.isfinite(one.total) & (one.total > 0) & torch.isfinite(lse)
    return sane & ~((one.total * weight <= most * normaliser) & (one.denominator >= 0))


def _sum_again(
    one: _Head, rows: Tensor, panels: Iterator[BucketPanels], reach: Reach, acc: Accumulator
) -> None:
    """The complement of ``rows`` (numbers in 0 .. G N - 1), key by key."""
    call, N, M = acc.call, acc.q.shape[3], len(one.keys)
    i = (call.start + rows % N)[:, None]
    full = reach.exact_rows if call.causal else 0
    j = torch.arange(M, device=rows.device)[None]
    outside = ~window_keep(i, j, reach.window, reach.sinks, full, call.causal)
    if call.causal:
        outside &= j <= i
    slot = torch.full((len(one.denominator),), -1).index_copy_(0, rows.cpu(), torch.arange(len(rows)))
    for batch in panels:
        own = slot[batch.rows]
        own = own.masked_fill(batch.into >= len(slot), -1)
        t, r = (own >= 0).nonzero(as_tuple=True)
        kept, places = batch.keep[t, r].nonzero(as_tuple=True)
        outside[own[t, r][kept], batch.keys[t[kept], places]] = False
    step = max(1, AGAIN // one.keys.numel())
    for a in range(0, len(rows), step):
        some = rows[a : a + step]
        wanted = outside[a : a + step]
        logs = torch.logsumexp(one.rows[some, None] + one.keys, -1).masked_fill_(~wanted, -math.inf)
        top = logs.amax(-1)
        weights = torch.exp(logs - top.masked_fill(top == -math.inf, 0.0)[:, None])
        weights.masked_fill_(~wanted, 0.0)
        one.sums[some] = weighted(weights, one.values, wanted)
        one.log_scale[some] = top


def _merge(out: Tensor, lse: Tensor, one: _Head, shift: Tensor | float) -> Tensor:
    """Both halves under one normaliser, into out [G N, Dv]; the complement's share of it [G N]."""
    scale = (one.log_scale + shift).masked_fill_(one.denominator == 0, -math.inf)
    exact = lse.double()
    top = torch.maximum(exact, scale)
    left, right = torch.exp(exact - top), torch.exp(scale - top)
    normaliser = left + one.denominator * right
    share = one.denominator * right / normaliser
    sums = out.double().mul_(left.unsqueeze(-1))
    sums += (one.sums[:-1, :-1] * right.unsqueeze(-1)).masked_fill_((right == 0).unsqueeze(-1), 0.0)
    out.copy_(sums.div_(normaliser.unsqueeze(-1)))
    return share
