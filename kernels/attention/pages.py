"""Pages: per query tile, the key blocks whose upper bound on the logits is largest.

    u_ib = sum_d max(scale q_id kmax_bd, scale q_id kmin_bd)  >=  scale <q_i, k_j>   for every key j of page b
    score of page b for a tile = mean over its rows and its group's heads of softmax_b(u_i)

kmax, kmin: coordinate-wise greatest and least key of the page, a block of ``block_size`` keys. For one row
this is Quest's order (Tang et al., arXiv 2406.10774, section 3.3). A tile also sees its own keys, always, and
the first page is chosen before all others of finite bounds: many models rest most of a row's mass on the
first token, and over a whole tile bounds lose it now and then.
Cost O(N^2 / block_size + N budget) time; O(N) memory, and N M / (query_tile block_size) scores of pages. A
decode step reads 2 / block_size of K for the bounds, half as much again for the means of what it leaves out
(both are kept from step to step), and the keys that it keeps. Accumulates in fp32, returns q's dtype.

When not to use it: for prefill where ``xattention`` finds the same mass with fewer blocks: over many rows
bounds are loose. Short documents, where reading everything costs less than choosing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

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
from kernels.math.flops import begins, selected_flops
from kernels.math.selected import OneSequence, select_lists, selected_attention
from kernels.math.selected_reference import selected_reference
from kernels.math.selected_row import RowScoring, decode_selected, row_by_kernels, runs_as_row, selected_row
from kernels.math.selection import ABOVE_ALL, BlockScores, BudgetParams
from kernels.math.summaries import Summary
from kernels.math.workspace import block_scores, most_keys, selected_blocks

if TYPE_CHECKING:
    from kernels._triton.selected import Sequence as OnDevice
    from kernels._triton.selection import Scores

_PRODUCTS = 2
"""Products of D numbers that a bound takes."""
_BY_BOUNDS = RowScoring(None, first_block=True)


class PagesParams(BudgetParams):
    """How many keys each query tile reads beyond its own."""


def reference(q: Tensor, k: Tensor, v: Tensor, params: PagesParams, call: Call) -> AttentionResult:
    return selected_reference(q, k, v, params, call, _score_slowly)


def attend(q: Tensor, k: Tensor, v: Tensor, params: PagesParams, call: Call) -> AttentionResult:
    if runs_as_row(q, k, params, call):
        return selected_row(q, k, v, params, call, _score_row)
    return selected_attention(q, k, v, params, call, _score)


def attend_on_device(q: Tensor, k: Tensor, v: Tensor, params: PagesParams, call: Call) -> AttentionResult:
    """Impl triton: the host waits for nothing between scores and attention."""
    from kernels._triton.selected import selected_attention as by_kernels

    if runs_as_row(q, k, params, call):
        return row_by_kernels(q, k, v, params, call, _BY_BOUNDS)
    return by_kernels(q, k, v, params, call, _score_on_device, first_block=True)


def decode(q: Tensor, segments: Sequence[Segment], params: PagesParams, call: Call) -> PackedResult | None:
    return decode_selected(q, segments, params, call, _BY_BOUNDS)


def select(q: Tensor, k: Tensor, v: Tensor, params: PagesParams, call: Call) -> BlockLists:
    return select_lists(q, k, v, params, call, _score)


def _score(one: OneSequence, params: PagesParams) -> BlockScores:
    tiles, bounds = one.tiles, one.summary.bounds
    candidates = tiles.candidates()
    mass = bounds.new_zeros(len(bounds), tiles.num_tiles, tiles.num_blocks)
    widths, scored = (candidates * torch.arange(1, tiles.num_blocks + 1)).amax(-1).tolist(), 0
    for tile, width in enumerate(widths):
        if width:
            own = None if one.call.causal else ~candidates[tile, :width].to(bounds.device)
            upper = _upper_bounds(one.q[:, :, tiles.rows(tile)], bounds[:, :width], one.call.scale)
            mass[:, tile, :width] = _mean_softmax(upper, own)
            scored += _PRODUCTS * upper.numel()
    return BlockScores(mass.cpu(), first_block=True, scored=scored)


def _score_on_device(one: OnDevice) -> Scores:
    """``_score`` without reading anything back: which bounds are not finite is always looked for."""
    from kernels._triton.selection import Scores

    tiles, bounds = one.tiles, one.summary().bounds
    q = torch.unflatten(one.q, 0, (len(one.k), -1)).to(bounds.dtype)
    candidates = tiles.candidates()
    mass = bounds.new_zeros(len(bounds), tiles.num_tiles, tiles.num_blocks)
    widths, scored = (candidates * torch.arange(1, tiles.num_blocks + 1)).amax(-1).tolist(), 0
    for tile, width in enumerate(widths):
        if width:
            own = ~candidates[tile, :width].to(bounds.device, non_blocking=True)
            upper = _upper_bounds(q[:, :, tiles.rows(tile)], bounds[:, :width], one.call.scale)
            broken = (~torch.isfinite(upper)).any(1) & ~own
            shares = torch.softmax(upper.masked_fill_((broken | own)[:, None], -math.inf), -1).nan_to_num_(
                nan=0.0
            )
            mass[:, tile, :width] = shares.mean(1).masked_fill_(broken, math.inf)
            scored += _PRODUCTS * upper.numel()
    return Scores(mass, None, scored)


def _score_row(q: Tensor, known: Summary, scale: float) -> tuple[Tensor, int]:
    upper = _upper_bounds(q, known.bounds, scale)
    mass = _mean_softmax(upper)
    mass[:, :1].clamp_(min=ABOVE_ALL)
    return mass, _PRODUCTS * upper.numel()


def _upper_bounds(q: Tensor, bounds: Tensor, scale: float) -> Tensor:
    """q [Hk, G, R, D], bounds [Hk, P, 2 D] -> [Hk, G R, P]: one product of the positive parts with kmax and
    the negative ones with kmin."""
    scaled = q.flatten(1, 2) * scale
    return torch.bmm(torch.cat([scaled.clamp(min=0), scaled.clamp(max=0)], -1), bounds.mT)


def _mean_softmax(upper: Tensor, own: Tensor | None = None) -> Tensor:
    """[Hk, rows, P] -> [Hk, P]: 0 for blocks that are ``own``, infinite where a bound of the block is not
    finite, which says nothing of the others."""
    if own is not None:
        upper.masked_fill_(own, -math.inf)
    mass = torch.softmax(upper, -1).mean(1)
    if math.isfinite(float(mass.sum())):
        return mass
    broken = (~torch.isfinite(upper)).any(1)
    if own is not None:
        broken &= ~own
    mass = torch.softmax(upper.masked_fill_(broken[:, None], -math.inf), -1).mean(1)
    return mass.nan_to_num_(nan=0.0).masked_fill_(broken, math.inf)


def _score_slowly(one: OneSequence, params: PagesParams) -> BlockScores:
    """Bound by bound, from the equation."""
    tiles, (heads, group) = one.tiles, one.q.shape[:2]
    candidates, scored = tiles.candidates(), 0
    mass = one.q.new_zeros(heads, tiles.num_tiles, tiles.num_blocks)
    for tile in range(tiles.num_tiles):
        pages = candidates[tile].nonzero()[:, 0].tolist()
        for head in range(heads):
            rows = one.q[head, :, tiles.rows(tile)]
            upper = [_upper_bound(rows, one, head, page) for page in pages]
            broken = [not bool(torch.isfinite(bound).all()) for bound in upper]
            sound = [page for page, bad in zip(pages, broken, strict=True) if not bad]
            mass[head, tile, pages] = math.inf
            if sound:
                weights = torch.softmax(
                    torch.stack([u for u, bad in zip(upper, broken, strict=True) if not bad], -1), -1
                )
                mass[head, tile, sound] = weights.sum((0, 1)) / (group * rows.shape[1])
            scored += _PRODUCTS * group * rows.shape[1] * len(pages)
    return BlockScores(mass, first_block=True, scored=scored)


def _upper_bound(rows: Tensor, one: OneSequence, head: int, page: int) -> Tensor:
    """[G, R]: the greatest logit that a key within the page's bounds could have."""
    keys = one.k[head, page * one.tiles.block : (page + 1) * one.tiles.block].to(rows.dtype)
    least, greatest = keys.min(0).values, keys.max(0).values
    return torch.maximum(one.call.scale * rows * greatest, one.call.scale * rows * least).sum(-1)


