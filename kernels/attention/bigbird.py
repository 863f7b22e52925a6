"""BigBird: a sliding window, global tokens and random keys together.

    A_i = window(window, global_tokens)_i  ∪  random(num_random, block_size)_i

Zaheer et al., "Big Bird: transformers for longer sequences" (arXiv 2007.14062), section 2, in terms of
elements instead of the paper's blocks; Yun et al. (arXiv 2006.04862), pattern BIGBIRD. Cost O(N (window +
global_tokens + num_random)) time, O(N) memory. Each pair counts once: drawn keys that the window or the
global tokens have already are left out. Accumulates in fp32, returns q's dtype.

When not to use it: where a plain window serves as well; the random keys cost time and are read by models
trained with them more than by others.
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
from kernels.math.flops import attention_flops, drawn_pairs, window_pairs
from kernels.math.masked import masked_attention, positions
from kernels.math.random_keys import BlockSize, num_random_problem, random_keep
from kernels.math.random_part import add_random
from kernels.math.random_rows import decode_random
from kernels.math.spans import SpanPattern, add_spans, plan_for
from kernels.math.window import window_keep, window_pattern
from kernels.math.workspace import one_after_another, random_keys, windows


class BigBirdParams(Params):
    window: int = Field(
        default=256,
        ge=1,
        le=65536,
        description="Keys on each side; look-back including the row itself when causal.",
    )
    global_tokens: int = Field(
        default=64,
        ge=0,
        le=4096,
        description="First tokens that every row sees; bidirectional: they see every key too.",
    )
    num_random: int = Field(
        default=192,
        ge=1,
        le=4096,
        description="Keys drawn per row: at most 256 where block_size is 1, else a multiple of block_size.",
    )
    block_size: BlockSize = Field(
        default=64, description="Keys drawn together: 1, or whole blocks of 32, 64 or 128."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        problem = num_random_problem(self.num_random, self.block_size)
        if problem:
            raise ValueError(f"num_random {problem}, got {self.num_random}")
        return self


def reference(q: Tensor, k: Tensor, v: Tensor, params: BigBirdParams, call: Call) -> AttentionResult:
    i, j = positions(q, k, call)
    full_rows = 0 if call.causal else params.global_tokens
    near = window_keep(i, j, params.window, params.global_tokens, full_rows, call.causal)
    keep = near | random_keep(call, params, q.shape[1], k.shape[1], i, j)
    return masked_attention(q, k, v, keep, call)


def attend(q: Tensor, k: Tensor, v: Tensor, params: BigBirdParams, call: Call) -> AttentionResult:
    began = perf_counter()
    acc = accumulator(q, k, v, call)
    near = _near(params, call)
    add_spans(acc, plan_for(acc, near))
    add_random(acc, params, base=near)
    return result(acc, q, began)


def decode(q: Tensor, segments: Sequence[Segment], params: BigBirdParams, call: Call) -> PackedResult | None:
    return decode_random(q, segments, params, _near(params, call), call)


def _near(params: BigBirdParams, call: Call) -> SpanPattern:
    full_rows = 0 if call.causal else params.global_tokens
    return window_pattern(params.window, params.global_tokens, full_rows, call.causal)


def workspace(params: BigBirdParams, shape: CallShape) -> Workspace:
    return one_after_another(
        windows(shape, params.window, params.global_tokens),
        random_keys(shape, params.num_random, params.block_size, base_edges=_cut_blocks(params, shape)),
    )


def _cut_blocks(params: BigBirdParams, shape: CallShape) -> int:
    """Key blocks that the window or the global tokens share in part with a query block."""
    L = params.block_size
    edges = (1 + (params.window % L > 0)) * (1 if shape.causal else 2)
    return edges + (params.global_tokens % L > 0)


def flops(params: BigBirdParams, shape: CallShape) -> float:
    """Drawn blocks that the window or the global tokens hold whole are not computed again."""
    w, L, first = params.window, params.block_size, params.global_tokens
    near = window_pairs(shape, w, first, 0 if shape.causal else first)
    if L == 1:
        return attention_flops(shape, near + shape.num_rows * params.num_random)
    covered = first // L + max(0, (w // L - 1) if shape.causal else 2 * (w // L) - 1)
    return attention_flops(shape, near + drawn_pairs(shape, params.num_random, L, covered))


BACKEND = Backend(
    name="bigbird",
    summary="A sliding window, global tokens and random keys together (BigBird).",
    paper="Zaheer et al., Big Bird (arXiv 2007.14062)",
    params=BigBirdParams,
    capabilities=Capabilities(
        causal=True,
        bidirectional=True,
        decode=True,
        exact=False,
        selection="none",
        random=True,
        complexity="O(N (window + global_tokens + num_random))",
    ),
    impls={"reference": reference, "torch": attend, "triton": attend},
    workspace=workspace,
    flops=flops,
    decode=decode,
    conditions=(
        "Bidirectional and with at least one global token it meets Yun et al.'s three conditions with s = 2. "
        "In a causal model a token is reached by earlier ones only, the paper's s is infinite and its "
        "theorem (arXiv 2006.04862) does not apply."
    ),
)
