"""Sums over keys that every row of a chunk may use: what each random feature has seen.

    e_jr = root <w_r, k_j - c> - |t| |k_j - c|^2 / 2                   exponents, here in powers of 2
    state over keys:  mu_r = max_j e_jr,   n_r = sum_j 2^(e_jr - mu_r),   S_r = sum_j 2^(e_jr - mu_r) v_j
    handed to rows:   log n_r = mu_r + log2 n_r,   mean_r = S_r / n_r

A row over a state is softmax attention over features: keys w_r with biases log n_r and values mean_r, which
lie within the values' range whatever the length, so that they fit a 16-bit float. Weights of a chunk are
relative to the chunk's own maximum before they are rounded; states add up in fp32.

Stretches of chunks are summed side by side (``stretch_totals``); each program of ``chunk_states`` then adds
up the totals before its stretch and walks through its chunks, writing the state before each of them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(base, at, stride, mask, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Rows [n, PADDED] at positions ``at`` [n]; what lies beyond DIM or is masked is 0."""
    d = tl.arange(0, PADDED)
    places = base + at.to(tl.int64)[:, None] * stride + d[None, :]
    if DIM == PADDED:
        return tl.load(places, mask=mask[:, None], other=0.0)
    return tl.load(places, mask=mask[:, None] & (d < DIM)[None, :], other=0.0)


@triton.jit
def centred(x, centre, CENTRED: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr):
    """Keys [n, PADDED] without the centre [DIM], in their dtype."""
    if CENTRED:
        d = tl.arange(0, PADDED)
        x = (x.to(tl.float32) - tl.load(centre + d, mask=d < DIM, other=0.0)[None, :]).to(x.dtype)
    return x


@triton.jit
def half_norms(x, half):
    """``half`` |x|^2 of rows [n, d] -> [n] fp32."""
    wide = x.to(tl.float32)
    return tl.sum(wide * wide, 1) * half


