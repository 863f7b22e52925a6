"""Softmax mass of key blocks as the mean row of each row group sees it.

    qbar_g = mean of the rows of group g,   P_gj = softmax over the visible keys j of scale <qbar_g, k_j>
    mass_tb = mean over the groups g of tile t and the heads of sum_{j in block b} P_gj

R ``pool_rows``; row group g = the call's rows at positions gR .. gR + R - 1, fewer where the call cuts it.
Visible are the keys up to the group's last row in the call; bidirectional, all. Candidates lie before the
tile, where every row sees them: keys that some rows of the group may not see are own keys, and inexact
through them is only the own mass. Rows are averaged and keys are not: a key that stands alone in its block (a
sink) counts in full; what is lost is how the rows of a group differ. A group of one row has its true mass.

One matrix product [N/R, D] x [D, M] per head: N M D / R multiplications (causal: half of them), and N M / R
exponentials.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.contract import CallShape
from kernels.math.query_tiles import QueryTiles, query_tiles
from kernels.math.selected import OneSequence
from kernels.math.selection import BlockScores

SCORE_BYTES = 8 << 20
"""Logits of row groups by keys that exist at once (and their softmax beside them)."""
ROWS_AT_ONCE = 2048
"""Rows whose groups run at once at most: memory grows with the keys alone, and where later groups see more
keys little is computed in vain beyond a group's last row."""
_FP32 = 4
_CHOICE = 48
"""A block of one tile while it is scored and chosen: its share, twice, and what a choice by mass adds up."""


