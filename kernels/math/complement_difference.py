"""The features' sum outside a support as a difference, where going around the support costs too much.

    T_i = sum over a set of keys of L_ij [v_j, 1],   B_i = the same over those that row i keeps exactly
    complement_i = T_i - B_i

Both in fp64, whatever the inputs. A difference loses as many digits as T_i is larger than the row's whole
normaliser Z_i (exact part and complement): rows with T_i / Z_i above ``CANCELLATION`` are to be summed again
over the complement itself. Then the result is within rounding of the direct sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.math.masked import weighted

CANCELLATION = {torch.float32: 1e7, torch.float64: 10.0}
"""The largest T_i / Z_i, by the accumulator's type: 2e-16 of T_i stays below that type's own rounding."""
AGAIN = 1 << 21
"""Exponents that exist at once while rows are summed again."""


@dataclass
class Difference:
    """R rows in fp64. ``sums`` [R, Dv + 1] are T, from which B is taken off, relative to ``log_scale`` [R];
    the last column is the sum without values, and ``total`` [R] that column as it was."""

    sums: Tensor
    log_scale: Tensor
    total: Tensor

    @property
    def denominator(self) -> Tensor:
        return self.sums[:, -1]

    def cancelled(self, lse: Tensor, shift: Tensor | float, most: float) -> Tensor:
        """Rows whose difference has lost too much, or is none. ``lse`` [R] of the exact part; ``shift`` [R]:
        what the log-scales lack. Where it has lost little and is below zero, which no sum of kernel values
        is, nothing was left out but rounding: it becomes zero."""
        scale = self.log_scale + shift
        exact = lse.double()
        top = torch.maximum(exact, scale)
        weight = torch.exp(scale - top)
        normaliser = torch.exp(exact - top) + self.denominator * weight
        sane = torch.isfinite(self.total) & (self.total > 0) & torch.isfinite(exact)
        precise = self.total * weight <= most * normaliser
        self.sums.masked_fill_((sane & precise & (self.denominator < 0)).unsqueeze(-1), 0.0)
        return sane & ~precise

    def merge(self, out: Tensor, lse: Tensor, shift: Tensor | float) -> Tensor:
        """Both halves under one normaliser, into out [R, Dv]; the complement's share of it [R]."""
        scale = (self.log_scale + shift).masked_fill_(self.denominator == 0, -math.inf)
        exact = lse.double()
        top = torch.maximum(exact, scale)
        left, right = torch.exp(exact - top), torch.exp(scale - top)
        normaliser = left + self.denominator * right
        share = self.denominator * right / normaliser
        sums = out.double().mul_(left.unsqueeze(-1))
        sums += (self.sums[:, :-1] * right.unsqueeze(-1)).masked_fill_((right == 0).unsqueeze(-1), 0.0)
        out.copy_(sums.div_(normaliser.unsqueeze(-1)))
        return share

    def sum_again(self, some: Tensor, rows: Tensor, keys: Tensor, values: Tensor, wanted: Tensor) -> None:
        """Rows ``some`` [n], key by key: their exponents ``rows`` [n, F], ``keys`` [M, F], ``values`` [M,
        Dv + 1] that end in a one, and which keys are the row's complement, ``wanted`` [n, M]. O(M F) each."""
        step = max(1, AGAIN // keys.numel())
        for a in range(0, len(some), step):
            mine, own = some[a : a + step], wanted[a : a + step]
            logs = torch.logsumexp(rows[a : a + step, None] + keys, -1).masked_fill_(~own, -math.inf)
            top = logs.amax(-1)
            weights = torch.exp(logs - top.masked_fill(top == -math.inf, 0.0)[:, None])
            self.sums[mine] = weighted(weights.masked_fill_(~own, 0.0), values, own)
            self.log_scale[mine] = top
