"""The measuring of a profile as a job of the engine: left for short work wherever it can be, sharing the
lane of long documents with other models' and its own."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from models.calibrate_default import Measurement
from models.calibrate_model import CalibratingModel
from models.contract import SliceResult, Want
from models.one_step import OneStepState
from models.profile import Profile
from models.runner import Model
from service.attention import exact_choice
from service.cost import GIGA, Prior
from service.jobs import Channel, Job, Times
from service.sequences import Sequence, TokenOut

if TYPE_CHECKING:
    from service.runtime import Runtime

LOWEST_PRIORITY = -10
log = logging.getLogger("longreach.profiles")


class CalibrateSequence(Sequence):
    """One step of its own; ``found`` or ``refused`` once it has run."""

    chunkable = False

    def __init__(self) -> None:
        super().__init__(0, [0], exact_choice())
        self.found: Profile | None = None
        self.refused: Exception | None = None

    def want(self, start: int, tokens: int) -> Want:
        return "nothing"

    def accept(self, result: SliceResult, read: int) -> TokenOut | None:
        assert isinstance(self.state, OneStepState)
        self.found, self.refused = self.state.found, self.state.refused
        self.finished = True
        return None


async def run_measurement(
    runtime: Runtime, model: Model, todo: Measurement, watch: Callable[[str], None]
) -> Profile:
    """Through the engine. Cancelled, it ends there too. ApiError where the engine refuses or fails it,
    ModelError or ValueError where it cannot be measured."""
    sequence = CalibrateSequence()
    sequence.estimated_bytes = sequence.exact_bytes = todo.num_bytes
    measure = partial(todo.run, log.info, watch)
    calibrating = CalibratingModel(model, measure, todo.num_bytes, _flops(runtime, todo))
    times = Times(runtime.clock())
    name = f"calibrate_{uuid.uuid4().hex}"
    job = Job(name, calibrating, [sequence], Channel(), times, priority=LOWEST_PRIORITY, teaches=False)
    runtime.engine.submit(job)
    runtime.jobs.add(job)
    try:
        await job.channel.next()
    finally:
        runtime.engine.cancel(job)
    if sequence.refused is not None:
        raise sequence.refused
    assert sequence.found is not None
    return sequence.found


def _flops(runtime: Runtime, todo: Measurement) -> float:
    """As predicted, but no more than the time that it may take, and enough to be long work: what is short
    cannot be left. Its name has no prices of its own, so those assumed before any step was seen hold."""
    per_ms = GIGA / Prior().linear_ms_per_gflop
    least, most = 2 * runtime.settings.short_ms * per_ms, 60e3 * todo.minutes * per_ms
    return max(min(todo.flops, most), least)