def mean_query_scores(one: OneSequence, pool_rows: int) -> BlockScores:
    """Shares of every candidate block and of the own keys. ``pool_rows`` divides the tiles' height.

    A block is NaN for a tile where a logit of one of its keys is not finite, which other blocks do not feel.
    A call of one row also tells that row's log-sum-exp: every logit is known.
    """
    tiles, (Hk, G, num_rows, _) = one.tiles, one.q.shape
    groups = query_tiles(one.call, num_rows, tiles.num_keys, pool_rows, tiles.block)
    num_keys = tiles.start + num_rows if tiles.causal else tiles.num_keys
    if num_rows == 1:
        return _one_row(one, groups, num_keys)
    sums, scored = one.q.new_zeros(Hk, tiles.num_tiles, -(-num_keys // tiles.block)), 0
    for head in range(Hk):
        keys = one.k[head, :num_keys].to(one.q.dtype)
        for run in _runs(groups, G * num_keys * one.q.element_size()):
            _add_run(one, groups, head, keys, run, sums[head])
            scored += G * len(run) * _seen(groups, run, num_keys)
    return replace(_scores(one, groups, sums), scored=scored)


def _one_row(one: OneSequence, groups: QueryTiles, num_keys: int) -> BlockScores:
    """A single row is its own mean: all heads in one product."""
    keys = one.k[:, :num_keys].to(one.q.dtype)
    logits = torch.bmm(one.q[:, :, 0] * one.call.scale, keys.mT)
    lse = torch.logsumexp(logits, -1)
    weights, broken = _softmax(logits)
    sums = weights.sum(1, keepdim=True)
    if broken is not None:
        sums.masked_fill_(broken.any(1, keepdim=True), math.nan)
    scores = _scores(one, groups, _by_block(sums, one.tiles.block))
    return replace(scores, lse=lse[..., None], scored=logits.numel())


def _runs(groups: QueryTiles, group_bytes: int) -> Iterator[range]:
    """Neighbouring row groups whose logits, so many bytes a group, are made at once."""
    most = _at_once(group_bytes, groups.height)
    for begin in range(0, groups.num_tiles, most):
        yield range(begin, min(begin + most, groups.num_tiles))


def _at_once(group_bytes: int, pool_rows: int) -> int:
    return max(1, min(SCORE_BYTES // group_bytes, ROWS_AT_ONCE // pool_rows))


def _seen(groups: QueryTiles, run: range, num_keys: int) -> int:
    """Keys up to the last that the last of the groups sees."""
    return groups.start + groups.borders[run.stop] if groups.causal else num_keys


def _add_run(one: OneSequence, groups: QueryTiles, head: int, keys: Tensor, run: range, sums: Tensor) -> None:
    """Add what the groups give each block to the sums of their tiles, [num_tiles, blocks]."""
    means = _mean_rows(one.q[head], groups, run).mul_(one.call.scale)
    seen = _seen(groups, run, len(keys))
    logits = (means.flatten(0, 1) @ keys[:seen].mT).view(*means.shape[:2], seen)
    weights, broken = _softmax(logits, _later_keys(groups, run, seen, logits.device))  # [groups, G, seen]
    for tile, members in groupby(run, lambda g: _tile_of(groups, one.tiles, g)):
        mine = [g - run.start for g in members]
        of_tile = slice(mine[0], mine[-1] + 1)
        shares = weights[of_tile].flatten(0, 1).sum(0)
        if broken is not None:
            shares.masked_fill_(broken[of_tile].flatten(0, 1).any(0), math.nan)
        blocks = _by_block(shares, one.tiles.block)
        sums[tile, : len(blocks)] += blocks


def _mean_rows(q: Tensor, groups: QueryTiles, run: range) -> Tensor:
    """q [G, N, D] -> the mean of the rows that each group has, [groups, G, D]: the rows of a tile's
    logits then lie together, and their sum is one pass."""
    begin, stop = groups.borders[run.start], groups.borders[run.stop]
    before, after = (groups.start + begin) % groups.height, -(groups.start + stop) % groups.height
    rows = q[:, begin:stop]
    if before or after:
        rows = F.pad(rows, (0, 0, before, after))
    heights = torch.tensor(groups.borders[run.start : run.stop + 1]).diff()
    sums = torch.unflatten(rows, 1, (-1, groups.height)).sum(2)
    return sums.div_(heights[:, None].to(rows)).transpose(0, 1)


def _later_keys(groups: QueryTiles, run: range, seen: int, device: torch.device) -> Tensor | None:
    """Which of the last keys each group may not see: bool [groups, 1, as many as the first group may not]."""
    if not groups.causal:
        return None
    stops = groups.start + torch.tensor(groups.borders[run.start + 1 : run.stop + 1], device=device)
    first = groups.start + groups.borders[run.start + 1]
    return torch.arange(first, seen, device=device) >= stops[:, None, None]


def _softmax(logits: Tensor, later: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Softmax over the keys that are seen and whose logit is finite; and where one that is seen is not (None:
    nowhere). Overwrites the logits."""
    broken = None if math.isfinite(float(logits.sum())) else ~torch.isfinite(logits)
    if later is not None:
        unseen = slice(logits.shape[-1] - later.shape[-1], None)
        logits[..., unseen].masked_fill_(later, -math.inf)
        if broken is not None:
            broken[..., unseen] &= ~later
    if broken is None:
        return torch.softmax(logits, -1), None
    return torch.softmax(logits.masked_fill_(broken, -math.inf), -1), broken


def _by_block(keys: Tensor, block: int) -> Tensor:
    """Shares of keys [..., M] summed to blocks, a last cut one too."""
    return torch.unflatten(F.pad(keys, (0, -keys.shape[-1] % block)), -1, (-1, block)).sum(-1)


def _tile_of(groups: QueryTiles, tiles: QueryTiles, group: int) -> int:
    return groups.first_key(group) // tiles.height - tiles.start // tiles.height


def _scores(one: OneSequence, groups: QueryTiles, sums: Tensor) -> BlockScores:
    """Sums of blocks [Hk, num_tiles, blocks] as means, parted into candidates and own keys.

    Divided at the end: where a softmax is all or nothing the sums are whole numbers, and ties stay ties.
    """
    tiles = one.tiles
    owners = torch.tensor([_tile_of(groups, tiles, group) for group in range(groups.num_tiles)])
    blocks = sums.cpu() / (torch.bincount(owners) * one.q.shape[1])[:, None]
    candidates = F.pad(tiles.candidates(), (0, blocks.shape[-1] - tiles.num_blocks))
    return BlockScores(blocks[..., : tiles.num_blocks], blocks.masked_fill(candidates, 0.0).sum(-1))


def scoring_bytes(shape: CallShape, query_tile: int, block_size: int, pool_rows: int) -> int:
    """What a scoring takes at its largest moment: logits and their softmax, the keys where they are not fp32
    (of one head; of all for a single row), and the table of blocks with what the choice makes of it."""
    group = shape.num_heads // shape.num_kv_heads * shape.num_keys * _FP32
    groups = min(-(-shape.num_rows // pool_rows), _at_once(group, pool_rows))
    heads = shape.num_kv_heads if shape.num_rows == 1 else 1
    keys = heads * shape.num_keys * shape.key_dim * _FP32 if shape.itemsize < _FP32 else 0
    tiles = -(-shape.num_rows // query_tile) + 1
    table = shape.num_kv_heads * tiles * -(-shape.num_keys // block_size) * _CHOICE
    return 2 * heads * groups * group + keys + table
