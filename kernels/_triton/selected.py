"""Attention over key blocks that are chosen per query tile, without asking the device for anything on the
way: ``kernels.math.selected`` as a queue of launches.

    own keys, sums of blocks, shares, choice, lists, [skipped], chosen blocks, means of what is left out

Which sets are listed is what ``kernels.math.selection`` says of the same scores; scores differ from torch's
by rounding alone. Lists have room for every candidate that could be chosen; how many were is read for
``Stats``, after everything has been launched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from kernels._triton.antidiagonal import Items, antidiagonal_items, mean_items
from kernels._triton.block_sparse import Lists, Table, Tiles, launch_on, rows_for, tiles_of
from kernels._triton.operands import keys_of_call
from kernels._triton.selected_means import Task, gate_of, over_means
from kernels._triton.selected_rows import RowTiles, row_tiles
from kernels._triton.selected_skip import row_best, skip_blocks
from kernels._triton.selection import Choice, Scores, choose_blocks, entries_of, tile_scores
from kernels._triton.spans import add_tables, tables_for
from kernels.contract import AttentionResult, Call
from kernels.math.accumulate import accumulator, result
from kernels.math.cache import PLANS
from kernels.math.query_tiles import QueryTiles, query_tiles
from kernels.math.remainder import share_or_bound
from kernels.math.selection import Keep, TileParams
from kernels.math.summaries import BlockSummaries, Summary


@dataclass(frozen=True)
class Sequence:
    """One batch entry: q [H, N, D] and k [Hk, M, D], v [Hk, M, Dv] as they are, out [H, N, Dv] and lse [H, N]
    of its rows in fp32."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    tiles: QueryTiles
    call: Call

    @property
    def num_keys(self) -> int:
        """Keys that some row may see."""
        return self.tiles.start + self.q.shape[1] if self.tiles.causal else self.tiles.num_keys

    @property
    def group(self) -> int:
        return len(self.q) // len(self.k)

    def rows(self) -> RowTiles:
        return row_tiles(self.tiles, self.group, max(self.q.shape[2], self.v.shape[2]), self.q.device)

    def summary(self) -> Summary:
        kept = self.call.summaries or BlockSummaries()
        return kept.get(self.k, self.v, self.tiles.block, self.tiles.num_blocks)


Score = Callable[[Sequence], Scores]


def antidiagonal(stride: int) -> Score:
    """Scores of xattention."""

    def score(one: Sequence) -> Scores:
        return _scores(
            one, antidiagonal_items(one.q, one.k, stride, one.tiles.start, one.num_keys, one.tiles.causal)
        )

    return score


def mean_query(height: int) -> Score:
    """Scores of pooled. A single row is its own mean."""

    def score(one: Sequence) -> Scores:
        if one.q.shape[1] == 1:
            return every_logit(one)
        return _scores(one, mean_items(one.q, one.k, height, one.tiles.start, one.num_keys, one.tiles.causal))

    return score


def every_logit(one: Sequence) -> Scores:
    """Scores of topk, and each row's log-sum-exp over all that it sees."""
    items = antidiagonal_items(one.q, one.k, 1, one.tiles.start, one.num_keys, one.tiles.causal)
    return _scores(one, items, wants_lse=True)


def _scores(one: Sequence, items: Items, *, wants_lse: bool = False) -> Scores:
    return tile_scores(items, one.tiles, one.call.scale, wants_lse=wants_lse)


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    params: TileParams,
    call: Call,
    score: Score,
    *,
    first_block: bool = False,
    knows_every_logit: bool = False,
) -> AttentionResult:
    """A whole call: q [B, H, N, D], k [B, Hk, M, D], v [B, Hk, M, Dv]. As ``kernels.math.selected`` says.

    ``first_block``: ``BlockScores.first_block``. Raises ValueError for lists of another length than the
    model's.
    """
    began = perf_counter()
    acc = accumulator(q, k, v, call)
    tiles = query_tiles(call, q.shape[2], k.shape[2], params.query_tile, params.block_size)
    keep = _per_head(params.keep(call.layer, k.shape[1]), k.shape[1])
    add_tables(acc, tables_for(acc, tiles.own_keys()))
    dropped, kept = torch.zeros_like(acc.lse), []
    candidates = tiles.num_candidates()
    if int(candidates.max()) > 0:
        for b in range(len(q)):
            rows = acc.out[b].flatten(0, 1), acc.lse[b].flatten(0, 1)
            one = Sequence(q[b], k[b], v[b], *rows, tiles, call)
            step = _Selection(one, params, keep, candidates, knows_every_logit)
            dropped[b] = step.run(score, first_block).view_as(dropped[b])
            acc.scored += step.scored
            kept.append(step.listed_pairs())
    listed = int(torch.stack(kept).sum()) if kept else 0
    acc.kept += listed
    acc.computed += listed
    return result(acc, q, began, dropped=dropped)


