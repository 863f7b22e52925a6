"""How much memory a call will take, part by part: what the other files here allocate, counted before it runs.

    live = largest moment of the call,   kept = what it leaves in DRAWS,   shared = what it leaves in MASKS

On a CPU the flash kernel holds no scores. Elsewhere, and where Dv differs from D, scores exist for up to
``KEY_CHUNK`` keys at a time. Inputs narrower than fp32 are widened: rows once, keys panel by panel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from kernels.contract import CallShape, Workspace
from kernels.math.block_sparse import PANEL_BYTES, VIEW_ROWS
from kernels.math.cache import DRAWS, MASKS
from kernels.math.dense import KEY_CHUNK
from kernels.math.per_layer import Forms, largest
from kernels.math.random_part import DRAWS_AT_ONCE, EDGE_ROWS, TILE_ROWS
from kernels.math.spans import (
    _GROUPED_ROWS,
    _JOINED_ROWS,
    _SPLIT_KEYS,
    _SPLIT_ROWS,
    _TALL_ROWS,
    BATCH_ROWS,
)
from kernels.math.window import tile_height

_FP32 = 4
_EDGE_LIST = 4 + 1
"""A drawn key: int32, and whether it is dropped."""
_EDGE_SCORES = 16
"""Beside it, one head at a time: the CSR pattern and its copy, the scores, the embedding bag's offsets."""
_CHOICE = 40
"""A block of one query tile while it is chosen: its score, masked and sorted, its place, its list entry."""
_DRAWING = 6 * 8
"""int64 intermediates of the generator, the reduction to the range and the sort, per draw at once."""


def panels(shape: CallShape, rows: int, width: int, parts: int) -> Workspace:
    """``rows`` of the call's rows at a time over panels of ``width`` keys; ``parts`` of their outputs exist
    at once beside the accumulator."""
    heads, rows = shape.num_heads, min(rows, shape.num_rows)
    outputs = parts * rows * heads * (shape.value_dim + 1) * _FP32
    return Workspace(
        _accumulator(shape) + outputs + _scores(shape, rows, width) + _widened_keys(shape, width)
    )


