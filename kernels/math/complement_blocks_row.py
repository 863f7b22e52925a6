"""Decode of scatterbrain over chosen key blocks: what a row leaves out is all blocks less the chosen.

    total over all candidates: mu_r = max_b mu_br,   T_r = sum_b e^(mu_br - mu_r) S_br     kept, constant size
    row:  p_r = e^(a_r + mu_r - c),   B = sum over chosen b, and r, of p_r e^(mu_br - mu_r) S_br
    complement = sum_r p_r T_r - B

Letters as in ``kernels.math.complement_blocks``, whose sums read every block's features; here a step reads
those of the chosen blocks alone. In fp64 over the same numbers, so a difference loses nothing but what
``kernels.math.complement_difference`` says; where that is too much, the left-out blocks are summed after all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.math.accumulate import Accumulator
from kernels.math.complement import Features, map_flops
from kernels.math.complement_difference import CANCELLATION, Difference

FEW = 4
"""A row takes the difference where it chose at most one block in so many."""
BLOCKS_AT_ONCE = 16


class BlockTotals:
    """T over the first ``num_blocks`` blocks of one sequence in fp64: ``top`` [Hk, F], ``sums`` [Hk, F,
    Dv + 1]."""

    def __init__(self) -> None:
        self.num_blocks = 0
        self.top: Tensor | None = None
        self.sums: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(0 if held is None else held.nbytes for held in (self.top, self.sums))

    def truncate(self, num_blocks: int) -> None:
        if num_blocks < self.num_blocks:
            self.num_blocks, self.top, self.sums = 0, None, None

    def advance(self, mu: Tensor, sums: Tensor) -> None:
        """Over all blocks of mu [Hk, P, F], sums [Hk, P, F, Dv + 1]: those that are new are added. Tensors
        are replaced, never written."""
        for a in range(self.num_blocks, mu.shape[1], BLOCKS_AT_ONCE):
            tops = mu[:, a : a + BLOCKS_AT_ONCE].double()
            top = tops.amax(1) if self.top is None else torch.maximum(tops.amax(1), self.top)
            weights = torch.exp(tops - top[:, None]).unsqueeze(-1)
            added = (weights * sums[:, a : a + BLOCKS_AT_ONCE]).sum(1)
            if self.top is not None and self.sums is not None:
                added += torch.exp(self.top - top).unsqueeze(-1) * self.sums
            self.top, self.sums = top, added
        self.num_blocks = mu.shape[1]


def takes_difference(left_out: Tensor) -> bool:
    """Whether a row that leaves these blocks out, bool [Hk, P], chose few enough."""
    return int((~left_out).sum(-1).max()) * FEW <= left_out.shape[1]


def add_row_left_out(
    acc: Accumulator,
    features: Features,
    left_out: Tensor,
    known: tuple[Tensor, Tensor],
    totals: BlockTotals,
    dropped: Tensor,
) -> bool:
    """Merge what the only row of the only sequence leaves out, bool [Hk, P], of blocks ``known``: mu [Hk, P,
    F] and sums [Hk, P, F, Dv + 1]; fills ``dropped`` [Hk, G, 1]. False, and nothing done, where a difference
    loses too much or a number is not finite."""
    assert totals.top is not None and totals.sums is not None
    exponents = features.map.log_queries(acc.q)[0, :, :, 0].double() + totals.top[:, None]  # [Hk, G, F]
    top = exponents.amax(-1)
    weights = exponents.sub_(top.unsqueeze(-1)).exp_()
    sums = torch.bmm(weights, totals.sums)
    total = sums[..., -1].clone()
    sums -= _of_chosen(weights, ~left_out.to(weights.device), known, totals.top)
    one = Difference(sums.flatten(0, 1), top.flatten(), total.flatten())
    shift = features.shift(acc.q)
    shift = shift.double().reshape(-1) if isinstance(shift, Tensor) else shift
    lse = acc.lse.view(-1)
    if not bool(torch.isfinite(one.sums).all()) or bool(
        one.cancelled(lse, shift, CANCELLATION[acc.q.dtype]).any()
    ):
        return False
    dropped.view(-1).copy_(one.merge(acc.out.view(len(lse), -1), lse, shift))
    heads, F, width = totals.sums.shape
    blocks = 1 + int((~left_out).sum(-1).max())
    features.flops += map_flops(features, len(lse)) + 2 * len(lse) * blocks * F * width
    return True


def _of_chosen(weights: Tensor, chosen: Tensor, known: tuple[Tensor, Tensor], top: Tensor) -> Tensor:
    """sum_r p_r sum over ``chosen`` [Hk, P] of e^(mu_br - mu_r) S_br: [Hk, G, Dv + 1]."""
    mu, sums = known
    (heads, G, _), most = weights.shape, int(chosen.sum(-1).max())
    if not most:
        return weights.new_zeros(heads, G, sums.shape[-1])
    counts, blocks = chosen.to(torch.int8).topk(most, -1)
    head = torch.arange(heads, device=mu.device)[:, None]
    shares = torch.exp(mu[head, blocks].double() - top[:, None]).mul_(counts.unsqueeze(-1))  # [Hk, K, F]
    mixed = (weights.unsqueeze(2) * shares.unsqueeze(1)).flatten(2)
    return torch.bmm(mixed, sums[head, blocks].flatten(1, 2).double())
