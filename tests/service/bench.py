"""An engine over fake models without HTTP: prices that do not move, a clock that a test can set, and jobs
whose events are kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from models.contract import Choice, Flops
from service.attention import exact_choice
from service.cost import CostModel
from service.engine import Engine
from service.jobs import Channel, Event, Job, Times
from service.sampling import SamplingParams
from service.schedule import Limits
from service.seen import StepSeen, TimeSeen
from service.sequences import EncodeSequence, Ending, GenerateSequence, TokenOut
from tests.service.conftest import wait_for
from tests.service.fake_model import EOS, FakeModel

MS_PER_TOKEN = 1.0
SHORT_MS = 100.0


class FixedCosts(CostModel):
    """A token of a fake model costs ``MS_PER_TOKEN``, for ever: more than ``SHORT_MS`` tokens are long."""

    def price(self, model: str, backend: str, flops: Flops) -> float:
        return flops.linear / 1e3 * MS_PER_TOKEN

    def fixed_ms(self, model: str) -> float:
        return 0.0


class Clock:
    """Stands still unless told to go on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class KeptEvents(Channel):
    """Events kept where no event loop waits for them."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def put_here(self, events: Sequence[Event]) -> None:
        self.events.extend(events)

    @property
    def loop(self) -> Any:
        return self

    def call_soon_threadsafe(self, told: Callable[[], None]) -> None:
        told()


class Bench:
    """Engine, what it observed, and the jobs that were sent to it."""

    def __init__(
        self,
        models: tuple[FakeModel, ...],
        clock: Callable[[], float],
        limits: Limits,
        observe_time: Callable[[TimeSeen], None],
    ) -> None:
        self.models = models
        self.seen: list[StepSeen] = []
        self.clock = clock
        self.engine = Engine(limits, clock, self.seen.append, FixedCosts(), observe_time=observe_time)
        self._count = 0

    def encode(self, model: FakeModel, tokens: int, **fields: Any) -> Job:
        sequence = EncodeSequence(0, ids_of(tokens), exact_choice(), chunkable=False, pooling="mean")
        return self.send(model, [sequence], **fields)

    def generate(
        self,
        model: FakeModel,
        ids: int | list[int],
        new_tokens: int = 1,
        *,
        n: int = 1,
        choice: Choice | None = None,
        salt: str = "",
        leads: bool = True,
        **fields: Any,
    ) -> Job:
        """``n`` choices of one prompt; ``leads`` False lets each read it for itself."""
        sampling = SamplingParams(temperature=1.5 if n > 1 else 0.0, seed=7)
        ending = Ending(new_tokens, (), frozenset((EOS,)))
        prefill, decode = choice or exact_choice(), exact_choice()
        prompt = ids_of(ids) if isinstance(ids, int) else ids
        sequences: list[GenerateSequence] = []
        for i in range(n):
            sequence = GenerateSequence(i, prompt, prefill, decode, model.tokenizer, sampling, ending)
            sequence.salt = salt
            sequence.leader = sequences[0] if leads and i else None
            sequences.append(sequence)
        return self.send(model, sequences, **fields)

    def send(self, model: FakeModel, sequences: Sequence[Any], **fields: Any) -> Job:
        self._count += 1
        job = Job(f"job-{self._count}", model, sequences, KeptEvents(), Times(self.clock()), **fields)
        for sequence in sequences:
            tokens = len(sequence.token_ids)
            sequence.estimated_bytes = model.estimate_bytes(
                tokens, sequence.capacity - tokens, sequence.choice, tokens
            )
        self.engine.submit(job)
        return job


@contextmanager
def running(
    *models: FakeModel,
    clock: Callable[[], float] = time.monotonic,
    observe_time: Callable[[TimeSeen], None] = lambda seen: None,
    **limits: Any,
) -> Iterator[Bench]:
    """A started engine; at the end it stops, and nothing may be open or have been misused."""
    values: dict[str, Any] = {
        "max_queue_requests": 1000,
        "max_queue_tokens": 1 << 20,
        "max_queue_ms": 1e9,
        "max_running": 64,
        "step_tokens": 512,
        "step_ms": 200.0,
        "prefill_chunk_tokens": 512,
        "short_ms": SHORT_MS,
        "short_weight": 4.0,
        "memory_bytes": 1 << 40,
    }
    bench = Bench(models, clock, Limits(**{**values, **limits}), observe_time)
    bench.engine.start()
    try:
        yield bench
        wait_for(lambda: bench.engine.num_jobs == 0)
    finally:
        assert bench.engine.stop(), "the engine thread did not end"
    for model in models:
        model.check_idle()
    assert bench.engine.reserved_bytes == 0


def done(*jobs: Job) -> None:
    """Until all have ended; none of them with an error."""
    wait_for(lambda: all(job.ended for job in jobs))
    assert [job.error for job in jobs] == [None] * len(jobs)


def failed(job: Job) -> str:
    """The code of the error that the job ended with."""
    wait_for(lambda: job.ended)
    assert job.error is not None
    return job.error.code


def ids_of(tokens: int) -> list[int]:
    return [65 + i % 26 for i in range(tokens)]


def tokens_of(job: Job) -> list[list[int]]:
    """Ids generated by each choice."""
    return [[token.token_id for token in sequence.tokens] for sequence in generated(job)]


def generated(job: Job) -> list[GenerateSequence]:
    return [sequence for sequence in job.sequences if isinstance(sequence, GenerateSequence)]


def told(job: Job) -> list[TokenOut]:
    """Tokens that went out on the job's channel."""
    channel = job.channel
    assert isinstance(channel, KeptEvents)
    return [event for event in channel.events if isinstance(event, TokenOut)]
