"""XAttention: key blocks chosen by antidiagonal sums of their logits.

    A_i = own keys of i's query tile  ∪  blocks of largest estimated mass (a ``budget``, or until ``mass``)
    mass_b = mean over the tile's row groups and heads of softmax over key cells of the antidiagonal sums

Xu et al., "XAttention: block sparse attention with antidiagonal scoring" (arXiv 2503.16428); the scoring's
equation stands in ``kernels.math.antidiagonal``. Here the choice is made per key head and query tile, the
tile's own keys are always kept, and decode reads one key in ``stride`` to choose. One rule is added: the
first block is chosen before all others (under ``mass``: always). Many models rest most of a row's mass on the
first token, a single key that a cell's mean does not show, and without it all other weights come out too
large.
Cost O(N^2 D / stride) for the scores, O(N budget D) for the attention; O(N) memory, and N M / (query_tile
block_size) scores of blocks. Accumulates in fp32, returns q's dtype.

When not to use it: below some thousands of keys, where exact attention costs no more; where single keys
matter that stand alone in their block (a larger stride averages them away).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from kernels.contract import (
    AttentionResult,
    Backend,
    Call,
    CallShape,
    Capabilities,
    PackedResult,
    Segment,
    Workspace,
)
from kernels.math.antidiagonal import CAUSAL_GROUPS, antidiagonal_scores, scoring_bytes
from kernels.math.block_lists import BlockLists
from kernels.math.flops import groups_at_once, halves, selected_flops
from kernels.math.selected import OneSequence, select_lists, selected_attention
from kernels.math.selected_reference import selected_reference
from kernels.math.selected_row import RowScoring, decode_selected, row_by_kernels, runs_as_row
from kernels.math.selection import BlockScores, SelectParams
from kernels.math.workspace import most_keys, selected_blocks


class XAttentionParams(SelectParams):
    stride: Literal[4, 8, 16, 32] = Field(
        default=16,
        description="Side of the squares of logits of which one antidiagonal is summed: the scores cost "
        "1 / stride of exact attention's.",
    )


def reference(q: Tensor, k: Tensor, v: Tensor, params: XAttentionParams, call: Call) -> AttentionResult:
    return selected_reference(q, k, v, params, call, _slow_scores)


def attend(q: Tensor, k: Tensor, v: Tensor, params: XAttentionParams, call: Call) -> AttentionResult:
    return selected_attention(q, k, v, params, call, _scores)


def attend_on_device(
    q: Tensor, k: Tensor, v: Tensor, params: XAttentionParams, call: Call
) -> AttentionResult:
    """Scores, choice and attention in Triton kernels; the host waits for nothing in between."""
    if runs_as_row(q, k, params, call):
        return row_by_kernels(q, k, v, params, call, RowScoring(params.stride, first_block=True))
    from kernels._triton.selected import antidiagonal, selected_attention

    return selected_attention(q, k, v, params, call, antidiagonal(params.stride), first_block=True)


def decode(
    q: Tensor, segments: Sequence[Segment], params: XAttentionParams, call: Call
) -> PackedResult | None:
    return decode_selected(q, segments, params, call, RowScoring(params.stride, first_block=True))


def select(q: Tensor, k: Tensor, v: Tensor, params: XAttentionParams, call: Call) -> BlockLists:
    return select_lists(q, k, v, params, call, _scores)


def _scores(one: OneSequence, params: XAttentionParams) -> BlockScores:
    return replace(antidiagonal_scores(one, params.stride), first_block=True)


def _slow_scores(one: OneSequence, params: XAttentionParams) -> BlockScores:
    """Group by group, cell by cell; and the first block before all others."""
    mass = one.q.new_zeros(len(one.k), one.tiles.num_tiles, one.tiles.num_blocks)
    own = one.q.new_zeros(mass.shape[:2])
    candidates, scored = one.tiles.candidates(), 0
    for head in range(len(one.k)):
        for tile in range(one.tiles.num_tiles):
            groups = _groups_of_tile(one, tile, params.stride)
            for rows in groups:
                for q in one.q[head]:
                    shares = _group_shares(one, q, head, rows, params.stride)
                    scored += len(rows) * len(shares)
                    for cell, share in enumerate(shares):
                        block = cell * params.stride // one.tiles.block
                        if block < one.tiles.num_blocks and candidates[tile, block]:
                            mass[head, tile, block] += share
                        else:
                            own[head, tile] += share
            mass[head, tile] /= len(groups) * one.q.shape[1]
            own[head, tile] /= len(groups) * one.q.shape[1]
    return BlockScores(mass, own, first_block=True, scored=scored)


def _groups_of_tile(one: OneSequence, tile: int, stride: int) -> list[list[int]]:
    """Absolute positions of the tile's rows, group by group."""
    rows = range(one.tiles.start + one.tiles.borders[tile], one.tiles.start + one.tiles.borders[tile + 1])
    groups = range(rows[0] // stride, rows[-1] // stride + 1)
    return [[i for i in rows if i // stride == g] for g in groups]


def _group_shares(one: OneSequence, q: Tensor, head: int, rows: list[int], stride: int) -> Tensor:
    """Softmax over the cells that the group may look at; NaN at those that are not finite, which the others
    do not feel."""
    start, causal = one.tiles.start, one.tiles.causal
    num_keys = start + one.q.shape[2] if causal else one.tiles.num_keys
    last_cell = rows[0] // stride if causal else (num_keys - 1) // stride
    sums = q.new_zeros(last_cell + 1)
    for i in rows:
        keys = torch.arange(last_cell + 1) * stride + stride - 1 - i % stride
        there = keys < num_keys
        sums[there] += one.k[head, keys[there]].to(q.dtype) @ q[i - start]
    logits = sums * one.call.scale / len(rows)
    broken = ~torch.isfinite(logits)
    return torch.softmax(logits.masked_fill(broken, -math.inf), -1).masked_fill(broken, math.nan)


def workspace(params: XAttentionParams, shape: CallShape) -> Workspace:
    return selected_blocks(
        shape,
        query_tile=params.query_tile,
        block_size=params.block_size,
        budget_keys=most_keys(params.budget),
        remainder=params.remainder,
        scoring_bytes=scoring_bytes(shape, params.query_tile, params.block_size, params.stride),
    )


def flops(params: XAttentionParams, shape: CallShape) -> float:
    """A key in ``stride`` for every row. Under ``mass`` a typical softmax is assumed: ``selected_flops``."""
    most = CAUSAL_GROUPS if shape.causal else shape.num_rows
    step = params.stride * groups_at_once(shape, shape.num_keys / params.stride, most)
    return selected_flops(params, shape, halves(shape, step) / params.stride)


BACKEND = Backend(
    name="xattention",
    summary="Key blocks chosen per query tile by sums along antidiagonals of their logits (XAttention).",
    paper="Xu et al., XAttention (arXiv 2503.16428)",
    params=XAttentionParams,
    capabilities=Capabilities(
        causal=True,
        bidirectional=True,
        decode=True,
        exact=False,
        selection="tile",
        complexity="O(N^2 / stride + N budget)",
        exponent=2.0,
    ),
    impls={"reference": reference, "torch": attend, "triton": attend_on_device},
    decode=decode,
    workspace=workspace,
    flops=flops,
    conditions=(
        "The choice looks at a whole query tile: a row's result depends on later rows of its tile, and "
        "chunks that end at tile borders change nothing. The estimated mass ranks blocks and is no bound on "
        "the true mass: a cell's mean logit understates it where single keys stand out. Decode reads one key "
        "in stride: a key that is not finite reaches it only where it is read."
    ),
    select=select,
)
