"""One query row per sequence over runs of its keys and chosen pages, for many sequences in one launch.

    s_j = scale <q, k_j>,   part of an item: m = max s, l = sum e^(s_j - m), o = sum e^(s_j - m) v_j / l
    out = sum_items w o / sum_items w,   w = e^(lse_item - max lse)

Split-K as in Flash-Decoding (Dao et al., 2023): a row's keys are divided among programs
(``kernels._triton.paged_plan``), and a second kernel merges their parts by log-sum-exp, in the items' order:
two runs give the same bits. The G query heads of a key head are rows of one tile, so that each key is read
once for all of them. Memory bound: a step takes the time to read its keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.launch import Launch, Work
from kernels._triton.operands import SEQUENCE_COLUMNS, Keys
from kernels._triton.paged_plan import ITEM_COLUMNS, PIECE_COLUMNS, DecodePlan
from kernels._triton.primitives import LN_2, LOG2_E, power_of_two, precision_of
from kernels._triton.targets import Target

LEAST_ROWS, MOST_ROWS = 16, 32
"""Rows of a tile: what a matrix instruction takes at least, and what registers hold beside the values."""
_MERGED = 16


@triton.jit(do_not_specialize=["q_row", "q_key_head", "q_head", "pages_list", "pages_head"])
def _attend_kernel(
    q,
    k,
    v,
    table,
    items,
    pieces,
    pages,
    out,
    lse,
    scale_log2,
    q_row,
    q_key_head,
    q_head,
    pages_list,
    pages_head,
    num_heads,
    GROUP: tl.constexpr,
    HEADS_PER_KEY_HEAD: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
    ALIGN: tl.constexpr,
    SINGLE: tl.constexpr,
    PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr,
    ITEM: tl.constexpr,
    PIECE: tl.constexpr,
):
    item = tl.program_id(0).to(tl.int64)
    tiles: tl.constexpr = (GROUP + BLOCK_M - 1) // BLOCK_M
    head = tl.program_id(1) // tiles
    key_head = head // HEADS_PER_KEY_HEAD
    member = (tl.program_id(1) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    own = member < GROUP
    d, dv, n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), tl.arange(0, BLOCK_N)

    row = tl.load(items + item * ITEM).to(tl.int64)
    begin, end = tl.load(items + item * ITEM + 1), tl.load(items + item * ITEM + 2)
    at = table + row * COLUMNS
    k_base, v_base = tl.multiple_of(tl.load(at), ALIGN), tl.multiple_of(tl.load(at + 1), ALIGN)
    k_head, k_key = tl.multiple_of(tl.load(at + 2), ALIGN), tl.multiple_of(tl.load(at + 3), ALIGN)
    v_head, v_key = tl.multiple_of(tl.load(at + 4), ALIGN), tl.multiple_of(tl.load(at + 5), ALIGN)
    k_rows = k + k_base + key_head.to(tl.int64) * k_head
    v_rows = v + v_base + key_head.to(tl.int64) * v_head
    within = (head % HEADS_PER_KEY_HEAD) * GROUP + member
    q_at = row * q_row + key_head.to(tl.int64) * q_key_head + within.to(tl.int64) * q_head
    query = tl.load(q + q_at[:, None] + d[None, :], mask=own[:, None] & (d < D)[None, :], other=0.0)

    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    about = pieces + begin.to(tl.int64) * PIECE
    for _ in range(begin, end):
        first, step, count = tl.load(about), tl.load(about + 1), tl.load(about + 2)
        listed = tl.load(about + 3)
        about += PIECE
        for a in tl.range(0, count, BLOCK_N):
            number = a + n
            seen = number < count
            key = first + number * step
            if PAGE > 0:
                is_list = n * 0 + listed >= 0
                entries = pages + tl.maximum(listed, 0).to(tl.int64) * pages_list
                place = first + number
                page = tl.load(
                    entries + head.to(tl.int64) * pages_head + place // PAGE, mask=seen & is_list, other=0
                )
                key = tl.where(is_list, page * PAGE + place % PAGE, key)
                seen = seen & (page >= 0)
            here = key.to(tl.int64)[:, None]
            k_seen, v_seen = seen[:, None], seen[:, None]
            if D < BLOCK_D:
                k_seen = k_seen & (d < D)[None, :]
            if DV < BLOCK_DV:
                v_seen = v_seen & (dv < DV)[None, :]
            keys = tl.load(k_rows + here * k_key + d[None, :], mask=k_seen, other=0.0)
            s = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale_log2
            s = tl.where(seen[None, :], s, -float("inf"))
            peak = tl.maximum(m, tl.max(s, 1))
            base = tl.where(peak == -float("inf"), 0.0, peak)
            p = tl.exp2(s - base[:, None])
            old = tl.exp2(m - base)
            values = tl.load(v_rows + here * v_key + dv[None, :], mask=v_seen, other=0.0)
            l = l * old + tl.sum(p, 1)
            acc = acc * old[:, None]
            acc = tl.dot(p.to(values.dtype), values, acc, input_precision=PRECISION)
            m = peak
    l = tl.where(l == 0.0, 1.0, l)
    acc = acc / l[:, None]
    to = (row if SINGLE else item) * num_heads + head.to(tl.int64) * GROUP + member
    told = m + tl.log2(l)
    if SINGLE:
        told = told * LN_2
    tl.store(lse + to, told, mask=own)
    there = own[:, None] & (dv < DV)[None, :]
    tl.store(out + to[:, None] * DV + dv[None, :], acc.to(out.dtype.element_ty), mask=there)


@triton.jit
def _merge_kernel(
    parts,
    parts_lse,
    indptr,
    out,
    lse,
    num_heads,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    begin, end = tl.load(indptr + row), tl.load(indptr + row + 1)
    some, dv = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_DV)
    m = -float("inf")
    l = 0.0
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for a in range(begin, end, BLOCK_S):
        there = a + some < end
        at = (a + some).to(tl.int64) * num_heads + head
        told = tl.load(parts_lse + at, mask=there, other=-float("inf"))
        peak = tl.maximum(m, tl.max(told, 0))
        base = tl.where(peak == -float("inf"), 0.0, peak)
        weight = tl.exp2(told - base)
        old = tl.exp2(m - base)
        values = tl.load(
            parts + at[:, None] * DV + dv[None, :], mask=there[:, None] & (dv < DV)[None, :], other=0.0
        )
        l = l * old + tl.sum(weight, 0)
        acc = acc * old + tl.sum(weight[:, None] * values, 0)
        m = peak
    l = tl.where(l == 0.0, 1.0, l)
    to = row * num_heads + head
    tl.store(lse + to, (m + tl.log2(l)) * LN_2)
    tl.store(out + to * DV + dv, (acc / l).to(out.dtype.element_ty), mask=dv < DV)


@dataclass(frozen=True)
class Queries:
    """q [rows, Hk, G, D], a view of one row per sequence with a dense last dimension; ``dtype`` of what is
    returned."""

    q: Tensor
    dtype: torch.dtype

    @property
    def num_heads(self) -> int:
        return self.q.shape[1] * self.q.shape[2]


@dataclass(frozen=True)
class Pages:
    """int32 [lists, heads, n]: numbers of pages of ``size`` keys, -1 for none; ``heads`` is Hk, or H where
    every query head has a list of its own."""

    numbers: Tensor
    size: int


def decode(
    queries: Queries, keys: Keys, plan: DecodePlan, scale: float, pages: Pages | None = None
) -> tuple[Tensor, Tensor]:
    """Every row over its runs and lists: out [rows, H, Dv] in ``queries.dtype`` and lse [rows, H] fp32. A row
    without keys gets 0 and -inf."""
    out, lse = _empty(queries, plan.num_rows, keys.value_dim, queries.dtype)
    if plan.single and pages is None:  # with pages a variant that only a crowd would ask for, and compile
        attend_launch(queries, keys, plan, scale, out, lse, pages, single=True).run()
        return out, lse
    parts, parts_lse = _empty(queries, len(plan.items), keys.value_dim, torch.float32)
    attend_launch(queries, keys, plan, scale, parts, parts_lse, pages).run()
    merge_launch(parts, parts_lse, plan.indptr, out, lse).run()
    return out, lse


def _empty(queries: Queries, num_rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    q, shape = queries.q, (num_rows, queries.num_heads)
    out = torch.empty(*shape, width, dtype=dtype, device=q.device)
    return out, torch.empty(shape, dtype=torch.float32, device=q.device)


def attend_launch(
    queries: Queries,
    keys: Keys,
    plan: DecodePlan,
    scale: float,
    out: Tensor,
    lse: Tensor,
    pages: Pages | None = None,
    *,
    single: bool = False,
) -> Launch:
    """Every item of the plan into ``out`` [items, H, Dv] and ``lse`` [items, H] (base 2); ``single``: into
    the rows' own places, and natural."""
    q = queries.q
    num_key_heads, group = q.shape[1], q.shape[2]
    own_lists = pages is not None and pages.numbers.shape[1] != num_key_heads
    rows = 1 if own_lists else group
    per_key_head = group if own_lists else 1
    block_m = min(MOST_ROWS, power_of_two(rows, LEAST_ROWS))
    block_n = _keys_of_step(q.element_size(), max(keys.key_dim, keys.value_dim))
    grid = len(plan.items), num_key_heads * per_key_head * -(-rows // block_m)
    numbers = plan.items if pages is None else pages.numbers
    return Launch(
        "paged_decode",
        _attend_kernel,
        grid,
        {
            "q": q,
            "k": keys.k,
            "v": keys.v,
            "table": keys.table,
            "items": plan.items,
            "pieces": plan.pieces,
            "pages": numbers,
            "out": out,
            "lse": lse,
            "scale_log2": float(scale * LOG2_E),
            "q_row": q.stride(0),
            "q_key_head": q.stride(1),
            "q_head": q.stride(2),
            "pages_list": 0 if pages is None else numbers.stride(0),
            "pages_head": 0 if pages is None else numbers.stride(1),
            "num_heads": queries.num_heads,
        },
        {
            "GROUP": rows,
            "HEADS_PER_KEY_HEAD": per_key_head,
            "D": keys.key_dim,
            "DV": keys.value_dim,
            "BLOCK_D": power_of_two(keys.key_dim),
            "BLOCK_DV": power_of_two(keys.value_dim),
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "PAGE": 0 if pages is None else pages.size,
            "ALIGN": 16 // q.element_size() if keys.aligned else 1,
            "SINGLE": single,
            "PRECISION": precision_of(q.dtype),
            "COLUMNS": SEQUENCE_COLUMNS,
            "ITEM": ITEM_COLUMNS,
            "PIECE": PIECE_COLUMNS,
        },
        num_warps=4,
        num_stages=3 if pages is None else 4,  # the number of a page is read before its keys
        sizes=_CHANGING,
    )


_CHANGING = frozenset({"q_row", "q_key_head", "q_head", "pages_list", "pages_head"})


def _keys_of_step(itemsize: int, width: int) -> int:
    """At most 16 KB of keys, and as much of values, in fp16; fp32 is multiplied in three rounds, whose
    operands take registers."""
    if itemsize == 4:
        return 32 if width <= 128 else 16
    return 64 if width <= 128 else 32


def merge_launch(parts: Tensor, parts_lse: Tensor, indptr: Tensor, out: Tensor, lse: Tensor) -> Launch:
    """Parts [items, H, Dv] with lse [items, H] (base 2) -> out [rows, H, Dv], lse [rows, H] (natural)."""
    num_rows, num_heads, width = out.shape
    return Launch(
        "paged_decode_merge",
        _merge_kernel,
        (num_rows, num_heads),
        {
            "parts": parts,
            "parts_lse": parts_lse,
            "indptr": indptr,
            "out": out,
            "lse": lse,
            "num_heads": num_heads,
        },
        {"DV": width, "BLOCK_DV": power_of_two(width), "BLOCK_S": _MERGED},
        num_warps=4 if width > 128 else 2,
        num_stages=2,
        multiplies=False,
    )


def examples(target: Target, dtype: torch.dtype, head_dim: int) -> Iterator[Launch]:
    """A step of 32 sequences of 16384 keys: all keys, chosen pages, drawn keys of query heads; the merge."""
    from kernels._triton.paged_choice import choice_examples

    for group, page in ((4, 0), (4, 64), (4, 1)):
        yield _example(dtype, head_dim, group, page)
    yield _example(dtype, head_dim, 4, 0, single=True)
    yield _merge_example(dtype, head_dim)
    yield from choice_examples(target, dtype, head_dim)


def _example(dtype: torch.dtype, head_dim: int, group: int, page: int, single: bool = False) -> Launch:
    num_rows, num_keys, num_key_heads = 32, 16384, 8
    read = {0: num_keys, 1: 192}.get(page, 1024)
    items = num_rows * (1 if single else -(-read // 512))
    queries, keys = example_operands(dtype, head_dim, num_rows, num_keys, num_key_heads, group)
    plan = DecodePlan(
        _meta(items, ITEM_COLUMNS), _meta(items, PIECE_COLUMNS), _meta(num_rows + 1), single=single
    )
    pages = None
    if page:
        heads = num_key_heads * group if page == 1 else num_key_heads
        pages = Pages(_meta(num_rows, heads, read // page), page)
    places = num_rows if single else items
    out = torch.empty(places, queries.num_heads, head_dim, device="meta", dtype=dtype if single else None)
    lse = torch.empty(places, queries.num_heads, device="meta")
    launch = attend_launch(queries, keys, plan, 0.1, out, lse, pages, single=single)
    pairs = float(num_rows * queries.num_heads * read)
    heads_read = queries.num_heads if page == 1 else num_key_heads
    moved = 2.0 * num_rows * heads_read * read * head_dim * dtype.itemsize
    notes = {"group": group, "page": page, "single": int(single)}
    return replace(launch, work=Work(4 * head_dim * pairs, pairs, moved), notes=notes)


def example_operands(
    dtype: torch.dtype, head_dim: int, num_rows: int, num_keys: int, num_key_heads: int, group: int
) -> tuple[Queries, Keys]:
    """Queries and keys without memory."""
    q = torch.empty(num_rows, num_key_heads, group, head_dim, dtype=dtype, device="meta")
    k = torch.empty(num_key_heads, num_keys, head_dim, dtype=dtype, device="meta")
    table = torch.empty(num_rows, SEQUENCE_COLUMNS, dtype=torch.int64, device="meta")
    lengths, starts = (num_keys,) * num_rows, (num_keys - 1,) * num_rows
    return Queries(q, dtype), Keys(k, k, table, num_key_heads, head_dim, head_dim, True, lengths, starts)


def _merge_example(dtype: torch.dtype, head_dim: int) -> Launch:
    num_rows, num_heads, parts_each = 32, 32, 16
    parts = torch.empty(num_rows * parts_each, num_heads, head_dim, device="meta")
    out = torch.empty(num_rows, num_heads, head_dim, device="meta", dtype=dtype)
    launch = merge_launch(parts, parts[..., 0], _meta(num_rows + 1), out, parts[:num_rows, :, 0])
    size = float(parts.numel())
    return replace(launch, work=Work(2 * size, size / head_dim, 4 * size))


def _meta(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device="meta")
