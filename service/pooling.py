r"""From token vectors to embeddings.

    mean: e = 1/n sum_i h_i      cls: e = h_0      last: e = h_{n-1}      normalised: e / |e|

Late chunking pools parts of a document whose token vectors have seen all of it (Günther et al. 2024): one
chunk that covers everything equals the document's own mean-pooled embedding."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import accumulate

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


class CharIndex:
    """Which tokens a range of characters touches, and back, in O(log n) a question after one pass."""

    def __init__(self, char_spans: list[tuple[int, int]]) -> None:
        self._spans = char_spans
        self._placed = [i for i, span in enumerate(char_spans) if span != (0, 0)]
        self._visible = [i for i, (a, b) in enumerate(char_spans) if b > a]
        # Monotone by construction, so that a normaliser that swaps neighbours cannot mislead a bisection.
        self._ends = list(accumulate((char_spans[i][1] for i in self._placed), max))
        starts = accumulate((char_spans[i][0] for i in reversed(self._placed)), min)
        self._starts = list(starts)[::-1]

    def tokens_of(self, first: int, end: int) -> tuple[int, int] | None:
        """[first, end) in tokens of the characters [first, end); None where they hold no token."""
        low, high = bisect_right(self._ends, first), bisect_left(self._starts, end)
        return (self._placed[low], self._placed[high - 1] + 1) if low < high else None

    def chars_of(self, first: int, end: int) -> tuple[int, int] | None:
        """[first, end) in characters of the tokens [first, end); (0, 0) where all of them are special, None
        for token-id inputs."""
        if not self._spans:
            return None
        low, high = bisect_left(self._visible, first), bisect_left(self._visible, end)
        if low >= high:
            return (0, 0)
        return (self._spans[self._visible[low]][0], self._spans[self._visible[high - 1]][1])


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


def num_chunks(num_tokens: int, asked: LateChunking) -> int:
    """How many parts an input of ``num_tokens`` will have, without making them."""
    return len(_starts(num_tokens, asked)) if asked.spans is None else len(asked.spans)


def chunks_of(tokens: Tokens, asked: LateChunking, path: str) -> list[Chunk]:
    """The parts that a request asks for. O(tokens + parts log tokens)."""
    index = CharIndex(tokens.char_spans)
    if asked.spans is None:
        length, size = len(tokens.token_ids), asked.chunk_tokens or 0
        ranges = [(start, min(start + size, length)) for start in _starts(length, asked)]
        return [Chunk(part, index.chars_of(*part)) for part in ranges]
    if tokens.text is None:
        raise invalid(f"{path}: late_chunking.spans are characters, so they need text, not token ids", path)
    chars = len(tokens.text)
    return [
        _span(index, chars, first, end, f"late_chunking.spans[{i}]")
        for i, (first, end) in enumerate(asked.spans)
    ]


def check_chunking(asked: LateChunking) -> None:
    if (asked.chunk_tokens is None) == (asked.spans is None):
        raise invalid("late_chunking takes either chunk_tokens or spans", "late_chunking")
    if asked.chunk_tokens is not None and asked.overlap >= asked.chunk_tokens:
        limit = asked.chunk_tokens - 1
        raise invalid(
            "late_chunking.overlap must be smaller than chunk_tokens", "late_chunking.overlap", le=limit
        )


def _starts(num_tokens: int, asked: LateChunking) -> range:
    assert asked.chunk_tokens is not None
    return range(0, max(num_tokens - asked.overlap, 1), asked.chunk_tokens - asked.overlap)


def _span(index: CharIndex, chars: int, first: int, end: int, path: str) -> Chunk:
    if not 0 <= first < end <= chars:
        raise invalid(
            f"{path} must be [first, end) with 0 <= first < end <= {chars} characters", path, max_chars=chars
        )
    inside = index.tokens_of(first, end)
    if inside is None:
        raise invalid(f"{path} covers no token (cut away, or blank text); choose another range", path)
    return Chunk(inside, (first, end))
