"""Does a passage encoded under an attention backend still answer the queries that it should?

Every passage is encoded by the contender in every layer, every query by exact alone: an index is built once,
cheaply, and asked by a reader of short texts. Similarity is the cosine of the pooled embeddings.

    recall@1 = share of queries whose own passage comes first
    MRR@10   = mean of 1 / rank of the own passage, 0 beyond rank 10
    cosine   = mean over passages of cos(contender's embedding, exact's)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.math.cache import DRAWS
from models.contract import Choice, ServedModel, Slice
from models.quality_contenders import Contender, contender
from models.quality_ladders import EXACT

WITHIN = 10
"""Ranks that the reciprocal rank counts."""


@dataclass(frozen=True)
class Task:
    """Tokens of the passages, tokens of the queries, and the passage [Q] that each query belongs to."""

    passages: list[list[int]]
    queries: list[list[int]]
    answers: list[int]


@dataclass(frozen=True)
class RetrievalRow:
    """One contender over all passages. Times are sums over them, ``exact_`` those of exact in turns with
    it."""

    tokens: int
    backend: str
    params: dict[str, Any]
    full: dict[str, Any]
    recall_at_1: float
    mrr_at_10: float
    cosine: float
    worst_cosine: float
    encode_s: float
    exact_encode_s: float
    attention_s: float
    exact_attention_s: float

    @property
    def encode_share(self) -> float:
        return self.encode_s / self.exact_encode_s

    @property
    def attention_share(self) -> float:
        return self.attention_s / self.exact_attention_s


@dataclass
class _Encoded:
    """What one contender made of the passages."""

    contender: Contender
    embeddings: list[Tensor] = field(default_factory=list)
    encode_s: float = 0.0
    attention_s: float = 0.0


def encode(model: ServedModel, token_ids: Sequence[int], choice: Choice) -> tuple[Tensor, float]:
    """The unit embedding [E] of one text, and the seconds that its attention took."""
    sequence = model.open(len(token_ids))
    result = model.step([Slice(sequence, token_ids, choice, "hidden", len(token_ids))]).results[0]
    sequence.close()
    assert result.hidden is not None
    return F.normalize(pooled(result.hidden, model.info.pooling), dim=-1), result.work.attention_ms / 1e3


def pooled(hidden: Tensor, pooling: str | None) -> Tensor:
    """hidden [n, E] -> [E], as the model pools."""
    if pooling in (None, "mean"):
        return hidden.mean(0)
    return hidden[0] if pooling == "cls" else hidden[-1]


def embed(model: ServedModel, texts: Sequence[Sequence[int]]) -> Tensor:
    """Unit embeddings [texts, E] by exact."""
    choice = contender(EXACT, {}).choice(0)
    return torch.stack([encode(model, token_ids, choice)[0] for token_ids in texts])


def measure_retrieval(
    model: ServedModel, task: Task, queries: Tensor, contenders: Sequence[Contender], *, seed: int = 0
) -> list[RetrievalRow]:
    """Contenders over the same passages, in turns with exact passage by passage. ``queries`` [Q, E] are the
    task's, embedded."""
    exact = _Encoded(contender(EXACT, {}))
    mine = [exact if each.backend == EXACT else _Encoded(each) for each in contenders]
    everyone = [exact, *(its for its in mine if its is not exact)]
    for number, token_ids in enumerate(task.passages):
        begin = number % len(everyone)
        for its in [*everyone[begin:], *everyone[:begin]]:  # nobody is always first
            _encode_one(model, token_ids, its, seed)
    answers = torch.tensor(task.answers)
    tokens = max(map(len, task.passages))
    return [_row(its, exact, queries, answers, tokens) for its in mine]


def _encode_one(model: ServedModel, token_ids: Sequence[int], its: _Encoded, seed: int) -> None:
    """Random keys that an earlier passage left behind are drawn again."""
    DRAWS.clear()
    began = perf_counter()
    embedding, attention_s = encode(model, token_ids, its.contender.choice(seed))
    its.encode_s += perf_counter() - began
    its.attention_s += attention_s
    its.embeddings.append(embedding)


def _row(its: _Encoded, exact: _Encoded, queries: Tensor, answers: Tensor, tokens: int) -> RetrievalRow:
    passages = torch.stack(its.embeddings)
    cosines = (passages * torch.stack(exact.embeddings)).sum(-1)
    ranks = ranks_of(queries @ passages.T, answers)
    return RetrievalRow(
        tokens=tokens,
        backend=its.contender.backend,
        params=its.contender.params,
        full=its.contender.full,
        recall_at_1=float((ranks == 1).double().mean()),
        mrr_at_10=float(torch.where(ranks <= WITHIN, 1 / ranks.double(), 0.0).mean()),
        cosine=float(cosines.mean()),
        worst_cosine=float(cosines.min()),
        encode_s=its.encode_s,
        exact_encode_s=exact.encode_s,
        attention_s=its.attention_s,
        exact_attention_s=exact.attention_s,
    )


def ranks_of(scores: Tensor, answers: Tensor) -> Tensor:
    """Rank [Q], from 1, of each query's own passage in scores [Q, P]; of equal scores it comes last."""
    own = scores.gather(1, answers[:, None])
    return (scores >= own).sum(1)
