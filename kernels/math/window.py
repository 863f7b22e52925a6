"""Sliding windows with global tokens, as a predicate and as spans (shared by window, sinks and bigbird).

causal:         i - window < j <= i,   or j < global_tokens
bidirectional:  |i - j| <= window,     or j < global_tokens,   or i < global_tokens (where those rows see all)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from kernels.math.spans import Ints, Span, SpanPattern

_WIDE = 1536
_COLUMNS_TILE = 256


def window_keep(i: Tensor, j: Tensor, window: int, columns: int, full_rows: int, causal: bool) -> Tensor:
    """The pairs (broadcast of i and j) of a window, the first ``columns`` keys and the first ``full_rows``
    rows.

    A causal pattern's j <= i is included.
    """
    near = (j <= i) & (j > i - window) if causal else (i - j).abs() <= window
    keep = near | (j < columns) | (i < full_rows)
    return keep & (j <= i) if causal else keep


def window_spans(
    rows: Ints, num_keys: int, window: int, columns: int, full_rows: int, causal: bool
) -> Sequence[Span]:
    """The same pairs as disjoint spans: the window, the columns before it, and (bidirectional) those after
    it.
    """
    behind, ahead = (window - 1, 0) if causal else (window, window)
    lo = np.maximum(rows - behind, 0)
    hi = np.minimum(rows + ahead + 1, num_keys)
    everything = rows < full_rows
    lo = np.where(everything, 0, lo)
    hi = np.where(everything, rows + 1 if causal else num_keys, hi)
    spans = [Span(lo, hi), Span(np.zeros_like(lo), np.minimum(lo, columns), tile=_COLUMNS_TILE)]
    if causal:
        return spans
    return [*spans, Span(hi, np.full_like(hi, min(columns, num_keys)), tile=_COLUMNS_TILE)]


def window_pattern(window: int, columns: int, full_rows: int, causal: bool) -> SpanPattern:
    """Ready to plan. Its key names the computation, so backends that share it share its plans."""
    width = window if causal else 2 * window
    return SpanPattern(
        key=("window", window, columns, full_rows),
        spans=lambda rows, num_keys: window_spans(rows, num_keys, window, columns, full_rows, causal),
        tile=lambda group: tile_height(width, group),
        cuts=(full_rows,),
    )


def tile_height(width: int, group: int = 1) -> int:
    """Rows per query tile for spans of that many keys, where ``group`` query heads share them.

    Narrow spans: as low as torch's kernel works well, 32 rows, or 192 over the heads of a large group.
    Wide ones: tiles that are worth splitting into a middle without mask and its edges.
    """
    if width >= 2 * _WIDE:
        return 768
    if width >= _WIDE:
        return {1: 192, 2: 96, 3: 96}.get(group, max(96, -(-768 // (16 * group)) * 16))
    return 32 if group < 4 else max(32, -(-192 // (16 * group)) * 16)
