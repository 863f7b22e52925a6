"""Fixed attention: the own block, and the last token of every block as its summary.

    A^0_i = {j : j // stride = i // stride}
    A^1_i = {i} and {j : j mod stride = stride - 1}            (causal: j <= i in both)

Child et al., "Generating long sequences with sparse transformers" (arXiv 1904.10509), section 4.3 with c = 1,
in the form of Yun et al. (arXiv 2006.04862), pattern FIXED(w) with w = stride; ``combine`` says how the two
share layers and heads. Cost O(N stride + N^2 / stride) time, O(N) memory: stride near sqrt(N) is cheapest.
Blocks are views, summary tokens are collected once per call. Accumulates in fp32, returns q's dtype.

When not to use it: with a model that was not trained so: the summary tokens are ordinary tokens to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

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
from kernels.math.accumulate import Accumulator, accumulator, result
from kernels.math.combine import Combine, add_combined, combined_keep
from kernels.math.decode_rows import decode_spans
from kernels.math.flops import attention_flops, begins, own_pairs, stairs
from kernels.math.masked import masked_attention, positions
from kernels.math.spans import (
    Ints,
    Span,
    SpanPattern,
    add_spans,
    plan_for,
    prefill_spans,
    span_attention,
)
from kernels.math.workspace import one_after_another, spans

Spans = Callable[[Ints, int, int, bool], tuple[Span, Span]]
_SUMMARY_TILE = 1024


class FixedParams(Params):
    stride: int = Field(
        default=128, ge=2, le=4096, description="Tokens per block; the last of each is its summary."
    )
    combine: Combine = Field(
        default="union", description="Both patterns everywhere, by turns over heads, or by turns over layers."
    )


def reference(q: Tensor, k: Tensor, v: Tensor, params: FixedParams, call: Call) -> AttentionResult:
    i, j = positions(q, k, call)
    w = params.stride
    patterns = [i // w == j // w, (j == i) | (j % w == w - 1)]
    keep = combined_keep(patterns, params.combine, q.shape[1], call.layer)
    return masked_attention(q, k, v, keep, call)


def attend(q: Tensor, k: Tensor, v: Tensor, params: FixedParams, call: Call) -> AttentionResult:
    if call.impl == "triton" and params.combine != "multihead":
        return span_attention(q, k, v, _one_pattern(params, call), call)
    began = perf_counter()
    acc = accumulator(q, k, v, call)
    w = params.stride
    add_combined(
        acc,
        params.combine,
        union=lambda part: _add(part, w, _union_spans),
        patterns=[lambda part: _add(part, w, _block_spans), lambda part: _add(part, w, _summary_spans)],
    )
    return result(acc, q, began)


def decode(q: Tensor, segments: Sequence[Segment], params: FixedParams, call: Call) -> PackedResult | None:
    """Where heads keep different patterns, each row has a call of its own."""
    if params.combine == "multihead":
        return None
    return decode_spans(q, segments, _one_pattern(params, call), call)


def prefill(q: Tensor, segments: Sequence[Segment], params: FixedParams, call: Call) -> PackedResult | None:
    """As decode."""
    if params.combine == "multihead":
        return None
    pattern = _one_pattern(params, call)
    return prefill_spans(q, segments, lambda segment: pattern, call)


def _one_pattern(params: FixedParams, call: Call) -> SpanPattern:
    """Blocks and summaries together, of all heads."""
    in_turn = params.combine == "sequential"
    spans = (_block_spans, _summary_spans)[call.layer % 2] if in_turn else _union_spans
    return _pattern(params.stride, call.causal, spans, (0, 1), _SUMMARY_TILE)


def _add(acc: Accumulator, w: int, spans: Spans) -> None:
    """Blocks and summaries are planned apart, each in tiles that suit it; a single row has one plan, and
    a kernel takes both at once."""
    causal = acc.call.causal
    if acc.q.shape[-2] == 1 or acc.call.impl == "triton":
        add_spans(acc, plan_for(acc, _pattern(w, causal, spans, (0, 1), _SUMMARY_TILE)))
        return
    for part, tile in ((0, _block_tile(w)), (1, _SUMMARY_TILE)):
        add_spans(acc, plan_for(acc, _pattern(w, causal, spans, (part,), tile)))


def _pattern(w: int, causal: bool, spans: Spans, parts: tuple[int, ...], tile: int) -> SpanPattern:
    def chosen(rows: Ints, num_keys: int) -> list[Span]:
        both = spans(rows, num_keys, w, causal)
        return [both[part] for part in parts]

    return SpanPattern(("fixed", spans.__name__, parts, w), chosen, tile)


def _block_tile(w: int) -> int:
    """Whole blocks per tile, so that its rows agree on their block's bounds as far as possible."""
    return w * max(1, 128 // w) if w <= 512 else 256


def _block_spans(rows: Ints, num_keys: int, w: int, causal: bool) -> tuple[Span, Span]:
    """Own block; no summaries."""
    first, zero = rows // w * w, np.zeros_like(rows)
    return Span(first, rows + 1 if causal else np.minimum(first + w, num_keys)), Span(zero, zero)


def _summary_spans(rows: Ints, num_keys: int, w: int, causal: bool) -> tuple[Span, Span]:
    """Itself where it is no summary; the summaries."""
    is_summary = rows % w == w - 1
    count = (rows + 1) // w if causal else np.full_like(rows, num_keys // w)
    itself = Span(rows, np.where(is_summary, rows, rows + 1))
    return itself, Span(np.zeros_like(rows), count, first=w - 1, step=w)


def _union_spans(rows: Ints, num_keys: int, w: int, causal: bool) -> tuple[Span, Span]:
    """Causal: the block and the earlier summaries. Else: the block without its summary, and all summaries."""
    first = rows // w * w
    hi = rows + 1 if causal else np.minimum(first + w - 1, num_keys)
    count = rows // w if causal else np.full_like(rows, num_keys // w)
    return Span(first, hi), Span(np.zeros_like(rows), count, first=w - 1, step=w)


def workspace(params: FixedParams, shape: CallShape) -> Workspace:
    """Blocks, then summaries: every tile of summaries has a mask of its own."""
    block_tile, num_summaries = _block_tile(params.stride), -(-shape.num_keys // params.stride)
    return one_after_another(
        spans(shape, block_tile, max(block_tile, params.stride), num_masks=4),
        spans(shape, _SUMMARY_TILE, num_summaries, num_masks=-(-shape.num_rows // _SUMMARY_TILE) + 1),
    )


def flops(params: FixedParams, shape: CallShape) -> float:
    """Heads that take turns are counted by head, layers that do as their mean."""
    w = params.stride
    block, summaries = _block_pairs(w, shape), _summary_pairs(w, shape)
    if params.combine == "union":
        return attention_flops(shape, block + summaries)
    share = 0.5 if params.combine == "sequential" else (shape.num_heads // 2) / shape.num_heads
    itself = 1.0 if shape.num_rows == 1 else own_pairs(shape, _block_tile(w), 1)
    return attention_flops(shape, (1.0 - share) * block + share * (itself + summaries))


def _block_pairs(w: int, shape: CallShape) -> float:
    """Tiles of whole blocks over their keys; blocks beyond 512 in tiles of 256 rows over the block so far."""
    start, tile = shape.num_keys - shape.num_rows, _block_tile(w)
    if shape.num_rows == 1 and shape.causal:
        return _last_block(w, shape)
    if w <= tile:
        return max(own_pairs(shape, tile, 1), _last_block(w, shape))
    if not shape.causal:  # tiles that a border cuts see both blocks
        return own_pairs(shape, w, 1) + (shape.num_keys - 1) // w * tile * w
    back = min(tile, shape.num_rows) // 2
    blocks = begins(max(start - back, 0), max(shape.num_keys - back, 0), w)
    return max(float(stairs(start, shape.num_keys, tile) - blocks), _last_block(w, shape))


def _last_block(w: int, shape: CallShape) -> float:
    return float((shape.num_keys - 1) % w + 1)


def _summary_pairs(w: int, shape: CallShape) -> float:
    N, M = shape.num_rows, shape.num_keys
    if not shape.causal:
        return float(N * (M // w))
    if N == 1:
        return float(M // w)
    last = 1.0 if _SUMMARY_TILE % w == 0 else 0.5
    return max(stairs(M - N, M, _SUMMARY_TILE) / w - last * N, float((M - 1) // w))


BACKEND = Backend(
    name="fixed",
    summary="The own block, and the last token of every block as its summary (sparse transformers).",
    paper="Child et al., Sparse Transformers (arXiv 1904.10509); Yun et al. (arXiv 2006.04862)",
    params=FixedParams,
    capabilities=Capabilities(
        causal=True,
        bidirectional=True,
        decode=True,
        exact=False,
        selection="none",
        complexity="O(N stride + N^2 / stride)",
        exponent=2.0,
    ),
    impls={"reference": reference, "torch": attend, "triton": attend},
    workspace=workspace,
    flops=flops,
    decode=decode,
    prefill=prefill,
    conditions=(
        "Bidirectional, and where stride divides N, it meets Yun et al.'s three conditions under every "
        "combine mode, with every token reached within 2 layers (3 where a model's first layer has the "
        "summaries); tokens of a last, incomplete block are seen by that block alone. In a causal model a "
        "token is reached by earlier ones only, the paper's s is infinite and its theorem does not apply."
    ),
)
