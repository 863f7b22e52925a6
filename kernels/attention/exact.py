"""Exact softmax attention: the standard that every other backend is measured against.

    out_i = sum_j softmax_j(scale * <q_i, k_j>) v_j        over all j (causal: j <= i)

Vaswani et al., "Attention is all you need" (arXiv 1706.03762), eq. 1. Cost O(N M) time, O(N) memory: torch's
flash kernel. A causal chunk of N < M rows is a rectangle over the earlier keys and a triangle over its own,
merged by log-sum-exp (torch's own causal flag aligns to the upper left). fp32 accumulation, q's dtype
returned.

When not to use it: when a document is long enough that attention dominates the time, and an error can be
afforded.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
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
from kernels.math.decode_rows import decode_runs
from kernels.math.flops import attention_flops, exact_pairs
from kernels.math.masked import masked_attention
from kernels.math.spans import (
    Ints,
    RowRuns,
    Span,
    SpanPattern,
    prefill_spans,
    span_attention,
)
from kernels.math.workspace import panels

_ONE_TILE = 1 << 40


class ExactParams(Params):
    """None: every pair is computed."""


def reference(q: Tensor, k: Tensor, v: Tensor, params: ExactParams, call: Call) -> AttentionResult:
    everything = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    dropped = torch.zeros(q.shape[:3], device=q.device)
    return masked_attention(q, k, v, everything, call, dropped=dropped)


def attend(q: Tensor, k: Tensor, v: Tensor, params: ExactParams, call: Call) -> AttentionResult:
    return span_attention(q, k, v, _pattern(call), call, nothing_dropped=True)


def _pattern(call: Call) -> SpanPattern:
    if not call.causal:
        return _ALL
    return _TRIANGLE if call.impl == "triton" else _CAUSAL


def prefill(q: Tensor, segments: Sequence[Segment], params: ExactParams, call: Call) -> PackedResult:
    pattern = _pattern(call)
    return prefill_spans(q, segments, lambda segment: pattern, call, nothing_dropped=True)


def decode(q: Tensor, segments: Sequence[Segment], params: ExactParams, call: Call) -> PackedResult:
    return decode_runs(q, segments, _every_key, call, nothing_dropped=True)


@lru_cache(4096)
def _every_key(position: int) -> RowRuns:
    return RowRuns((slice(0, position + 1, 1),), position + 1)


def _all_keys(rows: Ints, num_keys: int) -> list[Span]:
    return [Span(np.zeros_like(rows), np.full_like(rows, num_keys))]


def _earlier_keys(rows: Ints, num_keys: int) -> list[Span]:
    """The keys before the call's first row, seen by every row, and the triangle of the call's own."""
    first = np.full_like(rows, rows[0])
    return [Span(np.zeros_like(rows), first), Span(first, rows + 1)]


def _triangle(rows: Ints, num_keys: int) -> list[Span]:
    """The same pairs as one span, for a kernel that has no special triangle."""
    return [Span(np.zeros_like(rows), rows + 1)]


_ALL = SpanPattern(key="all", spans=_all_keys, tile=_ONE_TILE)
_CAUSAL = SpanPattern(key="all", spans=_earlier_keys, tile=_ONE_TILE)
_TRIANGLE = SpanPattern(key="triangle", spans=_triangle)


def workspace(params: ExactParams, shape: CallShape) -> Workspace:
    return panels(shape, shape.num_rows, shape.num_keys, parts=2 if shape.num_keys > shape.num_rows else 1)


def flops(params: ExactParams, shape: CallShape) -> float:
    return attention_flops(shape, exact_pairs(shape))


BACKEND = Backend(
    name="exact",
    summary="Softmax attention over every pair.",
    paper="Vaswani et al., Attention is all you need (arXiv 1706.03762)",
    params=ExactParams,
    capabilities=Capabilities(
        causal=True,
        bidirectional=True,
        decode=True,
        exact=True,
        selection="none",
        complexity="O(N^2)",
        exponent=2.0,
    ),
    impls={"reference": reference, "torch": attend, "triton": attend},
    workspace=workspace,
    flops=flops,
    decode=decode,
    prefill=prefill,
    conditions="Nothing is approximated.",
)
