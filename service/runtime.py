"""What lives as long as the process: settings, models, engine, metrics, and the phase the server is in."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from kernels.registry import BACKENDS, load
from models.contract import Choice, ServedModel, Task
from service.engine import Engine, StepSeen
from service.errors import ApiError, invalid
from service.metrics import Metrics
from service.readers import Readers
from service.scheduler import Limits
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
        self.models: Mapping[str, ServedModel] = {}
        self.loaded_at: dict[str, int] = {}
        """model -> when it was loaded, in Unix seconds."""
        self.supported: dict[str, tuple[str, ...]] = {}
        """model -> backends that it can run with default params."""
        self.engine = Engine(_limits(settings), clock, self._observe_step)
        self.readers = Readers(num_threads=4)
        """Tokenising."""
        self.workers = ThreadPoolExecutor(max_workers=4, thread_name_prefix="longreach-worker")
        """The writing of large answers."""
        self.scraper = ThreadPoolExecutor(max_workers=1, thread_name_prefix="longreach-scraper")
        """/metrics, which must answer when everything else is busy."""
        self.metrics.memory_limit.labels(settings.device).set(settings.memory_limit)
        self.metrics.memory_reserved.labels(settings.device).set(0)

    def add_models(self, models: Mapping[str, ServedModel]) -> None:
        for name, model in models.items():
            self.loaded_at[name] = int(time.time())
            choices = (Choice(backend, load(backend).params()) for backend in BACKENDS)
            self.supported[name] = tuple(
                choice.backend for choice in choices if not model.unsupported(choice)
            )
            self.metrics.add_model(model.info, self.supported[name])
        self.models = dict(models)

    def start(self) -> None:
        self.engine.start()

    def set_phase(self, phase: Phase) -> None:
        self.phase = phase
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
            detail = "The models are still loading; GET /readyz tells when they are ready."
            raise ApiError("loading", detail, retry_after_s=LOADING_RETRY_S)
        if self.phase == "draining":
            left = (self.drain_until or self.clock()) - self.clock()
            detail = "The server is shutting down and takes no new work; try again elsewhere or later."
            raise ApiError("draining", detail, retry_after_s=max(left, 1.0))
        if self.phase == "failed" or not self.engine.healthy:
            raise ApiError("engine_unhealthy", "The engine has stopped after a failure; restart the server.")

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
        """Gauges are read from the engine when they are asked for."""
        for name in self.models:
            load_now = self.engine.load(name)
            self.metrics.queue_depth.labels(name).set(load_now.queued_requests)
            self.metrics.queue_tokens.labels(name).set(load_now.queued_tokens)
            self.metrics.running_requests.labels(name).set(load_now.running_requests)
        self.metrics.memory_reserved.labels(self.settings.device).set(self.engine.reserved_bytes)

    def _observe_step(self, seen: StepSeen) -> None:
        self.metrics.batch_requests.labels(seen.model).observe(seen.requests)
        self.metrics.batch_tokens.labels(seen.model).observe(seen.tokens)
        self.metrics.step.labels(seen.model).observe(seen.seconds)


def _limits(settings: Settings) -> Limits:
    return Limits(
        max_queue_requests=settings.max_queue_requests,
        max_queue_tokens=settings.max_queue_tokens,
        max_running=settings.max_running,
        step_tokens=settings.step_tokens,
        prefill_chunk_tokens=settings.prefill_chunk_tokens,
        memory_bytes=settings.memory_limit,
    )
