"""Which key blocks each query tile keeps, decided on the device: shares of the mass, the choice, its lists.

    mass_tb = mean over the items j of tile t and the group's heads of  2^(sum_jb) / sum_b' 2^(sum_jb')
    taken   = blocks of largest score before which less than the target is gathered, ties to the lower block

``sum_jb`` comes from ``kernels._triton.antidiagonal``. The target is a number of blocks (every block weighs
1) or a share of the mass (a block weighs its mass, beside the own keys'); both are one rule. No scores are
sorted: the smallest score that is still taken is found bit by bit, 32 times a sum over the blocks of greater
score. A block whose score is not finite goes before all others; under ``mass`` the tile then keeps every
block.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton import selected_means, selected_skip
from kernels._triton.antidiagonal import BROKEN, FLAGS, POISON, Items, antidiagonal_items, block_sums
from kernels._triton.launch import Launch, Work
from kernels._triton.primitives import LN_2
from kernels._triton.targets import Target
from kernels.math.query_tiles import QueryTiles
from kernels.math.selection import ABOVE_ALL, Keep

ITEMS = 16
BLOCKS = 128
CHUNK = 1024
"""Blocks of a tile that are looked at together."""
_ABOVE = tl.constexpr(ABOVE_ALL)


@triton.jit(
    do_not_specialize=["sums_head", "sums_item", "first_item", "num_items", "num_blocks", "stats_head"]
)
def item_totals_kernel(
    SUMS,
    TOP,
    TOTAL,
    LSE,
    sums_head,
    sums_item,
    first_item,
    num_items,
    num_blocks,
    stats_head,
    SEEN: tl.constexpr,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    WANTS_LSE: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    local = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    stop = (first_item + local + 1) * SEEN
    last = num_blocks
    if CAUSAL:
        longest = (first_item + tl.minimum(tl.program_id(0) * BLOCK_I + BLOCK_I, num_items)) * SEEN
        last = tl.minimum(num_blocks, (longest + BLOCK - 1) // BLOCK)
    top = tl.full([BLOCK_I], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_I], tl.float32)
    flags = tl.zeros([BLOCK_I], tl.int32)
    for begin in tl.range(0, last, BLOCK_B):
        blocks = begin + tl.arange(0, BLOCK_B)
        inside = (local < num_items)[:, None] & (blocks < last)[None]
        if CAUSAL:
            inside &= blocks[None] * BLOCK < stop[:, None]
        at = SUMS + head * sums_head + local[:, None].to(tl.int64) * sums_item + blocks[None]
        bits = tl.load(at, mask=inside, other=0)
        flags |= tl.max(tl.where(inside, bits & FLAGS, 0), 1)
        sums = tl.where(inside, (bits & ~FLAGS).to(tl.float32, bitcast=True), float("-inf"))
        best = tl.maximum(top, tl.max(sums, 1))
        base = tl.where(best == float("-inf"), 0.0, best)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(sums - base[:, None]), 1)
        top = best
    at = head * stats_head + local
    tl.store(TOP + at, top, mask=local < num_items)
    tl.store(TOTAL + at, total, mask=local < num_items)
    if WANTS_LSE:
        lse = (top + tl.log2(tl.where(total == 0.0, 1.0, total))) * LN_2
        lse = tl.where(flags >= POISON, float("nan"), lse)
        tl.store(LSE + at, lse, mask=local < num_items)


@triton.jit(
    do_not_specialize=[
        "sums_head",
        "sums_item",
        "stats_head",
        "mass_head",
        "mass_tile",
        "first_item",
        "num_items",
    ]
    + ["first_tile", "num_blocks", "base_item"]
)
def tile_shares_kernel(
    SUMS,
    TOP,
    TOTAL,
    MASS,
    sums_head,
    sums_item,
    stats_head,
    mass_head,
    mass_tile,
    first_item,
    num_items,
    first_tile,
    num_blocks,
    base_item,
    GROUP: tl.constexpr,
    HEIGHT: tl.constexpr,
    SEEN: tl.constexpr,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    tile = first_tile + tl.program_id(1)
    key_head = tl.program_id(2)
    per_tile: tl.constexpr = HEIGHT // SEEN
    begin = tl.maximum(tile * per_tile, first_item)
    stop = tl.minimum((tile + 1) * per_tile, first_item + num_items)
    if CAUSAL and tl.program_id(0) * BLOCK_B * BLOCK >= stop * SEEN:
        return
    blocks = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    shares = tl.zeros([BLOCK_B], tl.float32)
    broken = tl.zeros([BLOCK_B], tl.int32)
    for member in tl.range(0, GROUP):
        head = (key_head * GROUP + member).to(tl.int64)
        for item in tl.range(begin, stop, BLOCK_I):
            items = item + tl.arange(0, BLOCK_I)
            local = (items - base_item).to(tl.int64)
            live = items < stop
            inside = live[:, None] & (blocks < num_blocks)[None]
            if CAUSAL:
                inside &= blocks[None] * BLOCK < (items[:, None] + 1) * SEEN
            at = SUMS + head * sums_head + local[:, None] * sums_item + blocks[None]
            bits = tl.load(at, mask=inside, other=0)
            broken |= tl.max(tl.where(inside, bits & BROKEN, 0), 0)
            sums = tl.where(inside, (bits & ~FLAGS).to(tl.float32, bitcast=True), float("-inf"))
            top = tl.load(TOP + head * stats_head + local, mask=live, other=0.0)
            total = tl.load(TOTAL + head * stats_head + local, mask=live, other=1.0)
            weights = tl.exp2(sums - tl.where(top == float("-inf"), 0.0, top)[:, None])
            shares += tl.sum(weights / tl.where(total == 0.0, 1.0, total)[:, None], 0)
    mass = tl.where(broken > 0, float("nan"), shares / ((stop - begin) * GROUP).to(tl.float32))
    at = MASS + key_head.to(tl.int64) * mass_head + tl.program_id(1).to(tl.int64) * mass_tile + blocks
    tl.store(at, mass, mask=blocks < num_blocks)


@triton.jit
def _looked_at(
    mass,
    begin,
    tile,
    num_candidates,
    num_seen,
    CAUSAL: tl.constexpr,
    PER_TILE: tl.constexpr,
    FIRST: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """CHUNK blocks: whether each is a candidate, its mass, and its score as an integer of the same order."""
    blocks = begin + tl.arange(0, CHUNK)
    candidate = blocks < num_candidates
    if CAUSAL:
        candidate &= blocks < tile * PER_TILE
    else:
        candidate &= (blocks < tile * PER_TILE) | (blocks >= (tile + 1) * PER_TILE)
    found = tl.load(mass + blocks, mask=blocks < num_seen, other=0.0)
    broken = (blocks < num_seen) & ~(tl.abs(found) < float("inf"))
    score = tl.where(broken, float("inf"), found + 0.0)  # -0 is 0
    if FIRST:
        score = tl.where(blocks == 0, tl.maximum(score, _ABOVE), score)
    bits = score.to(tl.int32, bitcast=True)
    rank = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return candidate, tl.where(broken, 0.0, found), rank, broken


@triton.jit(
    do_not_specialize=["mass_head", "mass_tile", "table_head", "table_tile", "counts_head", "first_tile"]
    + ["num_candidates", "num_blocks", "stop"]
)
def choose_kernel(
    MASS,
    AMOUNT,
    TABLE,
    COUNTS,
    mass_head,
    mass_tile,
    table_head,
    table_tile,
    counts_head,
    first_tile,
    num_candidates,
    num_blocks,
    stop,
    HEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    RULE: tl.constexpr,
    FIRST: tl.constexpr,
    CHUNK: tl.constexpr,
):
    local, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tile = first_tile + local
    PER_TILE: tl.constexpr = HEIGHT // BLOCK
    num_seen = num_blocks
    last = num_candidates
    if CAUSAL:
        num_seen = (tl.minimum((tile + 1) * HEIGHT, stop) + BLOCK - 1) // BLOCK
        last = tl.minimum(num_candidates, tile * PER_TILE)
    if RULE != "mass":
        num_seen = tl.minimum(num_seen, num_candidates)
    if RULE == "all":
        num_seen = 0
    mass = MASS + head * mass_head + local.to(tl.int64) * mass_tile
    gathered = tl.full([], 0.0, tl.float64)
    target = tl.full([], 0.0, tl.float64)
    every = tl.full([], 0, tl.int32)
    if RULE == "all":
        every += 1
    else:
        amount = tl.load(AMOUNT + head).to(tl.float64, bitcast=True)
        if RULE == "budget":
            target += amount
        else:
            for begin in tl.range(0, num_seen, CHUNK):
                candidate, found, rank, broken = _looked_at(
                    mass, begin, tile, num_candidates, num_seen, CAUSAL, PER_TILE, FIRST, CHUNK
                )
                found = found.to(tl.float64)
                gathered += tl.sum(tl.where(candidate, 0.0, found))
                target += tl.sum(found)
                every |= tl.max(broken.to(tl.int32))
            target *= amount
            every |= (amount == 1.0).to(tl.int32)
    # the smallest rank at which too little has been gathered before: what lies above it is taken
    low = tl.full([], -0x7F800001, tl.int64)
    high = tl.full([], 0x7F800000, tl.int64)
    if every != 0:
        high = low
    while low < high:
        middle = (low + high) >> 1
        above = gathered
        for begin in tl.range(0, last, CHUNK):
            candidate, found, rank, broken = _looked_at(
                mass, begin, tile, num_candidates, num_seen, CAUSAL, PER_TILE, FIRST, CHUNK
            )
            weight = tl.where(candidate & (rank > middle), 1.0, 0.0).to(tl.float64)
            if RULE == "mass":
                weight *= found.to(tl.float64)
            above += tl.sum(weight)
        if above < target:
            high = middle
        else:
            low = middle + 1
    above = gathered
    for begin in tl.range(0, last, CHUNK):
        candidate, found, rank, broken = _looked_at(
            mass, begin, tile, num_candidates, num_seen, CAUSAL, PER_TILE, FIRST, CHUNK
        )
        weight = tl.where(candidate & (rank > low), 1.0, 0.0).to(tl.float64)
        if RULE == "mass":
            weight *= found.to(tl.float64)
        above += tl.sum(weight)
    count = tl.full([], 0, tl.int32)
    for begin in tl.range(0, num_candidates, CHUNK):
        candidate, found, rank, broken = _looked_at(
            mass, begin, tile, num_candidates, num_seen, CAUSAL, PER_TILE, FIRST, CHUNK
        )
        tied = candidate & (rank == low)
        weight = tl.where(tied, 1.0, 0.0).to(tl.float64)
        if RULE == "mass":
            weight *= found.to(tl.float64)
        before = above + tl.cumsum(weight, 0) - weight
        above += tl.sum(weight)
        taken = candidate & ((rank > low) | (tied & (before < target)) | (every != 0))
        blocks = begin + tl.arange(0, CHUNK)
        if FIRST and RULE == "mass":
            taken |= candidate & (blocks == 0)
        count += tl.sum(taken.to(tl.int32))
        at = TABLE + head * table_head + local.to(tl.int64) * table_tile + blocks
        tl.store(at, taken.to(tl.int8), mask=blocks < num_candidates)
    tl.store(COUNTS + head * counts_head + local, count)


@triton.jit(do_not_specialize=["table_head", "table_tile", "indptr_head", "num_blocks"])
def fill_kernel(
    TABLE,
    INDPTR,
    ENTRIES,
    table_head,
    table_tile,
    indptr_head,
    num_blocks,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    begin = tl.load(INDPTR + head * indptr_head + tile)
    end = tl.load(INDPTR + head * indptr_head + tile + 1)
    row = TABLE + head * table_head + tile.to(tl.int64) * table_tile
    first = 0
    while begin < end:
        blocks = first + tl.arange(0, CHUNK)
        taken = tl.load(row + blocks, mask=blocks < num_blocks, other=0).to(tl.int32)
        at = (begin + tl.cumsum(taken, 0) - taken).to(tl.int64) * 2
        tl.store(ENTRIES + at, blocks * BLOCK, mask=taken != 0)
        tl.store(ENTRIES + at + 1, tl.full([CHUNK], 1, tl.int32), mask=taken != 0)
        begin += tl.sum(taken)
        first += CHUNK


SUMS_BYTES = 256 << 20
"""Sums of items and blocks that exist at once, unless one tile alone has more."""


@dataclass(frozen=True)
class Scores:
    """``mass`` [Hk, num_tiles, blocks] fp32: shares of the softmax mass of every block that some row may see
    (those beyond a tile's last row are not written). ``lse`` [H, N]: log-sum-exp over every visible key,
    where it was asked for. ``scored`` as ``Stats.pairs_scored``."""

    mass: Tensor
    lse: Tensor | None
    scored: int


def tile_scores(items: Items, tiles: QueryTiles, scale: float, *, wants_lse: bool = False) -> Scores:
    """Shares of every block, tiles after tiles as memory allows."""
    Hk, H = len(items.k), items.num_heads
    num_blocks, per_tile = -(-items.num_keys // tiles.block), tiles.height // items.height
    device = items.q.device
    mass = torch.empty(Hk, tiles.num_tiles, num_blocks, dtype=torch.float32, device=device)
    first_tile = tiles.start // tiles.height
    at_once = max(1, SUMS_BYTES // (4 * H * num_blocks * per_tile))
    room = min(items.num, at_once * per_tile)
    sums = torch.empty(H, room, num_blocks, dtype=torch.int32, device=device)
    top, total = (torch.empty(H, items.num, dtype=torch.float32, device=device) for _ in range(2))
    lse = torch.empty_like(top) if wants_lse else None
    for tile in range(0, tiles.num_tiles, at_once):
        begin = max((first_tile + tile) * per_tile, items.first)
        stop = min((first_tile + tile + at_once) * per_tile, items.first + items.num)
        own = slice(begin - items.first, stop - items.first)
        block_sums(items, sums, begin, stop - begin, scale, tiles.block).run()
        stats = top[:, own], total[:, own]
        item_totals(items, sums, *stats, None if lse is None else lse[:, own], begin, tiles.block).run()
        tile_shares(
            items, tiles, sums, *stats, mass[:, tile : tile + at_once], begin, first_tile + tile
        ).run()
    return Scores(mass, lse, items.scored)


def item_totals(
    items: Items, sums: Tensor, top: Tensor, total: Tensor, lse: Tensor | None, first: int, block: int
) -> Launch:
    """Largest sum and total of each item from ``first``, over all blocks that it sees: [H, num]."""
    H, num = top.shape
    return Launch(
        kernel="item_totals",
        fn=item_totals_kernel,
        grid=(-(-num // ITEMS), H),
        args={
            "SUMS": sums,
            "TOP": top,
            "TOTAL": total,
            "LSE": top if lse is None else lse,
            "sums_head": sums.stride(0),
            "sums_item": sums.stride(1),
            "first_item": first,
            "num_items": num,
            "num_blocks": sums.shape[2],
            "stats_head": top.stride(0),
        },
        constants={
            "SEEN": items.height,
            "BLOCK": block,
            "CAUSAL": items.causal,
            "WANTS_LSE": lse is not None,
            "BLOCK_I": ITEMS,
            "BLOCK_B": BLOCKS,
        },
        num_warps=4,
        sizes=frozenset({"sums_head", "sums_item", "first_item", "num_items", "num_blocks", "stats_head"}),
        multiplies=False,
        work=Work(0.0, H * num * sums.shape[2] * _half(items), H * num * sums.shape[2] * 4.0 * _half(items)),
    )


def tile_shares(
    items: Items,
    tiles: QueryTiles,
    sums: Tensor,
    top: Tensor,
    total: Tensor,
    mass: Tensor,
    base_item: int,
    first_tile: int,
) -> Launch:
    """Means over the items of each tile, from tile ``first_tile`` of the sequence on: mass [Hk, tiles,
    blocks]."""
    Hk, num_tiles, num_blocks = mass.shape
    H, num = top.shape
    return Launch(
        kernel="tile_shares",
        fn=tile_shares_kernel,
        grid=(-(-num_blocks // BLOCKS), num_tiles, Hk),
        args={
            "SUMS": sums,
            "TOP": top,
            "TOTAL": total,
            "MASS": mass,
            "sums_head": sums.stride(0),
            "sums_item": sums.stride(1),
            "stats_head": top.stride(0),
            "mass_head": mass.stride(0),
            "mass_tile": mass.stride(1),
            "first_item": items.first,
            "num_items": items.num,
            "first_tile": first_tile,
            "num_blocks": num_blocks,
            "base_item": base_item,
        },
        constants={
            "GROUP": H // Hk,
            "HEIGHT": tiles.height,
            "SEEN": items.height,
            "BLOCK": tiles.block,
            "CAUSAL": items.causal,
            "BLOCK_I": ITEMS,
            "BLOCK_B": BLOCKS,
        },
        num_warps=4,
        sizes=frozenset(
            ("sums_head", "sums_item", "stats_head", "mass_head", "mass_tile", "first_item", "num_items")
            + ("first_tile", "num_blocks", "base_item")
        ),
        multiplies=False,
        work=Work(0.0, H * num * num_blocks * _half(items), H * num * num_blocks * 4.0 * _half(items)),
    )


def _half(items: Items) -> float:
    return 0.5 if items.causal else 1.0


@dataclass(frozen=True)
class Choice:
    """``table`` int8 [Hk, num_tiles, num_blocks]: 1 where a tile keeps a block; ``counts`` int32 [Hk,
    num_tiles]."""

    table: Tensor
    counts: Tensor


def choose_blocks(
    device: torch.device,
    heads: int,
    mass: Tensor | None,
    tiles: QueryTiles,
    keep: Keep,
    stop: int,
    *,
    first_block: bool,
) -> Choice:
    """The blocks that each tile keeps; without ``mass``, every candidate. ``stop``: keys up to the last that
    some row may see."""
    table = torch.empty(heads, tiles.num_tiles, tiles.num_blocks, dtype=torch.int8, device=device)
    counts = torch.empty(heads, tiles.num_tiles, dtype=torch.int32, device=device)
    amounts = torch.tensor(keep.blocks or keep.mass, dtype=torch.float64).view(torch.int64)
    rule = "all" if mass is None else "mass" if keep.blocks is None else "budget"
    choose(mass, amounts.to(device, non_blocking=True), table, counts, tiles, stop, rule, first_block).run()
    return Choice(table, counts)


def choose(
    mass: Tensor | None,
    amounts: Tensor,
    table: Tensor,
    counts: Tensor,
    tiles: QueryTiles,
    stop: int,
    rule: str,
    first_block: bool,
) -> Launch:
    """Fill ``table`` and ``counts``. ``amounts`` int64 [Hk]: bits of fp64 numbers, blocks or shares."""
    known = counts if mass is None else mass
    return Launch(
        kernel="choose",
        fn=choose_kernel,
        grid=(counts.shape[1], counts.shape[0]),
        args={
            "MASS": known,
            "AMOUNT": amounts,
            "TABLE": table,
            "COUNTS": counts,
            "mass_head": known.stride(0),
            "mass_tile": known.stride(1),
            "table_head": table.stride(0),
            "table_tile": table.stride(1),
            "counts_head": counts.stride(0),
            "first_tile": tiles.start // tiles.height,
            "num_candidates": table.shape[2],
            "num_blocks": -(-stop // tiles.block),
            "stop": stop,
        },
        constants={
            "HEIGHT": tiles.height,
            "BLOCK": tiles.block,
            "CAUSAL": tiles.causal,
            "RULE": rule,
            "FIRST": first_block,
            "CHUNK": CHUNK,
        },
        num_warps=4,
        sizes=frozenset(
            ("mass_head", "mass_tile", "table_head", "table_tile", "counts_head", "first_tile")
            + ("num_candidates", "num_blocks", "stop")
        ),
        multiplies=False,
        work=Work(0.0, 0.0, float(table.nbytes) * 5),
        notes={"rule": rule},
    )


def entries_of(choice: Choice, block: int, most: int) -> tuple[Tensor, Tensor]:
    """The chosen blocks in compressed sparse rows, as ``block_sparse.Lists`` wants them: indptr int32 [Hk,
    tiles + 1] and (first key, step) [most, 2], of which as many are written as are listed."""
    heads, num_tiles = choice.counts.shape
    ends = choice.counts.flatten().cumsum(0, dtype=torch.int32).view(heads, num_tiles)
    begins = torch.nn.functional.pad(ends[:-1, -1:], (0, 0, 1, 0))
    indptr = torch.cat([begins, ends], 1)
    entries = torch.empty(max(most, 1), 2, dtype=torch.int32, device=indptr.device)
    fill(choice.table, indptr, entries, block).run()
    return indptr, entries


def fill(table: Tensor, indptr: Tensor, entries: Tensor, block: int) -> Launch:
    """Write the lists of ``table`` to where ``indptr`` says."""
    return Launch(
        kernel="fill_lists",
        fn=fill_kernel,
        grid=(table.shape[1], table.shape[0]),
        args={
            "TABLE": table,
            "INDPTR": indptr,
            "ENTRIES": entries,
            "table_head": table.stride(0),
            "table_tile": table.stride(1),
            "indptr_head": indptr.stride(0),
            "num_blocks": table.shape[2],
        },
        constants={"BLOCK": block, "CHUNK": CHUNK},
        num_warps=4,
        sizes=frozenset({"table_head", "table_tile", "indptr_head", "num_blocks"}),
        multiplies=False,
        work=Work(0.0, 0.0, float(table.nbytes + entries.nbytes)),
    )


def examples(target: Target, dtype: torch.dtype, head_dim: int) -> Iterable[Launch]:
    """The choice of xattention's blocks among 16,384 keys, 32 query heads of 8 key heads."""
    H, Hk, N, T, L, S = 32, 8, 16384, 256, 64, 16

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    items = antidiagonal_items(
        empty(H, N, head_dim, dtype=dtype), empty(Hk, N, head_dim, dtype=dtype), S, 0, N, True
    )
    tiles = QueryTiles(T, L, 0, N, True, tuple(range(0, N + 1, T)))
    sums, top, mass = empty(H, N // S, N // L, dtype=torch.int32), empty(H, N // S), empty(Hk, N // T, N // L)
    table, counts = empty(Hk, N // T, N // L, dtype=torch.int8), empty(Hk, N // T, dtype=torch.int32)
    amounts, indptr = empty(Hk, dtype=torch.int64), empty(Hk, N // T + 1, dtype=torch.int32)
    yield item_totals(items, sums, top, top, None, 0, L)
    yield tile_shares(items, tiles, sums, top, top, mass, 0, 0)
    for rule in ("budget", "mass", "all"):
        yield choose(None if rule == "all" else mass, amounts, table, counts, tiles, N, rule, True)
    yield fill(table, indptr, empty(Hk * N // T * 16, 2, dtype=torch.int32), L)
    yield from selected_means.examples(target, dtype, head_dim)
    yield from selected_skip.examples(target, dtype, head_dim)
