"""The star: a thin ring and one relay token that everybody sees.

    bidirectional:  relay r = M - 1 sees and is seen by all; the others form a ring of M - 1 tokens and keep
                    {j : ring distance min(|i - j|, (M - 1) - |i - j|) <= window} and r
    causal:         A_i = {j : i - window < j <= i} and the relay 0

Guo et al., "Star-Transformer" (arXiv 1902.09113); Yun et al., "O(n) connections are expressive enough"
(arXiv 2006.04862), pattern STAR. In a causal model the last token moves with every generated token, so the
first is the relay there. Cost O(N window) time, O(N) memory. Accumulates in fp32, returns q's dtype.

When not to use it: where tokens must exchange much over long distances: every long path goes through one
token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field
from torch import Tensor

from kernels.contract import (
    AttentionResult,
    Backend,
    Call,
    CallShape,
    Capabilities,
    PackedResult,
    Params,
    Segment,
    Workspace,
)
from kernels.math.decode_rows import decode_spans
from kernels.math.flops import attention_flops, window_pairs
from kernels.math.masked import masked_attention, positions
from kernels.math.spans import Ints, Span, SpanPattern, prefill_spans, span_attention
from kernels.math.window import tile_height, window_keep, window_pattern
from kernels.math.workspace import windows

_WRAP_TILE = 256
"""Rows per tile of what wraps around the ring, and of the relay."""


class StarParams(Params):
    window: int = Field(
        default=2,
        ge=1,
        le=65536,
        description="Keys on each side along the ring; look-back including the row itself when causal.",
    )


def reference(q: Tensor, k: Tensor, v: Tensor, params: StarParams, call: Call) -> AttentionResult:
    i, j = positions(q, k, call)
    if call.causal:
        keep = window_keep(i, j, params.window, 1, 0, True)
    else:
        relay = k.shape[2] - 1
        apart = (i - j).abs()
        ring = (apart <= params.window) | (relay - apart <= params.window)
        keep = ring | (j == relay) | (i == relay)
    return masked_attention(q, k, v, keep, call)


def attend(q: Tensor, k: Tensor, v: Tensor, params: StarParams, call: Call) -> AttentionResult:
    return span_attention(q, k, v, _pattern(params, k.shape[2], call), call)


def prefill(q: Tensor, segments: Sequence[Segment], params: StarParams, call: Call) -> PackedResult:
    return prefill_spans(q, segments, lambda segment: _pattern(params, segment.k.shape[2], call), call)


def decode(q: Tensor, segments: Sequence[Segment], params: StarParams, call: Call) -> PackedResult:
    return decode_spans(q, segments, window_pattern(params.window, 1, 0, True), call)


def _pattern(params: StarParams, num_keys: int, call: Call) -> SpanPattern:
    if call.causal:
        return window_pattern(params.window, 1, 0, True)
    return _ring_pattern(params.window, relay=num_keys - 1)


def _ring_pattern(window: int, relay: int) -> SpanPattern:
    return SpanPattern(
        key=("star", window),
        spans=lambda rows, num_keys: _ring_spans(rows, relay, window),
        tile=lambda group: tile_height(2 * window, group),
        cuts=(relay,),
    )


def _ring_spans(rows: Ints, relay: int, window: int) -> list[Span]:
    """The band; what wraps past the ring's end, with the relay; what wraps past its beginning."""
    is_relay = rows == relay
    lo = np.where(is_relay, 0, np.maximum(rows - window, 0))
    hi = np.where(is_relay, relay + 1, np.minimum(rows + window + 1, relay))
    behind = np.maximum(rows - window + relay, hi)
    ahead = np.minimum(rows + window - relay + 1, lo)
    zero = np.zeros_like(rows)
    return [
        Span(lo, hi),
        Span(
            np.where(is_relay, relay + 1, np.minimum(behind, relay)),
            np.full_like(rows, relay + 1),
            tile=_WRAP_TILE,
        ),
        Span(zero, np.where(is_relay, 0, ahead), tile=_WRAP_TILE),
    ]


def workspace(params: StarParams, shape: CallShape) -> Workspace:
    return windows(shape, params.window, 1)


def flops(params: StarParams, shape: CallShape) -> float:
    """Bidirectional: the band and the relay; tiles at both ends also see what wraps around the ring."""
    if shape.causal:
        return attention_flops(shape, window_pairs(shape, params.window, 1))
    M, w = shape.num_keys, params.window
    beyond = max(0, M - w)
    wrapped = 2 * min(_WRAP_TILE, M) * min(w, beyond)
    return attention_flops(shape, window_pairs(shape, w) + (beyond + M + wrapped) * shape.num_rows / M)


BACKEND = Backend(
    name="star",
    summary="A thin ring of neighbours and one relay token that sees and is seen by all.",
    paper="Guo et al., Star-Transformer (arXiv 1902.09113); Yun et al. (arXiv 2006.04862)",
    params=StarParams,
    capabilities=Capabilities(
        causal=True,
        bidirectional=True,
        decode=True,
        exact=False,
        selection="none",
        complexity="O(N window)",
        exponent=1.0,
    ),
    impls={"reference": reference, "torch": attend, "triton": attend},
    workspace=workspace,
    flops=flops,
    decode=decode,
    prefill=prefill,
    conditions=(
        "Bidirectional, it meets Yun et al.'s three conditions with s = 2 (every token within two layers, "
        "through the relay), so O(N) pairs suffice for their approximation theorem, given enough layers. In "
        "a causal model a token is reached by earlier ones only, the paper's s is infinite and its theorem "
        "does not apply."
    ),
)
