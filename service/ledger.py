"""Who waits, who runs, and what memory and places are free."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from service.schedule import Entry, Lane, Limits


class Ledger:
    """Entries by key: waiting ones hold nothing, running ones hold their bytes and places."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.waiting: dict[int, Entry] = {}
        self.running: dict[int, Entry] = {}

    @property
    def reserved_bytes(self) -> int:
        return sum(entry.bytes for entry in self.running.values())

    @property
    def reserved_places(self) -> int:
        return sum(entry.places for entry in self.running.values())

    def num_waiting(self, model: str | None = None) -> tuple[int, int]:
        """(requests, tokens) that wait, of one model or of all."""
        entries = [entry for entry in self.waiting.values() if model in (None, entry.model)]
        return len({entry.job for entry in entries}), sum(entry.tokens for entry in entries)

    def waiting_ms(self, lane: Lane | None = None) -> float:
        """Predicted time of the reading that waits, in one lane or in all."""
        return sum(entry.cost_ms for entry in self.waiting.values() if lane in (None, entry.lane))

    def models(self, lane: Lane) -> set[str]:
        """Those with an entry that wants steps of this lane."""
        return {entry.model for entry in self.alive() if entry.lane_now == lane}

    def alive(self) -> Iterator[Entry]:
        yield from (entry for entry in self.running.values() if not entry.dropped)
        yield from self.waiting.values()

    def start(self, entry: Entry) -> None:
        """It holds its bytes and places from now on."""
        self.waiting.pop(entry.key, None)
        self.running[entry.key] = entry

    def num_short(self) -> int:
        """Entries of all models that want short steps."""
        return sum(entry.lane_now == "short" for entry in self.alive())

    def decoding(self, model: str) -> list[Entry]:
        mine = (entry for entry in self.running.values() if entry.model == model and entry.decoding)
        return [entry for entry in mine if not entry.dropped]

    def solo(self, model: str, lane: Lane) -> Entry | None:
        """The first that must run alone in a step of this lane."""
        mine = (entry for entry in self.running.values() if entry.model == model and entry.lane_now == lane)
        return next((entry for entry in mine if entry.solo and not (entry.dropped or entry.begun)), None)

    def queue(self, now: float) -> Queue:
        """All prompts that may be read on or begun."""
        reading = (entry for entry in self.running.values() if not (entry.decoding or entry.dropped))
        found = [entry for entry in reading if not (entry.begun or entry.solo)]
        found += self.waiting.values()
        return Queue(found, now)


class Queue:
    """Prompts in the order in which they are offered a step: those that were passed too often, then the
    others; each by its turn. Their ranks are by their claims."""

    def __init__(self, entries: Sequence[Entry], now: float) -> None:
        self.now = now
        self.order = sorted(entries, key=lambda entry: (not entry.due, entry.turn(now)))
        by_claim = sorted(entries, key=lambda entry: entry.claim(now))
        self._rank = {entry.key: rank for rank, entry in enumerate(by_claim)}

    def last(self, entries: Iterable[Entry]) -> int:
        """Rank of the last of these; -1 where there are none."""
        return max((self._rank[entry.key] for entry in entries), default=-1)

    def before(self, entries: Iterable[Entry], rank: int) -> list[Entry]:
        """Those of ``entries`` with an earlier claim."""
        return [entry for entry in entries if self._rank[entry.key] < rank]


class Room:
    """What a step that is being planned may still start: a waiting entry that was passed too often keeps what
    is free for itself. Where it must wait for long prompts that run in any case (they leave it no room, or
    its model has begun one), it keeps what is free from other long ones alone: short requests do not wait for
    the end of a document."""

    def __init__(self, ledger: Ledger) -> None:
        self._waiting = ledger.waiting
        self._bytes = ledger.limits.memory_bytes - ledger.reserved_bytes
        self._places = ledger.limits.max_running - ledger.reserved_places
        long = [entry for entry in ledger.running.values() if entry.lane == "long"]
        self._bytes_beside_long = ledger.limits.memory_bytes - sum(entry.bytes for entry in long)
        self._places_beside_long = ledger.limits.max_running - sum(entry.places for entry in long)
        self._models_begun = {entry.model for entry in long if entry.begun}
        self._closed_to_long = False
        self._kept: set[int] = set()
        """Keys of those that fit and have what they need set apart, whichever step will start them."""
        self.blocked: dict[int, Entry] = {}
        """By key: those that lack memory or places."""
        self.started: list[Entry] = []

    def holds(self, entry: Entry) -> bool:
        """Whether it runs already or may start now."""
        if entry.key not in self._waiting or entry.key in self._kept:
            return True
        lacks_bytes = entry.bytes > self._bytes
        closed = self._closed_to_long and entry.lane == "long"
        if not closed and not lacks_bytes and entry.places <= max(self._places, 0):
            if entry.due and not self._waits_for_long(entry):
                self._spend(entry)
                self._kept.add(entry.key)
            return True
        self.blocked[entry.key] = entry
        if entry.due:
            self._keep_for(entry, lacks_bytes)
        return False

    def _keep_for(self, entry: Entry, lacks_bytes: bool) -> None:
        if self._waits_for_long(entry):
            self._closed_to_long = True
            return
        self._bytes = -1 if lacks_bytes else self._bytes
        self._places = 0

    def _waits_for_long(self, entry: Entry) -> bool:
        if entry.lane == "long" and entry.model in self._models_begun:
            return True
        return entry.bytes > self._bytes_beside_long or entry.places > self._places_beside_long

    def take(self, entry: Entry) -> None:
        if entry.key in self._waiting:
            if entry.key not in self._kept:
                self._spend(entry)
            self.started.append(entry)

    def _spend(self, entry: Entry) -> None:
        self._bytes -= entry.bytes
        self._places -= entry.places


def passed_over(queue: Queue, room: Room, offered: Sequence[Entry], read: Sequence[Entry]) -> list[Entry]:
    """Those of ``offered`` that stood still while one behind them was ``read`` (or the first, where it did
    not fit and nothing was read), and those that lack memory or places while one behind them started."""
    chosen = {entry.key for entry in read}
    lacking = [entry for entry in room.blocked.values() if entry.key not in chosen]
    passed = queue.before(lacking, queue.last(room.started))
    stood = [entry for entry in offered if entry.key not in chosen | room.blocked.keys()]
    return passed + (queue.before(stood, queue.last(read)) if read else stood[:1])
