"""Scatterbrain over buckets, whose pairs have no shape that sums could go around: total minus support.

    T_i = sum over j outside window and sinks of L_ij [v_j, 1]          (kernels.math.linear_attention)
    B_i = sum over j that buckets add to window and sinks of L_ij [v_j, 1]
    complement_i = T_i - B_i

T, and the difference, in fp64, whatever the inputs. Panels' L are products of features in the accumulator's
type, e^(a_r + mu_r - c_i) times e^(e_r - mu_r) with mu_r the largest over all keys. In fp32 B is off by some
2e-7 of itself, so rows where it is more than ``ROUGH`` times the row's whole normaliser, and rows that later
keys outweigh beyond e^LIMIT, have it made again in fp64. What a difference then still loses is said, and
mended, by ``kernels.math.complement_difference``: the result is within rounding of the direct sum.
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
from kernels.math.buckets import BucketPanels, Codes, Reach, head_panels, looks_beyond_base
from kernels.math.clusters import KMeansParams, kmeans_codes, kmeans_reach
from kernels.math.complement import Features, Support, exact_rows, features_of, map_flops, together
from kernels.math.complement_difference import CANCELLATION, Difference
from kernels.math.complement_row import OneState, add_row_of_buckets, joint_sums, shift_of
from kernels.math.features import FeatureMap, FeatureParams, feature_map
from kernels.math.hashing import LshParams, lsh_codes, lsh_reach
from kernels.math.linear_attention import KeptSums, feature_part
from kernels.math.masked import weighted
from kernels.math.spans import add_spans, plan_for
from kernels.math.window import window_keep
from kernels.parallel import side_by_side

LIMIT = {torch.float32: 40.0, torch.float64: 500.0}
"""Largest exponent of a row's feature, relative to T_i's scale, that is multiplied in that type: what is too
small for it, e^-87 and e^-708, then stays below 1e-16 of the scale."""
ROUGH = 10.0
"""The largest B_i / Z_i that fp32 may have made."""
ROUNDING = 1e-6
"""A complement that is no larger than so much of a B_i made in fp32 is none."""
FAINT = 1e-9
"""B_i counts as at least so much of T_i's scale: what is too small for fp32 is missing in it."""


def bucketing(support: Support, exact: int) -> Bucketing:
    """How ``lsh`` or ``kmeans`` finds its pairs, rows below ``exact`` seeing all they may."""
    params = support.params
    if isinstance(params, LshParams):
        how = Bucketing(partial(lsh_codes, params), lsh_reach(params))
    else:
        assert isinstance(params, KMeansParams)
        how = Bucketing(partial(kmeans_codes, params), kmeans_reach(params))
    return replace(how, reach=replace(how.reach, exact_rows=max(how.reach.exact_rows, exact)))


def buckets_attention(
    q: Tensor, k: Tensor, v: Tensor, params: FeatureParams, call: Call, support: Support
) -> AttentionResult:
    """A whole call; sequences of a batch are independent, and so are key heads."""
    if call.impl == "triton":
        from kernels._triton.signed_calls import buckets_call

        return buckets_call(q, k, v, params, call, support)
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
    B, Hk, _, N, D = acc.q.shape
    wide = feature_map(params, acc.call, Hk, D, torch.float64, acc.q.device)
    for b in range(B):
        began = perf_counter()
        codes = how.codes(acc.q[b], acc.k[b], acc.call)
        acc.selection_s += perf_counter() - began
        add = add_row_of_buckets if N == 1 else _add_heads
        kept, computed = add(acc, b, _of_sequence(wide, features, b), codes, how.reach, dropped)
        acc.complete(kept, computed)
        features.flops += codes.flops + _flops(features, acc, computed)


def _of_sequence(wide: FeatureMap, features: Features, b: int) -> Features:
    """The fp64 features of one sequence."""
    return Features(wide, None if features.centre is None else features.centre[b : b + 1].double())


def _of_head(features: Features, head: int) -> Features:
    own = slice(head, head + 1)
    fmap = FeatureMap(features.map.directions[own], features.map.scale)
    return Features(fmap, None if features.centre is None else features.centre[:, own])


