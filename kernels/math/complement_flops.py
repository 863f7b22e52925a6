"""Operations of Scatterbrain, predicted from a call's sizes: the support's, and the features of what is left.

    map(n) = n (2 F D + 2 D + 2 F)         features of n vectors
    sums   = 2 F (Dv + 1)                  for every key that is summed, row that is read, and block merged

F ``num_features``. What each file ``kernels.math.complement_*`` counts, with the assumptions on data and kept
states that ``kernels.math.flops`` makes.
"""

from __future__ import annotations

import math
from dataclasses import replace

from kernels.contract import CallShape
from kernels.math.clusters import KMeansParams
from kernels.math.complement import Support
from kernels.math.complement_blocks_row import FEW
from kernels.math.complement_tiles import BLOCK, TILE
from kernels.math.complement_window import Near
from kernels.math.features import FeatureParams
from kernels.math.flops import (
    Buckets,
    amount,
    attention_flops,
    begins,
    bucket_pairs,
    candidates,
    kmeans_buckets,
    lsh_buckets,
    own_pairs,
    probe_flops,
    rows_of,
    tile_ends,
    window_pairs,
)
from kernels.math.hashing import LshParams
from kernels.math.linear_attention import feature_flops
from kernels.math.selection import TileParams


def complement_flops(params: FeatureParams, shape: CallShape, support: Support, near: Near | None) -> float:
    """``near``: the support as a window, where it is one."""
    if near is not None:
        return _window_flops(params, shape, near)
    if isinstance(support.params, TileParams):
        return _blocks_flops(params, shape, support, support.params)
    if isinstance(support.params, LshParams):
        return _buckets_flops(params, shape, support, lsh_buckets(support.params, shape))
    if isinstance(support.params, KMeansParams):
        return _buckets_flops(params, shape, support, kmeans_buckets(support.params))
    return _tiles_flops(params, shape, support)


def _map(params: FeatureParams, shape: CallShape, vectors: float) -> float:
    F, D = params.num_features, shape.key_dim
    return vectors * (2 * F * D + 2 * D + 2 * F)


def _sums(params: FeatureParams, shape: CallShape) -> int:
    return 2 * params.num_features * (shape.value_dim + 1)


def _window_flops(params: FeatureParams, shape: CallShape, near: Near) -> float:
    full = max(near.full_rows, params.centre_keys if shape.causal else 0)
    exact = attention_flops(shape, window_pairs(shape, max(near.window, 1), near.columns, full))
    last = shape.num_keys - 1
    beyond = last - near.window >= near.columns if shape.causal else last >= near.columns
    if last < full or not beyond:
        return exact
    keys, sides = (shape.num_rows, 1) if shape.causal else (shape.num_keys, 2)
    dims = params.num_features, shape.key_dim, shape.value_dim
    heads = shape.num_heads, shape.num_kv_heads
    return exact + sides * feature_flops(shape.num_rows, keys, *heads, dims, True)


