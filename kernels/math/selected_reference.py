"""Attention over chosen key blocks, written out: the specification of every backend that chooses them.

    A_i = own keys of i  ∪  blocks chosen for i's tile and key head, less those that ``skip`` passes over
    out_i = sum_{j in A_i} w_ij v_j + sum_{b left out} w_ib vmean_b        (the second sum: remainder "mean";
                                                                        "gated": kernels.math.remainder)
    w_ij ~ e^(scale <q_i, k_j>),   w_ib ~ L e^(scale <q_i, kmean_b>)

Every logit of a call exists at once; loops over tiles and blocks. Only the choice from the scores is shared
with ``kernels.math.selected``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from torch import Tensor

from kernels.contract import AttentionResult, Call, Stats
from kernels.math.dense import accumulator_dtype, grouped
from kernels.math.masked import masked_attention, positions, weighted
from kernels.math.query_tiles import QueryTiles, query_tiles
from kernels.math.selected import OneSequence, P, Score
from kernels.math.selection import choose


def selected_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    params: P,
    call: Call,
    score: Score[P],
    *,
    exact_dropped: bool = False,
) -> AttentionResult:
    """As ``selected_attention``; ``score`` is a slow one. ``exact_dropped``: every logit counts, not the
    left-out blocks' means."""
    results = [
        _one_sequence(q[b : b + 1], k[b : b + 1], v[b : b + 1], params, call, score, exact_dropped)
        for b in range(len(q))
    ]
    dropped = torch.cat([r.dropped for r in results if r.dropped is not None])
    lse = torch.cat([r.lse for r in results if r.lse is not None])
    return AttentionResult(torch.cat([r.out for r in results]), lse, _summed(results, dropped), dropped)


def _summed(results: list[AttentionResult], dropped: Tensor) -> Stats:
    stats = [r.stats for r in results]
    return replace(
        stats[0],
        pairs_kept=sum(s.pairs_kept for s in stats),
        pairs_exact=sum(s.pairs_exact for s in stats),
        pairs_computed=sum(s.pairs_computed for s in stats),
        pairs_scored=sum(s.pairs_scored for s in stats),
        selection_ms=sum(s.selection_ms for s in stats),
        compute_ms=sum(s.compute_ms for s in stats),
        dropped_mass=float(dropped.mean()),
    )


def _one_sequence(
    q: Tensor, k: Tensor, v: Tensor, params: P, call: Call, score: Score[P], exact_dropped: bool
) -> AttentionResult:
    began = perf_counter()
    tiles = query_tiles(call, q.shape[2], k.shape[2], params.query_tile, params.block_size)
    dtype, group = accumulator_dtype(q.dtype), q.shape[1] // k.shape[1]
    one = OneSequence(grouped(q.to(dtype), k.shape[1])[0], k[0], v[0], tiles, call)
    chosen, scored = _chosen(one, params, score)
    own, visible = _own(tiles, q, k), _visible(tiles, q, k)
    keys = k[0].to(dtype).repeat_interleave(group, 0)
    logits = (q[0].to(dtype) @ keys.mT * call.scale).masked_fill(~visible, -math.inf)
    if params.skip > 0:
        chosen &= ~_skipped(logits, own, chosen, tiles, params.skip)
    keep = own | _by_key(chosen, tiles, group, k.shape[2])
    spent_ms = (perf_counter() - began) * 1e3
    made = masked_attention(q, k, v, keep, call)
    kept = _Kept(logits.masked_fill(~keep, -math.inf), keep, _left_out(one, chosen, group))
    lse_dropped = torch.logsumexp(logits.masked_fill(keep, -math.inf) if exact_dropped else kept.means, -1)
    made = replace(made, dropped=_dropped(lse_dropped, torch.logsumexp(kept.logits, -1))[None].float())
    made = replace(made, stats=replace(made.stats, selection_ms=spent_ms, pairs_scored=scored))
    if params.remainder == "none":
        return made
    whole = _with_means(made, kept, one, v, group)
    return whole if params.remainder == "mean" else _gated(made, whole, logits, chosen, one, v, group)


