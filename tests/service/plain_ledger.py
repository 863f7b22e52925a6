"""The order of prompts and who is passed over, in the obvious way: everybody is sorted anew for every step
and looked at one by one. What ``service.queue`` must agree with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from service.ledger import Ledger
from service.queue import Queue
from service.room import Room
from service.schedule import Entry, Lane


class PlainRoom(Room):
    """Notes everybody who was looked at and lacked something."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(ledger)
        self.lacking: list[Entry] = []

    def holds(self, entry: Entry) -> bool:
        held = super().holds(entry)
        if not held:
            self.lacking.append(entry)
        return held


class PlainQueue(Queue):
    def __init__(self, entries: Sequence[Entry], now: float) -> None:
        self.now = now
        self.order = sorted(entries, key=lambda entry: (not entry.due, entry.turn(now)))
        by_claim = sorted(entries, key=lambda entry: entry.claim(now))
        self.rank = {entry.key: rank for rank, entry in enumerate(by_claim)}

    def prompts(self, model: str, lane: Lane, room: Room) -> Iterator[Entry]:
        for entry in self.order:
            if room.holds(entry) and (entry.model, entry.lane) == (model, lane):
                yield entry

    def pieces(self, model: str, room: Room) -> Iterator[Entry]:
        for entry in self.order:
            if (entry.model, entry.lane) == (model, "long") and entry.chunkable and room.holds(entry):
                yield entry

    def first(self, model: str, lane: Lane) -> Entry | None:
        mine = (entry for entry in self.order if (entry.model, entry.lane) == (model, lane))
        return next(mine, None)

    def passed_over(self, room: Room, read: Sequence[Entry], offered: str | None = None) -> list[Entry]:
        assert isinstance(room, PlainRoom)
        chosen = {entry.key for entry in read}
        lacking = {entry.key for entry in room.lacking} - chosen
        started = max((self.rank[entry.key] for entry in room.started), default=-1)
        last = max((self.rank[entry.key] for entry in read), default=-1)
        found = [entry for entry in self.order if entry.key in lacking and self.rank[entry.key] < started]
        mine = (entry for entry in self.order if (entry.model, entry.lane) == (offered, "short"))
        stood = [entry for entry in mine if entry.key not in chosen | lacking]
        return found + [entry for entry in stood if self.rank[entry.key] < last]


class PlainLedger(Ledger):
    def queue(self, now: float) -> Queue:
        reading = [entry for entry in self.running.values() if not (entry.decoding or entry.dropped)]
        found = [entry for entry in reading if not (entry.begun or entry.solo)]
        return PlainQueue(found + list(self.waiting.values()), now)

    def room(self) -> Room:
        return PlainRoom(self)