@triton.jit
def finite_or_zero(top):
    """A maximum to subtract: 0 where there is none."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def log2_or_never(x):
    """log2 of x >= 0; -inf of 0."""
    return tl.where(x == 0.0, float("-inf"), tl.log2(tl.where(x == 0.0, 1.0, x)))


@triton.jit
def products(x, at, stride, mask, w, r, some, centre, CENTRED: tl.constexpr, D: tl.constexpr,
             PADDED_D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """<x_at - centre, w_r> [n, F'] and |x_at - centre|^2 [n], BLOCK_D columns at a time: fp32 operands of a
    whole head do not fit a thread's registers."""
    total = tl.zeros([at.shape[0], r.shape[0]], tl.float32)
    squares = tl.zeros([at.shape[0]], tl.float32)
    for begin in tl.range(0, PADDED_D, BLOCK_D, num_stages=1, loop_unroll_factor=1):
        d = begin + tl.arange(0, BLOCK_D)
        inside = (d < D)[None, :]
        rows = tl.load(x + at[:, None] * stride + d[None, :], mask=mask[:, None] & inside, other=0.0)
        if CENTRED:
            rows = (rows.to(tl.float32) - tl.load(centre + d, mask=d < D, other=0.0)[None, :]).to(rows.dtype)
        some_w = tl.load(w + r[:, None] * D + d[None, :], mask=some[:, None] & inside, other=0.0)
        total += tl.dot(rows, tl.trans(some_w), input_precision=PRECISION)
        squares += half_norms(rows, 1.0)
    return total, squares


@triton.jit
def chunk_sums(
    k,
    v,
    w,
    directions,
    r,
    there,
    centre,
    k_n,
    v_n,
    begin,
    lo,
    end,
    factor,
    half,
    CHUNK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    first_v,
    D: tl.constexpr,
    DV: tl.constexpr,
    PADDED_D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CENTRED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """mu [F'], n [F'] and S [F', BLOCK_V] of the keys of one chunk for the directions w_r, which are handed
    over as ``directions`` [F', D] where BLOCK_D is all of D."""
    j = begin + tl.arange(0, CHUNK)
    near = (j >= lo) & (j < end)
    if BLOCK_D == PADDED_D:
        keys = centred(load_rows(k, j, k_n, near, D, PADDED_D), centre, CENTRED, D, PADDED_D)
        exponents = tl.dot(directions, tl.trans(keys), input_precision=PRECISION) * factor
        exponents -= half_norms(keys, half)[None, :]
    else:
        across, squares = products(
            k, j.to(tl.int64), k_n, near, w, r, there, centre, CENTRED, D, PADDED_D, BLOCK_D, PRECISION
        )
        exponents = tl.trans(across * factor - (squares * half)[:, None])
    exponents = tl.where(near[None, :], exponents, float("-inf"))
    top = tl.max(exponents, 1)
    weights = tl.exp2(exponents - finite_or_zero(top)[:, None])
    d = first_v + tl.arange(0, BLOCK_V)
    places = v + j.to(tl.int64)[:, None] * v_n + d[None, :]
    values = tl.load(places, mask=near[:, None] & (d < DV)[None, :], other=0.0)
    return top, tl.sum(weights, 1), tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)


@triton.jit
def joined(top, count, sums, more_top, more_count, more_sums):
    """Two states as one."""
    both = tl.maximum(top, more_top)
    safe = finite_or_zero(both)
    mine, theirs = tl.exp2(top - safe), tl.exp2(more_top - safe)
    return both, count * mine + more_count * theirs, sums * mine[:, None] + more_sums * theirs[:, None]


_SIZES = ["k_b", "k_h", "k_n", "v_b", "v_h", "v_n", "num_key_heads", "num_features", "lo", "end"]
_SIZES += ["first_chunk", "last_chunk", "chunks_per_stretch", "num_stretches"]
TOTALS_SIZES = _SIZES
STATES_SIZES = [*_SIZES, "first_stretch", "first_kept"]


@triton.jit(do_not_specialize=TOTALS_SIZES)
def stretch_totals(
    k,
    v,
    w,
    centre,
    tops,
    counts,
    sums,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    num_key_heads,
    num_features,
    lo,
    end,
    first_chunk,
    last_chunk,
    chunks_per_stretch,
    num_stretches,
    factor,
    half,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PADDED_D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    CENTRED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """States of stretches by themselves: tops, counts [Z, num_stretches, F], sums [Z, num_stretches, F,
    DV]."""
    stretch, z = tl.program_id(0), tl.program_id(2).to(tl.int64)
    num_blocks: tl.constexpr = (DV + BLOCK_V - 1) // BLOCK_V
    r = (tl.program_id(1) // num_blocks) * BLOCK_F + tl.arange(0, BLOCK_F)
    first_v = (tl.program_id(1) % num_blocks) * BLOCK_V
    b, h = z // num_key_heads, z % num_key_heads
    k += b * tl.multiple_of(k_b.to(tl.int64), ALIGN) + h * tl.multiple_of(k_h.to(tl.int64), ALIGN)
    v += b * tl.multiple_of(v_b.to(tl.int64), ALIGN) + h * tl.multiple_of(v_h.to(tl.int64), ALIGN)
    k_n, v_n = tl.multiple_of(k_n.to(tl.int64), ALIGN), tl.multiple_of(v_n.to(tl.int64), ALIGN)
    there = r < num_features
    w += h * num_features * D
    directions = load_rows(w, r, D, there, D, PADDED_D) if BLOCK_D == PADDED_D else w
    top = tl.full([BLOCK_F], float("-inf"), tl.float32)
    count = tl.zeros([BLOCK_F], tl.float32)
    total = tl.zeros([BLOCK_F, BLOCK_V], tl.float32)
    at = first_chunk + stretch * chunks_per_stretch
    stop = tl.minimum(at + chunks_per_stretch, last_chunk)
    for chunk in tl.range(at, stop, num_stages=STAGES):
        more = chunk_sums(
            k, v, w, directions, r, there, centre + z * D, k_n, v_n, chunk * CHUNK, lo, end, factor, half,
            CHUNK, BLOCK_V, first_v, D, DV, PADDED_D, BLOCK_D, CENTRED, PRECISION,
        )  # fmt: skip
        top, count, total = joined(top, count, total, more[0], more[1], more[2])
    place = (z * num_stretches + stretch) * num_features + r
    d = first_v + tl.arange(0, BLOCK_V)
    inside = there[:, None] & (d < DV)[None, :]
    tl.store(tops + place, top, mask=there)
    tl.store(counts + place, count, mask=there)
    tl.store(sums + place[:, None] * DV + d[None, :], total, mask=inside)


@triton.jit
def write_state(logs, means, place, d, top, count, total, there, DV: tl.constexpr):
    """A state as rows use it, at ``place`` [F'] of ``logs`` and of ``means``."""
    some = count > 0.0
    tl.store(logs + place, finite_or_zero(top) + log2_or_never(count), mask=there)
    mean = tl.where(
        (some | (count != count))[:, None], total / tl.where(count == 0.0, 1.0, count)[:, None], 0.0
    )
    inside = there[:, None] & (d < DV)[None, :]
    tl.store(means + place[:, None] * DV + d[None, :], mean.to(means.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=STATES_SIZES)
def chunk_states(
    k,
    v,
    w,
    centre,
    tops,
    counts,
    sums,
    known_top,
    known_sums,
    logs,
    means,
    last_top,
    last_sums,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    num_key_heads,
    num_features,
    lo,
    end,
    first_chunk,
    last_chunk,
    chunks_per_stretch,
    num_stretches,
    first_stretch,
    first_kept,
    factor,
    half,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PADDED_D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    CENTRED: tl.constexpr,
    KNOWN: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The state before each chunk from ``first_kept`` on, and after the last: logs [Z, X, F], means
    [Z, X, F, DV] with X = last_chunk - first_kept + 1. ``known_top`` [Z, F] and ``known_sums`` fp64
    [Z, F, DV + 1] tell of the keys before ``lo``; ``last_*`` get the state after all keys, as they have
    it."""
    stretch, z = first_stretch + tl.program_id(0), tl.program_id(2).to(tl.int64)
    num_blocks: tl.constexpr = (DV + BLOCK_V - 1) // BLOCK_V
    r = (tl.program_id(1) // num_blocks) * BLOCK_F + tl.arange(0, BLOCK_F)
    first_v = (tl.program_id(1) % num_blocks) * BLOCK_V
    d = first_v + tl.arange(0, BLOCK_V)
    there = r < num_features
    inside = there[:, None] & (d < DV)[None, :]
    of_state = z * num_features + r
    if KNOWN:
        top = tl.load(known_top + of_state, mask=there, other=float("-inf"))
        count = tl.load(known_sums + of_state * (DV + 1) + DV, mask=there, other=0.0).to(tl.float32)
        places = known_sums + of_state[:, None] * (DV + 1) + d[None, :]
        total = tl.load(places, mask=inside, other=0.0).to(tl.float32)
    else:
        top = tl.full([BLOCK_F], float("-inf"), tl.float32)
        count = tl.zeros([BLOCK_F], tl.float32)
        total = tl.zeros([BLOCK_F, BLOCK_V], tl.float32)
    for before in range(0, stretch):
        place = (z * num_stretches + before) * num_features + r
        more_top = tl.load(tops + place, mask=there, other=float("-inf"))
        more_count = tl.load(counts + place, mask=there, other=0.0)
        more = tl.load(sums + place[:, None] * DV + d[None, :], mask=inside, other=0.0)
        top, count, total = joined(top, count, total, more_top, more_count, more)
    b, h = z // num_key_heads, z % num_key_heads
    k += b * tl.multiple_of(k_b.to(tl.int64), ALIGN) + h * tl.multiple_of(k_h.to(tl.int64), ALIGN)
    v += b * tl.multiple_of(v_b.to(tl.int64), ALIGN) + h * tl.multiple_of(v_h.to(tl.int64), ALIGN)
    k_n, v_n = tl.multiple_of(k_n.to(tl.int64), ALIGN), tl.multiple_of(v_n.to(tl.int64), ALIGN)
    w += h * num_features * D
    directions = load_rows(w, r, D, there, D, PADDED_D) if BLOCK_D == PADDED_D else w
    num_states = last_chunk - first_kept + 1
    at = tl.minimum(first_chunk + stretch * chunks_per_stretch, last_chunk)
    stop = tl.minimum(at + chunks_per_stretch, last_chunk)
    for chunk in tl.range(at, stop, num_stages=STAGES):
        if chunk >= first_kept:
            place = (z * num_states + chunk - first_kept) * num_features + r
            write_state(logs, means, place, d, top, count, total, there, DV)
        more = chunk_sums(
            k, v, w, directions, r, there, centre + z * D, k_n, v_n, chunk * CHUNK, lo, end, factor, half,
            CHUNK, BLOCK_V, first_v, D, DV, PADDED_D, BLOCK_D, CENTRED, PRECISION,
        )  # fmt: skip
        top, count, total = joined(top, count, total, more[0], more[1], more[2])
    if tl.program_id(0) == tl.num_programs(0) - 1:
        place = (z * num_states + last_chunk - first_kept) * num_features + r
        write_state(logs, means, place, d, top, count, total, there, DV)
        if KEEP:
            tl.store(last_top + of_state, top, mask=there)
            tl.store(last_sums + of_state * (DV + 1) + DV, count.to(tl.float64), mask=there)
            places = last_sums + of_state[:, None] * (DV + 1) + d[None, :]
            tl.store(places, total.to(tl.float64), mask=inside)
