"""Whose turn it is: the account of time used by both lanes, and by the models within each."""

from __future__ import annotations

from collections.abc import Iterable

from service.fair_share import FairShare
from service.schedule import Lane, Step, served_name

LONG_SLICE_MS = 500.0
"""A model's long step runs so long before that of another model has its turn."""


class Turns:
    """Charged with what steps take. The slice of a long step that runs now is charged as it goes, so that
    what arrives meanwhile starts level with it."""

    def __init__(self, short_weight: float) -> None:
        self._short_weight = short_weight
        self._lanes = FairShare({"short": short_weight})
        self._models: dict[Lane, FairShare] = {"short": FairShare(), "long": FairShare()}
        self._holder = ""
        self._held_ms = 0.0
        self._slice_from = 0.0
        self._charged_ms = 0.0

    @property
    def short_due(self) -> bool:
        """Where both lanes have work. Level means that short work goes first."""
        return self._lanes.used("short") <= self._lanes.used("long")

    def used(self, lane: Lane) -> float:
        """Virtual ms of a lane: what it used, divided by its weight."""
        return self._lanes.used(lane)

    def lendable_ms(self, short_ms: float) -> float:
        """What a short step with so much short work may lend to long prompts, for both lanes to end level."""
        share_ms = short_ms / self._short_weight
        return max(min(share_ms, self.used("short") + share_ms - self.used("long")), 0.0)

    def level_lanes(self, lanes: Iterable[Lane]) -> None:
        """These have work that could run now."""
        self._lanes.level(lanes)

    def order(self, lane: Lane, models: Iterable[str]) -> list[str]:
        """Models that have work in a lane, the next first. In the long lane a model keeps its turn for a
        slice."""
        share, names = self._models[lane], set(models)
        share.level(names)
        order = share.order(names)
        if lane == "long" and self._held_ms < LONG_SLICE_MS:
            order.sort(key=lambda model: model != self._holder)
        return order

    def start_slice(self, model: str, now: float) -> None:
        """A long step of ``model`` runs from now on."""
        if model != self._holder:
            self._holder, self._held_ms = model, 0.0
        self._slice_from, self._charged_ms = now, 0.0

    def charge_slice(self, model: str, now: float) -> float:
        """It has run until now; the ms that are new of it."""
        ms = (now - self._slice_from) * 1000 - self._charged_ms
        self._charged_ms += ms
        self._charge("long", model, ms)
        return ms

    def is_over(self, model: str, others: Iterable[str]) -> bool:
        """Whether one of the ``others`` has its turn in the long lane."""
        if self._held_ms < LONG_SLICE_MS:
            return False
        return self._models["long"].order([model, *others])[0] != model

    def charge(self, step: Step, seconds: float) -> float:
        """A short step took so long, or a slice of a long one; the ms that had not been charged yet. What a
        short step lends to long prompts is on the long lane's account."""
        ms = seconds * 1000
        if step.long:
            new_ms = max(ms - self._charged_ms, 0.0)
            self._charge("long", step.model, new_ms)
            self._charged_ms = 0.0
            return new_ms
        lent_ms = ms * step.long_share
        self._charge("long", step.model, lent_ms)
        self._charge("short", step.model, ms - lent_ms)
        return ms

    def forget(self, model: str) -> None:
        """A served model, and what was made from it for single requests."""
        for share in self._models.values():
            for name in share.names:
                if served_name(name) == model:
                    share.forget(name)

    def _charge(self, lane: Lane, model: str, ms: float) -> None:
        self._lanes.charge(lane, ms)
        self._models[lane].charge(model, ms)
        if lane == "long" and model == self._holder:
            self._held_ms += ms
