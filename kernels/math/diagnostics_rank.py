"""How many dimensions attention's logits use, and how far tokens are from being one and the same.

    centred logits    G = Q (K - 1 k̄^T)^T      Q K^T without each row's mean, which softmax does not see
    effective rank    the fewest r with  s_1^2 + .. + s_r^2 >= energy * sum s^2,   s the singular values of G
    composite norm    |R| = sqrt(|R|_1 |R|_inf)   (largest column's and largest row's absolute sum)
    residual          min over x of |X - 1 x^T| / |X|

Bhojanapalli et al., "Low-rank bottleneck in multi-head attention" (arXiv 2002.07028): an attention matrix is
within a head's reach only where its centred logarithm has a rank of at most head_dim. Dong, Cordonnier,
Loukas, "Attention is not all you need" (arXiv 2103.03404): the residual, which pure attention drives to 0
doubly exponentially with depth.

G is never formed: with Q = A R_q and K - 1 k̄^T = B R_k (orthonormal columns), its singular values are those
of the D x D matrix R_q R_k^T. So its rank is at most D whatever N is.
"""

from __future__ import annotations

import torch
from torch import Tensor


def logit_singular_values(q: Tensor, k: Tensor) -> Tensor:
    """Singular values [..., min(N, M, D)] fp64, descending, of the centred logits of q [..., N, D] and k
    [..., M, D]."""
    keys = k.double()
    left = torch.linalg.qr(q.double(), mode="r").R
    right = torch.linalg.qr(keys - keys.mean(-2, keepdim=True), mode="r").R
    values: Tensor = torch.linalg.svdvals(left @ right.mT)
    return values


def effective_rank(singular_values: Tensor, energy: float = 0.99) -> Tensor:
    """The fewest leading singular values [..., D] with that share of the sum of squares: int64 [...]; 0 where
    all are 0."""
    if not 0 < energy < 1:
        raise ValueError(f"energy is {energy}; it lies between 0 and 1")
    squares = singular_values.double().square()
    total = squares.sum(-1, keepdim=True)
    short = squares.cumsum(-1) < energy * total * (1 - 1e-12)
    return torch.where(total[..., 0] > 0, short.sum(-1) + 1, 0)


def composite_norm(x: Tensor) -> Tensor:
    """sqrt(|X|_1 |X|_inf) of matrices [..., N, E] -> fp64 [...]."""
    absolute = x.double().abs()
    return (absolute.sum(-2).amax(-1) * absolute.sum(-1).amax(-1)).sqrt()


def rank_one_residual(x: Tensor) -> Tensor:
    """min over x of |X - 1 x^T| / |X| in the composite norm, from above: fp64 [...] of [..., N, E], 0 for a
    zero matrix.

    The norm's own minimiser has no closed form. The best of three vectors stands for it: zero; the mean over
    tokens (the published curves' choice, at most 2 times the minimum); and the median of every column, which
    minimises |.|_1 and moves no row by more than 2 |.|_inf (at most sqrt(3) times).
    """
    tokens = x.double()
    centres = tokens.mean(-2, keepdim=True), tokens.median(-2, keepdim=True).values
    smallest = torch.minimum(*(composite_norm(tokens - centre) for centre in centres))
    norm = composite_norm(tokens)
    return torch.where(norm > 0, (smallest / norm).clamp(max=1.0), torch.zeros_like(norm))
