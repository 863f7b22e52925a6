"""What lives as long as the process: settings, models, engine, metrics, and the phase the server is in."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Literal
from weakref import WeakSet

from kernels.registry import BACKENDS, load
from models.contract import Choice, ServedModel, Task
from service.cost import CostModel
from service.drain_rate import DrainRate
from service.engine import Engine
from service.errors import ApiError, invalid
from service.jobs import Job
from service.meters import Sampling
from service.metrics import Metrics
from service.profiles import Profiles
from service.progress import Progress
from service.readers import Readers
from service.schedule import Limits
from service.seen import StepSeen, TimeSeen
from service.settings import Settings
from service.validation import shown_name

Phase = Literal["loading", "ready", "draining", "failed"]
LOADING_RETRY_S = 2.0


class Runtime:
    """Shared by all requests; nothing in it changes by what a request says."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self.settings = settings
        self.clock = clock
        self.metrics = Metrics()
        self.phase: Phase = "loading"
        self.drain_until: float | None = None
        self.failure: str | None = None
        """Why the server cannot serve, once it is known that it cannot."""
        self.in_flight = 0
        """Requests that work is being done for; a draining server waits for them."""
        self.last_step_s: float | None = None
        """When the last engine step ended, on ``clock``."""
        self.progress = Progress()
        """How far loading has come."""
        self.changing = asyncio.Lock()
        """Held while a model is loaded or unloaded."""
        self.jobs: WeakSet[Job] = WeakSet()
        """Requests that were submitted and are remembered by somebody: the engine, or who waits for them."""
        self.drain = DrainRate()
        self.models: Mapping[str, ServedModel] = {}
        """Replaced, never changed: whoever holds it may go on with it."""
        self.loaded_at: dict[str, int] = {}
        """model -> when it was loaded, in Unix seconds."""
        self.supported: dict[str, tuple[str, ...]] = {}
        """model -> backends that it can run with default params."""
        self.costs = CostModel()
        self.engine = Engine(
            _limits(settings), clock, self._observe_step, self.costs, settings.watchdog_s, self._observe_time
        )
        self.sampling = Sampling(settings.verify_fraction)
        """Which requests are measured though they do not ask."""
        self.profiles = Profiles(self)
        """What ``auto`` plans with."""
        self.readers = Readers(num_threads=4)
        """Tokenising."""
        self.workers = ThreadPoolExecutor(max_workers=4, thread_name_prefix="longreach-worker")
        """The writing of large answers."""
        self.scraper = ThreadPoolExecutor(max_workers=1, thread_name_prefix="longreach-scraper")
        """/metrics, which must answer when everything else is busy."""
        self._series = threading.Lock()
        """Held where series of models come and go, so that a scrape revives none."""
        self.metrics.memory_limit.labels(settings.device).set(settings.memory_limit)
        self.metrics.memory_reserved.labels(settings.device).set(0)

    def add_models(self, models: Mapping[str, ServedModel]) -> None:
        """Serve these too."""
        for name, model in models.items():
            self.loaded_at[name] = int(time.time())
            choices = (Choice(backend, load(backend).params()) for backend in BACKENDS)
            self.supported[name] = tuple(
                choice.backend for choice in choices if not model.unsupported(choice)
            )
            self.metrics.add_model(model.info, self.supported[name])
            self.metrics.model_loads.labels("loaded").inc()
        self.models = {**self.models, **models}
        self._share_cache()

    def remove_model(self, name: str) -> ServedModel:
        """No request finds the model any more; those that run go on. Its series end with ``forget_model``."""
        model = self.models[name]
        self.models = {other: served for other, served in self.models.items() if other != name}
        self.profiles.give_up(name)
        self._share_cache()
        return model

    def put_back(self, model: ServedModel) -> None:
        """Serve a model again that was removed and not forgotten."""
        self.models = {**self.models, model.info.name: model}
        self._share_cache()

    def forget_model(self, name: str) -> None:
        """What is left of a model that was removed and has no requests any more."""
        with self._series:
            self.metrics.remove_model(name)
        self.costs.remove_model(name)
        self.profiles.forget(name)
        for told in (self.loaded_at, self.supported):
            told.pop(name, None)

    def _share_cache(self) -> None:
        """The same room for cached prefixes to every model that has prefixes."""
        causal = [model for model in self.models.values() if model.info.causal]
        for model in causal:
            model.limit_cached(self.settings.prefix_cache // len(causal))

    def start(self) -> None:
        self.engine.start()

    def set_phase(self, phase: Phase) -> None:
        self.phase = phase
        if phase == "failed":
            self.metrics.model_loads.labels("failed").inc()
        self.metrics.ready.set(phase == "ready")
        self.metrics.draining.set(phase == "draining")

    def begin_drain(self) -> None:
        """Take no new work; what is in flight may finish."""
        self.drain_until = self.clock() + self.settings.drain_seconds
        self.set_phase("draining")

    def close(self) -> bool:
        """Stop engine and workers. True where the engine thread has ended."""
        self.set_phase("draining")
        for pool in (self.workers, self.scraper):
            pool.shutdown(wait=False, cancel_futures=True)
        self.readers.shutdown()
        return self.engine.stop()

    def check_serving(self) -> None:
        """503 while loading, draining or broken."""
        if self.phase == "loading":
            raise self._loading()
        if self.phase == "draining":
            left = (self.drain_until or self.clock()) - self.clock()
            detail = "The server is shutting down and takes no new work; try again elsewhere or later."
            raise ApiError("draining", detail, retry_after_s=max(left, 1.0))
        if self.phase == "failed" or not self.engine.healthy:
            raise self.unhealthy()

    def unhealthy(self) -> ApiError:
        """What is wrong with the engine."""
        if not self.engine.given_up:
            return ApiError("engine_unhealthy", "The engine has stopped after a failure; restart the server.")
        silent_s, limit_s = self.engine.heartbeat_age(), self.settings.watchdog_s
        detail = (
            f"The engine has given no sign of life for {silent_s:.0f} s (watchdog_s is {limit_s:g}): one "
            "operation of a model hangs or takes that long. Come back later, or restart the server."
        )
        return ApiError("engine_unhealthy", detail, limits={"watchdog_s": limit_s})

    def _loading(self) -> ApiError:
        done, total = self.progress.done, self.progress.total
        far = f" ({done} of {total})" if total else ""
        detail = f"Not ready yet: {self.progress.phase}{far}. GET /readyz tells when requests are taken."
        return ApiError(
            "loading", detail, limits={"done": done, "total": total}, retry_after_s=LOADING_RETRY_S
        )

    def check_open(self) -> None:
        """As ``check_serving``, and 429 where the queue is full already. A request that is tokenised waits
        too."""
        self.check_serving()
        self.engine.check_room(1 + self.readers.num_reading)

    def model(self, name: str | None, task: Task | None) -> ServedModel:
        """The model of that name; without a name the only one that can do ``task``, or for ``encode`` the
        only encoder (a causal model can embed too, but is not made for it)."""
        able = [key for key, model in self.models.items() if task is None or task in model.info.tasks]
        if name is None:
            encoders = [key for key in able if not self.models[key].info.causal]
            if len(able) == 1 or (task == "encode" and len(encoders) == 1):
                return self.models[able[0] if len(able) == 1 else encoders[0]]
            raise invalid(
                f"'model' is required here; one of: {', '.join(able) or 'none can do this'}", "model"
            )
        if name not in self.models:
            known = ", ".join(self.models)
            detail = f"There is no model {shown_name(name)}; served: {known}."
            raise ApiError("model_not_found", detail, param="model", limits={"known": list(self.models)})
        if task is not None and task not in self.models[name].info.tasks:
            can = ", ".join(self.models[name].info.tasks)
            others = ", ".join(able) or "none"
            raise invalid(f"Model {name!r} cannot {task} (it can {can}); models that can: {others}.", "model")
        return self.models[name]

    def refresh_gauges(self) -> None:
        """Gauges are read from engine and models when they are asked for."""
        metrics = self.metrics
        with self._series:
            for name, model in self.models.items():
                load_now = self.engine.load(name)
                metrics.queue_depth.labels(name).set(load_now.queued_requests)
                metrics.queue_tokens.labels(name).set(load_now.queued_tokens)
                metrics.running_requests.labels(name).set(load_now.running_requests)
                metrics.see_cache(name, model.cache_use())
                metrics.see_profile(name, str(self.profiles.state(name)["state"]))
        metrics.memory_reserved.labels(self.settings.device).set(self.engine.reserved_bytes)
        metrics.queue_ms.set(self.engine.waiting_ms())
        metrics.heartbeat_age.set(self.engine.heartbeat_age())
        metrics.warm_up_progress.set(self.progress.ratio)

    def _observe_step(self, seen: StepSeen) -> None:
        self.last_step_s = self.clock()
        self.metrics.batch_requests.labels(seen.model).observe(seen.requests)
        self.metrics.batch_tokens.labels(seen.model).observe(seen.tokens)
        self.metrics.step.labels(seen.model).observe(seen.seconds)
        if seen.predicted_ms > 0 and seen.seconds > 0:
            ratio = seen.predicted_ms / 1e3 / seen.seconds
            self.metrics.step_prediction.labels(seen.model).observe(ratio)
            self.drain.observe(seen.predicted_ms, seen.seconds)

    def _observe_time(self, seen: TimeSeen) -> None:
        for lane, seconds in seen.seconds.items():
            self.metrics.lane_seconds.labels(lane).inc(seconds)
        self.metrics.pauses.labels(seen.model).inc(seen.left)

    def wait_s(self) -> float:
        """Until what waits now is read, should the engine do nothing else: what was predicted, at the rate at
        which predictions were worked off of late."""
        rate = self.drain.ms_per_s or 1e3
        return self.engine.waiting_ms() / rate


def _limits(settings: Settings) -> Limits:
    return Limits(
        max_queue_requests=settings.max_queue_requests,
        max_queue_tokens=settings.max_queue_tokens,
        max_queue_ms=settings.max_queue_seconds * 1e3,
        max_running=settings.max_running,
        step_tokens=settings.step_tokens,
        step_ms=settings.step_ms,
        prefill_chunk_tokens=settings.prefill_chunk_tokens,
        short_ms=settings.short_ms,
        short_weight=settings.short_weight,
        memory_bytes=settings.memory_limit,
    )
