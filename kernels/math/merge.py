"""Adding two softmax attentions over disjoint sets of keys.

    lse = log(e^lse_a + e^lse_b),   out = out_a + sigmoid(lse_b - lse_a) * (out_b - out_a)

A row without keys has lse = -inf and out = 0, and changes nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def merge_into(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Add a part (out [..., R, Dv], lse [..., R]) to another in place. The first is written, the second is
    not.
    """
    weight = torch.sigmoid(part_lse - lse)
    weight.masked_fill_(part_lse == -math.inf, 0.0)
    out.lerp_(part_out, weight.unsqueeze(-1))
    lse.copy_(torch.logaddexp(lse, part_lse))