def _per_head(keep: Keep, heads: int) -> Keep:
    """An entry for every key head, where one stood for all."""
    if keep.blocks is not None:
        return Keep(blocks=keep.blocks * (heads // len(keep.blocks)))
    assert keep.mass is not None
    return Keep(mass=keep.mass * (heads // len(keep.mass)))


class _Selection:
    """One sequence from scores to merged rows."""

    def __init__(
        self, one: Sequence, params: TileParams, keep: Keep, candidates: Tensor, knows_every_logit: bool
    ) -> None:
        self.one, self.params, self.keep, self.candidates = one, params, keep, candidates
        self.covered = keep.covers(int(candidates.max()))
        self.must_score = knows_every_logit and params.skip > 0
        self.scored = 0
        self.counts = one.lse

    def run(self, score: Score, first_block: bool) -> Tensor:
        """Adds what is chosen to the rows; dropped [H, N]."""
        one, tiles = self.one, self.one.tiles
        scores = None if self.covered and not self.must_score else score(one)
        self.scored = 0 if scores is None else scores.scored
        mass = None if self.covered or scores is None else scores.mass
        choice = choose_blocks(
            one.q.device, len(one.k), mass, tiles, self.keep, one.num_keys, first_block=first_block
        )
        indptr, entries = entries_of(choice, tiles.block, self._most())
        if self.params.skip > 0:
            self._skip(choice, indptr, entries)
            indptr, entries = entries_of(choice, tiles.block, self._most())
        self.counts = choice.counts
        own = self._own_part()
        self._add_listed(indptr, entries)
        if self.covered and self.params.skip == 0:
            return torch.zeros_like(one.lse)
        return self._left_out(choice, scores, own)

    def _most(self) -> int:
        """Blocks that can be listed at most, over heads."""
        if self.keep.blocks is None:
            return len(self.one.k) * int(self.candidates.sum())
        return sum(int(self.candidates.clamp(max=blocks).sum()) for blocks in self.keep.blocks)

    def _own_part(self) -> tuple[Tensor, Tensor] | None:
        """The rows as they are now, where a gate will ask for them."""
        if self.params.remainder != "gated" or (self.covered and self.params.skip == 0):
            return None
        return self.one.out.clone(), self.one.lse.clone()

    def _skip(self, choice: Choice, indptr: Tensor, entries: Tensor) -> None:
        one, rows = self.one, self.one.rows()
        best = torch.empty_like(one.lse)
        borders = _on_device(one.tiles.borders, one.q.device)
        given = one.q, one.k, entries, indptr, one.tiles, rows, one.call.scale, best
        row_best(*given).run()
        skip_blocks(*given, borders, choice.table, choice.counts, self.params.skip).run()

    def _add_listed(self, indptr: Tensor, entries: Tensor) -> None:
        one, sizes = self.one, (len(self.one.k), self.one.group)
        height = rows_for(one.q[None], len(one.k), max(one.q.shape[2], one.v.shape[2]))
        kernel_tiles = tiles_of(one.tiles.borders, height, one.q.device)
        lists = Lists(
            one.tiles.block,
            full_indptr=indptr,
            full=entries,
            order=_longest_first(self.counts, kernel_tiles),
            whole=True,
        )
        keys = keys_of_call(one.k[None], one.v[None], one.call)
        q, out, lse = (x.unflatten(0, sizes)[None] for x in (one.q, one.out, one.lse))
        launch_on(q, out, lse, keys, kernel_tiles, lists, scale=one.call.scale, filled=True).run()

    def _left_out(self, choice: Choice, scores: Scores | None, own: tuple[Tensor, Tensor] | None) -> Tensor:
        """Merge the blocks that are not listed, if the params say so; their share of the mass."""
        one, merge = self.one, self.params.remainder != "none"
        exact = None
        if scores is not None and scores.lse is not None:
            share = -torch.expm1(one.lse - scores.lse)
            exact = share_or_bound(share, one.lse).clamp_(0.0, 1.0)
        if exact is None or merge:
            dropped = self._over_means(choice, own)
        return dropped if exact is None else exact

    def _over_means(self, choice: Choice, own: tuple[Tensor, Tensor] | None) -> Tensor:
        one, gate = self.one, None
        known, rows, dropped = one.summary(), one.rows(), torch.empty_like(one.lse)
        given = one.q, one.out, one.lse, known, choice.table, one.tiles, rows, one.call.scale
        if own is not None:
            fit, size = torch.empty_like(dropped), torch.empty_like(dropped)
            over_means("fit", *given, fit, own=own, size=size).run()
            gate = gate_of(fit, size, one.tiles)
        task: Task = "share" if self.params.remainder == "none" else "merge"
        over_means(task, *given, dropped, gate=gate).run()
        return dropped

    def listed_pairs(self) -> Tensor:
        """Pairs of the chosen blocks, over query heads: one number, still on the device."""
        tiles = self.one.tiles
        heights = torch.tensor(tiles.borders).diff().to(self.counts.device, non_blocking=True)
        return (self.counts * heights).sum() * tiles.block * self.one.group


def _on_device(borders: tuple[int, ...], device: torch.device) -> Tensor:
    def build() -> Table:
        return Table(torch.tensor(borders, dtype=torch.int32).to(device, non_blocking=True))

    return PLANS.get(("borders", borders, device), build).tensor


def _longest_first(counts: Tensor, tiles: Tiles) -> Tensor:
    """Kernel tiles by the lengths of their lists, int32 [Hk, T]."""
    lengths = counts.index_select(1, tiles.table[:, 3])
    return lengths.argsort(dim=1, descending=True, stable=True).int()
