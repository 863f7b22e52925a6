"""Scatterbrain over a window and the first columns: both halves in linear time.

    S_i       causal:         i - window < j <= i   or j < columns;   rows i < full_rows: all they may see
              bidirectional:  |i - j| <= window     or j < columns;   rows i < full_rows: all
    outside   causal:         columns <= j <= i - window
              bidirectional:  j >= columns and |i - j| > window

The exact half runs as spans, the other as linear attention whose sums begin at ``columns`` and end ``window``
behind the row. What they keep for decode is of constant size: the sum over keys that have left the window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from torch import Tensor

from kernels.contract import AttentionResult, Call
from kernels.math.accumulate import Accumulator, accumulator
from kernels.math.complement import (
    Features,
    Support,
    exact_rows,
    features_of,
    merge_complement,
    together,
)
from kernels.math.features import FeatureParams
from kernels.math.linear_attention import feature_flops, feature_part
from kernels.math.signed import Part
from kernels.math.spans import add_spans, plan_for
from kernels.math.window import window_pattern


@dataclass(frozen=True)
class Near:
    """A window (keys on each side; causal: look-back including the row itself), the first ``columns`` keys,
    and rows below ``full_rows``, which see all. A window of 0 keys, on either side: none, not even the
    row."""

    window: int
    columns: int
    full_rows: int = 0

    def shift(self, causal: bool) -> int:
        """How far from the row the complement begins."""
        return self.window if causal or not self.window else self.window + 1


NOTHING = Near(0, 0)


def near_of(support: Support, causal: bool) -> Near | None:
    """The support as a window, where it is one."""
    params = support.params
    if support.name == "sinks":
        return Near(params.window, params.sinks)  # type: ignore[attr-defined]
    if support.name == "window":
        globals_ = params.global_tokens  # type: ignore[attr-defined]
        return Near(params.window, globals_, 0 if causal else globals_)  # type: ignore[attr-defined]
    if support.name == "star" and causal:
        return Near(params.window, 1)  # type: ignore[attr-defined]
    return None


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, params: FeatureParams, call: Call, near: Near
) -> AttentionResult:
    """A whole call."""
    began = perf_counter()
    acc = accumulator(q, k, v, call)
    near = replace(near, full_rows=max(near.full_rows, exact_rows(params, call)))
    add_near(acc, near)
    features = features_of(acc, params)
    if not _reaches_beyond(acc, near):
        return together(acc, q, began, features, torch.zeros_like(acc.lse))
    dropped = _add_outside(acc, features, near)
    features.flops += len(q) * _flops(acc, features)
    return together(acc, q, began, features, dropped)


def add_near(acc: Accumulator, near: Near) -> None:
    """The exact half: every row of the accumulator is filled."""
    causal = acc.call.causal
    window = near.window if causal or near.window else -1
    add_spans(acc, plan_for(acc, window_pattern(window, near.columns, near.full_rows, causal)))


def _add_outside(acc: Accumulator, features: Features, near: Near) -> Tensor:
    """Join the other half to the rows; its share of each."""
    if acc.call.impl == "triton":
        from kernels._triton.signed_calls import merge_outside

        return merge_outside(acc, features, _beyond(acc, features, near), near.full_rows - acc.call.start)
    return merge_complement(acc.out, acc.lse, outside_near(acc, features, near))


def outside_near(acc: Accumulator, features: Features, near: Near) -> Part:
    """The other half, of all rows; nothing for those below ``full_rows``."""
    part = _beyond(acc, features, near)
    part.log_scale.add_(features.shift(acc.q))
    whole = slice(0, max(0, near.full_rows - acc.call.start))
    for tensor, void in ((part.numerator, 0.0), (part.denominator, 0.0), (part.log_scale, -math.inf)):
        tensor[:, :, :, whole] = void
    return part


def _beyond(acc: Accumulator, features: Features, near: Near) -> Part:
    """The features' sums alone, over centred keys."""
    return feature_part(
        acc.q,
        acc.k,
        acc.v,
        features.map,
        acc.call,
        first=near.columns,
        shift=near.shift(acc.call.causal),
        centre=features.centre,
    )


def _reaches_beyond(acc: Accumulator, near: Near) -> bool:
    """Whether the call's last row (bidirectional: some row) leaves a key out."""
    last = acc.call.start + acc.q.shape[-2] - 1
    if last < near.full_rows:
        return False
    if acc.call.causal:
        return last - near.window >= near.columns
    return acc.k.shape[2] > near.columns


def _flops(acc: Accumulator, features: Features) -> int:
    """Of one sequence. With kept sums a call adds as many keys as it has rows, where they follow each
    other."""
    (_, Hk, G, N, D), M, call = acc.q.shape, acc.k.shape[2], acc.call
    new_keys = N if call.causal and call.kept is not None else M
    sides = 1 if call.causal else 2
    dims = features.map.num_features, D, acc.v.shape[3]
    return sides * feature_flops(N, new_keys, Hk * G, Hk, dims, True)