def workspace(params: PagesParams, shape: CallShape) -> Workspace:
    T, L = params.query_tile, params.block_size
    return selected_blocks(
        shape,
        query_tile=T,
        block_size=L,
        budget_keys=most_keys(params.budget),
        remainder=params.remainder,
        scoring_bytes=block_scores(shape, T, L, columns=shape.num_keys // L, copies=2),
    )


def flops(params: PagesParams, shape: CallShape) -> float:
    """Two products for every row and page before its tile (bidirectional: every page)."""
    start, T, L = shape.num_keys - shape.num_rows, params.query_tile, params.block_size
    pages = begins(start, shape.num_keys, T) / L
    if not shape.causal:
        pages = shape.num_rows * (shape.num_keys // L)
    return selected_flops(params, shape, _PRODUCTS * pages)


BACKEND = Backend(
    name="pages",
    summary="The key blocks whose bounds allow the largest logits (Quest): decode reads little of the cache.",
    paper="Tang et al., Quest (arXiv 2406.10774)",
    params=PagesParams,
    capabilities=Capabilities(
        causal=True,
        bidirectional=True,
        decode=True,
        exact=False,
        selection="tile",
        complexity="O(N^2 / block_size + N budget)",
        exponent=2.0,
    ),
    impls={"reference": reference, "torch": attend, "triton": attend_on_device},
    workspace=workspace,
    flops=flops,
    decode=decode,
    conditions=(
        "A page's bound is never below its largest logit, but it can be far above: a page with large, "
        "scattered keys may displace one that matters. The paper applies it to decode only, and keeps the "
        "first two layers exact."
    ),
    select=select,
)
