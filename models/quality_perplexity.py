"""Perplexity of a text under an attention backend in every layer, read chunk by chunk as a server reads it.

    perplexity = exp( mean_i -log p(t_{i+1} | t_0 .. t_i) )        i from SKIPPED_TOKENS on

Each contender follows its own trajectory. The change against exact is paired token by token. Its standard
error takes B blocks of ``BLOCK_TOKENS`` tokens for independent, as neighbouring tokens are not:

    se^2 = B / (B - 1) sum_b ( sum_{i in b} (d_i - mean d) )^2 / n^2        d_i difference of token i
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from kernels.math.cache import DRAWS
from models.contract import Choice, ServedModel, Slice, Work
from models.quality_contenders import Contender
from models.quality_record import chunks

SKIPPED_TOKENS = 64
"""First predictions left out: with so little context their surprise says nothing about attention."""

BLOCK_TOKENS = 64
"""Tokens whose differences may hang together."""


@dataclass(frozen=True)
class Reading:
    """One text read once: log-likelihood ``scores`` [T] (natural log), what attention did, wall time."""

    scores: Tensor
    work: Work
    total_s: float


@dataclass(frozen=True)
class Change:
    """A perplexity against exact's over the same tokens. ``percent`` with its standard error over blocks of
    tokens, None where there is only one."""

    perplexity: float
    exact_perplexity: float
    percent: float
    standard_error_percent: float | None


@dataclass(frozen=True)
class PerplexityRow:
    """One contender's reading against the last exact one before it. ``change_percent`` of the perplexity,
    with its standard error over blocks of tokens, None where there is only one."""

    tokens: int
    backend: str
    params: dict[str, Any]
    full: dict[str, Any]
    perplexity: float
    exact_perplexity: float
    change_percent: float
    standard_error_percent: float | None
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
    """Read all of ``token_ids`` but the last, which is only predicted. Random keys that an earlier reading
    left behind are drawn again."""
    DRAWS.clear()
    tokens = len(token_ids) - 1
    sequence = model.open(tokens)
    scores, work, began = [], Work(), perf_counter()
    for rows in chunks(tokens, chunk_tokens):
        targets = token_ids[rows.start + 1 : rows.stop + 1]
        step = model.step([Slice(sequence, token_ids[rows], choice, "scores", tokens, targets)])
        result = step.results[0]
        assert result.scores is not None
        scores.append(result.scores)
        work.then(result.work)
    total_s = perf_counter() - began
    sequence.close()
    return Reading(torch.cat(scores), work, total_s)


def compare(
    tokens: int, contender: Contender, reading: Reading, exact: Reading, skipped: int = SKIPPED_TOKENS
) -> PerplexityRow:
    """ValueError where no token is left after the first ``skipped``."""
    if tokens <= skipped:
        raise ValueError(f"{tokens} tokens leave none to score after the first {skipped}")
    change = change_of(reading.scores[skipped:], exact.scores[skipped:])
    return PerplexityRow(
        tokens=tokens,
        backend=contender.backend,
        params=contender.params,
        full=contender.full,
        perplexity=change.perplexity,
        exact_perplexity=change.exact_perplexity,
        change_percent=change.percent,
        standard_error_percent=change.standard_error_percent,
        attention_s=reading.work.attention_ms / 1e3,
        selection_s=reading.work.selection_ms / 1e3,
        total_s=reading.total_s,
        exact_attention_s=exact.work.attention_ms / 1e3,
        exact_total_s=exact.total_s,
        density=reading.work.pairs_kept / reading.work.pairs_exact,
    )


def change_of(scores: Tensor, exact_scores: Tensor) -> Change:
    """Of the same tokens' scores [n], in the order of the text."""
    surprise, exact_surprise = -scores.double(), -exact_scores.double()
    difference = surprise - exact_surprise
    factor = math.exp(float(difference.mean()))
    spread = standard_error(difference)
    return Change(
        math.exp(float(surprise.mean())),
        math.exp(float(exact_surprise.mean())),
        100 * (factor - 1),
        None if spread is None else 100 * factor * spread,
    )


def standard_error(difference: Tensor) -> float | None:
    """Of the mean of ``difference`` [T]; None for a single block."""
    blocks = torch.split(difference - difference.mean(), BLOCK_TOKENS)
    if len(blocks) < 2:
        return None
    squares = sum(float(block.sum()) ** 2 for block in blocks)
    return math.sqrt(squares * len(blocks) / (len(blocks) - 1)) / len(difference)
