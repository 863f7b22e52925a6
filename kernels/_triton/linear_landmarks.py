"""Softmax attention of a few rows over many keys, or of many rows over a few keys, in fp32 whatever comes in.

    mean_a = 1 / (e_a - b_a) sum_{b_a <= j < e_a} x_j            landmarks, segment a of n: b_a = floor(a M /
    n) out_i = sum_j e^(s_ij - lse_i) v_j,   s_ij = scale <q_i, k_j>,   lse_i = log sum_j e^(s_ij)

What Nyström attention multiplies the results by magnifies their rounding, so neither landmarks nor weights
are rounded to 16 bits. Where there are few rows the keys are split among programs, whose parts have a
log-sum-exp each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.launch import Launch, Work
from kernels._triton.linear_sums import finite_or_zero, load_rows, log2_or_never
from kernels._triton.targets import Target, target_of

ROWS = 64
MEAN_ROWS = 32
COLUMNS = 32
_LOG2E = math.log2(math.e)
_LN2 = tl.constexpr(0.6931471805599453)

MEANS_SIZES = ["x_b", "x_h", "x_n", "num_heads", "length"]


@triton.jit(do_not_specialize=MEANS_SIZES)
def segment_means(
    x, out, x_b, x_h, x_n, num_heads, length, D: tl.constexpr, PADDED_D: tl.constexpr, ROWS: tl.constexpr
):
    """x [B, H, length, D] -> out fp32 [B, H, n, D], n the programs of a head."""
    a, z = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    count = tl.num_programs(0)
    begin, end = a * length // count, (a + 1) * length // count
    x += (z // num_heads) * x_b.to(tl.int64) + (z % num_heads) * x_h.to(tl.int64)
    d = tl.arange(0, PADDED_D)
    total = tl.zeros([PADDED_D], tl.float32)
    for at in range(begin, end, ROWS):
        j = at + tl.arange(0, ROWS)
        total += tl.sum(load_rows(x, j, x_n.to(tl.int64), j < end, D, PADDED_D).to(tl.float32), 0)
    tl.store(out + (z * count + a) * D + d, total / (end - begin).to(tl.float32), mask=d < D)


ATTEND_SIZES = ["q_b", "q_h", "q_n", "k_b", "k_h", "k_n", "v_b", "v_h", "v_n", "o_s", "o_b", "o_h", "o_n"]
ATTEND_SIZES += ["num_heads", "key_share", "N", "M", "keys_per_part"]


@triton.jit(do_not_specialize=ATTEND_SIZES)
def dense_rows(
    q,
    k,
    v,
    out,
    lse,
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    o_s,
    o_b,
    o_h,
    o_n,
    num_heads,
    key_share,
    N,
    M,
    keys_per_part,
    factor,
    D: tl.constexpr,
    DV: tl.constexpr,
    PADDED_D: tl.constexpr,
    PADDED_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Rows q [B, H, N, D] over k [B, H / key_share, M, D] and v [B, H, M, DV]: part s of the keys into out
    [S, B, H, N, DV] and lse [S, B, H, N]."""
    part, z = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    b, h = z // num_heads, z % num_heads
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    q += b * q_b.to(tl.int64) + h * q_h.to(tl.int64)
    k += b * k_b.to(tl.int64) + (h // key_share) * k_h.to(tl.int64)
    v += b * v_b.to(tl.int64) + h * v_h.to(tl.int64)
    q_n, k_n = q_n.to(tl.int64), k_n.to(tl.int64)
    rows = i.to(tl.int64)[:, None] * q_n
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    count = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, PADDED_V], tl.float32)
    begin = tl.program_id(2) * keys_per_part
    end = tl.minimum(begin + keys_per_part, M)
    for at in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        j = at + tl.arange(0, BLOCK_N)
        scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first in tl.range(0, PADDED_D, BLOCK_D, num_stages=1):
            d = first + tl.arange(0, BLOCK_D)
            inside = (d < D)[None, :]
            queries = tl.load(q + rows + d[None, :], mask=(i < N)[:, None] & inside, other=0.0).to(tl.float32)
            there = (j < end)[:, None] & inside
            keys = tl.load(k + j.to(tl.int64)[:, None] * k_n + d[None, :], mask=there, other=0.0).to(
                tl.float32
            )
            scores += tl.dot(queries, tl.trans(keys), input_precision="tf32x3")
        scores = tl.where((j < end)[None, :], scores * factor, float("-inf"))
        both = tl.maximum(top, tl.max(scores, 1))
        safe = finite_or_zero(both)
        weights, kept = tl.exp2(scores - safe[:, None]), tl.exp2(top - safe)
        values = load_rows(v, j, v_n.to(tl.int64), j < end, DV, PADDED_V).to(tl.float32)
        total = total * kept[:, None] + tl.dot(weights, values, input_precision="tf32x3")
        count = count * kept + tl.sum(weights, 1)
        top = both
    dv = tl.arange(0, PADDED_V)
    out += part * o_s.to(tl.int64) + b * o_b.to(tl.int64) + h * o_h.to(tl.int64)
    places = out + i.to(tl.int64)[:, None] * o_n.to(tl.int64) + dv[None, :]
    answer = total / tl.where(count == 0.0, 1.0, count)[:, None]
    tl.store(places, answer.to(out.dtype.element_ty), mask=(i < N)[:, None] & (dv < DV)[None, :])
    place = (part * tl.num_programs(1) + z) * N + i
    tl.store(lse + place, (finite_or_zero(top) + log2_or_never(count)) * _LN2, mask=i < N)


