"""Attention over key blocks that are chosen per query tile by a score: one driver for every scoring.

    rows of tile t see  own keys  ∪  blocks chosen from their scores     (kernels.math.query_tiles)

Own keys run as spans, chosen blocks as lists, left-out blocks as their means where the params ask for it. How
much is chosen and from which scores: ``kernels.math.selection``. Sequences of a batch are independent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter
from typing import TypeVar

import torch
from torch import Tensor

from kernels.contract import AttentionResult, Call
from kernels.math.accumulate import Accumulator, accumulator, result
from kernels.math.block_lists import BlockLists, lists_from_table
from kernels.math.block_sparse import add_block_lists
from kernels.math.query_tiles import QueryTiles, query_tiles
from kernels.math.remainder import OwnPart, add_left_out, share_or_bound
from kernels.math.selection import BlockScores, Keep, TileParams, choose
from kernels.math.spans import add_spans, plan_for
from kernels.math.summaries import BlockSummaries, Summary


@dataclass(frozen=True)
class OneSequence:
    """What a scoring looks at: q [Hk, G, N, D] in the accumulator's dtype, k [Hk, M, D], v [Hk, M, Dv], the
    call's tiles, and, computed when asked for, what is known of the first ``tiles.num_blocks`` key blocks."""

    q: Tensor
    k: Tensor
    v: Tensor
    tiles: QueryTiles
    call: Call

    @cached_property
    def summary(self) -> Summary:
        kept = self.call.summaries or BlockSummaries()
        return kept.get(self.k, self.v, self.tiles.block, self.tiles.num_blocks)


P = TypeVar("P", bound=TileParams)
Score = Callable[[OneSequence, P], BlockScores]


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    params: P,
    call: Call,
    score: Score[P],
    *,
    knows_every_logit: bool = False,
) -> AttentionResult:
    """A whole call: q [B, H, N, D], k [B, Hk, M, D], v [B, Hk, M, Dv].

    ``dropped`` comes from the left-out blocks' means, or exactly where the scoring ``knows_every_logit``
    (``BlockScores.lse``). Raises ValueError for lists of another length than the model's.
    """
    began = perf_counter()
    acc = accumulator(q, k, v, call)
    tiles = query_tiles(call, q.shape[2], k.shape[2], params.query_tile, params.block_size)
    keep = params.keep(call.layer, k.shape[1])
    add_spans(acc, plan_for(acc, tiles.own_keys()))
    dropped = torch.zeros_like(acc.lse)
    for b in range(len(q)):
        one = _sequence(acc, b, tiles)
        must_score = knows_every_logit and params.skip > 0
        chosen, scores = _timed_choice(acc, one, params, keep, score, must_score)
        own = _own_part(acc, b, params, tiles, chosen)
        listed = add_block_lists(acc, b, chosen, skip=params.skip, own=tiles)
        dropped[b] = _left_out(acc, b, one, listed, params, scores, own)
    return result(acc, q, began, dropped=dropped)


def _own_part(
    acc: Accumulator, b: int, params: TileParams, tiles: QueryTiles, chosen: BlockLists
) -> OwnPart | None:
    """The rows as they are now, where a gate will ask for them: blocks may be left out."""
    if params.remainder != "gated" or not (params.skip > 0 or _leaves_out(tiles, chosen)):
        return None
    return OwnPart(acc.out[b].clone(), acc.lse[b].clone())


@dataclass(frozen=True)
class ScoredLists(BlockLists):
    """Lists, and what it took to choose them (``Stats.pairs_scored``)."""

    scored: int = 0


def select_lists(q: Tensor, k: Tensor, v: Tensor, params: P, call: Call, score: Score[P]) -> ScoredLists:
    """The blocks that a call of one sequence would list, before any is skipped (``Backend.select``)."""
    if len(q) > 1:
        raise ValueError(f"block lists are of one sequence, the call has {len(q)}")
    tiles = query_tiles(call, q.shape[2], k.shape[2], params.query_tile, params.block_size)
    one = _sequence(accumulator(q, k, v, call), 0, tiles)
    lists, scores = _choice(one, params, params.keep(call.layer, k.shape[1]), score, False)
    scored = 0 if scores is None else scores.scored
    return ScoredLists(lists.block, lists.borders, lists.indptr, lists.indices, scored)


def _sequence(acc: Accumulator, b: int, tiles: QueryTiles) -> OneSequence:
    return OneSequence(acc.q[b], acc.k[b], acc.v[b], tiles, acc.call)


def _timed_choice(
    acc: Accumulator, one: OneSequence, params: P, keep: Keep, score: Score[P], must_score: bool
) -> tuple[BlockLists, BlockScores | None]:
    began = perf_counter()
    made = _choice(one, params, keep, score, must_score)
    acc.selection_s += perf_counter() - began
    acc.scored += 0 if made[1] is None else made[1].scored
    return made


def _choice(
    one: OneSequence, params: P, keep: Keep, score: Score[P], must_score: bool
) -> tuple[BlockLists, BlockScores | None]:
    """The lists, and the scores where there was something to choose or they are wanted anyway."""
    candidates = one.tiles.candidates()
    most = int(candidates.sum(-1).max()) if one.tiles.num_blocks else 0
    covered = keep.covers(most)
    scores = score(one, params) if most and (must_score or not covered) else None
    if scores is None or covered:
        table = candidates.expand(len(one.k), *candidates.shape)
    else:
        table = choose(scores, candidates, keep)
    return lists_from_table(table, one.tiles.block, one.tiles.borders), scores


def _left_out(
    acc: Accumulator,
    b: int,
    one: OneSequence,
    listed: BlockLists,
    params: TileParams,
    scores: BlockScores | None,
    own: OwnPart | None,
) -> Tensor:
    """Merge the blocks that are not listed, if the params say so; their share of the mass [Hk, G, N]."""
    if not _leaves_out(one.tiles, listed):
        return torch.zeros_like(acc.lse[b])
    merge = params.remainder != "none"
    if scores is None or scores.lse is None:
        return add_left_out(acc, b, one.tiles, listed, one.summary, merge=merge, own=own)
    dropped = exact_dropped(acc.lse[b], scores.lse)
    if merge:
        add_left_out(acc, b, one.tiles, listed, one.summary, merge=True, own=own)
    return dropped


def _leaves_out(tiles: QueryTiles, listed: BlockLists) -> bool:
    return bool((listed.counts() < tiles.candidates().sum(-1)).any())


def exact_dropped(lse_kept: Tensor, lse_all: Tensor) -> Tensor:
    """1 - exp(lse_kept - lse_all): the share of the mass that is not kept; where it is NaN, as
    ``share_or_bound`` says."""
    return share_or_bound(-torch.expm1(lse_kept - lse_all), lse_kept).clamp_(0.0, 1.0)
