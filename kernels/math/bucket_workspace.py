"""Memory of a call that looks into buckets, counted before it runs (see ``kernels.math.workspace``).

live = output + the largest of: the base, coding keys and rows, one head's panels on each thread, the probe
"""

from __future__ import annotations

import torch

from kernels.contract import CallShape, Workspace
from kernels.math.bucket_plan import PANEL_ELEMENTS, panel_rows
from kernels.math.buckets import Reach
from kernels.math.hashing import HASHED_AT_ONCE
from kernels.math.probe_rows import ROWS_AT_ONCE, SCORES_AT_ONCE, probed_rows
from kernels.math.workspace import windows

_FP32, _FP64, _INT64, _CODE = 4, 8, 8, 2
_ORDERS = 5
"""int64 numbers of a key in one order, of a row in one round."""


def bucket_workspace(
    shape: CallShape, reach: Reach, *, tables: int, rounds: int, columns: int, basis: int, drawn: int = 0
) -> Workspace:
    """``tables`` orders of the keys, ``rounds`` that look into them, ``columns`` numbers that a code is
    chosen from, ``basis`` vectors of a head by which keys are coded (fp64, kept), ``drawn`` bytes of random
    directions (kept for all calls of the layer)."""
    base = windows(shape, reach.window, reach.sinks)
    accumulated = _accumulated(shape)
    key_codes = shape.num_kv_heads * tables * shape.num_keys * _CODE
    row_codes = shape.num_heads * rounds * shape.num_rows * _CODE
    held = row_codes + (0 if shape.causal else key_codes)
    coding = held + _coding(shape, columns)
    panels = (
        held + _panels(shape, reach, tables, rounds)
        if shape.num_rows > 1
        else held + _row(shape, reach, rounds)
    )
    live = max(base.live_bytes, accumulated + max(coding, panels, _probe(shape)))
    kept = key_codes + shape.num_kv_heads * basis * shape.key_dim * _FP64 if shape.causal else 0
    return Workspace(live, drawn, base.shared_bytes, kept)


def _accumulated(shape: CallShape) -> int:
    """Output and log-sum-exp, and of narrow inputs the rows and the answer once more."""
    narrow = shape.key_dim * _FP32 + shape.value_dim * shape.itemsize if shape.itemsize < _FP32 else 0
    return shape.num_rows * shape.num_heads * ((shape.value_dim + 1) * max(_FP32, shape.itemsize) + narrow)


def _at_once(shape: CallShape) -> int:
    """Key heads side by side."""
    return min(torch.get_num_threads(), shape.num_kv_heads) if shape.on_cpu else 1


def _coding(shape: CallShape, columns: int) -> int:
    """fp64 vectors, without their centre too, and what they are multiplied to: twice, and where they are
    largest. Bidirectional keys of a head are widened as a whole for their mean."""
    vectors = max(shape.num_keys, shape.num_rows * shape.num_heads // shape.num_kv_heads)
    some = min(vectors, HASHED_AT_ONCE) * (2 * shape.key_dim + 2 * columns) * _FP64
    mean = 0 if shape.causal else shape.num_keys * shape.key_dim * _FP64
    return _at_once(shape) * max(some, mean)


def _panels(shape: CallShape, reach: Reach, tables: int, rounds: int) -> int:
    rows = shape.num_rows * shape.num_heads // shape.num_kv_heads
    height = panel_rows(reach.cluster_size)
    width = min(reach.cluster_size + height, -(-shape.num_keys // 32) * 32)
    panels = max(1, min(PANEL_ELEMENTS // (height * width), -(-max(rows, shape.num_keys) // height)))
    scores = panels * height * width * (2 * _FP32 + _CODE)
    gathered = panels * (
        width * (shape.key_dim + shape.value_dim) + height * (shape.key_dim + shape.value_dim)
    )
    places = (
        panels * (width + 2 * height) * _INT64 + _ORDERS * (tables * shape.num_keys + rounds * rows) * _INT64
    )
    part = rows * (shape.key_dim + shape.value_dim + 1) * _FP32
    copies = 0 if shape.itemsize >= _FP32 else shape.num_keys * (shape.key_dim + shape.value_dim) * _FP32
    return _at_once(shape) * (scores + gathered * _FP32 + places + part + copies)


def _row(shape: CallShape, reach: Reach, rounds: int) -> int:
    """A single row's keys, gathered for every query head."""
    found = min(shape.num_keys, rounds * reach.cluster_size)
    return shape.num_heads * found * ((shape.key_dim + shape.value_dim) * _FP32 + 2 * _INT64)


def _probe(shape: CallShape) -> int:
    """Scores of the probed rows and what is summed of them."""
    start = shape.num_keys - shape.num_rows
    rows = min(len(probed_rows(start, shape.num_rows)), ROWS_AT_ONCE) * shape.num_heads
    if not rows:
        return 0
    keys = min(shape.num_keys, max(256, SCORES_AT_ONCE // rows))
    narrow = 0 if shape.itemsize >= _FP32 else keys * shape.num_kv_heads * shape.key_dim * _FP32
    return 2 * rows * keys * _FP32 + narrow
