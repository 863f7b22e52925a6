"""What several kernels do in the same way: loading rows, one step of the online softmax, merging parts.

    m' = max(m, max_j s_j)
    l' = 2^(m - m') l + sum_j 2^(s_j - m'),   acc' = 2^(m - m') acc + sum_j 2^(s_j - m') v_j

Logits are in units of log 2: s = scale log2(e) <q, k>. At the end out = acc / l, lse = ln 2 (m + log2 l).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

LOG2_E = math.log2(math.e)
LN_2 = tl.constexpr(math.log(2.0))
PER_LN_2 = tl.constexpr(LOG2_E)
"""``LOG2_E`` for kernels, which see no plain numbers from outside."""


def power_of_two(number: int, least: int = 16) -> int:
    """The next power of two, at least ``least``: what a tile's side must be."""
    return max(least, 1 << (number - 1).bit_length())


def precision_of(dtype: torch.dtype) -> str:
    """How products of that dtype are taken: fp32 as three of tf32, which agrees with fp32 within rounding."""
    return "tf32x3" if dtype == torch.float32 else "ieee"


def unsigned_scale(scale: float) -> tuple[float, float]:
    """A scale as (positive one in units of log 2, sign): products are multiplied by the sign
    where it is not 1 (``SIGNED``), so that the largest product has the largest logit."""
    if scale == 0.0:
        return LOG2_E, 0.0
    return abs(scale) * LOG2_E, math.copysign(1.0, scale)


@triton.jit
def load_rows(base, places, stride, live, DIM: tl.constexpr, BLOCK: tl.constexpr, CUT: tl.constexpr):
    """Rows ``places`` (int64) [R] of a matrix of width DIM -> [R, BLOCK]; 0 beyond the width, and where
    CUT in rows that are not ``live``."""
    columns = tl.arange(0, BLOCK)
    at = base + (places * stride)[:, None] + columns[None, :]
    if CUT:
        if DIM == BLOCK:
            rows = tl.load(at, mask=live[:, None], other=0.0)
        else:
            rows = tl.load(at, mask=live[:, None] & (columns < DIM)[None, :], other=0.0)
    elif DIM == BLOCK:
        rows = tl.load(at)
    else:
        rows = tl.load(at, mask=(columns < DIM)[None, :], other=0.0)
    return rows


@triton.jit
def products(queries, keys, sign, SIGNED: tl.constexpr, PRECISION: tl.constexpr):
    """<q, k> [R, K] in fp32; times the sign of the scale where that is not 1."""
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    if SIGNED:
        scores *= sign
    return scores


@triton.jit
def softmax_weights(scores, m, scale):
    """Products [R, K], largest logit so far [R] -> weights [R, K], what earlier sums shrink by [R], the new
    largest logit. A row that has seen no key has m = -inf and weights 0."""
    m_new = tl.maximum(m, tl.max(scores, 1) * scale)
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    weights = tl.exp2(scores * scale - base[:, None])
    return weights, tl.exp2(m - base), m_new


@triton.jit
def softmax_step(scores, v, m, l, acc, scale, PRECISION: tl.constexpr):
    """Add keys with products ``scores`` [R, K] and values ``v`` [K, Dv] to the running m, l, acc."""
    weights, shrink, m = softmax_weights(scores, m, scale)
    l = l * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return m, l, acc


@triton.jit
def softmax_end(m, l, acc):
    """Running sums -> out, lse (natural log). Rows without keys: 0 and -inf."""
    total = tl.where(l == 0.0, 1.0, l)
    return acc / total[:, None], (m + tl.log2(total)) * LN_2


@triton.jit
def merged(out, lse, other_out, other_lse):
    """Two parts over disjoint keys as one, by their log-sum-exps."""
    most = tl.maximum(lse, other_lse)
    base = tl.where(most == float("-inf"), 0.0, most)
    one, other = tl.exp(lse - base), tl.exp(other_lse - base)
    both = one + other
    total = tl.where(both == 0.0, 1.0, both)
    share = other / total
    return out + share[:, None] * (other_out - out), most + tl.log(total)
