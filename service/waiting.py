"""Who waits, kept in order, so that planning a step need not look at everybody.

The order of two entries changes only when one of them has waited for another ``AGE_S``, when its deadline
begins or ceases to press, or when it has been passed over too often: each is put in its new place then."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from service.schedule import Claim, Entry, Lane, Turn

ALMOST_S = 1e-6
"""An entry is looked at again so long before and after the moment at which its place changes: the moment is
computed in another way than the place."""
Place = tuple[bool, Turn]
"""What sorts entries for a step: those that were passed too often, then the others; each by its turn."""
Ranked = tuple[Place, Entry]


def place_of(entry: Entry, now: float) -> Place:
    return not entry.due, entry.turn(now)


@dataclass
class Line:
    """What waits of one model in one lane; ``claims`` and ``places`` without those that are due."""

    lane: Lane
    claims: list[tuple[Claim, Entry]] = field(default_factory=list)
    places: list[Ranked] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)
    """Of each, sorted."""
    num_places: list[int] = field(default_factory=list)
    cost_ms: float = 0.0

    @staticmethod
    def claim(place: Place) -> Claim:
        """Of an entry of the short lane."""
        points, _, _, deadline, arrived, key = place[1]
        return points, deadline, arrived, key


@dataclass(frozen=True)
class _Known:
    """Where an entry stands."""

    claim: Claim
    place: Place


class Waiting:
    """Entries by key, in the order of their claims and of their turns. What they are ordered by does not
    change while they wait, but for time and ``passed_steps`` (``passed``)."""

    def __init__(self) -> None:
        self._entries: dict[int, Entry] = {}
        self._known: dict[int, _Known] = {}
        self._jobs: dict[str, dict[int, Entry]] = {}
        self._num_jobs: Counter[str] = Counter()
        self._num_tokens: Counter[str] = Counter()
        self._lines: dict[tuple[str, Lane], Line] = {}
        self._due: list[Ranked] = []
        self._changes: list[tuple[float, int]] = []
        self._now = 0.0

    def __contains__(self, key: int) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def values(self) -> Iterable[Entry]:
        return self._entries.values()

    @property
    def due(self) -> list[Ranked]:
        """Those that were passed too often, in order."""
        return self._due

    def lines(self) -> Iterable[tuple[tuple[str, Lane], Line]]:
        return self._lines.items()

    def line(self, model: str, lane: Lane) -> Line | None:
        return self._lines.get((model, lane))

    def place(self, entry: Entry) -> Place:
        return self._known[entry.key].place

    def num_jobs(self, model: str | None = None) -> int:
        return len(self._jobs) if model is None else self._num_jobs[model]

    def num_tokens(self, model: str | None = None) -> int:
        return self._num_tokens.total() if model is None else self._num_tokens[model]

    def cost_ms(self, lane: Lane | None = None) -> float:
        return sum(line.cost_ms for (_, own), line in self._lines.items() if lane in (None, own))

    def of(self, job: str) -> list[Entry]:
        return list(self._jobs.get(job, {}).values())

    def add(self, entry: Entry) -> None:
        self._entries[entry.key] = entry
        self._num_jobs[entry.model] += entry.job not in self._jobs
        self._jobs.setdefault(entry.job, {})[entry.key] = entry
        self._num_tokens[entry.model] += entry.tokens
        line = self._lines.setdefault((entry.model, entry.lane), Line(entry.lane))
        line.cost_ms += entry.cost_ms
        insort(line.num_bytes, entry.bytes)
        insort(line.num_places, entry.places)
        self._insert(entry)

    def remove(self, entry: Entry) -> None:
        """Where it waits."""
        if self._entries.pop(entry.key, None) is None:
            return
        self._take_out(entry)
        del self._jobs[entry.job][entry.key]
        if not self._jobs[entry.job]:
            del self._jobs[entry.job]
            self._num_jobs[entry.model] -= 1
        self._num_tokens[entry.model] -= entry.tokens
        line = self._lines[entry.model, entry.lane]
        line.cost_ms -= entry.cost_ms
        del line.num_bytes[bisect_left(line.num_bytes, entry.bytes)]
        del line.num_places[bisect_left(line.num_places, entry.places)]
        if not line.num_bytes:  # with what rounding has left of the sum
            del self._lines[entry.model, entry.lane]

    def passed(self, entry: Entry) -> None:
        """Its ``passed_steps`` have changed."""
        if entry.key in self._entries and entry.due is self.place(entry)[0]:
            self._take_out(entry)
            self._insert(entry)

    def sort(self, now: float) -> None:
        """Everybody to the place that is theirs now."""
        if now < self._now:
            self._changes = [(now, key) for key in self._entries]
        self._now = now
        changed = set()
        while self._changes and self._changes[0][0] <= now + ALMOST_S:
            changed.add(heapq.heappop(self._changes)[1])
        for entry in (self._entries[key] for key in changed if key in self._entries):
            known = self._known[entry.key]
            if known == _Known(entry.claim(now), place_of(entry, now)):
                self._await_change(entry)
            else:
                self._take_out(entry)
                self._insert(entry)

    def _insert(self, entry: Entry) -> None:
        known = _Known(entry.claim(self._now), place_of(entry, self._now))
        self._known[entry.key] = known
        if entry.due:
            insort(self._due, (known.place, entry))
        else:
            line = self._lines[entry.model, entry.lane]
            insort(line.claims, (known.claim, entry))
            insort(line.places, (known.place, entry))
        self._await_change(entry)

    def _take_out(self, entry: Entry) -> None:
        known = self._known.pop(entry.key)
        was_due = not known.place[0]
        if was_due:
            del self._due[bisect_left(self._due, (known.place,))]
        else:
            line = self._lines[entry.model, entry.lane]
            del line.claims[bisect_left(line.claims, (known.claim,))]
            del line.places[bisect_left(line.places, (known.place,))]

    def _await_change(self, entry: Entry) -> None:
        moments = (at for at in entry.changes_at(self._now) if at >= self._now - ALMOST_S)
        heapq.heappush(self._changes, (min(moments), entry.key))


def in_order(waiting: Iterable[Ranked], reading: Sequence[Ranked]) -> Iterator[Ranked]:
    """Both as one."""
    return heapq.merge(waiting, reading) if reading else iter(waiting)