def _add_heads(
    acc: Accumulator, b: int, features: Features, codes: Codes, reach: Reach, dropped: Tensor
) -> tuple[int, int]:
    """All key heads of sequence b, side by side. Each advances the sums that are kept of it; those of all
    stay together, for a decode step asks for them at once."""
    kept, heads = joint_sums(acc, features.map, reach), range(acc.k.shape[1])
    own = [KeptSums(reach.sinks, features.map.basis_keys) for _ in heads]
    if kept is not None:
        for head in heads:
            own[head].sums = kept.sums.units(slice(head, head + 1), torch.float64)
    jobs = [
        partial(_add_head, acc, b, head, _of_head(features, head), codes, reach, dropped, own[head])
        for head in heads
    ]
    counts = side_by_side(jobs, acc.q.device)
    if kept is not None:
        kept.keep([each.sums for each in own])
    return sum(pairs for pairs, _ in counts), sum(pairs for _, pairs in counts)


def _flops(features: Features, acc: Accumulator, computed: int) -> int:
    """Of one sequence: features of keys and rows, T, and L in the panels. With kept sums a step adds as many
    keys as it has rows, where calls follow each other; panels make the features of all keys."""
    (_, Hk, G, N, _), M = acc.q.shape, acc.k.shape[2]
    if N == 1 and acc.call.causal and acc.call.kept is not None:
        M = 1
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

    @property
    def difference(self) -> Difference:
        """Its rows, sharing memory."""
        return Difference(self.sums[:-1], self.log_scale, self.total)


def _add_head(
    acc: Accumulator,
    b: int,
    head: int,
    features: Features,
    codes: Codes,
    reach: Reach,
    dropped: Tensor,
    kept_sums: KeptSums,
) -> tuple[int, int]:
    """Merge the exact pairs of the buckets and the complement into the head's rows; pairs kept and
    computed."""
    one = _total(acc, b, head, features, reach, kept_sums)
    taken, beyond, kept, computed = _visit_panels(acc, b, head, one, codes, reach)
    out, lse = acc.out[b, head].flatten(0, 1), acc.lse[b, head].flatten(0, 1)
    shift = features.shift(acc.q[b : b + 1, head : head + 1].double())
    shift = shift.view(-1) if isinstance(shift, Tensor) else shift
    if acc.q.dtype == torch.float32:
        rough = beyond | _rough(one, taken, lse, shift)
        beyond = torch.zeros_like(rough)
        if bool(rough.any()):
            taken, beyond = _taken_again(one, taken, rough, head_panels(codes, head, reach, acc.call))
    one.sums.sub_(taken)
    if acc.q.dtype == torch.float32:
        no_more_than_rounding = one.denominator.abs() <= ROUNDING * taken[:-1, -1]
        one.sums[:-1].masked_fill_((no_more_than_rounding & ~rough).unsqueeze(-1), 0.0)
    again = one.difference.cancelled(lse, shift, CANCELLATION[acc.q.dtype]) | beyond
    if bool(again.any()):
        _sum_again(one, again.nonzero()[:, 0], head_panels(codes, head, reach, acc.call), reach, acc)
    dropped[b, head].flatten(0, 1).copy_(one.difference.merge(out, lse, shift))
    return kept, computed


def _total(
    acc: Accumulator, b: int, head: int, features: Features, reach: Reach, kept_sums: KeptSums
) -> _Head:
    """T of all rows, but for those that are exact."""
    call, at = acc.call, (slice(b, b + 1), slice(head, head + 1))
    q = acc.q[at].double()
    part = feature_part(
        q,
        acc.k[at],
        acc.v[at],
        features.map,
        replace(call, kept=None if call.kept is None else OneState(kept_sums)),
        first=reach.sinks,
        shift=shift_of(reach, call.causal),
        centre=features.centre,
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
) -> tuple[Tensor, Tensor, int, int]:
    """Add the panels' exact pairs to the rows. B [G N + 1, Dv + 1] in the accumulator's type, the rows [G N]
    that ``_factors`` names, and pairs kept and computed."""
    k, v = acc.k[b, head].to(acc.q.dtype), acc.v[b, head].to(acc.q.dtype)
    q = acc.q[b, head].flatten(0, 1)
    out, lse = acc.out[b, head].flatten(0, 1), acc.lse[b, head].flatten(0, 1)
    rows, keys, beyond = _factors(one, acc.q.dtype)
    taken = keys.new_zeros(one.sums.shape)
    kept = computed = 0
    for panels in head_panels(codes, head, reach, acc.call):
        part, part_lse = panel_part(q, k, v, panels, acc.call, one.sound)
        merge_rows(out, lse, panels.into, part, part_lse)
        _take(taken, rows, keys, panels, one.sound)
        kept, computed = kept + panels.num_kept, computed + panels.drop.numel()
    return taken, beyond, kept, computed


