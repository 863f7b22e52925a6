"""One query row over its own keys and chosen key blocks: a decode step, in one softmax.

    p = softmax of [scale q K_own^T | scale q K_chosen^T | log L + scale q kmean_left^T]
    out = p [V_own; V_chosen; vmean_left]        (gated: see ``kernels.math.remainder``)

The third part only where the params ask for a remainder. Reads the keys of the own tile and of the chosen
blocks and, of all others, what their summaries say: the same mathematics as ``kernels.math.selected`` without
its tables, lists and merges, which for one row would cost more than the attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.contract import AttentionResult, Call, PackedResult, Segment, Stats
from kernels.math.decode import softmax_lse
from kernels.math.dense import accumulator_dtype, grouped
from kernels.math.remainder import gate, share_or_bound
from kernels.math.selection import TileParams
from kernels.math.summaries import BlockSummaries, Summary

if TYPE_CHECKING:
    from kernels._triton.paged_selected import SelectedRows

ScoreRow = Callable[[Tensor, Summary, float], tuple[Tensor, int]]
"""q [Hk, G, 1, D], the summary of the candidates, scale -> scores [Hk, P] by which blocks are chosen, +inf
for those that are to be kept before all others, never NaN; and what they took (``Stats.pairs_scored``)."""


@dataclass(frozen=True)
class RowScoring:
    """How kernels score a single row's blocks: by the bounds of their keys (``step`` None), or by the logits
    of every ``step``-th key. ``first_block`` is chosen before others of finite score; ``knows_every_logit``:
    what is dropped is known exactly."""

    step: int | None
    first_block: bool = False
    knows_every_logit: bool = False

    def scored(self, num_heads: int, start: int, num_blocks: int) -> int:
        """As ``Stats.pairs_scored`` counts: a bound takes two products of D numbers."""
        if self.step is None:
            return 2 * num_heads * num_blocks
        return num_heads * len(range(self.step - 1 - start % self.step, start + 1, self.step))


def row_by_kernels(
    q: Tensor, k: Tensor, v: Tensor, params: TileParams, call: Call, scoring: RowScoring
) -> AttentionResult:
    """Impl ``triton`` on a call that ``runs_as_row`` admits."""
    segment = Segment(slice(0, 1), k, v, call.start, call.seed, call.summaries, call.kept)
    rows, stats = _rows_by_kernels(q, [segment], params, call, scoring)
    out = rows.out.to(q.dtype).unsqueeze(2)
    return AttentionResult(out, rows.lse.unsqueeze(2), stats[0], rows.dropped.unsqueeze(2))


def decode_selected(
    q: Tensor, segments: Sequence[Segment], params: TileParams, call: Call, scoring: RowScoring
) -> PackedResult | None:
    """Impl ``triton`` on one-row segments together, as ``contract.DecodeRows`` has it; None for impl torch
    and where key heads keep different amounts, or as much as a share of the mass takes, or skip blocks."""
    budgets = params.keep(call.layer, segments[0].k.shape[1]).blocks
    if call.impl != "triton" or params.skip > 0 or budgets is None or len(set(budgets)) > 1:
        return None
    rows, stats = _rows_by_kernels(q, segments, params, call, scoring)
    out = rows.out.to(q.dtype).transpose(0, 1).unsqueeze(0)
    return PackedResult(out, stats, tuple(rows.dropped[:, None, :, None].unbind(0)))


def _rows_by_kernels(
    q: Tensor, segments: Sequence[Segment], params: TileParams, call: Call, scoring: RowScoring
) -> tuple[SelectedRows, tuple[Stats, ...]]:
    """Everything is launched before the shares that were left out are read."""
    from kernels._triton.paged_choice import Scoring
    from kernels._triton.paged_selected import attend_selected

    began = perf_counter()
    budgets = params.keep(call.layer, segments[0].k.shape[1]).blocks
    assert budgets is not None
    rows = attend_selected(
        q,
        segments,
        params,
        Scoring(scoring.step, scoring.first_block),
        budgets[0],
        call.scale,
        knows_every_logit=scoring.knows_every_logit,
    )
    shares = rows.dropped.mean(1).tolist()
    spent_ms = (perf_counter() - began) * 1e3 / len(segments)
    stats = []
    for segment, share in zip(segments, shares, strict=True):
        own = _stats_of_row(q.shape[1], segment.start, params, budgets[0], scoring)
        stats.append(replace(own, compute_ms=spent_ms, dropped_mass=share))
    return rows, tuple(stats)


def _stats_of_row(num_heads: int, start: int, params: TileParams, budget: int, scoring: RowScoring) -> Stats:
    blocks = start // params.query_tile * params.query_tile // params.block_size
    left_out = max(blocks - budget, 0)
    kept = num_heads * (start + 1 - left_out * params.block_size)
    scored = scoring.scored(num_heads, start, blocks) if left_out else 0
    return Stats(kept, num_heads * (start + 1), kept, 0.0, 0.0, "triton", pairs_scored=scored)


def runs_as_row(q: Tensor, k: Tensor, params: TileParams, call: Call) -> bool:
    """Whether ``selected_row`` takes this call: one causal row of one sequence, equal budgets for all heads
    below what there is to choose from, no skipping."""
    if q.shape[0] > 1 or q.shape[2] > 1 or not call.causal or params.skip > 0:
        return False
    budgets = params.keep(call.layer, k.shape[1]).blocks
    return budgets is not None and len(set(budgets)) == 1 and budgets[0] < _num_candidates(params, call)


def selected_row(
    q: Tensor, k: Tensor, v: Tensor, params: TileParams, call: Call, score: ScoreRow
) -> AttentionResult:
    """q [1, H, 1, D], k [1, Hk, M, D], v [1, Hk, M, Dv] as ``runs_as_row`` admits them."""
    began = perf_counter()
    rows = grouped(q.to(accumulator_dtype(q.dtype)), k.shape[1])[0]
    num_candidates, L = _num_candidates(params, call), params.block_size
    budgets = params.keep(call.layer, k.shape[1]).blocks
    assert budgets is not None
    known = (call.summaries or BlockSummaries()).get(k[0], v[0], L, num_candidates)
    scores, scored = score(rows, known, call.scale)
    chosen = best_blocks(scores, budgets[0])
    selection_s = perf_counter() - began
    own = slice(num_candidates * L, call.start + 1)
    out, lse, dropped = _attend(rows[:, :, 0] * call.scale, k[0], v[0], own, chosen, known, params)
    spent_ms = (perf_counter() - began) * 1e3
    kept = q.shape[1] * (own.stop - own.start + budgets[0] * L)
    stats = Stats(
        pairs_kept=kept,
        pairs_exact=q.shape[1] * (call.start + 1),
        pairs_computed=kept,
        selection_ms=selection_s * 1e3,
        compute_ms=spent_ms - selection_s * 1e3,
        impl="torch",
        dropped_mass=float(dropped.mean()),
        pairs_scored=scored,
    )
    as_given = (1, q.shape[1], 1)
    return AttentionResult(
        out.reshape(*as_given, -1).to(q.dtype),
        lse.reshape(as_given).float(),
        stats,
        dropped.reshape(as_given).float(),
    )


def best_blocks(scores: Tensor, count: int) -> Tensor:
    """The ``count`` blocks of largest score, int64 [Hk, count], largest first; ties to the lower block."""
    if count == 0:
        return scores.new_empty(len(scores), 0, dtype=torch.int64)
    best, blocks = scores.topk(count, -1)
    tie_at_the_border = int((scores >= best[:, -1:]).sum()) > best.numel()
    if tie_at_the_border:  # topk breaks it as it likes
        blocks = scores.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    return blocks


def _num_candidates(params: TileParams, call: Call) -> int:
    """Whole blocks before the row's own tile."""
    return call.start // params.query_tile * params.query_tile // params.block_size


