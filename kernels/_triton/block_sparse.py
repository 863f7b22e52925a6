"""Block-sparse softmax attention over compressed sparse rows, for any number of sequences in one launch.

    out_i = softmax(scale * q_i [K_(e_1) | K_(e_2) | ...]^T) [V_(e_1); V_(e_2); ...],   e: i's tile's entries

A program computes one tile of rows for one key head; the G query heads that share it are rows of the same
products. Entries are runs of ``block`` keys, every ``step``-th. Those that all rows see, one contiguous range
of keys and those under a mask of bits run in separate loops, so that only ragged edges pay for masks. Logits
are in units of log 2 (exp2), sums in fp32, the log-sum-exp comes out; a part is merged with earlier ones on
its way to memory. Programs begin with the longest lists.

A masked key's weight is 0, but 0 times NaN is NaN: a tile in which a masked entry had a value that is not a
number is computed again, with such values taken apart (``_masked_entries``), so that they reach the rows
that see them and no others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.launch import Launch, Work
from kernels._triton.operands import ALIGNED_BYTES, Keys, Rows
from kernels._triton.primitives import (
    load_rows,
    merged,
    power_of_two,
    precision_of,
    products,
    softmax_end,
    softmax_step,
    unsigned_scale,
)
from kernels._triton.targets import Target, interpreting, target_of
from kernels.math.cache import PLANS

MAX_BLOCK_M = 128
WORD_BITS = 32
"""Keys per word of a mask."""


@dataclass(frozen=True)
class Tiles:
    """Rows that a program computes together, for each of the query heads that share a key head.

    ``table`` int32 [T, 4]: first row of q, number of rows (at most ``rows``), sequence (row of
    ``Keys.table``), number of its list of full entries. Rows of a tile are ``step`` apart.
    """

    rows: int
    table: Tensor
    step: int = 1


@dataclass(frozen=True)
class Lists:
    """The keys of each tile; what is None is nowhere there.

    ``ranges`` int32 [T, 2]: keys lo <= j < hi, seen by all rows of the tile. ``full_indptr`` int32
    [heads, L + 1] into ``full`` int32 [nnz, 2] (first key, step): ``block`` keys each, seen by all rows.
    ``masked_indptr`` int32 [heads, T + 1] into ``masked`` int32 [nnz, 3] (first key, step, mask number);
    ``masks`` int32 [num_masks, rows, block / 32]: bit n % 32 of word n // 32 says whether a row sees key n.
    ``order`` int32 [heads, T]: tiles, longest first. heads: 1, the key heads, or the query heads.

    ``whole``: no full entry reaches beyond its sequence's keys, and ranges have whole multiples of ``block``
    keys, so that their loops need not look. Keys beyond are never loaded either way. Entries outside
    ``indptr``'s ranges are never read.
    """

    block: int
    ranges: Tensor | None = None
    full_indptr: Tensor | None = None
    full: Tensor | None = None
    masked_indptr: Tensor | None = None
    masked: Tensor | None = None
    masks: Tensor | None = None
    order: Tensor | None = None
    whole: bool = False


def block_sparse(
    rows: Rows, keys: Keys, tiles: Tiles, lists: Lists, *, scale: float, skip: float = 0.0
) -> None:
    """Add the tiles' attention to ``rows``, merged by log-sum-exp where ``rows.filled``; then it is set.

    ``skip`` > 0 leaves out a full entry whose every logit m_ij is so far below what the row has seen before
    that exp(m_ij - m_i) < skip, in all rows and heads of the tile; a logit that is not a number is not below.
    """
    group = rows.q.shape[1] // keys.num_heads
    q, out = (x.unflatten(1, (keys.num_heads, group)) for x in (rows.q, rows.out))
    lse = rows.lse.unflatten(1, (keys.num_heads, group))
    launch_on(q, out, lse, keys, tiles, lists, scale=scale, skip=skip, filled=rows.filled).run()
    rows.filled = True


def tile_rows(target: Target, dtype: torch.dtype, head_dim: int, group: int) -> int:
    """Rows of a full kernel tile, with ``group`` query heads beside each other."""
    wide = _shape(target, dtype, head_dim).block_m
    return wide // group if group <= wide else wide


def rows_for(q: Tensor, num_key_heads: int, head_dim: int) -> int:
    """The same for q [B, H, N, D] where it lies; ``head_dim``: the larger of keys' and values'."""
    return tile_rows(target_of(q.device), q.dtype, head_dim, q.shape[1] // num_key_heads)


@dataclass(frozen=True)
class Table:
    """A tensor as a cache holds it."""

    tensor: Tensor

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes


def tiles_of(borders: Sequence[int], rows: int, device: torch.device, *, num_sequences: int = 1) -> Tiles:
    """Kernel tiles of at most ``rows`` rows that cut the tiles between ``borders`` (rows of the call,
    ascending from 0), on which lists depend: tile i between them is list i. The same for every sequence of a
    batch, whose lists follow each other. Cached."""
    key = ("kernel tiles", tuple(borders), rows, num_sequences, device)
    return Tiles(rows, PLANS.get(key, lambda: Table(_cut(borders, rows, num_sequences, device))).tensor)


def _cut(borders: Sequence[int], rows: int, num_sequences: int, device: torch.device) -> Tensor:
    begin, end = np.array(borders[:-1], dtype=np.int64), np.array(borders[1:], dtype=np.int64)
    pieces = -(-(end - begin) // rows)
    own_list = np.repeat(np.arange(len(pieces)), pieces)
    piece = np.arange(len(own_list)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    first = begin[own_list] + piece * rows
    num = np.minimum(end[own_list] - first, rows)
    tables = [
        np.stack([first, num, np.full_like(num, b), own_list + b * len(pieces)], 1)
        for b in range(num_sequences)
    ]
    return torch.from_numpy(np.concatenate(tables).astype(np.int32)).to(device, non_blocking=True)


@dataclass(frozen=True)
class _Shape:
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def _shape(target: Target, dtype: torch.dtype, head_dim: int) -> _Shape:
    """The tile that keeps its sums in registers and its keys in shared memory."""
    wide = power_of_two(head_dim)
    if interpreting():
        return _Shape(64, 32, 4, 1)
    old = target.capability < 90
    if dtype == torch.float32:
        if wide <= 64:
            return _Shape(32, 32, 8, 2) if old else _Shape(64, 32, 8, 2)
        return _Shape(16, 32, 4, 2)  # wider ones spill: rows of fp32 are held in two parts
    if wide <= 64:
        return _Shape(128, 64, 8, 2 if old else 3)
    if wide <= 128:
        return _Shape(64, 32, 8, 2) if old else _Shape(128, 64, 8, 3)
    return _Shape(64, 32, 8, 2)


def launch_on(
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    keys: Keys,
    tiles: Tiles,
    lists: Lists,
    *,
    scale: float,
    skip: float = 0.0,
    filled: bool = False,
    target: Target | None = None,
) -> Launch:
    """The launch for q [B, Hk, G, N, D], out [B, Hk, G, N, Dv] and lse [B, Hk, G, N], views of any
    strides."""
    B, heads, group = q.shape[:3]
    shape = _shape(target or target_of(q.device), q.dtype, max(keys.key_dim, keys.value_dim))
    each_head = group > 1 and _heads_of(lists) == heads * group
    share = group if tiles.rows * group <= MAX_BLOCK_M and not each_head else 1
    block_m = power_of_two(tiles.rows * share)
    positive, sign = unsigned_scale(scale)
    args: dict[str, Tensor | int | float] = {
        "q": q,
        "k": keys.k,
        "v": keys.v,
        "out": out,
        "lse": lse,
        "sequences": keys.table,
        "tiles": tiles.table,
        **_lists_args(lists, tiles.table),
        "scale": positive,
        "sign": sign,
        "skip": _log2(skip),
        **_strides(q, out, lse, B),
        **_list_strides(lists),
        "row_step": tiles.step,
    }
    constants: dict[str, int | bool | str | float] = {
        "KEY_DIM": keys.key_dim,
        "VALUE_DIM": keys.value_dim,
        "KEY_BLOCK": power_of_two(keys.key_dim),
        "VALUE_BLOCK": power_of_two(keys.value_dim),
        "HEADS": heads * group // share,
        "GROUP": group,
        "SHARE": share,
        "LISTED": 1 if each_head else group // share,
        "ROWS": tiles.rows,
        "BLOCK_M": block_m,
        "BLOCK": lists.block,
        "BLOCK_N": _keys_of_step(lists, shape, q.dtype, filled),
        "RANGES": lists.ranges is not None,
        "FULL": lists.full_indptr is not None,
        "MASKED": lists.masked_indptr is not None,
        "ORDER": lists.order is not None,
        "SIGNED": sign != 1.0,
        "CUT": not lists.whole,
        "SKIP": skip > 0.0,
        "FILLED": filled,
        "ALIGNED": ALIGNED_BYTES // q.element_size() if keys.aligned else 1,
        "PRECISION": precision_of(q.dtype),
    }
    return Launch(
        kernel="block_sparse",
        fn=block_sparse_kernel,
        grid=(len(tiles.table) * heads * group // share,),
        args=args,
        constants=constants,
        num_warps=shape.num_warps if block_m >= shape.block_m else 4,
        num_stages=shape.num_stages,
        sizes=SIZES,
    )


def _keys_of_step(lists: Lists, shape: _Shape, dtype: torch.dtype, filled: bool) -> int:
    """Merging with what is there takes registers that masks need too: fewer keys at a time, or some spill."""
    tight = filled and lists.masked_indptr is not None and dtype.itemsize == 2
    return min(lists.block, shape.block_n, 32 if tight else shape.block_n)


def _log2(skip: float) -> float:
    if not 0.0 <= skip < 1.0:
        raise ValueError(f"skip must lie in 0 <= skip < 1, got {skip}")
    return math.log2(skip) if skip > 0.0 else 0.0


def _heads_of(lists: Lists) -> int:
    found = [x.shape[0] for x in (lists.full_indptr, lists.masked_indptr, lists.order) if x is not None]
    return max(found, default=1)


def _lists_args(lists: Lists, unused: Tensor) -> dict[str, Tensor]:
    names = ("ranges", "full_indptr", "full", "masked_indptr", "masked", "masks", "order")
    found = {name: getattr(lists, name) for name in names}
    return {name: unused if tensor is None else tensor for name, tensor in found.items()}


def _list_strides(lists: Lists) -> dict[str, int]:
    """From one head to the next; 0 where all share."""
    found = {"full": lists.full_indptr, "masked": lists.masked_indptr, "order": lists.order}
    return {
        f"{name}_head": 0 if tensor is None or tensor.shape[0] == 1 else tensor.stride(0)
        for name, tensor in found.items()
    }


def _strides(q: Tensor, out: Tensor, lse: Tensor, B: int) -> dict[str, int]:
    """Of batch, key head, query head in its group, and row. A packed call has one batch entry for all."""
    strides: dict[str, int] = {}
    for name, tensor in (("q", q), ("out", out), ("lse", lse)):
        for axis, letter in enumerate("bkgn"):
            strides[f"{name}_{letter}"] = tensor.stride(axis) if axis or B > 1 else 0
    return strides


SIZES = frozenset(("lse_b", "lse_k", "lse_g", "lse_n", "full_head", "masked_head", "order_head", "row_step"))


@triton.jit(do_not_specialize=sorted(SIZES))
def block_sparse_kernel(
    q,
    k,
    v,
    out,
    lse,
    sequences,
    tiles,
    ranges,
    full_indptr,
    full,
    masked_indptr,
    masked,
    masks,
    order,
    scale,
    sign,
    skip,
    q_b,
    q_k,
    q_g,
    q_n,
    out_b,
    out_k,
    out_g,
    out_n,
    lse_b,
    lse_k,
    lse_g,
    lse_n,
    full_head,
    masked_head,
    order_head,
    row_step,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SHARE: tl.constexpr,
    LISTED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RANGES: tl.constexpr,
    FULL: tl.constexpr,
    MASKED: tl.constexpr,
    ORDER: tl.constexpr,
    SIGNED: tl.constexpr,
    CUT: tl.constexpr,
    SKIP: tl.constexpr,
    FILLED: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    head, tile = program % HEADS, program // HEADS
    list_head = (head // LISTED).to(tl.int64)
    if ORDER:
        tile = tl.load(order + list_head * order_head + tile)
    first_row = tl.load(tiles + tile * 4)
    num_rows = tl.load(tiles + tile * 4 + 1)
    sequence = tl.load(tiles + tile * 4 + 2)
    own_list = tl.load(tiles + tile * 4 + 3)
    key_head = (head // (GROUP // SHARE)).to(tl.int64)

    about = sequences + sequence.to(tl.int64) * 8
    k_n, v_n = tl.load(about + 3), tl.load(about + 5)
    k_at = tl.load(about) + key_head * tl.load(about + 2)
    v_at = tl.load(about + 1) + key_head * tl.load(about + 4)
    num_keys = tl.load(about + 6).to(tl.int32)
    if ALIGNED > 1:
        k_n, v_n = tl.multiple_of(k_n, ALIGNED), tl.multiple_of(v_n, ALIGNED)
        k_at, v_at = tl.multiple_of(k_at, ALIGNED), tl.multiple_of(v_at, ALIGNED)
    k, v = k + k_at, v + v_at

    line = tl.arange(0, BLOCK_M)
    row = line // SHARE
    member = (head % (GROUP // SHARE)) * SHARE + line % SHARE
    own = row < num_rows
    place = first_row.to(tl.int64) + row.to(tl.int64) * row_step
    member = member.to(tl.int64)
    entry_b = sequence.to(tl.int64)
    columns = tl.arange(0, KEY_BLOCK)
    q_at = q + entry_b * q_b + key_head * q_k + (member * q_g + place * q_n)[:, None] + columns[None, :]
    queries = tl.load(q_at, mask=own[:, None] & (columns < KEY_DIM)[None, :], other=0.0)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, VALUE_BLOCK], tl.float32)

    if MASKED:
        indptr = masked_indptr + list_head * masked_head + tile
        begin, end = tl.load(indptr), tl.load(indptr + 1)
        m, l, acc = _masked_entries(
            queries, k, v, k_n, v_n, masked, masks, begin, end, row, num_keys, m, l, acc, scale, sign,
            KEY_DIM, VALUE_DIM, KEY_BLOCK, VALUE_BLOCK, ROWS, BLOCK, BLOCK_N, SIGNED, False, PRECISION,
        )  # fmt: skip
        if tl.max(tl.max((acc != acc).to(tl.int32), 1), 0) > 0:
            m = tl.full([BLOCK_M], float("-inf"), tl.float32)
            l = tl.zeros([BLOCK_M], tl.float32)
            acc = tl.zeros([BLOCK_M, VALUE_BLOCK], tl.float32)
            m, l, acc = _masked_entries(
                queries, k, v, k_n, v_n, masked, masks, begin, end, row, num_keys, m, l, acc, scale, sign,
                KEY_DIM, VALUE_DIM, KEY_BLOCK, VALUE_BLOCK, ROWS, BLOCK, BLOCK_N, SIGNED, True, PRECISION,
            )  # fmt: skip

    each = tl.arange(0, BLOCK_N)
    if RANGES:
        lo = tl.load(ranges + tile * 2)
        hi = tl.minimum(tl.load(ranges + tile * 2 + 1), num_keys)
        for ahead in tl.range(0, hi - lo, BLOCK_N):
            places = lo.to(tl.int64) + (ahead + each).to(tl.int64)
            live = places < hi
            keys = load_rows(k, places, k_n, live, KEY_DIM, KEY_BLOCK, CUT)
            scores = products(queries, keys, sign, SIGNED, PRECISION)
            if CUT:
                scores = tl.where(live[None, :], scores, float("-inf"))
            values = load_rows(v, places, v_n, live, VALUE_DIM, VALUE_BLOCK, CUT)
            m, l, acc = softmax_step(scores, values, m, l, acc, scale, PRECISION)

    if FULL:
        PARTS: tl.constexpr = BLOCK // BLOCK_N
        indptr = full_indptr + list_head * full_head + own_list
        begin, end = tl.load(indptr), tl.load(indptr + 1)
        for turn in tl.range(0, (end - begin) * PARTS):
            entry = (begin + turn // PARTS).to(tl.int64)
            first, step = tl.load(full + entry * 2), tl.load(full + entry * 2 + 1)
            places = first.to(tl.int64) + (turn % PARTS * BLOCK_N + each).to(tl.int64) * step
            live = places < num_keys
            keys = load_rows(k, places, k_n, live, KEY_DIM, KEY_BLOCK, CUT)
            scores = products(queries, keys, sign, SIGNED, PRECISION)
            if CUT:
                scores = tl.where(live[None, :], scores, float("-inf"))
            if SKIP:
                best = tl.max(tl.where(scores == scores, scores, float("inf")), 1)
                below = tl.max(tl.where(own, best * scale - m - skip, -1.0), 0)
                if not (below < 0.0):
                    values = load_rows(v, places, v_n, live, VALUE_DIM, VALUE_BLOCK, CUT)
                    m, l, acc = softmax_step(scores, values, m, l, acc, scale, PRECISION)
            else:
                values = load_rows(v, places, v_n, live, VALUE_DIM, VALUE_BLOCK, CUT)
                m, l, acc = softmax_step(scores, values, m, l, acc, scale, PRECISION)

    part, part_lse = softmax_end(m, l, acc)
    columns = tl.arange(0, VALUE_BLOCK)
    out_at = out + entry_b * out_b + key_head * out_k + (member * out_g + place * out_n)[:, None]
    out_at += columns[None, :]
    lse_at = lse + entry_b * lse_b + key_head * lse_k + member * lse_g + place * lse_n
    inside = own[:, None] & (columns < VALUE_DIM)[None, :]
    if FILLED:
        before = tl.load(out_at, mask=inside, other=0.0).to(tl.float32)
        before_lse = tl.load(lse_at, mask=own, other=0.0)
        part, part_lse = merged(before, before_lse, part, part_lse)
    tl.store(out_at, part.to(out.dtype.element_ty), mask=inside)
    tl.store(lse_at, part_lse, mask=own)


@triton.jit
def _masked_entries(
    queries, k, v, k_n, v_n, masked, masks, begin, end, row, num_keys, m, l, acc, scale, sign,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SIGNED: tl.constexpr,
    APART: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The entries under a mask. APART: values that are not finite are taken out of the product, and a row
    that sees one becomes NaN; that hardly ever happens, and is written to need few registers."""
    PARTS: tl.constexpr = BLOCK // BLOCK_N
    each = tl.arange(0, BLOCK_N)
    STAGES: tl.constexpr = 1 if APART else None
    for turn in tl.range(0, (end - begin) * PARTS, num_stages=STAGES):
        at = masked + (begin + turn // PARTS).to(tl.int64) * 3
        first, step, number = tl.load(at), tl.load(at + 1), tl.load(at + 2)
        places = first.to(tl.int64) + (turn % PARTS * BLOCK_N + each).to(tl.int64) * step
        live = places < num_keys
        words = masks + (number.to(tl.int64) * ROWS + row) * (BLOCK // 32) + turn % PARTS * BLOCK_N // 32
        bits = tl.load(words, mask=row < ROWS, other=0)[:, None]
        for word in tl.static_range(1, BLOCK_N // 32):
            more = tl.load(words + word, mask=row < ROWS, other=0)[:, None]
            bits = tl.where((each // 32 == word)[None, :], more, bits)
        keep = (((bits >> ((turn % PARTS * BLOCK_N + each) % 32)[None, :]) & 1) != 0) & live[None, :]
        keys = load_rows(k, places, k_n, live, KEY_DIM, KEY_BLOCK, True)
        scores = products(queries, keys, sign, SIGNED, PRECISION)
        scores = tl.where(keep, scores, float("-inf"))
        values = load_rows(v, places, v_n, live, VALUE_DIM, VALUE_BLOCK, True)
        if APART:
            odd = (values != values) | (tl.abs(values) == float("inf"))
            spoilt = keep & (tl.max(odd.to(tl.int32), 1) > 0)[None, :]
            m, l, acc = softmax_step(scores, tl.where(odd, 0.0, values), m, l, acc, scale, PRECISION)
            l = tl.where(tl.max(spoilt.to(tl.int32), 1) > 0, float("nan"), l)
        else:
            m, l, acc = softmax_step(scores, values, m, l, acc, scale, PRECISION)
    return m, l, acc


def examples(target: Target, dtype: torch.dtype, head_dim: int) -> Iterator[Launch]:
    """Entries of every kind, for one query head per key head and for four; merged with what is there."""
    for group in (1, 4):
        for filled in (False, True):
            yield _example(target, dtype, head_dim, group, filled)


def _example(target: Target, dtype: torch.dtype, head_dim: int, group: int, filled: bool) -> Launch:
    N, H = 16384, 32
    heads = H // group

    def meta(*sizes: int, of: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(sizes, dtype=of, device="meta")

    rows = tile_rows(target, dtype, head_dim, group)
    q = meta(1, heads, group, N, head_dim, of=dtype)
    k, v = meta(heads, N, head_dim, of=dtype), meta(heads, N, head_dim, of=dtype)
    keys = Keys(k, v, meta(1, 8, of=torch.int64), heads, head_dim, head_dim, True, (N,), (0,))
    T, block = -(-N // rows), 64
    lists = Lists(
        block,
        ranges=meta(T, 2),
        full_indptr=meta(heads, T + 1),
        full=meta(T, 2),
        masked_indptr=meta(1, T + 1),
        masked=meta(T, 3),
        masks=meta(4, rows, block // WORD_BITS),
        order=meta(heads, T),
        whole=True,
    )
    out, lse = meta(1, heads, group, N, head_dim, of=dtype), meta(1, heads, group, N, of=torch.float32)
    tiles = Tiles(rows, meta(T, 4))
    launch = launch_on(q, out, lse, keys, tiles, lists, scale=0.1, filled=filled, target=target)
    pairs = 0.5 * H * N * N
    work = Work(4.0 * head_dim * pairs, pairs, float(2 * H + 2 * heads) * N * head_dim * dtype.itemsize)
    notes = {"group": group, "merged": 1} if filled else {"group": group}
    return replace(launch, work=work, notes=notes)
