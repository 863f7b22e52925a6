"""Scatterbrain over chosen key blocks: what a query tile leaves out is whole blocks, each known by its
features.

    mu_br = max over j in b of e_r(k_j),   S_br = sum over j in b of e^(e_r(k_j) - mu_br) [v_j, 1]
    tile t:  mu_r = max over left-out b of mu_br,   T_r = sum over left-out b of e^(mu_br - mu_r) S_br
    row i:   c_i = max_r (a_r(q_i) + mu_r),         (n_i, z_i) = sum_r e^(a_r(q_i) + mu_r - c_i) T_r

Every feature has a maximum of its own, so the best of them has weight 1 and z_i >= 1, whatever the other
blocks hold. Own keys of a tile are exact, so no sum meets the diagonal. The T_r of many tiles are one
matrix product per feature. Cost beyond the support's: O(M num_features (D + Dv)) for the blocks,
O(num_features Dv) for each tile and block left out, O(N num_features (D + Dv)) for the rows. With a cache
the blocks' features are kept beside it, num_features (Dv + 2) numbers per block and key head, and for decode
their total (``kernels.math.complement_blocks_row``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from threading import Lock
from time import perf_counter

import torch
from torch import Tensor

from kernels.contract import AttentionResult, Call
from kernels.math.accumulate import Accumulator, accumulator
from kernels.math.block_lists import BlockLists, lists_from_table
from kernels.math.block_sparse import add_block_lists
from kernels.math.complement import (
    Features,
    Support,
    exact_rows,
    features_of,
    map_flops,
    merge_complement,
    together,
)
from kernels.math.complement_blocks_row import BlockTotals, add_row_left_out, takes_difference
from kernels.math.features import FeatureMap, FeatureParams
from kernels.math.query_tiles import QueryTiles, query_tiles
from kernels.math.selected import ScoredLists
from kernels.math.selection import TileParams
from kernels.math.signed import Part
from kernels.math.spans import add_spans, plan_for
from kernels.parallel import run_spread

TABLE_ELEMENTS = 1 << 21
"""Weights of blocks in tiles, over features, that exist at once."""
KEYS_AT_ONCE = 1 << 13
"""Keys, over heads, whose features exist at once while blocks are summed."""


def blocks_attention(
    q: Tensor, k: Tensor, v: Tensor, params: FeatureParams, call: Call, support: Support
) -> AttentionResult:
    """A whole call over a support that has ``select``, stretches of its rows side by side where that pays."""
    if call.impl == "triton":
        from kernels._triton.signed_calls import blocks_call

        return blocks_call(q, k, v, params, call, support)
    knobs = support.params
    assert isinstance(knobs, TileParams)
    shared = KeptBlocks(knobs.block_size, exact_rows(params, call)) if len(q) == 1 else None
    execute = partial(_stretch, support=support, shared=shared)
    return run_spread(execute, q, k, v, params, call)  # cut as the support's tiles ask (``chunk_multiple``)


def _stretch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    params: FeatureParams,
    call: Call,
    *,
    support: Support,
    shared: KeptBlocks | None,
) -> AttentionResult:
    """Some rows of a call; sequences of a batch are independent. ``shared``: the block features of the call's
    only sequence, should no cache have them."""
    began = perf_counter()
    acc = accumulator(q, k, v, call)
    knobs = support.params
    assert isinstance(knobs, TileParams)
    tiles = query_tiles(call, q.shape[2], k.shape[2], knobs.query_tile, knobs.block_size)
    add_spans(acc, plan_for(acc, tiles.own_keys()))
    features = features_of(acc, params)
    dropped = torch.zeros_like(acc.lse)
    for b in range(len(q)):
        lists = _chosen(acc, (q[b : b + 1], k[b : b + 1], v[b : b + 1]), support, tiles, params)
        add_block_lists(acc, b, lists)
        left_out = left_out_blocks(tiles, lists)
        if bool(left_out.any()):
            own = features.of_sequence(b)
            store = _store(acc, own, params, tiles.block, shared)
            blocks = _read(store, acc, b, own, tiles)
            if not _add_as_row(acc, own, left_out, store, blocks, dropped[b]):
                _add_left_out(acc, b, own, tiles, left_out, blocks, dropped[b])
            features.flops += own.flops if own is not features else 0
    return together(acc, q, began, features, dropped)


def _chosen(
    acc: Accumulator,
    sequence: tuple[Tensor, Tensor, Tensor],
    support: Support,
    tiles: QueryTiles,
    params: FeatureParams,
) -> BlockLists:
    """What the support lists; all candidates for tiles that begin among the exact rows."""
    began = perf_counter()
    assert support.backend.select is not None
    lists = support.backend.select(*sequence, support.params, acc.call)
    acc.scored += lists.scored if isinstance(lists, ScoredLists) else 0
    whole = [tiles.first_key(t) < exact_rows(params, acc.call) for t in range(tiles.num_tiles)]
    if any(whole) and tiles.num_blocks:
        table = lists.table(tiles.num_blocks)
        table |= tiles.candidates() & torch.tensor(whole)[:, None]
        lists = lists_from_table(table, tiles.block, tiles.borders)
    acc.selection_s += perf_counter() - began
    return lists


def left_out_blocks(tiles: QueryTiles, lists: BlockLists) -> Tensor:
    """Bool [Hk, num_tiles, num_blocks]: candidates that are not listed."""
    if not tiles.num_blocks:
        return torch.zeros(lists.heads, tiles.num_tiles, 0, dtype=torch.bool)
    return tiles.candidates() & ~lists.table(tiles.num_blocks)


@dataclass(frozen=True)
class BlockFeatures:
    """Of the first blocks of one sequence: ``mu`` [Hk, blocks, F] and ``sums`` [Hk, blocks, F, Dv + 1], whose
    last column is the sum without values. Views: read them before more is asked for."""

    mu: Tensor
    sums: Tensor

    @property
    def num_blocks(self) -> int:
        return int(self.mu.shape[1])

    @property
    def nbytes(self) -> int:
        return self.mu.nbytes + self.sums.nbytes

    def first(self, num_blocks: int) -> BlockFeatures:
        return BlockFeatures(self.mu[:, :num_blocks], self.sums[:, :num_blocks])


class KeptBlocks:
    """The block features of one sequence in one layer, grown as its keys come in
    (``kernels.math.kept.State``).

    ``first_keys``: positions on which every key's features depend (the centre is their mean)."""

    def __init__(self, block: int, first_keys: int) -> None:
        self._block, self._first_keys = block, first_keys
        self._lock = Lock()
        self._room: BlockFeatures | None = None
        self._num_known = 0
        self._totals = BlockTotals()

    @property
    def nbytes(self) -> int:
        return self._totals.nbytes + (0 if self._room is None else self._room.nbytes)

    def truncate(self, length: int) -> None:
        with self._lock:
            whole = length // self._block if length >= self._first_keys else 0
            self._num_known = min(self._num_known, whole)
            self._totals.truncate(self._num_known)

    def get(self, k: Tensor, v: Tensor, features: Features, num_blocks: int) -> tuple[BlockFeatures, int]:
        """The first ``num_blocks`` of k [1, Hk, M, D], v [1, Hk, M, Dv], and how many keys were read for
        it."""
        with self._lock:
            known = self._num_known
            if num_blocks > known or self._room is None:
                self._room = self._grown(k, v, features.map, num_blocks)
                _fill(k, v, features, self._block, known, self._room.first(num_blocks))
                self._num_known = num_blocks
            return self._room.first(num_blocks), max(0, num_blocks - known) * self._block

    def totals(self, blocks: BlockFeatures) -> BlockTotals:
        """Those over the first blocks that ``get`` has just given."""
        with self._lock:
            self._totals.truncate(blocks.num_blocks)
            self._totals.advance(blocks.mu, blocks.sums)
            return self._totals

    def _grown(self, k: Tensor, v: Tensor, fmap: FeatureMap, num_blocks: int) -> BlockFeatures:
        """Room for more blocks, a quarter more than before, so that blocks are seldom copied."""
        if self._room is not None and num_blocks <= self._room.num_blocks:
            return self._room
        wanted = num_blocks if self._room is None else max(num_blocks, self._room.num_blocks * 5 // 4)
        shape = (k.shape[1], wanted, fmap.num_features)
        room = BlockFeatures(
            fmap.directions.new_empty(shape), fmap.directions.new_empty(*shape, v.shape[3] + 1)
        )
        if self._room is not None:
            known = self._num_known
            room.mu[:, :known], room.sums[:, :known] = self._room.mu[:, :known], self._room.sums[:, :known]
        return room


def _fill(k: Tensor, v: Tensor, features: Features, L: int, begin: int, into: BlockFeatures) -> None:
    """Blocks ``begin`` .. of ``into``, some keys at a time."""
    step = max(1, KEYS_AT_ONCE // (L * k.shape[1]))
    for a in range(begin, into.num_blocks, step):
        some = slice(a, min(a + step, into.num_blocks))
        keys = slice(a * L, some.stop * L)
        logs = torch.unflatten(features.map.log_keys(features.centred(k[:, :, keys]))[0], 1, (-1, L))
        mu = logs.amax(2)
        weights = logs.sub_(mu[:, :, None]).exp_()
        into.mu[:, some] = mu
        into.sums[:, some, :, -1] = weights.sum(2)
        values = torch.unflatten(v[0, :, keys].to(weights.dtype), 1, (-1, L))
        into.sums[:, some, :, :-1] = weights.mT @ values


def kept_blocks(
    acc: Accumulator, b: int, features: Features, params: FeatureParams, tiles: QueryTiles
) -> BlockFeatures:
    """Those of the sequence's cache, where it has one; else made for this call."""
    return _read(_store(acc, features, params, tiles.block, None), acc, b, features, tiles)


def _store(
    acc: Accumulator, features: Features, params: FeatureParams, L: int, shared: KeptBlocks | None
) -> KeptBlocks:
    first_keys = exact_rows(params, acc.call)
    if not _is_kept(acc):
        return KeptBlocks(L, first_keys) if shared is None else shared
    assert acc.call.kept is not None
    key = ("block features", features.map.key, L, *acc.k.shape[1:2], acc.v.shape[3], acc.k.device)
    return acc.call.kept.get(key, lambda: KeptBlocks(L, first_keys))


def _is_kept(acc: Accumulator) -> bool:
    return acc.call.kept is not None and acc.call.causal and len(acc.k) == 1


def _read(
    store: KeptBlocks, acc: Accumulator, b: int, features: Features, tiles: QueryTiles
) -> BlockFeatures:
    blocks, read = store.get(acc.k[b : b + 1], acc.v[b : b + 1], features, tiles.num_blocks)
    heads, width = acc.k.shape[1], acc.v.shape[3] + 1
    features.flops += heads * (map_flops(features, read) + 2 * read * features.map.num_features * width)
    return blocks


def _add_as_row(
    acc: Accumulator,
    features: Features,
    left_out: Tensor,
    store: KeptBlocks,
    blocks: BlockFeatures,
    dropped: Tensor,
) -> bool:
    """A decode step's left-out blocks as a difference, where that serves."""
    if acc.q.shape[3] > 1 or not _is_kept(acc) or not takes_difference(left_out[:, 0]):
        return False
    totals = store.totals(blocks)
    return add_row_left_out(acc, features, left_out[:, 0], (blocks.mu, blocks.sums), totals, dropped)


def _add_left_out(
    acc: Accumulator,
    b: int,
    features: Features,
    tiles: QueryTiles,
    left_out: Tensor,
    blocks: BlockFeatures,
    dropped: Tensor,
) -> None:
    """Merge what every tile leaves out into its rows; fills ``dropped`` [Hk, G, N]."""
    for tile, (mu, sums) in enumerate(_tile_sums(features, left_out, blocks)):
        if not bool(left_out[:, tile].any()):
            continue
        rows = tiles.rows(tile)
        q = acc.q[b : b + 1, :, :, rows]
        part = rows_part(q, features, mu, sums)
        shift = features.shift(q)
        part.log_scale.add_(shift[0] if isinstance(shift, Tensor) else shift)
        dropped[..., rows] = merge_complement(acc.out[b, :, :, rows], acc.lse[b, :, :, rows], part)


def rows_part(q: Tensor, features: Features, mu: Tensor, sums: Tensor) -> Part:
    """Rows q [1, Hk, G, R, D] over mu [Hk, F] and sums [Hk, F, Dv + 1] -> a part [Hk, G, R, (Dv)]."""
    logs = features.map.log_queries(q)[0]
    logs += mu[:, None, None]
    top = logs.amax(-1)
    top = top.masked_fill(top == -math.inf, 0.0)
    Hk, G, R, F = logs.shape
    weights = logs.sub_(top.unsqueeze(-1)).exp_()
    found = torch.bmm(weights.view(Hk, G * R, F), sums).view(Hk, G, R, -1)
    features.flops += Hk * G * (map_flops(features, R) + 2 * R * F * sums.shape[-1])
    return Part(found[..., :-1], found[..., -1], top)


def _tile_sums(
    features: Features, left_out: Tensor, blocks: BlockFeatures
) -> Iterator[tuple[Tensor, Tensor]]:
    """Tile by tile the maxima mu_r [Hk, F] and sums T_r [Hk, F, Dv + 1] of what it leaves out; -inf and 0
    where that is nothing. Some tiles at a time, as far as they leave something out."""
    Hk, num_tiles, num_blocks = left_out.shape
    F, width = blocks.sums.shape[2:]
    finite = math.isfinite(float(blocks.sums.sum()) + float(blocks.mu.sum()))
    step = max(1, TABLE_ELEMENTS // (num_blocks * F * Hk)) if finite else 1
    for t0, t1 in pairwise([*range(0, num_tiles, step), num_tiles]):
        some = left_out[:, t0:t1]
        used = some.any(0).any(0).nonzero()
        last = int(used[-1]) + 1 if len(used) else 1
        mu, sums = blocks.mu[:, :last], blocks.sums[:, :last]
        made = _sums_of(some[:, :, :last], mu, sums) if finite else sums_apart(some[:, 0, :last], mu, sums)
        features.flops += 2 * Hk * (t1 - t0) * last * F * width
        for t in range(t1 - t0):
            yield made[0][:, t], made[1][:, t]


def _sums_of(left_out: Tensor, mu: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """left_out [Hk, T, P], mu [Hk, P, F], sums [Hk, P, F, W] -> [Hk, T, F], [Hk, T, F, W]."""
    weights = mu.mT[:, :, None].masked_fill(~left_out[:, None].to(mu.device), -math.inf)  # [Hk, F, T, P]
    top = weights.amax(-1)
    weights.sub_(top.masked_fill(top == -math.inf, 0.0).unsqueeze(-1)).exp_()
    return top.mT, (weights @ sums.transpose(1, 2)).transpose(1, 2)


def sums_apart(left_out: Tensor, mu: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """The same for one tile, left_out [Hk, P], from its own blocks alone: a block that is not finite is felt
    only where it is left out."""
    found = []
    for head in range(len(mu)):
        own = left_out[head].nonzero()[:, 0]
        none = mu.new_full((1, 1, mu.shape[2]), -math.inf), sums.new_zeros(1, 1, *sums.shape[2:])
        every = torch.ones(1, 1, len(own), dtype=torch.bool)
        found.append(
            _sums_of(every, mu[head : head + 1, own], sums[head : head + 1, own]) if len(own) else none
        )
    return torch.cat([top for top, _ in found]), torch.cat([each for _, each in found])
