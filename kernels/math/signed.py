"""Sums that are not yet normalised: how an approximate part waits for the exact one it will be added to.

    part = e^log_scale (numerator, denominator),     out_i = sum of numerators / sum of denominators

Chen et al., "Scatterbrain" (arXiv 2110.15343), section 4: one normaliser over both. A denominator may be
negative where a part corrects another (exact minus estimate), so a part has no log-sum-exp of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Part:
    """``numerator`` [..., Dv], ``denominator`` [...], ``log_scale`` [...] (-inf: nothing for this row)."""

    numerator: Tensor
    denominator: Tensor
    log_scale: Tensor
