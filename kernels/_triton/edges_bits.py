"""Edges of a stochastic block model drawn into bits: one per pair of a row and a key.

    poisson      times t_1 < t_2 < ... of a unit-rate process up to E_i; t is in cluster v where upto_iv <= t
                 < upto_i(v+1), at place (t - upto_iv) / r_iv of the memberships' running sums, where one key
                 lies: its bit is set
    bernoulli    bit ij = [u_ij < p_ij]

Semantics and numbers in ``kernels.math.sbm_sampler``: fp64, the same streams. A key met twice is one bit, so
nothing is sorted, and no size depends on what was drawn. A row sets its bits by atomic "or", whose order does
not matter.

Word w = key / 32 of a row lies where ``Layout`` says: row after row, or tile after tile in the order that the
block-sparse kernel reads its masks in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.edges_draw import random_bits
from kernels._triton.launch import Launch, Work
from kernels._triton.targets import interpreting

WORD_BITS = 32
POINTS = 32
POINT_ROWS = 4
PAIR_WORDS = 4
PAIR_ROWS = 8
LISTED_WORDS = 64
COUNTED_BLOCKS = 32
INTERPRETED_ROWS = 32
NUM_WARPS = 4


@dataclass(frozen=True)
class Layout:
    """Where word w of row i lies: tile i / ``rows``, then block w / ``words``, then row, then word.
    ``blocks`` cover every key."""

    rows: int
    words: int
    blocks: int

    def empty(self, num_rows: int, device: torch.device) -> Tensor:
        """No edges: int32 [tiles, blocks, rows, words]."""
        tiles = -(-num_rows // self.rows)
        return torch.zeros(tiles, self.blocks, self.rows, self.words, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class PointTables:
    """What L lines (rows of one head, or one row of every head) draw from, C clusters: ``streams`` int64 [L],
    ``limits`` int32 [L] keys that are seen, ``upto`` fp64 [L, C + 1], ``rates`` fp64 [L, C].

    ``sums`` fp64 [.., C, S]: running sums of memberships; with ``members`` None before every key, else
    before every block of 64 keys, whose memberships fp32 [.., C, keys] are added up on the way. ``per_line``:
    the first dimension of both is the line's own.
    """

    streams: Tensor
    limits: Tensor
    upto: Tensor
    rates: Tensor
    sums: Tensor
    members: Tensor | None
    per_line: bool


@triton.jit(
    do_not_specialize=[
        "num_lines", "num_clusters", "sums_line", "sums_cluster", "members_line", "members_cluster", "steps",
        "blocks", "num_splits",
    ]
)  # fmt: skip
def draw_points(
    bits, streams, limits, upto, rates, sums, members,
    num_lines, num_clusters, sums_line, sums_cluster, members_line, members_cluster, steps, blocks,
    num_splits,
    TWO_LEVEL: tl.constexpr, ROWS: tl.constexpr, POINTS: tl.constexpr, CLUSTER_STEPS: tl.constexpr,
    TILE_ROWS: tl.constexpr, BLOCK_WORDS: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0) % num_splits
    row = tl.program_id(0) // num_splits * ROWS + tl.arange(0, ROWS)
    here = row < num_lines
    line = row.to(tl.int64)
    stream = tl.load(streams + line, mask=here, other=0)
    limit = tl.load(limits + line, mask=here, other=1)
    upto += line * (num_clusters + 1)
    rates += line * num_clusters
    expected = tl.load(upto + num_clusters, mask=here, other=0.0)
    reached = tl.full([ROWS], 0.0, tl.float64)
    first = tl.full([1, 1], 0, tl.int64)
    turn = 0
    left = tl.max(expected, 0)
    while left > 0.0:
        drawn = random_bits(stream[:, None], first + tl.arange(0, POINTS)[None, :])
        uniform = (((drawn >> 11) & ((1 << 53) - 1)).to(tl.float64) + 0.5) * (2.0**-53)
        time = reached[:, None] + tl.cumsum(-tl.log(uniform), 1)
        if turn % num_splits == split:
            alive = time < expected[:, None]
            low = tl.full([ROWS, POINTS], 0, tl.int32)
            high = tl.full([ROWS, POINTS], 0, tl.int32) + num_clusters
            for _ in tl.static_range(CLUSTER_STEPS):
                undecided = alive & (low < high)
                middle = (low + high) // 2
                end = tl.load(upto[:, None] + middle + 1, mask=undecided, other=0.0)
                high = tl.where(undecided & (end > time), middle, high)
                low = tl.where(undecided & (end <= time), middle + 1, low)
            cluster = tl.minimum(low, num_clusters - 1)
            rate = tl.load(rates[:, None] + cluster, mask=alive, other=1.0)
            place = (time - tl.load(upto[:, None] + cluster, mask=alive, other=0.0)) / rate
            wide = cluster.to(tl.int64)
            ends = sums + (line * sums_line)[:, None] + wide * sums_cluster + 1
            low = tl.full([ROWS, POINTS], 0, tl.int32)
            # not beyond the last block that has a key: memberships need not go on after it
            high = low + ((limit - 1) // 64 if TWO_LEVEL else limit)[:, None]
            for _ in range(steps):
                undecided = alive & (low < high)
                middle = (low + high) // 2
                end = tl.load(ends + middle, mask=undecided, other=0.0)
                high = tl.where(undecided & (end > place), middle, high)
                low = tl.where(undecided & (end <= place), middle + 1, low)
            key = low
            if TWO_LEVEL:
                before = tl.load(ends + low - 1, mask=alive, other=0.0)
                inside = (
                    members + (line * members_line)[:, None] + wide * members_cluster + low.to(tl.int64) * 64
                )
                total = tl.full([ROWS, POINTS], 0.0, tl.float64)
                key = low * 64
                for one in range(64):
                    total += tl.load(inside + one, mask=alive, other=0.0).to(tl.float64)
                    key += (total + before <= place).to(tl.int32)
            # a place that was rounded up to the end of what the row sees belongs to its last key
            key = tl.minimum(key, (limit - 1)[:, None])
            word = key // 32
            block = (row // TILE_ROWS)[:, None].to(tl.int64) * blocks + word // BLOCK_WORDS
            at = (block * TILE_ROWS + (row % TILE_ROWS)[:, None]) * BLOCK_WORDS + word % BLOCK_WORDS
            tl.atomic_or(bits + at, 1 << (key % 32), mask=alive & here[:, None], sem="relaxed")
        reached = tl.max(time, 1)
        left = tl.max(expected - reached, 0)
        first += POINTS
        turn += 1


@triton.jit(do_not_specialize=["first_row", "num_rows", "num_keys", "start", "blocks"])
def decide_pairs(
    bits, streams, chances, first_row, num_rows, num_keys, start, blocks,
    CAUSAL: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, TILE_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):  # fmt: skip
    """chances fp64 [num_rows, num_keys] of rows from ``first_row`` on, whose bits are written."""
    own = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = own < num_rows
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    key = word[:, None] * 32 + tl.arange(0, 32)[None, :]
    stream = tl.load(streams + own, mask=here, other=0)
    drawn = random_bits(stream[:, None, None], key[None, :, :].to(tl.int64))
    uniform = (((drawn >> 11) & ((1 << 53) - 1)).to(tl.float64) + 0.5) * (2.0**-53)
    live = here[:, None, None] & (key < num_keys)[None, :, :]
    row = first_row + own
    if CAUSAL:
        live &= key[None, :, :] <= (row + start)[:, None, None]
    at = chances + (own.to(tl.int64) * num_keys)[:, None, None] + key[None, :, :]
    keep = live & (uniform < tl.load(at, mask=live, other=0.0))
    packed = tl.sum(keep.to(tl.int32) << tl.arange(0, 32)[None, None, :], 2)
    block = (row // TILE_ROWS)[:, None].to(tl.int64) * blocks + (word // BLOCK_WORDS)[None, :]
    to = (block * TILE_ROWS + (row % TILE_ROWS)[:, None]) * BLOCK_WORDS + (word % BLOCK_WORDS)[None, :]
    tl.store(bits + to, packed, mask=here[:, None] & (word < blocks * BLOCK_WORDS)[None, :])


@triton.jit(do_not_specialize=["blocks"])
def count_bits(
    bits, of_rows, of_blocks, blocks,
    TILE_ROWS: tl.constexpr, BLOCK_WORDS: tl.constexpr, WORDS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Bits per block int32 [tiles, blocks], and per row int32 [tiles, rows], added to what is there: BLOCKS
    blocks of a tile at a time."""
    tile = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * BLOCKS
    row = tl.arange(0, TILE_ROWS)
    count = tl.full([TILE_ROWS], 0, tl.int32)
    for block in range(begin, tl.minimum(begin + BLOCKS, blocks)):
        inside = tl.full([TILE_ROWS], 0, tl.int32)
        for first in range(0, BLOCK_WORDS, WORDS):
            word = first + tl.arange(0, WORDS)
            at = bits + ((tile * blocks + block) * TILE_ROWS + row[:, None]) * BLOCK_WORDS + word[None, :]
            x = tl.load(at, mask=(word < BLOCK_WORDS)[None, :], other=0)
            x = x - ((x >> 1) & 0x55555555)
            x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
            x = (x + (x >> 4)) & 0x0F0F0F0F
            x = x + (x >> 8)
            inside += tl.sum((x + (x >> 16)) & 0x3F, 1)
        tl.store(of_blocks + tile * blocks + block, tl.sum(inside, 0))
        count += inside
    tl.atomic_add(of_rows + tile * TILE_ROWS + row, count, sem="relaxed")


