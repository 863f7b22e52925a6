"""Long steps that have begun and are not over. A model goes on with the one that it began last, and may begin
another on top of it, which then goes first:

- one that is much shorter than what is left below, of no smaller priority, so that a chapter does not wait
  for a library; between two of them the one below gets its share;
- one of clearly higher priority, however long. What has begun ages as what waits does, so that in the end
  nothing is that much higher."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from service.schedule import SLACK, Entry, Step

MAX_BEGUN = 3
"""Steps that one model may have begun: each holds the activations of its pass."""
MUCH_SHORTER = 0.5
"""Of the predicted rest of the step below."""
SHARE_BELOW = 0.5
"""What the step below is owed, of the time that one on top of it took, before another may begin."""
CLEARLY_HIGHER = 5
"""Points of priority by which a request must exceed all that has begun, their ages counted, to go first
whatever it takes."""


class Begun:
    """By model, in order of beginning, with the ms that each has run."""

    def __init__(self) -> None:
        self._stacks: dict[str, list[Step]] = {}
        self._ran_ms: dict[Step, float] = {}
        self._counted_ms: dict[Step, float] = {}
        self._owed_ms: dict[str, float] = defaultdict(float)

    @property
    def steps(self) -> tuple[Step, ...]:
        return tuple(step for stack in self._stacks.values() for step in stack)

    def last(self, model: str) -> Step | None:
        stack = self._stacks.get(model)
        return stack[-1] if stack else None

    def of(self, entry: Entry) -> Step | None:
        """The step that an entry is part of."""
        stack = self._stacks.get(entry.model, [])
        return next((step for step in stack if any(part is entry for part, _ in step.parts)), None)

    def begin(self, step: Step) -> None:
        self._stacks.setdefault(step.model, []).append(step)
        self._ran_ms[step] = 0.0

    def ran(self, step: Step, ms: float) -> None:
        """A slice of it ran."""
        self._ran_ms[step] += ms
        self._owed_ms[step.model] = max(self._owed_ms[step.model] - ms, 0.0)

    def ran_ms(self, step: Step) -> float:
        """How long it has run; 0 for what has not begun here."""
        return self._ran_ms.get(step, 0.0)

    def counted_ms(self, step: Step) -> float:
        """How much of its reading has been counted as done."""
        return self._counted_ms.get(step, 0.0)

    def count(self, step: Step, ms: float) -> None:
        if step in self._ran_ms:
            self._counted_ms[step] = ms

    def end(self, step: Step) -> None:
        """It is over. Idempotent."""
        stack = self._stacks.get(step.model, [])
        if step not in stack:
            return
        was_last = stack[-1] is step
        stack.remove(step)
        self._counted_ms.pop(step, None)
        took_ms = max(self._ran_ms.pop(step), step.predicted_ms)
        if stack and was_last:
            self._owed_ms[step.model] = SHARE_BELOW * took_ms
        if not stack:
            del self._stacks[step.model]
            self._owed_ms.pop(step.model, None)

    def has_room(self, model: str) -> bool:
        """Whether the model may begin another step on top of those there are."""
        return 0 < len(self._stacks.get(model, ())) < MAX_BEGUN

    def owes(self, model: str) -> bool:
        """Whether the step that goes on has not had its share since one on top of it ended."""
        return self._owed_ms.get(model, 0.0) > 0

    def yields_to(self, entries: Sequence[Entry], model: str, now: float) -> bool:
        """Whether a step of ``entries`` may begin on top of what the model has begun by its priority alone:
        as it was asked for, since a wait on both sides would cancel out."""
        priority = max(entry.priority for entry in entries)
        begun = (entry for step in self._stacks[model] for entry, _ in step.parts if not entry.dropped)
        return all(priority >= entry.points(now) + CLEARLY_HIGHER for entry in begun)

    def waits_for(self, entries: Sequence[Entry], predicted_ms: float, model: str, now: float) -> bool:
        """Whether a step of ``entries`` that is predicted to take so long may begin on top of what the model
        has begun: it is much shorter than what is left of the last, nothing begun has a larger priority, and
        no deadline that could be met comes to press by it."""
        stack, priority = self._stacks[model], max(entry.priority for entry in entries)
        if predicted_ms > MUCH_SHORTER * self._left_ms(stack[-1]):
            return False
        ends_ms = 0.0
        for step in reversed(stack):
            left_ms = max(self._left_ms(step), 0.0)
            ends_ms += left_ms
            latest_ms = ends_ms + predicted_ms + SLACK * left_ms
            for entry in (entry for entry, _ in step.parts if not entry.dropped):
                until_ms = math.inf if entry.deadline is None else (entry.deadline - now) * 1000
                if entry.priority > priority or ends_ms <= until_ms < latest_ms:
                    return False
        return True

    def _left_ms(self, step: Step) -> float:
        return step.predicted_ms - self._ran_ms[step]
