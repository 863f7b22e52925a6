"""What each method makes of one set of attention weights, at equal memory.

    P = softmax(beta q k^T)     error = mean over rows of sum_j |P^_ij - P_ij|, 0 .. 2
    budget b:  sparse h x c = b keys a row  ·  low-rank m = b / 2 features  ·  scatterbrain h x c + 2 m = b

Chen et al., "Scatterbrain" (arXiv 2110.15343): a feature takes what two keys take, one number
for the query and one for the key, so at equal memory the method that has both has half as many keys and half
as many features. The backends answer for themselves: with the identity as values, what ``attend`` returns is
P^. Keys are not centred and there are no sinks, as in the paper. ``lsh`` always keeps a window; the smallest,
one key on each side, is counted in ``keys_per_row`` and finds nothing but by chance, since queries and keys
stand in orders of their own. Two oracles that know P stand beside them: the b largest weights of each row,
and scatterbrain over as many of the largest as its hashes look at.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.api import attend
from kernels.contract import AttentionResult, Call
from kernels.math.features import FeatureParams, feature_map

NUM_TOKENS = 512
HEAD_DIM = 32
NUM_CLUSTERS = 32
CLUSTER_SIZE = 32
"""Keys per hash round of the sparse method; scatterbrain looks at half as many."""
SPARSE, LOW_RANK, SCATTERBRAIN = REALISABLE = ("sparse", "low-rank", "scatterbrain")
ORACLE_SCATTERBRAIN, ORACLE_TOP = ORACLES = ("oracle-support scatterbrain", "oracle top-k")


@dataclass(frozen=True)
class Sample:
    """One draw: q and k [1, 1, n, d] fp64, unit vectors; ``seed`` drives the methods' own draws."""

    q: Tensor
    k: Tensor
    seed: int


@dataclass
class Point:
    """One budget, spread and beta; every list has an entry per draw.

    ``entropy``: mean over rows of P's entropy over log n, 1 where every key weighs alike.
    ``support_recall``: mean share of P's mass on what scatterbrain's hashes found; ``sparse_recall`` on what
    the sparse method's found. ``keys_per_row``: exact pairs per row, windows included.
    """

    budget: int
    spread: float
    beta: float
    entropies: list[float] = field(default_factory=list)
    support_recalls: list[float] = field(default_factory=list)
    sparse_recalls: list[float] = field(default_factory=list)
    errors: dict[str, list[float]] = field(default_factory=dict)
    keys_per_row: dict[str, float] = field(default_factory=dict)

    @property
    def entropy(self) -> float:
        return mean(self.entropies)

    @property
    def support_recall(self) -> float:
        return mean(self.support_recalls)

    @property
    def sparse_recall(self) -> float:
        return mean(self.sparse_recalls)

    def error(self, method: str) -> float:
        return mean(self.errors[method])

    @property
    def best(self) -> str:
        """Of the realisable methods, by mean error."""
        return min(REALISABLE, key=self.error)

    @property
    def told_apart(self) -> bool:
        """Whether the best leads the next by more than two standard errors of their paired difference."""
        first, second = sorted(REALISABLE, key=self.error)[:2]
        apart = [b - a for a, b in zip(self.errors[first], self.errors[second], strict=True)]
        if len(apart) < 2:
            return False
        centre = mean(apart)
        deviation = math.sqrt(sum((x - centre) ** 2 for x in apart) / (len(apart) - 1))
        return centre > 2 * deviation / math.sqrt(len(apart))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def draw_sample(spread: float, seed: int) -> Sample:
    """Queries and keys of NUM_CLUSTERS equal clusters, each in a random order of its own: a unit vector plus
    normal noise of root mean square norm ``spread``, normalised."""
    generator, noise = torch.Generator().manual_seed(seed), spread / math.sqrt(HEAD_DIM)

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, HEAD_DIM, generator=generator, dtype=torch.float64)

    centres = F.normalize(normal(NUM_CLUSTERS), dim=-1)

    def members() -> Tensor:
        own = torch.randperm(NUM_TOKENS, generator=generator) % NUM_CLUSTERS
        return F.normalize(centres[own] + noise * normal(NUM_TOKENS), dim=-1)[None, None]

    return Sample(members(), members(), seed)


