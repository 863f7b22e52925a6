"""Exact softmax of a few rows that lie anywhere in a sequence, and the squares of their errors.

    o_i = sum_j e^(s_ij - lse_i) v_j,      s_ij = scale * <q_i, k_j>,      j <= i where causal
    x_i = |(o^_i - o_i) W|^2,      y_i = |o_i W|^2,      heads_h = sum_i |(o^_ih - o_ih) W_h|^2 / pi_i

Few rows would leave a chip idle: the keys are cut into splits that many programs share, each with its own
partial softmax; a second kernel merges them by log-sum-exp (Dao, "Flash-Decoding", 2023). The G query heads
of a key head lie beside each other in a tile, so that a key is read once for all of them; rows are taken last
position first, so that a tile holds rows that see about equally many keys and the longest begin first.

The squares are computed with W as it lies in memory: as matrix products in torch they would take an fp32 copy
of W and every head's [R, E] product at once, here neither exists.

R rows, S splits, E model width; other letters as in ``kernels.contract``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.launch import Launch, Work
from kernels._triton.operands import ALIGNED_BYTES
from kernels._triton.primitives import LN_2, LOG2_E, PER_LN_2, power_of_two
from kernels._triton.targets import Target, target_of

MIN_TILE, MIN_TILE_FP32 = 64, 32
"""Rows and query heads of a tile: what one warp group multiplies at a time; in fp32, which is multiplied in
three parts, what its registers hold."""
MIN_SPLIT_KEYS = 512
PROGRAMS_PER_SM = 4
MERGED_ROWS = 16
SQUARED_ROWS, SQUARED_WIDTH, SQUARED_DEPTH = 64, 32, 16
EXAMPLE_ROWS, EXAMPLE_KEYS, EXAMPLE_HEADS, EXAMPLE_KEY_HEADS = 128, 16384, 32, 8


@triton.jit
def _add_keys(
    q, m, l, acc, k_at, v_at, k_position, v_position, first, stop, last, log2_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, VALUES: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys first .. stop of the tile, each seen by the rows whose ``last`` key is not before it. MASKED: rows
    differ in what they see. A value that is not finite makes the rows that see it NaN and no others."""
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    for begin in tl.range(first, stop, BLOCK_N):
        j = begin + tl.arange(0, BLOCK_N)
        far = j.to(tl.int64)
        there = j < stop
        k_mask = there[:, None]
        if D != BLOCK_D:
            k_mask = k_mask & (d < D)[None, :]
        k = tl.load(k_at + far[:, None] * k_position + d[None, :], mask=k_mask, other=0.0)
        s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION) * log2_scale
        seen = there[None, :]
        if MASKED:
            seen = seen & (j[None, :] <= last[:, None])
        s = tl.where(seen, s, float("-inf"))
        highest = tl.maximum(m, tl.max(s, 1))
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        p = tl.exp2(s - shift[:, None])
        shrink = tl.exp2(m - shift)
        l = l * shrink + tl.sum(p, 1)
        m = highest
        if VALUES:
            v_mask = there[:, None]
            if DV != BLOCK_DV:
                v_mask = v_mask & (dv < DV)[None, :]
            v = tl.load(v_at + far[:, None] * v_position + dv[None, :], mask=v_mask, other=0.0)
            acc = acc * shrink[:, None]
            if MASKED:
                nothing = v.to(tl.float32) * 0.0
                felt = tl.sum(nothing, 1)
                acc += tl.sum(tl.where(seen, felt[None, :], 0.0), 1)[:, None]
                v = tl.where(nothing == 0.0, v, 0.0)
            high = p.to(v.dtype)
            acc = tl.dot(high, v, acc, input_precision=PRECISION)
            if v.dtype != tl.float32:
                acc = tl.dot((p - high.to(tl.float32)).to(v.dtype), v, acc, input_precision=PRECISION)
    return m, l, acc


