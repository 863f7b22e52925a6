"""Decode of rows over their own keys and pages chosen for them, many sequences at once, on the device.

    p = softmax of [scale q K_own^T | scale q K_chosen^T]        (and left-out pages as their means, if asked)

Scores, choice (``paged_choice``) and attention (``paged_decode``) follow each other without a number read
back; the shares that were left out are read once, at the end, for the account.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from kernels._triton.operands import keys_of_segments
from kernels._triton.paged_choice import COLUMNS, Candidates, Choice, Scoring, choose_pages
from kernels._triton.paged_decode import Pages, Queries, decode
from kernels._triton.paged_plan import DecodePlan, Run, plan_runs
from kernels._triton.paged_rows import packed_queries
from kernels._triton.targets import target_of
from kernels.contract import Segment
from kernels.math.remainder import gate, share_or_bound
from kernels.math.selection import TileParams
from kernels.math.summaries import BlockSummaries, Summary


@dataclass(frozen=True)
class SelectedRows:
    """``out`` [R, H, Dv] fp32, ``lse`` and ``dropped`` [R, H] fp32."""

    out: Tensor
    lse: Tensor
    dropped: Tensor


def attend_selected(
    q: Tensor,
    segments: Sequence[Segment],
    params: TileParams,
    scoring: Scoring,
    num_chosen: int,
    scale: float,
    *,
    knows_every_logit: bool,
) -> SelectedRows:
    """q [1, H, S, D], a row of each segment, which keeps its own tile and ``num_chosen`` blocks before it;
    all of them where there are no more. ``knows_every_logit``: the scoring reads every key, and what is
    dropped is known exactly."""
    step = _Step(q, segments, params, num_chosen, scale)
    if not step.some.rows:
        return SelectedRows(*step.over_own(), step.nothing_dropped())
    known = step.some.summaries(params.block_size)
    where = _candidates(step.some, known, params.block_size, scoring)
    choice = choose_pages(step.asking(), where, scoring, num_chosen, scale, target_of(q.device))
    out, lse = step.over_chosen(choice.chosen)
    dropped = step.nothing_dropped()
    dropped[step.places] = _share(choice, lse[step.places], knows_every_logit)
    if params.remainder != "none":
        own = step.over_own() if params.remainder == "gated" else None
        _add_remainder(out, lse, step.some, known, choice, own)
    return SelectedRows(out, lse, dropped)


def _share(choice: Choice, kept: Tensor, knows_every_logit: bool) -> Tensor:
    """Of the mass that rows of log-sum-exp ``kept`` left out."""
    if knows_every_logit:
        return share_or_bound(-torch.expm1(kept - choice.every), kept).clamp_(0.0, 1.0)
    return share_or_bound(torch.sigmoid(choice.left - kept), kept)


@dataclass(frozen=True)
class _Some:
    """The rows that have something to choose, and how many blocks each may choose from."""

    rows: list[int]
    segments: list[Segment]
    blocks: list[int]

    def summaries(self, block: int) -> list[Summary]:
        return [
            (segment.summaries or BlockSummaries()).get(segment.k[0], segment.v[0], block, blocks)
            for segment, blocks in zip(self.segments, self.blocks, strict=True)
        ]


class _Step:
    """All rows of a decode step: which of them choose, and the launches over what they keep."""

    def __init__(
        self, q: Tensor, segments: Sequence[Segment], params: TileParams, num_chosen: int, scale: float
    ) -> None:
        self.keys, self.scale = keys_of_segments(segments), scale
        self.queries = replace(packed_queries(q, self.keys.num_heads), dtype=torch.float32)
        self.num_rows, self.block, self.num_chosen = len(segments), params.block_size, num_chosen
        height = params.query_tile
        most = [segment.start // height * height // self.block for segment in segments]
        rows = [row for row, blocks in enumerate(most) if blocks > num_chosen]
        self.some = _Some(rows, [segments[row] for row in rows], [most[row] for row in rows])
        first = {row: blocks * self.block for row, blocks in zip(rows, self.some.blocks, strict=True)}
        self.own = [_own_run(row, first.get(row, 0), one.start) for row, one in enumerate(segments)]

    @cached_property
    def places(self) -> Tensor | slice:
        """Of the rows that choose."""
        if len(self.some.rows) == self.num_rows:
            return slice(None)
        return torch.tensor(self.some.rows).to(self.queries.q.device, non_blocking=True)

    def asking(self) -> Queries:
        """The rows that choose."""
        return replace(self.queries, q=self.queries.q[self.places])

    def nothing_dropped(self) -> Tensor:
        return torch.zeros(self.num_rows, self.queries.num_heads, device=self.queries.q.device)

    def over_own(self) -> tuple[Tensor, Tensor]:
        """Own keys alone, or everything where a row has nothing to choose."""
        return decode(self.queries, self.keys, self._plan(self.own), self.scale)

    def over_chosen(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Own keys and the pages of ``chosen`` [rows that choose, Hk, count]."""
        if self.num_chosen == 0:
            return self.over_own()
        count = self.num_chosen * self.block
        listed = [(row, 0, 1, count, place) for place, row in enumerate(self.some.rows)]
        plan = self._plan(sorted(self.own + listed, key=lambda run: run[0]))
        return decode(self.queries, self.keys, plan, self.scale, Pages(chosen, self.block))

    def _plan(self, runs: Sequence[Run]) -> DecodePlan:
        return plan_runs(runs, self.num_rows, self.keys.num_heads, self.queries.q.device)


