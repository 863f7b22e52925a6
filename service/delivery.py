"""What a step gave, taken to whom it belongs: each sequence takes in its result, choices that follow it fork
from it, tokens go out, what is complete is closed. Whatever fails here fails its own request alone."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from models.contract import Slice, SliceResult
from service.failures import failure_of
from service.jobs import Channel, Job, put_all
from service.logs import log_failure
from service.roster import Roster
from service.schedule import Entry
from service.sequences import GenerateSequence, Sequence, TokenOut

log = logging.getLogger("longreach.engine")


@dataclass(frozen=True)
class Part:
    """One sequence in one step."""

    job: Job
    sequence: Sequence
    entry: Entry
    start: int
    """Position of its first token."""
    slice: Slice


class Delivery:
    """Engine thread only."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._untold: list[tuple[Channel, list[TokenOut]]] = []
        """Tokens of this step whose clients have not been told yet."""

    def deliver_all(self, results: Iterable[tuple[Part, SliceResult]], now: float) -> None:
        """What a step gave to all its parts."""
        for part, result in results:
            self._deliver(part, result, now)
        self._flush()

    def _deliver(self, part: Part, result: SliceResult, now: float) -> None:
        """The result of a part whose request has not ended by now; of others nothing is kept."""
        job, sequence, entry = part.job, part.sequence, part.entry
        if job.ended:
            return
        try:
            token = sequence.accept(result, entry.read)
            if token is None:
                self._finish_if_done(job, [sequence])
            elif entry.decoding:
                self._tell(job, [token], now)
                self._finish_if_done(job, [sequence])
            else:
                self._begin_decoding(part, token, result, now)
        except Exception as error:
            self.fail(job, error)

    def fail(self, job: Job, error: Exception) -> None:
        if not job.ended:
            log_failure(log, f"request {job.id} failed", error)
        self._flush()
        with self._roster.changed:
            self._roster.end(job, failure_of(error, job))

    def _begin_decoding(self, part: Part, token: TokenOut, result: SliceResult, now: float) -> None:
        """The prompt is read: the choices that share it take their first tokens from the same logits."""
        job, leader = part.job, part.sequence
        followers = [s for s in job.sequences if isinstance(s, GenerateSequence) and s.leader is leader]
        tokens = [token]
        assert leader.state is not None and (result.logits is not None or not followers)
        for follower in followers:
            assert result.logits is not None
            tokens.append(follower.draw(result.logits))
            if not follower.finished:
                follower.state = job.model.fork(leader.state, follower.capacity)
        with self._roster.changed:
            part.entry.decoding = True
            if job.ended:
                return
            if followers:
                self._roster.follow(job, part.entry, followers)
        self._tell(job, tokens, now)
        self._finish_if_done(job, [leader, *followers])

    def _tell(self, job: Job, tokens: list[TokenOut], now: float) -> None:
        for _ in tokens:
            job.note_token(now)
        if job.stream:
            self._untold.append((job.channel, tokens))

    def _flush(self) -> None:
        told, self._untold = self._untold, []
        put_all(told)

    def _finish_if_done(self, job: Job, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            if sequence.finished:
                sequence.close()
                self._flush()  # the end must not overtake the last token
                with self._roster.changed:
                    self._roster.finish(job, sequence)
