"""Whole calls of Scatterbrain whose supports are chosen, drawn or laid out pair by pair, planned on the
device.

    block selections    exact: a tile's own keys and the listed blocks    outside: sums over left-out blocks
    any other pattern   pair by pair where a tile's rows keep some key of a block, else sums of blocks

Selections are asked of the support as impl ``torch`` makes them, which the host waits for. Nothing else is
read back but counts, once, when all has been launched: sizes that depend on data are bounded above.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from threading import Lock
from time import perf_counter

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels._triton.bucketed_plan import Plan, Shape, plan_rounds
from kernels._triton.signed import (
    Exact,
    Map,
    Sums,
    block_features,
    left_out_sums,
    room,
    rows_over_sums,
)
from kernels._triton.signed_merge import merge_part
from kernels._triton.signed_pairs import Stretch, Text, pairs
from kernels.contract import AttentionResult, Call
from kernels.math.accumulate import Accumulator, accumulator
from kernels.math.block_lists import BlockLists, lists_from_table
from kernels.math.block_sparse import add_block_lists
from kernels.math.buckets import Reach, looks_beyond_base
from kernels.math.complement import Features, Support, exact_rows, features_of, map_flops, together
from kernels.math.complement_buckets import bucketing
from kernels.math.complement_tiles import BLOCK, TILE, pattern_keep
from kernels.math.features import FeatureParams
from kernels.math.query_tiles import QueryTiles, query_tiles
from kernels.math.random_keys import block_draws
from kernels.math.selected import ScoredLists
from kernels.math.selection import TileParams
from kernels.math.signed import Part
from kernels.math.spans import add_spans, plan_for
from kernels.math.window import window_keep

SUMS_BYTES = 1 << 28
"""Means of tiles that exist at once."""
PAIRS_AT_ONCE = 1 << 28
"""Pairs whose masks exist at once."""
_LEAST_ROWS = 16

Keep = Callable[[Tensor, Tensor], Tensor]
"""Positions of rows [R, 1] and of keys [1, M] -> the pairs that a pattern keeps, bool [R, M] or [H, R, M]."""


def merge_outside(acc: Accumulator, features: Features, part: Part, first: int) -> Tensor:
    """Join a part without its shift to the rows from ``first`` on; what it carries of each row,
    [B, Hk, G, N]."""
    dropped = torch.zeros_like(acc.lse)
    centre = None if features.centre is None else features.centre[:, :, 0].contiguous()
    rows, lse = (x.flatten(1, 2).contiguous() for x in (part.numerator, part.log_scale))
    out, out_lse, share = (x.flatten(1, 2) for x in (acc.out, acc.lse, dropped))
    q, scale = acc.q.flatten(1, 2), features.map.scale
    merge_part(rows, lse, q, centre, scale, out, out_lse, share, max(0, first)).run()
    return dropped


def map_of(features: Features, b: int) -> Map:
    """The feature map of one sequence as kernels take it."""
    centre = None if features.centre is None else features.centre[b if len(features.centre) > 1 else 0, :, 0]
    return Map(
        features.map.directions.contiguous(),
        None if centre is None else centre.contiguous(),
        features.map.scale,
    )


def exact_of(acc: Accumulator, b: int, dropped: Tensor) -> Exact:
    """The rows of sequence b, sharing memory."""
    q, out, lse, share = (x[b].flatten(0, 1) for x in (acc.q, acc.out, acc.lse, dropped))
    return Exact(q, out, lse, share)


class KeptSums:
    """The sums of one sequence's key blocks in one layer, grown as its keys come in
    (``kernels.math.kept.State``). ``first_keys``: positions on which every key's features depend."""

    def __init__(self, block: int, first_keys: int) -> None:
        self._block, self._first_keys = block, first_keys
        self._lock = Lock()
        self._room: Sums | None = None
        self._num_known = 0

    @property
    def nbytes(self) -> int:
        return 0 if self._room is None else self._room.nbytes

    def truncate(self, length: int) -> None:
        with self._lock:
            whole = length // self._block if length >= self._first_keys else 0
            self._num_known = min(self._num_known, whole)

    def get(self, k: Tensor, v: Tensor, fmap: Map, num_blocks: int) -> tuple[Sums, int]:
        """The first ``num_blocks`` of k [Hk, M, D], v [Hk, M, Dv], and how many keys were read for it."""
        with self._lock:
            known = self._num_known
            if num_blocks > known or self._room is None:
                self._room = self._grown(len(k), v, fmap, num_blocks)
                block_features(k, v, fmap, self._block, known, self._room.first(num_blocks)).run()
                self._num_known = max(known, num_blocks)
            return self._room.first(num_blocks), max(0, num_blocks - known) * self._block

    def _grown(self, heads: int, v: Tensor, fmap: Map, num_blocks: int) -> Sums:
        """Room for more blocks, a quarter more than before, so that blocks are seldom copied."""
        old, known = self._room, self._num_known
        if old is not None and num_blocks <= old.count:
            return old
        wanted = num_blocks if old is None else max(num_blocks, old.count * 5 // 4)
        new = room(heads, wanted, fmap.num_features, v)
        if old is not None:
            new.bias[:, :known], new.means[:, :known] = old.bias[:, :known], old.means[:, :known]
        return new


def kept_sums(
    acc: Accumulator, b: int, features: Features, fmap: Map, params: FeatureParams, tiles: QueryTiles
) -> Sums:
    """Those of the sequence's cache, where it has one; else made for this call."""
    first_keys, call, L = exact_rows(params, acc.call), acc.call, tiles.block
    store = KeptSums(L, first_keys)
    if call.kept is not None and call.causal and len(acc.k) == 1:
        sizes = L, *acc.k.shape[1:2], acc.v.shape[3], acc.v.dtype, acc.k.device
        store = call.kept.get(("sums of blocks", features.map.key, sizes), lambda: KeptSums(L, first_keys))
    sums, read = store.get(acc.k[b], acc.v[b], fmap, tiles.num_blocks)
    heads, width = acc.k.shape[1], acc.v.shape[3] + 1
    features.flops += heads * (map_flops(features, read) + 2 * read * features.map.num_features * width)
    return sums


def add_left_out(
    rows: Exact, features: Features, fmap: Map, tiles: QueryTiles, left_out: Tensor, blocks: Sums, some: range
) -> None:
    """Merge what the tiles ``some`` leave out, bool [Hk, len(some), P], into their rows."""
    Hk, _, P = left_out.shape
    F, Dv, device = fmap.num_features, rows.out.shape[-1], left_out.device
    bytes_each = Hk * F * (4 + Dv * blocks.means.element_size())
    step = max(1, SUMS_BYTES // bytes_each)
    table = left_out.to(torch.uint8)
    last = [P if not tiles.causal else min(P, tiles.first_key(t) // tiles.block) for t in some]
    ends = torch.tensor(last, dtype=torch.int32).to(device, non_blocking=True)
    borders = torch.tensor(tiles.borders, dtype=torch.int32).to(device, non_blocking=True)
    for a in range(0, len(some), step):
        part = table[:, a : a + step].contiguous()
        sums = room(Hk, part.shape[1], F, blocks.means)
        left_out_sums(part, ends[a : a + step], blocks, sums).run()
        rows_over_sums(rows, fmap, sums, borders, _tallest(tiles, some), some[a]).run()
        features.flops += 2 * Hk * part.shape[1] * P * F * (Dv + 1)
    num_rows = tiles.borders[some[-1] + 1] - tiles.borders[some[0]]
    features.flops += len(rows.q) * (map_flops(features, num_rows) + 2 * num_rows * F * (Dv + 1))


def _tallest(tiles: QueryTiles, some: range) -> int:
    return max(tiles.borders[t + 1] - tiles.borders[t] for t in some)


def blocks_call(
    q: Tensor, k: Tensor, v: Tensor, params: FeatureParams, call: Call, support: Support
) -> AttentionResult:
    """A whole call over a support that has ``select``."""
    began = perf_counter()
    acc = accumulator(q, k, v, call)
    knobs = support.params
    assert isinstance(knobs, TileParams)
    tiles = query_tiles(call, q.shape[2], k.shape[2], knobs.query_tile, knobs.block_size)
    add_spans(acc, plan_for(acc, tiles.own_keys()))
    features = features_of(acc, params)
    dropped = torch.zeros_like(acc.lse)
    for b in range(len(q)):
        lists, table = chosen_blocks(acc, b, support, tiles, params)
        add_block_lists(acc, b, lists)
        if tiles.num_blocks:
            fmap, rows = map_of(features, b), exact_of(acc, b, dropped)
            blocks = kept_sums(acc, b, features, fmap, params, tiles)
            left_out = tiles.candidates().to(q.device, non_blocking=True) & ~table
            add_left_out(rows, features, fmap, tiles, left_out, blocks, range(tiles.num_tiles))
    return together(acc, q, began, features, dropped)


def chosen_blocks(
    acc: Accumulator, b: int, support: Support, tiles: QueryTiles, params: FeatureParams
) -> tuple[BlockLists, Tensor]:
    """What the support lists, by its torch path, and the same as a table bool [Hk, T, P]; all candidates for
    tiles that begin among the exact rows."""
    began = perf_counter()
    assert support.backend.select is not None
    one = slice(b, b + 1)
    q = acc.q[one].flatten(1, 2).to(acc.out.dtype)
    call = replace(acc.call, impl="torch")
    lists = support.backend.select(q, acc.k[one], acc.v[one], support.params, call)
    acc.scored += lists.scored if isinstance(lists, ScoredLists) else 0
    table = table_on(lists, tiles.num_blocks, acc.q.device)
    whole = [tiles.first_key(t) < exact_rows(params, acc.call) for t in range(tiles.num_tiles)]
    if any(whole) and tiles.num_blocks:
        every = tiles.candidates() & torch.tensor(whole)[:, None]
        table = table | every.to(table.device, non_blocking=True)
        lists = lists_from_table(table.cpu(), tiles.block, tiles.borders)
    acc.selection_s += perf_counter() - began
    return lists, table


def table_on(lists: BlockLists, num_blocks: int, device: torch.device) -> Tensor:
    """``BlockLists.table`` without asking the device how long the lists are."""
    indptr, indices = lists.indptr.to(device), lists.indices.to(device)
    ends = indptr[:, 1:].flatten().contiguous()
    place = torch.arange(len(indices), device=device, dtype=ends.dtype)
    owner = torch.searchsorted(ends, place, right=True)
    inside = (indices >= 0) & (indices < num_blocks) & (owner < len(ends))
    cells = torch.where(inside, owner * num_blocks + indices, len(ends) * num_blocks)
    table = torch.zeros(len(ends) * num_blocks + 1, dtype=torch.bool, device=device)
    return table.index_fill_(0, cells, True)[:-1].view(lists.heads, lists.num_tiles, num_blocks)


@dataclass
class _Counts:
    """Pairs kept and computed, on the device until all is launched."""

    kept: list[Tensor]
    computed: list[Tensor]

    def tell(self, acc: Accumulator) -> None:
        if self.kept:
            told = torch.stack([torch.stack(self.kept).sum(), torch.stack(self.computed).sum()]).tolist()
            acc.kept, acc.computed = acc.kept + told[0], acc.computed + told[1]


def tiles_call(
    q: Tensor, k: Tensor, v: Tensor, params: FeatureParams, call: Call, support: Support
) -> AttentionResult:
    """A whole call over a pattern that is known from positions alone."""
    Hk, heads = k.shape[1], (q.shape[1], k.shape[1])

    def keep_of(acc: Accumulator, b: int) -> Keep:
        if support.name in ("random", "bigbird") and support.params.block_size > 1:  # type: ignore[attr-defined]
            return lambda i, j: _drawn_blocks(support, call, Hk, q.shape[1] // Hk, i, j)
        return lambda i, j: pattern_keep(support, call, heads, i, j)

    return _pattern_call(q, k, v, params, call, keep_of)


def _drawn_blocks(support: Support, call: Call, Hk: int, group: int, i: Tensor, j: Tensor) -> Tensor:
    """The pairs of ``random`` and ``bigbird`` whose keys are drawn by blocks."""
    knobs, num_keys = support.params, j.shape[1]
    L = knobs.block_size  # type: ignore[attr-defined]
    num_blocks = -(-num_keys // L)
    drawn = block_draws(call, Hk, i[:, 0] // L, knobs.num_random // L, num_blocks)  # type: ignore[attr-defined]
    found = torch.zeros(*drawn.shape[:2], num_blocks + 1, dtype=torch.bool, device=i.device)
    found.scatter_(2, torch.where(drawn < 0, num_blocks, drawn), True)
    keep = found[..., :-1].repeat_interleave(L, -1)[..., :num_keys].repeat_interleave(group, 0)
    if support.name == "random":
        return keep | (i == j)
    columns = knobs.global_tokens  # type: ignore[attr-defined]
    full_rows = 0 if call.causal else columns
    return keep | window_keep(i, j, knobs.window, columns, full_rows, call.causal)  # type: ignore[attr-defined]


def buckets_call(
    q: Tensor, k: Tensor, v: Tensor, params: FeatureParams, call: Call, support: Support
) -> AttentionResult:
    """A whole call over ``lsh`` or ``kmeans``."""
    if call.causal:  # a key after the last row chooses nothing
        k, v = (x[:, :, : call.start + q.shape[2]] for x in (k, v))
    how = bucketing(support, exact_rows(params, call))
    alone = call if len(q) == 1 else replace(call, kept=None)

    def keep_of(acc: Accumulator, b: int) -> Keep:
        if not looks_beyond_base(how.reach, call, acc.q.shape[3], acc.k.shape[2]):
            return lambda i, j: _near(how.reach, call.causal, i, j)
        codes = how.codes(acc.q[b], acc.k[b], alone)
        Hk, G, N, _ = acc.q[b].shape
        shape = Shape(Hk, G, N, acc.k.shape[2], len(codes.tables), call.start)
        plan = plan_rounds([codes], shape, how.reach, call.causal, _LEAST_ROWS)
        places = torch.empty_like(plan.order)
        numbers = torch.arange(shape.keys, dtype=torch.int32, device=places.device)
        places.scatter_(-1, plan.order.long(), numbers.expand_as(places))
        return lambda i, j: _found(plan, places, codes.tables, how.reach, call, i, j)

    return _pattern_call(q, k, v, params, alone, keep_of)


def _near(reach: Reach, causal: bool, i: Tensor, j: Tensor) -> Tensor:
    return window_keep(i, j, reach.window, reach.sinks, reach.exact_rows if causal else 0, causal)


def _found(
    plan: Plan, places: Tensor, tables: tuple[int, ...], reach: Reach, call: Call, i: Tensor, j: Tensor
) -> Tensor:
    """Pairs of the window, the sinks and any round: bool [H, R, M]."""
    shape, begin = plan.shape, (i[:, 0] - call.start)[:1]
    keep = _near(reach, call.causal, i, j).expand(shape.heads * shape.group, -1, -1)
    rows = begin + torch.arange(len(i), device=i.device)
    for r, table in enumerate(tables):
        lo, hi = (
            x[:, r].view(shape.heads, shape.rows, shape.group)[:, rows].mT.flatten(0, 1)[..., None]
            for x in (plan.lo, plan.hi)
        )
        place = places[:, table, : j.shape[1]].repeat_interleave(shape.group, 0)[:, None]
        keep = keep | ((lo <= place) & (place < hi))
    return keep


def _pattern_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    params: FeatureParams,
    call: Call,
    keep_of: Callable[[Accumulator, int], Keep],
) -> AttentionResult:
    began = perf_counter()
    acc = accumulator(q, k, v, call)
    features = features_of(acc, params)
    tiles = query_tiles(call, q.shape[2], k.shape[2], TILE, BLOCK)
    dropped, counts = torch.zeros_like(acc.lse), _Counts([], [])
    acc.complete(0, 0)
    for b in range(len(q)):
        fmap, rows, keep = map_of(features, b), exact_of(acc, b, dropped), keep_of(acc, b)
        blocks = kept_sums(acc, b, features, fmap, params, tiles) if tiles.num_blocks else None
        text = _text(acc, b, features)
        for some in _stretches(tiles, text.stop, q.shape[1]):
            mask = _mask(keep, params, call, tiles, some, text.stop, q.device)
            touched = _touched(mask, tiles, some, text, k.shape[1])
            _add_pairs(acc, b, features, rows, text, tiles, some, mask, touched, counts)
            if blocks is not None:
                left_out = _candidates(tiles, some, q.device) & ~touched[..., : tiles.num_blocks]
                add_left_out(rows, features, fmap, tiles, left_out, blocks, some)
    counts.tell(acc)
    return together(acc, q, began, features, dropped)


def _text(acc: Accumulator, b: int, features: Features) -> Text:
    call, M = acc.call, acc.k.shape[2]
    own = features.of_sequence(b) if len(acc.k) > 1 else features
    logs = features.map.log_keys(own.centred(acc.k[b : b + 1]))[0]
    features.flops += acc.k.shape[1] * map_flops(features, M)
    stop = call.start + acc.q.shape[3] if call.causal else M
    return Text(
        acc.k[b], acc.v[b], logs.contiguous(), call.start, min(stop, M), call.causal, call.scale, BLOCK
    )


def _stretches(tiles: QueryTiles, num_keys: int, heads: int) -> Iterator[range]:
    step = max(1, PAIRS_AT_ONCE // (tiles.height * max(1, num_keys) * heads))
    for a in range(0, tiles.num_tiles, step):
        yield range(a, min(a + step, tiles.num_tiles))


def _mask(
    keep: Keep,
    params: FeatureParams,
    call: Call,
    tiles: QueryTiles,
    some: range,
    stop: int,
    device: torch.device,
) -> Tensor:
    """The pairs kept by the rows of some tiles, bool [H or 1, R, stop]."""
    first, last = tiles.borders[some[0]], tiles.borders[some[-1] + 1]
    i = torch.arange(call.start + first, call.start + last, device=device)[:, None]
    j = torch.arange(stop, device=device)[None]
    found = keep(i, j)
    if found.dim() == 3 and found.stride(0) == 0:
        found = found[:1]
    found = found | (i < exact_rows(params, call))
    if call.causal:
        found = found & (j <= i)
    return (found if found.dim() == 3 else found[None]).contiguous()


def _candidates(tiles: QueryTiles, some: range, device: torch.device) -> Tensor:
    """Bool [T, P]: blocks that may come as sums, which all rows of a tile see."""
    first = [
        tiles.first_key(t) // tiles.block if tiles.causal else tiles.num_keys // tiles.block for t in some
    ]
    blocks = torch.arange(tiles.num_blocks, device=device)
    return blocks[None] < torch.tensor(first).to(device, non_blocking=True)[:, None]


def _touched(mask: Tensor, tiles: QueryTiles, some: range, text: Text, Hk: int) -> Tensor:
    """Bool [Hk, T, P]: blocks, up to the last that some row sees, that go pair by pair."""
    num = -(-text.stop // BLOCK)
    base, per_tile = tiles.borders[some[0]], []
    for t in some:
        rows = mask[:, tiles.borders[t] - base : tiles.borders[t + 1] - base].any(1)
        per_tile.append(pad(rows, (0, num * BLOCK - text.stop)).view(len(mask), num, BLOCK).any(-1))
    touched = torch.stack(per_tile, 1).expand(len(mask) if len(mask) > 1 else Hk, -1, -1)
    shared: Tensor = touched.unflatten(0, (Hk, -1)).any(1)
    lo, hi = (
        torch.tensor([bound(t) for t in some]).to(mask.device, non_blocking=True)[:, None]
        for bound in _bounds(tiles, text)
    )
    blocks = torch.arange(num, device=mask.device)[None]
    return (shared | (blocks >= lo)) & (blocks < hi)


def _bounds(tiles: QueryTiles, text: Text) -> tuple[Callable[[int], int], Callable[[int], int]]:
    """Of a tile: the first block that not all of its rows see whole, and the first that none sees."""
    if not text.causal:
        return (lambda t: text.stop // BLOCK), (lambda t: -(-text.stop // BLOCK))
    return (
        lambda t: tiles.first_key(t) // BLOCK,
        lambda t: -(-min(text.stop, text.start + tiles.borders[t + 1]) // BLOCK),
    )


def _add_pairs(
    acc: Accumulator,
    b: int,
    features: Features,
    rows: Exact,
    text: Text,
    tiles: QueryTiles,
    some: range,
    mask: Tensor,
    touched: Tensor,
    counts: _Counts,
) -> None:
    (_, Hk, G, _, _), device = acc.q.shape, acc.q.device
    first, last = tiles.borders[some[0]], tiles.borders[some[-1] + 1]
    q = acc.q[b : b + 1, :, :, first:last].to(features.map.directions.dtype)
    own = features.of_sequence(b) if len(acc.k) > 1 else features
    shift = own.shift(q)
    logs = features.map.log_queries(q)[0].flatten(0, 1).contiguous()
    lift = (
        shift[0].flatten(0, 1).contiguous() if isinstance(shift, Tensor) else logs.new_zeros(logs.shape[:2])
    )
    order = torch.argsort((~touched).to(torch.uint8), dim=-1, stable=True).to(torch.int32)
    heights = torch.tensor([tiles.borders[t + 1] - tiles.borders[t] for t in some]).to(
        device, non_blocking=True
    )
    stretch = Stretch(
        torch.tensor(tiles.borders[some[0] : some[-1] + 2], dtype=torch.int32).to(device, non_blocking=True),
        first,
        _tallest(tiles, some),
        order.contiguous(),
        touched.sum(-1, dtype=torch.int32),
        mask.view(torch.uint8),
        logs,
        lift,
    )
    pairs(rows, text, stretch).run()
    counts.kept.append(mask.sum() * (Hk * G // len(mask)))
    counts.computed.append((touched.sum(-1) * heights).sum() * G * BLOCK)
    F = features.map.num_features
    features.flops += Hk * G * (map_flops(features, last - first) + 2 * (last - first) * text.stop * F)