@triton.jit(do_not_specialize=[
    "num_rows", "num_keys", "split_keys", "q_batch", "q_head", "q_row", "k_batch", "k_head", "k_position",
    "v_batch", "v_head", "v_position",
])  # fmt: skip
def _row_softmax(
    q_base, k_base, v_base, table, out, lse,
    q_batch, q_head, q_row, k_batch, k_head, k_position, v_batch, v_head, v_position,
    num_rows, num_keys, split_keys, log2_scale,
    HK: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, VALUES: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows, batch entry and key head, split of the keys). table int32 [3, R]: row of q, last
    key that it sees, row of the result; last positions first. out [S, B, H, R, Dv] and lse [S, B, H, R] fp32;
    of a split that a row sees nothing of only lse is written."""
    tile, split = tl.program_id(0), tl.program_id(2)
    batch, key_head = (tl.program_id(1) // HK).to(tl.int64), (tl.program_id(1) % HK).to(tl.int64)
    if ALIGNED > 1:
        k_batch, k_head = tl.multiple_of(k_batch, ALIGNED), tl.multiple_of(k_head, ALIGNED)
        v_batch, v_head = tl.multiple_of(v_batch, ALIGNED), tl.multiple_of(v_head, ALIGNED)
        k_position = tl.multiple_of(k_position, ALIGNED)
        v_position = tl.multiple_of(v_position, ALIGNED)
    ROWS: tl.constexpr = BLOCK_M // GROUP
    at, g = tile * ROWS + tl.arange(0, BLOCK_M) // GROUP, tl.arange(0, BLOCK_M) % GROUP
    live = (at < num_rows) & (g < G)
    row = tl.load(table + at, mask=live, other=0).to(tl.int64)
    if CAUSAL:
        last = tl.load(table + num_rows + at, mask=live, other=-1)
        least = tl.min(tl.where(live, last, num_keys - 1), 0) + 1
        most = tl.minimum(tl.max(last, 0) + 1, num_keys)
    else:
        last = tl.where(live, num_keys - 1, -1)
        least = num_keys
        most = num_keys
    place = tl.load(table + 2 * num_rows + at, mask=live, other=0).to(tl.int64)
    entry = split.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    to = (entry * G + g) * num_rows + place
    first = split * split_keys
    if first >= most:
        tl.store(lse + to, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=live)
        return
    head = key_head * G + g
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    q_at = q_base + batch * q_batch + head[:, None] * q_head + row[:, None] * q_row + d[None, :]
    q = tl.load(q_at, mask=live[:, None] & (d < D)[None, :], other=0.0)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV if VALUES else 1], tl.float32)
    stop = tl.minimum(first + split_keys, most)
    k_at, v_at = k_base + batch * k_batch + key_head * k_head, v_base + batch * v_batch + key_head * v_head
    whole = first
    if CAUSAL:
        whole += tl.maximum(tl.minimum(stop, least) - first, 0) // BLOCK_N * BLOCK_N
        m, l, acc = _add_keys(
            q, m, l, acc, k_at, v_at, k_position, v_position, first, whole, last, log2_scale,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, VALUES, False, PRECISION,
        )  # fmt: skip
    m, l, acc = _add_keys(
        q, m, l, acc, k_at, v_at, k_position, v_position, whole, stop, last, log2_scale,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, VALUES, CAUSAL, PRECISION,
    )  # fmt: skip
    none = l == 0.0
    tl.store(lse + to, tl.where(none, float("-inf"), (m + tl.log2(tl.where(none, 1.0, l))) * LN_2), mask=live)
    if VALUES:
        acc = acc / tl.where(none, 1.0, l)[:, None]
        tl.store(out + to[:, None] * DV + dv[None, :], acc, mask=live[:, None] & (dv < DV)[None, :])


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def _row_merge(
    parts, lses, out, lse, num_rows, num_splits,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Program (rows). parts [S, rows, Dv], lses [S, rows] -> out [rows, Dv], lse [rows]: rows and heads are
    one axis here. Splits are added in order: the same bits every time."""
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    dv, live = tl.arange(0, BLOCK_DV), row < num_rows
    m = tl.full([BLOCK_R], float("-inf"), tl.float32)
    at = row
    for _ in range(num_splits):
        part = tl.load(lses + at, mask=live, other=float("-inf"))
        at += num_rows
        m = tl.where((part > m) | (part != part), part, m)
    shift = tl.where(m == float("-inf"), 0.0, m)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_DV if VALUES else 1], tl.float32)
    at = row
    for _ in range(num_splits):
        part = tl.load(lses + at, mask=live, other=float("-inf"))
        weight = tl.exp2((part - shift) * PER_LN_2)
        total += weight
        if VALUES:
            seen = (live & (part != float("-inf")))[:, None] & (dv < DV)[None, :]
            o = tl.load(parts + at[:, None] * DV + dv[None, :], mask=seen, other=0.0)
            acc += weight[:, None] * o
        at += num_rows
    none = total == 0.0
    tl.store(
        lse + row,
        tl.where(none, float("-inf"), shift + tl.log2(tl.where(none, 1.0, total)) * LN_2),
        mask=live,
    )
    if VALUES:
        acc = acc / tl.where(none, 1.0, total)[:, None]
        tl.store(out + row[:, None] * DV + dv[None, :], acc, mask=live[:, None] & (dv < DV)[None, :])


