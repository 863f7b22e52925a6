"""Pseudo-inverses of small non-negative matrices, such as attention between landmarks.

    iterative:  Z_0 = A^T / (|A|_1 |A|_inf),   Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4
    exact:      A^+ by singular values, those below ``CUTOFF`` of the largest counted as zero

Razavi, Kerayechian, Gachpazan, Shateyi, "A new iterative method for finding approximate inverses of complex
matrices" (Abstract and Applied Analysis 2014), as Xiong et al. use it ("Nyströmformer", arXiv 2102.03902,
eq. 15). |A|_1 is the largest column sum of absolute values and |A|_inf the largest row sum: their product
bounds |A|_2^2, so the iteration converges from this start whatever A is. Both are taken matrix by matrix: one
start for a whole batch would let one request move another.

Limits of the iteration. A small singular value s of A is inverted from below: its eigenvalue in A Z begins at
s^2 / (|A|_1 |A|_inf) and grows 3.25-fold per step, so six steps invert what lies above some 3 % of the
largest, and leave smaller ones nearly at zero. That damps noise, and is a bias where they matter. Rounding
grows 3.25-fold per step as well, which is why this is done in fp64 and a request's steps are bounded.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Method = Literal["iterative", "exact"]
CUTOFF = 1e-10
"""Relative to the largest singular value: rounding of fp64 lies at 1e-16, and 1e-6 of an answer remains of it
once it has been divided by this."""


def pseudo_inverse(a: Tensor, method: Method, num_iterations: int) -> Tensor:
    """A^+ [..., n, m] of a [..., m, n] fp64, or what ``num_iterations`` steps reach of it. NaN where a matrix
    holds a number that is not finite; the others of the batch do not feel it."""
    return exact_inverse(a) if method == "exact" else iterative_inverse(a, num_iterations)


def iterative_inverse(a: Tensor, num_iterations: int) -> Tensor:
    size = a.abs()
    rows, columns = size.sum(-1).amax(-1), size.sum(-2).amax(-1)
    z = a.mT / (rows * columns)[..., None, None]
    for _ in range(num_iterations):
        az = a @ z
        inner = _less(7.0, az)
        inner = _less(15.0, az @ inner)
        inner = _less(13.0, az @ inner)
        z = (z @ inner).mul_(0.25)
    return z


def exact_inverse(a: Tensor) -> Tensor:
    broken = ~torch.isfinite(a).all(-1).all(-1)[..., None, None]
    inverse: Tensor = torch.linalg.pinv(a.masked_fill(broken, 0.0), rtol=CUTOFF)
    return inverse.masked_fill(broken, torch.nan)


def _less(diagonal: float, x: Tensor) -> Tensor:
    """diagonal I - x; x is not written."""
    x = -x
    x.diagonal(dim1=-2, dim2=-1).add_(diagonal)
    return x
