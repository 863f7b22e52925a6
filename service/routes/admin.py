"""Load and unload models while serving. These routes are there only where the setting ``admin`` is on."""

from __future__ import annotations

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from service.fleet import Load, load_one, unload_one
from service.problems import documented
from service.routes.common import ADMISSION_ERRORS
from service.routes.info import ModelCard, card_of
from service.runtime import Runtime
from service.schemas import LoadRequest

router = APIRouter(tags=["admin"])
UNAVAILABLE = ("invalid_api_key", "loading", "draining", "engine_unhealthy")


class Unloaded(BaseModel):
    """As OpenAI's API tells of a deleted model."""

    id: str
    object: str = "model"
    deleted: bool = True


@router.post(
    "/v1/admin/models",
    response_model=ModelCard,
    status_code=201,
    responses=documented(*ADMISSION_ERRORS, "model_exists", "model_changing", "model_refused"),
    summary="Load a model",
)
async def load_model(body: LoadRequest, request: Request) -> Response:
    """Answers when the model is ready. A load whose client leaves goes on."""
    runtime: Runtime = request.app.state.runtime
    runtime.check_serving()
    load: Load = request.app.state.load
    model = await load_one(runtime, body.name, body.source, load)
    return Response(card_of(runtime, model).model_dump_json(), status_code=201, media_type="application/json")


@router.delete(
    "/v1/admin/models/{name:path}",
    response_model=Unloaded,
    responses=documented(*UNAVAILABLE, "model_not_found", "model_changing"),
    summary="Unload a model",
)
async def unload_model(name: str, request: Request) -> Unloaded:
    """New requests do not find the model from now on; running ones have ``drain_seconds`` to end, then they
    fail with ``model_unloaded``. Answers when the memory is free."""
    runtime: Runtime = request.app.state.runtime
    runtime.check_serving()
    runtime.model(name, None)
    await unload_one(runtime, name)
    return Unloaded(id=name)