@triton.jit(do_not_specialize=["blocks"])
def list_bits(
    bits, edges, begins, counts, blocks,
    TILE_ROWS: tl.constexpr, BLOCK_WORDS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Keys of every row, ascending, from ``begins`` [rows] on; none where ``counts`` [rows] is 0."""
    row = tl.program_id(0).to(tl.int64)
    left = tl.load(counts + row)
    to = tl.load(begins + row)
    bit = tl.arange(0, WORDS * 32)
    first = tl.full([1], 0, tl.int32)
    while left > 0:
        word = first + bit // 32
        block = row // TILE_ROWS * blocks + word // BLOCK_WORDS
        at = bits + (block * TILE_ROWS + row % TILE_ROWS) * BLOCK_WORDS + word % BLOCK_WORDS
        one = (tl.load(at, mask=word < blocks * BLOCK_WORDS, other=0) >> (bit % 32)) & 1
        upto = tl.cumsum(one, 0)
        tl.store(edges + to + upto - 1, first * 32 + bit, mask=one > 0)
        found = tl.sum(one, 0)
        to += found
        left -= found
        first += WORDS


def points_launch(
    bits: Tensor, layout: Layout, tables: PointTables, num_keys: int, *, splits: int = 1
) -> Launch:
    L, C = tables.rates.shape
    members = tables.members
    units = num_keys // 64 if members is not None else num_keys
    height = INTERPRETED_ROWS if interpreting() else POINT_ROWS
    sizes = {
        "num_lines": L,
        "num_clusters": C,
        "sums_line": tables.sums.stride(0) if tables.per_line else 0,
        "sums_cluster": tables.sums.stride(-2),
        "members_line": members.stride(0) if members is not None and tables.per_line else 0,
        "members_cluster": members.stride(-2) if members is not None else 0,
        "steps": units.bit_length(),
        "blocks": layout.blocks,
        "num_splits": splits,
    }
    return Launch(
        kernel="draw_points",
        fn=draw_points,
        grid=(splits * -(-L // height),),
        args={
            "bits": bits, "streams": tables.streams, "limits": tables.limits, "upto": tables.upto,
            "rates": tables.rates, "sums": tables.sums,
            "members": tables.upto if members is None else members, **sizes,
        },
        constants={
            "TWO_LEVEL": members is not None, "ROWS": height, "POINTS": POINTS,
            "CLUSTER_STEPS": C.bit_length(), "TILE_ROWS": layout.rows, "BLOCK_WORDS": layout.words,
        },
        num_warps=NUM_WARPS,
        num_stages=1,
        sizes=frozenset(sizes),
        multiplies=False,
        work=Work(0.0, 0.0, 4.0 * bits.numel()),
        notes={"sums": "blocks" if members is not None else "keys"},
    )  # fmt: skip


def pairs_launch(
    bits: Tensor,
    layout: Layout,
    streams: Tensor,
    chances: Tensor,
    first_row: int,
    start: int,
    *,
    causal: bool,
) -> Launch:
    R, M = chances.shape
    height = INTERPRETED_ROWS if interpreting() else PAIR_ROWS
    sizes = {"first_row": first_row, "num_rows": R, "num_keys": M, "start": start, "blocks": layout.blocks}
    return Launch(
        kernel="decide_pairs",
        fn=decide_pairs,
        grid=(-(-R // height), -(-layout.blocks * layout.words // PAIR_WORDS)),
        args={"bits": bits, "streams": streams, "chances": chances, **sizes},
        constants={
            "CAUSAL": causal, "ROWS": height, "WORDS": PAIR_WORDS, "TILE_ROWS": layout.rows,
            "BLOCK_WORDS": layout.words,
        },
        num_warps=NUM_WARPS,
        num_stages=1,
        sizes=frozenset(sizes),
        multiplies=False,
        work=Work(0.0, 0.0, 8.0 * R * M),
    )  # fmt: skip


def count_launch(bits: Tensor, layout: Layout, of_rows: Tensor, of_blocks: Tensor) -> Launch:
    """``of_rows`` must be 0: sums of whole numbers, whose order does not matter."""
    return Launch(
        kernel="count_bits",
        fn=count_bits,
        grid=(len(bits), -(-layout.blocks // COUNTED_BLOCKS)),
        args={"bits": bits, "of_rows": of_rows, "of_blocks": of_blocks, "blocks": layout.blocks},
        constants=_shape(layout) | {"BLOCKS": COUNTED_BLOCKS},
        num_warps=NUM_WARPS,
        num_stages=1,
        sizes=frozenset({"blocks"}),
        multiplies=False,
        work=Work(0.0, 0.0, 4.0 * bits.numel()),
    )


def list_launch(bits: Tensor, layout: Layout, edges: Tensor, begins: Tensor, counts: Tensor) -> Launch:
    return Launch(
        kernel="list_bits",
        fn=list_bits,
        grid=(len(counts),),
        args={"bits": bits, "edges": edges, "begins": begins, "counts": counts, "blocks": layout.blocks},
        constants=_shape(layout) | {"WORDS": LISTED_WORDS},
        num_warps=NUM_WARPS,
        num_stages=1,
        sizes=frozenset({"blocks"}),
        multiplies=False,
        work=Work(0.0, 0.0, 4.0 * (bits.numel() + edges.numel())),
    )


def bit_examples(num_rows: int) -> Iterator[Launch]:
    """One head of a causal prefill of 128 clusters, and the drawing of a decode step of 32 heads."""
    C, M = 128, num_rows
    floats = torch.empty(M, C, dtype=torch.float64, device="meta")
    words, longs = (torch.empty(M, dtype=dtype, device="meta") for dtype in (torch.int32, torch.int64))
    layout, row = Layout(128, 2, M // 64), Layout(1, 128, M // 4096)
    bits, row_bits = words.new_empty(M // 128, M // 64, 128, 2), words.new_empty(32, M // 4096, 1, 128)
    sums, upto = floats.new_empty(C, M + 1), floats.new_empty(M, C + 1)
    yield points_launch(bits, layout, PointTables(longs, words, upto, floats, sums, None, False), M)
    blocks, members = floats.new_empty(32, C, M // 64 + 1), words.new_empty(32, C, M, dtype=torch.float32)
    own = PointTables(longs[:32], words[:32], upto[:32], floats[:32], blocks, members, True)
    yield points_launch(row_bits, row, own, M, splits=16)
    yield pairs_launch(bits, layout, longs[:1024], floats.new_empty(1024, M), 0, 0, causal=True)
    yield count_launch(bits, layout, words.new_empty(M // 128, 128), words.new_empty(M // 128, M // 64))
    yield list_launch(bits, layout, words.new_empty(M * M // 48), longs, words)


def _shape(layout: Layout) -> dict[str, int | bool | str | float]:
    words = 1 << (layout.words - 1).bit_length()
    return {"TILE_ROWS": layout.rows, "BLOCK_WORDS": layout.words, "WORDS": min(words, LISTED_WORDS)}
