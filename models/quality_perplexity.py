"""Perplexity of a text under an attention backend in every layer, read chunk by chunk as a server reads it.

    perplexity = exp( mean_i -log p(t_{i+1} | t_0 .. t_i) )        i from SKIPPED_TOKENS on

Each contender follows its own trajectory. The change against exact is paired token by token; its standard
error is that of the mean difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from models.contract import Choice, ServedModel, Slice, Work
from models.quality_contenders import Contender
from models.quality_record import chunks

SKIPPED_TOKENS = 64
"""First predictions left out: with so little context their surprise says nothing about attention."""


@dataclass(frozen=True)
class Reading:
    """One text read once: log-likelihood ``scores`` [T] (natural log), what attention did, wall time."""

    scores: Tensor
    work: Work
    total_s: float


@dataclass(frozen=True)
class PerplexityRow:
    """One contender's reading against the last exact one before it. ``change_percent`` of the perplexity,
    with its standard error over tokens."""

    tokens: int
    backend: str
    params: dict[str, Any]
    full: dict[str, Any]
    perplexity: float
    exact_perplexity: float
    change_percent: float
    standard_error_percent: float
    attention_s: float
    selection_s: float
    total_s: float
    exact_attention_s: float
    exact_total_s: float
    density: float

    @property
    def time_share(self) -> float:
        return self.attention_s / self.exact_attention_s

    @property
    def total_share(self) -> float:
        return self.total_s / self.exact_total_s


def read_text(model: ServedModel, token_ids: Sequence[int], choice: Choice, chunk_tokens: int) -> Reading:
    """Read all of ``token_ids`` but the last, which is only predicted."""
    tokens = len(token_ids) - 1
    sequence = model.open(tokens)
    scores, work, began = [], Work(), perf_counter()
    for rows in chunks(tokens, chunk_tokens):
        targets = token_ids[rows.start + 1 : rows.stop + 1]
        step = model.step([Slice(sequence, token_ids[rows], choice, "scores", tokens, targets)])
        result = step.results[0]
        assert result.scores is not None
        scores.append(result.scores)
        work.add(result.work)
    total_s = perf_counter() - began
    sequence.close()
    return Reading(torch.cat(scores), work, total_s)


def compare(
    tokens: int, contender: Contender, reading: Reading, exact: Reading, skipped: int = SKIPPED_TOKENS
) -> PerplexityRow:
    """ValueError where no token is left after the first ``skipped``."""
    if tokens <= skipped:
        raise ValueError(f"{tokens} tokens leave none to score after the first {skipped}")
    surprise, exact_surprise = -reading.scores.double()[skipped:], -exact.scores.double()[skipped:]
    difference = surprise - exact_surprise
    factor = math.exp(float(difference.mean()))
    spread = float(difference.std(correction=0)) / math.sqrt(len(difference))
    return PerplexityRow(
        tokens=tokens,
        backend=contender.backend,
        params=contender.params,
        full=contender.full,
        perplexity=math.exp(float(surprise.mean())),
        exact_perplexity=math.exp(float(exact_surprise.mean())),
        change_percent=100 * (factor - 1),
        standard_error_percent=100 * factor * spread,
        attention_s=reading.work.attention_ms / 1e3,
        selection_s=reading.work.selection_ms / 1e3,
        total_s=reading.total_s,
        exact_attention_s=exact.work.attention_ms / 1e3,
        exact_total_s=exact.total_s,
        density=reading.work.pairs_kept / reading.work.pairs_exact,
    )
