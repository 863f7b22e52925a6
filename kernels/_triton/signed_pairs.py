"""Scatterbrain pair by pair: each pair of a row and a key weighs e^(s_ij) where it is kept, else L_ij.

    out_i = sum_j w_ij v_j / sum_j w_ij,     w_ij = e^(s_ij) where the pattern keeps the pair, else L_ij
    L_ij = e^(c_i) sum_r e^(a_ir + mu_r - c_i) e^(e_jr - mu_r)
    mu_r = max over j of e_r(k_j),           c_i = max_r (a_r(q_i) + mu_r)          over one block of keys

Chen et al., "Scatterbrain" (arXiv 2110.15343), section 4, over the key blocks that a tile of rows lists; the
others come as sums (``kernels._triton.signed``). Both weights of a pair share one running maximum: nothing is
a difference of two large numbers. Rows whose pairs of a block are outweighed beyond 1e-20 by keys of it that
they do not estimate are estimated again from logarithms, by the program that finds them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.launch import Launch, Work
from kernels._triton.signed import LOG2E, Exact, alignment, feature_tile, padded, precision
from kernels._triton.targets import Target

_LN2 = tl.constexpr(0.6931471805599453)
_LOG2E = tl.constexpr(LOG2E)


@triton.jit
def estimated(
    rows, row_mask, keys, key_mask, wanted, F: tl.constexpr, BF: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """log2 L' [BM, BN] where ``wanted``: pointers to exponents of rows [BM] and keys [BN], natural."""
    found = tl.zeros([BM, BN], tl.float32)
    scale = tl.full([BM], float("-inf"), tl.float32)
    for begin in tl.range(0, F, BF):
        features = begin + tl.arange(0, BF)
        inside = (features < F)[None, :]
        a = tl.load(rows[:, None] + features[None, :], mask=row_mask[:, None] & inside, other=0.0) * _LOG2E
        e = tl.load(keys[:, None] + features[None, :], mask=key_mask[:, None] & inside, other=0.0) * _LOG2E
        a = tl.where(inside, a, float("-inf"))
        e = tl.where(key_mask[:, None], e, float("-inf"))
        known = key_mask[:, None] & inside & (tl.abs(e) < float("inf"))
        top = tl.max(tl.where(known, e, float("-inf")), 0)
        top = tl.where(top == float("-inf"), 0.0, top)
        a += top[None, :]
        new_scale = tl.maximum(scale, tl.max(a, 1))
        safe = tl.where(new_scale == float("-inf"), 0.0, new_scale)
        found = found * tl.exp2(scale - safe)[:, None]
        found = tl.dot(
            tl.exp2(a - safe[:, None]), tl.trans(tl.exp2(e - top[None, :])), found, input_precision=PRECISION
        )
        scale = new_scale
    nothing = found == 0.0
    logs = tl.log2(tl.where(nothing, 1.0, found)) + tl.where(scale == float("-inf"), 0.0, scale)[:, None]
    logs = tl.where(nothing, float("-inf"), logs)
    faint = (tl.max(tl.where(wanted, found, 0.0), 1) < 1e-20) & (tl.max(wanted.to(tl.int32), 1) > 0)
    if tl.max(faint.to(tl.int32), 0) > 0:
        logs = tl.where(faint[:, None], from_logarithms(rows, row_mask, keys, key_mask, F, BM, BN), logs)
    return logs


@triton.jit
def from_logarithms(rows, row_mask, keys, key_mask, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """log2 sum_r e^(a_ir + e_jr), one feature after the other."""
    top = tl.full([BM, BN], float("-inf"), tl.float32)
    total = tl.zeros([BM, BN], tl.float32)
    for feature in tl.range(0, F):
        a = tl.load(rows + feature, mask=row_mask, other=0.0) * _LOG2E
        e = tl.load(keys + feature, mask=key_mask, other=0.0) * _LOG2E
        both = a[:, None] + e[None, :]
        new_top = tl.maximum(top, both)
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - safe) + tl.exp2(both - safe)
        top = new_top
    nothing = total == 0.0
    return tl.where(nothing, float("-inf"), tl.log2(tl.where(nothing, 1.0, total)) + top)


