"""Sliding-window attention with optional global tokens.

    causal:         A_i = {j : i - window < j <= i}  or j < global_tokens
    bidirectional:  A_i = {j : |i - j| <= window}    or j < global_tokens; rows i < global_tokens see all

Beltagy et al., "Longformer: the long-document transformer" (arXiv 2004.05150), section 3.1. Cost
O(N (window + global_tokens)) time, O(N) memory. Accumulates in fp32, returns q's dtype.

When not to use it: where an answer needs tokens farther back than window x layers, or the model was trained
without a window and leans on its first tokens (take sinks, or a few global tokens).
"""

from __future__ import annotations

from collections.abc import Sequence

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
from kernels.math.spans import SpanPattern, prefill_spans, span_attention
from kernels.math.window import window_keep, window_pattern
from kernels.math.workspace import windows


class WindowParams(Params):
    window: int = Field(
        default=512,
        ge=1,
        le=65536,
        description="Keys on each side; look-back including the row itself when causal.",
    )
    global_tokens: int = Field(
        default=0,
        ge=0,
        le=4096,
        description="First tokens that every row sees; bidirectional: they see every key too.",
    )


def reference(q: Tensor, k: Tensor, v: Tensor, params: WindowParams, call: Call) -> AttentionResult:
    i, j = positions(q, k, call)
    full_rows = 0 if call.causal else params.global_tokens
    keep = window_keep(i, j, params.window, params.global_tokens, full_rows, call.causal)
    return masked_attention(q, k, v, keep, call)


def attend(q: Tensor, k: Tensor, v: Tensor, params: WindowParams, call: Call) -> AttentionResult:
    return span_attention(q, k, v, _pattern(params, call), call)


def prefill(q: Tensor, segments: Sequence[Segment], params: WindowParams, call: Call) -> PackedResult:
    pattern = _pattern(params, call)
    return prefill_spans(q, segments, lambda segment: pattern, call)


def _pattern(params: WindowParams, call: Call) -> SpanPattern:
    full_rows = 0 if call.causal else params.global_tokens
    return window_pattern(params.window, params.global_tokens, full_rows, call.causal)


def decode(q: Tensor, segments: Sequence[Segment], params: WindowParams, call: Call) -> PackedResult:
    return decode_spans(q, segments, window_pattern(params.window, params.global_tokens, 0, True), call)


def workspace(params: WindowParams, shape: CallShape) -> Workspace:
    return windows(shape, params.window, params.global_tokens)


def flops(params: WindowParams, shape: CallShape) -> float:
    full_rows = 0 if shape.causal else params.global_tokens
    return attention_flops(shape, window_pairs(shape, params.window, params.global_tokens, full_rows))


BACKEND = Backend(
    name="window",
    summary="Each token sees its neighbours, and optionally a few global tokens (Longformer).",
    paper="Beltagy et al., Longformer (arXiv 2004.05150)",
    params=WindowParams,
    capabilities=Capabilities(
        causal=True,
        bidirectional=True,
        decode=True,
        exact=False,
        selection="none",
        complexity="O(N (window + global_tokens))",
        exponent=1.0,
    ),
    impls={"reference": reference, "torch": attend, "triton": attend},
    workspace=workspace,
    flops=flops,
    decode=decode,
    prefill=prefill,
    conditions=(
        "Bidirectional, it meets Yun et al.'s three conditions (arXiv 2006.04862): self loops, a Hamiltonian "
        "path, and every token reached within (N - 1) / window layers, or within 2 with a global token. In a "
        "causal model a token is reached by earlier ones only, the paper's s is infinite and its theorem "
        "does not apply."
    ),
)
