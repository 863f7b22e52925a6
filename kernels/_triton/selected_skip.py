"""Listed blocks whose every logit is far below the best of each row that would see it:
``kernels.math.block_skip`` on the device.

    skip block b of tile t:   exp(m_ib - m_i) < skip   for every row i of the tile, in all heads of the group

m_ib is row i's largest logit in block b, m_i its largest over the listed blocks and its own keys. Two passes
of products: the first finds m_i, the second takes what is skipped out of the table of chosen blocks. A block
with a logit that is not a number is kept, and so is every block beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.launch import Launch, Work
from kernels._triton.primitives import LOG2_E, power_of_two, precision_of
from kernels._triton.selected_rows import NUM_WARPS, RowTiles, packed_rows
from kernels._triton.targets import Target
from kernels.math.query_tiles import QueryTiles

BLOCK_N = 32


@triton.jit
def _logits(
    rows,
    live,
    K,
    first,
    num_keys,
    k_row,
    scale_log2,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows at the addresses ``rows`` [M, 1] over BLOCK_N keys from ``first``, in units of log 2."""
    keys = first + tl.arange(0, BLOCK_N)
    keys_at = K + (keys.to(tl.int64) * k_row)[None]
    logits = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin_d in tl.range(0, D, BLOCK_D):
        d = begin_d + tl.arange(0, BLOCK_D)
        q = tl.load(rows + d[None], mask=live[:, None] & (d < D)[None], other=0.0)
        k = tl.load(keys_at + d[:, None], mask=(keys < num_keys)[None] & (d < D)[:, None], other=0.0)
        logits = tl.dot(q, k, logits, input_precision=PRECISION)
    return logits * scale_log2


@triton.jit
def _best(best, broken, logits, seen):
    logits = tl.where(seen, logits, float("-inf"))
    broken |= tl.max((logits != logits).to(tl.int32), 1)
    return tl.maximum(best, tl.max(tl.where(logits != logits, float("-inf"), logits), 1)), broken


