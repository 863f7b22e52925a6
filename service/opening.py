"""The sequences of a step, opened where they are new and cut into the slices that it runs."""

from __future__ import annotations

from service.delivery import Delivery, Part
from service.roster import Roster
from service.schedule import Entry, Step


class Opener:
    """Engine thread only."""

    def __init__(self, roster: Roster, delivery: Delivery) -> None:
        self._roster = roster
        self._delivery = delivery

    def open(self, step: Step, now: float) -> list[Part]:
        """The step's parts, without those that have ended or cannot be opened; the latter fail."""
        opened = [self._open(entry, tokens, now) for entry, tokens in step.parts]
        return [part for part in opened if part is not None]

    def _open(self, entry: Entry, tokens: int, now: float) -> Part | None:
        owner = self._roster.owner(entry)
        if owner is None or owner[0].ended:
            return None
        job, sequence = owner
        if job.times.first_step is None:
            job.times.first_step = now
        try:
            if sequence.state is None:
                sequence.state = job.model.open(sequence.capacity, sequence.prompt)
                sequence.cached_tokens = sequence.state.length
                tokens = self._correct(entry, tokens, sequence.cached_tokens)
            start = sequence.state.length
            return Part(job, sequence, entry, start, sequence.next_slice(sequence.state, tokens))
        except Exception as error:
            self._delivery.fail(job, error)
            return None

    def _correct(self, entry: Entry, tokens: int, cached_tokens: int) -> int:
        """How many of the planned ``tokens`` to read where the cache holds ``cached_tokens``."""
        if cached_tokens == entry.read:
            return tokens
        tokens = _from_there(entry, tokens, cached_tokens)
        with self._roster.changed:
            self._roster.scheduler.found(entry, cached_tokens)
        return tokens


def _from_there(entry: Entry, tokens: int, cached_tokens: int) -> int:
    """How many of the planned ``tokens`` to read where the cache holds ``cached_tokens`` and not
    ``entry.read``: no more than planned, ending at a multiple again unless at the prompt's end."""
    if not entry.chunkable:
        return entry.tokens - cached_tokens
    multiple = entry.chunk_multiple
    end = cached_tokens + tokens
    if end < entry.tokens:
        end = max(end // multiple, cached_tokens // multiple + 1) * multiple
    return min(end, entry.tokens) - cached_tokens