def _attend(
    q: Tensor, k: Tensor, v: Tensor, own: slice, chosen: Tensor, known: Summary, params: TileParams
) -> tuple[Tensor, Tensor, Tensor]:
    """q [Hk, G, D], already scaled -> out [Hk, G, Dv], lse and dropped [Hk, G]."""
    keys, values = (gather_blocks(x, chosen, known.block).to(q.dtype) for x in (k, v))
    scores = [torch.bmm(q, k[:, own].to(q.dtype).mT), torch.bmm(q, keys.mT)]
    left_out = torch.bmm(q, known.kmean.mT).add_(math.log(known.block))
    listed = chosen[:, None].expand(-1, q.shape[1], -1)
    of_chosen = torch.full_like(left_out, -math.inf).scatter_(-1, listed, left_out.gather(-1, listed))
    left_out.scatter_(-1, listed, -math.inf)
    if params.remainder == "mean":
        scores.append(left_out)
    weights, lse = softmax_lse(torch.cat(scores, -1))
    parts = torch.split(weights, [part.shape[-1] for part in scores], -1)
    out = torch.bmm(parts[0], v[:, own].to(q.dtype))
    out.baddbmm_(parts[1], values)
    if params.remainder == "mean":
        out.baddbmm_(parts[2], known.vmean)
        return out, lse, _known(parts[2].sum(-1), scores[:2])
    lse_left_out = torch.logsumexp(left_out, -1)
    share = torch.sigmoid(lse_left_out - lse)
    dropped = _known(share, scores[:2])
    if params.remainder == "gated":
        predicted = _over_means(of_chosen, known) if chosen.shape[1] else out
        only_own = torch.bmm(torch.softmax(scores[0], -1), v[:, own].to(q.dtype))
        m, o, kept = (x.unsqueeze(-2) for x in (predicted, only_own, out))
        g = gate(m, o, kept, parts[1].sum(-1, keepdim=True))[..., 0]
        out = torch.lerp(out, _over_means(left_out, known), share.unsqueeze(-1) * g)
        lse = torch.logaddexp(lse, lse_left_out)
    return out, lse, dropped