@triton.jit(do_not_specialize=["num_rows", "width", "depth", "e_head", "e_row", "u_head", "u_row", "w_row"])
def _row_squares(
    exact, used, w, heads, totals, num_rows, width, depth, e_head, e_row, u_head, u_row, w_row,
    H: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (rows, piece of the width). exact [H, R, Dv] fp32, used [H, R, Dv], w [E, H Dv] -> squares
    summed over the piece: of each head's error into heads [pieces, H, R], of the errors' sum and of the
    output into totals [pieces, 2, R]. ``depth`` is Dv again, told at run time: a loop of known length would
    be unrolled and hold more than there are registers."""
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    piece = tl.program_id(1).to(tl.int64)
    column = piece * BLOCK_E + tl.arange(0, BLOCK_E)
    live = row < num_rows
    if ALIGNED > 1:
        w_row = tl.multiple_of(w_row, ALIGNED)
    error = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    output = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    dv = tl.arange(0, BLOCK_K)
    o_at = exact + row[:, None] * e_row + dv[None, :]
    u_at = used + row[:, None] * u_row + dv[None, :]
    w_at = w + column[:, None] * w_row + dv[None, :]
    for h in range(H):
        far = tl.cast(h, tl.int64)
        of_head = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
        for first in tl.range(0, depth, BLOCK_K):
            there = (dv < DV - first)[None, :]
            o = tl.load(o_at + (far * e_head + first), mask=live[:, None] & there, other=0.0)
            u = tl.load(u_at + (far * u_head + first), mask=live[:, None] & there, other=0.0)
            part = tl.load(w_at + (far * DV + first), mask=(column < width)[:, None] & there, other=0.0)
            part = tl.trans(part.to(tl.float32))
            of_head = tl.dot(u.to(tl.float32) - o, part, of_head, input_precision=PRECISION)
            output = tl.dot(o, part, output, input_precision=PRECISION)
        error += of_head
        tl.store(heads + (piece * H + h) * num_rows + row, tl.sum(of_head * of_head, 1), mask=live)
    tl.store(totals + piece * 2 * num_rows + row, tl.sum(error * error, 1), mask=live)
    tl.store(totals + (piece * 2 + 1) * num_rows + row, tl.sum(output * output, 1), mask=live)


@dataclass(frozen=True)
class RowSoftmax:
    """out [B, H, R, Dv] or None, lse [B, H, R] (natural log, -inf without a key), both fp32."""

    out: Tensor | None
    lse: Tensor


def row_table(rows: Tensor, last_keys: Tensor, device: torch.device) -> Tensor:
    """int32 [3, R] of rows of q [R] and the last key that each sees [R]: what ``row_softmax`` takes. On the
    CPU it is made there and goes over in one copy."""
    order = torch.argsort(last_keys, descending=True, stable=True)
    table = torch.stack([rows.to(order.device)[order], last_keys[order], order])
    return table.to(torch.int32).to(device, non_blocking=True)


def row_softmax(
    q: Tensor, k: Tensor, v: Tensor | None, table: Tensor, *, scale: float, causal: bool
) -> RowSoftmax:
    """Exact softmax of the rows of q [B, H, N, D] that ``table`` names over k [B, Hk, M, D], M >= 1, and
    v [B, Hk, M, Dv] (None: the log-sum-exp alone). Weights keep 16 bits and more where v is narrow: its
    products are taken of a weight's high and low part, so that the answer is good to about 1e-5."""
    q = q.to(torch.promote_types(q.dtype, k.dtype))
    softmax = softmax_launch(q, k, v, table, scale=scale, causal=causal, target=target_of(q.device))
    softmax.run()
    parts, lses = (softmax.args[name] for name in ("out", "lse"))
    assert isinstance(parts, Tensor) and isinstance(lses, Tensor)
    if len(lses) > 1:
        merge = merge_launch(parts, lses, values=v is not None)
        merge.run()
        parts, lses = (merge.args[name] for name in ("out", "lse"))
        assert isinstance(parts, Tensor) and isinstance(lses, Tensor)
    return RowSoftmax(None if v is None else parts.reshape(parts.shape[-4:]), lses.reshape(lses.shape[-3:]))


def softmax_launch(
    q: Tensor, k: Tensor, v: Tensor | None, table: Tensor, *, scale: float, causal: bool, target: Target
) -> Launch:
    """Its ``out`` [S, B, H, R, Dv] and ``lse`` [S, B, H, R] are made here."""
    B, H, _, D = q.shape
    Hk, M = k.shape[1:3]
    R, values, widest = table.shape[1], k if v is None else v, max(D, D if v is None else v.shape[-1])
    group = power_of_two(H // Hk, 1)
    wide = max(q.element_size(), values.element_size())
    block_m = max(MIN_TILE_FP32 if wide == 4 else MIN_TILE, group)
    block_n, num_warps, num_stages = _tile(target, wide, widest)
    tiles = -(-R // (block_m // group))
    split_keys = _split_keys(tiles * B * Hk, M, block_n, target)
    S = -(-M // split_keys)
    out = q.new_empty((S, B, H, R, values.shape[-1]) if v is not None else (1,), dtype=torch.float32)
    strides = _strides("q", q) | _strides("k", k) | _strides("v", values)
    sizes = {**strides, "num_rows": R, "num_keys": M, "split_keys": split_keys}
    return Launch(
        kernel="row_softmax",
        fn=_row_softmax,
        grid=(tiles, B * Hk, S),
        args={
            "q_base": q,
            "k_base": k,
            "v_base": values,
            "table": table,
            "out": out,
            "lse": q.new_empty((S, B, H, R), dtype=torch.float32),
            **sizes,
            "log2_scale": float(scale * LOG2_E),
        },
        constants={
            "HK": Hk,
            "G": H // Hk,
            "GROUP": group,
            "D": D,
            "DV": values.shape[-1],
            "BLOCK_D": power_of_two(D),
            "BLOCK_DV": power_of_two(values.shape[-1]),
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "CAUSAL": causal,
            "VALUES": v is not None,
            "ALIGNED": _aligned(k, values),
            "PRECISION": "tf32x3" if wide == 4 else "ieee",
        },
        num_warps=num_warps,
        num_stages=num_stages,
        sizes=frozenset(sizes),
        notes={"causal": int(causal), "values": int(v is not None)},
    )


def merge_launch(parts: Tensor, lses: Tensor, *, values: bool) -> Launch:
    """parts [S, B, H, R, Dv] (without ``values``: anything), lses [S, B, H, R] -> ``out`` [B, H, R, Dv] and
    ``lse`` [B, H, R], made here."""
    num_rows, Dv = lses[0].numel(), parts.shape[-1] if values else 1
    return Launch(
        kernel="row_merge",
        fn=_row_merge,
        grid=(-(-num_rows // MERGED_ROWS),),
        args={
            "parts": parts,
            "lses": lses,
            "out": parts.new_empty(parts.shape[1:] if values else 1),
            "lse": lses.new_empty(lses.shape[1:]),
            "num_rows": num_rows,
            "num_splits": len(lses),
        },
        constants={
            "DV": Dv,
            "BLOCK_DV": power_of_two(Dv, 1),
            "BLOCK_R": MERGED_ROWS,
            "VALUES": values,
        },
        sizes=frozenset({"num_rows", "num_splits"}),
        multiplies=False,
        notes={"values": int(values)},
    )


def row_squares(exact: Tensor, used: Tensor, w_o: Tensor) -> tuple[Tensor, Tensor]:
    """exact fp32 and used [H, R, Dv], R >= 1, w_o [E, H Dv] -> fp32 |(used - exact)_h W_h|^2 [H, R], and x
    and y [2, R]."""
    launch = squares_launch(exact, used, w_o, target=target_of(exact.device))
    launch.run()
    heads, totals = launch.args["heads"], launch.args["totals"]
    assert isinstance(heads, Tensor) and isinstance(totals, Tensor)
    return heads.sum(0), totals.sum(0)


def squares_launch(exact: Tensor, used: Tensor, w_o: Tensor, *, target: Target) -> Launch:
    """Its ``heads`` [pieces, H, R] and ``totals`` [pieces, 2, R] are made here."""
    H, R, Dv = exact.shape
    width = w_o.shape[0]
    pieces = -(-width // SQUARED_WIDTH)
    sizes = {
        "num_rows": R,
        "width": width,
        "depth": Dv,
        "e_head": exact.stride(0),
        "e_row": exact.stride(1),
        "u_head": used.stride(0),
        "u_row": used.stride(1),
        "w_row": w_o.stride(0),
    }
    return Launch(
        kernel="row_squares",
        fn=_row_squares,
        grid=(-(-R // SQUARED_ROWS), pieces),
        args={
            "exact": exact,
            "used": used,
            "w": w_o,
            "heads": exact.new_empty(pieces, H, R),
            "totals": exact.new_empty(pieces, 2, R),
            **sizes,
        },
        constants={
            "H": H,
            "DV": Dv,
            "BLOCK_K": SQUARED_DEPTH,
            "BLOCK_R": SQUARED_ROWS,
            "BLOCK_E": SQUARED_WIDTH,
            "ALIGNED": ALIGNED_BYTES // w_o.element_size() if _is_aligned(w_o, w_o.element_size()) else 1,
            "PRECISION": "tf32x3",
        },
        num_warps=4,
        num_stages=2,
        sizes=frozenset(sizes),
    )


def _tile(target: Target, itemsize: int, dim: int) -> tuple[int, int, int]:
    """Keys of a step, warps, stages."""
    if dim > 128:
        return (16, 8, 1) if itemsize == 4 else (32, 8, 2)
    if itemsize == 4:
        return (16, 4 if dim <= 64 else 8, 2)
    return (32 if dim <= 64 or target.capability >= 100 else 16, 4, 3)


def _split_keys(programs: int, num_keys: int, block: int, target: Target) -> int:
    """Keys of a split, so that each multiprocessor has a few programs, where there are keys enough."""
    wanted = -(-PROGRAMS_PER_SM * target.num_sms // max(1, programs))
    splits = max(1, min(wanted, num_keys // MIN_SPLIT_KEYS))
    return -(-num_keys // (splits * block)) * block


def _strides(name: str, tensor: Tensor) -> dict[str, int]:
    batch, head, row, _ = tensor.stride()
    return {
        f"{name}_batch": batch,
        f"{name}_head": head,
        f"{name}_{'row' if name == 'q' else 'position'}": row,
    }


def _aligned(k: Tensor, v: Tensor) -> int:
    """Elements that every stride is a multiple of: 16 bytes of the narrower, or 1."""
    itemsize = min(k.element_size(), v.element_size())
    return ALIGNED_BYTES // itemsize if _is_aligned(k, itemsize) and _is_aligned(v, itemsize) else 1


def _is_aligned(tensor: Tensor, itemsize: int) -> bool:
    return all(stride % (ALIGNED_BYTES // itemsize) == 0 for stride in tensor.stride()[:-1])


def examples(target: Target, dtype: torch.dtype, head_dim: int) -> Iterator[Launch]:
    """128 sampled rows of 16,384 keys, with values and without; their merge; their squares by a square W."""

    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    H, Hk, R, M = EXAMPLE_HEADS, EXAMPLE_KEY_HEADS, EXAMPLE_ROWS, EXAMPLE_KEYS
    q, k, v = empty(1, H, R, head_dim), empty(1, Hk, M, head_dim), empty(1, Hk, M, head_dim)
    table, pairs = empty(3, R, of=torch.int32), float(H * R * M)
    for causal, values in ((True, v), (False, v), (True, None)):
        launch = softmax_launch(q, k, values, table, scale=1.0, causal=causal, target=target)
        share = 0.5 if causal else 1.0
        products = 1 if values is None else 2 if dtype == torch.float32 else 3
        flops, read = 2.0 * head_dim * pairs * share * products, k.nbytes * (1 if values is None else 2)
        yield replace(launch, work=Work(flops, pairs * share, float(read)))
    parts, lses = empty(8, 1, H, R, head_dim, of=torch.float32), empty(8, 1, H, R, of=torch.float32)
    yield replace(merge_launch(parts, lses, values=True), work=Work(0.0, 8.0 * H * R, float(parts.nbytes)))
    exact, w_o = empty(H, R, head_dim, of=torch.float32), empty(H * head_dim, H * head_dim)
    squares = squares_launch(exact, empty(H, R, head_dim), w_o, target=target)
    flops = 4.0 * R * (H * head_dim) ** 2
    yield replace(squares, work=Work(flops, 0.0, float(w_o.nbytes + 2 * exact.nbytes)))
