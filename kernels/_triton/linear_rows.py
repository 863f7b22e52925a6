"""Rows over the state before their chunk and over the keys of their chunk, up to their own.

    before the chunk:  softmax over features, out = sum_r softmax_r(a_ir + log n_r) mean_r
    within it:         sum_j (sum_r 2^(a_ir + mu_r - m_i) 2^(e_jr - mu_r)) v_j,   mu_r over the chunk's keys

Both walk through the features once, each relative to a running maximum of its own, like softmax attention
walks through keys; the two are added by their log-sum-exp. Within the chunk mu also knows keys that a row
may not see: a row that they outweigh until its own sum is lost in rounding is marked, and ``mend_rows``
computes it again from the logarithms of its kernel values. So are rows that share a chunk with a number that
is not finite.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels._triton.linear_sums import (
    centred,
    finite_or_zero,
    half_norms,
    load_rows,
    log2_or_never,
    products,
)

_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def add_panel(top, count, total, scores, values, PRECISION: tl.constexpr):
    """One more panel of scores [m, n] (powers of 2) and values [n, d] for softmax attention."""
    both = tl.maximum(top, tl.max(scores, 1))
    safe = finite_or_zero(both)
    weights, kept = tl.exp2(scores - safe[:, None]), tl.exp2(top - safe)
    total = total * kept[:, None]
    total += tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
    return both, count * kept + tl.sum(weights, 1), total


@triton.jit
def row_norms(rows, across, there, D: tl.constexpr, PADDED_D: tl.constexpr, BLOCK_D: tl.constexpr):
    """|q|^2 of rows at distances ``across`` [m]."""
    squares = tl.zeros([across.shape[0]], tl.float32)
    for begin in tl.range(0, PADDED_D, BLOCK_D, num_stages=1):
        d = begin + tl.arange(0, BLOCK_D)
        inside = there[:, None] & (d < D)[None, :]
        squares += half_norms(tl.load(rows + across[:, None] + d[None, :], mask=inside, other=0.0), 1.0)
    return squares


@triton.jit
def put_rows(out, lse, o_b, o_h, o_g, o_n, z, b, h, g, token, there, total, count, top, drop, N, G,
             DV: tl.constexpr, PADDED_V: tl.constexpr):  # fmt: skip
    """Normalised rows and their log-sum-exp (natural), less ``drop`` (powers of 2)."""
    d = tl.arange(0, PADDED_V)
    some = (count > 0.0) | (count != count)
    rows = tl.where(some[:, None], total / tl.where(count == 0.0, 1.0, count)[:, None], 0.0)
    start = out + b * o_b + h * o_h
    places = start + (g.to(tl.int64) * o_g + token.to(tl.int64) * o_n)[:, None] + d[None, :]
    tl.store(places, rows.to(out.dtype.element_ty), mask=there[:, None] & (d < DV)[None, :])
    logs = (finite_or_zero(top) + log2_or_never(count) - drop) * _LN2
    tl.store(lse + (z * G + g) * N + token, logs, mask=there)


ROWS_SIZES = [
    "q_b",
    "q_h",
    "q_g",
    "q_n",
    "k_b",
    "k_h",
    "k_n",
    "v_b",
    "v_h",
    "v_n",
    "o_b",
    "o_h",
    "o_g",
    "o_n",
]
ROWS_SIZES += ["num_key_heads", "num_features", "N", "G", "lo", "end", "position", "first_tile"]
ROWS_SIZES += ["first_kept", "last_chunk"]


@triton.jit(do_not_specialize=ROWS_SIZES)
def feature_rows(
    q,
    k,
    v,
    w,
    centre,
    logs,
    means,
    out,
    lse,
    lost,
    q_b,
    q_h,
    q_g,
    q_n,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    o_b,
    o_h,
    o_g,
    o_n,
    num_key_heads,
    num_features,
    N,
    G,
    lo,
    end,
    position,
    first_tile,
    first_kept,
    last_chunk,
    factor,
    query_factor,
    half,
    log_features,
    faint,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PADDED_D: tl.constexpr,
    PADDED_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    CAUSAL: tl.constexpr,
    CENTRED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Rows at positions ``position`` + n over the keys lo <= j <= position + n, j < end, and over the states
    of ``chunk_states``; bidirectional rows over the last of those alone. ``lost`` int8 [programs, BLOCK_M /
    16]."""
    tile, z = first_tile + tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = z // num_key_heads, z % num_key_heads
    m = tl.arange(0, BLOCK_M)
    first = tile * (BLOCK_M // GROUP)
    at = first + m // GROUP
    token, g = at - position, tl.program_id(2) * GROUP + m % GROUP
    there = (token >= 0) & (token < N) & (g < G)
    rows = q + b * tl.multiple_of(q_b.to(tl.int64), ALIGN) + h * tl.multiple_of(q_h.to(tl.int64), ALIGN)
    across = g.to(tl.int64) * tl.multiple_of(q_g.to(tl.int64), ALIGN)
    across += token.to(tl.int64) * tl.multiple_of(q_n.to(tl.int64), ALIGN)
    if BLOCK_D == PADDED_D:
        queries = load_rows(rows, across, 1, there, D, PADDED_D)
    drop = row_norms(rows, across, there, D, PADDED_D, BLOCK_D) * half + log_features
    chunk = last_chunk
    if CAUSAL:
        chunk = tl.minimum(tl.maximum(tl.maximum(first, 0) // CHUNK, first_kept), last_chunk)
        j = chunk * CHUNK + tl.arange(0, CHUNK)
        near = (j >= lo) & (j < end)
        k += b * tl.multiple_of(k_b.to(tl.int64), ALIGN) + h * tl.multiple_of(k_h.to(tl.int64), ALIGN)
        v += b * tl.multiple_of(v_b.to(tl.int64), ALIGN) + h * tl.multiple_of(v_h.to(tl.int64), ALIGN)
        k_n = tl.multiple_of(k_n.to(tl.int64), ALIGN)
        if BLOCK_D == PADDED_D:
            keys = centred(load_rows(k, j, k_n, near, D, PADDED_D), centre + z * D, CENTRED, D, PADDED_D)
            norms = half_norms(keys, half)
        pairs = tl.zeros([BLOCK_M, CHUNK], tl.float32)
        pairs_top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    count = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, PADDED_V], tl.float32)
    state = (z * (last_chunk - first_kept + 1) + chunk - first_kept) * num_features
    w += h * num_features * D
    lean: tl.constexpr = BLOCK_D != PADDED_D  # what is the same in every step, hoisted, would be spilled
    for begin in tl.range(0, num_features, BLOCK_F, num_stages=STAGES, disable_licm=lean):
        r = begin + tl.arange(0, BLOCK_F)
        some = r < num_features
        if BLOCK_D == PADDED_D:
            directions = load_rows(w, r, D, some, D, PADDED_D)
            exponents = tl.dot(queries, tl.trans(directions), input_precision=PRECISION) * query_factor
        else:
            exponents, squares = products(
                rows, across, 1, there, w, r, some, centre, False, D, PADDED_D, BLOCK_D, PRECISION
            )
            exponents *= query_factor
        biases = tl.load(logs + state + r, mask=some, other=float("-inf"))
        values = load_rows(means + state * DV, r, DV, some, DV, PADDED_V)
        top, count, total = add_panel(top, count, total, exponents + biases[None, :], values, PRECISION)
        if CAUSAL:
            if BLOCK_D == PADDED_D:
                of_keys = (
                    tl.dot(keys, tl.trans(directions), input_precision=PRECISION) * factor - norms[:, None]
                )
            else:
                of_keys, of_key = products(
                    k,
                    j.to(tl.int64),
                    k_n,
                    near,
                    w,
                    r,
                    some,
                    centre + z * D,
                    CENTRED,
                    D,
                    PADDED_D,
                    BLOCK_D,
                    PRECISION,
                )
                of_keys = of_keys * factor - (of_key * half)[:, None]
            of_keys = tl.where(near[:, None] & some[None, :], of_keys, float("-inf"))
            largest = tl.max(of_keys, 0)
            weights = tl.exp2(of_keys - finite_or_zero(largest)[None, :]).to(k.dtype.element_ty)
            scores = exponents + largest[None, :]
            both = tl.maximum(pairs_top, tl.max(scores, 1))
            safe = finite_or_zero(both)
            of_rows = tl.exp2(scores - safe[:, None]).to(k.dtype.element_ty)
            pairs = pairs * tl.exp2(pairs_top - safe)[:, None]
            pairs += tl.dot(of_rows, tl.trans(weights), input_precision=PRECISION)
            pairs_top = both
    if CAUSAL:
        pairs = tl.where((j[None, :] <= at[:, None]) & near[None, :], pairs, 0.0)
        largest = tl.max(pairs, 1)
        own = tl.sum(pairs, 1)
        shrunk = pairs * (1.0 / tl.where(largest > 0.0, largest, 1.0))[:, None]
        values = load_rows(v, j, tl.multiple_of(v_n.to(tl.int64), ALIGN), near, DV, PADDED_V)
        both = tl.maximum(top, pairs_top)
        safe = finite_or_zero(both)
        before, within = tl.exp2(top - safe), tl.exp2(pairs_top - safe)
        known = tl.sum(tl.abs(total), 1) + count
        sound = (known == known) & (known < float("inf"))
        beside = own + count * tl.exp2(top - finite_or_zero(pairs_top))
        total = total * before[:, None]
        total += (
            tl.dot(shrunk.to(values.dtype), values, input_precision=PRECISION) * (within * largest)[:, None]
        )
        count = count * before + own * within
        top = both
        weak = (beside < faint) & (pairs_top > float("-inf"))
        size = tl.sum(tl.abs(total), 1) + count
        broken = sound & ((size != size) | (size == float("inf")))
        seen = there & (at >= lo)
        marks = ((weak | broken) & seen).to(tl.int32)
        parts: tl.constexpr = BLOCK_M // 16
        program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(
            0
        ) + tl.program_id(0)
        marks = tl.max(tl.reshape(marks, [parts, 16]), 1).to(tl.int8)
        tl.store(lost + program.to(tl.int64) * parts + tl.arange(0, parts), marks)
    put_rows(out, lse, o_b.to(tl.int64), o_h.to(tl.int64), o_g.to(tl.int64), o_n.to(tl.int64), z, b, h, g,
    token,
             there, total, count, top, drop, N, G, DV, PADDED_V)  # fmt: skip


@triton.jit(do_not_specialize=ROWS_SIZES)
def mend_rows(
    q,
    k,
    v,
    w,
    centre,
    logs,
    means,
    out,
    lse,
    lost,
    q_b,
    q_h,
    q_g,
    q_n,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    o_b,
    o_h,
    o_g,
    o_n,
    num_key_heads,
    num_features,
    N,
    G,
    lo,
    end,
    position,
    first_tile,
    first_kept,
    last_chunk,
    factor,
    query_factor,
    half,
    log_features,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PADDED_D: tl.constexpr,
    PADDED_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    CENTRED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The 16 rows of each mark that ``feature_rows`` set, again, from log2 sum_r 2^(a_ir + e_jr) of every
    pair."""
    part, tile = tl.program_id(0) % PARTS, tl.program_id(0) // PARTS
    program = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * tl.num_programs(0)
    if tl.load(lost + program + tl.program_id(0)) == 0:
        return
    z = tl.program_id(1).to(tl.int64)
    b, h = z // num_key_heads, z % num_key_heads
    m = part * 16 + tl.arange(0, 16)
    first = (first_tile + tile) * (PARTS * 16 // GROUP)
    at = first + m // GROUP
    token, g = at - position, tl.program_id(2) * GROUP + m % GROUP
    there = (token >= 0) & (token < N) & (g < G)
    rows = q + b * tl.multiple_of(q_b.to(tl.int64), ALIGN) + h * tl.multiple_of(q_h.to(tl.int64), ALIGN)
    across = g.to(tl.int64) * tl.multiple_of(q_g.to(tl.int64), ALIGN)
    across += token.to(tl.int64) * tl.multiple_of(q_n.to(tl.int64), ALIGN)
    chunk = tl.minimum(tl.maximum(tl.maximum(first, 0) // CHUNK, first_kept), last_chunk)
    k += b * tl.multiple_of(k_b.to(tl.int64), ALIGN) + h * tl.multiple_of(k_h.to(tl.int64), ALIGN)
    v += b * tl.multiple_of(v_b.to(tl.int64), ALIGN) + h * tl.multiple_of(v_h.to(tl.int64), ALIGN)
    k_n, v_n = tl.multiple_of(k_n.to(tl.int64), ALIGN), tl.multiple_of(v_n.to(tl.int64), ALIGN)
    w += h * num_features * D
    top = tl.full([16], float("-inf"), tl.float32)
    count = tl.zeros([16], tl.float32)
    total = tl.zeros([16, PADDED_V], tl.float32)
    state = (z * (last_chunk - first_kept + 1) + chunk - first_kept) * num_features
    for begin in tl.range(0, num_features, 16, disable_licm=True):
        r = begin + tl.arange(0, 16)
        some = r < num_features
        exponents, squares = products(
            rows, across, 1, there, w, r, some, centre, False, D, PADDED_D, BLOCK_D, PRECISION
        )
        exponents *= query_factor
        biases = tl.load(logs + state + r, mask=some, other=float("-inf"))
        values = load_rows(means + state * DV, r, DV, some, DV, PADDED_V)
        top, count, total = add_panel(top, count, total, exponents + biases[None, :], values, PRECISION)
    furthest = tl.minimum(tl.max(at) + 1, end)
    dv = tl.arange(0, PADDED_V)
    stop = tl.minimum(chunk * CHUNK + CHUNK, furthest)
    for block in tl.range(chunk * CHUNK, stop, 16, disable_licm=True):
        j = block + tl.arange(0, 16)
        near = (j >= lo) & (j < end)
        pair_top = tl.full([16, 16], float("-inf"), tl.float32)
        pair = tl.zeros([16, 16], tl.float32)
        for begin in tl.range(0, num_features, 16, disable_licm=True):
            r = begin + tl.arange(0, 16)
            some = r < num_features
            exponents, squares = products(
                rows, across, 1, there, w, r, some, centre, False, D, PADDED_D, BLOCK_D, PRECISION
            )
            exponents = tl.where(some[None, :], exponents * query_factor, float("-inf"))
            of_keys, of_key = products(
                k,
                j.to(tl.int64),
                k_n,
                near,
                w,
                r,
                some,
                centre + z * D,
                CENTRED,
                D,
                PADDED_D,
                BLOCK_D,
                PRECISION,
            )
            of_keys = of_keys * factor - (of_key * half)[:, None]
            both = exponents[:, None, :] + of_keys[None, :, :]
            raised = tl.maximum(pair_top, tl.max(both, 2))
            safe = finite_or_zero(raised)
            pair = pair * tl.exp2(pair_top - safe) + tl.sum(tl.exp2(both - safe[:, :, None]), 2)
            pair_top = raised
        seen = (j[None, :] <= at[:, None]) & near[None, :]
        scores = tl.where(seen, finite_or_zero(pair_top) + log2_or_never(pair), float("-inf"))
        raised = tl.maximum(top, tl.max(scores, 1))
        safe = finite_or_zero(raised)
        kept, weights = tl.exp2(top - safe), tl.exp2(scores - safe[:, None])
        count = count * kept + tl.sum(weights, 1)
        total = total * kept[:, None]
        for c in range(0, 16):
            picked = tl.arange(0, 16) == c
            one = tl.sum(tl.where(picked[None, :], weights, 0.0), 1)
            key = tl.sum(tl.where(picked, j, 0), 0)
            columns = tl.sum(tl.where(picked & near, DV, 0), 0)
            value = tl.load(v + key.to(tl.int64) * v_n + dv, mask=dv < columns, other=0.0).to(tl.float32)
            total += tl.where((key <= at)[:, None], one[:, None] * value[None, :], 0.0)
        top = raised
    drop = row_norms(rows, across, there, D, PADDED_D, BLOCK_D) * half + log_features
    put_rows(out, lse, o_b.to(tl.int64), o_h.to(tl.int64), o_g.to(tl.int64), o_n.to(tl.int64), z, b, h, g,
    token,
             there, total, count, top, drop, N, G, DV, PADDED_V)  # fmt: skip
