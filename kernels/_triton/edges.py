"""Softmax over an edge list: every row reads keys of its own.

    s_it = scale <q_i, k_(e_it)>,   out_i = sum_t e^(s_it - lse_i) v_(e_it),   lse_i = log sum_t e^(s_it)

Each slot t mod BLOCK_EDGES of a row has an online softmax of its own, in exp2; slots meet once, at the end,
so that the loop knows no reduction but that of a product over D. Keys are gathered, which reads 2 D numbers
per pair whatever the order: there is no matrix product in it, and its speed is that of the level-two cache.
Programs of one key head follow each other, last rows first: in a causal call those have the longest lists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.launch import Launch, Work
from kernels._triton.operands import ALIGNED_BYTES, SEQUENCE_COLUMNS, Keys
from kernels._triton.targets import Target, interpreting, target_of

BLOCK_EDGES = 8
NUM_WARPS = 4
TILE_NUMBERS = 1024
"""Numbers of keys that a program holds at once, 8 to a thread: so many programs fit side by side."""
MAX_ROWS = 8
INTERPRETED_ROWS, INTERPRETED_EDGES = 32, 16
"""The interpreter's time goes by programs and operations, not by numbers."""
SPLIT_EDGES = 256
"""Long lists of few rows are cut into parts of at least so many edges."""
MAX_SPLITS = 32
LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class EdgeLists:
    """Keys of every row, -1 for none. A row's line is batch * lines[0] + key head * lines[1] + head of its
    group * lines[2] + row.

    Equal: ``edges`` int32 [lines, E] and no more. Ragged: ``edges`` int32 [n], of which line i has
    ``counts[i]`` (int32) from ``begins[i]`` (int64) on; ``longest`` bounds the counts.
    """

    edges: Tensor
    lines: tuple[int, int, int]
    begins: Tensor | None = None
    counts: Tensor | None = None
    longest: int = 0

    @property
    def equal(self) -> bool:
        return self.begins is None

    @property
    def width(self) -> int:
        return self.edges.shape[-1] if self.equal else self.longest


@dataclass(frozen=True)
class EdgeRows:
    """q [B, Hk, G, N, D] in its own dtype; ``out`` [B, Hk, G, N, Dv] and ``lse`` [B, Hk, G, N] fp32: written,
    or merged into where ``filled``. ``sequence`` int32 [N]: whose each row of a packed call (B = 1) is; None:
    batch entry b is sequence b."""

    q: Tensor
    out: Tensor
    lse: Tensor
    filled: bool = False
    sequence: Tensor | None = None