def _factors(one: _Head, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Features of rows [G N, F] and, with the values beside them, of keys [M, F + Dv + 1], whose products are
    L relative to the rows' scale; and the rows [G N] that are beyond what is multiplied."""
    top = torch.where(torch.isfinite(one.keys), one.keys, -math.inf).amax(0)
    F = one.keys.shape[1]
    keys = one.keys.new_empty(len(one.keys), F + one.values.shape[1], dtype=dtype)
    keys[:, :F], keys[:, F:] = (one.keys - top).exp_(), one.values
    scale = one.log_scale.masked_fill(one.log_scale == -math.inf, 0.0)
    exponents = (one.rows + top).sub_(scale.unsqueeze(-1))
    beyond = (exponents.amax(-1) > LIMIT[dtype]) & (one.denominator > 0)
    return exponents.clamp_(max=LIMIT[dtype]).exp_().to(dtype), keys, beyond


def _take(taken: Tensor, rows: Tensor, keys: Tensor, panels: BucketPanels, sound: bool) -> None:
    """Add the panels' sums of L to ``taken``; rows and keys as ``_factors`` makes them."""
    (T, R), P, F = panels.rows.shape, panels.keys.shape[1], rows.shape[1]
    own = rows.index_select(0, panels.rows.view(-1)).view(T, R, F)
    theirs = keys.index_select(0, panels.keys.reshape(-1)).view(T, P, -1)
    pairs, values = _where_kept(torch.bmm(own, theirs[..., :F].mT), panels.drop), theirs[..., F:]
    found = torch.bmm(pairs, values) if sound else weighted(pairs, values, panels.keep)
    taken.index_add_(0, panels.into.view(-1), found.flatten(0, 1))


def _where_kept(pairs: Tensor, drop: Tensor) -> Tensor:
    """0 where ``drop`` is -1: bits, masked, in place."""
    bits = torch.int32 if pairs.dtype == torch.float32 else torch.int64
    pairs.view(bits).bitwise_and_(torch.bitwise_not(drop).to(bits))
    return pairs


def _rough(one: _Head, taken: Tensor, lse: Tensor, shift: Tensor | float) -> Tensor:
    """Rows [G N] whose B, made in fp32, is too large beside their normaliser, or is no number."""
    own, scale, exact = taken[:-1, -1].double(), one.log_scale + shift, lse.double()
    top = torch.maximum(exact, scale)
    weight = torch.exp(scale - top)
    normaliser = torch.exp(exact - top) + (one.denominator - own).clamp_(min=0.0) * weight
    large = own.clamp(min=FAINT) * weight > ROUGH * normaliser
    return (large | ~torch.isfinite(taken[:-1].sum(-1))) & (one.denominator > 0)


def _taken_again(
    one: _Head, taken: Tensor, rough: Tensor, panels: Iterator[BucketPanels]
) -> tuple[Tensor, Tensor]:
    """B in fp64, made again for the rows ``rough`` [G N]; and those of them beyond what fp64 multiplies."""
    rows, keys, beyond = _factors(one, torch.float64)
    wanted = torch.cat([rough, rough.new_zeros(1)])
    again = torch.zeros_like(one.sums)
    for batch in panels:
        some = wanted[batch.into].any(-1)
        if bool(some.any()):
            own = BucketPanels(
                batch.head, batch.rows[some], batch.into[some], batch.keys[some], batch.drop[some]
            )
            _take(again, rows, keys, own, one.sound)
    return torch.where(wanted.unsqueeze(-1), again, taken), beyond & rough


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
    one.difference.sum_again(rows, one.rows[rows], one.keys, one.values, outside)
