"""Vertical-slash attention on the device: probe, choose, and attend to columns and diagonals in one launch.

    O_i = sum_{j in columns of i's tile, or in key blocks of i's query block} e^(s_ij - lse_i) v_j

A program takes rows of one query block, the query heads of a key head side by side: first the columns,
which are gathered through their list and need no mask, then the query block's key blocks, in which columns
are masked for all rows alike: a pair counts once. What it finds is merged by log-sum-exp into the rows, which
hold their own keys. A masked key is a column of the same rows, so one that is NaN has reached them anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

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
from kernels._triton.vertical_slash_choice import (
    Columns,
    Slashes,
    choose_slashes,
    columns_launch,
    empty_columns,
)
from kernels._triton.vertical_slash_probe import lse_launch, rest_launch, verticals_launch
from kernels._triton.vertical_slash_tables import COLUMNS, Tables, tables_of
from kernels.contract import Call
from kernels.math.accumulate import Accumulator, accumulator
from kernels.math.query_tiles import QueryTiles, query_tiles
from kernels.math.vertical_slash import place_of

CHOICE_BYTES = 256 << 20
"""Of the choices that exist at once: tiles beyond them come later."""
SPLIT_KEYS = 1024
EXAMPLE_TOKENS = 16384
_PLACE = tl.constexpr(len(COLUMNS))
_SIZES = (
    "start", "room", "most_columns", "most_blocks", "num_subtiles", "scale", "sign", "lse_b", "lse_h",
    "lse_g",
)  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def columns_and_slashes(
    q, k, v, out, lse, places, whole, columns, listed, count, blocks, num_listed,
    q_b, q_h, q_g, q_n, k_b, k_h, k_m, v_b, v_h, v_m, out_b, out_h, out_g, out_n, lse_b, lse_h, lse_g, lse_n,
    start, room, most_columns, most_blocks, num_subtiles, scale, sign,
    HK: tl.constexpr, G: tl.constexpr, BLOCK_G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    L: tl.constexpr, NQ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    part, x = tl.program_id(0), tl.program_id(1).to(tl.int64)
    t, a = (part // num_subtiles // NQ).to(tl.int64), part // num_subtiles % NQ
    place = places + t * _PLACE
    first, stop = tl.load(place), tl.load(place + 1)
    block_first = (tl.load(place + 8) + a) * L
    row_first = tl.maximum(block_first, first) + part % num_subtiles * BLOCK_R
    row_stop = tl.minimum(block_first + L, stop)
    if row_first >= row_stop:
        return
    b, h = x // HK, x % HK
    head = t * tl.num_programs(1) + x
    index = tl.arange(0, BLOCK_R * BLOCK_G)
    row, g = row_first + index // BLOCK_G, (index % BLOCK_G).to(tl.int64)
    live = (row < row_stop) & (g < G)
    n = tl.where(live, row - start, 0).to(tl.int64)
    queries = load_rows(q + b * q_b + h * q_h, g * q_g + n * q_n, 1, live, D, BLOCK_D, True)
    queries = (queries * sign).to(queries.dtype)
    k_base, v_base = k + b * k_b + h * k_h, v + b * v_b + h * v_h
    m = tl.full([BLOCK_R * BLOCK_G], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_R * BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_R * BLOCK_G, BLOCK_DV], tl.float32)
    num_columns = tl.load(count + head)
    for c in tl.range(0, num_columns, BLOCK_N):
        at = c + tl.arange(0, BLOCK_N)
        inside = at < num_columns
        j = tl.load(listed + head * most_columns + at, mask=inside, other=0).to(tl.int64)
        keys = load_rows(k_base, j, k_m, inside, D, BLOCK_D, True)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        scores = tl.where(inside[None], scores, float("-inf"))
        values = load_rows(v_base, j, v_m, inside, DV, BLOCK_DV, True)
        m, l, acc = softmax_step(scores, values, m, l, acc, scale, PRECISION)
    is_whole = tl.load(whole + head) != 0
    before, after, end = tl.load(place + 3), tl.load(place + 4), tl.load(place + 5)
    own = head * NQ + a
    entries = tl.where(is_whole, (before + end - after) // L, tl.load(num_listed + own))
    for e in tl.range(0, entries * (L // BLOCK_N)):
        entry = e // (L // BLOCK_N)
        all_blocks = tl.where(entry < before // L, entry, entry - before // L + after // L)
        some = tl.load(blocks + own * most_blocks + entry, mask=~is_whole, other=0)
        block = tl.where(is_whole, all_blocks, some)
        j = block * L + e % (L // BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
        column = tl.load(columns + head * room + j) != 0
        keys = load_rows(k_base, j.to(tl.int64), k_m, ~column, D, BLOCK_D, True)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        scores = tl.where(column[None], float("-inf"), scores)
        values = load_rows(v_base, j.to(tl.int64), v_m, ~column, DV, BLOCK_DV, True)
        m, l, acc = softmax_step(scores, values, m, l, acc, scale, PRECISION)
    acc, part_lse = softmax_end(m, l, acc)
    lse_at = lse + b * lse_b + h * lse_h + g * lse_g + n * lse_n
    old_lse = tl.load(lse_at, mask=live, other=float("-inf"))
    to = g * out_g + n * out_n
    earlier = load_rows(out + b * out_b + h * out_h, to, 1, live, DV, BLOCK_DV, True)
    acc, part_lse = merged(earlier, old_lse, acc, part_lse)
    dims = tl.arange(0, BLOCK_DV)
    out_at = out + b * out_b + h * out_h + to[:, None] + dims[None]
    tl.store(out_at, acc, mask=live[:, None] & (dims < DV)[None])
    tl.store(lse_at, part_lse, mask=live)


@dataclass(frozen=True)
class Added:
    """``dropped`` fp32 [B, Hk, N]; on the device, int64: pairs ``kept`` and ``computed`` over all heads.
    ``scored``: logits of probe rows."""

    dropped: Tensor
    kept: Tensor
    computed: Tensor
    scored: int


def add_vertical_slash(
    acc: Accumulator,
    tiles: QueryTiles,
    budgets: tuple[tuple[int, ...], tuple[int, ...]],
    probe_rows: int,
) -> Added:
    """Choose for every tile and add what it chose; ``acc`` holds the tiles' own keys. ``budgets``: verticals
    and slashes of each key head."""
    B, Hk, G, N, _ = acc.q.shape
    places = {t: place_of(tiles, t) for t in range(tiles.num_tiles)}
    numbers = [t for t, place in places.items() if place.num_candidates]
    one_tile = B * Hk * 5 * max((places[t].num_blocks * tiles.block for t in numbers), default=1)
    at_once = max(1, CHOICE_BYTES // one_tile)
    nothing = acc.lse.new_zeros((), dtype=torch.int64)
    added = Added(acc.lse.new_zeros(B, Hk, N), nothing, nothing, 0)
    probe_rows = min(probe_rows, power_of_two(N))
    for a in range(0, len(numbers), at_once):
        some = numbers[a : a + at_once]
        tables = tables_of(tiles, some, probe_rows, budgets, acc.q.device)
        added = _add_some(
            acc, added, tiles, tables, budgets, slice(tiles.rows(some[0]).start, tiles.rows(some[-1]).stop)
        )
    return added


def _add_some(
    acc: Accumulator,
    added: Added,
    tiles: QueryTiles,
    tables: Tables,
    budgets: tuple[tuple[int, ...], tuple[int, ...]],
    at: slice,
) -> Added:
    """The tiles of ``tables``, which have the rows ``at`` of the call."""
    B, Hk, G = acc.q.shape[:3]
    whole, columns, slashes = choose(acc, tiles.block, tables, budgets)
    attend_launch(acc, tables, whole, columns, slashes, tiles.block).run()
    positions = torch.arange(at.start, at.stop, device=acc.q.device) + tiles.start
    firsts = tables.places[:, 0].contiguous()
    tile = torch.searchsorted(firsts, positions.to(firsts.dtype), right=True) - 1
    query_block = positions // tiles.block - tables.places[tile, 8]
    added.dropped[..., at] = slashes.dropped[tile, :, query_block].T.view(B, Hk, -1)
    scored = sum(one["scored"] * one["num_probes"] * one["num_keys"] for one in tables.told)
    return Added(
        added.dropped,
        added.kept + G * slashes.pairs.sum(),
        added.computed + G * slashes.computed.sum(),
        added.scored + B * Hk * G * scored,
    )


def choose(
    acc: Accumulator, block: int, tables: Tables, budgets: tuple[tuple[int, ...], tuple[int, ...]]
) -> tuple[Tensor, Columns, Slashes]:
    """Which heads of which tiles keep everything, int8 [T, X]; and what the others keep."""
    B, Hk, G = acc.q.shape[:3]
    T, X, P = len(tables.told), B * Hk, tables.probes.shape[1]
    device, num_blocks = acc.q.device, tables.most("num_blocks")
    splits = _splits(tables, T * X, target_of(device))
    step = -(-tables.most("num_keys") // splits)
    parts = torch.full((splits, T, X, P * G), -torch.inf, device=device)
    lse_launch(acc, tables, parts, step).run()
    lse = (parts[0] if splits == 1 else torch.logsumexp(parts * _LN2, 0) / _LN2).contiguous()
    whole = tables.budget.repeat(1, B) | lse.isnan().any(-1)
    verticals = torch.empty(T, X, num_blocks * block, dtype=torch.float32, device=device)
    verticals_launch(acc, tables, lse, verticals).run()
    columns = empty_columns(verticals, max(min(n, num_blocks * block) for n in budgets[0]))
    marked, (num_columns, num_slashes) = whole.to(torch.int8), _on(budgets, device)
    columns_launch(verticals, tables, marked, num_columns, columns).run()
    rest = torch.empty(T, X, tables.rows.shape[1], num_blocks, dtype=torch.float32, device=device)
    rest_launch(acc, tables, lse, verticals, columns.mask, rest, block).run()
    slashes = choose_slashes(rest, columns, tables, whole, num_slashes.repeat(B), block)
    return marked, columns, slashes


_LN2 = 0.6931471805599453


def _on(budgets: tuple[tuple[int, ...], tuple[int, ...]], device: torch.device) -> tuple[Tensor, Tensor]:
    both = torch.tensor(budgets, dtype=torch.int64).clamp(max=2**31 - 1).to(torch.int32)
    both = both.to(device, non_blocking=True)
    return both[0], both[1]


def _splits(tables: Tables, programs: int, target: Target) -> int:
    """Into how many parts keys are cut: where tiles are few, more programs are wanted."""
    most = -(-tables.most("num_keys") // SPLIT_KEYS)
    return max(1, min(most, 2 * target.num_sms // programs))


@dataclass(frozen=True)
class Tile:
    """``rows`` of a product (query heads beside each other) and ``keys`` at a time."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def tile_for(target: Target, dtype: torch.dtype, head_dim: int) -> Tile:
    wide, old = power_of_two(head_dim), target.capability < 90
    if dtype == torch.float32:
        return Tile(32, 16, 8, 1) if wide >= 128 else Tile(32 if old else 64, 32, 8, 1)
    return Tile(64, 32, 8, 2) if wide > 128 else Tile(128, 32, 8, 2)


