"""What goes into one step of one model.

A short step has a token for every sequence that decodes, prompts of the short lane in order, then pieces of
prompts of the long lane that fit what is left of it, as far as that is their lane's share of the time. A long
step has prompts of the long lane alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from service.chunks import Budget, chunk, smallest
from service.ledger import Ledger
from service.queue import Queue
from service.room import Room
from service.schedule import Entry, Limits, Step

MAX_MISSES = 16
"""So many prompts that do not fit what is left of a step end the search for one that does."""
REPRICE_TOKENS = 32
"""A decoded token's price is asked for again after so many."""


@dataclass
class Draft:
    """A step that is not decided yet: nothing has changed by it. ``passed`` were passed over for it."""

    model: str
    fixed_ms: float
    long: bool
    parts: list[tuple[Entry, int]] = field(default_factory=list)
    slices_ms: float = 0.0
    reading_ms: float = 0.0
    lent_ms: float = 0.0
    passed: list[Entry] = field(default_factory=list)

    @property
    def entries(self) -> list[Entry]:
        return [entry for entry, _ in self.parts]

    @property
    def predicted_ms(self) -> float:
        return self.fixed_ms + self.slices_ms

    def decode(self, entry: Entry, ms: float) -> None:
        self.parts.append((entry, 1))
        self.slices_ms += ms

    def read(self, entry: Entry, tokens: int, ms: float) -> None:
        self.parts.append((entry, tokens))
        self.slices_ms += ms
        self.reading_ms += ms
        if entry.lane == "long" and not self.long:
            self.lent_ms += ms

    def step(self) -> Step:
        return Step(
            self.model,
            tuple(self.parts),
            long=self.long,
            predicted_ms=self.predicted_ms,
            reading_ms=self.reading_ms,
            lent_ms=self.lent_ms,
        )


