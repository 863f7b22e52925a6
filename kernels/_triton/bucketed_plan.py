"""Rows and keys sorted by bucket, and the sorted rows cut into tiles: all on the device, nothing read back.

    place   of a key in the order of (bucket, position) of one table
    [lo, hi)  the places that a row looks at in one round; both ascend in sorted rows
    tile    at most ``rows`` sorted rows in succession whose lo lie in one run of ``width`` places

So a tile spans at most ``width`` + cluster_size places. How many tiles there are depends on the data; their
number is bounded by rows and by runs, and those beyond the last are empty.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.launch import Launch, Work
from kernels.math.accumulate import Accumulator
from kernels.math.buckets import Codes, Reach

PLACES_AT_ONCE = 256
RUN_OF_CLUSTERS = 2


@triton.jit
def _first_at_least(base, low, high, bound, steps):
    """In ascending numbers at places low .. high - 1: the first place whose number is at least ``bound``."""
    for _ in range(steps):
        searching = low < high
        middle = (low + high) // 2
        less = tl.load(base + middle, mask=searching, other=0) < bound
        low, high = tl.where(searching & less, middle + 1, low), tl.where(searching & ~less, middle, high)
    return low


_SIZES = (
    "num_slots", "num_keys", "num_rows", "num_buckets", "steps", "start", "window", "sinks", "exact_rows",
    "before", "after",
)  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def bucket_places(
    codes, starts, order, lo, hi, sort_keys,
    num_slots, num_keys, num_rows, num_buckets, steps, start, window, sinks, exact_rows, before, after,
    G: tl.constexpr, ROUNDS: tl.constexpr, TABLES: tl.constexpr, CAUSAL: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    xr = tl.program_id(1).to(tl.int64)
    x, r = xr // ROUNDS, xr % ROUNDS
    table = x * TABLES + (0 if TABLES == 1 else r)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = slot < num_slots
    n, g = slot // G, slot % G
    i = start + n
    code = tl.load(codes + ((x * G + g) * ROUNDS + r) * num_rows + n, mask=live, other=0).to(tl.int32)
    begin = tl.load(starts + table * (num_buckets + 1) + code, mask=live, other=0)
    end = tl.load(starts + table * (num_buckets + 1) + code + 1, mask=live, other=0)
    base = order + table * num_keys
    low, high = begin, end
    if not WHOLE or CAUSAL:
        seen = _first_at_least(base, begin, end, i + 1, steps)
        low = tl.maximum(begin, seen - before)
        high = tl.minimum(end, seen + after)
    if CAUSAL:
        high = tl.minimum(high, _first_at_least(base, begin, end, tl.maximum(i - window + 1, 0), steps))
        high = tl.where(i < exact_rows, 0, high)
    low = tl.maximum(low, _first_at_least(base, begin, end, sinks, steps))
    high = tl.maximum(high, low)
    at = xr * num_slots + slot
    tl.store(lo + at, low, mask=live)
    tl.store(hi + at, high, mask=live)
    tl.store(sort_keys + at, tl.where(high > low, code, num_buckets), mask=live)


@dataclass(frozen=True)
class Shape:
    """``heads`` key heads of all sequences, each with ``group`` query heads of ``rows`` rows; row n of query
    head g is slot n * group + g."""

    heads: int
    group: int
    rows: int
    keys: int
    rounds: int
    start: int

    @property
    def slots(self) -> int:
        return self.rows * self.group


@dataclass(frozen=True)
class Plan:
    """int32: ``order`` and ``place`` [heads, tables, keys] (place: of several tables only), ``lo`` and ``hi``
    [heads, rounds, slots], ``perm`` [heads, rounds, slots] sorted rows, those that look nowhere last;
    ``tiles`` [heads, rounds, num_tiles + 1]: where tiles begin in ``perm``."""

    shape: Shape
    tables: int
    num_tiles: int
    order: Tensor
    place: Tensor
    lo: Tensor
    hi: Tensor
    perm: Tensor
    tiles: Tensor


def plan_rounds(codes: list[Codes], shape: Shape, reach: Reach, causal: bool, tile_rows: int) -> Plan:
    """The plan of all rounds. Rounds look into one table each, or all into the same."""
    keys = torch.cat([one.keys for one in codes])
    rows = torch.cat([one.rows for one in codes]).contiguous()
    tables, num_buckets = keys.shape[1], codes[0].num_buckets
    if codes[0].tables != (tuple(range(tables)) if tables > 1 else (0,) * shape.rounds):
        raise ValueError(f"rounds look into tables {codes[0].tables}: must be one each, or all the same")
    ordered, order = torch.sort(keys, dim=-1, stable=True)
    borders = torch.arange(num_buckets + 1, dtype=keys.dtype, device=keys.device)
    starts = torch.searchsorted(ordered, borders.expand(*keys.shape[:2], -1).contiguous(), out_int32=True)
    lo, hi, sort_keys = (
        torch.empty(shape.heads, shape.rounds, shape.slots, dtype=torch.int32, device=keys.device)
        for _ in range(3)
    )
    place = _inverse(order) if tables > 1 else starts
    order = order.to(torch.int32)
    places_launch(rows, starts, order, lo, hi, sort_keys, shape, reach, causal, num_buckets).run()
    sort_keys, perm = torch.sort(sort_keys, dim=-1, stable=True)
    width = RUN_OF_CLUSTERS * reach.cluster_size
    num_tiles = most_tiles(shape, width, tile_rows)
    tiles = _cut(sort_keys < num_buckets, lo.gather(-1, perm) // width, num_tiles, tile_rows)
    return Plan(shape, tables, num_tiles, order, place, lo, hi, perm.to(torch.int32), tiles)


def most_tiles(shape: Shape, width: int, tile_rows: int) -> int:
    """Every run of places but those without rows ends a tile that need not be full."""
    runs = min(-(-shape.keys // width), shape.slots)
    return min(shape.slots, shape.slots // tile_rows + runs)


def _inverse(order: Tensor) -> Tensor:
    numbers = torch.arange(order.shape[-1], dtype=torch.int32, device=order.device)
    return torch.empty_like(order, dtype=torch.int32).scatter_(-1, order, numbers.expand_as(order))


def _cut(live: Tensor, run: Tensor, num_tiles: int, tile_rows: int) -> Tensor:
    """Where tiles begin among the sorted rows, which look somewhere where ``live`` [..., S], from ``run``
    [..., S] of places: [..., num_tiles + 1]; tiles that there are not begin where live rows end."""
    index = torch.arange(live.shape[-1], dtype=torch.int32, device=live.device)
    fresh = torch.ones_like(live)
    fresh[..., 1:] = run[..., 1:] != run[..., :-1]
    begin = torch.where(fresh, index, 0).cummax(-1).values
    begins = ((index - begin) % tile_rows == 0) & live
    numbers = torch.arange(1, num_tiles + 2, dtype=torch.int32, device=live.device)
    count = begins.cumsum(-1, dtype=torch.int32)
    found = torch.searchsorted(count, numbers.expand(*live.shape[:-1], -1).contiguous(), out_int32=True)
    return torch.minimum(found, live.sum(-1, keepdim=True, dtype=torch.int32))


def places_launch(
    rows: Tensor,
    starts: Tensor,
    order: Tensor,
    lo: Tensor,
    hi: Tensor,
    sort_keys: Tensor,
    shape: Shape,
    reach: Reach,
    causal: bool,
    num_buckets: int,
) -> Launch:
    """Where every row of every round looks: fills lo, hi and what rows are sorted by."""
    c = reach.cluster_size
    return Launch(
        "bucket_places",
        bucket_places,
        (triton.cdiv(shape.slots, PLACES_AT_ONCE), shape.heads * shape.rounds),
        {
            "codes": rows,
            "starts": starts,
            "order": order,
            "lo": lo,
            "hi": hi,
            "sort_keys": sort_keys,
            "num_slots": shape.slots,
            "num_keys": shape.keys,
            "num_rows": shape.rows,
            "num_buckets": num_buckets,
            "steps": shape.keys.bit_length(),
            "start": shape.start,
            "window": reach.window,
            "sinks": min(reach.sinks, shape.keys),
            "exact_rows": reach.exact_rows,
            "before": c if causal else -(-c // 2),
            "after": 0 if causal else c // 2,
        },
        {
            "G": shape.group,
            "ROUNDS": shape.rounds,
            "TABLES": order.shape[1],
            "CAUSAL": causal,
            "WHOLE": reach.whole,
            "BLOCK": PLACES_AT_ONCE,
        },
        sizes=frozenset(_SIZES),
        multiplies=False,
    )


def example_plan(acc: Accumulator, reach: Reach, tile_rows: int) -> tuple[Plan, Launch]:
    """Two rounds on tensors without memory, and the launch that places rows in them."""
    B, Hk, G, N, _ = acc.q.shape
    shape, buckets = Shape(B * Hk, G, N, acc.k.shape[2], 2, acc.call.start), 64
    order = torch.empty(shape.heads, 2, shape.keys, dtype=torch.int32, device=acc.q.device)
    lo = order.new_empty(shape.heads, 2, shape.slots)
    starts = order.new_empty(shape.heads, 2, buckets + 1)
    num_tiles = most_tiles(shape, RUN_OF_CLUSTERS * reach.cluster_size, tile_rows)
    plan = Plan(shape, 2, num_tiles, order, order, lo, lo, lo, lo.new_empty(shape.heads, 2, num_tiles + 1))
    rows = torch.empty(shape.heads, G, 2, N, dtype=torch.int16, device=acc.q.device)
    launch = places_launch(rows, starts, order, lo, lo, lo, shape, reach, acc.call.causal, buckets)
    moved = rows.nbytes + starts.nbytes + order.nbytes + 3 * lo.nbytes
    return plan, replace(launch, work=Work(0, 0, moved))
