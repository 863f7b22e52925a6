"""A decode step over random features: a few keys more in the state, then one row over all of it.

    mu'_r = max(mu_r, e_jr),  S'_r = 2^(mu_r - mu'_r) S_r + 2^(e_jr - mu'_r) [v_j, 1]
    out = sum_r 2^(a_r + mu_r) S_r / sum_r 2^(a_r + mu_r) n_r

The state is read and written once, in fp64: a million steps add up. A program takes some of the features of
a key head and every row of its group; ``merge_steps`` adds the programs' parts up in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels._triton.linear_sums import finite_or_zero, load_rows, log2_or_never

_LN2 = tl.constexpr(0.6931471805599453)

STEP_SIZES = ["q_b", "q_h", "q_g", "k_b", "k_h", "k_n", "v_b", "v_h", "v_n"]
STEP_SIZES += ["num_key_heads", "num_features", "G", "lo", "end"]


@triton.jit(do_not_specialize=STEP_SIZES)
def feature_step(
    q,
    k,
    v,
    w,
    centre,
    known_top,
    known_sums,
    last_top,
    last_sums,
    parts,
    part_tops,
    q_b,
    q_h,
    q_g,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    num_key_heads,
    num_features,
    G,
    lo,
    end,
    factor,
    query_factor,
    half,
    D: tl.constexpr,
    DV: tl.constexpr,
    PADDED_D: tl.constexpr,
    PADDED_V: tl.constexpr,
    BLOCK_F: tl.constexpr,
    CENTRED: tl.constexpr,
    KNOWN: tl.constexpr,
):
    """Keys lo <= j < end beside the state known_top [Z, F], known_sums fp64 [Z, F, DV + 1] -> the state with
    them, and of every block of features parts [Z, G, blocks, DV + 1] relative to part_tops [Z, G, blocks]."""
    block, z = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = z // num_key_heads, z % num_key_heads
    r = block * BLOCK_F + tl.arange(0, BLOCK_F)
    there = r < num_features
    d, dv = tl.arange(0, PADDED_D), tl.arange(0, PADDED_V)
    directions = load_rows(w + h * num_features * D, r, D, there, D, PADDED_D).to(tl.float32)
    of_state = z * num_features + r
    inside = there[:, None] & (dv < DV)[None, :]
    if KNOWN:
        top = tl.load(known_top + of_state, mask=there, other=float("-inf"))
        count = tl.load(known_sums + of_state * (DV + 1) + DV, mask=there, other=0.0)
        total = tl.load(known_sums + of_state[:, None] * (DV + 1) + dv[None, :], mask=inside, other=0.0)
    else:
        top = tl.full([BLOCK_F], float("-inf"), tl.float32)
        count = tl.zeros([BLOCK_F], tl.float64)
        total = tl.zeros([BLOCK_F, PADDED_V], tl.float64)
    k += b * k_b.to(tl.int64) + h * k_h.to(tl.int64)
    v += b * v_b.to(tl.int64) + h * v_h.to(tl.int64)
    for j in range(lo, end):
        key = tl.load(k + j * k_n.to(tl.int64) + d, mask=d < D, other=0.0)
        if CENTRED:
            less = tl.load(centre + z * D + d, mask=d < D, other=0.0)
            key = (key.to(tl.float32) - less).to(key.dtype)
        key = key.to(tl.float32)
        value = tl.load(v + j * v_n.to(tl.int64) + dv, mask=dv < DV, other=0.0)
        exponents = tl.sum(directions * key[None, :], 1) * factor - tl.sum(key * key, 0) * half
        raised = tl.maximum(top, exponents)
        safe = finite_or_zero(raised)
        kept, weights = tl.exp2(top - safe).to(tl.float64), tl.exp2(exponents - safe).to(tl.float64)
        count = count * kept + weights
        total = total * kept[:, None] + weights[:, None] * value.to(tl.float64)[None, :]
        top = raised
    tl.store(last_top + of_state, top, mask=there)
    tl.store(last_sums + of_state * (DV + 1) + DV, count, mask=there)
    tl.store(last_sums + of_state[:, None] * (DV + 1) + dv[None, :], total, mask=inside)
    q += b * q_b.to(tl.int64) + h * q_h.to(tl.int64)
    for g in range(0, G):
        query = tl.load(q + g * q_g.to(tl.int64) + d, mask=d < D, other=0.0).to(tl.float32)
        scores = tl.sum(directions * query[None, :], 1) * query_factor + top
        scores = tl.where(there, scores, float("-inf"))
        largest = tl.max(scores, 0)
        weights = tl.exp2(scores - finite_or_zero(largest))
        place = (z * G + g) * tl.num_programs(0) + block
        tl.store(part_tops + place, largest)
        tl.store(parts + place * (DV + 1) + DV, tl.sum(weights * count.to(tl.float32), 0))
        part = tl.sum(weights[:, None] * total.to(tl.float32), 0)
        tl.store(parts + place * (DV + 1) + dv, part, mask=dv < DV)


MERGE_SIZES = ["q_b", "q_h", "q_g", "o_b", "o_h", "o_g", "num_key_heads", "G", "num_parts"]


@triton.jit(do_not_specialize=MERGE_SIZES)
def merge_steps(
    q,
    parts,
    part_tops,
    out,
    lse,
    q_b,
    q_h,
    q_g,
    o_b,
    o_h,
    o_g,
    num_key_heads,
    G,
    num_parts,
    half,
    log_features,
    D: tl.constexpr,
    DV: tl.constexpr,
    PADDED_D: tl.constexpr,
    PADDED_V: tl.constexpr,
):
    """out and lse [Z, G] of the parts of one row."""
    g, z = tl.program_id(0), tl.program_id(1).to(tl.int64)
    d, dv = tl.arange(0, PADDED_D), tl.arange(0, PADDED_V)
    start = (z * G + g) * num_parts
    top = tl.load(part_tops + start)
    count = tl.load(parts + start * (DV + 1) + DV)
    total = tl.load(parts + start * (DV + 1) + dv, mask=dv < DV, other=0.0)
    for part in range(1, num_parts):
        more_top = tl.load(part_tops + start + part)
        raised = tl.maximum(top, more_top)
        safe = finite_or_zero(raised)
        mine, theirs = tl.exp2(top - safe), tl.exp2(more_top - safe)
        count = count * mine + tl.load(parts + (start + part) * (DV + 1) + DV) * theirs
        more = tl.load(parts + (start + part) * (DV + 1) + dv, mask=dv < DV, other=0.0)
        total = total * mine + more * theirs
        top = raised
    b, h = z // num_key_heads, z % num_key_heads
    place = b * q_b.to(tl.int64) + h * q_h.to(tl.int64) + g.to(tl.int64) * q_g.to(tl.int64)
    query = tl.load(q + place + d, mask=d < D, other=0.0).to(tl.float32)
    drop = tl.sum(query * query, 0) * half + log_features
    some = (count > 0.0) | (count != count)
    row = tl.where(some, total / tl.where(count == 0.0, 1.0, count), 0.0)
    place = b * o_b.to(tl.int64) + h * o_h.to(tl.int64) + g.to(tl.int64) * o_g.to(tl.int64)
    tl.store(out + place + dv, row.to(out.dtype.element_ty), mask=dv < DV)
    tl.store(lse + z * G + g, (finite_or_zero(top) + log2_or_never(count) - drop) * _LN2)