def spans(shape: CallShape, tile: int, width: int, num_masks: int, parts: int = 2) -> Workspace:
    """``kernels.math.spans``: tiles of ``tile`` rows in batches, panels of ``width`` keys, and as many
    masks as tiles can differ in; ``parts`` as in ``panels``."""
    tile = min(tile, shape.num_rows)
    width = min(width, shape.num_keys)
    rows = min(shape.num_rows, max(BATCH_ROWS, tile))
    batch = panels(shape, rows, width, parts)
    gathered = 0 if shape.itemsize >= _FP32 else (rows // tile) * _widened_keys(shape, width)
    mask = tile * min(width, 4 * tile) * _FP32
    masks = min(num_masks, -(-shape.num_rows // tile) + 1) * mask
    return Workspace(batch.live_bytes + gathered + 2 * mask, shared_bytes=min(masks, MASKS.max_bytes))


def windows(shape: CallShape, window: int, columns: int) -> Workspace:
    """A window, and the first ``columns`` keys in panels of their own."""
    width = window if shape.causal else 2 * window
    tile = tile_height(width, shape.num_heads // shape.num_kv_heads)
    near = spans(shape, tile, tile + width, num_masks=0)
    near = Workspace(near.live_bytes, shared_bytes=_window_masks(shape, tile, window))
    if not columns:
        return near
    return one_after_another(near, spans(shape, _JOINED_ROWS, columns, num_masks=columns // _JOINED_ROWS + 2))


def _window_masks(shape: CallShape, tile: int, window: int) -> int:
    """Of tiles whose spans slide, one over all their keys or, where they are split, two over their edges; of
    the higher ones where a document begins and ends, those over the edge that moves."""
    width = tile + (window if shape.causal else 2 * window)
    split = tile >= _SPLIT_ROWS and width - 2 * tile >= max(_SPLIT_KEYS, tile)
    sliding = tile * _joined(shape, tile) * (2 * tile if split else width)
    uneven = tile < _JOINED_ROWS and _JOINED_ROWS % tile > 0
    edge = max(tile, _JOINED_ROWS + tile * uneven)
    alone = shape.causal and not uneven
    beginning = 0 if alone and window <= edge else min(edge, window) * edge * (1 if alone else 2)
    longest = min(shape.num_rows, shape.num_keys)
    return min(sliding + beginning, 2 * longest * longest, MASKS.max_bytes // _FP32) * _FP32


def _joined(shape: CallShape, height: int) -> int:
    """Query heads that run as rows of one, each with its copy of a mask, in sliding tiles of so many rows."""
    group = shape.num_heads // shape.num_kv_heads
    grows = any(height < rows <= height * group for rows in (_GROUPED_ROWS, _TALL_ROWS))
    return group if grows and group > 2 else 1


def random_keys(shape: CallShape, num_random: int, block_size: int, base_edges: int) -> Workspace:
    """``kernels.math.random_part``. ``base_edges``: key blocks of a row's that the base cuts but does not
    cover."""
    if block_size == 1:
        return _edges(shape, num_random)
    return _blocks(shape, num_random, block_size, base_edges)


def selected_blocks(
    shape: CallShape,
    *,
    query_tile: int,
    block_size: int,
    budget_keys: int | None,
    scoring_bytes: int,
    remainder: str,
    summaries: bool = True,
) -> Workspace:
    """A backend that chooses key blocks for each query tile: its own keys, scores, gathered panels, what is
    left out. ``budget_keys``: the most keys chosen for a tile of any layer and head (None: all of them).
    ``scoring_bytes``: what the backend's scores take at their largest moment. ``remainder`` "gated": the rows
    over their own keys stay until it is known what to think of the means. ``summaries``: whether the backend
    asks for block bounds or means; they stay with a decoder's cache and live as long as an encoder's call."""
    own = spans(shape, query_tile, query_tile, num_masks=2, parts=_own_parts(shape, block_size))
    longest = shape.num_keys if budget_keys is None else min(budget_keys, shape.num_keys)
    known = _summaries(shape, block_size) if summaries else 0
    gated = remainder == "gated"
    before = shape.num_rows * shape.num_heads * (shape.value_dim + 1) * _FP32 if gated else 0
    left_out = _left_out(shape, query_tile, block_size, gated)
    moments = (_listed(shape, query_tile, longest) + before, scoring_bytes, left_out + before)
    live = max(own.live_bytes, _accumulator(shape) + max(moments))
    dropped = 2 * shape.num_rows * shape.num_heads * _FP32
    return Workspace(
        live + dropped + (0 if shape.causal else known),
        shared_bytes=own.shared_bytes,
        cache_bytes=known if shape.causal else 0,
    )


def block_scores(shape: CallShape, query_tile: int, block_size: int, columns: int, copies: int) -> int:
    """Bytes of a scoring: for one query tile at a time ``copies`` of its rows of all heads over ``columns``
    scores, and the table of every tile's blocks from which the choice is made."""
    rows = min(query_tile, shape.num_rows) * shape.num_heads
    tiles = -(-shape.num_rows // query_tile) + 1
    table = shape.num_kv_heads * tiles * (shape.num_keys // block_size)
    return rows * columns * copies * _FP32 + table * _CHOICE


def most_keys(budget: Forms[int] | None) -> int | None:
    """The largest budget of any layer and head; None: as many keys as there are."""
    return None if budget is None else largest(budget)


def one_after_another(*parts: Workspace) -> Workspace:
    """Parts that run in turn on one accumulator; what each of them keeps stays."""
    return Workspace(
        max(part.live_bytes for part in parts),
        sum(part.kept_bytes for part in parts),
        min(sum(part.shared_bytes for part in parts), MASKS.max_bytes),
        sum(part.cache_bytes for part in parts),
    )


def selection_bytes(calls: Sequence[Workspace]) -> int:
    """Bytes that the caches keep of one forward's attention calls."""
    drawn = sum(call.kept_bytes for call in calls)
    return min(drawn, DRAWS.max_bytes) + max(call.shared_bytes for call in calls)


def _accumulator(shape: CallShape) -> int:
    """Output and log-sum-exp in fp32, and the rows and the answer once more where they are narrower."""
    rows = shape.num_rows * shape.num_heads
    narrow = shape.key_dim * _FP32 + shape.value_dim * shape.itemsize if shape.itemsize < _FP32 else 0
    return rows * ((shape.value_dim + 1) * max(_FP32, shape.itemsize) + narrow)


def _scores(shape: CallShape, rows: int, width: int) -> int:
    """Scores, their masked copy and their weights, where no flash kernel runs."""
    if shape.on_cpu and shape.key_dim == shape.value_dim:
        return 0
    return 3 * rows * shape.num_heads * min(width, KEY_CHUNK) * _FP32


def _own_parts(shape: CallShape, block_size: int) -> int:
    """Outputs at once: grouped heads are put together from several calls, or are copies of the rows, and a
    bidirectional row also sees the last keys that are no whole block."""
    grouped = 1 < shape.num_kv_heads < shape.num_heads and shape.num_rows > 1
    return 1 + grouped + (not shape.causal and shape.num_keys % block_size > 0)


def _listed(shape: CallShape, query_tile: int, longest: int) -> int:
    """``kernels.math.block_sparse`` over lists of up to ``longest`` keys: a batch of gathered panels, or
    slices of the keys, with the rows that attend to them and what they give."""
    tiles = -(-shape.num_rows // query_tile)
    tile = min(query_tile, shape.num_rows)
    rows = tile * (shape.num_heads // shape.num_kv_heads)
    key = shape.key_dim + shape.value_dim
    row = key + 1
    at_once = max(1, PANEL_BYTES // max(1, longest * key * _FP32))
    lists = min(at_once, shape.num_kv_heads * tiles)
    copies = 1 if shape.itemsize >= _FP32 else 2
    gathered = lists * (longest * key * copies + rows * row) * _FP32
    viewed = min(max(VIEW_ROWS, rows), shape.num_rows * shape.num_heads) * row * _FP32
    masks_and_scores = _scores(shape, tile, longest) * lists // max(1, shape.num_kv_heads)
    return max(gathered, viewed + _widened_keys(shape, longest)) + masks_and_scores


def _left_out(shape: CallShape, query_tile: int, block_size: int, gated: bool) -> int:
    """``kernels.math.remainder``: which blocks are left out, and of one tile at a time the means' outputs;
    where a gate is fitted, before that the chosen blocks' and its differences."""
    num_blocks = shape.num_keys // block_size
    tiles = -(-shape.num_rows // query_tile) + 1
    rows = min(query_tile, shape.num_rows) * shape.num_heads
    scores = _scores(shape, min(query_tile, shape.num_rows), num_blocks)
    outputs = (6 if gated else 3) * shape.value_dim + 4
    return shape.num_heads * tiles * num_blocks * 2 + rows * outputs * _FP32 + scores


def _summaries(shape: CallShape, block_size: int) -> int:
    """``kernels.math.summaries``: two bounds and two means of every whole block."""
    return shape.num_keys // block_size * shape.num_kv_heads * (3 * shape.key_dim + shape.value_dim) * _FP32


def _widened_keys(shape: CallShape, width: int) -> int:
    if shape.itemsize >= _FP32:
        return 0
    return width * shape.num_kv_heads * (shape.key_dim + shape.value_dim) * _FP32


def _edges(shape: CallShape, num_random: int) -> Workspace:
    """Drawn keys of every head are kept, up to the cache's limit. A tile that is too large for it lives as
    long as it is used; so do one that is built while the cache is full, and what was joined from several."""
    per_row = num_random + 1
    tile_rows = min(shape.num_rows, EDGE_ROWS)
    tile = tile_rows * shape.num_heads * per_row * _EDGE_LIST
    drawn = shape.num_rows * shape.num_heads * per_row * _EDGE_LIST
    drawing = min(DRAWS_AT_ONCE, tile_rows * shape.num_heads * per_row) * _DRAWING
    scores = tile_rows * (per_row * _EDGE_SCORES + (shape.value_dim + 1) * _FP32)
    if not shape.on_cpu:
        gathered = min(256, tile_rows) * per_row * (shape.key_dim + shape.value_dim) * _FP32
        scores = tile_rows * (shape.value_dim + 1) * _FP32 + gathered
    copied = 0
    if not shape.causal or shape.itemsize < _FP32:  # keys of a packed stream are not dense head by head
        copied = shape.num_keys * shape.num_kv_heads * (shape.key_dim + shape.value_dim) * _FP32
    kept = drawn if shape.causal or tile <= DRAWS.max_bytes else 0
    beside = tile if tile > kept or drawn > tile or (shape.causal and tile_rows > TILE_ROWS) else 0
    return Workspace(_accumulator(shape) + max(scores, drawing) + copied + beside, kept)


def _blocks(shape: CallShape, num_random: int, L: int, base_edges: int) -> Workspace:
    group = shape.num_heads // shape.num_kv_heads
    num_draws, num_blocks = num_random // L, -(-shape.num_keys // L)
    query_blocks = -(-shape.num_rows // L) + 1
    one_row = L * (shape.key_dim + shape.value_dim) * _FP32
    panel_blocks = max(num_draws, min(query_blocks * num_draws, PANEL_BYTES // (L * shape.key_dim * _FP32)))
    batch_rows = min(shape.num_rows, -(-panel_blocks // num_draws) * L)
    parts = 2 * batch_rows * group * (shape.value_dim + 1) * _FP32
    head_copy = num_blocks * one_row  # padded to whole blocks, and dense
    scores = 0
    if not shape.on_cpu or shape.key_dim != shape.value_dim:
        scores = 3 * batch_rows * group * min(num_random, KEY_CHUNK) * _FP32
    masks = _expected_cut_blocks(shape, num_draws, num_blocks, L, base_edges) * L * L * _FP32
    lists = query_blocks * num_draws * 8
    kept = shape.num_kv_heads * (masks + lists)
    return Workspace(
        _accumulator(shape) + panel_blocks * one_row + parts + head_copy + scores + 2 * masks, kept
    )


def _expected_cut_blocks(shape: CallShape, num_draws: int, num_blocks: int, L: int, base_edges: int) -> int:
    """Drawn blocks, of all query blocks of one key head, that need a mask: each of a query block's
    ``base_edges`` blocks is drawn with the chance of num_draws in the blocks it may draw from."""
    if not shape.causal:
        last_is_cut = shape.num_keys % L > 0
        chance = min(1.0, num_draws / num_blocks)
        return math.ceil(num_blocks * (base_edges + last_is_cut) * chance)
    first = (shape.num_keys - shape.num_rows) // L
    expected = sum(
        min(num_draws, base_edges) * min(1.0, num_draws / max(block, 1)) for block in range(first, num_blocks)
    )
    return math.ceil(expected)
