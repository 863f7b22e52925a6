"""Measures the error of one sequence's attention, step by step: ``models.contract.Meter``.

In every layer that is measured some rows are drawn (``kernels.math.row_error``) and computed exactly, over
the same keys and values. A prompt's chunk has a few of them in each layer: they are held, their queries and
what was served, until there are enough for one call over the keys, which are in the cache still. What a step
adds lies in a ``Reading`` of its own until it has succeeded, so that one that fails leaves the meter as it
was.

Where a call kept every pair and approximated nothing, what it computed is the exact output: its rows are
drawn like any others, so that chunks do not matter, but not computed again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.math.row_error import DecodeSampler, DrawnRows, RowErrors, RowSampler
from models.contract import Choice, LayerError, MeasuredError, Verify
from models.measured_error import largest_limit
from models.places import Place, Places
from models.seam import LayerPlan

DRAWN_AHEAD = 512
"""Decode steps whose draws are made together: one by one they would cost more than the rows."""
HELD_ROWS = 48
"""Rows of a layer from which on they are computed: with 8 at a time, as many as a chunk of 512 rows of a long
prompt has, reading the keys and the calls themselves cost as much again."""


class PromptDraws:
    """The rows drawn of a prompt, in one layer."""

    def __init__(self, sampler: RowSampler) -> None:
        self._sampler = sampler

    def copy(self) -> PromptDraws:
        return PromptDraws(self._sampler.copy())

    def draw(self, start: int, n: int, dropped: Tensor | None) -> DrawnRows:
        """Of the positions start .. start + n - 1; ``dropped`` [1, H, n] by head."""
        return self._sampler.draw(start, n, None if dropped is None else dropped[0].mean(0))


class DecodeDraws:
    """The decode steps drawn, for all layers together: most steps then need no second look at all. What is
    drawn does not depend on the steps before: a copy shares what was drawn ahead."""

    def __init__(self, sampler: DecodeSampler) -> None:
        self._sampler = sampler
        self._ahead: dict[int, DrawnRows] = {}
        self._known = range(0)

    def copy(self) -> DecodeDraws:
        return self

    def draw(self, start: int, n: int, dropped: Tensor | None) -> DrawnRows | None:
        if n > 1:
            return self._sampler.draw(start, n, None)
        if start not in self._known:
            drawn = self._sampler.draw(start, DRAWN_AHEAD, None)
            self._known = range(start, start + DRAWN_AHEAD)
            self._ahead = {int(p): part(drawn, slice(i, i + 1)) for i, p in enumerate(drawn.positions)}
        return self._ahead.get(start)


def part(drawn: DrawnRows, rows: slice) -> DrawnRows:
    return DrawnRows(drawn.positions[rows], drawn.probability[rows], drawn.uniform[rows])


@dataclass(frozen=True, eq=False)
class Held:
    """Drawn rows of one layer before they are computed: q [1, H, R, D], used [1, H, R, Dv]; ``exact`` bool
    [R], on the CPU: what was used is exact attention's."""

    drawn: DrawnRows
    exact: Tensor
    q: Tensor
    used: Tensor

    def __len__(self) -> int:
        return len(self.drawn)

    @property
    def nbytes(self) -> int:
        return self.q.nbytes + self.used.nbytes

    def part(self, rows: slice) -> Held:
        return Held(part(self.drawn, rows), self.exact[rows], self.q[:, :, rows], self.used[:, :, rows])


def together(held: Sequence[Held]) -> Held:
    """One after another."""
    if len(held) == 1:
        return held[0]
    drawn = [(each.drawn.positions, each.drawn.probability, each.drawn.uniform) for each in held]
    return Held(
        DrawnRows(*(torch.cat(column) for column in zip(*drawn, strict=True))),
        torch.cat([each.exact for each in held]),
        torch.cat([each.q for each in held], 2),
        torch.cat([each.used for each in held], 2),
    )