def _own_run(row: int, first: int, start: int) -> Run:
    return row, first, 1, start + 1 - first, -1


def _candidates(some: _Some, known: Sequence[Summary], block: int, scoring: Scoring) -> Candidates:
    """Where the kernels find what is known of the rows' blocks, and their keys."""
    bounds, kmean, k = known[0].bounds, known[0].kmean, some.segments[0].k
    table, most = [], 0
    for segment, summary, blocks in zip(some.segments, known, some.blocks, strict=True):
        step, start = scoring.step, segment.start
        first, cells, stop = 0, 0, blocks
        if step is not None:
            first, cells = step - 1 - start % step, start // step + 1
            stop = start // block + 1
        most = max(most, stop)
        table.append(
            [
                _distance(summary.bounds, bounds),
                summary.bounds.stride(0),
                _distance(summary.kmean, kmean),
                summary.kmean.stride(0),
                _distance(segment.k, k),
                segment.k.stride(1),
                segment.k.stride(2),
                first,
                start,
                cells,
                blocks,
                stop,
            ]
        )
    assert len(table[0]) == COLUMNS
    told = torch.tensor(table, dtype=torch.int64).to(k.device, non_blocking=True)
    align = 16 // k.element_size()
    dense = k.data_ptr() % 16 == 0 and all(value % align == 0 for row in table for value in row[4:7])
    return Candidates(bounds, kmean, k, told, most, block, align if dense else 1)


def _distance(tensor: Tensor, base: Tensor) -> int:
    return (tensor.data_ptr() - base.data_ptr()) // tensor.element_size()


def _add_remainder(
    out: Tensor,
    lse: Tensor,
    some: _Some,
    known: Sequence[Summary],
    choice: Choice,
    only_own: tuple[Tensor, Tensor] | None,
) -> None:
    """Left-out pages as their means, sequence by sequence; gated where ``only_own`` (out and lse of the own
    keys) is given."""
    num_key_heads = choice.chosen.shape[1]
    for place, (row, summary, blocks) in enumerate(zip(some.rows, known, some.blocks, strict=True)):
        means = torch.unflatten(choice.means[place, :, :blocks], 0, (num_key_heads, -1))
        listed = choice.chosen[place].long()[:, None].expand(-1, means.shape[1], -1)
        left = means.scatter(-1, listed, -math.inf)
        lse_left, kept = (
            torch.unflatten(choice.left[place], 0, (num_key_heads, -1)),
            lse[row].view(left.shape[:2]),
        )
        share = torch.sigmoid(lse_left - kept).unsqueeze(-1)
        rows = out[row].view(*left.shape[:2], -1)
        moved = share
        if only_own is not None:
            own, own_lse = only_own[0][row].view_as(rows), only_own[1][row].view_as(kept)
            of_chosen = torch.full_like(means, -math.inf).scatter_(-1, listed, means.gather(-1, listed))
            predicted = _over_means(of_chosen, summary) if listed.shape[-1] else rows
            weight = -torch.expm1(own_lse - kept).unsqueeze(-1)
            m, o, c = (x.unsqueeze(-2) for x in (predicted, own, rows))
            moved = share * gate(m, o, c, weight if listed.shape[-1] else torch.zeros_like(weight))[..., 0]
        rows.copy_(torch.lerp(rows, _over_means(left, summary), moved))
        kept.copy_(torch.logaddexp(kept, lse_left))


def _over_means(logits: Tensor, known: Summary) -> Tensor:
    return torch.bmm(torch.softmax(logits, -1), known.vmean)
