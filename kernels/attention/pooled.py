"""Pooled: key blocks chosen by what the mean of a few neighbouring rows attends to.

    A_i = own keys of i's query tile  ∪  blocks of largest estimated mass (a ``budget``, or until ``mass``)
    mass_b = mean over the tile's row groups and heads of sum_{j in b} softmax_j(scale <group's mean, k_j>)

Row groups are ``pool_rows`` rows at absolute multiples; the equation and what a mean row may see stand in
``kernels.math.mean_query``. The scoring is Longreach's own variant and no paper's method. Nearest are the
block-sparse heads of MInference (Jiang et al., arXiv 2407.02490) and FlexPrefill (Lai et al., arXiv
2502.20766), which pool the keys of a block too; here only queries are pooled, and every key keeps its own
logit. So a single key that takes most of a row's mass, as the first token does in many models, is seen
without a rule of its own.
Decode: the row is its own mean. Every key is read to choose (the values only of what is kept), the choice is
``topk``'s, and what it drops is known exactly.
Cost O(N^2 D / pool_rows) for the scores, O(N budget D) for the attention; O(N) memory, and N M / (query_tile
block_size) scores of blocks. Accumulates in fp32, returns q's dtype.

When not to use it: below some thousands of keys, where exact attention costs no more; where neighbouring rows
look for different things, whose mean looks for neither (a smaller ``pool_rows`` helps); to make decode
cheaper. ``mass`` is a share of the estimate: on real queries and keys 0.9 kept between 0.87 and 0.90 of the
true mass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from kernels.math.block_lists import BlockLists
from kernels.math.flops import groups_at_once, halves, selected_flops
from kernels.math.mean_query import ROWS_AT_ONCE, mean_query_scores, scoring_bytes
from kernels.math.selected import OneSequence, select_lists, selected_attention
from kernels.math.selected_reference import selected_reference
from kernels.math.selected_row import RowScoring, decode_selected, row_by_kernels, runs_as_row
from kernels.math.selection import BlockScores, SelectParams
from kernels.math.workspace import most_keys, selected_blocks

_EVERY_LOGIT = RowScoring(1, knows_every_logit=True)


class PooledParams(SelectParams):
    pool_rows: Literal[32, 64, 128] = Field(
        default=64,
        description="Neighbouring rows, at absolute multiples, whose mean is scored against every key: the "
        "scores cost 1 / pool_rows of exact attention's.",
    )


def reference(q: Tensor, k: Tensor, v: Tensor, params: PooledParams, call: Call) -> AttentionResult:
    return selected_reference(q, k, v, params, call, _slow_scores, exact_dropped=q.shape[2] == 1)


def attend(q: Tensor, k: Tensor, v: Tensor, params: PooledParams, call: Call) -> AttentionResult:
    return selected_attention(q, k, v, params, call, _scores, knows_every_logit=q.shape[2] == 1)


def attend_on_device(q: Tensor, k: Tensor, v: Tensor, params: PooledParams, call: Call) -> AttentionResult:
    """Scores, choice and attention in Triton kernels; the host waits for nothing in between."""
    if runs_as_row(q, k, params, call):
        return row_by_kernels(q, k, v, params, call, _EVERY_LOGIT)
    from kernels._triton.selected import mean_query, selected_attention

    score, alone = mean_query(params.pool_rows), q.shape[2] == 1
    return selected_attention(q, k, v, params, call, score, knows_every_logit=alone)


def decode(q: Tensor, segments: Sequence[Segment], params: PooledParams, call: Call) -> PackedResult | None:
    return decode_selected(q, segments, params, call, _EVERY_LOGIT)


def select(q: Tensor, k: Tensor, v: Tensor, params: PooledParams, call: Call) -> BlockLists:
    return select_lists(q, k, v, params, call, _scores)


def _scores(one: OneSequence, params: PooledParams) -> BlockScores:
    return mean_query_scores(one, params.pool_rows)


def _slow_scores(one: OneSequence, params: PooledParams) -> BlockScores:
    """Group by group, head by head, block by block."""
    tiles, (Hk, G, _, _) = one.tiles, one.q.shape
    mass = one.q.new_zeros(Hk, tiles.num_tiles, tiles.num_blocks)
    own = one.q.new_zeros(Hk, tiles.num_tiles)
    candidates, scored = tiles.candidates(), 0
    for head in range(Hk):
        for tile in range(tiles.num_tiles):
            groups = _groups_of_tile(one, tile, params.pool_rows)
            keys = one.q.new_zeros(tiles.num_keys)
            for rows in groups:
                for query in one.q[head]:
                    shares = _group_shares(one, query[rows], head, tiles.start + rows[-1])
                    keys[: len(shares)] += shares
                    scored += len(shares)
            keys /= len(groups) * G
            for block in candidates[tile].nonzero()[:, 0].tolist():
                mass[head, tile, block] = keys[block * tiles.block : (block + 1) * tiles.block].sum()
                keys[block * tiles.block : (block + 1) * tiles.block] = 0.0
            own[head, tile] = keys.sum()
    return BlockScores(mass, own, scored=scored)


def _groups_of_tile(one: OneSequence, tile: int, pool_rows: int) -> list[list[int]]:
    """The tile's rows of the call, group by group."""
    rows = range(one.tiles.borders[tile], one.tiles.borders[tile + 1])
    absolute = [(one.tiles.start + row) // pool_rows for row in rows]
    return [
        [row for row, at in zip(rows, absolute, strict=True) if at == group]
        for group in sorted(set(absolute))
    ]


def _group_shares(one: OneSequence, rows: Tensor, head: int, last: int) -> Tensor:
    """Softmax of the mean of ``rows`` [n, D] over the keys it may see, the last row standing at ``last``; NaN
    at keys whose logit is not finite, which the others do not feel."""
    seen = last + 1 if one.tiles.causal else one.tiles.num_keys
    logits = one.call.scale * (one.k[head, :seen].to(rows.dtype) @ rows.mean(0))
    broken = ~torch.isfinite(logits)
    return torch.softmax(logits.masked_fill(broken, -math.inf), -1).masked_fill(broken, math.nan)


def workspace(params: PooledParams, shape: CallShape) -> Workspace:
    return selected_blocks(
        shape,
        query_tile=params.query_tile,
        block_size=params.block_size,
        budget_keys=most_keys(params.budget),
        remainder=params.remainder,
        scoring_bytes=scoring_bytes(shape, params.query_tile, params.block_size, params.pool_rows),
    )


def flops(params: PooledParams, shape: CallShape) -> float:
    """Every key for every group of rows. Under ``mass`` a typical softmax is assumed: ``selected_flops``."""
    alone, R = shape.num_rows == 1, params.pool_rows
    if alone:
        return selected_flops(params, shape, float(shape.num_keys), every_logit=True)
    step = R * groups_at_once(shape, shape.num_keys, ROWS_AT_ONCE // R)
    return selected_flops(params, shape, max(halves(shape, step) / R, float(shape.num_keys)))


BACKEND = Backend(
    name="pooled",
    summary="Key blocks chosen per query tile by what the mean of every few rows attends to.",
    paper=(
        "none: Longreach's own variant, which pools queries only. Nearest: the block-sparse heads of "
        "MInference (arXiv 2407.02490) and FlexPrefill (arXiv 2502.20766), which pool the keys too"
    ),
    params=PooledParams,
    capabilities=Capabilities(
        causal=True,
        bidirectional=True,
        decode=True,
        exact=False,
        selection="tile",
        complexity="O(N^2 / pool_rows + N budget)",
        exponent=2.0,
    ),
    impls={"reference": reference, "torch": attend, "triton": attend_on_device},
    decode=decode,
    workspace=workspace,
    flops=flops,
    conditions=(
        "The choice looks at a whole query tile: a row's result depends on later rows of its tile, and "
        "chunks that end at tile borders change nothing. The estimated mass ranks blocks and is no bound on "
        "the true mass: rows that look for different things have a mean that looks for neither. On real "
        "queries and keys a mass of 0.9 kept 0.87 to 0.90 of the true mass. Decode reads every key to "
        "choose, and chooses what topk chooses."
    ),
    select=select,
)
