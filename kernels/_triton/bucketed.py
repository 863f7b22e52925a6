"""Softmax over buckets after a permutation: rows and keys sorted alike, one launch per round.

    O_i = sum_{p in [lo_i, hi_i), counted} e^(s_ij - lse_i) v_j,     j = order[p],   s_ij = scale <q_i, k_j>

A program takes one tile of the sorted rows (``bucketed_plan`` cuts them) and walks the places that any of its
rows looks at; keys are gathered through ``order``. A pair does not count where the row's window holds it
(bidirectional; causal rows end before it) or where an earlier round of another table has found it, which that
round's place of the key tells. What the program finds is merged by log-sum-exp into the rows, which hold the
window, sinks and exact rows already: no row stands in two tiles of a round, so nothing is written twice.

A value that is not finite reaches the rows that keep its key, as NaN, and no other: where there is one
(``broken``, told by the device), a second form of the kernel cleans values and counts the rows that a broken
one reaches by a product more. Both are launched, and one of them returns at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.bucketed_plan import Plan, Shape, example_plan, plan_rounds
from kernels._triton.bucketed_row import attend_launch, find_launch
from kernels._triton.launch import Launch, Work
from kernels._triton.primitives import (
    load_rows,
    merged,
    power_of_two,
    precision_of,
    softmax_end,
    softmax_step,
    unsigned_scale,
)
from kernels._triton.targets import Target, target_of
from kernels.contract import Call
from kernels.math.accumulate import Accumulator, accumulator
from kernels.math.buckets import Codes, Reach

EXAMPLE_TOKENS = 16384
_SIZES = (
    "num_slots", "num_keys", "num_tiles", "start", "round_number", "window", "scale", "sign", "lse_b",
    "lse_h", "lse_g",
)  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def bucketed_softmax(
    q, k, v, out, lse, kept, walked, order, place, lo, hi, perm, tiles, broken,
    q_b, q_h, q_g, q_n, k_b, k_h, k_m, v_b, v_h, v_m, out_b, out_h, out_g, out_n, lse_b, lse_h, lse_g, lse_n,
    num_slots, num_keys, num_tiles, start, round_number, window, scale, sign,
    HK: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROUNDS: tl.constexpr, TABLES: tl.constexpr, EARLIER: tl.constexpr, HOLE: tl.constexpr,
    GUARD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, x = tl.program_id(0), tl.program_id(1).to(tl.int64)
    cut = tiles + (x * ROUNDS + round_number) * (num_tiles + 1) + tile
    first, stop = tl.load(cut), tl.load(cut + 1)
    if (first >= stop) | ((tl.load(broken) != 0) != GUARD):
        return
    b, h = x // HK, x % HK
    this_round = (x * ROUNDS + round_number) * num_slots
    index = first + tl.arange(0, BLOCK_M)
    live = index < stop
    slot = tl.load(perm + this_round + index, mask=live, other=0)
    row_lo = tl.load(lo + this_round + slot, mask=live, other=2147483647)
    row_hi = tl.load(hi + this_round + slot, mask=live, other=0)
    n, g = (slot // G).to(tl.int64), (slot % G).to(tl.int64)
    position = start + slot // G
    queries = load_rows(q + b * q_b + h * q_h, g * q_g + n * q_n, 1, live, D, BLOCK_D, True)
    queries = (queries * sign).to(queries.dtype)
    begin, end = tl.min(row_lo, 0), tl.max(row_hi, 0)
    table = 0 if TABLES == 1 else round_number
    order_base = order + (x * TABLES + table) * num_keys
    k_base, v_base = k + b * k_b + h * k_h, v + b * v_b + h * v_h
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    count = tl.zeros([BLOCK_M], tl.int32)
    for p in tl.range(begin, end, BLOCK_N):
        places = p + tl.arange(0, BLOCK_N)
        inside = places < end
        j = tl.load(order_base + places, mask=inside, other=0)
        keys = load_rows(k_base, j.to(tl.int64), k_m, inside, D, BLOCK_D, True)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        keep = (places[None] >= row_lo[:, None]) & (places[None] < row_hi[:, None])
        if HOLE:
            distance = position[:, None] - j[None]
            keep = keep & ((distance > window) | (distance < -window))
        for e in tl.static_range(EARLIER):
            there = tl.load(place + (x * TABLES + e) * num_keys + j, mask=inside, other=0)
            earlier = (x * ROUNDS + e) * num_slots
            low = tl.load(lo + earlier + slot, mask=live, other=0)
            high = tl.load(hi + earlier + slot, mask=live, other=0)
            keep = keep & ((there[None] < low[:, None]) | (there[None] >= high[:, None]))
        scores = tl.where(keep, scores, float("-inf"))
        # told by the scores, which lie where products leave them: a second copy of ``keep`` costs registers
        count += tl.sum((scores != float("-inf")).to(tl.int32), 1)
        values = load_rows(v_base, j.to(tl.int64), v_m, inside, DV, BLOCK_DV, True)
        if GUARD:
            wrong = ~(tl.abs(values.to(tl.float32)) < float("inf"))
            seen = (scores != float("-inf")).to(q.dtype.element_ty)
            reached = tl.dot(seen, wrong.to(q.dtype.element_ty))
            acc = tl.where(reached > 0.0, float("nan"), acc)
            values = tl.where(wrong, 0.0, values).to(values.dtype)
        m, l, acc = softmax_step(scores, values, m, l, acc, scale, PRECISION)
    tl.store(walked + x * num_tiles + tile, tl.cdiv(end - begin, BLOCK_N) * BLOCK_N)
    kept_at = kept + x * num_slots + slot
    tl.store(kept_at, count + tl.load(kept_at, mask=live, other=0), mask=live)
    acc, part_lse = softmax_end(m, l, acc)
    lse_at = lse + b * lse_b + h * lse_h + g * lse_g + n * lse_n
    old_lse = tl.load(lse_at, mask=live, other=float("-inf"))
    to = g * out_g + n * out_n
    before = load_rows(out + b * out_b + h * out_h, to, 1, live, DV, BLOCK_DV, True)
    acc, part_lse = merged(before, old_lse, acc, part_lse)
    dims = tl.arange(0, BLOCK_DV)
    out_at = out + b * out_b + h * out_h + to[:, None] + dims[None]
    tl.store(out_at, acc, mask=live[:, None] & (dims < DV)[None])
    tl.store(lse_at, part_lse, mask=live)


@dataclass(frozen=True)
class Tile:
    """Rows and places that a program takes at a time (``guarded``: places where values are broken)."""

    rows: int
    places: int
    guarded: int
    num_warps: int
    num_stages: int


def tile_for(target: Target, dtype: torch.dtype, head_dim: int) -> Tile:
    """As much as fits into registers beside the conditions on pairs; capability 8.0 keeps sums of products in
    registers that later chips spare."""
    wide, old = power_of_two(head_dim), target.capability < 90
    if dtype == torch.float32:
        return Tile(32 if wide >= 128 or old else 64, 32, 32, 8, 1)
    if wide >= 128 or old:
        return Tile(64, 32, 16, 8, 2)
    return Tile(64, 64, 32, 4, 2)


@dataclass(frozen=True)
class Found:
    """What the rounds add to: pairs kept by each row int32 [X, slots], and places that each tile walked int32
    [rounds, X, tiles], whole blocks of them."""

    kept: Tensor
    walked: Tensor


def add_buckets(acc: Accumulator, codes: list[Codes], reach: Reach) -> tuple[Tensor, Tensor]:
    """Add what the buckets of every sequence (one ``Codes`` each) keep beyond ``reach.base``, which the rows
    hold already. Returns, on the device, the pairs kept by each query head int64 [H] and those computed."""
    B, Hk, G, N, D = acc.q.shape
    tile = tile_for(target_of(acc.q.device), acc.q.dtype, D)
    shape = Shape(B * Hk, G, N, acc.k.shape[2], len(codes[0].tables), acc.call.start)
    plan = plan_rounds(codes, shape, reach, acc.call.causal, tile.rows)
    found = Found(
        torch.zeros(shape.heads, shape.slots, dtype=torch.int32, device=acc.q.device),
        torch.zeros(shape.rounds, shape.heads, plan.num_tiles, dtype=torch.int32, device=acc.q.device),
    )
    for launch in round_launches(acc, plan, found, reach, tile, _broken(acc.v)):
        launch.run()
    kept = found.kept.view(B, Hk, N, G).sum((0, 2), dtype=torch.int64).flatten()
    return kept, found.walked.sum(dtype=torch.int64) * tile.rows


def _broken(v: Tensor) -> Tensor:
    """int32 [1]: 0 where all values are finite (or their sum overflows: then values are looked at one by one
    for nothing)."""
    return (~torch.isfinite(v.sum(dtype=torch.float32))).to(torch.int32).view(1)


def round_launches(
    acc: Accumulator, plan: Plan, found: Found, reach: Reach, tile: Tile, broken: Tensor
) -> Iterable[Launch]:
    """One launch per round, in their order."""
    _, Hk, G, _, D = acc.q.shape
    Dv, shape = acc.v.shape[-1], plan.shape
    scale, sign = unsigned_scale(acc.call.scale)
    for r, guard in product(range(shape.rounds), (False, True)):
        block = tile.guarded if guard else tile.places
        yield Launch(
            "bucketed_softmax",
            bucketed_softmax,
            (plan.num_tiles, shape.heads),
            {
                "q": acc.q,
                "k": acc.k,
                "v": acc.v,
                "out": acc.out,
                "lse": acc.lse,
                "kept": found.kept,
                "walked": found.walked[r],
                "order": plan.order,
                "place": plan.place,
                "lo": plan.lo,
                "hi": plan.hi,
                "perm": plan.perm,
                "tiles": plan.tiles,
                "broken": broken,
                **_strides("q", acc.q, "bhgn"),
                **_strides("k", acc.k, "bhm"),
                **_strides("v", acc.v, "bhm"),
                **_strides("out", acc.out, "bhgn"),
                **_strides("lse", acc.lse, "bhgn"),
                "num_slots": shape.slots,
                "num_keys": shape.keys,
                "num_tiles": plan.num_tiles,
                "start": shape.start,
                "round_number": r,
                "window": reach.window,
                "scale": scale,
                "sign": sign,
            },
            {
                "HK": Hk,
                "G": G,
                "D": D,
                "DV": Dv,
                "BLOCK_D": power_of_two(D),
                "BLOCK_DV": power_of_two(Dv),
                "BLOCK_M": tile.rows,
                "BLOCK_N": block,
                "ROUNDS": shape.rounds,
                "TABLES": plan.tables,
                "EARLIER": r if plan.tables > 1 else 0,
                "HOLE": not acc.call.causal,
                "GUARD": guard,
                "PRECISION": precision_of(acc.q.dtype),
            },
            tile.num_warps,
            tile.num_stages,
            frozenset(_SIZES),
            notes={
                "earlier": r if plan.tables > 1 else 0,
                "causal": int(acc.call.causal),
                "guard": int(guard),
            },
        )


def _strides(name: str, tensor: Tensor, letters: str) -> dict[str, int]:
    return {f"{name}_{letter}": tensor.stride(at) for at, letter in enumerate(letters)}


def examples(target: Target, dtype: torch.dtype, head_dim: int) -> Iterator[Launch]:
    """Two rounds over 16,384 tokens, causal and with long clusters on both sides; places; a decode step."""
    for causal, cluster_size in ((True, 128), (False, 512)):
        acc = _example_rows(dtype, head_dim, causal, EXAMPLE_TOKENS)
        reach = Reach(cluster_size, 64, 4, 64)
        tile = tile_for(target, dtype, head_dim)
        plan, places = example_plan(acc, reach, tile.rows)
        found = Found(_ints(*plan.lo.shape[::2]), _ints(2, plan.shape.heads, plan.num_tiles))
        for launch in round_launches(acc, plan, found, reach, tile, _ints(1)):
            yield replace(launch, work=_work(acc, cluster_size, tile))
        yield places
    yield from _example_row(dtype, head_dim, Reach(128, 64, 4))


def _example_row(dtype: torch.dtype, head_dim: int, reach: Reach) -> Iterator[Launch]:
    """As many codes are read as fill every bucket once they are spread evenly."""
    acc = _example_rows(dtype, head_dim, True, 1)
    codes = Codes(_ints(8, 2, EXAMPLE_TOKENS).short(), _ints(8, 4, 2, 1).short(), (0, 1), 64)
    listed, count = _ints(32, 2 * reach.cluster_size), _ints(32)
    found = codes.keys[..., : reach.cluster_size * codes.num_buckets].nbytes + listed.nbytes
    launch = find_launch(codes.keys, [codes], listed, count, reach, 4)
    yield replace(launch, work=Work(0, 0, found))
    pairs = float(listed.numel())
    moved = pairs * 2 * head_dim * acc.k.element_size() + listed.nbytes + acc.q.nbytes + 2 * acc.out.nbytes
    yield replace(attend_launch(acc, listed, count), work=Work(4 * head_dim * pairs, pairs, moved))


def _ints(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device="meta")


def _example_rows(dtype: torch.dtype, head_dim: int, causal: bool, num_rows: int) -> Accumulator:
    q = torch.empty(1, 32, num_rows, head_dim, dtype=dtype, device="meta")
    keys = torch.empty(1, 8, EXAMPLE_TOKENS, head_dim, dtype=dtype, device="meta")
    start = EXAMPLE_TOKENS - num_rows
    return accumulator(q, keys, keys, Call(causal, head_dim**-0.5, 0, 0, start, impl="triton"))


def _work(acc: Accumulator, cluster_size: int, tile: Tile) -> Work:
    """Of one round: every row looks at its cluster, and at what it shares its tile's places with."""
    _, Hk, G, N, D = acc.q.shape
    pairs = float(Hk * G * N * (cluster_size + tile.rows // G))
    gathered = Hk * G * N / tile.rows * (cluster_size + tile.rows // G) * 2 * D * acc.k.element_size()
    rows = Hk * G * N * D * (acc.q.element_size() + 2 * acc.out.element_size())
    return Work(4 * D * pairs, pairs, gathered + rows)
