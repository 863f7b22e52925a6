"""Buckets by k-means on the keys: rows look into the clusters whose centroids they like best.

    code(k) = argmin_c |k - m_c|^2,      clusters of row i = the num_probes largest sign(scale) <q_i, m_c>

Centroids m_c are fitted by Lloyd's iterations: causal on the first ``train_keys`` keys, on which no row among
them depends since those attend exactly; bidirectional on at most 4,096 keys spread evenly. They begin at
different keys drawn from (seed, layer, key head); an empty cluster keeps its centroid. Roy et al., "Efficient
content-based sparse attention with routing transformers" (arXiv 2003.05997) learns centroids in training and
shares queries and keys; here neither is changed. Codes and choices are fp64: chunks and decode steps agree.
A vector with a number that is not finite counts as the zero vector.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kernels.contract import Call, Params
from kernels.math.bucket_states import Coded, code_state
from kernels.math.buckets import Codes, Reach
from kernels.math.hashing import HASHED_AT_ONCE, finite_rows
from kernels.math.rng import bits, fold
from kernels.parallel import side_by_side

STREAM = 4
MAX_TRAIN_KEYS = 4096


class KMeansParams(Params):
    """How keys are clustered, and which of them every row sees besides those of its clusters."""

    num_clusters: int = Field(default=64, ge=1, le=1024, description="Clusters of keys per head.")
    num_probes: int = Field(default=2, ge=1, le=8, description="Clusters that a row looks into.")
    cluster_size: int = Field(
        default=128, ge=16, le=4096, multiple_of=16, description="Keys per row and cluster it looks into."
    )
    window: int = Field(
        default=64,
        ge=1,
        le=65536,
        description="Keys on each side; look-back including the row itself when causal.",
    )
    sinks: int = Field(default=4, ge=0, le=4096, description="First tokens that every row sees.")
    train_keys: int = Field(
        default=512,
        ge=16,
        le=MAX_TRAIN_KEYS,
        description="Causal: clusters are fitted on the first so many keys, whose rows attend exactly.",
    )
    iterations: int = Field(default=8, ge=1, le=32, description="Lloyd iterations.")

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.num_probes > self.num_clusters:
            raise ValueError(
                f"num_probes must be at most num_clusters ({self.num_clusters}), got {self.num_probes}"
            )
        return self


def kmeans_reach(params: KMeansParams) -> Reach:
    """How far the rows of these params look."""
    return Reach(params.cluster_size, params.window, params.sinks, params.train_keys)


def kmeans_codes(params: KMeansParams, q: Tensor, k: Tensor, call: Call) -> Codes:
    """The buckets of one sequence: q [Hk, G, N, D], k [Hk, M, D], causal without keys after the last row.

    Causal centroids and codes of keys are kept in ``call.kept``; new keys alone are coded.
    """
    if call.causal:
        key = ("kmeans", params.num_clusters, params.train_keys, params.iterations, call.seed, call.layer)
        state = code_state(call, key, params.train_keys, k.shape[1])
        coded = state.codes(k, lambda first: centroids(params, first, call), _nearest)
    else:
        some = _spread(k.shape[1]).to(k.device)
        middle = centroids(params, k[:, some], call)
        coded = Coded(_nearest(k, middle), middle, k.shape[1], len(some))
    assert coded.basis is not None
    rows = _probes(params, q, coded.basis, -1.0 if call.scale < 0 else 1.0)
    heads, G, N, D = q.shape
    flops = heads * kmeans_flops(params, G * N, coded.num_coded, D, coded.num_fitted)
    return Codes(coded.codes, rows, (0,) * rows.shape[2], params.num_clusters, flops)


def _spread(num_keys: int) -> Tensor:
    taken = min(num_keys, MAX_TRAIN_KEYS)
    return torch.arange(taken) * num_keys // taken


def centroids(params: KMeansParams, k: Tensor, call: Call) -> Tensor:
    """fp64 [Hk, C, D] from keys [Hk, T, D]; C is num_clusters, or T where that is less."""
    jobs = [partial(_lloyd, params, k[h], fold(call.seed, call.layer, STREAM, h)) for h in range(len(k))]
    return torch.stack(side_by_side(jobs, k.device))


def _lloyd(params: KMeansParams, k: Tensor, stream: int) -> Tensor:
    k = finite_rows(k)
    drawn = torch.argsort(bits(torch.tensor(stream), torch.arange(len(k))), stable=True)
    middle = k[drawn[: params.num_clusters].to(k.device)]
    for _ in range(params.iterations):
        code = _largest((k @ middle.mT).mul_(2).sub_(middle.square().sum(-1)))
        count, total = _gathered(code, k, len(middle))
        middle = torch.where(count > 0, total / count.clamp(min=1), middle)
    return middle


def _gathered(code: Tensor, k: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """How many keys [T, D] each cluster has [C, 1], and their sums [C, D]. Off the CPU as a product: counting
    would wait for the device, and atomic sums come out differently from run to run."""
    if code.device.type == "cpu":
        count = torch.bincount(code, minlength=num_clusters)[:, None]
        return count, k.new_zeros(num_clusters, k.shape[1]).index_add_(0, code, k)
    members = (code == torch.arange(num_clusters, device=code.device)[:, None]).to(k.dtype)
    return members.sum(1, keepdim=True), members @ k


def _nearest(k: Tensor, middle: Tensor | None) -> Tensor:
    """int16 [Hk, 1, n]: the cluster of each key [Hk, n, D]."""
    assert middle is not None
    norms = middle.square().sum(-1)
    return _coded(k, lambda wide, some: norms[some, None] - 2 * torch.bmm(wide, middle[some].mT), 1, -1.0)


def _probes(params: KMeansParams, q: Tensor, middle: Tensor, sign: float) -> Tensor:
    """int16 [Hk, G, probes, N]: the clusters that rows [Hk, G, N, D] look into."""
    probes = min(params.num_probes, middle.shape[1])
    rows = _coded(q.flatten(1, 2), lambda wide, some: torch.bmm(wide, middle[some].mT), probes, sign)
    return torch.unflatten(rows, 2, (q.shape[1], q.shape[2])).transpose(1, 2)


def _coded(x: Tensor, numbers: Callable[[Tensor, slice], Tensor], count: int, sign: float) -> Tensor:
    """int16 [Hk, count, n]: for vectors x [Hk, n, D] the places of the largest sign * numbers(x) [Hk, n, C],
    the first of equal ones."""
    codes = torch.empty(len(x), count, x.shape[1], dtype=torch.int16, device=x.device)

    def code_some(some: slice) -> None:
        for a in range(0, x.shape[1], HASHED_AT_ONCE):
            found = numbers(finite_rows(x[some, a : a + HASHED_AT_ONCE]), some).mul_(sign)
            for turn in range(count):
                best = _largest(found)
                codes[some, turn, a : a + HASHED_AT_ONCE] = best
                if turn + 1 < count:
                    found.scatter_(-1, best.unsqueeze(-1), -torch.inf)

    few = len(x) * x.shape[1] <= HASHED_AT_ONCE
    turns = [slice(0, len(x))] if few else [slice(head, head + 1) for head in range(len(x))]
    side_by_side([partial(code_some, turn) for turn in turns], x.device)
    return codes


def _largest(numbers: Tensor) -> Tensor:
    if numbers.device.type == "cpu":  # numpy's argmax is several times faster on a CPU
        return torch.from_numpy(numbers.numpy().argmax(-1))
    return numbers.argmax(-1)


def kmeans_flops(
    params: KMeansParams, num_rows: int, num_keys: int, head_dim: int, num_fitted: int = 0
) -> int:
    """What coding that many rows and keys of one head takes, and fitting its centroids on ``num_fitted``."""
    vectors = num_rows + num_keys + params.iterations * num_fitted
    return 2 * head_dim * params.num_clusters * vectors
