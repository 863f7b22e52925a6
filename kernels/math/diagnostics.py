"""What a head's attention looks like, row by row: exact softmax rows, and figures of them.

    P_ij    = exp(s_ij) / sum_j' exp(s_ij'),   s_ij = scale <q_i, k_j>,   j <= i where causal
    entropy = - sum_j P_ij ln P_ij             (nats; relative: over ln of the number of keys in sight)
    k_m(i)  = the fewest keys that hold the share m of row i's mass
    kept(i) = exp(lse_S(i) - lse(i))           mass of the keys S that a selection lists

Rows are a sample of positions, drawn uniformly without replacement. Everything is computed in fp64: a row in
which one key holds all the mass has an entropy near 0, where fp32 leaves nothing of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.math.rng import bits, fold

_STREAM = 0x6D61


def sample_positions(num_positions: int, wanted: int, seed: int) -> Tensor:
    """``wanted`` of the positions 0 .. num_positions - 1, ascending, int64 [min(wanted, num_positions)]:
    uniform without replacement, from the seed and the number of positions alone."""
    if wanted < 1:
        raise ValueError(f"wanted is {wanted} rows; ask for at least 1")
    drawn = bits(torch.tensor(fold(seed, _STREAM)), torch.arange(num_positions))
    return drawn.argsort()[:wanted].sort().values


def keys_in_sight(positions: Tensor, num_keys: int, causal: bool) -> Tensor:
    """How many keys each row sees, int64 [R]."""
    return positions + 1 if causal else torch.full_like(positions, num_keys)


def row_logits(q: Tensor, k: Tensor, positions: Tensor, scale: float, causal: bool) -> Tensor:
    """s [G, R, M] fp64 of q [G, R, D] (the rows at ``positions``) over keys [M, D]; -inf out of sight."""
    logits = torch.matmul(q.double(), k.double().mT).mul_(scale)
    if causal:
        later = torch.arange(k.shape[0], device=k.device) > positions.to(k.device)[:, None]
        logits.masked_fill_(later, -torch.inf)
    return logits


def entropy(probabilities: Tensor) -> Tensor:
    """Nats, [..., R] of rows [..., R, M]; a key without mass adds nothing."""
    nats: Tensor = torch.special.entr(probabilities).sum(-1)
    return nats


def relative_entropy(nats: Tensor, in_sight: Tensor) -> Tensor:
    """entropy / ln(keys in sight), 0 .. 1; NaN for a row that sees one key, where it says nothing."""
    return nats / in_sight.to(nats).log().masked_fill(in_sight.to(nats.device) < 2, torch.nan)


def sorted_mass(probabilities: Tensor) -> Tensor:
    """Mass of the 1, 2, .. M heaviest keys of every row: [..., R, M], ascending to 1."""
    return probabilities.sort(-1, descending=True).values.cumsum(-1)


def keys_for_mass(cumulated: Tensor, share: float) -> Tensor:
    """The fewest keys with at least ``share`` of the mass, int64 [..., R], from ``sorted_mass``. Sums of
    fp64 rounding short of the share count as reaching it."""
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; it lies above 0 and at most at 1")
    return (cumulated < share * (1 - 1e-12)).sum(-1) + 1


def kept_mass(lse_kept: Tensor, lse_all: Tensor) -> Tensor:
    """Softmax mass of the kept keys from both log-sum-exps: 0 .. 1, fp64, 0 for a row that keeps none.
    Rounding of the two sums may say a little more than 1: that is 1."""
    return (lse_kept.double() - lse_all.double()).exp_().clamp_(max=1.0)