def attend_launch(
    acc: Accumulator, tables: Tables, whole: Tensor, columns: Columns, slashes: Slashes, block: int
) -> Launch:
    """Rows of the tiles over their columns and key blocks, merged into ``acc``."""
    return _attend(acc, tables, whole, columns, slashes, block, target_of(acc.q.device))


def _attend(
    acc: Accumulator,
    tables: Tables,
    whole: Tensor,
    columns: Columns,
    slashes: Slashes,
    block: int,
    target: Target,
) -> Launch:
    _, Hk, G, _, D = acc.q.shape
    Dv, block_g = acc.v.shape[-1], triton.next_power_of_2(G)
    tile = tile_for(target, acc.q.dtype, max(D, Dv))
    rows = max(1, min(block, tile.rows // block_g))
    scale, sign = unsigned_scale(acc.call.scale)
    T, X, nq = slashes.count.shape
    strides = {
        **{f"q_{x}": acc.q.stride(at) for at, x in enumerate("bhgn")},
        **{f"k_{x}": acc.k.stride(at) for at, x in enumerate("bhm")},
        **{f"v_{x}": acc.v.stride(at) for at, x in enumerate("bhm")},
        **{f"out_{x}": acc.out.stride(at) for at, x in enumerate("bhgn")},
        **{f"lse_{x}": acc.lse.stride(at) for at, x in enumerate("bhgn")},
    }
    return Launch(
        "columns_and_slashes",
        columns_and_slashes,
        (T * nq * (block // rows), X),
        {
            "q": acc.q,
            "k": acc.k,
            "v": acc.v,
            "out": acc.out,
            "lse": acc.lse,
            "places": tables.places,
            "whole": whole,
            "columns": columns.mask,
            "listed": columns.listed,
            "count": columns.count,
            "blocks": slashes.listed,
            "num_listed": slashes.count,
            **strides,
            "start": acc.call.start,
            "room": columns.mask.shape[2],
            "most_columns": columns.listed.shape[2],
            "most_blocks": slashes.listed.shape[3],
            "num_subtiles": block // rows,
            "scale": scale,
            "sign": sign,
        },
        {
            "HK": Hk,
            "G": G,
            "BLOCK_G": block_g,
            "D": D,
            "DV": Dv,
            "BLOCK_D": power_of_two(D),
            "BLOCK_DV": power_of_two(Dv),
            "BLOCK_R": rows,
            "BLOCK_N": min(tile.keys, block),
            "L": block,
            "NQ": nq,
            "PRECISION": precision_of(acc.q.dtype),
        },
        tile.num_warps,
        tile.num_stages,
        frozenset(_SIZES),
        notes={"group": G, "block": block},
    )


def examples(target: Target, dtype: torch.dtype, head_dim: int) -> Iterator[Launch]:
    """A prefill of 16,384 tokens at the default params: probes, choice and attention."""
    q = torch.empty(1, 32, EXAMPLE_TOKENS, head_dim, dtype=dtype, device="meta")
    keys = torch.empty(1, 8, EXAMPLE_TOKENS, head_dim, dtype=dtype, device="meta")
    call = Call(True, head_dim**-0.5, 0, 0, 0, impl="triton")
    acc = accumulator(q, keys, keys, call)
    tiles = query_tiles(call, EXAMPLE_TOKENS, EXAMPLE_TOKENS, 512, 64)
    T, nq, nb = tiles.num_tiles - 1, 8, EXAMPLE_TOKENS // 64 - 8
    tables = tables_of(tiles, range(1, T + 1), 16, ((1024,) * 8, (8,) * 8), q.device)
    ints = acc.lse.new_empty(T, 8, dtype=torch.int32)
    lse, verticals = acc.lse.new_empty(1, T, 8, 64), acc.lse.new_empty(T, 8, nb * 64)
    columns, rest = empty_columns(verticals, 1024), verticals.new_empty(T, 8, nq, nb)
    listed, count = ints.new_empty(T, 8, nq, nq + nb - 1), ints.new_empty(T, 8, nq)
    whole, long = ints.to(torch.int8), ints.long()
    probed = float(T * 8 * 64 * EXAMPLE_TOKENS // 2)
    work = Work(2 * head_dim * probed, probed, keys.nbytes * T / 2)
    yield replace(lse_launch(acc, tables, lse, EXAMPLE_TOKENS), work=work)
    yield replace(verticals_launch(acc, tables, lse[0], verticals), work=work)
    chosen = Work(0, 0, verticals.nbytes / 2 + columns.mask.nbytes + columns.listed.nbytes)
    yield replace(columns_launch(verticals, tables, whole, ints[0], columns), work=chosen)
    yield replace(rest_launch(acc, tables, lse[0], verticals, columns.mask, rest, 64), work=work)
    slashes = Slashes(listed, count, rest[..., 0], long, long)
    pairs = 32.0 * EXAMPLE_TOKENS * (1024 + 8 * 64)
    launch = _attend(acc, tables, whole, columns, slashes, 64, target)
    moved = q.nbytes + 2 * acc.out.nbytes + 2 * T * (keys.nbytes // EXAMPLE_TOKENS) * (1024 + 1024)
    yield replace(launch, work=Work(4 * head_dim * pairs, pairs, moved))