@dataclass(frozen=True)
class LayerMeter:
    """What is known of one layer. ``held`` rows are still to be computed; ``uncounted`` are the rows of the
    steps that these were drawn in, and their residual's squares (None: not known), which go to the totals
    with them. ``approximated``: some call did not keep every pair."""

    place: Place
    draws: PromptDraws | DecodeDraws
    errors: RowErrors
    held: tuple[Held, ...] = ()
    uncounted: tuple[int, float | None] = (0, 0.0)
    approximated: bool = False

    @property
    def num_held(self) -> int:
        return sum(map(len, self.held))


@dataclass(frozen=True)
class _State:
    layers: Mapping[int, LayerMeter]
    last: int | None
    """The position at which nothing more is waited for; None where rows are never held."""
    next_position: int = 0
    cost_s: float = 0.0


class Reading:
    """What one step adds to a meter: changed layers by number, what it cost, and sums over rows, which stay
    on their device until the step is over."""

    def __init__(self, state: _State) -> None:
        self._state = state
        self.cost_s = 0.0
        self._changed: dict[int, LayerMeter] = {}
        self._squares: dict[int, Tensor] = {}

    def measures(self, layer: int) -> bool:
        return layer in self._state.layers

    @property
    def places(self) -> list[Place]:
        """Of the layers measured."""
        return [layer.place for layer in self._state.layers.values()]

    def draw(self, layer: int, start: int, n: int, dropped: Tensor | None, exact: bool) -> DrawnRows | None:
        """The rows to look at of a call; ``exact``: it computed what exact attention would have."""
        of_layer = self._own(layer)
        drawn = of_layer.draws.draw(start, n, dropped)
        if not exact and not of_layer.approximated:
            self._changed[layer] = replace(of_layer, approximated=True)
        return drawn if drawn is not None and len(drawn) else None

    def hold(self, layer: int, held: Held) -> None:
        """Rows that were drawn, to be computed now or later."""
        of_layer = self._own(layer)
        self._changed[layer] = replace(of_layer, held=(*of_layer.held, held))

    def due(self, layer: int, stop: int) -> Held | None:
        """The rows held, if they are to be computed now that the layer was read up to ``stop``: they are then
        no longer held. At the end of a prompt of which nothing was approximated they need not be. A text
        that is scored ends before its last token, which nobody reads."""
        of_layer, last = self._own(layer), self._state.last
        ends = last is not None and stop >= last - 1
        if not of_layer.held or not (ends or last is None or of_layer.num_held >= HELD_ROWS):
            return None
        self._changed[layer] = replace(of_layer, held=())
        over = last is not None and stop >= last
        return None if over and not of_layer.approximated else together(of_layer.held)

    def add(self, layer: int, drawn: DrawnRows, exact: Tensor, used: Tensor) -> None:
        """exact and used [1, H, R, Dv] of the drawn rows."""
        of_layer = self._own(layer)
        of_layer.errors.add(drawn, exact, used, of_layer.place.w_o)

    def note_residual(self, layer: int, squares: Tensor) -> None:
        """The sum [] over the step's rows of |x|^2, x the residual stream that the layer adds to."""
        self._squares[layer] = squares

    def finish(self, start: int, num_rows: int) -> None:
        """The step is over, every layer was seen."""
        sums = torch.stack([*self._squares.values()]).tolist() if self._squares else []
        residual = dict(zip(self._squares, sums, strict=True))
        for layer in self._state.layers:
            self._count(layer, num_rows, residual.get(layer))
        self._stop = start + num_rows

    def _count(self, layer: int, num_rows: int, squares: float | None) -> None:
        of_layer = self._own(layer)
        rows, before = of_layer.uncounted
        uncounted = rows + num_rows, None if squares is None or before is None else before + squares
        if not of_layer.held:
            of_layer.errors.add_totals(*uncounted)
            uncounted = 0, 0.0
        self._changed[layer] = replace(of_layer, uncounted=uncounted)

    def after(self) -> _State:
        before = self._state
        layers = {**before.layers, **self._changed}
        return _State(layers, before.last, self._stop, before.cost_s + self.cost_s)

    def _own(self, layer: int) -> LayerMeter:
        """The layer as this step leaves it."""
        if layer not in self._changed:
            of_layer = self._state.layers[layer]
            draws, errors = of_layer.draws.copy(), of_layer.errors.copy()
            self._changed[layer] = replace(of_layer, draws=draws, errors=errors)
        return self._changed[layer]