def means_launch(x: Tensor, out: Tensor) -> Launch:
    """x [B, H, M, D] -> out fp32 [B, H, n, D]."""
    B, H, M, D = x.shape
    return Launch(
        "segment_means",
        segment_means,
        (out.shape[2], B * H),
        {"x": x, "out": out}
        | dict(zip(("x_b", "x_h", "x_n"), x.stride(), strict=False))
        | {"num_heads": H, "length": M},
        {"D": D, "PADDED_D": _padded(D), "ROWS": MEAN_ROWS},
        sizes=frozenset(MEANS_SIZES),
        multiplies=False,
    )


def dense_launch(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, target: Target
) -> Launch:
    """Rows q [B, H, N, D] over k [B, H / share, M, D] and v [B, H, M, Dv], split into the S parts of out
    [S, B, H, N, Dv] and lse fp32 [S, B, H, N]."""
    (B, H, N, D), (_, _, M, width), parts = q.shape, v.shape, len(out)
    keys = 32 if max(D, width) <= 128 else 16
    strides: dict[str, Tensor | int | float] = {}
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        strides |= dict(zip((f"{name}_b", f"{name}_h", f"{name}_n"), tensor.stride(), strict=False))
    strides |= dict(zip(("o_s", "o_b", "o_h", "o_n"), out.stride(), strict=False))
    return Launch(
        "dense_rows",
        dense_rows,
        (-(-N // ROWS), B * H, parts),
        {"q": q, "k": k, "v": v, "out": out, "lse": lse}
        | strides
        | {"num_heads": H, "key_share": H // k.shape[1], "N": N, "M": M}
        | {"keys_per_part": -(-M // (parts * keys)) * keys, "factor": scale * _LOG2E},
        {
            "D": D,
            "DV": width,
            "PADDED_D": _padded(D),
            "PADDED_V": _padded(width),
            "BLOCK_D": min(COLUMNS, _padded(D)),
            "BLOCK_M": ROWS,
            "BLOCK_N": keys,
            "STAGES": 1,
        },
        num_warps=8,
        sizes=frozenset(ATTEND_SIZES),
    )


def num_parts(num_keys: int, num_programs: int, target: Target) -> int:
    """Into how many parts to split the keys of so many programs: none of them empty."""
    wanted = max(1, min(-(-2 * target.num_sms // num_programs), num_keys // 256, 32))
    per_part = -(-num_keys // (wanted * 32)) * 32
    return -(-num_keys // per_part)


def landmarks(x: Tensor, count: int) -> Tensor:
    """The means of ``count`` segments: x [B, H, M, D] -> fp32 [B, H, count, D]."""
    out = torch.empty(*x.shape[:2], count, x.shape[3], dtype=torch.float32, device=x.device)
    means_launch(x, out).run()
    return out


def attend_keys(rows: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Few rows [B, H, m, D] over many keys k [B, Hk, M, D], v [B, Hk, M, Dv] -> fp32 [B, H, m, Dv]."""
    (B, H, m, _), (_, Hk, M, width), target = rows.shape, v.shape, target_of(k.device)
    parts = num_parts(M, B * Hk * -(-(H // Hk * m) // ROWS), target)
    q = rows.reshape(B, Hk, H // Hk * m, rows.shape[3])
    out = torch.empty(parts, *q.shape[:3], width, dtype=torch.float32, device=k.device)
    lse = torch.empty(out.shape[:4], dtype=torch.float32, device=k.device)
    dense_launch(q, k, v, out, lse, scale, target).run()
    if parts > 1:
        out = (out * torch.softmax(lse, 0).unsqueeze(-1)).sum(0, keepdim=True)
    return out[0].view(B, H, m, width)


def attend_landmarks(q: Tensor, near_k: Tensor, values: Tensor, scale: float) -> Tensor:
    """Many rows q [B, H, N, D] over few keys [B, Hk, n, D] and values [B, H, n, Dv] -> [B, H, N, Dv], q's
    dtype."""
    B, H, N, _ = q.shape
    out = q.new_empty(B, N, H, values.shape[3]).transpose(1, 2)
    lse = torch.empty(1, B, H, N, dtype=torch.float32, device=q.device)
    dense_launch(q, near_k, values, out.unsqueeze(0), lse, scale, target_of(q.device)).run()
    return out


def _padded(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def landmark_examples(target: Target, dtype: torch.dtype, head_dim: int) -> Iterator[Launch]:
    """64 landmarks of 16,384 tokens: their means, their attention over keys, and rows' over them."""

    def new(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    H, Hk, N, n, D = 32, 8, 16384, 64, head_dim
    q, k, v = new(1, H, N, D, kind=dtype), new(1, Hk, N, D, kind=dtype), new(1, Hk, N, D, kind=dtype)
    size, scale = q.element_size(), D**-0.5
    flops, exps = 4.0 * H * N * n * D, float(H * N * n)
    yield _worked(means_launch(q, new(1, H, n, D)), Work(float(H * N * D), 0.0, float(H * N * D * size)))
    parts = num_parts(N, Hk * H // Hk * n // ROWS, target)
    rows, out, lse = (
        new(1, Hk, H // Hk * n, D),
        new(parts, 1, Hk, H // Hk * n, D),
        new(parts, 1, Hk, H // Hk * n),
    )
    over_keys = dense_launch(rows, k, v, out, lse, scale, target)
    yield _worked(over_keys, Work(flops, exps, 2.0 * Hk * N * D * size), {"over": "keys"})
    over_rows = dense_launch(
        q, new(1, Hk, n, D), new(1, H, n, D), new(1, 1, H, N, D, kind=dtype), new(1, 1, H, N), scale, target
    )
    yield _worked(over_rows, Work(flops, exps, 2.0 * H * N * D * size), {"over": "landmarks"})


def _worked(launch: Launch, work: Work, notes: dict[str, int | str] | None = None) -> Launch:
    return replace(launch, work=work, notes=notes or {})