def _dropped(lse_left_out: Tensor, lse_kept: Tensor) -> Tensor:
    """The left-out share of the mass. Where it is unknown: 0 for a row whose kept part is not finite, else 1
    (what was left out is not)."""
    share = torch.sigmoid(lse_left_out - lse_kept).masked_fill(lse_left_out == -math.inf, 0.0)
    share[share.isnan() & lse_kept.isfinite()] = 1.0
    return share.nan_to_num(nan=0.0)


def _chosen(one: OneSequence, params: P, score: Score[P]) -> tuple[Tensor, int]:
    """Bool [Hk, num_tiles, num_blocks], and what was scored to choose."""
    candidates = one.tiles.candidates()
    if not candidates.any():
        return candidates.repeat(len(one.k), 1, 1), 0
    scores = score(one, params)
    return choose(scores, candidates, params.keep(one.call.layer, len(one.k))), scores.scored


def _visible(tiles: QueryTiles, q: Tensor, k: Tensor) -> Tensor:
    i, j = positions(q, k, _place(tiles))
    return j <= i if tiles.causal else torch.ones_like(j <= i)


def _own(tiles: QueryTiles, q: Tensor, k: Tensor) -> Tensor:
    """Bool [N, M]."""
    i, j = positions(q, k, _place(tiles))
    begin = i // tiles.height * tiles.height
    if tiles.causal:
        return (begin <= j) & (j <= i)
    tail = j >= tiles.num_keys // tiles.block * tiles.block
    return ((begin <= j) & (j < begin + tiles.height)) | tail


def _place(tiles: QueryTiles) -> Call:
    return Call(causal=tiles.causal, scale=1.0, seed=0, layer=0, start=tiles.start)


def _by_key(chosen: Tensor, tiles: QueryTiles, group: int, num_keys: int) -> Tensor:
    """Blocks of tiles and key heads as pairs of rows and query heads: bool [H, N, M]."""
    heights = torch.tensor(tiles.borders).diff()
    pairs = chosen.repeat_interleave(heights, 1).repeat_interleave(tiles.block, 2)
    keep = torch.zeros(len(chosen), pairs.shape[1], num_keys, dtype=torch.bool)
    keep[:, :, : pairs.shape[2]] = pairs
    return keep.repeat_interleave(group, 0)


def _skipped(logits: Tensor, own: Tensor, chosen: Tensor, tiles: QueryTiles, skip: float) -> Tensor:
    """Which chosen blocks matter little to every row of their tile and every head of their group."""
    group = len(logits) // len(chosen)
    listed = own | _by_key(chosen, tiles, group, logits.shape[2])
    best = logits.masked_fill(~listed, -math.inf).amax(-1)
    skipped = torch.zeros_like(chosen)
    for head, tile, block in chosen.nonzero().tolist():
        heads, rows = slice(head * group, (head + 1) * group), tiles.rows(tile)
        keys = slice(block * tiles.block, (block + 1) * tiles.block)
        weight = torch.exp(logits[heads, rows, keys].amax(-1) - best[heads, rows])
        skipped[head, tile, block] = bool((weight < skip).all())
    return skipped


@dataclass(frozen=True)
class _Kept:
    """``logits`` [H, N, M] of the ``pairs`` attended, -inf elsewhere; ``means`` [H, N, num_blocks]: the
    left-out blocks' mean keys with the weight of their L keys, -inf elsewhere."""

    logits: Tensor
    pairs: Tensor
    means: Tensor


def _left_out(one: OneSequence, chosen: Tensor, group: int) -> Tensor:
    tiles, heads = one.tiles, len(one.k) * group
    q = one.q.flatten(0, 1)
    means = q.new_full((heads, q.shape[1], tiles.num_blocks), -math.inf)
    left_out = tiles.candidates() & ~chosen
    for head, tile, block in left_out.nonzero().tolist():
        mean = one.k[head, block * tiles.block : (block + 1) * tiles.block].to(q.dtype).mean(0)
        own, rows = slice(head * group, (head + 1) * group), tiles.rows(tile)
        means[own, rows, block] = math.log(tiles.block) + one.call.scale * (q[own, rows] @ mean)
    return means


