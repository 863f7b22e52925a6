"""Sums that are not yet normalised: how an exact part and an approximate part become one attention.

    part = e^log_scale (numerator, denominator),     out_i = sum of numerators / sum of denominators

Chen et al., "Scatterbrain" (arXiv 2110.15343), section 4: one normaliser over both. A denominator may be
negative where a part corrects another (exact minus estimate), so a part has no log-sum-exp of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """``numerator`` [..., Dv], ``denominator`` [...], ``log_scale`` [...] (-inf: nothing for this row)."""

    numerator: Tensor
    denominator: Tensor
    log_scale: Tensor


def softmax_part(out: Tensor, lse: Tensor) -> Part:
    """A softmax attention out [..., Dv] with its log-sum-exp [...] as a part."""
    return Part(out, torch.ones_like(lse), lse)


def normalise(parts: Sequence[Part]) -> Tensor:
    """[..., Dv]: one normaliser over all parts; 0 for a row without any."""
    top = torch.stack([part.log_scale for part in parts]).amax(0)
    top = top.masked_fill(top == -math.inf, 0.0)
    numerator = torch.zeros_like(parts[0].numerator)
    denominator = torch.zeros_like(parts[0].denominator)
    for part in parts:
        weight = torch.exp(part.log_scale - top)
        numerator += part.numerator * weight.unsqueeze(-1)
        denominator += part.denominator * weight
    return numerator / denominator.masked_fill(denominator == 0.0, 1.0).unsqueeze(-1)
