"""Random attention: every row keeps itself and keys drawn at random.

    A_i = {i} and num_random draws, uniform with replacement, from 0..i (causal) or 0..M-1
    block_size L > 1:  the rows of a block share num_random / L draws of whole key blocks, from the
                       earlier blocks (causal) or from all

Yun et al., "O(n) connections are expressive enough" (arXiv 2006.04862), pattern RANDOM(m) with m =
num_random. Draws are keyed by (seed, layer, head, row or block), so neither chunking nor batching moves them.
Cost O(N num_random) time and memory; single keys are gathered edge by edge, whole blocks run as panels and
are several times faster per pair. Accumulates in fp32, returns q's dtype.

When not to use it: alone, on a trained model: random keys carry no locality. It is a baseline and a part of
bigbird.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Self

from pydantic import Field, model_validator
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
from kernels.math.accumulate import accumulator, result
from kernels.math.flops import attention_flops, drawn_pairs
from kernels.math.masked import masked_attention, positions
from kernels.math.random_keys import BlockSize, num_random_problem, random_keep
from kernels.math.random_part import add_random, prefill_random
from kernels.math.random_rows import decode_random
from kernels.math.spans import Ints, Span, SpanPattern, add_spans, plan_for
from kernels.math.workspace import one_after_another, random_keys, windows


class RandomParams(Params):
    num_random: int = Field(
        default=64,
        ge=1,
        le=4096,
        description="Keys drawn per row: at most 256 where block_size is 1, else a multiple of block_size.",
    )
    block_size: BlockSize = Field(
        default=1, description="Keys drawn together: 1, or whole blocks of 32, 64 or 128."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        problem = num_random_problem(self.num_random, self.block_size)
        if problem:
            raise ValueError(f"num_random {problem}, got {self.num_random}")
        return self


def reference(q: Tensor, k: Tensor, v: Tensor, params: RandomParams, call: Call) -> AttentionResult:
    i, j = positions(q, k, call)
    keep = random_keep(call, params, q.shape[1], k.shape[1], i, j) | (i == j)
    return masked_attention(q, k, v, keep, call)


def attend(q: Tensor, k: Tensor, v: Tensor, params: RandomParams, call: Call) -> AttentionResult:
    began = perf_counter()
    acc = accumulator(q, k, v, call)
    if params.block_size == 1:
        add_random(acc, params, base=None)
    else:
        add_spans(acc, plan_for(acc, _ITSELF))
        add_random(acc, params, base=_ITSELF)
    return result(acc, q, began)


def decode(q: Tensor, segments: Sequence[Segment], params: RandomParams, call: Call) -> PackedResult | None:
    return decode_random(q, segments, params, None if params.block_size == 1 else _ITSELF, call)


def prefill(q: Tensor, segments: Sequence[Segment], params: RandomParams, call: Call) -> PackedResult | None:
    return prefill_random(q, segments, params, call) if params.block_size == 1 else None


def _own_position(rows: Ints, num_keys: int) -> list[Span]:
    return [Span(rows, rows + 1)]


_ITSELF_TILE = 64
_ITSELF = SpanPattern(key="itself", spans=_own_position, tile=_ITSELF_TILE)


def workspace(params: RandomParams, shape: CallShape) -> Workspace:
    """Single keys have no base; whole blocks have one, the row itself, which cuts no earlier block."""
    drawn = random_keys(shape, params.num_random, params.block_size, base_edges=0 if shape.causal else 1)
    return drawn if params.block_size == 1 else one_after_another(windows(shape, 1, 0), drawn)


def flops(params: RandomParams, shape: CallShape) -> float:
    if params.block_size == 1:
        return attention_flops(shape, shape.num_rows * (params.num_random + 1.0))
    itself = shape.num_rows * min(_ITSELF_TILE, shape.num_rows)
    return attention_flops(shape, itself + drawn_pairs(shape, params.num_random, params.block_size))


BACKEND = Backend(
    name="random",
    summary="Each token sees itself and keys drawn at random, singly or in whole blocks.",
    paper="Yun et al., O(n) connections are expressive enough (arXiv 2006.04862)",
    params=RandomParams,
    capabilities=Capabilities(
        causal=True,
        bidirectional=True,
        decode=True,
        exact=False,
        selection="none",
        random=True,
        complexity="O(N num_random)",
    ),
    impls={"reference": reference, "torch": attend, "triton": attend},
    workspace=workspace,
    flops=flops,
    decode=decode,
    prefill=prefill,
    conditions=(
        "Self loops hold; a Hamiltonian path and finite reachability are likely, not certain "
        "(bidirectional). In a causal model a token is reached by earlier ones only, Yun et al.'s s is "
        "infinite and their theorem (arXiv 2006.04862) does not apply."
    ),
)
