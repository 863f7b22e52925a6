"""POST /v1/compare: one document under several attentions, side by side."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.compare import Comparison, obtain_profile, question_of
from service.compare_schema import CompareAnswer, CompareRequest
from service.errors import ApiError
from service.flow import Flow
from service.inputs import Reading
from service.problems import documented
from service.routes.common import RUN_ERRORS
from service.routes.encode import count_truncation

router = APIRouter(tags=["native"])

RETRY_AFTER_S = 10.0


@router.post(
    "/v1/compare",
    response_model=CompareAnswer,
    responses=documented(*RUN_ERRORS),
    summary="Compare attentions on a document",
)
async def compare(body: CompareRequest, request: Request) -> Response:
    flow = Flow(request)
    model = flow.begin(body.model, None)
    question = question_of(body, model)
    reading = Reading(model, flow.runtime.settings, model.info.max_tokens, body.truncate)
    turn_of(request)  # refused at once where another runs
    await obtain_profile(flow, model, question)
    async with turn_of(request):
        tokens = await flow.tokenise(lambda: reading.read(body.input, "input"), body.timeout_ms)
        count_truncation(flow, [tokens])
        comparison = Comparison(flow, model, tokens.token_ids, question)
        reference = await comparison.reference()
        results = [await comparison.under(spec, reference) for spec in question.specs]
    usage, stats = comparison.finish()
    answer = CompareAnswer(
        id=comparison.id,
        model=model.info.name,
        tokens=len(tokens.token_ids),
        truncated_tokens=tokens.truncated_tokens,
        reference=reference,
        results=results,
        usage=usage,
        stats=stats,
    )
    return await flow.respond(lambda: answer)


def turn_of(request: Request) -> asyncio.Semaphore:
    """One comparison runs at a time: each keeps exact's outputs to the end, and two would time each other.
    ApiError 429 where one runs."""
    turn: asyncio.Semaphore = request.app.state.comparing
    if turn.locked():
        detail = "Another comparison is running; one runs at a time. Come back after Retry-After."
        raise ApiError("queue_full", detail, retry_after_s=RETRY_AFTER_S)
    return turn