@triton.jit
def products(
    rows, row_mask, keys, key_mask, D: tl.constexpr, DIM: tl.constexpr, STEP: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """<q_i, k_j> [BM, BN] of pointers to rows and keys, some dimensions at a time: fewer registers."""
    found = tl.zeros([BM, BN], tl.float32)
    for begin in tl.static_range(0, DIM, STEP):
        dims = begin + tl.arange(0, STEP)
        inside = (dims < D)[None, :]
        a = tl.load(rows[:, None] + dims[None, :], mask=row_mask[:, None] & inside, other=0.0)
        b = tl.load(keys[:, None] + dims[None, :], mask=key_mask[:, None] & inside, other=0.0)
        found = tl.dot(a, tl.trans(b), found, input_precision=PRECISION)
    return found


@triton.jit(
    do_not_specialize=[
        "num_tiles", "per_tile", "num_rows", "first_row", "num_listed", "num_keys", "start", "stop",
        "q_head", "k_head", "v_head", "keep_head", "keep_row",
    ]
)  # fmt: skip
def pairs_kernel(
    q, k, v, row_logs, key_logs, shift, keep, listed, counts, borders, out, lse, dropped, scale,
    num_tiles, per_tile, num_rows, first_row, num_listed, num_keys, start, stop, group,
    q_head, q_row, k_head, k_row, v_head, v_row, keep_head, keep_row,
    F: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, CAUSAL: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr, DIM: tl.constexpr,
    STEP: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, ESTIMATE: tl.constexpr,
):  # fmt: skip
    """Rows of one query head over the blocks that their tile lists; fills out, lse and dropped. ``row_logs``,
    ``shift`` and ``keep`` begin at the call's row ``first_row``."""
    tile = tl.program_id(0) // per_tile
    head = tl.program_id(1).to(tl.int64)
    key_head = head // group
    rows = tl.load(borders + tile) + (tl.program_id(0) % per_tile) * BM + tl.arange(0, BM)
    row_mask = rows < tl.load(borders + tile + 1)
    local = (rows - first_row).to(tl.int64)
    num_local = tl.load(borders + num_tiles) - first_row
    dims, width = tl.arange(0, DIM), tl.arange(0, WIDTH)
    k += key_head * tl.multiple_of(k_head.to(tl.int64), ALIGN)
    v += key_head * tl.multiple_of(v_head.to(tl.int64), ALIGN)
    own_rows = q + head * tl.multiple_of(q_head.to(tl.int64), ALIGN) + rows.to(tl.int64) * q_row
    if STEP == DIM:
        queries = tl.load(
            own_rows[:, None] + dims[None, :], mask=row_mask[:, None] & (dims < D)[None, :], other=0.0
        )
    exponents = row_logs + (head * num_local + local) * F
    lift = tl.load(shift + head * num_local + local, mask=row_mask, other=0.0) * _LOG2E
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    share = tl.zeros([BM], tl.float32)
    sums = tl.zeros([BM, WIDTH], tl.float32)
    own = key_head * num_tiles + tile
    for at in tl.range(0, tl.load(counts + own) * (BLOCK // BN)):
        block = tl.load(listed + own * num_listed + at // (BLOCK // BN))
        j = block * BLOCK + (at % (BLOCK // BN)) * BN + tl.arange(0, BN)
        key_mask = j < stop
        places = j.to(tl.int64)
        own_keys = k + places * k_row
        if STEP == DIM:
            keys = tl.load(
                own_keys[:, None] + dims[None, :], mask=key_mask[:, None] & (dims < D)[None, :], other=0.0
            )
            logs = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        else:
            logs = products(own_rows, row_mask, own_keys, key_mask, D, DIM, STEP, BM, BN, PRECISION) * scale
        seen = row_mask[:, None] & key_mask[None, :]
        if CAUSAL:
            seen = seen & (j[None, :] <= (rows + start)[:, None])
        kept = seen & (
            tl.load(keep + head * keep_head + local[:, None] * keep_row + places[None, :], mask=seen, other=0)
            != 0
        )
        estimates = estimated(
            exponents, row_mask, key_logs + (key_head * num_keys + places) * F, key_mask, seen & (kept == 0),
            F, BF, BM, BN, ESTIMATE,
        )  # fmt: skip
        logs = tl.where(kept, logs, estimates + lift[:, None])
        logs = tl.where(seen, logs, float("-inf"))
        new_top = tl.maximum(top, tl.max(logs, 1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.where(seen, tl.exp2(logs - safe[:, None]), 0.0)
        decay = tl.exp2(top - safe)
        total = total * decay + tl.sum(weights, 1)
        share = share * decay + tl.sum(tl.where(kept, 0.0, weights), 1)
        values = tl.load(
            v + places[:, None] * v_row + width[None, :],
            mask=key_mask[:, None] & (width < DV)[None, :],
            other=0.0,
        )
        finite = tl.abs(values.to(tl.float32)) < float("inf")
        clean = tl.where(finite, values, 0.0).to(values.dtype)
        sums = sums * decay[:, None] + tl.dot(weights.to(values.dtype), clean, input_precision=PRECISION)
        if tl.min(tl.min(finite.to(tl.int32), 1), 0) == 0:
            # a value that is not finite is felt by the rows that see its key: 0 * NaN is NaN in all rows
            broken = tl.where(finite, 0.0, 1.0).to(values.dtype)
            felt = tl.dot(seen.to(values.dtype), broken, input_precision=PRECISION)
            sums = tl.where(felt > 0.0, float("nan"), sums)
        top = new_top
    none = total == 0.0
    divisor = tl.where(none, 1.0, total)
    into = head * num_rows + rows.to(tl.int64)
    tl.store(
        out + into[:, None] * DV + width[None, :],
        sums / divisor[:, None],
        mask=row_mask[:, None] & (width < DV)[None, :],
    )
    tl.store(lse + into, tl.where(none, float("-inf"), (top + tl.log2(divisor)) * _LN2), mask=row_mask)
    tl.store(dropped + into, share / divisor, mask=row_mask)


@dataclass(frozen=True)
class Stretch:
    """Rows of one sequence that are computed together, and what they list.

    ``borders`` int32 [T + 1]: rows of the call where their tiles begin and end, the first ``first_row``;
    ``listed`` int32 [Hk, T, P] blocks, of which the first ``counts`` int32 [Hk, T] count; ``keep`` uint8
    [H or 1, R, M] the pairs kept; ``row_logs`` fp32 [H, R, F] and ``shift`` fp32 [H, R]; tiles have at most
    ``tallest`` rows."""

    borders: Tensor
    first_row: int
    tallest: int
    listed: Tensor
    counts: Tensor
    keep: Tensor
    row_logs: Tensor
    shift: Tensor


@dataclass(frozen=True)
class Text:
    """k [Hk, M, D], v [Hk, M, Dv] and the exponents ``logs`` fp32 [Hk, M, F] of the keys; rows see keys below
    ``stop``, and causal ones, the first of the call at position ``start``, none after themselves."""

    k: Tensor
    v: Tensor
    logs: Tensor
    start: int
    stop: int
    causal: bool
    scale: float
    block: int


def pairs(rows: Exact, text: Text, some: Stretch) -> Launch:
    """The rows of ``some`` over their listed blocks, into out, lse and dropped."""
    (H, N, D), (Hk, M, Dv), F = rows.q.shape, text.v.shape, text.logs.shape[-1]
    wide = rows.q.dtype == torch.float32
    T = some.borders.shape[0] - 1
    BM, BN = 16 if some.tallest <= 16 else 64, 16 if wide else 32
    per_tile = -(-some.tallest // BM)
    sizes = {
        "num_tiles": T,
        "per_tile": per_tile,
        "num_rows": N,
        "first_row": some.first_row,
        "num_listed": some.listed.shape[-1],
        "num_keys": M,
        "start": text.start,
        "stop": text.stop,
        "q_head": rows.q.stride(0),
        "k_head": text.k.stride(0),
        "v_head": text.v.stride(0),
        "keep_head": some.keep.stride(0) if some.keep.shape[0] > 1 else 0,
        "keep_row": some.keep.stride(1),
    }
    heads = {name: sizes.pop(name) for name in ("q_head", "k_head", "v_head", "keep_head", "keep_row")}
    args: dict[str, Tensor | int | float] = {
        "q": rows.q,
        "k": text.k,
        "v": text.v,
        "row_logs": some.row_logs,
        "key_logs": text.logs,
        "shift": some.shift,
        "keep": some.keep,
        "listed": some.listed,
        "counts": some.counts,
        "borders": some.borders,
        "out": rows.out,
        "lse": rows.lse,
        "dropped": rows.dropped,
        "scale": text.scale * LOG2E,
        **sizes,
        "group": H // Hk,
        "q_head": heads["q_head"],
        "q_row": rows.q.stride(1),
        "k_head": heads["k_head"],
        "k_row": text.k.stride(1),
        "v_head": heads["v_head"],
        "v_row": text.v.stride(1),
        "keep_head": heads["keep_head"],
        "keep_row": heads["keep_row"],
    }
    constants: dict[str, int | bool | str | float] = {
        "F": F,
        "D": D,
        "DV": Dv,
        "CAUSAL": text.causal,
        "ALIGN": alignment(rows.q, text.k, text.v),
        "BLOCK": text.block,
        "BM": BM,
        "BN": BN,
        "BF": feature_tile(F, 16 if wide else 32),
        "DIM": padded(D),
        "STEP": 16 if wide else padded(D),
        "WIDTH": padded(Dv),
        "PRECISION": precision(rows.q.dtype),
        "ESTIMATE": "tf32x3" if wide else "tf32",
    }
    computed = float(H * N * M) / (2 if text.causal else 1)
    return Launch(
        "signed.pairs",
        pairs_kernel,
        (T * per_tile, H),
        args,
        constants,
        num_warps=8 if BM == 64 else 4,
        num_stages=1,
        sizes=frozenset(sizes) | frozenset(heads),
        work=Work(
            2.0 * computed * (D + Dv + F),
            2 * computed,
            computed + float(H * N * (D + F + Dv) * 4),
        ),
        notes={"rows": BM},
    )


def examples(target: Target, dtype: torch.dtype, head_dim: int) -> Iterator[Launch]:
    """A stretch of 256 rows at the end of 16,384 positions, every block listed."""
    H, Hk, R, M, F, block = 32, 8, 256, 16384, 64, 64

    def empty(*shape: int, like: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=like, device="meta")

    k = empty(Hk, M, head_dim, like=dtype)
    rows = Exact(empty(H, M, head_dim, like=dtype), empty(H, M, head_dim), empty(H, M), empty(H, M))
    ints = torch.int32
    some = Stretch(
        empty(2, like=ints), M - R, R, empty(Hk, 1, M // block, like=ints), empty(Hk, 1, like=ints),
        empty(H, R, M, like=torch.uint8), empty(H, R, F), empty(H, R),
    )  # fmt: skip
    yield pairs(rows, Text(k, k, empty(Hk, M, F), 0, M, True, head_dim**-0.5, block), some)
