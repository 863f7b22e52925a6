r"""How far a model's output under one attention lies from that under ``exact``, row beside row.

    perplexity change = exp(mean d) - 1,   d_i = log p_exact(token i) - log p(token i)
    KL                = mean over sampled rows of sum_w p_exact(w) (log p_exact(w) - log p(w)), in nats
    agreement         = share of sampled rows whose likeliest next token is exact's
    cosine            = <e, e_exact> / (|e| |e_exact|) of pooled vectors
    vector error      = sqrt(sum_i |h_i - h_exact,i|^2 / sum_i |h_exact,i|^2) over all token vectors

Neighbouring tokens err together, so the standard error of mean d is taken over blocks b of 64 tokens, with
m_b tokens and sum S_b (a ratio of cluster totals; the last block may be shorter):

    se^2 = B / (B - 1) sum_b (S_b - m_b mean d)^2 / n^2,   and that of the change is se * exp(mean d)"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_SAMPLED_ROWS = 256
BLOCK_TOKENS = 64
ROWS_AT_ONCE = 32
"""Rows of [rows, V] of which copies exist at a time."""
MAX_EXPONENT = 700.0
"""exp of more is no number."""


def sampled_rows(tokens: int) -> list[int]:
    """Rows whose next-token distribution is compared: at most 256, evenly spaced, always the last one."""
    count = min(tokens, MAX_SAMPLED_ROWS)
    return [(i + 1) * tokens // count - 1 for i in range(count)]


@dataclass(frozen=True)
class Change:
    """Relative change of perplexity and its standard error; None where fewer than two blocks say."""

    relative: float
    standard_error: float | None


def perplexity(scores: Sequence[float]) -> float | None:
    """exp(-mean log p); None where that is beyond what a number holds."""
    mean = -math.fsum(scores) / len(scores)
    return math.exp(mean) if mean < MAX_EXPONENT else None


def perplexity_change(scores: Sequence[float], exact: Sequence[float]) -> Change | None:
    """Of the same tokens' log-likelihoods under both; None where it is beyond what a number holds."""
    differences = [b - a for a, b in zip(scores, exact, strict=True)]
    mean = math.fsum(differences) / len(differences)
    if not abs(mean) < MAX_EXPONENT:
        return None
    blocks = [differences[i : i + BLOCK_TOKENS] for i in range(0, len(differences), BLOCK_TOKENS)]
    error = None
    if len(blocks) > 1:
        squares = math.fsum((math.fsum(block) - len(block) * mean) ** 2 for block in blocks)
        error = math.sqrt(len(blocks) / (len(blocks) - 1) * squares) / len(differences)
    return Change(math.expm1(mean), None if error is None else error * math.exp(mean))


class Reference:
    """Log-probabilities [R, V] fp32 of exact's sampled rows, filled from the first on."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._log_probs: Tensor | None = None
        self._filled = 0

    @property
    def num_bytes(self) -> int:
        return 0 if self._log_probs is None else self._log_probs.nbytes

    def add(self, logits: Tensor) -> None:
        """The next rows [r, V], from any device."""
        if self._log_probs is None:
            self._log_probs = torch.empty(self._rows, logits.shape[1])
        end = self._filled + len(logits)
        torch.log_softmax(logits.cpu().float(), -1, out=self._log_probs[self._filled : end])
        self._filled = end

    def rows(self, first: int, end: int) -> Tensor:
        assert self._log_probs is not None and end <= self._filled, "exact has not read so far"
        return self._log_probs[first:end]


class Divergence:
    """KL from ``reference`` and agreement with it, summed as rows come."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self.rows = 0
        self._kl = 0.0
        self._agreed = 0

    def add(self, logits: Tensor) -> None:
        """The next rows [r, V]. The reference is on the CPU."""
        for part in torch.split(logits, ROWS_AT_ONCE):
            exact = self._reference.rows(self.rows, self.rows + len(part))
            used = part.cpu().float().log_softmax(-1)
            self._agreed += int((used.argmax(-1) == exact.argmax(-1)).sum())
            self._kl += float((exact.exp() * (exact - used)).sum(dtype=torch.float64))
            self.rows += len(part)

    @property
    def kl(self) -> float:
        """Nats. Never negative but for rounding."""
        return max(self._kl / self.rows, 0.0)

    @property
    def agreement(self) -> float:
        return self._agreed / self.rows


def cosine(vector: Tensor, exact: Tensor) -> float:
    """Of two pooled vectors [E]."""
    return float(F.cosine_similarity(vector.double(), exact.double(), dim=0))


def vector_error(hidden: Tensor, exact: Tensor) -> float | None:
    """Of all token vectors [n, E], relative; None where exact's are zero."""
    missed = torch.linalg.vector_norm(hidden - exact, dtype=torch.float64)
    whole = torch.linalg.vector_norm(exact, dtype=torch.float64)
    return float(missed / whole) if float(whole) > 0 else None
