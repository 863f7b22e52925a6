"""How many tokens of a prompt fit into what is left of a step."""

from __future__ import annotations

from dataclasses import dataclass

from service.schedule import Entry


@dataclass
class Budget:
    """What is left of a step: ``tokens``, predicted ``ms``, and tokens that one chunk may have."""

    tokens: int
    ms: float
    chunk_tokens: int

    def spend(self, tokens: int, ms: float) -> None:
        self.tokens -= tokens
        self.ms -= ms

    @property
    def spent(self) -> bool:
        return self.tokens <= 0 or self.ms < 0


def chunk(entry: Entry, budget: Budget, *, forced: bool) -> tuple[int, float]:
    """(tokens, predicted ms) that ``entry`` may read now; (0, 0) where not even its smallest piece fits and
    it is not ``forced``. A piece ends at an absolute multiple of the entry's, or at the prompt's end."""
    tokens = _largest(entry, budget)
    if tokens == 0:
        if not forced:
            return 0, 0.0
        tokens = smallest(entry)
    return tokens, entry.ms(entry.read, tokens)


def smallest(entry: Entry) -> int:
    """Tokens of the smallest piece that may be read next."""
    if not entry.chunkable:
        return entry.left
    return min(entry.left, entry.chunk_multiple - entry.read % entry.chunk_multiple)


def _largest(entry: Entry, budget: Budget) -> int:
    """The most tokens within the budget, found by bisection: prices grow with tokens."""
    ends = _ends(entry, budget)
    if not ends or _fits(entry, ends[-1], budget):
        return ends[-1] - entry.read if ends else 0
    low, high = -1, len(ends) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _fits(entry, ends[middle], budget) else (low, middle)
    return ends[low] - entry.read if low >= 0 else 0


def _fits(entry: Entry, end: int, budget: Budget) -> bool:
    return entry.ms(entry.read, end - entry.read) <= budget.ms


def _ends(entry: Entry, budget: Budget) -> range | list[int]:
    """Where a piece may end within the budget's tokens."""
    if not entry.chunkable:
        return [entry.tokens] if entry.left <= budget.tokens else []
    multiple = entry.chunk_multiple
    first = entry.read + multiple - entry.read % multiple
    last = entry.read + min(entry.left, budget.tokens, max(budget.chunk_tokens, multiple))
    ends = range(first, last + 1, multiple)
    if last == entry.tokens and last % multiple:
        return [*ends, last]
    return ends
