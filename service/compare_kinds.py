"""What is compared of a model: of a causal language model what it predicts, of an encoder its vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from models.contract import Choice, ServedModel, Want
from service.compare_figures import (
    Divergence,
    Reference,
    cosine,
    perplexity,
    perplexity_change,
    sampled_rows,
    vector_error,
)
from service.compare_sequences import ComparedScores, TimedReading
from service.errors import invalid
from service.estimate import looks_ahead
from service.pooling import pool
from service.sequences import EncodeSequence, Sequence

FP32_BYTES = 4
Figures = dict[str, Any]
"""Fields of ``Compared``."""


class Kind(ABC):
    """Of one document under one model. ``reading`` and ``figures`` of exact come first: the others are held
    against it."""

    def __init__(self, model: ServedModel, token_ids: list[int]) -> None:
        self.model = model
        self.token_ids = token_ids

    @property
    @abstractmethod
    def kept_bytes(self) -> int:
        """Of exact's outputs, kept until the comparison ends."""

    @abstractmethod
    def step_bytes(self, chunk_tokens: int) -> int:
        """What comparing takes in a step of so many tokens, beyond what the model's own estimate holds."""

    @abstractmethod
    def reading(self, choice: Choice) -> Sequence:
        """What reads the document under ``choice`` to see what comes out."""

    @abstractmethod
    def figures(self, sequence: Sequence) -> Figures:
        """Of a finished ``reading``. Not for the event loop."""

    def timed(self, choice: Choice) -> TimedReading:
        causal = self.model.info.causal
        wants: Want = "hidden" if isinstance(self, VectorKind) else "logits"
        room = self.model.info.max_tokens
        return TimedReading(self.token_ids, choice, wants=wants, chunkable=causal, max_tokens=room)


class PredictionKind(Kind):
    """Perplexity of all tokens; KL and agreement on sampled rows, of which exact's are kept in fp32."""

    def __init__(self, model: ServedModel, token_ids: list[int]) -> None:
        super().__init__(model, token_ids)
        if len(token_ids) < 2:
            raise invalid("input has one token; comparing predictions needs at least two", "input")
        self._rows = sampled_rows(len(token_ids))
        self._reference = Reference(len(self._rows))
        self._exact_scores: list[float] | None = None

    @property
    def kept_bytes(self) -> int:
        return len(self._rows) * self._row_bytes

    @property
    def _row_bytes(self) -> int:
        return self.model.tokenizer.vocab_size * FP32_BYTES

    def step_bytes(self, chunk_tokens: int) -> int:
        share = -(-len(self._rows) * chunk_tokens // len(self.token_ids))
        return min(share + 1, len(self._rows)) * self._row_bytes

    def reading(self, choice: Choice) -> ComparedScores:
        sink = self._reference if self._exact_scores is None else Divergence(self._reference)
        return ComparedScores(self.token_ids, choice, self._rows, sink)

    def figures(self, sequence: Sequence) -> Figures:
        assert isinstance(sequence, ComparedScores)
        if isinstance(sequence.sink, Reference):
            self._exact_scores = sequence.scores
            sameness = {"kl": 0.0, "next_token_agreement": 1.0}
        else:
            sameness = {"kl": sequence.sink.kl, "next_token_agreement": sequence.sink.agreement}
        return {**sameness, "sampled_rows": len(self._rows), **self._perplexity(sequence)}

    def _perplexity(self, sequence: ComparedScores) -> Figures:
        assert self._exact_scores is not None
        if looks_ahead(sequence.choice):
            return {"perplexity_missing": LOOKS_AHEAD}
        own, change = perplexity(sequence.scores), perplexity_change(sequence.scores, self._exact_scores)
        if own is None or change is None:
            return {"perplexity_missing": "it is too large for a number"}
        return {
            "perplexity": own,
            "perplexity_change": change.relative,
            "perplexity_change_se": change.standard_error,
        }


class VectorKind(Kind):
    """The pooled vector and all token vectors, of which exact's are kept."""

    def __init__(self, model: ServedModel, token_ids: list[int]) -> None:
        super().__init__(model, token_ids)
        self._exact: Tensor | None = None

    @property
    def kept_bytes(self) -> int:
        """Exact's own reading counts them itself, as what is kept for its answer."""
        return 0 if self._exact is None else self._exact.nbytes

    def step_bytes(self, chunk_tokens: int) -> int:
        return 0

    def reading(self, choice: Choice) -> EncodeSequence:
        return EncodeSequence(0, self.token_ids, choice, chunkable=self.model.info.causal, pooling="none")

    def figures(self, sequence: Sequence) -> Figures:
        assert isinstance(sequence, EncodeSequence)
        hidden, pooling = sequence.hidden, self.model.info.pooling or "mean"
        if self._exact is None:
            self._exact = hidden
        return {
            "cosine": cosine(pool(hidden, pooling), pool(self._exact, pooling)),
            "token_vector_error": vector_error(hidden, self._exact),
        }


LOOKS_AHEAD = (
    "this backend selects keys by looking at the whole prompt, so likelihoods of earlier tokens would depend "
    "on later ones; KL and agreement say how far its predictions lie from exact's"
)


def kind_of(model: ServedModel, token_ids: list[int]) -> Kind:
    """A model that can do both is compared by its predictions."""
    return (PredictionKind if "score" in model.info.tasks else VectorKind)(model, token_ids)
