"""POST /v1/estimate: tokens, bytes and predicted milliseconds of a request under one attention or several.
Nothing is run."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from models.contract import ServedModel, Task
from service.answers import Attended
from service.attention import parse_list
from service.auto import resolve
from service.auto_answers import PlannedLayer, planned_alone
from service.chosen import Chosen, ChosenAuto, exact_choice
from service.cost import Basis
from service.estimate import Plan, bytes_of, cached_tokens_of, predict
from service.flow import Flow
from service.generation import attended_pair, check_new_tokens
from service.inputs import Reading, Tokens
from service.meters import effort_of
from service.problems import documented
from service.routes.common import ADMISSION_ERRORS, PROFILE_ERRORS, QUEUE_ERRORS
from service.runtime import Runtime
from service.schemas import EstimateRequest

router = APIRouter(tags=["native"])


class EstimatedAttention(BaseModel):
    """As in other answers: what was asked for, and what would run."""

    requested: str
    used: str
    params: dict[str, Any] = Field(description="what would run, with every default filled in")
    fallback_reason: str | None = None
    plan: list[PlannedLayer] | None = Field(None, description="of auto: what would run, layer by layer")
    plan_reason: str | None = Field(None, description="of auto: why the plan is as it is")
    decode: EstimatedAttention | None = Field(
        None, description="only where prefill and decode were chosen apart"
    )


class Estimate(BaseModel):
    """Milliseconds are predictions for an otherwise idle server, from operations counted and rates measured
    on this machine."""

    attention: EstimatedAttention
    estimated_bytes: int = Field(description="what admission counts, without weights and answer")
    exact_bytes: int = Field(description="the same under exact attention")
    fits: bool = Field(description="whether the memory for requests is enough for it alone")
    prefill_ms: float = Field(description="reading what the cache does not hold")
    decode_ms: float = Field(description="the new tokens after the first, should all of them be generated")
    total_ms: float
    cached_tokens: int = Field(description="prompt tokens that generate would find in the cache now")
    lane: Literal["short", "long"] = Field(
        description="long where reading the prompt is predicted to take more than short_ms"
    )
    calibrated: bool = Field(
        description="whether the rates of this attention on this model were measured: basis is measured"
    )
    basis: Basis = Field(
        description="what the milliseconds rest on. measured: this attention was timed on this model, at "
        "start (exact alone, for a quick start) or by requests since. predicted: its operations are counted, "
        "and the model's linear layers and exact attention were timed; the rate of exact, raised by half, "
        "stands in for its own. assumed: nothing was timed on this model yet"
    )


class QueueNow(BaseModel):
    waiting_requests: int
    waiting_ms: float = Field(description="predicted milliseconds of the work that waits")
    predicted_wait_ms: float = Field(
        description="until what waits now has been read, should the engine do nothing else: what was "
        "predicted, at the rate at which predictions were worked off of late"
    )


class EstimateAnswer(BaseModel):
    model: str
    tokens: int = Field(description="of the input, after any truncation")
    truncated_tokens: int
    data: list[Estimate] = Field(description="one for each attention, in the order asked")
    queue: QueueNow
    limits: dict[str, float] = Field(description="what requests are checked against")


@router.post(
    "/v1/estimate",
    response_model=EstimateAnswer,
    responses=documented(
        *ADMISSION_ERRORS,
        *QUEUE_ERRORS,
        "invalid_attention_params",
        "attention_not_supported",
        "context_length_exceeded",
        "empty_input",
        "deadline_exceeded",
        *PROFILE_ERRORS,
    ),
    summary="What a request would take",
)
async def estimate(body: EstimateRequest, request: Request) -> Response:
    flow = Flow(request)
    runtime, new_tokens = flow.runtime, body.max_new_tokens
    task: Task | None = "generate" if new_tokens else None
    model = flow.begin(body.model, task)
    if new_tokens:
        check_new_tokens(new_tokens, runtime.settings.max_new_tokens, model, "max_new_tokens")
    asked = [attended_pair(pair, model, decodes=bool(new_tokens)) for pair in parse_list(body.attention)]
    room = model.info.max_tokens - new_tokens
    reading = Reading(model, runtime.settings, room, body.truncate)
    prompt = await flow.tokenise(lambda: reading.read(body.input, "input"), body.timeout_ms)
    lengths = [len(prompt.token_ids)]
    asked = [await resolve(flow, model, each, lengths, body.timeout_ms) for each in asked]

    def work_out() -> list[Estimate]:
        return [estimated(runtime, model, prompt, attended, body) for attended in asked]

    data = await flow.offload(work_out)
    answer = EstimateAnswer(
        model=model.info.name,
        tokens=len(prompt.token_ids),
        truncated_tokens=prompt.truncated_tokens,
        data=data,
        queue=queue_of(runtime),
        limits=limits_of(runtime),
    )
    return await flow.respond(lambda: answer)


def estimated(
    runtime: Runtime, model: ServedModel, prompt: Tokens, attended: Attended, body: EstimateRequest
) -> Estimate:
    chunk_tokens = runtime.settings.prefill_chunk_tokens

    def plan(prefill: Chosen, decode: Chosen) -> Plan:
        tokens = len(prompt.token_ids)
        effort = effort_of(model, prefill, decode, tokens)
        return Plan(prefill.choice, decode.choice, tokens, body.max_new_tokens, chunk_tokens, effort)

    asked = plan(attended.prefill.of(0), attended.decode)
    exact = Chosen("exact", exact_choice())
    cached = cached_tokens_of(model, prompt.token_ids, asked.prefill, body.cache_salt or "")
    found = predict(model, runtime.costs, asked, cached)
    num_bytes = bytes_of(model, asked)
    return Estimate(
        attention=_told(attended),
        estimated_bytes=num_bytes,
        exact_bytes=bytes_of(model, plan(exact, exact)),
        fits=num_bytes <= runtime.settings.memory_limit,
        prefill_ms=round(found.prefill_ms, 3),
        decode_ms=round(found.decode_ms, 3),
        total_ms=round(found.prefill_ms + found.decode_ms, 3),
        cached_tokens=cached,
        lane="long" if found.prompt_ms > runtime.settings.short_ms else "short",
        calibrated=found.basis == "measured",
        basis=found.basis,
    )


def queue_of(runtime: Runtime) -> QueueNow:
    waiting = sum(runtime.engine.load(name).queued_requests for name in runtime.models)
    return QueueNow(
        waiting_requests=waiting,
        waiting_ms=round(runtime.engine.waiting_ms(), 3),
        predicted_wait_ms=round(runtime.wait_s() * 1e3, 3),
    )


def limits_of(runtime: Runtime) -> dict[str, float]:
    settings = runtime.settings
    return {
        "memory_limit_bytes": settings.memory_limit,
        "max_queue_requests": settings.max_queue_requests,
        "max_queue_tokens": settings.max_queue_tokens,
        "max_queue_ms": settings.max_queue_seconds * 1e3,
        "short_ms": settings.short_ms,
    }


def _told(attended: Attended) -> EstimatedAttention:
    told = _one(attended.prefill)
    return told.model_copy(update={"decode": _one(attended.decode)}) if attended.split else told


def _one(chosen: Chosen | ChosenAuto) -> EstimatedAttention:
    told = EstimatedAttention(
        requested=chosen.requested,
        used=chosen.used,
        params=chosen.params,
        fallback_reason=chosen.fallback_reason,
    )
    if not isinstance(chosen, ChosenAuto):
        return told
    planned = planned_alone(chosen)
    return told.model_copy(update={name: planned[name] for name in ("plan", "plan_reason")})
