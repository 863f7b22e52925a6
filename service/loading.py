"""Loading the models while the port is already open, and warming each up before the server is ready."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import Callable
from typing import TypeVar, cast

from kernels.compiled import compiled
from models.contract import ModelError, ServedModel
from service.errors import ApiError
from service.logs import log_failure
from service.runtime import Runtime
from service.settings import Settings, parse_model
from service.warm_up import run_probes

T = TypeVar("T")
_log = logging.getLogger("longreach.loading")


def say(line: str) -> None:
    """A line for the person who started the server."""
    print(line, file=sys.stderr, flush=True)


def load_models(settings: Settings, progress: Callable[[str], None] = say) -> dict[str, ServedModel]:
    """Every model that the settings name, else those of the profile. ModelError says which failed and why."""
    from models.catalogue import PROFILES
    from models.files import default_cache_dir
    from models.loader import load_model

    if settings.threads is not None:
        import torch

        torch.set_num_threads(settings.threads)
    named = [parse_model(item) for item in settings.models or PROFILES[settings.profile]]
    return {
        name: load_model(
            name,
            source,
            device=settings.device,
            dtype=settings.dtype,
            cache_dir=settings.cache_dir or default_cache_dir(),
            fetch_source=settings.source,
            progress=progress,
        )
        for name, source in named
    }


async def start(runtime: Runtime, load: Callable[[Settings], dict[str, ServedModel]] = load_models) -> None:
    """Load, warm up, be ready; or note in the runtime why not, for the server to say and stop."""
    try:
        models = await in_daemon_thread(lambda: load(runtime.settings))
        runtime.add_models(models)
        for model in models.values():
            await warm_up(runtime, model)
            await measure_profile(runtime, model)
    except (ModelError, ApiError) as error:
        _fail(runtime, str(error))
    except Exception as error:
        log_failure(_log, "loading the models failed", error)
        _fail(runtime, f"loading the models failed: {type(error).__name__}: {error}")
    if runtime.phase == "loading":
        runtime.set_phase("ready")
        say(f"ready: {', '.join(runtime.models)}")


def _fail(runtime: Runtime, why: str) -> None:
    """A server that is told to stop while it loads has not failed."""
    if runtime.phase == "loading":
        runtime.failure = why
        runtime.set_phase("failed")


async def compile_kernels(runtime: Runtime, model: ServedModel) -> None:
    """What the model's attention compiles on a GPU, before requests wait for it. What was compiled before
    comes from Triton's cache on disk."""
    jobs = model.warm_ups()
    if not jobs:
        return
    started, before = runtime.clock(), compiled()
    for number, job in enumerate(jobs):
        runtime.progress.enter(f"compiling kernels of {model.info.name}: {job.name}", len(jobs))
        runtime.progress.done = number
        await in_daemon_thread(job.run)
    now, seconds = compiled(), runtime.clock() - started
    new, found = now.compiled - before.compiled, now.cached - before.cached
    say(f"{model.info.name}: {new} kernels compiled and {found} found on disk in {seconds:.1f} s")


async def warm_up(runtime: Runtime, model: ServedModel) -> None:
    """Kernels compiled, and a few inputs through the engine: first use is paid for, the cost model learns."""
    await compile_kernels(runtime, model)
    started = runtime.clock()
    num_probes = await run_probes(runtime, model)
    seconds = runtime.clock() - started
    say(f"{model.info.name}: warmed up with {num_probes} inputs in {seconds:.1f} s")


async def measure_profile(runtime: Runtime, model: ServedModel) -> None:
    """Where profiles are measured before requests come. One that cannot be is no reason not to serve."""
    if runtime.settings.auto_profile != "startup":
        return
    started = runtime.clock()
    await runtime.profiles.measure(model)
    told = runtime.profiles.state(model.info.name)
    seconds = runtime.clock() - started
    if told["state"] == "ready":
        say(f"{model.info.name}: has a profile ({told['source']}, {seconds:.1f} s)")
    elif told["state"] == "failed":
        say(f"{model.info.name}: has no profile: {told['progress']}")


async def in_daemon_thread(work: Callable[[], T]) -> T:
    """As ``asyncio.to_thread``, in a thread that does not keep a stopping process alive."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(cast(T, result))

    def run() -> None:
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, name="longreach-loader", daemon=True).start()
    return await future
