"""Which long step runs: one that is begun goes on, unless another may begin on top of it."""

from __future__ import annotations

from service.begun import Begun
from service.ledger import Ledger
from service.planner import Draft, Planner
from service.queue import Queue
from service.schedule import Step
from service.turns import Turns


class LongSteps:
    """Also knows, of the model whose long step runs, what that step would be left for (``look``)."""

    def __init__(self, ledger: Ledger, planner: Planner, turns: Turns, begun: Begun) -> None:
        self._ledger = ledger
        self._planner = planner
        self._turns = turns
        self._begun = begun
        self._higher_waits = False
        self._shorter_waits = False

    def next(self, queue: Queue) -> Draft | Step | None:
        """To begin or to go on with, of the model whose turn it is."""
        models = self._turns.order("long", self._ledger.models("long"))
        found = (self.of(model, queue) for model in models)
        return next((step for step in found if step is not None), None)

    def of(self, model: str, queue: Queue) -> Draft | Step | None:
        """The step that the model has begun last, or one that may begin before it goes on."""
        step = self._begun.last(model)
        if step is None:
            return self._planner.long(model, queue)
        if step.abandoned:
            return None
        above = self._above(model, queue)
        if above is None:
            return step
        may_begin = self._is_higher(above, queue.now) or (
            not self._begun.owes(model) and self._is_shorter(above, queue.now)
        )
        return above if may_begin else step

    def others(self, model: str, queue: Queue) -> list[str]:
        """Other models with long work that could run now."""
        others = sorted(self._ledger.models("long") - {model})
        return [other for other in others if self.of(other, queue) is not None]

    def begin(self, step: Step) -> None:
        """It was the first that could run."""
        self._begun.begin(step)
        self._higher_waits = self._shorter_waits = False

    def look(self, model: str, queue: Queue) -> None:
        """What could begin on top of the model's step that runs?"""
        draft = self._above(model, queue)
        self._higher_waits = draft is not None and self._is_higher(draft, queue.now)
        self._shorter_waits = draft is not None and self._is_shorter(draft, queue.now)

    def should_leave(self, step: Step) -> bool:
        """For a long step of the same model, or because nobody wants it any more."""
        if self._higher_waits or (self._shorter_waits and not self._begun.owes(step.model)):
            return True
        return step.abandoned

    def _above(self, model: str, queue: Queue) -> Draft | None:
        """What could begin on top of a model's begun step, were it allowed to."""
        return self._planner.long(model, queue) if self._begun.has_room(model) else None

    def _is_higher(self, draft: Draft, now: float) -> bool:
        return self._begun.yields_to(draft.entries, draft.model, now)

    def _is_shorter(self, draft: Draft, now: float) -> bool:
        return self._begun.waits_for(draft.entries, draft.predicted_ms, draft.model, now)
