"""The sums of squares of the residual stream that measured errors are set against, read off the network
while a step runs.

Hooks on the parts that take the stream in are set for the steps that measure, and cost the others nothing. A
step that was left may meet other steps' calls of the same parts: which forward runs is told by a context
variable, as every forward that can be left has a context of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from kernels.math.dense import accumulator_dtype
from models.members import Member
from models.meter import Reading
from models.step import Step

_watch: ContextVar[_Watch | None] = ContextVar("longreach_watch", default=None)


@contextmanager
def watching(step: Step, members: Sequence[Member]) -> Iterator[None]:
    """Within the block the members' readings are told the sums of every layer that they measure; after it
    they are finished."""
    measured = [(member, member.reading) for member in members if member.reading is not None]
    watch = _Watch(step, measured) if measured else None
    token = _watch.set(watch)  # None as well: a step within a measured one would be taken for it
    try:
        with ExitStack() as hooks:
            if watch is not None:
                watch.hook(hooks)
            yield
    finally:
        _watch.reset(token)
    for member, reading in measured:
        reading.finish(member.start, member.num_rows)


class _Watch:
    def __init__(self, step: Step, measured: Sequence[tuple[Member, Reading]]) -> None:
        self._step = step
        self._measured = measured

    def hook(self, hooks: ExitStack) -> None:
        """On every part concerned, once: layers may share them."""
        blocks = {id(p.block): p.block for _, reading in self._measured for p in reading.places}
        for block in blocks.values():
            if block is not None:
                hooks.callback(block.register_forward_pre_hook(self._entered, with_kwargs=True).remove)

    def _entered(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The part in which the next attention call lies begins: its input is the stream [1, T, E]."""
        stream = args[0] if args else kwargs.get("hidden_states")
        if _watch.get() is not self or not isinstance(stream, Tensor) or stream.ndim != 3:
            return
        layer = self._step.num_served
        for member, reading in self._measured:
            if reading.measures(layer):
                began = perf_counter()
                reading.note_residual(layer, _squares(stream[0, member.rows]))
                reading.cost_s += perf_counter() - began


def _squares(rows: Tensor) -> Tensor:
    """sum |x_i|^2 over rows [n, E] -> [] fp64. Row by row first: one pass, no copy."""
    norms = torch.linalg.vector_norm(rows, dim=-1, dtype=accumulator_dtype(rows.dtype))
    squares: Tensor = norms.double().square()
    return squares.sum()
