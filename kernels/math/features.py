"""Random features whose products estimate the exponential kernel (FAVOR+).

    e^(t <q, k>) = E[ sum_r e^(a_r(q) + e_r(k)) ],      t = scale, r = 1 .. F
    e_r(k) = sqrt|t| <w_r, k> - |t| |k|^2 / 2
    a_r(q) = sqrt|t| <w_r, sign(t) q> - |t| |q|^2 / 2 - log F
    positive:    F rows w_r of W            hyperbolic:  F / 2 rows, each with both signs

Choromanski et al., "Rethinking attention with Performers" (arXiv 2009.14794), section 2. W is iid normal, or
blocks of D orthogonal rows with the norms of iid ones. Everything stays in the exponent until a sum is due,
so nothing overflows. The relative variance of one feature is e^(t |q + k|^2) - 1: it grows so fast with the
norms that keys are centred first (``key_centre``), which a softmax does not see.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kernels.contract import Call, Params
from kernels.math.cache import DRAWS
from kernels.math.dense import accumulator_dtype
from kernels.math.rng import bits, fold


class FeatureParams(Params):
    """The knobs of a feature map, shared by the backends that estimate with one."""

    num_features: int = Field(default=256, ge=2, le=4096, description="Random features per head.")
    features: Literal["positive", "hyperbolic"] = Field(
        default="hyperbolic",
        description="positive: one per random direction; hyperbolic: each direction with both signs (even).",
    )
    projection: Literal["orthogonal", "iid"] = Field(
        default="orthogonal",
        description="Random directions: orthogonal in blocks of head_dim, or independent.",
    )
    centre_keys: int = Field(
        default=0,
        ge=0,
        le=4096,
        description=(
            "Keys lose the mean of the first so many (bidirectional: of all keys), which no softmax sees and "
            "features gain by where keys share a mean; causal rows among the first attend exactly. 0: off."
        ),
    )

    @model_validator(mode="after")
    def _even(self) -> Self:
        if self.features == "hyperbolic" and self.num_features % 2:
            raise ValueError(
                f"num_features must be even where features is hyperbolic, got {self.num_features}"
            )
        return self


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """``directions`` [Hk, F, D] in the accumulator's dtype, shared by the query heads of a key head;
    hyperbolic: the second half are the first with the other sign. ``key`` tells two maps of one model's layer
    apart, and how their keys were centred."""

    directions: Tensor
    scale: float
    key: Hashable = None
    basis_keys: int = 0
    """First keys on which every feature depends, through the centre; 0: on none."""

    @property
    def num_features(self) -> int:
        return self.directions.shape[1]

    @property
    def key_root(self) -> float:
        """What <w_r, k> is multiplied by."""
        return math.sqrt(abs(self.scale))

    @property
    def query_root(self) -> float:
        """What <w_r, q> is multiplied by: the root with the scale's sign."""
        return math.copysign(self.key_root, self.scale)

    def half_norms(self, x: Tensor) -> Tensor:
        """|t| |x|^2 / 2 of x [..., D] -> [...]."""
        norms: Tensor = torch.linalg.vector_norm(x, dim=-1)
        return norms.square_().mul_(abs(self.scale) / 2)

    def log_keys(self, k: Tensor) -> Tensor:
        """e_r(k): k [B, Hk, M, D] in the map's dtype -> [B, Hk, M, F]."""
        projected = torch.matmul(k, self.directions.mT).mul_(self.key_root)
        return projected.sub_(self.half_norms(k).unsqueeze(-1))

    def log_queries(self, q: Tensor) -> Tensor:
        """a_r(q): q [B, Hk, G, N, D] -> [B, Hk, G, N, F]."""
        projected = torch.matmul(q, self.directions[:, None].mT).mul_(self.query_root)
        return projected.sub_(self.half_norms(q).add_(math.log(self.num_features)).unsqueeze(-1))


def feature_map(
    params: FeatureParams,
    call: Call,
    num_key_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> FeatureMap:
    """The map of one layer, drawn from (seed, layer, key head) and remembered from call to call."""
    knobs = (params.num_features, params.features, params.projection)
    drawn = (call.seed, call.layer, num_key_heads, head_dim, dtype, *knobs)
    directions = DRAWS.get(
        ("features", *drawn, device),
        lambda: _draw(params, call, num_key_heads, head_dim).to(dtype=dtype, device=device),
    )
    key = (*drawn, params.centre_keys, float(call.scale))
    return FeatureMap(directions, call.scale, key, params.centre_keys if call.causal else 0)


def rounded_directions(fmap: FeatureMap, dtype: torch.dtype) -> Tensor:
    """A map's directions in the dtype of the numbers that they are multiplied with, remembered like the
    map."""
    if fmap.key is None or fmap.directions.dtype == dtype:
        return fmap.directions.to(dtype)
    key = ("rounded features", fmap.key, dtype, fmap.directions.device)
    return DRAWS.get(key, lambda: fmap.directions.to(dtype))


def _draw(params: FeatureParams, call: Call, num_key_heads: int, head_dim: int) -> Tensor:
    """[Hk, F, D] fp64."""
    both_signs = params.features == "hyperbolic"
    rows = params.num_features // (2 if both_signs else 1)
    streams = (fold(call.seed, call.layer, _STREAM, head) for head in range(num_key_heads))
    drawn = torch.stack([_directions(stream, rows, head_dim, params.projection) for stream in streams])
    return torch.cat([drawn, -drawn], 1) if both_signs else drawn


_STREAM = 2


def _directions(stream: int, rows: int, dim: int, projection: str) -> Tensor:
    """W [rows, dim] fp64."""
    if projection == "iid":
        return normals(stream, rows, dim)
    blocks = -(-rows // dim)
    gaussian = normals(fold(stream, 0), blocks * dim, dim).view(blocks, dim, dim)
    ortho, upper = torch.linalg.qr(gaussian)
    ortho = ortho * torch.diagonal(upper, dim1=-2, dim2=-1).sign()[:, None, :]
    norms = normals(fold(stream, 1), rows, dim).norm(dim=-1, keepdim=True)
    directions: Tensor = ortho.mT.reshape(blocks * dim, dim)[:rows] * norms
    return directions


def normals(stream: int, rows: int, columns: int) -> Tensor:
    """Standard normal numbers [rows, columns] fp64 of a stream: Box-Muller on the counter-based generator,
    number t from counters 2 t and 2 t + 1."""
    counters = torch.arange(rows * columns * 2)
    drawn = bits(torch.tensor(stream), counters).view(-1, 2)
    uniform = ((drawn >> 11) & ((1 << 53) - 1)).double().add_(0.5).mul_(2.0**-53)
    radius = uniform[:, 0].log().mul_(-2.0).sqrt_()
    return (radius * torch.cos(uniform[:, 1] * (2 * math.pi))).view(rows, columns)


def key_centre(k: Tensor, params: FeatureParams, call: Call) -> Tensor | None:
    """The mean [B, Hk, 1, D] to take off every key, in the accumulator's dtype; None where keys stay as they
    are."""
    if params.centre_keys == 0:
        return None
    first = k[:, :, : params.centre_keys] if call.causal else k
    return first.mean(2, keepdim=True, dtype=accumulator_dtype(k.dtype))
