"""How much of a row's softmax lies in each key block, before rows are normalised: what selections score by.

    s_jc = scale / n_j * sum_a <q_(jS + a), k_(cS + S - 1 - a)>,     sum_jb = sum_{c in block b} e^(s_jc)

S ``stride``: item j is a group of S rows (n_j of them are the call's) and c a cell of S keys, as
``kernels.math.antidiagonal`` says; with S = 1 items are single rows (or rows that stand for some, such as
their mean) and cells single keys, and the sums are those of every logit. One matrix product over S D
numbers; of its result only one number for each item and block goes to memory: log2 of the sum, in fp32.

A logit that is not finite has no weight in its block's sum; the lowest bits of the number tell that there was
one (``BROKEN``, and ``POISON`` where it was NaN or +inf): a NaN in a key must be chosen, and others must not
feel it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.launch import Launch, Work
from kernels._triton.primitives import LOG2_E, power_of_two, precision_of
from kernels._triton.targets import Target, target_of

BROKEN = tl.constexpr(1)
POISON = tl.constexpr(2)
FLAGS = tl.constexpr(3)


@triton.jit
def _log2_sums(logits, seen, PER_BLOCK: tl.constexpr):
    """[M, N] -> log2 of the sums of 2^logits over PER_BLOCK neighbours, as bits; the flags are the lowest."""
    M: tl.constexpr = logits.shape[0]
    N: tl.constexpr = logits.shape[1]
    finite = tl.abs(logits) < float("inf")
    poison = (logits != logits) | (logits == float("inf"))
    flags = tl.where(seen, tl.where(finite, 0, tl.where(poison, BROKEN | POISON, BROKEN)), 0)
    logits = tl.where(seen & finite, logits, float("-inf"))
    logits = tl.reshape(logits, (M, N // PER_BLOCK, PER_BLOCK))
    top = tl.max(logits, 2)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(logits - base[:, :, None]), 2)
    sums = tl.where(total == 0.0, float("-inf"), base + tl.log2(tl.where(total == 0.0, 1.0, total)))
    flagged = tl.max(tl.reshape(flags, (M, N // PER_BLOCK, PER_BLOCK)), 2)
    return (sums.to(tl.int32, bitcast=True) & ~FLAGS) | flagged


@triton.jit(
    do_not_specialize=["start", "num_rows", "num_keys", "first_item", "num_items", "out_head", "out_item"]
)
def block_sums_kernel(
    Q,
    K,
    OUT,
    q_part,
    q_head,
    q_row,
    k_head,
    k_row,
    out_head,
    out_item,
    start,
    num_rows,
    num_keys,
    first_item,
    num_items,
    scale_log2,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    SEEN: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(2)
    first_cell = tl.program_id(0) * BLOCK_N
    local = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    items = first_item + local
    last_item = first_item + tl.minimum(tl.program_id(1) * BLOCK_M + BLOCK_M, num_items) - 1
    if CAUSAL and first_cell * STRIDE >= (last_item + 1) * SEEN:
        return
    cells = first_cell + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_K)
    CHUNKS: tl.constexpr = (D + BLOCK_K - 1) // BLOCK_K
    queries = Q + head.to(tl.int64) * q_head
    keys = K + (head // GROUP).to(tl.int64) * k_head
    logits = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in tl.range(0, PARTS * STRIDE * CHUNKS):
        d = step % CHUNKS * BLOCK_K + dims
        a = step // CHUNKS % STRIDE
        part = step // (CHUNKS * STRIDE)
        row = items * STRIDE + a - start
        there = (row >= 0) & (row < num_rows) & (local < num_items)
        at = queries + part.to(tl.int64) * q_part + row[:, None].to(tl.int64) * q_row + d[None]
        q = tl.load(at, mask=there[:, None] & (d < D)[None], other=0.0)
        key = cells * STRIDE + STRIDE - 1 - a
        at = keys + key[None].to(tl.int64) * k_row + d[:, None]
        k = tl.load(at, mask=(key < num_keys)[None] & (d < D)[:, None], other=0.0)
        logits = tl.dot(q, k, logits, input_precision=PRECISION)
    begin = tl.maximum(items * STRIDE, start)
    height = tl.minimum(items * STRIDE + STRIDE, start + num_rows) - begin
    logits *= (scale_log2 / tl.maximum(height, 1).to(tl.float32))[:, None]
    seen = (cells * STRIDE < num_keys)[None] & (local < num_items)[:, None]
    if CAUSAL:
        seen &= cells[None] * STRIDE < (items[:, None] + 1) * SEEN
    sums = _log2_sums(logits, seen, PER_BLOCK)
    blocks = tl.program_id(0) * (BLOCK_N // PER_BLOCK) + tl.arange(0, BLOCK_N // PER_BLOCK)
    at = OUT + head.to(tl.int64) * out_head + local[:, None].to(tl.int64) * out_item + blocks[None]
    inside = (local < num_items)[:, None] & (blocks * PER_BLOCK * STRIDE < num_keys)[None]
    tl.store(at, sums, mask=inside)


@triton.jit(do_not_specialize=["start", "num_rows", "first_item", "out_part", "out_head"])
def mean_rows_kernel(
    Q,
    OUT,
    q_head,
    q_row,
    out_part,
    out_head,
    start,
    num_rows,
    first_item,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    local, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = (first_item + local) * ROWS + tl.arange(0, ROWS) - start
    there = (row >= 0) & (row < num_rows)
    d = tl.arange(0, BLOCK_D)
    at = Q + head * q_head + row[:, None].to(tl.int64) * q_row + d[None]
    rows = tl.load(at, mask=there[:, None] & (d < D)[None], other=0.0).to(tl.float32)
    mean = tl.sum(rows, 0) / tl.sum(there.to(tl.float32), 0)
    at = OUT + head * out_head + local.to(tl.int64) * D + d
    rounded = mean.to(OUT.dtype.element_ty)
    tl.store(at, rounded, mask=d < D)
    if PARTS == 2:
        tl.store(at + out_part, (mean - rounded.to(tl.float32)).to(OUT.dtype.element_ty), mask=d < D)


@dataclass(frozen=True)
class Items:
    """What is scored: item j has the call's rows among j u .. j u + u - 1 of the sequence, u ``height``, and
    sees the keys up to the last of them (causal). ``first`` .. ``first + num - 1`` are the call's.

    ``q`` [H, rows, D] with its first row at ``start``, or [parts, H, items, D] whose sum stands for the items
    (``stride`` 1, ``start`` the first item). ``num_keys``: keys that some row may see.
    """

    q: Tensor
    k: Tensor
    height: int
    stride: int
    start: int
    first: int
    num: int
    num_keys: int
    causal: bool

    @property
    def num_heads(self) -> int:
        return int(self.q.shape[-3])

    @property
    def scored(self) -> int:
        """Pairs of rows and keys at products of D numbers, over heads: what ``Stats.pairs_scored`` counts."""
        tile, _, _ = _shape(target_of(self.q.device), self.q.dtype, self.num)
        cells, made = -(-self.num_keys // self.stride), 0
        for begin in range(0, self.num, tile):
            stop = min(begin + tile, self.num)
            seen = -(-(self.first + stop) * self.height // (self.stride * _CELLS)) * _CELLS
            made += (stop - begin) * (min(seen, cells) if self.causal else cells)
        return self.num_heads * self.stride * made


_CELLS = 128


def _shape(target: Target, dtype: torch.dtype, num_items: int) -> tuple[int, int, int]:
    """BLOCK_M, BLOCK_K, num_warps."""
    if num_items <= 16:
        return 16, 64 if dtype.itemsize == 2 else 32, 4
    if dtype.itemsize == 2:
        return (128, 64, 8) if target.capability < 100 else (64, 64, 4)
    return 64, 32, 8


def block_sums(
    items: Items, out: Tensor, first: int, num: int, scale: float, block: int, target: Target | None = None
) -> Launch:
    """log2 of the sums of items ``first`` .. ``first + num - 1``, counted over the whole sequence: out int32
    [H, num or more, blocks]. Blocks that an item does not see are left unwritten or -inf."""
    D, stride = items.q.shape[-1], items.stride
    parts = len(items.q) if items.q.dim() == 4 else 1
    BLOCK_M, BLOCK_K, num_warps = _shape(target or target_of(items.q.device), items.q.dtype, num)
    cells = -(-items.num_keys // stride)
    pairs = items.num_heads * num * cells / (2 if items.causal else 1)
    return Launch(
        kernel="block_sums",
        fn=block_sums_kernel,
        grid=(-(-cells // _CELLS), -(-num // BLOCK_M), items.num_heads),
        args={
            "Q": items.q,
            "K": items.k,
            "OUT": out,
            "q_part": items.q.stride(0) if parts > 1 else 0,
            "q_head": items.q.stride(-3),
            "q_row": items.q.stride(-2),
            "k_head": items.k.stride(0),
            "k_row": items.k.stride(1),
            "out_head": out.stride(0),
            "out_item": out.stride(1),
            "start": items.start,
            "num_rows": items.q.shape[-2],
            "num_keys": items.num_keys,
            "first_item": first,
            "num_items": num,
            "scale_log2": float(scale * LOG2_E),
        },
        constants={
            "GROUP": items.num_heads // len(items.k),
            "D": D,
            "STRIDE": stride,
            "SEEN": items.height,
            "PER_BLOCK": block // stride,
            "PARTS": parts,
            "CAUSAL": items.causal,
            "BLOCK_M": BLOCK_M,
            "BLOCK_N": _CELLS,
            "BLOCK_K": BLOCK_K,
            "PRECISION": precision_of(items.q.dtype),
        },
        num_warps=num_warps,
        num_stages=3 if items.q.dtype.itemsize == 2 else 2,
        sizes=frozenset({"start", "num_rows", "num_keys", "first_item", "num_items", "out_head", "out_item"}),
        work=Work(
            flops=2.0 * pairs * stride * D * parts,
            exps=pairs,
            bytes=float(items.q.nbytes + items.k.nbytes) + 4.0 * pairs * stride / block,
        ),
        notes={"stride": stride, "items": BLOCK_M},
    )


def antidiagonal_items(q: Tensor, k: Tensor, stride: int, start: int, num_keys: int, causal: bool) -> Items:
    """Groups of ``stride`` rows (1: the rows themselves): q [H, N, D], k [Hk, M, D]."""
    first = start // stride
    num = (start + q.shape[1] - 1) // stride + 1 - first
    return Items(q, k, stride, stride, start, first, num, num_keys, causal)


def mean_items(q: Tensor, k: Tensor, height: int, start: int, num_keys: int, causal: bool) -> Items:
    """The means of ``height`` rows each, made on the device. In 16 bits a mean is the sum of two numbers."""
    first = start // height
    num = (start + q.shape[1] - 1) // height + 1 - first
    parts = 1 if q.dtype == torch.float32 else 2
    means = torch.empty(parts, len(q), num, q.shape[2], dtype=q.dtype, device=q.device)
    mean_rows(q, means, height, start, first).run()
    return Items(means[0] if parts == 1 else means, k, height, 1, first, first, num, num_keys, causal)


def mean_rows(q: Tensor, means: Tensor, height: int, start: int, first: int) -> Launch:
    """q [H, N, D] -> means [parts, H, items, D], which add up to the mean of each item's rows."""
    parts, num_heads, num, D = means.shape
    width = power_of_two(D)
    return Launch(
        kernel="mean_rows",
        fn=mean_rows_kernel,
        grid=(num, num_heads),
        args={
            "Q": q,
            "OUT": means,
            "q_head": q.stride(0),
            "q_row": q.stride(1),
            "out_part": means.stride(0),
            "out_head": means.stride(1),
            "start": start,
            "num_rows": q.shape[1],
            "first_item": first,
        },
        constants={"D": D, "ROWS": height, "PARTS": parts, "BLOCK_D": width},
        num_warps=4 if height * width <= 16384 else 8,
        num_stages=1,
        sizes=frozenset({"start", "num_rows", "first_item", "out_part", "out_head"}),
        multiplies=False,
        work=Work(flops=0.0, exps=0.0, bytes=float(q.nbytes + means.nbytes)),
        notes={"rows": height},
    )


def examples(target: Target, dtype: torch.dtype, head_dim: int) -> Iterable[Launch]:
    """Scores of xattention (stride 16), pooled (64 rows) and topk, and a decode step's."""
    H, Hk, N, block = 32, 8, 16384, 64
    q = torch.empty(H, N, head_dim, dtype=dtype, device="meta")
    k = torch.empty(Hk, N, head_dim, dtype=dtype, device="meta")
    parts = 1 if dtype == torch.float32 else 2
    means = torch.empty(parts, H, N // 64, head_dim, dtype=dtype, device="meta")
    pooled = Items(means[0] if parts == 1 else means, k, 64, 1, 0, 0, N // 64, N, True)
    row = antidiagonal_items(q[:, :1], k, 16, N - 1, N, True)
    for items in (
        antidiagonal_items(q, k, 16, 0, N, True),
        antidiagonal_items(q, k, 1, 0, N, True),
        pooled,
        row,
    ):
        out = torch.empty(H, items.num, N // block, dtype=torch.int32, device="meta")
        yield block_sums(items, out, items.first, items.num, head_dim**-0.5, block, target)
    yield mean_rows(q, means, 64, 0, 0)