def _with_means(
    made: AttentionResult, kept: _Kept, one: OneSequence, v: Tensor, group: int
) -> AttentionResult:
    values = v[0].to(one.q.dtype)
    whole = values[:, : one.tiles.num_blocks * one.tiles.block]
    vmean = torch.unflatten(whole, 1, (one.tiles.num_blocks, one.tiles.block)).mean(2)
    logits = torch.cat([kept.logits, kept.means], -1)
    both = torch.cat([values, vmean], 1).repeat_interleave(group, 0)
    attended = torch.cat([kept.pairs, kept.means != -math.inf], -1)
    out = weighted(torch.softmax(logits, -1), both, attended)
    return replace(made, out=out[None].to(v.dtype), lse=torch.logsumexp(logits, -1)[None].float())


def _gated(
    made: AttentionResult,
    whole: AttentionResult,
    logits: Tensor,
    chosen: Tensor,
    one: OneSequence,
    v: Tensor,
    group: int,
) -> AttentionResult:
    """What the means move, ``whole`` - ``made``, times the gate of each tile and query head."""
    plain, moved = made.out[0].to(one.q.dtype), whole.out[0].to(one.q.dtype)
    out = plain.clone()
    for head in range(len(plain)):
        values = v[0, head // group].to(one.q.dtype)
        for tile in range(one.tiles.num_tiles):
            rows, blocks = one.tiles.rows(tile), chosen[head // group, tile].nonzero()[:, 0].tolist()
            slope = _slope(one, logits[head, rows], values, head, rows, blocks) if blocks else 1.0
            out[head, rows] += min(max(slope, 0.0), 1.0) ** 2 * (moved[head, rows] - plain[head, rows])
    return replace(whole, out=out[None].to(made.out.dtype))


def _slope(
    one: OneSequence, logits: Tensor, values: Tensor, head: int, rows: slice, blocks: list[int]
) -> float:
    """Least squares of c - o on m' - o over the rows of one tile and query head, weighted by c's share;
    ``logits`` [R, M] of the visible pairs."""
    L, group = one.tiles.block, one.q.shape[1]
    q = one.q[head // group, head % group, rows]
    pieces = [slice(b * L, (b + 1) * L) for b in blocks]
    listed, candidate = (
        torch.zeros(logits.shape[1], dtype=torch.bool),
        torch.zeros(logits.shape[1], dtype=torch.bool),
    )
    candidate[: one.tiles.num_blocks * L] = one.tiles.candidates()[_tile_of(one, rows)].repeat_interleave(L)
    for piece in pieces:
        listed[piece] = True
    by_block, by_own = (logits.masked_fill(~x, -math.inf) for x in (listed, ~candidate))
    keys = torch.stack([one.k[head // group, piece].to(q.dtype).mean(0) for piece in pieces])
    means = torch.stack([values[piece].mean(0) for piece in pieces])
    predicted = torch.softmax(one.call.scale * q @ keys.mT, -1) @ means
    from_chosen, from_own = (
        weighted(torch.softmax(x, -1), values, x != -math.inf) for x in (by_block, by_own)
    )
    share = torch.sigmoid(torch.logsumexp(by_block, -1) - torch.logsumexp(by_own, -1))[:, None]
    fit = share * (predicted - from_own) * (from_chosen - from_own)
    size = share * (predicted - from_own).square()
    sane = torch.isfinite(fit.sum(-1)) & torch.isfinite(size.sum(-1))
    return float(fit[sane].sum() / size[sane].sum()) if float(size[sane].sum()) > 0 else 1.0


def _tile_of(one: OneSequence, rows: slice) -> int:
    return one.tiles.borders.index(rows.start)
