"""A few inputs of different sizes through the engine before the first request: first use is paid for, and
the cost model has seen short and long slices, early and late in a prompt, and tokens decoded one by one and
together."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

from models.contract import ServedModel
from service.attention import exact_choice
from service.errors import ApiError
from service.jobs import Channel, Job, Times
from service.runtime import Runtime
from service.sampling import SamplingParams
from service.sequences import EncodeSequence, Ending, GenerateSequence, Sequence

BUDGET_S = 10.0
"""No input is begun that would likely take the warm-up of a model beyond this."""
SHORT, MIDDLE, LONG = 16, 128, 512
STEP_TOKENS = 8
"""A step of one new token takes about as long as reading so many."""
REFUSALS = frozenset({"never_fits_memory", "body_too_large", "queue_full", "token_budget_exhausted"})


@dataclass(frozen=True)
class Probe:
    """``num_sequences`` inputs of so many tokens, each generating ``new_tokens`` (0: it is encoded)."""

    tokens: int
    new_tokens: int = 1
    num_sequences: int = 1
    shares: bool = False
    """Its beginning may come from the cache, so that a slice begins late."""

    @property
    def size(self) -> int:
        """What it takes, in tokens of a prompt."""
        return self.num_sequences * self.tokens + STEP_TOKENS * self.new_tokens


async def run_probes(runtime: Runtime, model: ServedModel) -> int:
    """Run the probes that fit the model and the time; how many did. ApiError where not even the first
    runs."""
    probes = probes_of(model, runtime.settings.prefill_chunk_tokens)
    runtime.progress.enter(f"warming up {model.info.name}", len(probes))
    ends = runtime.clock() + BUDGET_S
    s_per_token = 0.0
    num_run = 0
    for i, probe in enumerate(probes):
        if runtime.clock() + s_per_token * probe.size <= ends:
            seconds = await _seconds(runtime, model, probe, i)
            num_run += seconds is not None
            if seconds is not None and i > 0:  # first use says nothing about what comes
                s_per_token = seconds / probe.size
        runtime.progress.done = i + 1
    return num_run


async def _seconds(runtime: Runtime, model: ServedModel, probe: Probe, index: int) -> float | None:
    """What a probe took; None where it is more than the server's limits permit, which the first may not
    be."""
    begun = runtime.clock()
    try:
        await _run(runtime, model, probe, index)
    except ApiError as error:
        if index == 0 or error.code not in REFUSALS:
            raise
        return None
    return runtime.clock() - begun


def probes_of(model: ServedModel, chunk_tokens: int) -> list[Probe]:
    """Small ones first. Prompts longer than a chunk are read in two pieces, so that the second begins
    late."""
    if not _generates(model):
        found = [Probe(SHORT, 0), Probe(SHORT, 0, 4), Probe(MIDDLE, 0), Probe(SHORT, 0), Probe(LONG, 0)]
    else:
        late = min(chunk_tokens, LONG)
        found = [Probe(SHORT), Probe(SHORT, 4), Probe(SHORT, 4, 4), Probe(MIDDLE), Probe(late, shares=True)]
        found += [Probe(late + tokens, shares=True) for tokens in (SHORT, LONG, MIDDLE)]
    fitting = [probe for probe in found if probe.tokens + probe.new_tokens <= model.info.max_tokens]
    return fitting or [Probe(max(model.info.max_tokens - 1, 1), found[0].new_tokens)]


async def _run(runtime: Runtime, model: ServedModel, probe: Probe, index: int) -> None:
    name = f"warm-up-{model.info.name}-{index}"
    sequences = [_sequence(model, probe, i) for i in range(probe.num_sequences)]
    for sequence in sequences:
        sequence.salt = "warm-up" if probe.shares else name
    _estimate(model, probe, sequences, runtime.settings.prefill_chunk_tokens)
    job = Job(name, model, sequences, Channel(), Times(runtime.clock()), teaches=index > 0)
    runtime.engine.submit(job)
    await job.channel.next()


def _sequence(model: ServedModel, probe: Probe, index: int) -> Sequence:
    ids = [(index + i) % model.tokenizer.vocab_size for i in range(probe.tokens)]
    if not _generates(model):
        return EncodeSequence(index, ids, exact_choice(), chunkable=model.info.causal, pooling="mean")
    ending = Ending(probe.new_tokens, (), frozenset())
    exact = exact_choice()
    return GenerateSequence(index, ids, exact, exact, model.tokenizer, SamplingParams(), ending)


def _estimate(model: ServedModel, probe: Probe, sequences: Items[Sequence], chunk_tokens: int) -> None:
    for sequence in sequences:
        chunk = min(chunk_tokens, probe.tokens) if sequence.chunkable else probe.tokens
        sequence.estimated_bytes = model.estimate_bytes(
            probe.tokens, probe.new_tokens, sequence.choice, chunk
        )


def _generates(model: ServedModel) -> bool:
    return "generate" in model.info.tasks or "score" in model.info.tasks
