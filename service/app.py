"""The application: routes, error handling and the gate around one ``Runtime``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from models.contract import ServedModel
from service import problems, watchdog
from service.fleet import Load
from service.gate import Gate
from service.idle import Idle
from service.loading import load_models
from service.routes import (
    admin,
    compare,
    diagnose,
    encode,
    estimate,
    generate,
    health,
    info,
    openai_embeddings,
    openai_text,
    score,
)
from service.runtime import Runtime
from service.settings import Settings, resolved

LAG_PROBE_S = 0.5
LOOKS_PER_WATCHDOG = 8
ROUTERS = (encode, generate, score, compare, diagnose, estimate, openai_embeddings, openai_text, info, health)

Start = Callable[[Runtime], Awaitable[None]]


def create_app(
    settings: Settings,
    models: Mapping[str, ServedModel] | None = None,
    *,
    clock: Callable[[], float] = time.monotonic,
    start: Start | None = None,
    load: Load = load_models,
) -> FastAPI:
    """The service over ``models``, ready at once; or over what ``start`` loads while the port is already
    open. ``load`` loads further ones where the settings allow it. ConfigError where the settings' device is
    not there."""
    settings = resolved(settings)
    runtime = Runtime(settings, clock)
    app = FastAPI(
        title="Longreach",
        summary="Inference for long documents: every request chooses its own attention.",
        version=version("longreach"),
        lifespan=_lifespan(runtime, models, start),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.runtime, app.state.load = runtime, load
    app.state.comparing = asyncio.Semaphore(1)
    for module in (*ROUTERS, *((admin,) if settings.admin else ())):
        app.include_router(module.router)
    problems.install(app)
    app.add_middleware(Gate, runtime=runtime)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    _document_problems(app)
    return app


def _lifespan(runtime: Runtime, models: Mapping[str, ServedModel] | None, start: Start | None) -> Any:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        runtime.start()
        look_s = runtime.settings.watchdog_s / LOOKS_PER_WATCHDOG
        tasks = [asyncio.create_task(_probe_lag(runtime))]
        tasks.append(asyncio.create_task(watchdog.watch(runtime.engine, look_s)))
        tasks.append(asyncio.create_task(Idle(runtime).watch()))
        if models is not None:
            runtime.add_models(models)
            runtime.set_phase("ready")
        if start is not None:
            tasks.append(asyncio.ensure_future(start(runtime)))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            runtime.set_phase("draining")
            await asyncio.to_thread(runtime.close)

    return lifespan


async def _probe_lag(runtime: Runtime) -> None:
    """How late a sleep ends is how long something held the event loop."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + LAG_PROBE_S
        await asyncio.sleep(LAG_PROBE_S)
        runtime.metrics.event_loop_lag.observe(max(loop.time() - due, 0.0))


def _document_problems(app: FastAPI) -> None:
    """Error responses refer to ``Problem`` by name: put it among the components."""
    generate_openapi = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate_openapi()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        problem = problems.Problem.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(problem.pop("$defs", {}))
        schemas["Problem"] = problem
        return document

    app.openapi = openapi  # type: ignore[method-assign]
