"""How a comparison reads a document: once to see what comes out, once more as ``generate`` would read it, to
time it. Neither takes anything from the prefix cache or leaves anything there."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as Items
from dataclasses import replace

from models.contract import Choice, SequenceState, Slice, SliceResult, Want
from models.errors import NonFiniteOutput, all_finite
from service.compare_figures import Divergence, Reference
from service.sequences import ScoreSequence, Sequence, TokenOut


class ComparedScores(ScoreSequence):
    """Log-likelihood of every token but the first, and the next-token distributions of the sampled ``rows``:
    kept in ``sink`` where they are exact's, else held against exact's as they come.

    Unlike for a score the last token is read too: what follows it is what ``generate`` would say first."""

    def __init__(
        self, token_ids: list[int], choice: Choice, rows: Items[int], sink: Reference | Divergence
    ) -> None:
        super().__init__(token_ids, choice, reads_last=True)
        self._sampled = rows
        self.sink = sink

    def next_slice(self, state: SequenceState, tokens: int) -> Slice:
        start, end = state.length, state.length + tokens
        first, last = (bisect_left(self._sampled, position) for position in (start, end))
        rows = tuple(row - start for row in self._sampled[first:last])
        return replace(super().next_slice(state, tokens), logit_rows=rows)

    def accept(self, result: SliceResult, read: int) -> TokenOut | None:
        super().accept(result, read)
        if result.row_logits is not None:
            if not all_finite(result.row_logits):
                raise NonFiniteOutput(0, "logits")
            self.sink.add(result.row_logits)
        return None


class TimedReading(Sequence):
    """Reads its prompt as far as the first new token's logits, and ends there: what ``generate`` waits for.
    Of an encoder, the hidden states of all rows. Nothing is kept."""

    def __init__(
        self, token_ids: list[int], choice: Choice, *, wants: Want, chunkable: bool, max_tokens: int
    ) -> None:
        super().__init__(0, token_ids, choice)
        self.chunkable = chunkable
        self._wants = wants
        self._max_tokens = max_tokens

    @property
    def capacity(self) -> int:
        """Room for the first new token, as ``generate`` has it."""
        return min(len(self.token_ids) + (self._wants == "logits"), self._max_tokens)

    def want(self, start: int, tokens: int) -> Want:
        ends = start + tokens >= len(self.token_ids)
        return self._wants if ends or self._wants == "hidden" else "nothing"

    def next_slice(self, state: SequenceState, tokens: int) -> Slice:
        """Unverified, even where the server verifies a share of everything: that would be timed too."""
        return replace(super().next_slice(state, tokens), meter=None)

    def accept(self, result: SliceResult, read: int) -> TokenOut | None:
        self.prefill_work.then(result.work)
        self.finished = read >= len(self.token_ids)
        return None
