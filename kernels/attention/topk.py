"""Key blocks chosen by their true softmax mass: the yardstick of every selection.

    A_i = own keys of i's query tile  ∪  blocks of largest mass  (a ``budget``, or until ``mass`` is reached)
    mass_b = mean over the tile's rows and the group's heads of sum_{j in b} softmax_j(scale <q_i, k_j>)

Every logit of the call is computed to choose, so that it costs more than ``exact`` and its choice is the best
that blocks of this size can do for the mass kept; what is dropped is known exactly. Cost O(N^2 D) time; O(N)
memory, and N M / (query_tile block_size) scores of blocks. Accumulates in fp32, returns q's dtype.

When not to use it: to save time. It tells how much of another backend's error is its choice and how much is
the blocks' size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
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
from kernels.math.flops import halves, selected_flops
from kernels.math.selected import OneSequence, select_lists, selected_attention
from kernels.math.selected_reference import selected_reference
from kernels.math.selected_row import RowScoring, decode_selected, row_by_kernels, runs_as_row
from kernels.math.selection import BlockScores, SelectParams
from kernels.math.workspace import most_keys, selected_blocks

LOGIT_BYTES = 32 << 20
"""Logits that exist at once (and their softmax beside them)."""
_FP32 = 4
_CHOICE = 48


_EVERY_LOGIT = RowScoring(1, knows_every_logit=True)


class TopKParams(SelectParams):
    """How many keys each query tile reads beyond its own, as a number or as a share of the mass."""


def reference(q: Tensor, k: Tensor, v: Tensor, params: TopKParams, call: Call) -> AttentionResult:
    return selected_reference(q, k, v, params, call, _slow_scores, exact_dropped=True)


def attend(q: Tensor, k: Tensor, v: Tensor, params: TopKParams, call: Call) -> AttentionResult:
    return selected_attention(q, k, v, params, call, _scores, knows_every_logit=True)


def attend_on_device(q: Tensor, k: Tensor, v: Tensor, params: TopKParams, call: Call) -> AttentionResult:
    """Scores, choice and attention in Triton kernels; the host waits for nothing in between."""
    if runs_as_row(q, k, params, call):
        return row_by_kernels(q, k, v, params, call, _EVERY_LOGIT)
    from kernels._triton.selected import every_logit, selected_attention

    return selected_attention(q, k, v, params, call, every_logit, knows_every_logit=True)


def decode(q: Tensor, segments: Sequence[Segment], params: TopKParams, call: Call) -> PackedResult | None:
    return decode_selected(q, segments, params, call, _EVERY_LOGIT)


def select(q: Tensor, k: Tensor, v: Tensor, params: TopKParams, call: Call) -> BlockLists:
    return select_lists(q, k, v, params, call, _scores)


def _scores(one: OneSequence, params: TopKParams) -> BlockScores:
    """Head by head, some rows of one tile at a time."""
    tiles, (Hk, G, _, _) = one.tiles, one.q.shape
    num_blocks = -(-tiles.num_keys // tiles.block)
    shares = one.q.new_zeros(Hk, tiles.num_tiles, num_blocks)
    lse, scored = one.q.new_empty(one.q.shape[:3]), 0
    for head in range(Hk):
        keys = one.k[head].to(one.q.dtype) * one.call.scale
        for tile in range(tiles.num_tiles):
            rows = tiles.rows(tile)
            for some in _rows_at_once(one, rows):
                blocks, lse[head, :, some] = _add_rows(one, head, keys, some)
                shares[head, tile, : len(blocks)] += blocks
                scored += G * (some.stop - some.start) * _stop(one, some)
            shares[head, tile] /= G * (rows.stop - rows.start)
    shares, candidates = shares.cpu(), torch.zeros(shares.shape[1:], dtype=torch.bool)
    candidates[:, : tiles.num_blocks] = tiles.candidates()
    own = shares.masked_fill(candidates, 0.0).sum(-1)
    return BlockScores(shares[..., : tiles.num_blocks], own, lse, scored=scored)


def _rows_at_once(one: OneSequence, rows: slice) -> list[slice]:
    most = max(1, LOGIT_BYTES // (one.q.shape[1] * one.k.shape[1] * one.q.element_size()))
    return [slice(a, min(a + most, rows.stop)) for a in range(rows.start, rows.stop, most)]


def _stop(one: OneSequence, rows: slice) -> int:
    """Where the keys end that the last of the rows sees: their logits are computed for all of them."""
    return one.tiles.start + rows.stop if one.tiles.causal else one.tiles.num_keys


def _add_rows(one: OneSequence, head: int, keys: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """Mass of each block summed over the rows and the group's heads, NaN where a logit is not finite; and the
    rows' log-sum-exp [G, R]."""
    tiles = one.tiles
    stop = _stop(one, rows)
    logits = one.q[head, :, rows] @ keys[:stop].mT
    broken = None if math.isfinite(float(logits.sum())) else ~torch.isfinite(logits)
    if tiles.causal:
        first = tiles.start + rows.start
        later = torch.ones(logits.shape[1], stop - first, dtype=torch.bool, device=logits.device).triu_(1)
        logits[..., first:].masked_fill_(later, -math.inf)
    lse = torch.logsumexp(logits, -1)
    if broken is None:
        return _by_block(torch.softmax(logits, -1).sum((0, 1)), tiles.block), lse
    mass = torch.softmax(logits.masked_fill(broken, -math.inf), -1).nan_to_num_(nan=0.0).sum((0, 1))
    return _by_block(mass.masked_fill(broken.flatten(0, 1).any(0), math.nan), tiles.block), lse


