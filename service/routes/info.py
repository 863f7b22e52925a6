"""What is served and what it can do: models, attention backends, version. And the readable API page."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import version
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import HTMLResponse, RedirectResponse, Response

from kernels.api import describe
from kernels.registry import BACKENDS, load
from models.contract import Choice, ServedModel, as_json
from service.docs_page import page
from service.problems import documented
from service.runtime import Runtime

router = APIRouter(tags=["about"])
API_VERSION = "1.0"


class AutoCard(BaseModel):
    """The model's profile, which attention ``auto`` plans with. ``none``: not measured or looked for yet."""

    state: Literal["none", "measuring", "ready", "failed"]
    progress: str = Field(description="while it is measured, how far that is; of a failure, its reason")
    lengths: list[int] = Field(description="calibrated lengths in tokens")
    source: Literal["cache", "calibrated", "shipped", "measured", "put"] | None = Field(
        description="where it comes from: found in the cache; errors of a longreach calibrate elsewhere, or "
        "shipped with the product, and times measured here; measured here; given by hand"
    )


class ModelCard(BaseModel):
    """A served model; ``limits`` are what requests to it are checked against."""

    model_config = ConfigDict(extra="allow")
    id: str
    object: str = "model"
    created: int
    """When it was loaded, in Unix seconds."""
    tasks: list[str]
    max_tokens: int
    architecture: str
    dtype: str
    limits: dict[str, int]
    backends: list[str]
    auto: AutoCard


class ModelList(BaseModel):
    object: str = "list"
    data: list[ModelCard]


class BackendCard(BaseModel):
    """An attention backend as it describes itself, and what each served model says about it."""

    model_config = ConfigDict(extra="allow")
    name: str
    summary: str
    params_schema: dict[str, Any]
    models: list[dict[str, Any]]


class BackendList(BaseModel):
    object: str = "list"
    data: list[BackendCard]


class VersionAnswer(BaseModel):
    version: str
    api: str
    torch: str
    transformers: str
    python: str
    backends: list[str]


@router.get(
    "/v1/models", response_model=ModelList, responses=documented("invalid_api_key"), summary="Served models"
)
async def models(request: Request) -> ModelList:
    runtime: Runtime = request.app.state.runtime
    return ModelList(data=[card_of(runtime, model) for model in runtime.models.values()])


@router.get(
    "/v1/models/{name:path}",
    response_model=ModelCard,
    responses=documented("invalid_api_key", "model_not_found", "loading"),
)
async def one_model(name: str, request: Request) -> ModelCard:
    """One served model."""
    runtime: Runtime = request.app.state.runtime
    if runtime.phase == "loading" and name not in runtime.models:
        runtime.check_serving()
    return card_of(runtime, runtime.model(name, None))


@router.get(
    "/v1/attention/backends",
    response_model=BackendList,
    responses=documented("invalid_api_key"),
    summary="Attention backends, their params, and which models they serve",
)
def backends(request: Request) -> BackendList:
    # Not async: the first call works out every pattern's graph conditions, and the event loop must not wait.
    runtime: Runtime = request.app.state.runtime
    return BackendList(
        data=[
            BackendCard(
                **described(name), models=[_compatibility(name, model) for model in runtime.models.values()]
            )
            for name in BACKENDS
        ]
    )


@router.get("/version", response_model=VersionAnswer, responses=documented(), summary="Versions")
async def versions() -> VersionAnswer:
    return _versions()


@router.get("/docs", include_in_schema=False)
async def docs() -> Response:
    return HTMLResponse(page())


@router.get("/", include_in_schema=False)
async def root() -> Response:
    return RedirectResponse("/docs")


def card_of(runtime: Runtime, model: ServedModel) -> ModelCard:
    settings, info = runtime.settings, model.info
    limits = {
        "max_tokens": info.max_tokens,
        "max_batch_inputs": settings.max_batch_inputs,
        "max_body_bytes": settings.max_body_bytes,
    }
    if "generate" in info.tasks:
        limits["max_new_tokens"] = min(settings.max_new_tokens, info.max_tokens - 1)
    return ModelCard(
        **as_json(info),
        created=runtime.loaded_at[info.name],
        limits=limits,
        backends=list(runtime.supported[info.name]),
        auto=AutoCard.model_validate(runtime.profiles.state(info.name)),
    )


@cache
def described(name: str) -> dict[str, Any]:
    return dict(describe(name))


def _compatibility(name: str, model: ServedModel) -> dict[str, Any]:
    reasons = model.unsupported(Choice(name, load(name).params()))
    return {"model": model.info.name, "compatible": not reasons, "reasons": list(reasons)}


@cache
def _versions() -> VersionAnswer:
    return VersionAnswer(
        version=version("longreach"),
        api=API_VERSION,
        torch=version("torch"),
        transformers=version("transformers"),
        python=platform.python_version(),
        backends=list(BACKENDS),
    )
