"""One document under several attentions, one after another, each as jobs of their own through the engine:
scheduled among other requests, cancelled with the client, under one deadline.

``exact`` comes first, whatever was asked: the others are held against it. A choice that the model cannot run,
that does not fit or whose numbers overflow has an error in its place, and the others go on; what ends the
whole request (its deadline, its client, a full queue, a server that stops) ends all of it."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from models.contract import ServedModel, Verify
from service.answers import Attended, MemoryStats, Usage, attention_of, stats_of
from service.attention import MAX_SPECS, AnySpec, choose, parse, selects_by_tile
from service.auto import profile_of, resolve_auto
from service.auto_answers import told_exact
from service.auto_spec import AutoSpec, check_plan
from service.chosen import Chosen, ChosenAuto, exact_choice
from service.compare_kinds import Kind, kind_of
from service.compare_schema import Compared, CompareRequest, CompareStats
from service.errors import ApiError, invalid
from service.estimate import looks_ahead
from service.flow import Asked, Flow
from service.jobs import Job
from service.problems import Problem
from service.report import observe_request
from service.sequences import Sequence
from service.verify_spec import check_layers, parse_verify

OF_ONE_CHOICE = frozenset(
    {"attention_not_supported", "never_fits_memory", "non_finite_output", "internal_error"}
)
"""Errors that say nothing about the other choices."""
BY_TILE = (
    "keys were selected by whole query tiles, so a token's likelihood may depend on later tokens of its tile"
)


@dataclass(frozen=True)
class Question:
    """A comparison as it was asked: its specs, each with how its error is to be measured, and exact's."""

    specs: tuple[AnySpec, ...]
    verify: Verify | None
    timing: bool
    asked: Asked
    warnings: tuple[str, ...] = ()


def question_of(body: CompareRequest, model: ServedModel) -> Question:
    """ApiError 400 names ``attention[i]``: a request of which one spec makes no sense runs nothing."""
    raw = body.attention
    if not isinstance(raw, list) or not 1 <= len(raw) <= MAX_SPECS:
        had = f"{len(raw):,} entries" if isinstance(raw, list) else "no list"
        detail = f"attention has {had}; a comparison takes a list of 1 to {MAX_SPECS} specs"
        raise invalid(detail, "attention", min_length=1, max_length=MAX_SPECS)
    specs = [_spec(each, f"attention[{i}]", model) for i, each in enumerate(raw)]
    verify, warnings = _verify_of(body, model)
    told = [_with_verify(*each, verify) for each in zip(specs, raw, strict=True)]
    return Question(tuple(told), verify, body.timing, Asked(body.timeout_ms, body.priority), warnings)


def _spec(raw: object, path: str, model: ServedModel) -> AnySpec:
    if isinstance(raw, Mapping) and raw and set(raw) <= {"prefill", "decode"}:
        raise invalid(f"{path}: a comparison reads and does not decode; name the attention alone", path)
    spec = parse(raw, path=path)
    if spec.verify is not None:
        check_layers(spec.verify, model.info, f"{path}.verify.layers")
    if isinstance(spec, AutoSpec):
        check_plan(spec, model.info)
    return spec


def _verify_of(body: CompareRequest, model: ServedModel) -> tuple[Verify | None, tuple[str, ...]]:
    """As asked; where nothing is asked, with the defaults if the model can be measured, else a warning."""
    verify = Verify() if body.verify is None else parse_verify(body.verify, "verify", 0)
    if verify is None:
        return None, ()
    check_layers(verify, model.info, "verify.layers")
    try:
        model.meter(verify, exact_choice(), 1)
    except ValueError as error:
        told = f"the error of attention on model {model.info.name!r} cannot be measured: {error}"
        if body.verify is None:
            return None, (told,)
        detail = f"verify: {told}. Leave verify out."
        raise ApiError("attention_not_supported", detail, param="verify") from None
    return verify, ()


def _with_verify(spec: AnySpec, raw: object, default: Verify | None) -> AnySpec:
    says = isinstance(raw, Mapping) and raw.get("verify") is not None
    if says or default is None:
        return spec
    return replace(spec, verify=replace(default, seed=spec.seed))


async def obtain_profile(flow: Flow, model: ServedModel, question: Question) -> None:
    """That ``auto`` plans with, where it is among the specs: it may have to be measured, for minutes in which
    other comparisons can run. ApiError as ``resolve``; what concerns ``auto`` alone is told in its place."""
    asking = [each for each in question.specs if isinstance(each, AutoSpec) and each.max_error is not None]
    if not asking:
        return
    try:
        await profile_of(flow, model, asking[0], question.asked.timeout_ms)
    except ApiError as error:
        if error.code not in OF_ONE_CHOICE:
            raise