def _by_block(keys: Tensor, block: int) -> Tensor:
    return torch.nn.functional.pad(keys, (0, -len(keys) % block)).view(-1, block).sum(-1)


def _slow_scores(one: OneSequence, params: TopKParams) -> BlockScores:
    """Row by row; NaN at keys whose logit is not finite, which the others do not feel."""
    tiles, (Hk, G, _, _) = one.tiles, one.q.shape
    mass = one.q.new_zeros(Hk, tiles.num_tiles, tiles.num_blocks)
    own = one.q.new_zeros(Hk, tiles.num_tiles)
    candidates, scored = tiles.candidates(), 0
    for head in range(Hk):
        for tile in range(tiles.num_tiles):
            rows = range(tiles.borders[tile], tiles.borders[tile + 1])
            mean = one.q.new_zeros(tiles.num_keys)
            for row in rows:
                seen = tiles.start + row + 1 if tiles.causal else tiles.num_keys
                for query in one.q[head, :, row]:
                    logits = one.call.scale * (one.k[head, :seen].to(query.dtype) @ query)
                    broken = ~torch.isfinite(logits)
                    weights = torch.softmax(logits.masked_fill(broken, -math.inf), -1)
                    mean[:seen] += weights.masked_fill(broken, math.nan)
                    scored += seen
            mean /= len(rows) * G
            for block in candidates[tile].nonzero()[:, 0].tolist():
                mass[head, tile, block] = mean[block * tiles.block : (block + 1) * tiles.block].sum()
                mean[block * tiles.block : (block + 1) * tiles.block] = 0.0
            own[head, tile] = mean.sum()
    return BlockScores(mass, own, scored=scored)


def workspace(params: TopKParams, shape: CallShape) -> Workspace:
    row = shape.num_heads // shape.num_kv_heads * shape.num_keys * _FP32
    logits = min(max(LOGIT_BYTES, row), row * min(shape.num_rows, params.query_tile))
    tiles = -(-shape.num_rows // params.query_tile) + 1
    table = shape.num_kv_heads * tiles * -(-shape.num_keys // params.block_size) * _CHOICE
    keys = 2 * shape.num_keys * shape.key_dim * _FP32
    return selected_blocks(
        shape,
        query_tile=params.query_tile,
        block_size=params.block_size,
        budget_keys=most_keys(params.budget),
        remainder=params.remainder,
        scoring_bytes=3 * logits + keys + table + shape.num_heads * shape.num_rows * _FP32,
    )


def flops(params: TopKParams, shape: CallShape) -> float:
    """Every logit, to choose. Under ``mass`` a typical softmax is assumed: ``selected_flops``."""
    logits = shape.num_heads // shape.num_kv_heads * shape.num_keys * _FP32
    step = max(1, min(params.query_tile, LOGIT_BYTES // logits))
    return selected_flops(params, shape, halves(shape, step), every_logit=True)


BACKEND = Backend(
    name="topk",
    summary="Key blocks chosen per query tile by their true softmax mass: for measuring, never fast.",
    paper="none: the best that a choice of whole blocks can keep",
    params=TopKParams,
    capabilities=Capabilities(
        causal=True,
        bidirectional=True,
        decode=True,
        exact=False,
        selection="tile",
        complexity="O(N^2)",
        exponent=2.0,
    ),
    impls={"reference": reference, "torch": attend, "triton": attend_on_device},
    decode=decode,
    workspace=workspace,
    flops=flops,
    conditions=(
        "No choice of as many blocks per tile and key head keeps more softmax mass; the error of the output "
        "depends on the values too. The choice looks at a whole query tile, as xattention's does."
    ),
    select=select,
)