def settings(budget: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Backend and params of the realisable methods."""
    rounds = budget // CLUSTER_SIZE
    found = {"support": "lsh", "support_params": _hashes(rounds, CLUSTER_SIZE // 2)}
    return {
        SPARSE: ("lsh", _hashes(rounds, CLUSTER_SIZE)),
        LOW_RANK: ("performer", {"num_features": budget // 2, "centre_keys": 0}),
        SCATTERBRAIN: ("scatterbrain", {"num_features": budget // 4, "centre_keys": 0, **found}),
    }


def _hashes(rounds: int, cluster_size: int) -> dict[str, Any]:
    buckets = {"variant": "smyrf", "num_hash_rounds": rounds, "cluster_size": cluster_size}
    return {**buckets, "window": 1, "sinks": 0, "centre_keys": 0}


def measure(point: Point, sample: Sample) -> None:
    """Add one draw to the point."""
    scores = point.beta * (sample.q[0, 0] @ sample.k[0, 0].T)
    exact, lse = torch.softmax(scores, -1), torch.logsumexp(scores, -1)
    point.entropies.append(float(torch.special.entr(exact).sum(-1).mean()) / math.log(NUM_TOKENS))
    for name, weights in _weights(point, sample, scores, lse).items():
        point.errors.setdefault(name, []).append(float((weights - exact).abs().sum(-1).mean()))


def _weights(point: Point, sample: Sample, scores: Tensor, lse: Tensor) -> dict[str, Tensor]:
    """P^ [n, n] of every method; notes what the hashes found."""
    known = settings(point.budget)
    answers = {name: _answer(point, sample, *known[name]) for name in REALISABLE}
    support = _answer(point, sample, "lsh", known[SCATTERBRAIN][1]["support_params"])
    point.sparse_recalls.append(_recall(answers[SPARSE], lse))
    point.support_recalls.append(_recall(support, lse))
    for name, answer in answers.items():
        point.keys_per_row[name] = answer.stats.pairs_kept / NUM_TOKENS
    found = {name: answer.out[0, 0] for name, answer in answers.items()}
    found[ORACLE_SCATTERBRAIN] = _oracle_scatterbrain(point, sample, scores)
    found[ORACLE_TOP] = torch.softmax(scores.masked_fill(~_largest(scores, point.budget), -math.inf), -1)
    return found


def _answer(point: Point, sample: Sample, backend: str, params: dict[str, Any]) -> AttentionResult:
    identity = torch.eye(NUM_TOKENS, dtype=sample.q.dtype)[None, None]
    return attend(
        sample.q,
        sample.k,
        identity,
        backend=backend,
        params=params,
        causal=False,
        scale=point.beta,
        seed=sample.seed,
    )


def _recall(answer: AttentionResult, lse: Tensor) -> float:
    if answer.lse is None:
        raise AssertionError("a sparse backend without a log-sum-exp. This is a bug.")
    return float(torch.exp(answer.lse[0, 0].double() - lse).mean())


def _largest(scores: Tensor, count: int) -> Tensor:
    """bool [n, n]: each row's ``count`` largest."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(count, -1).indices, True)


def _oracle_scatterbrain(point: Point, sample: Sample, scores: Tensor) -> Tensor:
    """The definition itself on the largest logits, with the backend's own features."""
    params = FeatureParams(num_features=point.budget // 4, centre_keys=0)
    call = Call(causal=False, scale=point.beta, seed=sample.seed, layer=0, start=0)
    fmap = feature_map(params, call, 1, HEAD_DIM, sample.q.dtype, sample.q.device)
    queries = fmap.log_queries(sample.q.unsqueeze(1))[0, 0, 0].exp()
    estimated = queries @ fmap.log_keys(sample.k)[0, 0].exp().T
    weights = torch.where(_largest(scores, point.budget // 2), scores.exp(), estimated)
    return weights / weights.sum(-1, keepdim=True)
