"""How much memory scatterbrain's two halves take together, counted before a call runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from kernels.contract import CallShape, Workspace
from kernels.math.complement import Support
from kernels.math.complement_blocks import KEYS_AT_ONCE, TABLE_ELEMENTS
from kernels.math.complement_tiles import BLOCK, TILE
from kernels.math.complement_window import Near
from kernels.math.features import FeatureParams
from kernels.math.linear_attention import feature_workspace
from kernels.math.selection import TileParams
from kernels.math.spans import BATCH_ROWS
from kernels.math.window import tile_height
from kernels.math.workspace import _accumulator, _scores, windows

_FP32, _FP64 = 4, 8


def complement_workspace(
    params: FeatureParams, shape: CallShape, support: Support, near: Near | None
) -> Workspace:
    """What impl ``torch`` takes."""
    directions = shape.num_kv_heads * params.num_features * shape.key_dim * _FP32
    if near is not None:
        made = _window(params, shape, near)
    elif isinstance(support.params, TileParams):
        made = _blocks(params, shape, support, support.params)
    elif support.name in ("lsh", "kmeans"):
        made = _buckets(params, shape, support)
    else:
        made = _tiles(params, shape, _touched_keys(shape, support))
    dropped = 2 * shape.num_rows * shape.num_heads * _FP32
    return replace(made, live_bytes=made.live_bytes + dropped, kept_bytes=made.kept_bytes + directions)


def _part(shape: CallShape) -> int:
    """A part of all rows: numerators, denominators and scales."""
    return shape.num_rows * shape.num_heads * (shape.value_dim + 2) * max(_FP32, shape.itemsize)


def _window(params: FeatureParams, shape: CallShape, near: Near) -> Workspace:
    """The exact half; then the sums and the rows' part of them (bidirectional: of both sides, the text turned
    round for one); then the part once more as it is merged."""
    exact = windows(shape, max(1, near.window), near.columns)
    sums = feature_workspace(shape, params.num_features, scaled=True)
    turned = 0
    if not shape.causal:
        turned = shape.num_rows * shape.num_heads * shape.key_dim * _FP32 + 3 * _part(shape)
        turned += shape.num_keys * shape.num_kv_heads * (shape.key_dim + shape.value_dim) * shape.itemsize
    during = _part(shape) + turned + sums.live_bytes
    merging = (2 if shape.causal else 4) * _part(shape)
    alone = exact.live_bytes - _scores_of_other_heads(shape, near)
    live = max(alone, _accumulator(shape) + max(during, merging))
    return Workspace(live, 0, exact.shared_bytes, sums.cache_bytes)


def _scores_of_other_heads(shape: CallShape, near: Near) -> int:
    """What ``windows`` counts of heads that share keys and do not run at once, where scores exist at all."""
    if shape.num_heads == shape.num_kv_heads:
        return 0
    width = near.window if shape.causal else 2 * near.window
    panel = width + tile_height(width, shape.num_heads // shape.num_kv_heads)
    every = _scores(shape, min(shape.num_rows, BATCH_ROWS), min(panel, shape.num_keys))
    return every * (shape.num_kv_heads - 1) // shape.num_kv_heads


def _block_features(params: FeatureParams, shape: CallShape, block: int) -> tuple[int, int]:
    """What stays of all blocks, and what making them takes beside it."""
    F, width = params.num_features, shape.value_dim + 1
    stays = shape.num_kv_heads * (shape.num_keys // block) * F * (width + 1) * _FP32
    keys = min(max(KEYS_AT_ONCE, block * shape.num_kv_heads), shape.num_keys * shape.num_kv_heads)
    made = keys * (2 * F + 2 * shape.key_dim + width + F * width // block) * _FP32
    return stays, made


def _tile_sums(params: FeatureParams, shape: CallShape, block: int, height: int) -> int:
    """Weights of blocks in some tiles, their sums, and one tile's rows over them."""
    F, width, Hk = params.num_features, shape.value_dim + 1, shape.num_kv_heads
    blocks, tiles = max(1, shape.num_keys // block), -(-shape.num_rows // height)
    at_once = min(tiles, max(1, TABLE_ELEMENTS // (blocks * F * Hk)))
    rows = min(height, shape.num_rows) * shape.num_heads
    weights = at_once * Hk * F * (2 * blocks + width) * _FP32
    return weights + rows * (2 * F + 3 * width + shape.key_dim) * _FP32


def _blocks(params: FeatureParams, shape: CallShape, support: Support, knobs: TileParams) -> Workspace:
    own = support.backend.workspace(knobs, shape)
    stays, made = _block_features(params, shape, knobs.block_size)
    threads = torch.get_num_threads() if shape.on_cpu else 1
    tiles = threads * _tile_sums(params, shape, knobs.block_size, knobs.query_tile)
    after = _accumulator(shape) + max(made, tiles)
    if shape.causal:
        total = shape.num_kv_heads * params.num_features * (shape.value_dim + 2) * _FP64
        cache = own.cache_bytes + stays + total
        return replace(own, live_bytes=max(own.live_bytes, after), cache_bytes=cache)
    return replace(own, live_bytes=max(own.live_bytes, after + stays))


def _buckets(params: FeatureParams, shape: CallShape, support: Support) -> Workspace:
    """Per key head, on each thread, in fp64: first T with the parts it is joined from; then T, exponents of
    rows and keys and the values, the exponentials of one of them, and panels' features and B in fp32."""
    own = support.backend.workspace(support.params, shape)
    group, F, width = shape.num_heads // shape.num_kv_heads, params.num_features, shape.value_dim + 1
    one = replace(shape, num_heads=group, num_kv_heads=1)
    sums = feature_workspace(one, F, scaled=True)
    rows, keys, D = shape.num_rows * group, shape.num_keys, shape.key_dim
    sides = 1 if shape.causal else 3
    total = rows * (D + sides * (width + 1)) + (0 if shape.causal else (rows + keys) * (D + width))
    panels = rows * (width + 2 * F + width // 2 + F // 2) + keys * (2 * F + width + (F + width) // 2)
    jobs = min(torch.get_num_threads(), shape.num_kv_heads) if shape.on_cpu else 1
    live = own.live_bytes + jobs * (max(total, panels) * _FP64 + 2 * sums.live_bytes)
    cache = own.cache_bytes + (sums.cache_bytes * shape.num_kv_heads if shape.causal else 0)
    drawn = shape.num_kv_heads * F * shape.key_dim * _FP64
    return replace(own, live_bytes=live, cache_bytes=cache, kept_bytes=own.kept_bytes + drawn)


def _touched_keys(shape: CallShape, support: Support) -> int:
    """Keys of a tile's panel: few where drawn keys come in blocks, else all of them."""
    params: Any = support.params
    if support.name not in ("random", "bigbird") or params.block_size == 1:
        return shape.num_keys
    near = 2 * params.window + params.global_tokens if support.name == "bigbird" else 0
    height = min(TILE, shape.num_rows)
    drawn = (height // params.block_size + 1) * params.num_random * max(1, BLOCK // params.block_size)
    touched: int = min(shape.num_keys, height + near + 3 * BLOCK + drawn)
    return touched


def _tiles(params: FeatureParams, shape: CallShape, touched: int) -> Workspace:
    """One tile's masks of all heads, and one key head's panel: scores, estimates, weights and their
    copies."""
    stays, made = _block_features(params, shape, BLOCK)
    tall, keys = min(TILE, shape.num_rows), shape.num_keys
    masks = 4 * tall * keys * shape.num_heads
    group = shape.num_heads // shape.num_kv_heads
    panel = (
        5 * group * tall * touched * _FP32 + touched * (2 * params.num_features + 2 * shape.key_dim) * _FP32
    )
    sums = _tile_sums(params, replace(shape, num_kv_heads=1, num_heads=group), BLOCK, TILE)
    live = _accumulator(shape) + max(made, masks + max(panel, sums))
    if shape.causal:
        return Workspace(live, cache_bytes=stays)
    return Workspace(live + stays)
