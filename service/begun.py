"""Long steps that have begun and are not over. A model goes on with the one that it began last; a step on
top of another must be much shorter than what is left of that one, so that a chapter does not wait for a
library, and between two of them the one below gets its share."""

from __future__ import annotations

from collections import defaultdict

from service.schedule import Entry, Step

MAX_BEGUN = 3
"""Steps that one model may have begun: each holds the activations of its pass."""
MUCH_SHORTER = 0.5
"""Of the predicted rest of the step below."""
SHARE_BELOW = 0.5
"""What the step below is owed, of the time that one on top of it took, before another may begin."""


class Begun:
    """By model, in order of beginning, with the ms that each has run."""

    def __init__(self) -> None:
        self._stacks: dict[str, list[Step]] = {}
        self._ran_ms: dict[Step, float] = {}
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

    def end(self, step: Step) -> None:
        """It is over. Idempotent."""
        stack = self._stacks.get(step.model, [])
        if step not in stack:
            return
        stack.remove(step)
        took_ms = max(self._ran_ms.pop(step), step.predicted_ms)
        self._owed_ms[step.model] = SHARE_BELOW * took_ms if stack else 0.0
        if not stack:
            del self._stacks[step.model], self._owed_ms[step.model]

    def has_room(self, model: str) -> bool:
        """Whether the model may begin another step on top of those there are."""
        return 0 < len(self._stacks.get(model, ())) < MAX_BEGUN

    def owes(self, model: str) -> bool:
        """Whether the step that goes on has not had its share since one on top of it ended."""
        return self._owed_ms.get(model, 0.0) > 0

    def is_shorter(self, predicted_ms: float, model: str) -> bool:
        """Whether a step that is predicted to take so long may begin on top of the last one."""
        last = self._stacks[model][-1]
        return predicted_ms <= MUCH_SHORTER * (last.predicted_ms - self._ran_ms[last])
