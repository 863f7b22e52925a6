"""Prompts in the order in which they are offered a step: those that were passed too often, then the others;
each by its turn. Who has been passed over is told by claims."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import chain
from operator import itemgetter

from service.room import EVERYBODY, OTHERS, Room
from service.schedule import Claim, Entry, Lane
from service.waiting import Line, Ranked, Waiting, in_order, place_of

FIRST: Claim = (-math.inf, 0.0, 0.0, 0)
"""Nobody's claim is before it."""


class Queue:
    """What waits, and the ``reading``: prompts of which a piece has been read."""

    def __init__(self, waiting: Waiting, reading: Sequence[Entry], now: float) -> None:
        self.now = now
        self._waiting = waiting
        self._reading: list[Ranked] = sorted((place_of(entry, now), entry) for entry in reading)

    def prompts(self, model: str, lane: Lane, room: Room) -> Iterator[Entry]:
        """Those of a model's lane that run already or may start now. On the way there those of others that
        were passed too often get what is kept for them set apart."""
        reading = self._of(model, lane)
        due = in_order(self._waiting.due, [found for found in reading if found[1].due])
        for place, entry in due:
            room.reach(place)
            if room.holds(entry) and entry.model == model and entry.lane == lane:
                yield entry
        room.reach(OTHERS)
        line = self._waiting.line(model, lane)
        yield from self._others(line, [found for found in reading if not found[1].due], room)
        room.reach(EVERYBODY)

    def pieces(self, model: str, room: Room) -> Iterator[Entry]:
        """Prompts of a model's long lane that can be read in pieces and run already or may start now."""
        line = self._waiting.line(model, "long")
        due = (found for found in self._waiting.due if found[1].model == model and found[1].lane == "long")
        waiting = chain(due, line.places if line is not None else ())
        for _, entry in in_order(waiting, self._of(model, "long")):
            if entry.chunkable and room.holds(entry):
                yield entry

    def first(self, model: str, lane: Lane) -> Entry | None:
        """Of a model's lane, whether it may start or not."""
        line = self._waiting.line(model, lane)
        due = (found for found in self._waiting.due if found[1].model == model and found[1].lane == lane)
        waiting = chain(due, line.places if line is not None else ())
        return next((entry for _, entry in in_order(waiting, self._of(model, lane))), None)

    def passed_over(self, room: Room, read: Sequence[Entry], offered: str | None = None) -> list[Entry]:
        """Those that lack memory or places while one behind them started; and those of the short lane of the
        model that was ``offered`` the step that stood still while one behind them was ``read``. Without
        waiting ones that are due already."""
        chosen = {entry.key for entry in read}
        started = max((entry.claim(self.now) for entry in room.started), default=FIRST)
        last = max((entry.claim(self.now) for entry in read), default=FIRST)
        found: list[Entry] = []
        for (model, lane), line in self._waiting.lines():
            if lane == "short" and model == offered:
                found += _stood(line, room, started, last)
            elif started != FIRST and room.may_block(line):
                found += self._lacking(line, room, started)
        if offered is not None:
            found += [e for _, e in self._of(offered, "short") if e.claim(self.now) < last]
        return [entry for entry in found if entry.key not in chosen]

    def _lacking(self, line: Line, room: Room, started: Claim) -> Iterator[Entry]:
        """Of a line that was offered nothing."""
        for claim, entry in line.claims:
            if claim >= started:
                return
            if room.was_blocked(entry, self._waiting.place(entry)):
                yield entry

    def _others(self, line: Line | None, reading: list[Ranked], room: Room) -> Iterator[Entry]:
        """Without those that are due. Once none that waits can start, only those that run are looked at."""
        waiting = line.places if line is not None else []
        num_reading = 0
        for place, entry in in_order(waiting, reading):
            runs = num_reading < len(reading) and entry is reading[num_reading][1]
            num_reading += runs
            if not runs and line is not None and room.closed_to(line):
                room.closed_at = place
                break
            room.reach(place)
            if room.holds(entry):
                yield entry
        for place, entry in reading[num_reading:]:
            room.reach(place)
            yield entry

    def _of(self, model: str, lane: Lane) -> list[Ranked]:
        return [found for found in self._reading if found[1].model == model and found[1].lane == lane]


def _stood(line: Line, room: Room, started: Claim, last: Claim) -> Iterator[Entry]:
    """Of a line of the short lane that was offered a step. In this lane those that are not due go by their
    claims: those that were looked at come first, then those that could not start any more, then those that
    were not reached."""
    closed = bisect_left(line.places, (room.closed_at,))
    reached = max(bisect_right(line.places, room.reached, key=itemgetter(0)), closed)
    for place, entry in line.places[:closed]:
        if line.claim(place) < (started if room.was_blocked(entry, place) else last):
            yield entry
    for some, bound in ((range(closed, reached), started), (range(reached, len(line.places)), last)):
        for place, entry in (line.places[i] for i in some):
            if line.claim(place) >= bound:
                break
            yield entry