class Planner:
    """Fills steps from the ledger; changes nothing in it."""

    def __init__(self, ledger: Ledger, fixed_ms: Callable[[str], float]) -> None:
        self._ledger = ledger
        self._fixed_ms = fixed_ms
        self._decode_ms: dict[int, tuple[int, float]] = {}
        self._saved_ms: dict[str, float] = {}

    def short(self, model: str, queue: Queue, lendable_ms: Callable[[float], float]) -> Draft | None:
        """The short step that ``model`` could run now; None where it has no short work that may start.
        ``lendable_ms`` says how much of it long prompts may have, given what its short work takes."""
        draft = Draft(model, self._fixed_ms(model), long=False)
        alone = self._ledger.solo(model, "short")
        if alone is not None:
            return self._alone(draft, alone)
        room = self._ledger.room()
        budget = self._decode(draft)
        self._read_short(draft, budget, room, queue)
        if draft.parts:
            budget.ms = min(budget.ms, lendable_ms(draft.predicted_ms))
            self._fill_up(draft, budget, room, queue)
        return draft if draft.parts else None

    def long(self, model: str, queue: Queue) -> Draft | None:
        """The long step that ``model`` could begin now."""
        draft = Draft(model, self._fixed_ms(model), long=True)
        alone = self._ledger.solo(model, "long")
        if alone is not None:
            return self._alone(draft, alone)
        room, budget = self._ledger.room(), self._budget(math.inf)
        for entry in queue.prompts(model, "long", room):
            if entry.chunkable or not draft.parts:
                self._offer(draft, budget, room, entry, forced=not draft.parts)
            if budget.spent or not draft.parts[0][0].chunkable:
                break
        draft.passed = queue.passed_over(room, draft.entries)
        return draft if draft.parts else None

    def ran(self, step: Step) -> None:
        """A short step is done: prompts may take as long as those without one have decoded."""
        reads = step.reading_ms > step.lent_ms
        self._saved_ms[step.model] = 0.0 if reads else self._saved_ms.get(step.model, 0.0) + step.predicted_ms

    def forget(self, entry: Entry) -> None:
        """It has ended."""
        self._decode_ms.pop(entry.key, None)

    @property
    def _limits(self) -> Limits:
        return self._ledger.limits

    def _budget(self, ms: float) -> Budget:
        return Budget(self._limits.prefill_chunk_tokens, ms, self._limits.prefill_chunk_tokens)

    def _alone(self, draft: Draft, entry: Entry) -> Draft:
        if entry.decoding:
            draft.decode(entry, self._decode_price(entry))
        else:
            budget = self._budget(math.inf if draft.long else self._limits.step_ms)
            draft.read(entry, *chunk(entry, budget, forced=True))
        return draft

    def _decode(self, draft: Draft) -> Budget:
        """All that decode (beyond a step's tokens: by turns); what they leave of the step. Prompts may take
        as long as the step's fixed part even where that fills it: smaller pieces would cost more than they
        spare."""
        limits = self._limits
        decoding = self._ledger.decoding(draft.model)
        if len(decoding) > limits.step_tokens:
            decoding.sort(key=lambda entry: entry.last_served)
        for entry in decoding[: limits.step_tokens]:
            draft.decode(entry, self._decode_price(entry))
        ms = max(limits.step_ms - draft.fixed_ms, draft.fixed_ms) - draft.slices_ms
        return Budget(limits.step_tokens - len(draft.parts), ms, limits.prefill_chunk_tokens)

    def _read_short(self, draft: Draft, budget: Budget, room: Room, queue: Queue) -> None:
        only = queue.first(draft.model, "short") if self._ledger.num_short() == 1 else None
        if only is not None:
            budget.ms = max(budget.ms, self._whole(only))
        num_decoding, misses = len(draft.parts), 0
        stood: Entry | None = None
        for entry in queue.prompts(draft.model, "short", room):
            stood = stood or entry
            first = len(draft.parts) == num_decoding
            forced = first and (entry.due or not num_decoding or self._has_saved_for(entry, budget))
            if (budget.spent and not (entry.due or forced)) or misses == MAX_MISSES:
                break
            misses += not self._offer(draft, budget, room, entry, forced=forced)
        read = draft.entries[num_decoding:]
        draft.passed = queue.passed_over(room, read, draft.model)
        if not read and stood is not None:
            draft.passed.append(stood)

    def _has_saved_for(self, entry: Entry, budget: Budget) -> bool:
        """Whether steps without a prompt have left so much time to this model's prompts as the smallest piece
        of this one needs: reading gets its half beside decoding."""
        saved_ms = self._saved_ms.get(entry.model, 0.0)
        return entry.ms(entry.read, smallest(entry)) <= saved_ms + budget.ms

    def _whole(self, entry: Entry) -> float:
        """Price of the rest of a prompt that nobody else waits behind, where two steps' time is enough; else
        0."""
        ms = entry.ms(entry.read, entry.left)
        return ms if ms <= 2 * self._limits.step_ms else 0.0

    def _fill_up(self, draft: Draft, budget: Budget, room: Room, queue: Queue) -> None:
        misses = 0
        for entry in queue.pieces(draft.model, room):
            if budget.spent or misses == MAX_MISSES:
                return
            misses += not self._offer(draft, budget, room, entry, forced=False)

    def _offer(self, draft: Draft, budget: Budget, room: Room, entry: Entry, *, forced: bool) -> bool:
        """Whether it reads in this step."""
        tokens, ms = chunk(entry, budget, forced=forced)
        if tokens:
            draft.read(entry, tokens, ms)
            budget.spend(tokens, ms)
            room.take(entry)
        return tokens > 0

    def _decode_price(self, entry: Entry) -> float:
        """As asked for a few tokens ago: a step of many sequences should not ask for all."""
        asked = entry.decoded // REPRICE_TOKENS
        known = self._decode_ms.get(entry.key)
        if known is None or known[0] != asked:
            known = asked, entry.ms(entry.tokens + entry.decoded, 1)
            self._decode_ms[entry.key] = known
        return known[1]
