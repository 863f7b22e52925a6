"""Bytes that a request may hold, sequence by sequence, and what to do where they are too many."""

from __future__ import annotations

from collections.abc import Sequence as Items

from kernels.registry import load
from models.contract import Choice, ServedModel
from service.errors import ApiError
from service.estimate import Plan, bytes_of
from service.jobs import Job, groups_of
from service.measured import Effort
from service.sequences import GenerateSequence, Sequence

MAX_SUGGESTED = 3


def sequence_bytes(
    model: ServedModel,
    sequence: Sequence,
    choices: Items[Choice],
    chunk_tokens: int,
    *,
    measured: bool = True,
) -> int:
    """Bytes that a sequence may hold, what is kept of it for the answer included, under the dearest of
    ``choices``; with what measuring their error takes, where that is wanted. One that follows a leader reads
    no prompt: its largest step is one token."""
    tokens = len(sequence.token_ids)
    new_tokens = sequence.capacity - tokens

    def under(choice: Choice) -> int:
        if _follows(sequence):
            return model.estimate_bytes(tokens, new_tokens, choice, 1)
        effort = sequence.effort if measured else Effort()
        return bytes_of(model, Plan(choice, choice, tokens, new_tokens, chunk_tokens, effort))

    return sequence.output_bytes + max(under(choice) for choice in choices)


def with_way_out(error: ApiError, job: Job, backends: Items[str], chunk_tokens: int) -> ApiError:
    """``error`` (never_fits_memory), and which of ``backends`` would fit with their default params."""
    limit = int(error.limits["memory_limit_bytes"])
    needed = {name: _needed_bytes(job, name, chunk_tokens) for name in backends}
    fitting = sorted((name for name in needed if needed[name] <= limit), key=lambda name: needed[name])
    if fitting:
        named = " or ".join(repr(name) for name in fitting[:MAX_SUGGESTED])
        told = f" With default params {named} would fit."
    else:
        told = " No backend of this model would fit."
    limits = {**error.limits, "backends_that_fit": fitting}
    return ApiError(error.code, error.detail + told, param=error.param, limits=limits)


def _needed_bytes(job: Job, backend: str, chunk_tokens: int) -> int:
    """What admission would ask room for: the dearest prompt with the choices that follow it, beside what the
    others leave for the answer."""
    choice = Choice(backend, load(backend).params())

    def held(group: Items[Sequence]) -> int:
        own = (sequence_bytes(job.model, sequence, [choice], chunk_tokens) for sequence in group)
        return sum(own) - group[0].output_bytes

    return sum(sequence.output_bytes for sequence in job.sequences) + max(map(held, groups_of(job)))


def _follows(sequence: Sequence) -> bool:
    """Whether another choice reads the prompt for it."""
    return isinstance(sequence, GenerateSequence) and sequence.leader is not None
