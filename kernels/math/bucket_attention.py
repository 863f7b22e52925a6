"""A whole call of a backend that looks into buckets: the base, the buckets, and what both left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from time import perf_counter

from torch import Tensor

from kernels.contract import AttentionResult, Call
from kernels.math.accumulate import Accumulator, accumulator, result
from kernels.math.bucket_part import add_buckets
from kernels.math.bucket_reference import kept_pairs
from kernels.math.bucket_row import add_row
from kernels.math.buckets import Codes, Reach, looks_beyond_base
from kernels.math.dense import grouped
from kernels.math.masked import masked_attention
from kernels.math.probe_rows import probe_dropped_mass
from kernels.math.spans import add_spans, plan_for

Coder = Callable[[Tensor, Tensor, Call], Codes]
"""q [Hk, G, N, D], k [Hk, M, D] of one sequence (causal: no key after the last row) -> its codes."""


@dataclass(frozen=True)
class Bucketing:
    """What a backend decides: its codes, their cost and how far rows look. ``flops(num_rows, num_keys, D)``
    is what one key head of one row group takes to code that many rows and keys."""

    codes: Coder
    reach: Reach
    flops: Callable[[int, int, int], int]


def bucket_attention(q: Tensor, k: Tensor, v: Tensor, how: Bucketing, call: Call) -> AttentionResult:
    began = perf_counter()
    k, v = _visible(q, k, v, call)
    acc = accumulator(q, k, v, _alone(q, call))
    add_spans(acc, plan_for(acc, how.reach.base(call.causal)))
    coded = looks_beyond_base(how.reach, call, q.shape[2], k.shape[2])
    if coded:
        _add_sequences(acc, how)
    return _told(result(acc, q, began), acc, how, coded)


def _add_sequences(acc: Accumulator, how: Bucketing) -> None:
    kept = computed = 0
    for b in range(acc.q.shape[0]):
        began = perf_counter()
        codes = how.codes(acc.q[b], acc.k[b], acc.call)
        acc.selection_s += perf_counter() - began
        add = add_row if acc.q.shape[-2] == 1 else add_buckets
        more_kept, more_computed = add(acc, b, codes, how.reach)
        kept, computed = kept + more_kept, computed + more_computed
    acc.complete(kept, computed)


def bucket_reference(q: Tensor, k: Tensor, v: Tensor, how: Bucketing, call: Call) -> AttentionResult:
    """Masks of single pairs, sequence by sequence."""
    began = perf_counter()
    k, v = _visible(q, k, v, call)
    call = _alone(q, call)
    acc = accumulator(q, k, v, call)
    for b in range(len(q)):
        keep = kept_pairs(how.codes(acc.q[b], k[b], call), how.reach, call)
        one = masked_attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], keep, call)
        assert one.lse is not None
        acc.out[b] = grouped(one.out, k.shape[1])[0]
        acc.lse[b] = one.lse[0].view(acc.lse.shape[1:])
        acc.kept, acc.computed = acc.kept + one.stats.pairs_kept, acc.computed + one.stats.pairs_computed
    return _told(result(acc, q, began, impl="reference"), acc, how, True)


def _visible(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Without keys that no row of a causal call may see: they must not choose for it."""
    if not call.causal:
        return k, v
    stop = call.start + q.shape[2]
    return k[:, :, :stop], v[:, :, :stop]


def _alone(q: Tensor, call: Call) -> Call:
    """What is kept belongs to one sequence; a batch does without."""
    return call if len(q) == 1 else replace(call, kept=None)


def _told(answer: AttentionResult, acc: Accumulator, how: Bucketing, coded: bool) -> AttentionResult:
    """With the mass that was left out, and the operations that are not attention's."""
    began = perf_counter()
    probe = probe_dropped_mass(acc.q, acc.k, acc.lse, acc.call)
    B, heads, G, N, D = acc.q.shape
    flops = B * heads * how.flops(G * N, acc.k.shape[2], D) if coded else 0
    stats = replace(
        answer.stats,
        dropped_mass=probe.dropped_mass,
        other_flops=flops + probe.flops,
        compute_ms=answer.stats.compute_ms + (perf_counter() - began) * 1e3,
    )
    return replace(answer, stats=stats)
