"""Which of three ways to spend the same memory comes nearest to a row of attention: Scatterbrain's view.

    sparse      the b heaviest keys of the row, renormalised
    low-rank    b / 2 random features in place of exp:   L_ij = phi(q_i) . phi(k_j)
    both        the b / 2 heaviest keys exactly, b / 4 features for all others
    error       1/2 sum_j |P̂_ij - P_ij|       (total variation: the share of the mass that is misplaced)

Chen et al., "Scatterbrain" (arXiv 2110.15343): a key costs one number of the row, a feature two. The supports
are the best there are (an oracle's), the features FAVOR+ with keys centred, so the figures say what a method
could reach at this budget, not what one does. The error of ``sparse`` is the mass that it leaves out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.contract import Call
from kernels.math.features import FeatureMap, FeatureParams, feature_map

MIN_BUDGET = 8
"""The smallest budget of which a quarter makes a pair of features."""
_LARGEST_EXPONENT = 700.0


@dataclass(frozen=True)
class BudgetErrors:
    """Total variation of each row, [G, R] fp64, 0 .. 1."""

    sparse: Tensor
    low_rank: Tensor
    both: Tensor


@dataclass(frozen=True)
class BudgetMaps:
    """The features of a layer's key heads: ``all`` for a budget spent on features alone, ``half`` beside a
    support."""

    all: FeatureMap
    half: FeatureMap

    def of_head(self, head: int) -> BudgetMaps:
        """Those of one key head alone."""
        maps = (
            FeatureMap(m.directions[head : head + 1], m.scale, m.key, m.basis_keys)
            for m in (self.all, self.half)
        )
        return BudgetMaps(*maps)


def budget_maps(
    budget: int,
    num_key_heads: int,
    head_dim: int,
    scale: float,
    seed: int = 0,
    layer: int = 0,
    device: torch.device | None = None,
) -> BudgetMaps:
    """Drawn from (seed, layer, key head), in fp64. ValueError where the budget buys no features."""
    if budget < MIN_BUDGET or budget % 4:
        raise ValueError(f"budget is {budget} keys; it is a multiple of 4 and at least {MIN_BUDGET}")
    call = Call(causal=False, scale=scale, seed=seed, layer=layer, start=0)

    def drawn(num_features: int) -> FeatureMap:
        params = FeatureParams(num_features=num_features - num_features % 2)
        place = device or torch.device("cpu")
        return feature_map(params, call, num_key_heads, head_dim, torch.float64, place)

    return BudgetMaps(drawn(budget // 2), drawn(budget // 4))


def budget_errors(q: Tensor, k: Tensor, logits: Tensor, budget: int, maps: BudgetMaps) -> BudgetErrors:
    """Rows q [G, R, D] over one head's keys [M, D], with their ``logits`` [G, R, M] fp64 (-inf out of sight);
    ``maps`` are that key head's."""
    probabilities = logits.softmax(-1)
    in_sight = logits > -torch.inf
    top = probabilities.topk(min(budget, k.shape[0]), dim=-1)
    sparse = (1 - top.values.sum(-1)).clamp_(min=0.0)
    keys = k.double() - k.double().mean(0, keepdim=True)
    shift = _log_sums(q, keys, logits, maps.all.scale)
    low_rank = _estimated(q, keys, shift, maps.all).mul_(in_sight)
    both = _estimated(q, keys, shift, maps.half).mul_(in_sight)
    support = top.indices[..., : budget // 2]
    both.scatter_(-1, support, probabilities.gather(-1, support))
    return BudgetErrors(sparse, _distance(low_rank, probabilities), _distance(both, probabilities))


def _log_sums(q: Tensor, keys: Tensor, logits: Tensor, scale: float) -> Tensor:
    """ln sum_j exp(scale <q_i, k_j - k̄>) over the keys in sight: [G, R, 1]."""
    centred = torch.matmul(q.double(), keys.mT).mul_(scale)
    return centred.masked_fill_(logits == -torch.inf, -torch.inf).logsumexp(-1, keepdim=True)


def _estimated(q: Tensor, keys: Tensor, log_sums: Tensor, fmap: FeatureMap) -> Tensor:
    """The features' estimate of P before it is normalised: [G, R, M], with the true row's normaliser."""
    rows = fmap.log_queries(q.double()[None, None])[0, 0]
    columns = fmap.log_keys(keys[None, None])[0, 0]
    row_top, column_top = rows.amax(-1, keepdim=True), columns.max()
    estimate = torch.matmul((rows - row_top).exp_(), (columns - column_top).exp_().mT)
    return estimate.mul_((row_top + column_top - log_sums).clamp_(max=_LARGEST_EXPONENT).exp_())


def _distance(estimate: Tensor, probabilities: Tensor) -> Tensor:
    """Half the sum of absolute differences once the estimate's rows sum to 1; a row of zeros is all wrong."""
    largest = estimate.amax(-1, keepdim=True).clamp_(min=math.ulp(0.0))
    scaled = estimate / largest
    rows = scaled / scaled.sum(-1, keepdim=True).clamp_(min=math.ulp(0.0))
    wrong = (rows - probabilities).abs_().sum(-1) / 2
    return torch.where(scaled.sum(-1) > 0, wrong, torch.ones_like(wrong))
