"""POST /v1/diagnose: what a model's attention looks like on one text, layer by layer and head by head."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.diagnose import asked_of, check_model, reading_of, run, support_of
from service.diagnose_schema import DiagnoseAnswer, DiagnoseRequest
from service.flow import LARGE_ANSWER_VALUES, Flow
from service.problems import documented
from service.routes.common import RUN_ERRORS

router = APIRouter(tags=["native"])


@router.post(
    "/v1/diagnose",
    response_model=DiagnoseAnswer,
    responses=documented(*RUN_ERRORS),
    summary="Look at a model's attention",
)
async def diagnose(body: DiagnoseRequest, request: Request) -> Response:
    flow = Flow(request)
    model = flow.begin(body.model, None)
    check_model(model)
    chosen = support_of(body, model)
    asked_of(body, model, chosen.choice)  # what it would refuse, before anything is tokenised
    reading = reading_of(model, flow.runtime.settings)
    tokens = await flow.tokenise(lambda: reading.read(body.input, "input"), body.timeout_ms)
    answer = await run(flow, body, model, tokens.token_ids, chosen)
    return await flow.respond(
        lambda: answer,
        values=LARGE_ANSWER_VALUES + 1,
        exclude=None if body.include_stats else {"stats"},
    )