def _blocks_flops(params: FeatureParams, shape: CallShape, support: Support, knobs: TileParams) -> float:
    """Tiles that begin among the exact rows keep all that lies before them."""
    tile, (start, stop) = knobs.query_tile, rows_of(shape)
    whole = min(stop, -(-params.centre_keys // tile) * tile) if shape.causal else 0
    if whole >= stop:
        return attention_flops(shape, own_pairs(shape, tile, 1) + begins(start, stop, tile))
    exact, rest = 0.0, shape
    if whole > start:
        first = replace(shape, num_rows=whole - start, num_keys=whole)
        exact = attention_flops(first, own_pairs(first, tile, 1) + begins(start, whole, tile))
        rest = replace(shape, num_rows=stop - whole)
    return exact + support.backend.flops(support.params, rest) + _left_out_flops(params, rest, knobs)


def _left_out_flops(params: FeatureParams, shape: CallShape, knobs: TileParams) -> float:
    """Features of blocks that are new, rows over their tile's sums, and those sums out of blocks'."""
    tile, block, (start, stop) = knobs.query_tile, knobs.block_size, rows_of(shape)
    most, chosen = candidates(shape, tile, block), _chosen_keys(shape, knobs)
    if chosen >= most:
        return 0.0
    heads, blocks, sums = shape.num_kv_heads, most // block, _sums(params, shape)
    if not shape.causal:
        read, rows, blocks = shape.num_keys // block * block, shape.num_rows, shape.num_keys // block
    else:
        known = max(0, start - 1) // tile * tile
        read = most - known if known > chosen else most
        rows = stop - max(start, (int(chosen) // tile + 1) * tile)
    made = heads * (_map(params, shape, read) + read * sums)
    if shape.causal and shape.num_rows == 1 and FEW * chosen <= most:
        return made + shape.num_heads * (_map(params, shape, 1) + (1 + chosen / block) * sums)
    tiles = (stop - 1) // tile - start // tile + 1
    rows_over_sums = shape.num_heads * (_map(params, shape, rows) + rows * sums)
    return made + rows_over_sums + heads * tiles * blocks * sums


def _chosen_keys(shape: CallShape, knobs: TileParams) -> float:
    budget, share = amount(knobs)
    return budget if share is None else share * candidates(shape, knobs.query_tile, knobs.block_size)


def _buckets_flops(params: FeatureParams, shape: CallShape, support: Support, buckets: Buckets) -> float:
    """The support's without its probe; L of every key and row, and once more of the panels' pairs."""
    exact = support.backend.flops(support.params, shape) - probe_flops(shape)
    pairs = shape.num_heads * bucket_pairs(shape, buckets)
    if not pairs:
        return exact
    read = 1 if shape.causal and shape.num_rows == 1 else shape.num_keys
    vectors = shape.num_kv_heads * read + shape.num_heads * shape.num_rows
    once = _map(params, shape, vectors) + vectors * _sums(params, shape)
    return exact + once + 2.0 * pairs * (params.num_features + shape.value_dim + 1)


def _tiles_flops(params: FeatureParams, shape: CallShape, support: Support) -> float:
    """Scores and features of all keys in blocks that some row of a tile keeps, the others as sums."""
    rows, (start, stop) = min(TILE, shape.num_rows), rows_of(shape)
    before = begins(start, stop, TILE) if shape.causal else shape.num_rows * max(0, shape.num_keys - TILE)
    near, share = _touched(shape, support, rows)
    late = max(0, stop - max(start, TILE)) if shape.causal else shape.num_rows
    panels = own_pairs(shape, TILE, BLOCK) + min(before, share * before + late * near)
    ends, befores, tiles = _tile_sums(shape)
    keys = shape.num_kv_heads * min(ends, ends - (1.0 - share) * befores + tiles * near)
    F, heads = params.num_features, shape.num_heads
    found = attention_flops(shape, panels) + _map(params, shape, keys + heads * shape.num_rows)
    found += heads * 2.0 * panels * F
    most = candidates(shape, TILE, BLOCK)
    read = most - max(0, start - 1) // TILE * TILE if shape.causal else shape.num_keys
    found += shape.num_kv_heads * (_map(params, shape, read) + read * _sums(params, shape))
    if near >= most:
        return found
    summed = shape.num_kv_heads * max(0.0, (1.0 - share) * befores - tiles * near) / BLOCK
    over = heads * (_map(params, shape, late) + late * _sums(params, shape))
    return found + over + summed * _sums(params, shape)


def _tile_sums(shape: CallShape) -> tuple[int, int, int]:
    """Of all tiles: the keys up to each one's end, those before it (bidirectional: all, all others), and
    their number."""
    start, stop = rows_of(shape)
    first, last = start // TILE, (stop - 1) // TILE
    tiles = last - first + 1
    if shape.causal:
        return tile_ends(start, stop, TILE), TILE * (first + last) * tiles // 2, tiles
    return tiles * stop, tiles * max(0, stop - TILE), tiles


def _touched(shape: CallShape, support: Support, rows: int) -> tuple[float, float]:
    """Keys near a tile of so many rows in whole blocks, and the share of all others' blocks that some row
    keeps, of one key head."""
    knobs, blocks = support.params, max(1.0, shape.num_keys / BLOCK)
    group = shape.num_heads // shape.num_kv_heads
    if support.name in ("strided", "fixed"):
        w, combine = knobs.stride, knobs.combine  # type: ignore[attr-defined]
        share = min(1.0, (rows + BLOCK - 1) / w if support.name == "strided" else BLOCK / w)
        turns = combine == "sequential" or (combine == "multihead" and group == 1)
        return float(w), share / 2 if turns else share
    window = getattr(knobs, "window", 0)
    near = (1 if shape.causal else 2) * (window + BLOCK) + getattr(knobs, "global_tokens", 0)
    if support.name == "star":
        return float(near + BLOCK), 0.0
    n, L = knobs.num_random, knobs.block_size  # type: ignore[attr-defined]
    draws = rows * group * n if L == 1 else -(-rows // L) * (n // L) * max(1.0, L / BLOCK)
    return float(near if window else 0), -math.expm1(-draws / blocks)
