"""A diagnosis as a request: checked, run by the engine as a model of its own, answered.

The engine's thread runs it like any long step: it is left for shorter work between layers, heads and
stretches of rows, and shares no step with other requests."""

from __future__ import annotations

import uuid

from kernels.registry import load
from models.contract import Choice, ServedModel, SliceResult, Want
from models.diagnose_model import DiagnosingModel, can_diagnose
from models.diagnose_told import MAX_TOKENS, Asked, Diagnosis
from models.one_step import OneStepState
from service.answers import stats_of, usage_of
from service.attention import Chosen, Spec, backend_alone, choose, exact_choice, parse
from service.diagnose_schema import DiagnoseAnswer, DiagnoseRequest, Question, SupportUsed
from service.errors import ApiError, invalid
from service.flow import Flow
from service.inputs import Reading
from service.jobs import Channel, Job, Times
from service.report import observe_request
from service.sequences import Sequence, TokenOut
from service.settings import Settings


class DiagnoseSequence(Sequence):
    """Read whole, in one step of its own; ``found`` is what was seen."""

    chunkable = False

    def __init__(self, token_ids: list[int]) -> None:
        super().__init__(0, token_ids, exact_choice())
        self.found: Diagnosis | None = None

    def want(self, start: int, tokens: int) -> Want:
        return "nothing"

    def accept(self, result: SliceResult, read: int) -> TokenOut | None:
        assert isinstance(self.state, OneStepState)
        self.found = self.state.found
        self.finished = True
        return None


def check_model(model: ServedModel) -> None:
    """ApiError where no choice applies to any layer of it, or its layers cannot be looked at."""
    if not can_diagnose(model) or not model.info.applied_layers:
        why = (
            "it has no layer in which attention can be chosen" if can_diagnose(model) else "it is no network"
        )
        raise invalid(f"Model {model.info.name!r} cannot be diagnosed: {why}; name another.", "model")


def reading_of(model: ServedModel, settings: Settings) -> Reading:
    longest = model.info.max_tokens
    if longest <= MAX_TOKENS:
        return Reading(model, settings, longest, may_truncate=False)
    why = " for a diagnosis (a head's figures settle within a few thousand tokens)"
    return Reading(model, settings, MAX_TOKENS, may_truncate=False, reserved=why)


def support_of(body: DiagnoseRequest, model: ServedModel) -> Chosen:
    """The support asked for, or the default one. ApiError where it keeps no pairs of its own."""
    chosen = choose(_support_spec(body), model)
    if load(chosen.choice.backend).capabilities.approximates:
        raise invalid(
            f"support: {chosen.choice.backend!r} approximates the pairs that it does not keep, so there is "
            "no kept mass to tell; name a backend that drops them (GET /v1/attention/backends)",
            "support",
        )
    if getattr(chosen.choice.params, "remainder", "none") != "none":
        raise invalid(
            "support.params.remainder: what is left out would count as kept, so there is no kept mass to "
            "tell; leave it at 'none'",
            "support.params.remainder",
        )
    return chosen


def _support_spec(body: DiagnoseRequest) -> Spec:
    if body.support is None:
        given: object = {"backend": "sinks", "params": {"window": body.budget}}
        return backend_alone(parse(given, path="support"), "a diagnosis")
    spec = backend_alone(parse(body.support, path="support"), "the support of a diagnosis")
    if spec.verify is not None:
        raise invalid("support.verify: a diagnosis compares with exact attention anyway", "support.verify")
    return spec


def asked_of(body: DiagnoseRequest, model: ServedModel, support: Choice) -> Asked:
    """ApiError where layers are named to which no choice applies."""
    applied = model.info.applied_layers
    layers = applied if body.layers == "all" else tuple(sorted(set(body.layers)))
    unknown = [layer for layer in layers if layer not in applied]
    if unknown:
        detail = (
            f"layers: attention cannot be chosen in layer {unknown[0]} of {model.info.name!r}; it can in "
            + ", ".join(map(str, applied))
        )
        raise invalid(detail, "layers", applied_layers=list(applied))
    return Asked(layers, support, body.budget, body.tolerance, body.rows, body.arm_tokens, body.seed)


async def run(
    flow: Flow, body: DiagnoseRequest, model: ServedModel, token_ids: list[int], chosen: Chosen
) -> DiagnoseAnswer:
    """Through the engine. ApiError where it fails."""
    asked = asked_of(body, model, chosen.choice)
    sequence = DiagnoseSequence(token_ids)
    job = _job(flow, DiagnosingModel(model, asked), sequence, body)
    _submit(flow, model, job)
    await flow.next_event(job)
    flow.note_times(job, len(token_ids))
    observe_request(flow.runtime, flow.record)
    assert sequence.found is not None
    return _answer(flow, job, model, sequence.found, body, asked, chosen)


def _job(flow: Flow, model: DiagnosingModel, sequence: DiagnoseSequence, body: DiagnoseRequest) -> Job:
    name = f"diagnose_{uuid.uuid4().hex}"
    job = Job(name, model, [sequence], Channel(), Times(flow.record.started), priority=body.priority)
    job.deadline, job.queue_deadline = flow.deadlines(body.timeout_ms)
    size = model.estimate_bytes(len(sequence.token_ids), 0, sequence.choice, 0)
    sequence.estimated_bytes = sequence.exact_bytes = size
    job.memory.estimated_bytes = job.memory.exact_bytes = size
    return job


def _submit(flow: Flow, model: ServedModel, job: Job) -> None:
    try:
        flow.submit(job, model)
    except ApiError as error:
        if error.code != "never_fits_memory":
            raise
        needed, limit = error.limits["estimated_bytes"], error.limits["memory_limit_bytes"]
        detail = (
            f"This diagnosis needs about {needed:,} bytes at once; requests may hold {limit:,} "
            "(memory_limit_bytes). Send a shorter text, ask for fewer rows, or raise the limit."
        )
        limits = {"estimated_bytes": needed, "memory_limit_bytes": limit}
        raise ApiError(error.code, detail, param="input", limits=limits) from None


def _answer(
    flow: Flow,
    job: Job,
    model: ServedModel,
    found: Diagnosis,
    body: DiagnoseRequest,
    asked: Asked,
    chosen: Chosen,
) -> DiagnoseAnswer:
    return DiagnoseAnswer(
        id=job.id,
        model=model.info.name,
        tokens=found.tokens,
        asked=_question(asked, chosen),
        rows=list(found.rows),
        regime=found.regime,
        errors=found.errors,
        recommended=found.recommended,
        reason=found.reason,
        layers=list(found.layers),
        rank_collapse=found.rank_collapse,
        usage=usage_of(flow.record),
        stats=stats_of(job, flow.record, flow.runtime.clock()) if body.include_stats else None,
    )


def _question(asked: Asked, chosen: Chosen) -> Question:
    support = SupportUsed(
        requested=chosen.requested,
        used=chosen.choice.backend,
        params=chosen.choice.params.model_dump(mode="json"),
        fallback_reason=chosen.fallback_reason,
    )
    return Question(
        layers=list(asked.layers),
        support=support,
        budget=asked.budget,
        tolerance=asked.tolerance,
        rows=asked.rows,
        arm_tokens=asked.arm_tokens,
        seed=asked.seed,
    )