class SequenceMeter:
    """``models.contract.Meter`` of one sequence: of its prompt of ``total`` tokens, or of what it generates
    after it (``decode``). Steps come from one thread, ``measured`` from any."""

    def __init__(
        self,
        choice: Choice,
        verify: Verify,
        total: int,
        decode: bool,
        plans: Mapping[int, LayerPlan],
        places: Places,
    ) -> None:
        """``plans``: the layers to measure, by number. ValueError where one's output projection is not known,
        or ``rows`` or ``total`` are out of range."""
        self.choice, self.total, self.decode = choice, total, decode
        self._seed = verify.seed
        self._told: tuple[_State, MeasuredError | None] | None = None
        self._heads = {layer: plan.num_heads for layer, plan in plans.items()}
        steps = DecodeDraws(DecodeSampler(verify.seed, 0, verify.rows)) if decode else None
        self._state = _State(
            {
                layer: LayerMeter(
                    _place(places[layer], layer),
                    steps or PromptDraws(RowSampler(verify.seed, plan.ordinal, total, verify.rows)),
                    RowErrors(),
                )
                for layer, plan in plans.items()
            },
            last=None if decode else total,
        )

    def refusal(self, choice: Choice, start: int, n: int, total: int) -> str | None:
        """Why it cannot measure rows start .. start + n - 1 of a sequence; None where it can."""
        if choice != self.choice:
            return f"its meter was made for {self.choice}, the slice asks for {choice}"
        if total != self.total:
            return f"its meter was made for a prompt of {self.total} tokens, total is {total}"
        if not self.decode and start + n > self.total:
            return "its meter measures the prompt: generated tokens need one made with decode=True"
        if self.decode and start < self.total:
            return "its meter measures generated tokens: the prompt needs one made with decode=False"
        reached = self._state.next_position
        if reached and start != reached:
            return f"its meter has read up to position {reached}, the slice begins at {start}"
        return None

    def begin(self) -> Reading:
        return Reading(self._state)

    def commit(self, reading: Reading) -> None:
        """The step that made the reading has succeeded."""
        self._state = reading.after()

    @property
    def held_bytes(self) -> int:
        """Of the rows that are still to be computed: fewer than HELD_ROWS in each layer."""
        return sum(held.nbytes for layer in self._state.layers.values() for held in layer.held)

    def measured(self) -> MeasuredError | None:
        """Of the rows computed so far, which at the end of the prompt are all; None while there are none.
        Takes some milliseconds for every layer."""
        state, told = self._state, self._told
        if told is None or told[0] is not state:
            self._told = told = state, self._measure(state)
        return told[1]

    def _measure(self, state: _State) -> MeasuredError | None:
        found = [_figures(n, each, self._seed, self._heads[n]) for n, each in sorted(state.layers.items())]
        layers = tuple(each for each in found if each is not None)
        if not layers or len(layers) < len(found):
            return None
        return MeasuredError(
            estimate=max(each.estimate for each in layers),
            approx_upper_95=largest_limit([each.approx_upper_95 for each in layers]),
            row_bound=largest_limit([each.row_bound for each in layers]),
            rows=sum(each.rows for each in layers),
            rows_total=sum(each.rows_total for each in layers),
            cost_ms=state.cost_s * 1e3,
            layers=layers,
        )


def _place(place: Place | str, layer: int) -> Place:
    if isinstance(place, str):
        raise ValueError(f"verify: the output projection of layer {layer} is not known: {place}")
    return place


def _figures(number: int, layer: LayerMeter, seed: int, num_heads: int) -> LayerError | None:
    """None where no row was looked at, though some differ from exact's."""
    if not layer.errors.rows_total:
        return None
    if not layer.approximated:
        nothing = (0.0,) * num_heads
        return LayerError(number, 0.0, 0.0, 0.0, 0, layer.errors.rows_total, nothing, 0.0)
    if not layer.errors.rows:
        return None
    f = layer.errors.figures(seed)
    return LayerError(
        number, f.estimate, f.approx_upper_95, f.row_bound, f.rows, f.rows_total, f.head_shares, f.of_residual
    )
