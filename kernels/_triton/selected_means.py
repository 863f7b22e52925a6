"""Blocks that a selection left out, as their means: ``kernels.math.remainder`` on the device.

    lse_rem_i = log sum over left-out b of  L e^(scale <q_i, kmean_b>)
    dropped_i = sigmoid(lse_rem_i - lse_i)
    out_i += g dropped_i (m_i - out_i),   m_i = sum over left-out b of p_ib vmean_b

and, to find the gate g, each row's terms of the least-squares fit: what the means of the *listed* blocks
predict against what these blocks gave. A tile's rows share one row of the table of chosen blocks, so that
blocks are masked and never gathered. Means are fp32, and so are the products.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.launch import Launch, Work
from kernels._triton.primitives import LN_2, LOG2_E, power_of_two
from kernels._triton.selected_rows import NUM_WARPS, RowTiles, packed_rows
from kernels._triton.targets import Target
from kernels.math.query_tiles import QueryTiles
from kernels.math.summaries import Summary

Task = Literal["share", "merge", "fit"]
"""share: only ``dropped``. merge: the rows too. fit: the terms of the gate."""
BLOCK_N = 32
BLOCK_D = 32


@triton.jit(
    do_not_specialize=[
        "k_head",
        "v_head",
        "table_head",
        "table_tile",
        "lse_h",
        "row_h",
        "gate_h",
        "num_blocks",
    ]
    + ["first_tile"]
)
def means_kernel(
    Q,
    KMEAN,
    VMEAN,
    TABLE,
    TILES,
    OUT,
    LSE,
    OWN_OUT,
    OWN_LSE,
    GATE,
    RESULT,
    SIZE,
    q_h,
    q_n,
    k_head,
    k_row,
    v_head,
    v_row,
    table_head,
    table_tile,
    out_h,
    out_n,
    own_h,
    own_n,
    lse_h,
    row_h,
    gate_h,
    num_blocks,
    first_tile,
    scale_log2,
    log2_block,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PER_TILE: tl.constexpr,
    CAUSAL: tl.constexpr,
    TASK: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    key_head = tl.program_id(1).to(tl.int64)
    row, member, live, first, last, tile = packed_rows(TILES, tl.program_id(0), GROUP, ROWS, BLOCK_M)
    head = key_head * GROUP + member
    begin = (first_tile + tile) * PER_TILE
    width = num_blocks
    if CAUSAL:
        width = tl.minimum(num_blocks, begin)
    dv = tl.arange(0, BLOCK_DV)
    rows = Q + (head * q_h + row.to(tl.int64) * q_n)[:, None]
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    table = TABLE + key_head * table_head + tile.to(tl.int64) * table_tile
    found = 0
    for start in tl.range(0, width, BLOCK_N):
        blocks = start + tl.arange(0, BLOCK_N)
        counts = blocks < width
        if not CAUSAL:
            counts &= (blocks < begin) | (blocks >= begin + PER_TILE)
        listed = tl.load(table + blocks, mask=counts, other=0)
        if TASK == "fit":
            counts &= listed != 0
        else:
            counts &= listed == 0
        found += tl.sum(counts.to(tl.int32))
        keys = KMEAN + key_head * k_head + (blocks.to(tl.int64) * k_row)[None]
        logits = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for begin_d in tl.range(0, D, BLOCK_D):  # rows in fp32 and their tf32 parts would fill all registers
            d = begin_d + tl.arange(0, BLOCK_D)
            q = tl.load(rows + d[None], mask=live[:, None] & (d < D)[None], other=0.0).to(tl.float32)
            k = tl.load(keys + d[:, None], mask=counts[None] & (d < D)[:, None], other=0.0)
            logits = tl.dot(q, k, logits, input_precision="tf32x3")
        logits = logits * scale_log2 + log2_block
        logits = tl.where(counts[None], logits, float("-inf"))
        best = tl.maximum(m, tl.max(logits, 1))
        base = tl.where(best == float("-inf"), 0.0, best)
        weights = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(m - base)
        l = l * shrink + tl.sum(weights, 1)
        if TASK != "share":
            v_at = VMEAN + key_head * v_head + (blocks.to(tl.int64) * v_row)[:, None] + dv[None]
            v = tl.load(v_at, mask=counts[:, None] & (dv < DV)[None], other=0.0)
            acc = tl.dot(weights, v, acc * shrink[:, None], input_precision="tf32x3")
        m = best
    lse_at = LSE + head * lse_h + row
    lse = tl.load(lse_at, mask=live, other=0.0)
    means = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    out_at = OUT + (head * out_h + row.to(tl.int64) * out_n)[:, None] + dv[None]
    inside = live[:, None] & (dv < DV)[None]
    if TASK == "fit":
        out = tl.load(out_at, mask=inside, other=0.0)
        at = OWN_OUT + (head * own_h + row.to(tl.int64) * own_n)[:, None] + dv[None]
        own = tl.load(at, mask=inside, other=0.0)
        share = 1.0 - tl.exp(tl.load(OWN_LSE + head * lse_h + row, mask=live, other=0.0) - lse)
        share = tl.where(found == 0, 0.0, share)
        towards = tl.where(inside, means - own, 0.0)
        fit = tl.sum(towards * (out - own), 1)
        size = tl.sum(towards * towards, 1) * share
        counts_row = (tl.abs(fit) < float("inf")) & (tl.abs(size) < float("inf"))
        tl.store(RESULT + head * row_h + row, tl.where(counts_row, fit, 0.0), mask=live)
        tl.store(SIZE + head * row_h + row, tl.where(counts_row, size, 0.0), mask=live)
    else:
        part = (m + tl.log2(tl.where(l == 0.0, 1.0, l))) * LN_2
        share = 1.0 / (1.0 + tl.exp(lse - part))
        share = tl.where(found == 0, 0.0, share)
        kept_is_finite = tl.abs(lse) < float("inf")
        dropped = tl.where(share != share, tl.where(kept_is_finite, 1.0, 0.0), share)
        tl.store(RESULT + head * row_h + row, dropped, mask=live)
        if TASK == "merge" and found > 0:
            weight = share
            if GATED:
                weight *= tl.load(GATE + head * gate_h + tile, mask=live, other=0.0)
            out = tl.load(out_at, mask=inside, other=0.0)
            tl.store(out_at, out + weight[:, None] * (means - out), mask=inside)
            top = tl.maximum(lse, part)
            both = top + tl.log(tl.exp(lse - top) + tl.exp(part - top))
            tl.store(lse_at, both, mask=live)


def over_means(
    task: Task,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    known: Summary,
    table: Tensor,
    tiles: QueryTiles,
    rows: RowTiles,
    scale: float,
    result: Tensor,
    *,
    own: tuple[Tensor, Tensor] | None = None,
    size: Tensor | None = None,
    gate: Tensor | None = None,
) -> Launch:
    """One pass over the means for rows q [H, N, D], out [H, N, Dv] fp32 and lse [H, N].

    ``result`` [H, N]: ``dropped``, or, with ``size`` and ``own`` (out and lse before the lists), the terms of
    the fit. ``gate`` [H, num_tiles] scales what is merged. ``lse``, ``result``, ``size``, own lse are dense.
    """
    H, _, D = q.shape
    Hk, num_blocks, Dv = len(known.kmean), table.shape[2], out.shape[2]
    group = H // Hk
    own_out, own_lse = own if own is not None else (out, lse)
    pairs = float(H * q.shape[1] * num_blocks) / (2 if tiles.causal else 1)
    return Launch(
        kernel="block_means",
        fn=means_kernel,
        grid=(rows.num_tiles, Hk),
        args={
            "Q": q,
            "KMEAN": known.kmean,
            "VMEAN": known.vmean,
            "TABLE": table,
            "TILES": rows.table,
            "OUT": out,
            "LSE": lse,
            "OWN_OUT": own_out,
            "OWN_LSE": own_lse,
            "GATE": lse if gate is None else gate,
            "RESULT": result,
            "SIZE": result if size is None else size,
            "q_h": q.stride(0),
            "q_n": q.stride(1),
            "k_head": known.kmean.stride(0),
            "k_row": known.kmean.stride(1),
            "v_head": known.vmean.stride(0),
            "v_row": known.vmean.stride(1),
            "table_head": table.stride(0),
            "table_tile": table.stride(1),
            "out_h": out.stride(0),
            "out_n": out.stride(1),
            "own_h": own_out.stride(0),
            "own_n": own_out.stride(1),
            "lse_h": lse.stride(0),
            "row_h": result.stride(0),
            "gate_h": 0 if gate is None else gate.stride(0),
            "num_blocks": num_blocks,
            "first_tile": tiles.start // tiles.height,
            "scale_log2": float(scale * LOG2_E),
            "log2_block": math.log2(tiles.block),
        },
        constants={
            "GROUP": group,
            "ROWS": rows.rows,
            "D": D,
            "DV": Dv,
            "PER_TILE": tiles.height // tiles.block,
            "CAUSAL": tiles.causal,
            "TASK": task,
            "GATED": gate is not None,
            "BLOCK_M": rows.block_m,
            "BLOCK_N": BLOCK_N,
            "BLOCK_D": min(BLOCK_D, power_of_two(D)),
            "BLOCK_DV": power_of_two(Dv),
        },
        num_warps=NUM_WARPS,
        num_stages=1 if task == "share" and q.element_size() == 4 else 2,  # where neither spills
        sizes=frozenset(
            ("k_head", "v_head", "table_head", "table_tile", "lse_h", "row_h", "gate_h", "num_blocks")
            + ("first_tile",)
        ),
        work=Work(
            flops=2.0 * pairs * (D if task == "share" else D + Dv),
            exps=pairs,
            bytes=float(q.nbytes + known.kmean.nbytes + 2 * out.nbytes * (task != "share")),
        ),
        notes={"task": task, "group": group},
    )


def gate_of(fit: Tensor, size: Tensor, tiles: QueryTiles) -> Tensor:
    """[H, N] terms of rows -> g [H, num_tiles], see ``kernels.math.remainder.gate``."""
    before, after = tiles.start % tiles.height, -(tiles.start + fit.shape[1]) % tiles.height
    padded = (torch.nn.functional.pad(x, (before, after)) for x in (fit, size))
    fits, sizes = (x.unflatten(1, (-1, tiles.height)).sum(-1) for x in padded)
    slope = torch.where(sizes > 0, fits / sizes.clamp_min(torch.finfo(sizes.dtype).tiny), 1.0)
    return slope.clamp_(0.0, 1.0).square_()


def examples(target: Target, dtype: torch.dtype, head_dim: int) -> Iterable[Launch]:
    """What 16,384 rows leave out of 256 blocks, 32 query heads of 8 key heads."""
    H, Hk, N, T, L = 32, 8, 16384, 256, 64

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    q, out, lse = empty(H, N, head_dim, dtype=dtype), empty(H, N, head_dim), empty(H, N)
    known = Summary(L, *(empty(Hk, N // L, n * head_dim) for n in (2, 1, 1)))
    tiles = QueryTiles(T, L, 0, N, True, tuple(range(0, N + 1, T)))
    rows = RowTiles(16, 64, empty(N // 16, 4, dtype=torch.int32))
    table = empty(Hk, N // T, N // L, dtype=torch.int8)
    given = (q, out, lse, known, table, tiles, rows, head_dim**-0.5, lse)
    yield over_means("share", *given)
    yield over_means("merge", *given, gate=empty(H, N // T))
    yield over_means("fit", *given, own=(out, lse), size=lse)