def _known(share: Tensor, kept: list[Tensor]) -> Tensor:
    """``share_or_bound`` of the left-out share, from the logits that were kept: one pass where all is
    finite."""
    if math.isfinite(float(share.sum())):
        return share
    return share_or_bound(share, torch.logsumexp(torch.cat(kept, -1), -1))


def _over_means(logits: Tensor, known: Summary) -> Tensor:
    return torch.bmm(torch.softmax(logits, -1), known.vmean)


def gather_blocks(x: Tensor, blocks: Tensor, L: int) -> Tensor:
    """Blocks of L positions of x [Hk, M, D], chosen by ``blocks`` [Hk, K] -> [Hk, K L, D], contiguous.

    Where a head's positions lie side by side (a cache) the blocks of all heads are rows, a common divisor of
    the strides apart, of one overlapping view: one copy of long rows. Else element by element.
    """
    (Hk, M, D), K = x.shape, blocks.shape[1]
    if K == 0:
        return x.new_empty(Hk, 0, D)
    heads = torch.arange(Hk, device=x.device)[:, None]
    if x.stride(2) != 1 or x.stride(1) != D:
        by_block = torch.unflatten(x[:, : M // L * L], 1, (M // L, L))
        return by_block[heads, blocks].view(Hk, K * L, D)
    between = x.stride(0) if Hk > 1 else 0
    unit = math.gcd(between, L * D)
    last = (Hk - 1) * between + (M // L - 1) * L * D
    rows = x.as_strided((last // unit + 1, L * D), (unit, 1))
    at = heads * (between // unit) + blocks * (L * D // unit)
    return torch.index_select(rows, 0, at.view(-1)).view(Hk, K * L, D)
