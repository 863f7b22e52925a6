"""What a selection left out, estimated from the means of the blocks, and how much of the softmax it was.

    lse_rem_i = log sum over left-out b of  L e^(scale <q_i, kmean_b>)
    dropped_i = e^lse_rem_i / (e^lse_rem_i + e^lse_kept_i)
    merged:     out_i += dropped_i (sum_b p_ib vmean_b - out_i),   p_i = softmax_b(scale <q_i, kmean_b>)

By Jensen's inequality L e^(mean logit) is at most the block's true sum, so ``dropped`` is a lower bound of
the mass that a row did not attend to. Cost: one logit for each row and block left out, 1 / L of exact's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.math.accumulate import Accumulator
from kernels.math.block_lists import BlockLists
from kernels.math.decode import softmax_lse
from kernels.math.query_tiles import QueryTiles
from kernels.math.summaries import Summary


def add_left_out(
    acc: Accumulator, b: int, tiles: QueryTiles, lists: BlockLists, summary: Summary, *, merge: bool
) -> Tensor:
    """Estimate, for batch entry ``b``, the candidates of ``tiles`` that ``lists`` does not have; with
    ``merge`` add them to the rows as their means. Returns dropped [Hk, G, N] in the accumulator's dtype: 0
    for a row with nothing left out, which also stays as it is bit for bit, and for one that holds NaN.
    ``summary`` covers ``tiles.num_blocks``."""
    dropped = torch.zeros_like(acc.lse[b])
    if tiles.num_blocks == 0:
        return dropped
    left_out = tiles.candidates() & ~lists.table(tiles.num_blocks)
    widths = (left_out.any(0) * torch.arange(1, tiles.num_blocks + 1)).amax(-1).tolist()
    for tile, width in enumerate(widths):
        if width:
            bias = _bias(left_out[:, tile, :width], lists.block, acc, b)
            dropped[..., tiles.rows(tile)] = _add_tile(acc, b, tiles.rows(tile), bias, summary, merge)
    return dropped


def _bias(left_out: Tensor, block: int, acc: Accumulator, b: int) -> Tensor:
    """Bool [heads, P] -> log L or -inf, [Hk, G or 1, 1, P]."""
    bias = torch.full(left_out.shape, math.log(block), dtype=acc.lse.dtype)
    bias.masked_fill_(~left_out, -math.inf)
    return bias.view(acc.lse.shape[1], -1, 1, left_out.shape[-1]).to(acc.lse.device)


def _add_tile(acc: Accumulator, b: int, rows: slice, bias: Tensor, summary: Summary, merge: bool) -> Tensor:
    """One tile's rows over the means, [Hk, G, R] of dropped mass back."""
    q, lse = acc.q[b, :, :, rows], acc.lse[b, :, :, rows]
    known = summary.first(bias.shape[-1])
    part, part_lse = _means(q, known, bias, acc.call.scale, merge)
    # a head that left nothing out: its bias is -inf throughout, and what the softmax made of it is void
    nothing = (bias == -math.inf).all(-1)
    part_lse = part_lse.masked_fill(nothing, -math.inf)
    dropped = torch.sigmoid(part_lse - lse).masked_fill_(nothing, 0.0)
    if part is not None:
        out = acc.out[b, :, :, rows]
        moved = torch.lerp(out, part, dropped.unsqueeze(-1))
        out.copy_(torch.where(nothing.unsqueeze(-1), out, moved))
        lse.copy_(torch.logaddexp(lse, part_lse))
    return dropped.nan_to_num_(nan=0.0)


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
