"""Attention sinks with a sliding window: the visibility rule of StreamingLLM.

    causal:         A_i = {j : i - window < j <= i}  or j < sinks
    bidirectional:  A_i = {j : |i - j| <= window}    or j < sinks

Xiao et al., "Efficient streaming language models with attention sinks" (arXiv 2309.17453), section 3.
Positions are NOT re-indexed: the paper rotates keys by their place in the cache, here every token keeps its
own position, so lengths beyond what the model was trained for are not extended. Cost O(N (window + sinks))
time, O(N) memory. Accumulates in fp32, returns q's dtype.

When not to use it: where an answer needs text farther back than the window; the sinks keep a model fluent,
they carry no content.
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
from kernels.math.spans import prefill_spans, span_attention
from kernels.math.window import window_keep, window_pattern
from kernels.math.workspace import windows


class SinksParams(Params):
    sinks: int = Field(default=4, ge=0, le=4096, description="First tokens that every row sees.")
    window: int = Field(
        default=512,
        ge=1,
        le=65536,
        description="Keys on each side; look-back including the row itself when causal.",
    )


def reference(q: Tensor, k: Tensor, v: Tensor, params: SinksParams, call: Call) -> AttentionResult:
    i, j = positions(q, k, call)
    keep = window_keep(i, j, params.window, params.sinks, 0, call.causal)
    return masked_attention(q, k, v, keep, call)


def attend(q: Tensor, k: Tensor, v: Tensor, params: SinksParams, call: Call) -> AttentionResult:
    return span_attention(q, k, v, window_pattern(params.window, params.sinks, 0, call.causal), call)


def prefill(q: Tensor, segments: Sequence[Segment], params: SinksParams, call: Call) -> PackedResult:
    pattern = window_pattern(params.window, params.sinks, 0, call.causal)
    return prefill_spans(q, segments, lambda segment: pattern, call)


def decode(q: Tensor, segments: Sequence[Segment], params: SinksParams, call: Call) -> PackedResult:
    return decode_spans(q, segments, window_pattern(params.window, params.sinks, 0, True), call)


def workspace(params: SinksParams, shape: CallShape) -> Workspace:
    return windows(shape, params.window, params.sinks)


def flops(params: SinksParams, shape: CallShape) -> float:
    return attention_flops(shape, window_pairs(shape, params.window, params.sinks))


BACKEND = Backend(
    name="sinks",
    summary="A sliding window, and the first few tokens that models use as attention sinks (StreamingLLM).",
    paper="Xiao et al., StreamingLLM (arXiv 2309.17453)",
    params=SinksParams,
    capabilities=Capabilities(
        causal=True,
        bidirectional=True,
        decode=True,
        exact=False,
        selection="none",
        complexity="O(N (window + sinks))",
        exponent=1.0,
    ),
    impls={"reference": reference, "torch": attend, "triton": attend},
    workspace=workspace,
    flops=flops,
    decode=decode,
    prefill=prefill,
    conditions=(
        "Visibility only: positions are not re-indexed. Bidirectional, it meets Yun et al.'s three "
        "conditions (arXiv 2006.04862), with as many layers as a window needs to cross the text: sinks are "
        "seen by all but see only their window. In a causal model a token is reached by earlier ones only, "
        "the paper's s is infinite and its theorem does not apply."
    ),
)
