"""Answers of the native routes: their schema, and how they are made from a finished job."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field

from models.contract import MeasuredError, Verify, Work
from service.auto_answers import Budget, PlannedLayer, told_auto
from service.chosen import Chosen, ChosenAuto, exact_choice
from service.error_answers import MeasuredErrorAnswer, both_phases, told_error
from service.jobs import Job, leads
from service.measured import none_of, worst_of
from service.record import Record
from service.sequences import GenerateSequence


class Usage(BaseModel):
    prompt_tokens: int = Field(description="tokens processed, after any truncation")
    completion_tokens: int = 0
    total_tokens: int
    cached_tokens: int = Field(0, description="prompt tokens that were taken from the cache instead of read")


class AttentionUsed(BaseModel):
    """What attention was asked for, what ran, and what it cost."""

    requested: str
    used: str
    params: dict[str, Any] = Field(description="what ran, with every default filled in")
    applied_layers: list[int] = Field(
        description="layers to which the choice applies; the others have their own"
    )
    density: float = Field(description="pairs kept / pairs that exact computes")
    density_per_head: list[list[float] | None] | None = Field(
        description="density of each head of each of the applied layers; null where heads do not choose apart"
    )
    density_computed: float = Field(
        description="score elements computed / pairs that exact computes, without what was scored to choose"
    )
    dense_share: float = Field(
        description="share of the computed elements for which a dense kernel ran, as it was the faster one"
    )
    dropped_mass: float | None = Field(
        description="mean over rows, heads and layers of the backend's own estimate of the softmax mass that "
        "it left out or only approximated; null where it has none"
    )
    flops_ratio: float = Field(
        description="floating-point operations of the whole forward, scoring to choose included / those with "
        "exact"
    )
    impl: str
    fallback_reason: str | None = None
    plan: list[PlannedLayer] | None = Field(
        None,
        description="of auto, where all inputs have the same one: what ran layer by layer, fit to be sent as "
        "'plan'",
    )
    plans: list[list[PlannedLayer]] | None = Field(
        None, description="of auto, where inputs have different plans: one for each, in order"
    )
    plan_reason: str | None = Field(
        None, description="of auto: why the plan is as it is; 'replayed' where it was given"
    )
    plan_reasons: list[str] | None = Field(
        None, description="of auto, where plan_reason differs from input to input: one for each, in order"
    )
    budget: Budget | None = Field(None, description="of auto with max_error: whether it was kept")
    measured_error: MeasuredErrorAnswer | None = Field(
        None,
        description="how far the attention's output was from exact; null where nobody looked (ask with "
        "'verify': true) and where no row came to be looked at",
    )
    decode: AttentionUsed | None = Field(None, description="only where prefill and decode were chosen apart")


class MemoryStats(BaseModel):
    device: str
    estimated_bytes: int
    peak_bytes: int | None = Field(description="null where steps were shared or the device cannot say")
    exact_bytes: int


class Stats(BaseModel):
    queue_ms: float
    tokenize_ms: float
    prefill_ms: float
    decode_ms: float
    time_to_first_token_ms: float | None
    selection_ms: float = Field(
        description="choosing what attention looks at, summed over layers and sequences"
    )
    attention_ms: float = Field(description="attention with its selection, summed over layers and sequences")
    total_ms: float
    batch_size: int = Field(description="requests in the fullest step that this one shared")
    batch_tokens: int
    memory: MemoryStats


class ChunkEmbedding(BaseModel):
    token_range: list[int]
    char_range: list[int] | None
    embedding: list[float]


class Embedding(BaseModel):
    index: int
    embedding: list[float] | list[list[float]]
    tokens: int
    truncated_tokens: int
    chunks: list[ChunkEmbedding] | None = None


class Measured(BaseModel):
    """What every answer of a model says about its making."""

    id: str
    model: str
    usage: Usage
    attention: AttentionUsed
    stats: Stats | None = None


class EncodeAnswer(Measured):
    data: list[Embedding]


class TopLogprob(BaseModel):
    token: str
    token_id: int
    logprob: float


class Logprobs(BaseModel):
    tokens: list[str]
    token_ids: list[int]
    token_logprobs: list[float]
    top_logprobs: list[list[TopLogprob]]


class Choice(BaseModel):
    index: int
    text: str
    finish_reason: str
    logprobs: Logprobs | None = None
    truncated_tokens: int = 0


class GenerateAnswer(Measured):
    choices: list[Choice]


class Score(BaseModel):
    token_logprobs: list[float] = Field(description="natural logarithms, from the second token on")
    perplexity: float
    bits_per_byte: float = Field(description="over the bytes of the scored tokens")
    tokens: int


class ScoreAnswer(Measured):
    data: list[Score]
    warnings: list[str] = []


@dataclass(frozen=True)
class Attended:
    """The attention of one request: of prefill, and of decode. ``split`` where the request named them
    apart."""

    prefill: Chosen | ChosenAuto
    decode: Chosen
    split: bool = False

    @classmethod
    def one(cls, chosen: Chosen | ChosenAuto) -> Attended:
        """Where nothing is decoded, or the same attention decodes."""
        if isinstance(chosen, ChosenAuto):
            exact = exact_choice(chosen.spec.seed)
            return cls(chosen, Chosen("exact", exact, verify=chosen.verify, path=chosen.path))
        return cls(chosen, chosen)

    @property
    def label(self) -> str:
        """As metrics have it."""
        return self.prefill.used


def usage_of(record: Record) -> Usage:
    return Usage(
        prompt_tokens=record.input_tokens,
        completion_tokens=record.output_tokens,
        total_tokens=record.input_tokens + record.output_tokens,
        cached_tokens=record.cached_tokens,
    )


def attention_of(job: Job, attended: Attended) -> AttentionUsed:
    prefill = _sum([sequence.prefill_work for sequence in job.sequences])
    decode = _sum([sequence.decode_work for sequence in job.sequences])
    layers = list(job.model.info.applied_layers)
    planned = told_auto(attended.prefill, job.sequences) if isinstance(attended.prefill, ChosenAuto) else {}
    error = _error_of(attended.prefill.verify, job, job.measured.prefill, _exact_rows_read(job))
    decode_error = _error_of(attended.decode.verify, job, job.measured.decode, _exact_rows_decoded(job))
    if not attended.split:
        used = _used(attended.prefill, _sum([prefill, decode]), layers)
        return used.model_copy(update={"measured_error": both_phases(error, decode_error), **planned})
    used = _used(attended.prefill, prefill, layers)
    decoded = _used(attended.decode, decode, layers).model_copy(update={"measured_error": decode_error})
    return used.model_copy(update={"measured_error": error, "decode": decoded, **planned})


def _error_of(
    asked: Verify | None, job: Job, found: MeasuredError | None, exact_rows: int
) -> MeasuredErrorAnswer | None:
    """``found`` by meters. What exact attention computed needs none: of its rows there is no error."""
    if asked is not None:
        exact = none_of(sorted(asked.layers or job.model.info.applied_layers), exact_rows)
        found = worst_of([each for each in (found, exact) if each is not None])
    return told_error(found, with_layers=asked is not None)


def _exact_rows_read(job: Job) -> int:
    """Tokens of prompts that were read with exact, without those that came from the cache."""
    exact = (s for s in job.sequences if leads(s) and s.choice.backend == "exact")
    return sum(s.prompt_tokens - s.cached_tokens for s in exact)


def _exact_rows_decoded(job: Job) -> int:
    """New tokens that were read with exact for the next one."""
    generated = (s for s in job.sequences if isinstance(s, GenerateSequence))
    return sum(max(len(s.tokens) - 1, 0) for s in generated if s.decode_choice.backend == "exact")


def stats_of(job: Job, record: Record, now: float) -> Stats:
    times = job.times
    first_step = times.first_step if times.first_step is not None else now
    ended = times.ended if times.ended is not None else now
    prefill_end = times.first_token if times.first_token is not None else ended
    work = _sum([part for s in job.sequences for part in (s.prefill_work, s.decode_work)])
    waited = None if times.first_token is None else _ms(times.first_token - times.arrival)
    return Stats(
        queue_ms=_ms(first_step - times.submitted),
        tokenize_ms=_ms(record.tokenize_s),
        prefill_ms=_ms(prefill_end - first_step),
        decode_ms=_ms(ended - prefill_end),
        time_to_first_token_ms=waited,
        selection_ms=round(work.selection_ms, 3),
        attention_ms=round(work.attention_ms, 3),
        total_ms=_ms(now - times.arrival),
        batch_size=job.batch_requests,
        batch_tokens=job.batch_tokens,
        memory=MemoryStats(
            device=job.model.info.device,
            estimated_bytes=job.memory.estimated_bytes,
            peak_bytes=job.memory.peak_bytes,
            exact_bytes=job.memory.exact_bytes,
        ),
    )


def _used(chosen: Chosen | ChosenAuto, work: Work, layers: list[int]) -> AttentionUsed:
    return AttentionUsed(
        requested=chosen.requested,
        used=chosen.used,
        params=chosen.params,
        applied_layers=layers,
        density=_ratio(work.pairs_kept, work.pairs_exact),
        density_per_head=_density_per_head(work, len(layers)),
        density_computed=_ratio(work.pairs_computed, work.pairs_exact),
        dense_share=work.pairs_dense / work.pairs_computed if work.pairs_computed else 0.0,
        dropped_mass=work.dropped_mass / work.dropped_rows if work.dropped_rows else None,
        flops_ratio=_ratio(work.flops, work.flops_exact),
        impl=work.impl,
        fallback_reason=chosen.fallback_reason,
    )


def _density_per_head(work: Work, num_layers: int) -> list[list[float] | None] | None:
    """[layer][head]."""
    if not work.kept_per_head:
        return None
    return [_densities(work, layer) for layer in range(num_layers)]


def _densities(work: Work, layer: int) -> list[float] | None:
    kept = work.kept_per_head.get(layer)
    return None if kept is None else [_ratio(pairs, work.exact_per_head[layer]) for pairs in kept]


def _sum(parts: Items[Work]) -> Work:
    total = Work()
    for part in parts:
        total.add(part)
    return total


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
