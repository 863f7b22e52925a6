"""The profiles that ``auto`` plans with: one per served model, from memory, from the cache, or measured now.

Measuring is a job of the engine like a long document: left for shorter work, admitted with its memory, and
begun once however many requests wait for it. It belongs to none of them and outlives those that leave."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from models.calibrate_default import Measurement, cached, keep, measurement_for
from models.calibrate_model import can_calibrate, network_model
from models.contract import ModelError, ServedModel
from models.files import default_cache_dir
from models.profile import Profile
from models.profile_stamp import stamp_of
from service.errors import ApiError
from service.logs import log_failure
from service.profile_job import run_measurement

if TYPE_CHECKING:
    from service.flow import Flow
    from service.runtime import Runtime

State = Literal["none", "measuring", "ready", "failed"]
Source = Literal["cache", "calibrated", "shipped", "measured", "put"]
log = logging.getLogger("longreach.profiles")
REFRESH_S = 0.5


@dataclass(frozen=True)
class _Ready:
    profile: Profile
    source: Source


@dataclass
class _Obtaining:
    """A profile that is looked for or measured. ``found`` is what requests wait for."""

    found: asyncio.Future[Profile]
    progress: str = "looking for its profile"
    measuring: bool = False
    task: asyncio.Task[None] | None = field(default=None, repr=False)


class Profiles:
    """On the event loop, but for ``state``, which any thread may ask."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._ready: dict[str, _Ready] = {}
        self._obtaining: dict[str, _Obtaining] = {}
        self._failures: dict[str, str] = {}

    async def of(self, flow: Flow, model: ServedModel, timeout_ms: int | None = None) -> Profile:
        """The model's profile, waited for where it must be measured first. ApiError: 400 where the model has
        none and none may be measured, 504 at the request's deadline (``timeout_ms`` as the request names it;
        measuring goes on), 499 where the client leaves, 503 where the model is unloaded meanwhile, else what
        measuring failed with."""
        name = model.info.name
        if self._runtime.models.get(name) is not model:
            raise ApiError("model_not_found", "The model was unloaded meanwhile.", param="model")
        ready = self._ready.get(name)
        if ready is not None:
            return ready.profile
        if not can_calibrate(model):
            raise _not_for(model)
        obtaining = self._begin(model)
        limits = [limit for limit in flow.deadlines(timeout_ms) if limit is not None]
        left_s = max(min(limits) - self._runtime.clock(), 0)
        try:
            return await flow._unless_gone(asyncio.shield(obtaining.found), left_s, lambda: "queued")
        except TimeoutError:
            raise _too_late(name, obtaining) from None

    async def measure(self, model: ServedModel) -> None:
        """Before the model serves: its profile is there when this returns, or the reason why not is told."""
        if not can_calibrate(model) or model.info.name in self._ready:
            return
        obtaining, progress = self._begin(model), self._runtime.progress
        progress.enter(f"measuring the profile of {model.info.name}", 0)
        while not obtaining.found.done():
            progress.phase = f"measuring the profile of {model.info.name}: {obtaining.progress}"
            await asyncio.wait([obtaining.found], timeout=REFRESH_S)

    def put(self, name: str, profile: Profile) -> None:
        """Plan with this one from now on."""
        self._failures.pop(name, None)
        self._ready[name] = _Ready(profile, "put")

    def forget(self, name: str) -> None:
        """The model has left service. The file stays."""
        self.give_up(name)
        self._ready.pop(name, None)
        self._failures.pop(name, None)

    def give_up(self, name: str) -> None:
        """The model is about to leave service: what is measured of it ends, and who waits for it is told."""
        obtaining = self._obtaining.pop(name, None)
        if obtaining is None:
            return
        detail = f"Model {name!r} was unloaded while its profile was measured; send the request to another."
        _fail(obtaining, ApiError("model_unloaded", detail, stage="queued"))
        if obtaining.task is not None:
            obtaining.task.cancel()

    def state(self, name: str) -> dict[str, object]:
        """``state``; ``progress`` in words (of a failure its reason); the ``lengths`` in tokens of a profile
        that is there, and its ``source``."""
        ready, obtaining = self._ready.get(name), self._obtaining.get(name)
        if ready is not None:
            lengths = [length.tokens for length in ready.profile.lengths]
            return _told("ready", "", lengths, ready.source)
        if obtaining is not None and obtaining.measuring:
            return _told("measuring", obtaining.progress)
        if name in self._failures:
            return _told("failed", self._failures[name])
        return _told("none")

    def _begin(self, model: ServedModel) -> _Obtaining:
        """The one that is under way, else a new one."""
        name = model.info.name
        obtaining = self._obtaining.get(name)
        if obtaining is None:
            loop = asyncio.get_running_loop()
            self._obtaining[name] = obtaining = _Obtaining(loop.create_future())
            obtaining.found.add_done_callback(_heard)
            obtaining.task = loop.create_task(self._obtain(model, obtaining))
        return obtaining

    async def _obtain(self, model: ServedModel, obtaining: _Obtaining) -> None:
        name = model.info.name
        try:
            ready = await self._look(model, obtaining)
        except asyncio.CancelledError:
            _fail(obtaining, ApiError("draining", "The server stopped while it measured a profile."))
            raise
        except Exception as error:
            self._failed(name, obtaining, error)
        else:
            if self._is_over(name, obtaining):
                self._failures.pop(name, None)
                self._ready.setdefault(name, ready)
                obtaining.found.set_result(self._ready[name].profile)

    def _failed(self, name: str, obtaining: _Obtaining, error: Exception) -> None:
        if not self._is_over(name, obtaining):
            return
        told = _failure(name, error)
        if obtaining.measuring:
            self._failures[name] = told.detail
            log.warning("%s", told.detail)
        _fail(obtaining, told)

    def _is_over(self, name: str, obtaining: _Obtaining) -> bool:
        """False where it was given up: another of that name may be under way by now, which stays."""
        if self._obtaining.get(name) is not obtaining:
            return False
        del self._obtaining[name]
        return True

    async def _look(self, model: ServedModel, obtaining: _Obtaining) -> _Ready:
        served, cache_dir = network_model(model), self._cache_dir
        offload = partial(asyncio.get_running_loop().run_in_executor, self._runtime.workers)
        stamp = await offload(stamp_of, served)
        known = await offload(cached, stamp, cache_dir, log.info, served.info.applied_layers)
        if known is not None:
            return _Ready(known, "cache")
        if self._runtime.settings.auto_profile == "never":
            raise _never(model)
        obtaining.measuring = True
        obtaining.progress = "waiting for its turn"
        memory = self._runtime.settings.memory_limit
        what = partial(measurement_for, served, stamp, memory, log.info, cache_dir=cache_dir)
        todo: Measurement = await offload(what)
        profile = await run_measurement(self._runtime, served, todo, partial(_note, obtaining))
        await offload(keep, profile, cache_dir, log.warning)
        return _Ready(profile, todo.source)

    @property
    def _cache_dir(self) -> Path:
        return self._runtime.settings.cache_dir or default_cache_dir()


