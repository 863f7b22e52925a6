"""A whole call of a backend that looks into buckets: the base, the buckets, and what both left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from kernels.contract import AttentionResult, Call
from kernels.math.accumulate import Accumulator, accumulator, result
from kernels.math.bucket_part import add_buckets
from kernels.math.bucket_reference import kept_pairs
from kernels.math.bucket_row import add_row
from kernels.math.buckets import Codes, Reach, looks_beyond_base
from kernels.math.dense import grouped
from kernels.math.masked import masked_attention
from kernels.math.probe_rows import Probe, probe_dropped_mass
from kernels.math.spans import Ints, add_spans, plan_for

Coder = Callable[[Tensor, Tensor, Call], Codes]
"""q [Hk, G, N, D], k [Hk, M, D] of one sequence (causal: no key after the last row) -> its codes."""


@dataclass(frozen=True)
class Bucketing:
    """What a backend decides: its codes and how far rows look."""

    codes: Coder
    reach: Reach


def bucket_attention(q: Tensor, k: Tensor, v: Tensor, how: Bucketing, call: Call) -> AttentionResult:
    began = perf_counter()
    k, v = _visible(q, k, v, call)
    acc = accumulator(q, k, v, _alone(q, call))
    add_spans(acc, plan_for(acc, how.reach.base(call.causal)))
    if call.impl == "triton":
        return _on_device(acc, how, q, began)
    kept, flops = np.full(q.shape[1], acc.kept // q.shape[1]), 0  # the base is every head's
    if looks_beyond_base(how.reach, call, q.shape[2], k.shape[2]):
        more_kept, flops = _add_sequences(acc, how)
        kept += more_kept
    return _told(result(acc, q, began), acc, kept, flops, began)


def _add_sequences(acc: Accumulator, how: Bucketing) -> tuple[Ints, int]:
    """Pairs kept beyond the base by each query head [H], and the operations of coding."""
    kept, computed, flops = np.zeros(acc.q.shape[1] * acc.q.shape[2], np.int64), 0, 0
    for b in range(acc.q.shape[0]):
        began = perf_counter()
        codes = how.codes(acc.q[b], acc.k[b], acc.call)
        acc.selection_s += perf_counter() - began
        add = add_row if acc.q.shape[-2] == 1 else add_buckets
        more_kept, more_computed = add(acc, b, codes, how.reach)
        kept, computed, flops = kept + more_kept, computed + more_computed, flops + codes.flops
    acc.complete(int(kept.sum()), computed)
    return kept, flops


def _on_device(acc: Accumulator, how: Bucketing, q: Tensor, began: float) -> AttentionResult:
    """The same by kernels that plan and attend on the device: what they count is read after all of them."""
    B, Hk, G, N, _ = acc.q.shape
    base = acc.kept // (Hk * G)
    codes, more = _codes(acc, how), None
    if codes:
        from kernels._triton.bucketed import add_buckets
        from kernels._triton.bucketed_row import add_row

        more = (add_row if N == 1 and acc.call.causal else add_buckets)(acc, codes, how.reach)
    answer, probe = result(acc, q, began), probe_dropped_mass(acc.q, acc.k, acc.lse, acc.call)
    kept, computed = np.full(Hk * G, base), 0
    if more is not None:
        counts = torch.cat([more[0], more[1].view(1)]).cpu().numpy()
        kept, computed = kept + counts[:-1], int(counts[-1])
    acc.complete(int(kept.sum()) - acc.kept, computed)
    stats = replace(answer.stats, pairs_kept=acc.kept, pairs_computed=acc.computed)
    flops = sum(one.flops for one in codes)
    return _with_probe(replace(answer, stats=stats), probe, kept, flops, began)


def _codes(acc: Accumulator, how: Bucketing) -> list[Codes]:
    """Of every sequence; [] where buckets add nothing."""
    if not looks_beyond_base(how.reach, acc.call, acc.q.shape[-2], acc.k.shape[2]):
        return []
    began = perf_counter()
    codes = [how.codes(acc.q[b], acc.k[b], acc.call) for b in range(len(acc.q))]
    acc.selection_s += perf_counter() - began
    return codes


def bucket_reference(q: Tensor, k: Tensor, v: Tensor, how: Bucketing, call: Call) -> AttentionResult:
    """Masks of single pairs, sequence by sequence."""
    began = perf_counter()
    k, v = _visible(q, k, v, call)
    call = _alone(q, call)
    acc = accumulator(q, k, v, call)
    kept, flops = np.zeros(q.shape[1], np.int64), 0
    for b in range(len(q)):
        codes = how.codes(acc.q[b], k[b], call)
        keep = kept_pairs(codes, how.reach, call)
        kept, flops = kept + keep.sum((1, 2)).numpy(), flops + codes.flops
        one = masked_attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], keep, call)
        assert one.lse is not None
        acc.out[b] = grouped(one.out, k.shape[1])[0]
        acc.lse[b] = one.lse[0].view(acc.lse.shape[1:])
        acc.kept, acc.computed = acc.kept + one.stats.pairs_kept, acc.computed + one.stats.pairs_computed
    return _told(result(acc, q, began, impl="reference"), acc, kept, flops, began)


def _visible(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Without keys that no row of a causal call may see: they must not choose for it."""
    if not call.causal:
        return k, v
    stop = call.start + q.shape[2]
    return k[:, :, :stop], v[:, :, :stop]


def _alone(q: Tensor, call: Call) -> Call:
    """What is kept belongs to one sequence; a batch does without."""
    return call if len(q) == 1 else replace(call, kept=None)


def _told(answer: AttentionResult, acc: Accumulator, kept: Ints, flops: int, began: float) -> AttentionResult:
    """With the mass that was left out."""
    probe = probe_dropped_mass(acc.q, acc.k, acc.lse, acc.call)
    return _with_probe(answer, probe, kept, flops, began)


def _with_probe(
    answer: AttentionResult, probe: Probe, kept: Ints, flops: int, began: float
) -> AttentionResult:
    """With what ``probe`` measured, the pairs ``kept`` by each query head [H], and the operations that are
    not attention's, of a call that began then."""
    spent_ms = (perf_counter() - began) * 1e3
    stats = replace(
        answer.stats,
        dropped_mass=probe.dropped_mass,
        other_flops=flops + probe.flops,
        kept_per_head=tuple(kept.tolist()),
        compute_ms=spent_ms - answer.stats.selection_ms,
    )
    return replace(answer, stats=stats)
