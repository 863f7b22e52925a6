"""One attention layer while it runs, and one call of the kernels in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter
from typing import TYPE_CHECKING

import torch

from kernels import attend_packed
from kernels.contract import PackedResult, Params, Segment, Stats
from models.stretches import Piece

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.math.kept import KeptStates
    from kernels.math.summaries import BlockSummaries
    from models.seam import LayerPlan, Learned

Keys = tuple["Tensor", "Tensor", "BlockSummaries | None", "KeptStates | None"]
"""A member's keys and values [1, Hk, M, D or Dv], and what is known of them."""


_clock: ContextVar[AttentionClock | None] = ContextVar("longreach_attention_clock", default=None)


@dataclass
class AttentionClock:
    """Seconds of the attention calls within ``with clock.running()``, each waited for: what kernels tell of a
    device is how long it took to ask for them."""

    seconds: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        token = _clock.set(self)
        try:
            yield
        finally:
            _clock.reset(token)

    def time(self, device: torch.device, call: Callable[[], PackedResult]) -> PackedResult:
        wait_for(device)
        began = perf_counter()
        result = call()
        wait_for(device)
        self.seconds += perf_counter() - began
        return result


def wait_for(device: torch.device) -> None:
    """Until what was asked of it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Layer:
    """One attention layer of a forward: its place in it, its plan, and the tensors of the whole pack."""

    index: int
    plan: LayerPlan
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    learned: Learned
    can_be_left: bool
    placed: frozenset[int]
    """Rows of the packed axis that are in their caches already."""

    @cached_property
    def new_keys(self) -> Tensor:
        """k of the pack without its batch dimension: one view for all members."""
        return self.k[0]

    @cached_property
    def new_values(self) -> Tensor:
        return self.v[0]

    def learned_by(self, backend: str) -> object | None:
        """The layer's own parameters for a backend that the model carries some for; a layer's own window
        has none."""
        of_layers = None if self.plan.window is not None else self.learned.get(backend)
        return None if of_layers is None else of_layers[self.plan.ordinal]


@dataclass(frozen=True)
class Done:
    """What a call of ``backend`` did for one piece; ``dropped`` [1, H, rows] is its own estimate of the mass
    that it left out. ``exact``: every pair was kept and nothing approximated."""

    piece: Piece
    keys: Keys
    stats: Stats
    dropped: Tensor | None
    backend: str
    exact: bool


def attend_pieces(
    layer: Layer, pieces: Sequence[Piece], keys: Sequence[Keys], backend: str, params: Params
) -> PackedResult:
    """Adjacent pieces of the packed axis in one call, by the impl that their choice asks for. In a layer that
    the network itself declares local a call has members of different choices: it runs by what suits the
    device."""
    clock = _clock.get()
    if clock is not None:
        return clock.time(layer.q.device, lambda: _attend(layer, pieces, keys, backend, params))
    return _attend(layer, pieces, keys, backend, params)


def _attend(
    layer: Layer, pieces: Sequence[Piece], keys: Sequence[Keys], backend: str, params: Params
) -> PackedResult:
    begin, stop = pieces[0].rows.start, pieces[-1].rows.stop
    plan = layer.plan
    return attend_packed(
        layer.q[:, :, begin:stop],
        [segment(plan, piece, of, begin) for piece, of in zip(pieces, keys, strict=True)],
        backend=backend,
        params=params,
        causal=plan.causal,
        scale=layer.scale,
        layer=plan.ordinal,
        learned=layer.learned_by(backend),
        impl="auto" if plan.window is not None else pieces[0].member.choice.impl,
    )


def segment(plan: LayerPlan, piece: Piece, of: Keys, begin: int) -> Segment:
    """A piece's rows, counted from the call's first row ``begin``, and the keys that they may see."""
    first, rows = piece.rows.start - begin, piece.num_rows
    keys, values, summaries, kept = of
    if plan.causal and piece.stop < keys.shape[2]:
        keys, values = keys[:, :, : piece.stop], values[:, :, : piece.stop]
    seed = piece.member.choice.seed
    return Segment(slice(first, first + rows), keys, values, piece.start, seed, summaries, kept)