@triton.jit(
    do_not_specialize=[
        "q_batch", "q_head", "q_group", "q_row", "out_split", "out_batch", "out_head", "out_group", "out_row",
        "lse_split", "lse_batch", "lse_head", "lse_group", "lse_row", "line_batch", "line_head", "line_group",
        "num_rows", "width", "num_splits",
    ]
)  # fmt: skip
def softmax_over_edges(
    q, k, v, out, lse, table, sequence, edges, begins, counts,
    q_batch, q_head, q_group, q_row, out_split, out_batch, out_head, out_group, out_row,
    lse_split, lse_batch, lse_head, lse_group, lse_row, line_batch, line_head, line_group,
    num_rows, width, num_splits, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr, ROWS: tl.constexpr, BLOCK_EDGES: tl.constexpr, COLUMNS: tl.constexpr,
    EQUAL: tl.constexpr, MERGE: tl.constexpr, PACKED: tl.constexpr, ALIGNED: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    split = program % num_splits
    tile = (num_rows + ROWS - 1) // ROWS - 1 - program // num_splits
    key_head = (tl.program_id(1) // GROUP).to(tl.int64)
    group = (tl.program_id(1) % GROUP).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)

    row = tile * ROWS + tl.arange(0, ROWS)
    here = row < num_rows
    row = row.to(tl.int64)
    slot = tl.arange(0, BLOCK_EDGES)
    dim = tl.arange(0, BLOCK_DIM)
    value_dim = tl.arange(0, BLOCK_VALUE)

    if PACKED:
        own = tl.load(sequence + row, mask=here, other=0).to(tl.int64)
    else:
        own = tl.full([ROWS], 0, tl.int64) + batch
    entry = table + own * COLUMNS
    k_first = tl.load(entry)
    v_first = tl.load(entry + 1)
    k_per_head = tl.load(entry + 2)
    k_per_key = tl.load(entry + 3)
    v_per_head = tl.load(entry + 4)
    v_per_key = tl.load(entry + 5)
    if ALIGNED > 1:
        k_first = tl.multiple_of(k_first, [ALIGNED])
        v_first = tl.multiple_of(v_first, [ALIGNED])
        k_per_head = tl.multiple_of(k_per_head, [ALIGNED])
        k_per_key = tl.multiple_of(k_per_key, [ALIGNED])
        v_per_head = tl.multiple_of(v_per_head, [ALIGNED])
        v_per_key = tl.multiple_of(v_per_key, [ALIGNED])
    k_first += key_head * k_per_head
    v_first += key_head * v_per_head

    line = batch * line_batch + key_head * line_head + group * line_group + row
    if EQUAL:
        begin = line * width
        count = tl.where(here, width, 0)
        longest = width
    else:
        begin = tl.load(begins + line, mask=here, other=0)
        count = tl.load(counts + line, mask=here, other=0)
        longest = tl.max(count, 0)
    part = (longest + num_splits * BLOCK_EDGES - 1) // (num_splits * BLOCK_EDGES) * BLOCK_EDGES
    stop = tl.minimum(longest, (split + 1) * part)

    at_query = q + batch * q_batch + key_head * q_head + group * q_group + row * q_row
    query = tl.load(at_query[:, None] + dim[None, :], mask=here[:, None] & (dim < DIM)[None, :], other=0.0)
    query = query.to(tl.float32) * scale

    top = tl.full([ROWS, BLOCK_EDGES], -float("inf"), tl.float32)
    total = tl.full([ROWS, BLOCK_EDGES], 0.0, tl.float32)
    acc = tl.full([ROWS, BLOCK_EDGES, BLOCK_VALUE], 0.0, tl.float32)
    for first in tl.range(split * part, stop, BLOCK_EDGES, num_stages=STAGES):
        turn = first + slot
        edge = tl.load(edges + begin[:, None] + turn[None, :], mask=turn[None, :] < count[:, None], other=-1)
        seen = edge >= 0
        edge = edge.to(tl.int64)
        at_key = k + (k_first[:, None] + edge * k_per_key[:, None])[:, :, None] + dim[None, None, :]
        key = tl.load(at_key, mask=seen[:, :, None] & (dim < DIM)[None, None, :], other=0.0)
        score = tl.sum(query[:, None, :] * key.to(tl.float32), 2)
        score = tl.where(seen, score, -float("inf"))
        highest = tl.maximum(top, score)
        finite = tl.where(highest == -float("inf"), 0.0, highest)
        fade = tl.exp2(top - finite)
        weight = tl.exp2(score - finite)
        at_value = v + (v_first[:, None] + edge * v_per_key[:, None])[:, :, None] + value_dim[None, None, :]
        value = tl.load(at_value, mask=seen[:, :, None] & (value_dim < VALUE_DIM)[None, None, :], other=0.0)
        acc = acc * fade[:, :, None] + weight[:, :, None] * value.to(tl.float32)
        total = total * fade + weight
        top = highest

    highest = tl.max(top, 1)
    highest = tl.where(highest == -float("inf"), 0.0, highest)
    fade = tl.exp2(top - highest[:, None])
    total = tl.sum(total * fade, 1)
    result = tl.sum(acc * fade[:, :, None], 1)
    some = tl.where(total == 0.0, 1.0, total)
    result = result / some[:, None]
    new = tl.where(total == 0.0, -float("inf"), (highest + tl.log2(some)) * 0.6931471805599453)

    at_lse = lse + split * lse_split + batch * lse_batch + key_head * lse_head + group * lse_group
    at_lse += row * lse_row
    at_out = out + split * out_split + batch * out_batch + key_head * out_head + group * out_group
    at_out = (at_out + row * out_row)[:, None] + value_dim[None, :]
    written = here[:, None] & (value_dim < VALUE_DIM)[None, :]
    if MERGE:
        old = tl.load(at_lse, mask=here, other=0.0)
        most = tl.maximum(old, new)
        most = tl.where(most == -float("inf"), 0.0, most)
        old_weight = tl.exp(old - most)
        new_weight = tl.exp(new - most)
        both = old_weight + new_weight
        scaled = tl.where(both == 0.0, 1.0, both)
        before = tl.load(at_out, mask=written, other=0.0).to(tl.float32)
        result = before * (old_weight / scaled)[:, None] + result * (new_weight / scaled)[:, None]
        new = tl.where(both == 0.0, -float("inf"), most + tl.log(scaled))
    tl.store(at_out, result.to(out.dtype.element_ty), mask=written)
    tl.store(at_lse, new, mask=here)


@triton.jit(do_not_specialize=["num_lines", "num_splits"])
def merge_splits(
    out, lse, part_out, part_lse, num_lines, num_splits,
    VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Parts [splits, lines, Dv] of the same rows as one: out [lines, Dv], lse [lines]."""
    line = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    dim = tl.arange(0, BLOCK_VALUE)
    here = split < num_splits
    parts = tl.load(part_lse + split * num_lines.to(tl.int64) + line, mask=here, other=-float("inf"))
    most = tl.max(parts, 0)
    most = tl.where(most == -float("inf"), 0.0, most)
    weight = tl.exp(parts - most)
    total = tl.sum(weight, 0)
    at = part_out + (split * num_lines.to(tl.int64) + line)[:, None] * VALUE_DIM + dim[None, :]
    values = tl.load(at, mask=here[:, None] & (dim < VALUE_DIM)[None, :], other=0.0)
    some = tl.where(total == 0.0, 1.0, total)
    result = tl.sum(values * weight[:, None], 0) / some
    tl.store(out + line * VALUE_DIM + dim, result, mask=dim < VALUE_DIM)
    tl.store(lse + line, tl.where(total == 0.0, -float("inf"), most + tl.log(some)))


def attend_edges(rows: EdgeRows, keys: Keys, lists: EdgeLists, *, scale: float) -> None:
    """Add the softmax over ``lists`` to ``rows``: long lists of few rows by several programs each."""
    splits = splits_of(target_of(rows.q.device), rows, lists)
    if splits == 1:
        softmax_launch(rows, keys, lists, scale=scale).run()
        return
    shape = rows.lse.shape
    part = EdgeRows(
        rows.q,
        rows.lse.new_empty(splits, *rows.out.shape),
        rows.lse.new_empty(splits, *shape),
        sequence=rows.sequence,
    )
    softmax_launch(part, keys, lists, scale=scale, splits=splits).run()
    out, lse = rows.lse.new_empty(rows.out.shape), rows.lse.new_empty(shape)
    merge_launch(part.out, part.lse, out, lse).run()
    if rows.filled:
        from kernels.math.merge import merge_into

        merge_into(rows.out, rows.lse, out, lse)
    else:
        rows.out.copy_(out)
        rows.lse.copy_(lse)


def splits_of(target: Target, rows: EdgeRows, lists: EdgeLists) -> int:
    """Programs per row: more than one only where rows alone do not fill half the chip."""
    B, Hk, G, N, _ = rows.q.shape
    programs = B * Hk * G * -(-N // _tile_rows(_power(rows.q.shape[-1]), _power(rows.out.shape[-1])))
    wanted = min(MAX_SPLITS, 4 * target.num_sms // max(1, programs), lists.width // SPLIT_EDGES)
    return max(1, wanted)


def softmax_launch(
    rows: EdgeRows, keys: Keys, lists: EdgeLists, *, scale: float, splits: int = 1, work: Work | None = None
) -> Launch:
    """One launch over every row, head and batch entry. With ``splits`` above 1 ``rows.out`` and ``rows.lse``
    have the parts as a dimension in front."""
    q, out, lse = rows.q, rows.out, rows.lse
    B, Hk, G, N, D = q.shape
    if splits == 1:
        out, lse = out[None], lse[None]
    block_dim, block_value = _power(D), _power(out.shape[-1])
    height = _tile_rows(block_dim, block_value)
    own = keys.table if rows.sequence is None else rows.sequence
    begins = lists.edges if lists.begins is None else lists.begins
    counts = lists.edges if lists.counts is None else lists.counts
    strides = {
        **_named("q", ("batch", "head", "group", "row"), q.stride()),
        **_named("out", ("split", "batch", "head", "group", "row"), out.stride()),
        **_named("lse", ("split", "batch", "head", "group", "row"), lse.stride()),
        **_named("line", ("batch", "head", "group"), lists.lines),
        "num_rows": N,
        "width": lists.width,
        "num_splits": splits,
    }
    return Launch(
        kernel="softmax_over_edges",
        fn=softmax_over_edges,
        grid=(splits * -(-N // height), Hk * G, B),
        args={
            "q": q, "k": keys.k, "v": keys.v, "out": out, "lse": lse, "table": keys.table, "sequence": own,
            "edges": lists.edges, "begins": begins, "counts": counts, **strides, "scale": scale * LOG2_E,
        },
        constants={
            "GROUP": G, "DIM": D, "VALUE_DIM": out.shape[-1], "BLOCK_DIM": block_dim,
            "BLOCK_VALUE": block_value, "ROWS": height,
            "BLOCK_EDGES": INTERPRETED_EDGES if interpreting() else BLOCK_EDGES,
            "COLUMNS": SEQUENCE_COLUMNS, "EQUAL": lists.equal, "MERGE": rows.filled,
            "PACKED": rows.sequence is not None,
            "ALIGNED": ALIGNED_BYTES // keys.k.element_size() if keys.aligned else 1, "STAGES": 1,
        },
        num_warps=NUM_WARPS,
        num_stages=1,
        sizes=frozenset(strides),
        multiplies=False,
        work=work,
        notes={"lists": "equal" if lists.equal else "ragged", "merge": int(rows.filled), "splits": splits},
    )  # fmt: skip


def merge_launch(part_out: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor) -> Launch:
    """Dense parts [splits, ..., Dv] into dense out [..., Dv] and lse [...]."""
    splits, lines, width = len(part_lse), lse.numel(), out.shape[-1]
    return Launch(
        kernel="merge_splits",
        fn=merge_splits,
        grid=(lines,),
        args={
            "out": out, "lse": lse, "part_out": part_out, "part_lse": part_lse, "num_lines": lines,
            "num_splits": splits,
        },
        constants={"VALUE_DIM": width, "BLOCK_VALUE": _power(width), "SPLITS": _power(splits)},
        num_warps=1,
        num_stages=1,
        sizes=frozenset({"num_lines", "num_splits"}),
        multiplies=False,
        work=Work(2.0 * splits * lines * width, float(splits * lines), 4.0 * splits * lines * width),
    )  # fmt: skip


def _named(tensor: str, dims: tuple[str, ...], strides: tuple[int, ...]) -> dict[str, int]:
    return {f"{tensor}_{dim}": stride for dim, stride in zip(dims, strides, strict=False)}


def _power(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _tile_rows(block_dim: int, block_value: int) -> int:
    if interpreting():
        return INTERPRETED_ROWS
    return max(1, min(MAX_ROWS, TILE_NUMBERS // (BLOCK_EDGES * max(block_dim, block_value))))


def examples(target: Target, dtype: torch.dtype, head_dim: int) -> Iterator[Launch]:
    """A prefill of random, of sbm where it lists edges, a decode step of sbm; and what draws them."""
    from kernels._triton.edges_bits import bit_examples
    from kernels._triton.edges_draw import draw_example

    H, Hk, N, E = 32, 8, 16384, 65
    q = torch.empty(1, Hk, H // Hk, N, head_dim, dtype=dtype, device="meta")
    rows = EdgeRows(
        q, q.new_empty(q.shape, dtype=torch.float32), q.new_empty(q.shape[:-1], dtype=torch.float32)
    )
    table = torch.empty(1, SEQUENCE_COLUMNS, dtype=torch.int64, device="meta")
    base = q.new_empty(Hk, N, head_dim)
    keys = Keys(base, base, table, Hk, head_dim, head_dim, True, (N,), (0,))
    equal = EdgeLists(table.new_empty(H * N, E, dtype=torch.int32), (0, H // Hk * N, N))
    yield softmax_launch(rows, keys, equal, scale=1.0, work=_work(H * N * E, H * N, head_dim, dtype))

    pairs = H * N * N // 96
    edges, counts = (table.new_empty(size, dtype=torch.int32) for size in (pairs, H * N))
    ragged = EdgeLists(edges, (0, H // Hk * N, N), table.new_empty(H * N), counts, longest=N)
    filled, work = EdgeRows(q, rows.out, rows.lse, filled=True), _work(pairs, H * N, head_dim, dtype)
    yield softmax_launch(filled, keys, ragged, scale=1.0, work=work)

    parts = 8, 1, Hk, H // Hk, 1
    row = EdgeRows(q[..., :1, :], rows.out.new_empty(*parts, head_dim), rows.lse.new_empty(parts))
    work = _work(H * N // 4, H, head_dim, dtype)
    yield softmax_launch(row, keys, ragged, scale=1.0, splits=parts[0], work=work)
    yield merge_launch(row.out, row.lse, row.out[0], row.lse[0])
    yield draw_example(H, N, E)
    yield from bit_examples(N)


def _work(pairs: int, rows: int, head_dim: int, dtype: torch.dtype) -> Work:
    """Every pair reads a key and a value: what a cache saves of it is its own affair."""
    own = rows * head_dim * (dtype.itemsize + 4)
    return Work(4.0 * pairs * head_dim, 2.0 * pairs, float(pairs * (2 * head_dim * dtype.itemsize + 4) + own))
