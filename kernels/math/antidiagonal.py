"""Softmax mass of key blocks from antidiagonal sums: the scoring of XAttention.

    s_gc = scale / n_g * sum_a <q_(gS + a), k_(cS + S - 1 - a)>,   P_g = softmax over cells c of s_gc
    mass_tb = mean over the groups g of tile t and the heads of sum_{c in block b} P_gc

S ``stride``; row group g = rows of the call at positions gS .. gS + S - 1, n_g of them; key cell c = keys at
cS .. cS + S - 1; causal: c <= g. Xu et al., "XAttention: block sparse attention with antidiagonal scoring"
(arXiv 2503.16428), section 2. Of a cell's S x S logits one antidiagonal is summed, which meets every row and
every key once: with the rows of a group reversed it is one product of vectors of S D numbers, and a head's
scores are one matrix product [N/S, S D] x [S D, M/S] of N M D / S multiplications (causal: half of it).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.contract import CallShape
from kernels.math.query_tiles import QueryTiles
from kernels.math.selected import OneSequence
from kernels.math.selection import BlockScores

SCORE_BYTES = 8 << 20
"""Scores of row groups by key cells that exist at once (and their softmax beside them)."""
CAUSAL_GROUPS = 256
"""Row groups at once at most where later ones see more cells: what lies beyond a group's own cell is computed
in vain."""
_FP32 = 4
_CHOICE = 4 + 4 + 8 + 4 * 8
"""A block's share, its rank among its tile's, and what a choice by mass adds up in fp64."""


@dataclass(frozen=True)
class _Grid:
    """Groups and cells of one call. ``num_keys``: keys that some row may see."""

    tiles: QueryTiles
    stride: int
    num_rows: int
    num_keys: int

    @property
    def first_group(self) -> int:
        return self.tiles.start // self.stride

    @property
    def num_groups(self) -> int:
        return (self.tiles.start + self.num_rows - 1) // self.stride + 1 - self.first_group

    @property
    def num_cells(self) -> int:
        return -(-self.num_keys // self.stride)

    def cells_seen(self, last_group: int) -> int:
        """Cells that the groups up to number ``last_group`` (of the call) look at."""
        return min(self.num_cells, self.first_group + last_group + 1) if self.tiles.causal else self.num_cells

    def rows_in_group(self) -> Tensor:
        """[num_groups]."""
        counts = torch.full((self.num_groups,), self.stride)
        counts[0] -= self.tiles.start % self.stride
        counts[-1] -= -(self.tiles.start + self.num_rows) % self.stride
        return counts

    def tile_of_group(self) -> Tensor:
        """Tile of the call that each group belongs to, [num_groups]."""
        absolute = (self.first_group + torch.arange(self.num_groups)) * self.stride // self.tiles.height
        return absolute - self.tiles.start // self.tiles.height


def antidiagonal_scores(one: OneSequence, stride: int) -> BlockScores:
    """Shares of every candidate block and of the own keys. ``stride`` divides tiles and blocks."""
    num_rows = one.q.shape[2]
    num_keys = one.tiles.start + num_rows if one.tiles.causal else one.tiles.num_keys
    grid = _Grid(one.tiles, stride, num_rows, num_keys)
    if num_rows == 1:
        num_read = len(range(_first_read(grid), num_keys, stride))
        scored = len(one.k) * one.q.shape[1] * num_read
        return _scores(one, grid, _by_block(grid, *_row_shares(one, grid)), scored)
    num_blocks, scored = -(-num_keys // one.tiles.block), 0
    shares = one.q.new_zeros(len(one.k), one.tiles.num_tiles, num_blocks)
    for head in range(len(one.k)):
        for groups in _group_runs(grid, one.q.shape[1], one.q.element_size()):
            _add_run(one, grid, head, groups, shares[head])
            scored += one.q.shape[1] * len(groups) * grid.cells_seen(groups[-1]) * stride
    return _scores(one, grid, shares, scored)


def _first_read(grid: _Grid) -> int:
    """The first key that a single row reads: one of each cell."""
    return grid.stride - 1 - grid.tiles.start % grid.stride


def _row_shares(one: OneSequence, grid: _Grid) -> tuple[Tensor, Tensor]:
    """A single row's group reads one key of each cell: [Hk, 1, cells] summed over the group's heads, and what
    was not finite."""
    keys = one.k[:, _first_read(grid) : grid.num_keys : grid.stride].to(one.q.dtype)
    logits = torch.bmm(one.q[:, :, 0] * one.call.scale, keys.mT)
    logits = F.pad(logits, (0, grid.num_cells - logits.shape[-1]))
    broken = _put_aside(logits)
    return torch.softmax(logits, -1).sum(1, keepdim=True), broken.any(1, keepdim=True)


def _group_runs(grid: _Grid, group: int, itemsize: int) -> Iterator[range]:
    """Neighbouring row groups whose scores are made at once."""
    most = max(1, SCORE_BYTES // (group * grid.num_cells * itemsize))
    if grid.tiles.causal:
        most = min(most, CAUSAL_GROUPS)
    for begin in range(0, grid.num_groups, most):
        yield range(begin, min(begin + most, grid.num_groups))


def _add_run(one: OneSequence, grid: _Grid, head: int, groups: range, shares: Tensor) -> None:
    """Add what the groups give each block to the sums of their tiles, [num_tiles, blocks]."""
    seen = grid.cells_seen(groups[-1])
    logits = _logits(one, grid, head, groups, seen)
    tiles, member = _members(grid, groups, logits)
    finite = math.isfinite(float(logits.sum()))
    if one.tiles.causal:
        first = grid.first_group + groups[0]
        later = torch.ones(len(groups), seen - first, dtype=torch.bool, device=logits.device).triu_(1)
        logits[:, :, first:].masked_fill_(later, 0.0 if not finite else -math.inf)
    broken = None
    if not finite:
        found = _put_aside(logits)
        if one.tiles.causal:
            logits[:, :, first:].masked_fill_(later, -math.inf)
        broken = member @ found.any(0).to(logits.dtype) > 0
    cells = member @ torch.softmax(logits, -1).sum(0).nan_to_num_(nan=0.0)
    blocks = _by_block(grid, cells, broken)
    shares[tiles, : blocks.shape[-1]] += blocks


def _logits(one: OneSequence, grid: _Grid, head: int, groups: range, seen: int) -> Tensor:
    """s_gc of one key head's query heads, [G, groups, seen cells]."""
    rows = _reversed_groups(one.q[head], grid, groups)
    rows *= one.call.scale / grid.rows_in_group()[groups.start : groups.stop, None].to(rows)
    whole = min(seen, grid.num_keys // grid.stride)
    flat = rows.flatten(0, 1)
    logits = flat @ _cells(one.k[head, : whole * grid.stride], grid.stride, flat.dtype).mT
    if whole < seen:
        last = _cells(one.k[head, whole * grid.stride : grid.num_keys], grid.stride, flat.dtype)
        logits = torch.cat([logits, flat @ last.mT], 1)
    return logits.view(*rows.shape[:2], seen)


def _cells(keys: Tensor, stride: int, dtype: torch.dtype) -> Tensor:
    """[M, D] as [ceil(M / S), S * D]: a view where rows are dense, a last cut cell filled with zeros."""
    short = -len(keys) % stride
    keys = F.pad(keys, (0, 0, 0, short)) if short else keys
    return keys.to(dtype).reshape(-1, stride * keys.shape[1])


def _reversed_groups(q: Tensor, grid: _Grid, groups: range) -> Tensor:
    """The groups' rows, last first, [G, groups, S * D]; rows that the call does not have are zero."""
    S, offset = grid.stride, grid.tiles.start % grid.stride
    begin, stop = groups.start * S - offset, groups.stop * S - offset
    rows = q[:, max(begin, 0) : min(stop, grid.num_rows)]
    if begin < 0 or stop > grid.num_rows:
        rows = F.pad(rows, (0, 0, max(-begin, 0), max(stop - grid.num_rows, 0)))
    return rows.reshape(len(q), len(groups), S, -1).flip(2).flatten(2)


def _members(grid: _Grid, groups: range, like: Tensor) -> tuple[slice, Tensor]:
    """The tiles that the groups belong to, and which of them each does: [tiles, groups], 1 or 0."""
    mine = grid.tile_of_group()[groups.start : groups.stop]
    tiles = torch.arange(int(mine[0]), int(mine[-1]) + 1)
    return slice(int(mine[0]), int(mine[-1]) + 1), (tiles[:, None] == mine).to(like)


def _put_aside(logits: Tensor) -> Tensor:
    """Take what is not finite out of the softmax, in place; True where it was."""
    broken = ~torch.isfinite(logits)
    logits.masked_fill_(broken, -math.inf)
    return broken


def _by_block(grid: _Grid, cells: Tensor, broken: Tensor | None) -> Tensor:
    """Shares of cells [..., cells] summed to blocks; NaN where a cell was not finite."""
    per_block = grid.tiles.block // grid.stride
    if broken is not None:
        cells = cells.masked_fill(broken, math.nan)
    return torch.unflatten(F.pad(cells, (0, -cells.shape[-1] % per_block)), -1, (-1, per_block)).sum(-1)


def _scores(one: OneSequence, grid: _Grid, sums: Tensor, scored: int) -> BlockScores:
    """Sums of blocks [Hk, num_tiles, blocks], cut ones too, as means, parted into candidates and own keys.

    Divided at the end: where a softmax is all or nothing the sums are whole numbers, and ties stay ties.
    """
    blocks = sums.cpu() / (torch.bincount(grid.tile_of_group()) * one.q.shape[1])[:, None]
    candidates = F.pad(one.tiles.candidates(), (0, blocks.shape[-1] - one.tiles.num_blocks))
    own = blocks.masked_fill(candidates, 0.0).sum(-1)
    return BlockScores(blocks[..., : one.tiles.num_blocks], own, scored=scored)


def scoring_bytes(shape: CallShape, query_tile: int, block_size: int, stride: int) -> int:
    """What a scoring takes at its largest moment: scores and their softmax, the reversed rows, the keys where
    they are not dense in fp32, and the table of blocks with what the choice makes of it."""
    cells = -(-shape.num_keys // stride)
    group = shape.num_heads // shape.num_kv_heads
    scores = max(SCORE_BYTES, group * cells * _FP32)
    scores = min(scores, group * -(-shape.num_rows // stride) * cells * _FP32)
    groups = scores // (group * cells * _FP32) + 2
    rows = group * groups * stride * shape.key_dim * _FP32
    tiles = -(-shape.num_rows // query_tile) + 1
    table = shape.num_kv_heads * tiles * -(-shape.num_keys // block_size) * _CHOICE
    return 2 * scores + 2 * rows + shape.num_keys * shape.key_dim * _FP32 + table
