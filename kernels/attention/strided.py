"""Strided attention: a local band and every stride-th token.

    A^0_i = {j : i - stride <= j <= i}  (causal),  {j : |i - j| <= stride // 2}  (bidirectional)
    A^1_i = {j : j = i mod stride}

Child et al., "Generating long sequences with sparse transformers" (arXiv 1904.10509), section 4.3, in the
form of Yun et al. (arXiv 2006.04862), pattern STRIDED(w) with w = stride; ``combine`` says how the two share
layers and heads. Cost O(N stride + N^2 / stride) time, O(N) memory: stride near sqrt(N) is cheapest. Residue
classes run as strided views. Accumulates in fp32, returns q's dtype.

When not to use it: on text, where what matters does not repeat at a fixed period (it was made for images and
audio).
"""

from __future__ import annotations

from collections.abc import Sequence
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
from kernels.math.flops import attention_flops, residue_pairs, window_pairs
from kernels.math.masked import masked_attention, positions
from kernels.math.residues import add_residues
from kernels.math.spans import Ints, Span, SpanPattern, add_spans, plan_for
from kernels.math.window import tile_height
from kernels.math.workspace import one_after_another, panels, windows


class StridedParams(Params):
    stride: int = Field(
        default=128, ge=2, le=4096, description="Width of the band and period of the long edges."
    )
    combine: Combine = Field(
        default="union", description="Both patterns everywhere, by turns over heads, or by turns over layers."
    )


def reference(q: Tensor, k: Tensor, v: Tensor, params: StridedParams, call: Call) -> AttentionResult:
    i, j = positions(q, k, call)
    w = params.stride
    band = (i - w <= j) & (j <= i) if call.causal else (i - j).abs() <= w // 2
    keep = combined_keep([band, (i - j) % w == 0], params.combine, q.shape[1], call.layer)
    return masked_attention(q, k, v, keep, call)


def attend(q: Tensor, k: Tensor, v: Tensor, params: StridedParams, call: Call) -> AttentionResult:
    began = perf_counter()
    acc = accumulator(q, k, v, call)
    w = params.stride
    add_combined(
        acc,
        params.combine,
        union=lambda part: _add_union(part, w),
        patterns=[lambda part: _add_band(part, w), lambda part: _add_classes(part, w)],
    )
    return result(acc, q, began)


def decode(q: Tensor, segments: Sequence[Segment], params: StridedParams, call: Call) -> PackedResult | None:
    """Where heads keep different patterns, each row has a call of its own."""
    if params.combine == "multihead":
        return None
    w, in_turn = params.stride, params.combine == "sequential"
    pattern = (_band, _one_class)[call.layer % 2](w, True) if in_turn else _one_row(w, True)
    return decode_spans(q, segments, pattern, call)


def prefill(q: Tensor, segments: Sequence[Segment], params: StridedParams, call: Call) -> PackedResult | None:
    """As decode; a launch for the band, one for the classes."""
    from kernels._triton.spans import packed_spans, residue_part, same_part, span_part

    if params.combine == "multihead":
        return None
    w, causal = params.stride, call.causal
    classes = residue_part(w, causal)
    if params.combine == "union":
        parts = [span_part(_rest_of_band(w, causal), causal), classes]
    else:
        parts = [(span_part(_band(w, causal), causal), classes)[call.layer % 2]]
    return packed_spans(q, segments, [same_part(part) for part in parts], call)


def _add_band(acc: Accumulator, w: int) -> None:
    add_spans(acc, plan_for(acc, _band(w, acc.call.causal)))


def _add_classes(acc: Accumulator, w: int) -> None:
    if acc.q.shape[-2] == 1:
        add_spans(acc, plan_for(acc, _one_class(w, acc.call.causal)))
    else:
        add_residues(acc, w)


def _add_union(acc: Accumulator, w: int) -> None:
    """Classes whole, and the band without them: the band's edges carry masks anyway."""
    if acc.q.shape[-2] == 1:
        add_spans(acc, plan_for(acc, _one_row(w, acc.call.causal)))
    else:
        add_spans(acc, plan_for(acc, _rest_of_band(w, acc.call.causal)))
        add_residues(acc, w)


def _band(w: int, causal: bool) -> SpanPattern:
    behind, ahead = (w, 0) if causal else (w // 2, w // 2)
    return _span_pattern("band", w, behind, ahead, hole=False)


def _rest_of_band(w: int, causal: bool) -> SpanPattern:
    """The band without the row's own class, which meets it at i and, causal, at i - w (for w = 2, also
    nowhere else).
    """
    if causal:
        return _span_pattern("rest of band", w, w - 1, -1, hole=False)
    return _span_pattern("rest of band", w, w // 2, w // 2, hole=True)


def _span_pattern(name: str, w: int, behind: int, ahead: int, hole: bool) -> SpanPattern:
    def spans(rows: Ints, num_keys: int) -> list[Span]:
        return [Span(np.maximum(rows - behind, 0), np.minimum(rows + ahead + 1, num_keys), hole=hole)]

    return SpanPattern(("strided", name, w), spans, tile=lambda group: tile_height(behind + ahead + 1, group))


def _one_class(w: int, causal: bool) -> SpanPattern:
    """The class of a single row as a series of keys."""

    def spans(rows: Ints, num_keys: int) -> list[Span]:
        first = int(rows[0]) % w
        last = int(rows[0]) if causal else num_keys - 1
        return [Span(np.zeros_like(rows), np.full_like(rows, (last - first) // w + 1), first=first, step=w)]

    return SpanPattern(("strided", "class", w), spans)


def _one_row(w: int, causal: bool) -> SpanPattern:
    rest, own = _rest_of_band(w, causal), _one_class(w, causal)
    return SpanPattern(
        ("strided", "row", w),
        lambda rows, num_keys: [*rest.spans(rows, num_keys), *own.spans(rows, num_keys)],
    )


def workspace(params: StridedParams, shape: CallShape) -> Workspace:
    """Band, then residue classes, whose parts are as large as the rows of the heads in one call."""
    band = windows(shape, params.stride if shape.causal else params.stride // 2, 0)
    classes = panels(shape, shape.num_rows, -(-shape.num_keys // params.stride), parts=2)
    return one_after_another(band, classes)


def flops(params: StridedParams, shape: CallShape) -> float:
    """Heads that take turns are counted by head, layers that do as their mean."""
    w, causal = params.stride, shape.causal
    classes = residue_pairs(shape, w)
    if params.combine == "union":
        rest = window_pairs(shape, max(w - 1, 1) if causal else w // 2)
        return attention_flops(shape, rest + classes)
    band = window_pairs(shape, w + 1 if causal else w // 2)
    share = 0.5 if params.combine == "sequential" else (shape.num_heads // 2) / shape.num_heads
    return attention_flops(shape, (1.0 - share) * band + share * classes)


BACKEND = Backend(
    name="strided",
    summary="A local band and every stride-th token (sparse transformers).",
    paper="Child et al., Sparse Transformers (arXiv 1904.10509); Yun et al. (arXiv 2006.04862)",
    params=StridedParams,
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
        "Bidirectional, it meets Yun et al.'s three conditions under every combine mode, with every token "
        "reached within 3 layers. In a causal model a token is reached by earlier ones only, the paper's s "
        "is infinite and its theorem does not apply."
    ),
)
