"""Probes and metrics. Liveness is not readiness: a server that loads, drains or is full is alive but not
ready."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from service.problems import documented
from service.routes.common import QUEUE_ERRORS
from service.runtime import Runtime

router = APIRouter(tags=["health"])
NOT_READY = (
    "loading",
    "draining",
    "engine_unhealthy",
    *QUEUE_ERRORS,
)


class Health(BaseModel):
    status: str


@router.get(
    "/livez",
    response_model=Health,
    responses=documented("engine_unhealthy"),
    summary="Is the process alive?",
)
async def livez(request: Request) -> Health:
    runtime: Runtime = request.app.state.runtime
    if not runtime.engine.healthy and runtime.phase != "draining":
        raise runtime.unhealthy()
    return Health(status="ok")


@router.get("/readyz", response_model=Health, responses=documented(*NOT_READY), summary="Ready?")
async def readyz(request: Request) -> Health:
    """Does it take work now? 503 while loading (with how far it has come) or draining, 429 while the queue is
    full."""
    runtime: Runtime = request.app.state.runtime
    runtime.check_open()
    return Health(status="ok")


@router.get(
    "/health",
    response_model=Health,
    responses=documented(*NOT_READY),
    summary="As /readyz",
)
async def health(request: Request) -> Health:
    return await readyz(request)


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **documented()},
)
async def metrics(request: Request) -> Response:
    runtime: Runtime = request.app.state.runtime
    accept = request.headers.get("accept", "")

    def render() -> tuple[bytes, str]:
        runtime.refresh_gauges()
        return runtime.metrics.render(accept)

    content, content_type = await asyncio.get_running_loop().run_in_executor(runtime.scraper, render)
    return Response(content, headers={"content-type": content_type})
