"""Who waits, who runs, and what memory and places are free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from service.queue import Queue
from service.room import Room
from service.schedule import Entry, Lane, Limits
from service.waiting import Waiting


@dataclass(frozen=True)
class Collection:
    """What a request of several inputs keeps for its answer: bytes of ``outputs`` in the end, beside which
    its ``largest`` input must be read."""

    outputs: int
    largest: int


class Ledger:
    """Entries: waiting ones hold nothing, running ones hold their bytes and places, and requests that collect
    outputs hold those of the inputs that are done.

    Requests that collect could wait for each other for ever, each with outputs that the next input of the
    other would need the room of. So one begins only where, should all that have begun hold all of their
    outputs, the largest input of any could still be read beside them."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.waiting = Waiting()
        self.running: dict[int, Entry] = {}
        self.collections: dict[str, Collection] = {}
        """By request, waiting ones too."""
        self.collecting: dict[str, int] = {}
        """Bytes kept by request; of those that have begun."""

    @property
    def reserved_bytes(self) -> int:
        return sum(entry.bytes for entry in self.running.values()) + sum(self.collecting.values())

    @property
    def reserved_places(self) -> int:
        return sum(entry.places for entry in self.running.values())

    def num_waiting(self, model: str | None = None) -> tuple[int, int]:
        """(requests, tokens) that wait, of one model or of all."""
        return self.waiting.num_jobs(model), self.waiting.num_tokens(model)

    def waiting_ms(self, lane: Lane | None = None) -> float:
        """Predicted time of the reading that waits, in one lane or in all."""
        return self.waiting.cost_ms(lane)

    def models(self, lane: Lane) -> set[str]:
        """Those with an entry that wants steps of this lane."""
        running = {entry.model for entry in self._serving() if entry.lane_now == lane}
        return running | {model for (model, own), _ in self.waiting.lines() if own == lane}

    def alive(self) -> Iterator[Entry]:
        yield from self._serving()
        yield from self.waiting.values()

    def admit(self, entries: Sequence[Entry]) -> None:
        """All entries of one request wait from now on."""
        outputs = sum(entry.output_bytes for entry in entries)
        if outputs and len(entries) > 1:
            largest = max(entry.bytes - entry.output_bytes for entry in entries)
            self.collections[entries[0].job] = Collection(outputs, largest)
        for entry in entries:
            self.waiting.add(entry)

    def start(self, entry: Entry) -> None:
        """It holds its bytes and places from now on."""
        self.waiting.remove(entry)
        self.running[entry.key] = entry
        if entry.job in self.collections:
            self.collecting.setdefault(entry.job, 0)

    def end(self, entry: Entry, *, keeps_output: bool) -> None:
        """It holds nothing any more, but for its output where its request is not done."""
        if self.running.pop(entry.key, None) is not None and keeps_output and entry.job in self.collecting:
            self.collecting[entry.job] += entry.output_bytes

    def drop(self, job: str) -> None:
        """What waits of a request leaves, and so does what it has collected."""
        for entry in self.waiting.of(job):
            self.waiting.remove(entry)
        self.collections.pop(job, None)
        self.collecting.pop(job, None)
        for entry in self.running.values():
            entry.dropped = entry.dropped or entry.job == job

    def num_short(self) -> int:
        """Entries of all models that want short steps."""
        waiting = sum(len(line.num_bytes) for (_, lane), line in self.waiting.lines() if lane == "short")
        return waiting + sum(entry.lane_now == "short" for entry in self._serving())

    def decoding(self, model: str) -> list[Entry]:
        return [entry for entry in self._serving() if entry.model == model and entry.decoding]

    def solo(self, model: str, lane: Lane) -> Entry | None:
        """The first that must run alone in a step of this lane."""
        mine = (entry for entry in self._serving() if entry.model == model and entry.lane_now == lane)
        return next((entry for entry in mine if entry.solo and not entry.begun), None)

    def queue(self, now: float) -> Queue:
        """All prompts that may be read on or begun."""
        self.waiting.sort(now)
        reading = (entry for entry in self._serving() if not entry.decoding)
        return Queue(self.waiting, [entry for entry in reading if not (entry.begun or entry.solo)], now)

    def room(self) -> Room:
        """What a step that is being planned may start."""
        return Room(self)

    def _serving(self) -> Iterator[Entry]:
        return (entry for entry in self.running.values() if not entry.dropped)
