"""What a step that is being planned may still start."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Any, NamedTuple

from service.schedule import Entry

if TYPE_CHECKING:
    from service.ledger import Ledger
    from service.waiting import Line, Place

Position = tuple[Any, ...]
"""How far the queue has been looked through: a ``Place``, or one of these."""
NOBODY: Position = ()
OTHERS: Position = (True,)
"""Before the first that is not due."""
EVERYBODY: Position = (2,)


class Free(NamedTuple):
    """What is free for those that begin, and for further inputs of requests that collect outputs
    (``own_``): nothing is kept from these, since what they hold is free only once they end."""

    bytes: int
    places: int
    own_bytes: int
    own_places: int
    closed_to_long: bool
    outputs: int
    """Bytes that requests that collect will hold in the end, and the largest input of any beside that."""
    largest: int


class Room:
    """A waiting entry that was passed too often keeps what is free for itself. Where it must wait for long
    prompts that run in any case (they leave it no room, or its model has begun one), it keeps what is free
    from other long ones alone: short requests do not wait for the end of a document."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        limits, running = ledger.limits, ledger.running.values()
        num_bytes = limits.memory_bytes - ledger.reserved_bytes
        places = limits.max_running - ledger.reserved_places
        begun = [ledger.collections[job] for job in ledger.collecting]
        outputs = sum(found.outputs for found in begun)
        largest = max((found.largest for found in begun), default=0)
        self._free = Free(num_bytes, places, num_bytes, places, False, outputs, largest)
        self._history: list[tuple[Position, Free]] = [(NOBODY, self._free)]
        self.reached: Position = NOBODY
        self.closed_at: Position = EVERYBODY
        """The first of the line that was looked through of which, and of all behind it, none could start any
        more."""
        long = [entry for entry in running if entry.lane == "long"]
        self._bytes_beside_long = limits.memory_bytes - sum(entry.bytes for entry in long)
        self._places_beside_long = limits.max_running - sum(entry.places for entry in long)
        self._models_begun = {entry.model for entry in long if entry.begun}
        self._kept: set[int] = set()
        """Keys of those that fit and have what they need set apart, whichever step will start them."""
        self._joined: dict[str, Position] = {}
        """Requests that collect and begin in this step."""
        self.started: list[Entry] = []

    def reach(self, position: Position) -> None:
        """The queue has been looked through so far, the one at ``position`` included."""
        self.reached = position

    def holds(self, entry: Entry) -> bool:
        """Whether it runs already or may start now."""
        if entry.key not in self._ledger.waiting or entry.key in self._kept:
            return True
        joined = entry.job in self._joined
        lacks_bytes = self._lacks_bytes(entry, self._free, joined)
        if not lacks_bytes and not self._lacks_place(entry, self._free):
            if entry.due and not self._waits_for_long(entry):
                self._spend(entry)
                self._kept.add(entry.key)
            return True
        if entry.due:
            self._keep_for(entry, lacks_bytes)
        return False

    def take(self, entry: Entry) -> None:
        """A step being planned begins with it or goes on with it."""
        if entry.key in self._ledger.waiting:
            if entry.key not in self._kept:
                self._spend(entry)
            self.started.append(entry)

    def was_blocked(self, entry: Entry, place: Place) -> bool:
        """Whether a waiting entry that is not due lacked memory or places when the queue was looked
        through."""
        if place > self.reached:
            return False
        free = self._history[bisect_left(self._history, (place,)) - 1][1]
        joined = entry.job in self._joined and self._joined[entry.job] < place
        return self._lacks_bytes(entry, free, joined) or self._lacks_place(entry, free)

    def closed_to(self, line: Line) -> bool:
        """Whether none that waits in it can start any more."""
        free, own = self._free, bool(self._ledger.collecting)
        num_bytes, places = (free.own_bytes, free.own_places) if own else (free.bytes, free.places)
        if line.num_bytes[0] > num_bytes or line.num_places[0] > max(places, 0):
            return True
        return free.closed_to_long and line.lane == "long" and not own

    def may_block(self, line: Line) -> bool:
        """Whether any that waits in it may lack memory or places."""
        free = self._free
        if line.num_bytes[-1] > free.bytes or line.num_places[-1] > max(free.places, 0):
            return True
        return (free.closed_to_long and line.lane == "long") or bool(self._ledger.collections)

    def _lacks_bytes(self, entry: Entry, free: Free, joined: bool) -> bool:
        if entry.job in self._ledger.collecting:
            return entry.bytes > free.own_bytes
        own = None if joined else self._ledger.collections.get(entry.job)
        if own is not None:
            in_the_end = free.outputs + own.outputs + max(free.largest, own.largest)
            if in_the_end > self._ledger.limits.memory_bytes:
                return True
        return entry.bytes > free.bytes

    def _lacks_place(self, entry: Entry, free: Free) -> bool:
        if entry.job in self._ledger.collecting:
            return entry.places > max(free.own_places, 0)
        return entry.places > max(free.places, 0) or (free.closed_to_long and entry.lane == "long")

    def _keep_for(self, entry: Entry, lacks_bytes: bool) -> None:
        if self._waits_for_long(entry):
            self._set(closed_to_long=True)
        else:
            self._set(bytes=-1 if lacks_bytes else self._free.bytes, places=0)

    def _waits_for_long(self, entry: Entry) -> bool:
        if entry.lane == "long" and entry.model in self._models_begun:
            return True
        return entry.bytes > self._bytes_beside_long or entry.places > self._places_beside_long

    def _spend(self, entry: Entry) -> None:
        free = self._free
        self._set(
            bytes=free.bytes - entry.bytes,
            places=free.places - entry.places,
            own_bytes=free.own_bytes - entry.bytes,
            own_places=free.own_places - entry.places,
        )
        own = self._ledger.collections.get(entry.job)
        if own is None or entry.job in self._ledger.collecting or entry.job in self._joined:
            return
        self._joined[entry.job] = self.reached
        self._set(outputs=free.outputs + own.outputs, largest=max(free.largest, own.largest))

    def _set(self, **changes: Any) -> None:
        self._free = self._free._replace(**changes)
        self._history.append((self.reached, self._free))
