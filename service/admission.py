"""Who may wait: the queue is bounded in requests, tokens and predicted time, and what could never run is
refused at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from service.drain_rate import DrainRate
from service.ledger import Ledger
from service.schedule import Entry, Lane, Rejected


class Admission:
    """Puts entries among the ledger's waiting ones, or raises Rejected with when to come back."""

    def __init__(self, ledger: Ledger, rate: DrainRate) -> None:
        self._ledger = ledger
        self._limits = ledger.limits
        self._rate = rate

    def check_room(self, requests: int, tokens: int, cost_ms: float) -> None:
        """As if they were admitted: Rejected where they would overfill the queue."""
        self._check_queue(requests, tokens)
        self._check_work({self._lane_of(cost_ms): cost_ms})

    def admit(self, entries: Sequence[Entry]) -> None:
        """All entries of one request, priced and in their lanes, or none of them."""
        self._check_possible(entries)
        costs: dict[Lane, float] = {}
        for entry in entries:
            self.price(entry)
            costs[entry.lane] = costs.get(entry.lane, 0.0) + entry.cost_ms
        self._check_queue(1, sum(entry.tokens for entry in entries))
        self._check_work(costs)
        self._ledger.admit(entries)

    def price(self, entry: Entry) -> None:
        """What is left of its prompt decides its lane."""
        entry.cost_ms = entry.ms(entry.read, entry.left)
        entry.lane, entry.read_before = self._lane_of(entry.cost_ms), entry.read

    def _lane_of(self, cost_ms: float) -> Lane:
        return "long" if cost_ms > self._limits.short_ms else "short"

    def _check_possible(self, entries: Sequence[Entry]) -> None:
        """The largest input must fit beside what the others leave for the answer."""
        limits = self._limits
        largest = sum(entry.output_bytes for entry in entries)
        largest += max(entry.bytes - entry.output_bytes for entry in entries)
        if largest > limits.memory_bytes:
            raise Rejected("never_fits", value=largest, limit=limits.memory_bytes)
        places = max(entry.places for entry in entries)
        if places > limits.max_running:
            raise Rejected("too_many_places", value=places, limit=limits.max_running)

    def _check_queue(self, requests: int, tokens: int) -> None:
        limits, (queued, queued_tokens) = self._limits, self._ledger.num_waiting()
        if tokens > limits.max_queue_tokens:
            raise Rejected("too_many_tokens", value=tokens, limit=limits.max_queue_tokens)
        wait_s = self._rate.seconds_for(self._ledger.waiting_ms() / 2)
        if queued + requests > limits.max_queue_requests:
            raise Rejected("queue_full", value=queued, limit=limits.max_queue_requests, retry_after_s=wait_s)
        if queued_tokens + tokens > limits.max_queue_tokens:
            limit = limits.max_queue_tokens
            raise Rejected("token_budget", value=queued_tokens, limit=limit, retry_after_s=wait_s)

    def _check_work(self, costs: Mapping[Lane, float]) -> None:
        """Each lane may have so much work waiting: long documents do not keep short requests out. Where none
        waits, one request of any cost may."""
        limit = self._limits.max_queue_ms
        for lane, cost_ms in costs.items():
            queued_ms = self._ledger.waiting_ms(lane)
            if queued_ms > 0 and queued_ms + cost_ms > limit:
                wait_s = self._rate.seconds_for(queued_ms / 2)
                raise Rejected(
                    "cost_budget", value=round(queued_ms), limit=round(limit), retry_after_s=wait_s
                )
