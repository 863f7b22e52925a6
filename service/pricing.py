"""One sequence as the scheduler sees it: its ``Entry``, and what its slices cost.

    slice_ms(start, tokens) = CostModel.price(model, backend, Flops of those tokens)

FLOPs of a slice never change and are kept; what one costs in ms is asked anew, since the cost model
learns."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Items

from models.contract import Choice, Flops, Want
from service.cost import CostModel
from service.estimate import looks_ahead, verify_ms
from service.jobs import Job
from service.schedule import CHUNK_MULTIPLE, Entry
from service.sequences import Sequence

DECODE_BUCKET_TOKENS = 128
"""Lengths of a decoding sequence that are priced alike."""
MAX_KEPT = 64


class Prices:
    """Predicted ms of one sequence's slices; what ``Entry.price`` is."""

    def __init__(self, job: Job, sequence: Sequence, costs: CostModel) -> None:
        self._model = job.model
        self._sequence = sequence
        self._costs = costs
        self._kept: dict[tuple[int, int], Flops] = {}

    def __call__(self, start: int, tokens: int) -> float:
        """Of ``tokens`` of the prompt from ``start`` on; where that lies beyond it, of one decoded token."""
        choice, flops = self._choice(start), self.flops(start, tokens)
        price = self._costs.price(self._model.info.name, choice.backend, flops)
        return price + self._verify_ms(start, tokens)

    def flops(self, start: int, tokens: int) -> Flops:
        sequence = self._sequence
        want: Want = "logits"
        if start >= sequence.prompt_tokens:
            start = max(start // DECODE_BUCKET_TOKENS * DECODE_BUCKET_TOKENS, sequence.prompt_tokens)
        else:
            want = sequence.want(start, tokens)
        found = self._kept.get((start, tokens))
        if found is None:
            if len(self._kept) >= MAX_KEPT:
                self._kept.clear()
            found = self._model.flops(tokens, start, self._choice(start), want)
            self._kept[start, tokens] = found
        return found

    def _verify_ms(self, start: int, tokens: int) -> float:
        """Of the rows that exact attention computes again to measure the error."""
        effort = self._sequence.effort
        share = effort.prefill if start < self._sequence.prompt_tokens else effort.decode
        return verify_ms(self._model, self._costs, share, start, tokens)

    def _choice(self, start: int) -> Choice:
        sequence = self._sequence
        return sequence.choice if start < sequence.prompt_tokens else sequence.decode_choice


class Entries:
    """Makes entries, each with a key of its own."""

    def __init__(self, costs: CostModel) -> None:
        self._costs = costs
        self._keys = itertools.count()

    def group(self, job: Job, members: Items[Sequence], now: float) -> Entry:
        """Of one input, read by the first of ``members``: memory and places of those that follow it are
        reserved with its own."""
        leader = members[0]
        entry = self._make(job, leader, now)
        entry.bytes = sum(member.estimated_bytes for member in members)
        entry.output_bytes = leader.output_bytes
        entry.places = len(members) if job.model.info.causal else 0
        if leader.prompt is not None:
            entry.read = min(job.model.cached_tokens(leader.prompt), leader.prompt_tokens - 1)
        return entry

    def follower(self, job: Job, sequence: Sequence, now: float) -> Entry:
        """Of a choice that has forked from its leader and decodes; its bytes come from the leader."""
        entry = self._make(job, sequence, now)
        entry.read, entry.decoding = entry.tokens, True
        return entry

    def _make(self, job: Job, sequence: Sequence, now: float) -> Entry:
        sequence.entry = Entry(
            key=next(self._keys),
            job=job.id,
            model=job.model.info.name,
            tokens=sequence.prompt_tokens,
            chunkable=sequence.chunkable and not looks_ahead(sequence.choice),
            bytes=0,
            price=Prices(job, sequence, self._costs),
            arrived=now,
            priority=job.priority,
            deadline=job.deadline,
            queue_deadline=job.queue_deadline,
            chunk_multiple=max(CHUNK_MULTIPLE, sequence.choice.params.chunk_multiple()),
        )
        return sequence.entry
