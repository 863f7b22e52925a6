"""A meter for the fake model: figures that are a pure function of what was asked, the choice, and the rows it
was shown.

Of a prompt the first and last 16 rows and every 8th count as looked at (``rows`` "all": every row), of the
tokens generated after it every 16th position. ``row_bound`` needs 59 rows. An exact choice has an error of 0
and no rows. It notes misuse in its model: another choice or total, rows out of order, two sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.contract import Choice, LayerError, MeasuredError, Slice, Verify
from tests.service.fake_pages import choice_digest

if TYPE_CHECKING:
    from tests.service.fake_model import FakeModel

EDGE = 16
EVERY = 8
DECODE_EVERY = 16
ROWS_OF_A_BOUND = 59
MS_PER_ROW = 0.25
HEADS = 4


@dataclass
class FakeMeter:
    model: FakeModel
    verify: Verify
    choice: Choice
    total: int
    decode: bool
    layers: tuple[int, ...]
    sequence: object = None
    next_row: int = 0
    rows: int = 0
    rows_total: int = 0

    def add(self, part: Slice, start: int) -> None:
        """Rows that a step has read."""
        check, n = self.model.check, len(part.token_ids)
        check(part.choice == self.choice, "a meter was used for another choice than it was made for")
        check(self.sequence in (None, part.sequence), "a meter was used for two sequences")
        check(start >= self.next_row, "a meter was shown rows twice")
        check(part.total == self.total, "a meter was made for another total")
        check(self.decode or start + n <= self.total, "a prompt's meter was shown generated tokens")
        check(not self.decode or start >= self.total, "a meter of generated tokens was shown the prompt")
        self.sequence, self.next_row = part.sequence, start + n
        self.rows_total += n
        if self.choice.backend != "exact":
            self.rows += sum(self._looked_at(position) for position in range(start, start + n))

    def measured(self) -> MeasuredError | None:
        exact = self.choice.backend == "exact"
        if not (self.rows or (exact and self.rows_total)):
            return None
        layers = tuple(self._layer(layer, exact) for layer in self.layers)
        enough = exact or self.rows >= ROWS_OF_A_BOUND
        return MeasuredError(
            estimate=max(each.estimate for each in layers),
            approx_upper_95=max(each.approx_upper_95 or 0.0 for each in layers),
            row_bound=max(each.row_bound or 0.0 for each in layers) if enough else None,
            rows=sum(each.rows for each in layers),
            rows_total=sum(each.rows_total for each in layers),
            cost_ms=MS_PER_ROW * self.rows * len(layers),
            layers=layers,
        )

    def _looked_at(self, position: int) -> bool:
        if self.verify.rows == "all":
            return True
        if self.decode:
            return position % DECODE_EVERY == 0
        return position < EDGE or position >= self.total - EDGE or position % EVERY == 0

    def _layer(self, layer: int, exact: bool) -> LayerError:
        estimate = 0.0 if exact else self.estimate(layer)
        bound = 3 * estimate if exact or self.rows >= ROWS_OF_A_BOUND else None
        shares = (0.0,) * HEADS if exact else (0.4, 0.3, 0.2, 0.1)
        return LayerError(
            layer, estimate, 1.5 * estimate, bound, self.rows, self.rows_total, shares, estimate / 10
        )

    def estimate(self, layer: int) -> float:
        """0.01 .. 0.03 by the choice, more from layer to layer."""
        return (0.01 + 0.02 * (choice_digest(self.choice) % 1000) / 1000) * (1 + layer / 4)