@triton.jit(
    do_not_specialize=["best_h", "indptr_head", "first_tile", "start_position", "num_keys", "whole_keys"]
)
def row_best_kernel(
    Q,
    K,
    ENTRIES,
    INDPTR,
    TILES,
    BEST,
    q_h,
    q_n,
    k_head,
    k_row,
    best_h,
    indptr_head,
    first_tile,
    start_position,
    num_keys,
    whole_keys,
    scale_log2,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    HEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    key_head = tl.program_id(1).to(tl.int64)
    row, member, live, first, last, tile = packed_rows(TILES, tl.program_id(0), GROUP, ROWS, BLOCK_M)
    head = key_head * GROUP + member
    rows = Q + (head * q_h + row.to(tl.int64) * q_n)[:, None]
    keys_of_head = K + key_head * k_head
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    broken = tl.zeros([BLOCK_M], tl.int32)
    begin = (first_tile + tile) * HEIGHT
    stop = tl.minimum(begin + HEIGHT, num_keys)
    if CAUSAL:
        stop = start_position + last + 1
    for key in tl.range(begin, stop, BLOCK_N):
        logits = _logits(
            rows, live, keys_of_head, key, stop, k_row, scale_log2, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION
        )
        keys = key + tl.arange(0, BLOCK_N)
        seen = (keys < stop)[None] & live[:, None]
        if CAUSAL:
            seen &= keys[None] <= (start_position + row)[:, None]
        best, broken = _best(best, broken, logits, seen)
    if not CAUSAL:
        for key in tl.range(tl.maximum(whole_keys, stop), num_keys, BLOCK_N):
            logits = _logits(
                rows,
                live,
                keys_of_head,
                key,
                num_keys,
                k_row,
                scale_log2,
                D,
                BLOCK_M,
                BLOCK_N,
                BLOCK_D,
                PRECISION,
            )
            seen = (key + tl.arange(0, BLOCK_N) < num_keys)[None] & live[:, None]
            best, broken = _best(best, broken, logits, seen)
    at = INDPTR + key_head * indptr_head + tile
    begin_entry, end_entry = tl.load(at).to(tl.int64), tl.load(at + 1).to(tl.int64)
    for entry in tl.range(begin_entry, end_entry):
        block_key = tl.load(ENTRIES + entry * 2)
        for piece in tl.static_range(0, BLOCK, BLOCK_N):
            key = block_key + piece
            logits = _logits(
                rows,
                live,
                keys_of_head,
                key,
                num_keys,
                k_row,
                scale_log2,
                D,
                BLOCK_M,
                BLOCK_N,
                BLOCK_D,
                PRECISION,
            )
            best, broken = _best(best, broken, logits, live[:, None])
    tl.store(BEST + head * best_h + row, tl.where(broken > 0, float("nan"), best), mask=live)


@triton.jit(
    do_not_specialize=["best_h", "indptr_head", "table_head", "table_tile", "counts_head", "num_keys"]
)
def skip_kernel(
    Q,
    K,
    ENTRIES,
    INDPTR,
    BORDERS,
    BEST,
    TABLE,
    COUNTS,
    q_h,
    q_n,
    k_head,
    k_row,
    best_h,
    indptr_head,
    table_head,
    table_tile,
    counts_head,
    num_keys,
    scale_log2,
    limit,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, key_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, stop = tl.load(BORDERS + tile), tl.load(BORDERS + tile + 1)
    keys_of_head = K + key_head * k_head
    table = TABLE + key_head * table_head + tile.to(tl.int64) * table_tile
    at = INDPTR + key_head * indptr_head + tile
    begin, end = tl.load(at).to(tl.int64), tl.load(at + 1).to(tl.int64)
    count = 0
    for entry in tl.range(begin, end):
        block_key = tl.load(ENTRIES + entry * 2)
        kept = 0
        for packed in tl.range(0, (stop - first) * GROUP, BLOCK_M):
            m = packed + tl.arange(0, BLOCK_M)
            live = m < (stop - first) * GROUP
            row, head = first + m // GROUP, key_head * GROUP + m % GROUP
            rows = Q + (head * q_h + row.to(tl.int64) * q_n)[:, None]
            best = tl.load(BEST + head * best_h + row, mask=live, other=0.0)
            for piece in tl.static_range(0, BLOCK, BLOCK_N):
                logits = _logits(
                    rows,
                    live,
                    keys_of_head,
                    block_key + piece,
                    num_keys,
                    k_row,
                    scale_log2,
                    D,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_D,
                    PRECISION,
                )
                matters = live[:, None] & ~(logits - best[:, None] < limit)
                kept |= tl.max(tl.max(matters.to(tl.int32), 1), 0)
        tl.store(table + block_key // BLOCK, kept)
        count += kept
    tl.store(COUNTS + key_head * counts_head + tile, count)


def row_best(
    q: Tensor,
    k: Tensor,
    entries: Tensor,
    indptr: Tensor,
    tiles: QueryTiles,
    rows: RowTiles,
    scale: float,
    best: Tensor,
) -> Launch:
    """Largest logit of each row of q [H, N, D] over its own keys and the listed blocks of k [Hk, M, D]: best
    [H, N], in units of log 2; NaN where one is not a number."""
    return Launch(
        kernel="row_best",
        fn=row_best_kernel,
        grid=(rows.num_tiles, len(k)),
        args={
            "Q": q,
            "K": k,
            "ENTRIES": entries,
            "INDPTR": indptr,
            "TILES": rows.table,
            "BEST": best,
            "q_h": q.stride(0),
            "q_n": q.stride(1),
            "k_head": k.stride(0),
            "k_row": k.stride(1),
            "best_h": best.stride(0),
            "indptr_head": indptr.stride(0),
            "first_tile": tiles.start // tiles.height,
            "start_position": tiles.start,
            "num_keys": tiles.num_keys,
            "whole_keys": tiles.num_keys // tiles.block * tiles.block,
            "scale_log2": float(scale * LOG2_E),
        },
        constants={
            **_constants(q, k, tiles, rows),
            "ROWS": rows.rows,
            "HEIGHT": tiles.height,
            "CAUSAL": tiles.causal,
        },
        num_warps=NUM_WARPS,
        num_stages=3,
        sizes=frozenset(("best_h", "indptr_head", "first_tile", "start_position", "num_keys", "whole_keys")),
        work=_work(q, entries, tiles),
        notes={"group": len(q) // len(k)},
    )


def skip_blocks(
    q: Tensor,
    k: Tensor,
    entries: Tensor,
    indptr: Tensor,
    tiles: QueryTiles,
    rows: RowTiles,
    scale: float,
    best: Tensor,
    borders: Tensor,
    table: Tensor,
    counts: Tensor,
    skip: float,
) -> Launch:
    """Take the skipped blocks out of ``table`` and ``counts``. ``borders`` int32: ``tiles.borders`` on the
    device."""
    return Launch(
        kernel="skip_blocks",
        fn=skip_kernel,
        grid=(tiles.num_tiles, len(k)),
        args={
            "Q": q,
            "K": k,
            "ENTRIES": entries,
            "INDPTR": indptr,
            "BORDERS": borders,
            "BEST": best,
            "TABLE": table,
            "COUNTS": counts,
            "q_h": q.stride(0),
            "q_n": q.stride(1),
            "k_head": k.stride(0),
            "k_row": k.stride(1),
            "best_h": best.stride(0),
            "indptr_head": indptr.stride(0),
            "table_head": table.stride(0),
            "table_tile": table.stride(1),
            "counts_head": counts.stride(0),
            "num_keys": tiles.num_keys,
            "scale_log2": float(scale * LOG2_E),
            "limit": math.log2(skip),
        },
        constants=_constants(q, k, tiles, rows),
        num_warps=NUM_WARPS,
        num_stages=2,
        sizes=frozenset(("best_h", "indptr_head", "table_head", "table_tile", "counts_head", "num_keys")),
        work=_work(q, entries, tiles),
        notes={"group": len(q) // len(k)},
    )


def _constants(
    q: Tensor, k: Tensor, tiles: QueryTiles, rows: RowTiles
) -> dict[str, int | bool | str | float]:
    return {
        "GROUP": len(q) // len(k),
        "D": q.shape[2],
        "BLOCK": tiles.block,
        "BLOCK_M": rows.block_m,
        "BLOCK_N": BLOCK_N,
        "BLOCK_D": min(64 if q.dtype.itemsize == 2 else 32, power_of_two(q.shape[2])),
        "PRECISION": precision_of(q.dtype),
    }


def _work(q: Tensor, entries: Tensor, tiles: QueryTiles) -> Work:
    pairs = float(len(entries)) * tiles.height * tiles.block * len(q)
    return Work(2.0 * pairs * q.shape[2], 0.0, float(q.nbytes))


def examples(target: Target, dtype: torch.dtype, head_dim: int) -> Iterable[Launch]:
    """16 listed blocks for each tile of 16,384 rows, 32 query heads of 8 key heads."""
    H, Hk, N, T, L = 32, 8, 16384, 256, 64

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    q, k = empty(H, N, head_dim, dtype=dtype), empty(Hk, N, head_dim, dtype=dtype)
    tiles = QueryTiles(T, L, 0, N, True, tuple(range(0, N + 1, T)))
    rows = RowTiles(16, 64, empty(N // 16, 4))
    best, indptr, entries = (
        empty(H, N, dtype=torch.float32),
        empty(Hk, N // T + 1),
        empty(Hk * N // T * 16, 2),
    )
    table, counts = empty(Hk, N // T, N // L, dtype=torch.int8), empty(Hk, N // T)
    given = (q, k, entries, indptr, tiles, rows, head_dim**-0.5, best)
    yield row_best(*given)
    yield skip_blocks(*given, empty(N // T + 1), table, counts, 0.01)