def _note(obtaining: _Obtaining, what: str) -> None:
    obtaining.progress = what


def _told(
    state: State, progress: str = "", lengths: list[int] | None = None, source: Source | None = None
) -> dict[str, object]:
    return {"state": state, "progress": progress, "lengths": lengths or [], "source": source}


def _fail(obtaining: _Obtaining, error: ApiError) -> None:
    if not obtaining.found.done():
        obtaining.found.set_exception(error)


def _heard(found: asyncio.Future[Profile]) -> None:
    """An error that nobody waits for any more is no accident of the event loop's."""
    if not found.cancelled():
        found.exception()


def _failure(name: str, error: Exception) -> ApiError:
    what = f"The profile of model {name!r}, which 'auto' needs, could not be measured"
    if isinstance(error, ApiError):
        if error.code == "attention_not_supported":
            return error
        detail, retry_s = f"{what}: {error.detail}", error.retry_after_s
        return ApiError(error.code, detail, limits=error.limits, retry_after_s=retry_s, stage=error.stage)
    if isinstance(error, ModelError | ValueError):
        return ApiError("attention_not_supported", f"{what}: {error}", param="attention.backend")
    log_failure(log, f"measuring the profile of {name} failed", error)
    return ApiError("internal_error", f"{what}; the server's log holds the cause.")


def _too_late(name: str, obtaining: _Obtaining) -> ApiError:
    detail = (
        f"The request's deadline passed while the profile of model {name!r}, which 'auto' needs, was "
        f"measured ({obtaining.progress}). Measuring goes on: ask again later, raise timeout_ms, or name a "
        "backend. GET /v1/models tells how far it is."
    )
    return ApiError("deadline_exceeded", detail, stage="queued")


def _never(model: ServedModel) -> ApiError:
    name = model.info.name
    detail = (
        f"Model {name!r} has no profile, which 'auto' needs, and auto_profile is \"never\": measure one with "
        f'`longreach calibrate {name} TEXT`, let the server do it (auto_profile "first_use"), or name a '
        "backend."
    )
    return ApiError("attention_not_supported", detail, param="attention.backend")


def _not_for(model: ServedModel) -> ApiError:
    detail = f"Model {model.info.name!r} has no layer in which attention can be chosen: 'auto' has no choice."
    return ApiError("attention_not_supported", detail, param="attention.backend")
