r"""From token vectors to embeddings.

    mean: e = 1/n sum_i h_i      cls: e = h_0      last: e = h_{n-1}      normalised: e / |e|

Late chunking pools parts of a document whose token vectors have seen all of it (Günther et al. 2024): one
chunk that covers everything equals the document's own mean-pooled embedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from service.errors import ApiError, invalid
from service.inputs import Tokens
from service.schemas import LateChunking


@dataclass(frozen=True)
class Chunk:
    """[first, end) in tokens as processed, and in characters of the text (None for token-id inputs)."""

    token_range: tuple[int, int]
    char_range: tuple[int, int] | None


def pool(hidden: Tensor, pooling: str) -> Tensor:
    """hidden [n, E] -> [E], or [n, E] for "none"."""
    if pooling == "mean":
        return hidden.mean(dim=0)
    if pooling == "none":
        return hidden
    return hidden[0] if pooling == "cls" else hidden[-1]


def finish(vectors: Tensor, dimensions: int | None, normalize: bool) -> list[float] | list[list[float]]:
    """Keep the first ``dimensions`` of [..., E], then normalise."""
    kept = vectors[..., :dimensions]
    kept = F.normalize(kept, dim=-1) if normalize else kept
    if not bool(torch.isfinite(kept).all()):
        raise ApiError("non_finite_output", "The embedding overflowed to NaN or infinity; try dtype float32.")
    values: list[float] | list[list[float]] = kept.tolist()
    return values


def chunks_of(tokens: Tokens, asked: LateChunking, path: str) -> list[Chunk]:
    """The parts that a request asks for."""
    if asked.spans is None:
        assert asked.chunk_tokens is not None
        step = asked.chunk_tokens - asked.overlap
        length = len(tokens.token_ids)
        last = max(length - asked.overlap, 1)
        ranges = [(start, min(start + asked.chunk_tokens, length)) for start in range(0, last, step)]
        return [Chunk(part, _chars(tokens, *part)) for part in ranges]
    if tokens.text is None:
        raise invalid(f"{path}: late_chunking.spans are characters, so they need text, not token ids", path)
    return [
        _span(tokens, first, end, f"late_chunking.spans[{i}]") for i, (first, end) in enumerate(asked.spans)
    ]


def check_chunking(asked: LateChunking) -> None:
    if (asked.chunk_tokens is None) == (asked.spans is None):
        raise invalid("late_chunking takes either chunk_tokens or spans", "late_chunking")
    if asked.chunk_tokens is not None and asked.overlap >= asked.chunk_tokens:
        limit = asked.chunk_tokens - 1
        raise invalid(
            "late_chunking.overlap must be smaller than chunk_tokens", "late_chunking.overlap", le=limit
        )


def _span(tokens: Tokens, first: int, end: int, path: str) -> Chunk:
    chars = len(tokens.text or "")
    if not 0 <= first < end <= chars:
        raise invalid(
            f"{path} must be [first, end) with 0 <= first < end <= {chars} characters", path, max_chars=chars
        )
    inside = [i for i, (a, b) in enumerate(tokens.char_spans) if a < end and b > first]
    if not inside:
        raise invalid(f"{path} covers no token (cut away, or blank text); choose another range", path)
    return Chunk((inside[0], inside[-1] + 1), (first, end))


def _chars(tokens: Tokens, first: int, end: int) -> tuple[int, int] | None:
    spans = [span for span in tokens.char_spans[first:end] if span[1] > span[0]]
    if not tokens.char_spans:
        return None
    return (spans[0][0], spans[-1][1]) if spans else (0, 0)
