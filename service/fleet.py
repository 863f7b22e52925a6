"""Models that come and go while the server serves. One change at a time; both ends run on the event loop, so
a request sees a model or does not."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from kernels.peak import give_back_free_memory
from models.contract import ModelError, ServedModel
from service.errors import ApiError, invalid
from service.loading import in_daemon_thread, measure_profile, warm_up
from service.logs import log_failure
from service.runtime import Runtime
from service.schedule import served_name
from service.settings import MODEL_NAME, Settings
from service.validation import shown_name

log = logging.getLogger("longreach.admin")
Load = Callable[[Settings], dict[str, ServedModel]]
POLL_S = 0.02


async def load_one(runtime: Runtime, name: str, source: str, load: Load) -> ServedModel:
    """Load a model, warm it up, serve it. ApiError where that cannot be; then nothing of it is left."""
    if not MODEL_NAME.fullmatch(name):
        raise invalid("name may have letters, digits and ._@:/- and begins with a letter or digit", "name")
    async with _change(runtime):
        if name in runtime.models:
            detail = f"A model {shown_name(name)} is served; unload it first, or choose another name."
            raise ApiError("model_exists", detail, param="name")
        try:
            model = await _loaded(runtime, name, source, load)
        except Exception as error:
            runtime.metrics.model_loads.labels("failed").inc()
            raise _refusal(error) from None
        runtime.add_models({name: model})
        return model


async def _loaded(runtime: Runtime, name: str, source: str, load: Load) -> ServedModel:
    settings = runtime.settings.model_copy(update={"models": (f"{name}={source}",)})
    [model] = (await in_daemon_thread(lambda: load(settings))).values()
    try:
        await warm_up(runtime, model)
        await measure_profile(runtime, model)
        runtime.check_serving()  # it may have been told to stop meanwhile
    except Exception:
        await _drained(runtime, model)
        _forget(runtime, name)
        raise
    return model


async def unload_one(runtime: Runtime, name: str) -> None:
    """Serve the model no more: new requests do not find it, running ones have ``drain_seconds`` to end. Its
    memory is free when this returns. It runs to its end even where who asked for it leaves. ApiError where
    the engine has stalled in a step of it: then it is served again, and can be unloaded once that is over."""
    async with _change(runtime):
        model = runtime.remove_model(name)
        try:
            await _drained(runtime, model)
        except ApiError:
            runtime.put_back(model)
            raise
        _forget(runtime, name)
        await asyncio.to_thread(_give_back)


async def _drained(runtime: Runtime, model: ServedModel) -> None:
    """Wait for its requests, fail those that take too long, close it. A model whose step never ends is left
    to the watchdog: it cannot be closed under the engine's feet."""
    name = model.info.name
    deadline = runtime.clock() + runtime.settings.drain_seconds
    while runtime.engine.has_work(name) and runtime.clock() < deadline:
        await asyncio.sleep(POLL_S)
    detail = f"Model {name!r} was unloaded before this request was done; send it to another model."
    for job in list(runtime.jobs):
        if served_name(job.model.info.name) == name and not job.ended:
            job.channel.put([ApiError("model_unloaded", detail, stage=job.stage)])
            runtime.engine.cancel(job)
    while runtime.engine.has_work(name):
        if not runtime.engine.healthy:
            raise runtime.unhealthy()
        await asyncio.sleep(POLL_S)
    model.close()


@asynccontextmanager
async def _change(runtime: Runtime) -> AsyncIterator[None]:
    if runtime.changing.locked():
        detail = "Another model is being loaded or unloaded; try again when that is done."
        raise ApiError("model_changing", detail)
    async with runtime.changing:
        yield


def _forget(runtime: Runtime, name: str) -> None:
    runtime.engine.remove_model(name)
    runtime.forget_model(name)


def _refusal(error: Exception) -> ApiError:
    if isinstance(error, ApiError) and error.code == "internal_error":
        detail = "The model was loaded and failed on its first inputs; the server's log says where."
        return ApiError("model_refused", detail, param="source")
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ModelError):
        return ApiError("model_refused", f"The model cannot be served: {error}", param="source")
    log_failure(log, "loading a model failed", error)
    detail = f"Loading the model failed ({type(error).__name__}); the server's log says where."
    return ApiError("model_refused", detail, param="source")


def _give_back() -> None:
    """Free what nobody refers to any more, and hand it to the system."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    give_back_free_memory()
