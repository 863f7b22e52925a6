r"""From logits to one token: greedy, or a draw from softmax(logits / temperature) cut to top_k and top_p.

    p_i = exp(l_i / T) / sum_j exp(l_j / T),   over the k most likely tokens, cut where the mass reaches top_p

Each choice of a request draws from a generator of its own, keyed by (seed, index of the choice): what else
runs in the batch cannot move a draw. Log-probabilities are those of the model, before temperature and cuts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_MASK_64 = (1 << 64) - 1


@dataclass(frozen=True)
class SamplingParams:
    """``temperature`` 0 is greedy; ``top_k`` None and ``top_p`` 1 cut nothing; ``logprobs`` None returns
    none."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    logprobs: int | None = None


@dataclass(frozen=True)
class Sampled:
    """A token, and (where asked for) its log-probability and the most likely alternatives, best first."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def stream_key(seed: int, index: int) -> int:
    """One 64-bit generator seed per (seed, choice), by splitmix64."""
    x = (seed + (index + 1) * 0x9E3779B97F4A7C15) & _MASK_64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return x ^ (x >> 31)


class Sampler:
    """The draws of one choice, in order."""

    def __init__(self, params: SamplingParams, index: int) -> None:
        self._params = params
        self._generator = torch.Generator().manual_seed(stream_key(params.seed, index))

    def sample(self, logits: Tensor) -> Sampled:
        """logits [V] fp32, finite -> one token."""
        logits = logits.detach().to("cpu", torch.float32)
        params = self._params
        token = int(logits.argmax()) if params.temperature == 0 else self._draw(logits.double())
        if params.logprobs is None:
            return Sampled(token)
        logprobs = logits.log_softmax(dim=-1)
        best = logprobs.topk(min(params.logprobs, logprobs.numel())) if params.logprobs else None
        top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)) if best else ()
        return Sampled(token, float(logprobs[token]), top)

    def _draw(self, logits: Tensor) -> int:
        """Inverse of the cumulative distribution at one uniform number."""
        params = self._params
        scores, order = logits.sort(descending=True, stable=True)
        if params.top_k is not None:
            scores, order = scores[: params.top_k], order[: params.top_k]
        # Subtracting the maximum first keeps tiny temperatures finite.
        probs = ((scores - scores[0]) / params.temperature).softmax(dim=-1)
        cumulative = probs.cumsum(dim=-1)
        kept = int((cumulative - probs < params.top_p).sum())
        uniform = torch.rand((), generator=self._generator, dtype=torch.float64) * cumulative[kept - 1]
        place = int(torch.searchsorted(cumulative[:kept].contiguous(), uniform, right=True))
        return int(order[min(place, kept - 1)])
