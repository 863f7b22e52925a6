"""What a selection left out, estimated from the means of the blocks, and how much of the softmax it was.

    lse_rem_i = log sum over left-out b of  L e^(scale <q_i, kmean_b>)
    dropped_i = e^lse_rem_i / (e^lse_rem_i + e^lse_kept_i)
    merged:     out_i += g dropped_i (m_i - out_i),   m_i = sum over left-out b of p_ib vmean_b,
                p_i = softmax_b(scale <q_i, kmean_b>)
    g           1 ("mean"), or ("gated") the square of the least-squares fit, clipped to 0 .. 1, of
                    c_i - o_i  ~  g (m'_i - o_i)     over the rows of a tile, weighted by the share a_i of c_i

By Jensen's inequality L e^(mean logit) is at most the block's true sum, so ``dropped`` is a lower bound of
the mass that a row did not attend to. Cost: one logit for each row and block left out, 1 / L of exact's.

The gate asks the blocks that *were* attended to how far means can be trusted: o_i is the output over the own
keys, c_i the one over the chosen blocks, m'_i what the means of the chosen blocks would have given in its
place. Where heads look for contents that stand everywhere (the first layer), means point away from the truth,
and merging them does harm that the gate takes back. The gate moves ``out`` alone: the log-sum-exp is that of
the full merge, kept and left out together, under "gated" as under "mean".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.math.accumulate import Accumulator
from kernels.math.block_lists import BlockLists
from kernels.math.decode import softmax_lse
from kernels.math.query_tiles import QueryTiles
from kernels.math.summaries import Summary


@dataclass(frozen=True)
class OwnPart:
    """Rows of one sequence before the lists were added: out [Hk, G, N, Dv], lse [Hk, G, N]."""

    out: Tensor
    lse: Tensor


def add_left_out(
    acc: Accumulator,
    b: int,
    tiles: QueryTiles,
    lists: BlockLists,
    summary: Summary,
    *,
    merge: bool,
    own: OwnPart | None = None,
) -> Tensor:
    """Estimate, for batch entry ``b``, the candidates of ``tiles`` that ``lists`` does not have; with
    ``merge`` add them to the rows as their means, gated where ``own`` is given. Returns dropped [Hk, G, N] in
    the accumulator's dtype: 0 for a row with nothing left out, which also stays as it is bit for bit; else as
    ``share_or_bound`` says. A tile reads what ``summary`` (of ``tiles.num_blocks``) has of its candidates."""
    dropped = torch.zeros_like(acc.lse[b])
    if tiles.num_blocks == 0:
        return dropped
    listed, candidates = lists.table(tiles.num_blocks), tiles.candidates()
    left_out = candidates & ~listed
    widths = (left_out.any(0) * torch.arange(1, tiles.num_blocks + 1)).amax(-1).tolist()
    for tile, width in enumerate(widths):
        if width:
            rows, bias = tiles.rows(tile), _bias(left_out[:, tile, :width], lists.block, acc, b)
            gate = None
            if own is not None:
                # later blocks have no weight, but 0 * NaN would be felt
                w = int(candidates[tile].sum()) if tiles.causal else tiles.num_blocks
                chosen = _bias(listed[:, tile, :w], lists.block, acc, b)
                gate = _gate(acc, b, rows, chosen, summary.first(w), own)
            dropped[..., rows] = _add_tile(acc, b, rows, bias, summary, merge, gate)
    return dropped


def share_or_bound(share: Tensor, lse_kept: Tensor) -> Tensor:
    """Shares of the mass that are NaN made what is known of them: 0 for a row whose kept log-sum-exp is not
    finite (what made it so is kept), else 1, for what was left out is not finite."""
    return torch.where(share.isnan(), lse_kept.isfinite().to(share.dtype), share)


def gate(means: Tensor, own: Tensor, kept: Tensor, share: Tensor) -> Tensor:
    """g [..., 1, 1] for rows [..., R, Dv]: ``means`` m', ``own`` o, ``kept`` the output over own keys and
    chosen blocks, which is o + a (c - o), ``share`` a [..., R] of the chosen. 1 where nothing was chosen; a
    row that is not finite has no say."""
    towards = means - own
    fit = (towards * (kept - own)).sum(-1)
    size = towards.square().sum(-1) * share
    counts = torch.isfinite(fit) & torch.isfinite(size)
    fit, size = (x.masked_fill(~counts, 0.0).sum(-1) for x in (fit, size))
    slope = torch.where(size > 0, fit / size.clamp_min(torch.finfo(size.dtype).tiny), 1.0)
    return slope.clamp(0.0, 1.0).square()[..., None, None]


def _gate(acc: Accumulator, b: int, rows: slice, bias: Tensor, summary: Summary, own: OwnPart) -> Tensor:
    """The gate of one tile, [Hk, G, 1, 1]."""
    kept, lse = acc.out[b, :, :, rows], acc.lse[b, :, :, rows]
    means, means_lse = _means(acc.q[b, :, :, rows], summary, bias, acc.call.scale, merge=True)
    assert means is not None
    nothing = (bias == -math.inf).all(-1)
    share = -torch.expm1(own.lse[..., rows] - lse)
    return gate(means, own.out[..., rows, :], kept, share.masked_fill(nothing, 0.0))


def _bias(left_out: Tensor, block: int, acc: Accumulator, b: int) -> Tensor:
    """Bool [heads, P] -> log L or -inf, [Hk, G or 1, 1, P]."""
    bias = torch.full(left_out.shape, math.log(block), dtype=acc.lse.dtype)
    bias.masked_fill_(~left_out, -math.inf)
    return bias.view(acc.lse.shape[1], -1, 1, left_out.shape[-1]).to(acc.lse.device)


def _add_tile(
    acc: Accumulator,
    b: int,
    rows: slice,
    bias: Tensor,
    summary: Summary,
    merge: bool,
    gate: Tensor | None,
) -> Tensor:
    """One tile's rows over the means, [Hk, G, R] of dropped mass back."""
    q, lse = acc.q[b, :, :, rows], acc.lse[b, :, :, rows]
    known = summary.first(bias.shape[-1])
    part, part_lse = _means(q, known, bias, acc.call.scale, merge)
    # a head that left nothing out: its bias is -inf throughout, and what the softmax made of it is void
    nothing = (bias == -math.inf).all(-1)
    part_lse = part_lse.masked_fill(nothing, -math.inf)
    share = torch.sigmoid(part_lse - lse).masked_fill_(nothing, 0.0)
    dropped = share_or_bound(share, lse)
    if part is not None:
        out = acc.out[b, :, :, rows]
        weight = share.unsqueeze(-1)
        moved = torch.lerp(out, part, weight if gate is None else weight * gate)
        out.copy_(torch.where(nothing.unsqueeze(-1), out, moved))
        lse.copy_(torch.logaddexp(lse, part_lse))
    return dropped


def _means(
    q: Tensor, known: Summary, bias: Tensor, scale: float, merge: bool
) -> tuple[Tensor | None, Tensor]:
    """q [Hk, G, R, D] over the biased means: (out or None where it is not wanted, lse [Hk, G, R]).

    A row may see every block here, so what is broken in one that is masked has reached the row already.
    """
    Hk, G, R, D = q.shape
    if R > 1 and q.device.type == "cpu" and known.vmean.shape[-1] == D:
        many = (Hk, G, -1, -1)
        keys, values = known.kmean[:, None].expand(many), known.vmean[:, None].expand(many)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, keys, values, attn_mask=bias, scale=scale
        )
        return (out if merge else None), lse
    logits = torch.bmm(q.reshape(Hk, G * R, D) * scale, known.kmean.mT).view(Hk, G, R, -1).add_(bias)
    if not merge:
        return None, torch.logsumexp(logits, -1)
    weights, lse = softmax_lse(logits)
    return torch.bmm(weights.view(Hk, G * R, -1), known.vmean).view(Hk, G, R, -1), lse
