"""The edge probabilities of a stochastic block model over queries and keys, without ever forming them.

    x^ = sigmoid(MLP(x) C^T),   MLP(x) = relu(x W1^T + b1) W2^T + b2       memberships of a query or a key
    S  = softmax over all C^2 entries of C C^T,  or given                  affinity of the clusters
    p_ij = q^_i S k^_j^T = sum_v r_iv k^_jv,     r_i = q^_i S
    E_i = sum_{j seen by i} p_ij = sum_v r_iv b_v(i),     b_v(i) = sum_{j seen by i} k^_jv

Cho et al., "Transformers meet stochastic block models" (arXiv 2210.15541), section 3. One MLP serves queries
and keys of all heads of a layer; every query head has clusters of its own, which also judge the keys of its
group. Everything is computed in fp64, so that neither chunks nor batches move a choice; memberships of keys
are then rounded to fp32, which is how they are kept beside a cache, and summed in fp64. C clusters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

MAX_CLUSTERS = 128
"""The paper's number; a call's memory is predicted with it."""
MAX_AFFINITY = 16.0
"""The largest sum of a head's affinities: it bounds p, and the points that a row draws per key."""
_NORMAL_ROWS = 512
_HALVINGS = 60


@dataclass(frozen=True, eq=False)
class ClusterParams:
    """One layer's own parameters, as a model carries them (``Call.learned``): any float dtype, finite.

    ``clusters`` [H, C, D]; ``w1``, ``w2`` [D, D] (output, input) and ``b1``, ``b2`` [D] of the MLP;
    ``affinity`` [H, C, C], not negative, row = the query's cluster, or None: the softmax of the clusters'
    products. Raises ValueError naming the field.
    """

    clusters: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    affinity: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.clusters, Tensor) or self.clusters.dim() != 3 or 0 in self.clusters.shape:
            raise ValueError(
                f"clusters must be a tensor [heads, clusters, head_dim], got {_told(self.clusters)}"
            )
        H, C, D = self.clusters.shape
        if C > MAX_CLUSTERS:
            raise ValueError(f"clusters must be at most {MAX_CLUSTERS} per head, got {C}")
        expected = {"w1": (D, D), "b1": (D,), "w2": (D, D), "b2": (D,), "affinity": (H, C, C)}
        for field, shape in {"clusters": (H, C, D), **expected}.items():
            value = getattr(self, field)
            if field == "affinity" and value is None:
                continue
            if not isinstance(value, Tensor) or value.shape != shape:
                raise ValueError(
                    f"{field} must be a tensor {list(shape)} beside clusters {[H, C, D]}, got {_told(value)}"
                )
            if not value.is_floating_point() or value.device != self.clusters.device:
                raise ValueError(
                    f"{field} must be floating-point on {self.clusters.device}, "
                    f"got {value.dtype} on {value.device}"
                )
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"{field} must be finite")
        if self.affinity is not None:
            _check_affinity(self.affinity)

    @property
    def num_heads(self) -> int:
        return self.clusters.shape[0]

    @property
    def num_clusters(self) -> int:
        return self.clusters.shape[1]

    @property
    def head_dim(self) -> int:
        return self.clusters.shape[2]

    @cached_property
    def wide(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """clusters, w1, b1, w2, b2 in fp64."""
        clusters, w1, b1, w2, b2 = (x.double() for x in (self.clusters, self.w1, self.b1, self.w2, self.b2))
        return clusters, w1, b1, w2, b2

    @cached_property
    def affinities(self) -> Tensor:
        """S [H, C, C] fp64."""
        if self.affinity is not None:
            return self.affinity.double()
        clusters = self.wide[0]
        products = clusters @ clusters.mT
        return torch.softmax(products.flatten(1), -1).view_as(products)


def _check_affinity(affinity: Tensor) -> None:
    if bool((affinity < 0).any()):
        raise ValueError(f"affinity must not be negative, got {float(affinity.min())}")
    most = float(affinity.double().sum((1, 2)).max())
    if most > MAX_AFFINITY:
        raise ValueError(
            f"affinity must sum to at most {MAX_AFFINITY:g} in each head, got {most:g}: an edge's "
            "probability stays below that sum, and is 1 long before; scale it down"
        )


def _told(value: object) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def clusters_for(learned: object, num_heads: int, head_dim: int, device: torch.device) -> ClusterParams:
    """What a call was given, checked against its sizes. Raises ValueError naming the field."""
    if not isinstance(learned, ClusterParams):
        raise ValueError(f"learned must be kernels.math.sbm.ClusterParams, got {_told(learned)}")
    if (learned.num_heads, learned.head_dim) != (num_heads, head_dim):
        raise ValueError(
            f"learned.clusters is for {learned.num_heads} query heads of head_dim {learned.head_dim}, "
            f"the call has {num_heads} of {head_dim}"
        )
    if learned.clusters.device != device:
        raise ValueError(f"learned.clusters is on {learned.clusters.device}, the call on {device}")
    return learned


def hidden(x: Tensor, learned: ClusterParams) -> Tensor:
    """MLP(x): x [..., D] of any float dtype -> [..., D] fp64."""
    _, w1, b1, w2, b2 = learned.wide
    inner = torch.nn.functional.linear(x.double(), w1, b1).relu_()
    return torch.nn.functional.linear(inner, w2, b2)


def memberships(hidden_rows: Tensor, clusters: Tensor) -> Tensor:
    """sigmoid of products with clusters [..., C, D] fp64: [..., N, D] -> [..., N, C] fp64, in 0 .. 1.

    NaN counts as 1: a broken token is drawn, and seen, rather than hidden."""
    return torch.sigmoid_(hidden_rows @ clusters.mT).nan_to_num_(nan=1.0)


def random_clusters(
    num_heads: int, head_dim: int, num_clusters: int, seed: int, density: float | None = None
) -> ClusterParams:
    """The paper's initialisation: Kaiming-normal clusters, a linear layer's uniform weights. fp32.

    Memberships then lie around 1/2 and p around 1/4. ``density`` (0 .. 1): one shift to all memberships, such
    that the mean p of independent standard normal queries and keys is that. It is a direction that all
    clusters have in common and that the MLP's bias alone feeds, so the affinity does not see it.
    """
    draw = torch.Generator().manual_seed(seed)
    bound = 1.0 / math.sqrt(head_dim)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=draw) * (2 * bound) - bound

    clusters = torch.randn(num_heads, num_clusters, head_dim, generator=draw) * math.sqrt(2.0 / head_dim)
    plain = ClusterParams(
        clusters,
        uniform(head_dim, head_dim),
        uniform(head_dim),
        uniform(head_dim, head_dim),
        uniform(head_dim),
    )
    if density is None:
        return plain
    if not 0.0 < density < 1.0:
        raise ValueError(f"density must lie between 0 and 1, got {density}")
    if head_dim < 2:
        raise ValueError("density needs a head_dim of 2 or more: one direction of it carries the shift")
    return _shifted(plain, density, torch.randn(_NORMAL_ROWS, head_dim, generator=draw))


def _shifted(plain: ClusterParams, density: float, rows: Tensor) -> ClusterParams:
    clusters, w2, b2 = plain.clusters.clone(), plain.w2.clone(), plain.b2.clone()
    clusters[..., 0], w2[0], b2[0] = 0.0, 0.0, 1.0
    flat = ClusterParams(clusters, plain.w1, plain.b1, w2, b2)
    logits = hidden(rows, flat) @ flat.wide[0].mT
    low, high = -60.0, 60.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        mean = torch.sigmoid(logits + middle).mean(1, keepdim=True)
        found = float((mean @ flat.affinities @ mean.mT).mean())
        low, high = (middle, high) if found < density else (low, middle)
    clusters[..., 0] = low
    return ClusterParams(clusters, plain.w1, plain.b1, w2, b2)