class Comparison:
    """Of one document, for one request."""

    def __init__(self, flow: Flow, model: ServedModel, token_ids: list[int], question: Question) -> None:
        self.id = f"cmp_{uuid.uuid4().hex}"
        self._flow = flow
        self._model = model
        self._question = question
        self._tokens = len(token_ids)
        self._kind: Kind = kind_of(model, token_ids)
        self._readings = 0
        self._queue_s = 0.0
        self._inference_s = 0.0
        self._exact_ms: float | None = None

    async def reference(self) -> Compared:
        """Exact's own figures. ApiError where it cannot be run: then there is nothing to compare with."""
        found = await self._run(Chosen("exact", exact_choice(), verify=self._question.verify))
        self._exact_ms = found.prefill_ms
        return found.model_copy(update={"speedup": _ratio(self._exact_ms, self._exact_ms)})

    async def under(self, spec: AnySpec, reference: Compared) -> Compared:
        """One choice's figures, or its error."""
        try:
            chosen = await self._choose(spec)
            if chosen.of(0).choice.backend == "exact":
                return self._again(reference, chosen)
            found = await self._run(chosen)
        except ApiError as error:
            if error.code not in OF_ONE_CHOICE:
                raise
            return Compared(requested=spec.name, error=self._told(error, spec))
        return found.model_copy(update={"speedup": _ratio(self._exact_ms, found.prefill_ms)})

    async def _choose(self, spec: AnySpec) -> Chosen | ChosenAuto:
        """``auto`` with the plan of this document."""
        chosen = choose(spec, self._model)
        if isinstance(chosen, Chosen):
            return chosen
        timeout_ms = self._question.asked.timeout_ms
        return await resolve_auto(self._flow, self._model, chosen, [self._tokens], timeout_ms)

    def finish(self) -> tuple[Usage, CompareStats]:
        """What the whole comparison took, also for the request's record."""
        record, tokens = self._flow.record, self._tokens * self._readings
        record.input_tokens, record.queue_s, record.inference_s = tokens, self._queue_s, self._inference_s
        record.length_tokens, record.computed = self._tokens, True
        observe_request(self._flow.runtime, record)
        total_ms = round((self._flow.runtime.clock() - record.started) * 1e3, 3)
        tokenize_ms, queue_ms = round(record.tokenize_s * 1e3, 3), round(self._queue_s * 1e3, 3)
        return Usage(prompt_tokens=tokens, total_tokens=tokens), CompareStats(
            readings=self._readings, tokenize_ms=tokenize_ms, queue_ms=queue_ms, total_ms=total_ms
        )

    async def _run(self, chosen: Chosen | ChosenAuto) -> Compared:
        attended, sequence = Attended.one(chosen), self._kind.reading(chosen.of(0).choice)
        job = await self._read(sequence, attended)
        self._flow.finish_job(job, attended)
        now = self._flow.runtime.clock()
        figures = await self._flow.offload(lambda: self._kind.figures(sequence))
        memory = stats_of(job, self._flow.record, now).memory
        if self._question.timing:
            figures, memory = {**figures, **(timed := await self._time(chosen))}, timed["memory"]
        return Compared(
            requested=chosen.requested,
            attention=attention_of(job, attended),
            warnings=[*self._question.warnings, *_warnings(chosen, self._model)],
            **{**figures, "memory": memory},
        )

    async def _time(self, chosen: Chosen | ChosenAuto) -> dict[str, Any]:
        """How long reading takes where nothing but the next token is wanted, and what it holds."""
        choice = chosen.of(0).choice
        job = await self._read(self._kind.timed(choice), Attended.one(Chosen(chosen.requested, choice)))
        stats = stats_of(job, self._flow.record, self._flow.runtime.clock())
        waited = round(stats.tokenize_ms + stats.prefill_ms, 3) if "score" in self._model.info.tasks else None
        memory: MemoryStats = stats.memory
        return {"prefill_ms": stats.prefill_ms, "time_to_first_token_ms": waited, "memory": memory}

    async def _read(self, sequence: Sequence, attended: Attended) -> Job:
        """One reading of the document, nothing of it from the cache."""
        job = self._flow.job(f"{self.id}_", self._model, [sequence], attended, self._question.asked)
        self._reserve(job, sequence)
        await self._flow.run(job)
        self._flow.abandon(job)  # nothing of it waits for its deadline
        assert job.cached_tokens == 0, "a compared document was taken from the cache. This is a bug."
        times = job.times
        first, ended = times.first_step or times.submitted, times.ended or times.submitted
        self._readings += 1
        self._queue_s += first - times.submitted
        self._inference_s += ended - first
        return job

    def _reserve(self, job: Job, sequence: Sequence) -> None:
        """Room for exact's outputs and for what comparing takes; not in the memory told of the choice."""
        chunk = self._flow.runtime.settings.prefill_chunk_tokens
        if looks_ahead(sequence.choice) or not sequence.chunkable:
            chunk = self._tokens
        kept = self._kind.kept_bytes
        sequence.output_bytes += kept
        extra = kept + self._kind.step_bytes(min(chunk, self._tokens))
        sequence.estimated_bytes += extra
        sequence.exact_bytes += extra

    def _again(self, reference: Compared, chosen: Chosen | ChosenAuto) -> Compared:
        """Exact's figures in the place of a choice that is exact, was planned as such, or was permitted to
        fall back to it."""
        assert reference.attention is not None
        if chosen.fallback_reason is not None:
            self._flow.runtime.metrics.fallback.labels(chosen.requested, "exact", "unsupported").inc()
        told: dict[str, Any] = {"requested": chosen.requested, "fallback_reason": chosen.fallback_reason}
        if isinstance(chosen, ChosenAuto):
            told |= {"used": chosen.used, "params": chosen.params, **told_exact(chosen)}
        attention = reference.attention.model_copy(update=told)
        return reference.model_copy(update={"requested": chosen.requested, "attention": attention})

    def _told(self, error: ApiError, spec: AnySpec) -> Problem:
        if error.param is None:
            error.param = spec.path
        return Problem.model_validate(error.problem(self._flow.record.request_id))


def _warnings(chosen: Chosen | ChosenAuto, model: ServedModel) -> list[str]:
    return [BY_TILE] if model.info.causal and selects_by_tile(chosen.of(0).choice) else []


def _ratio(exact_ms: float | None, own_ms: float | None) -> float | None:
    return exact_ms / own_ms if exact_ms and own_ms else None
