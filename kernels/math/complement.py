"""What features say of the keys outside a support, and how it joins the exact part (Scatterbrain).

    exact part      out_i, lse_i        softmax over the support
    complement      n_i, z_i, c_i       e^c_i z_i = sum over the complement of L_ij,   n_i the same times v_j
    together        w_i = e^(c_i) z_i / (e^lse_i + e^(c_i) z_i),   out_i += w_i (n_i / z_i - out_i)

Chen et al., "Scatterbrain" (arXiv 2110.15343), section 4. L is positive, so a complement that is summed
directly has a log-sum-exp of its own and merges as two softmax attentions do; w_i is what ``dropped``
reports. Features are of centred keys, L' = L e^(-scale <q_i, centre>): the row's log-scale takes that back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.contract import AttentionResult, Backend, Call, Params
from kernels.math.accumulate import Accumulator, result
from kernels.math.features import FeatureMap, FeatureParams, feature_map, key_centre
from kernels.math.merge import merge_into
from kernels.math.signed import Part


@dataclass(frozen=True)
class Support:
    """A backend whose pairs are computed exactly, and its params."""

    backend: Backend
    params: Params

    @property
    def name(self) -> str:
        return self.backend.name


@dataclass
class Features:
    """The map of one call and the centre [B, Hk, 1, D] that its keys lose (None: nothing), in the
    accumulator's dtype. ``flops`` tallies ``Stats.other_flops``."""

    map: FeatureMap
    centre: Tensor | None
    flops: int = 0

    def centred(self, k: Tensor) -> Tensor:
        """Keys [B, Hk, M, D] as the map takes them."""
        wide = k.to(self.map.directions.dtype)
        return wide if self.centre is None else wide - self.centre

    def shift(self, q: Tensor) -> Tensor | float:
        """scale <q_i, centre>, [B, Hk, G, N]: what the log-scales of q's rows [B, Hk, G, N, D] lack."""
        if self.centre is None:
            return 0.0
        wide = q.to(self.centre.dtype)
        return torch.matmul(wide, self.centre[:, :, None].mT)[..., 0] * self.map.scale

    def of_sequence(self, b: int) -> Features:
        return self if self.centre is None else replace(self, centre=self.centre[b : b + 1])


def features_of(acc: Accumulator, params: FeatureParams) -> Features:
    _, Hk, _, _, D = acc.q.shape
    dtype = acc.out.dtype
    drawn = feature_map(params, acc.call, Hk, D, dtype, acc.q.device)
    centre = key_centre(acc.k, params, acc.call)
    return Features(drawn, None if centre is None else centre.to(dtype))


def exact_rows(params: FeatureParams, call: Call) -> int:
    """Rows at positions below it attend exactly to all their keys: they could not know the centre."""
    return params.centre_keys if call.causal else 0


def merge_complement(out: Tensor, lse: Tensor, part: Part) -> Tensor:
    """Add a complement that was summed directly to out [..., R, Dv], lse [..., R], in place; its share
    [..., R] of the new normaliser."""
    lost = part.denominator == 0
    numerator = part.numerator / part.denominator.masked_fill(lost, 1.0).unsqueeze(-1)
    part_lse = (part.log_scale + torch.log(part.denominator)).masked_fill_(lost, -math.inf)
    share = torch.sigmoid(part_lse - lse).masked_fill_(lost, 0.0)
    merge_into(out, lse, numerator, part_lse)
    return share


def together(
    acc: Accumulator, q: Tensor, began: float, features: Features, dropped: Tensor
) -> AttentionResult:
    """What the call returns: without a log-sum-exp, which an estimate has not."""
    made = result(acc, q, began, dropped=dropped.nan_to_num_(nan=1.0).clamp_(0.0, 1.0))
    return replace(made, lse=None, stats=replace(made.stats, other_flops=features.flops))


def map_flops(features: Features, rows: int) -> int:
    """Of the exponentials of ``rows`` vectors: projections, half norms, exponentials."""
    F, D = features.map.directions.shape[1:]
    return rows * (2 * F * D + 2 * D + 2 * F)
