"""Prometheus metrics in a registry of their own. All series of a model exist from the moment it is loaded.

Labels take values from closed sets only: configured model names (else ``unknown``), backends of the
registry (else ``none``), HTTP statuses of the table of errors. Params, ids and texts never become labels.
"""

from __future__ import annotations

import itertools
import platform
from collections.abc import Iterable
from functools import partial
from importlib.metadata import version
from typing import Literal, TypeVar, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics import MetricWrapperBase

from kernels.math.cache import CACHES
from kernels.registry import BACKENDS
from models.contract import CacheUse, ModelInfo, Task
from models.planned import AUTO
from service.compiled_metrics import CompiledKernels
from service.errors import KINDS
from service.measured import Cause
from service.record import OF_NO_ATTENTION, OPERATIONS

Metric = TypeVar("Metric", bound=MetricWrapperBase)

DURATION_S = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
STEP_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKENIZE_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
TOKENS = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072)
REQUESTS = (1, 2, 4, 8, 16, 32, 64, 128)
ERROR_RATIO = (0.1, 0.25, 0.5, 0.65, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 4)
RATIO = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 0.9, 1)
ESTIMATE_RATIO = (0.25, 0.5, 0.65, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 4)
ERROR = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10)
LAG_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

LENGTH_BUCKETS = (("<=512", 512), ("<=2k", 2048), ("<=8k", 8192), ("<=32k", 32_768), ("<=128k", 131_072))
LONGEST = ">128k"
REJECTIONS = (
    "queue_full",
    "token_budget",
    "cost_budget",
    "memory",
    "draining",
    "loading",
    "too_long",
    "too_large",
    "invalid",
    "auth",
)
LANES = ("short", "long")
IMPLS = ("torch", "triton")
PHASES = ("prefill", "decode")
AutoOutcome = Literal["exact", "within", "repaired", "violated"]
"""Of a request with a budget: planned exact in every layer; kept as planned; kept by repair; not kept."""
AUTO_OUTCOMES: tuple[AutoOutcome, ...] = get_args(AutoOutcome)
PROFILE_STATES = ("none", "measuring", "ready", "failed")
CAUSES: tuple[Cause, ...] = ("asked", "sampled")
CACHE_STATES = ("held", "cached", "free")
LOAD_OUTCOMES = ("loaded", "failed")
TASK_OPERATIONS: dict[Task, tuple[str, ...]] = {
    "encode": ("encode", "embeddings"),
    "generate": ("generate", "completions", "chat"),
    "score": ("score",),
}
_REASON_OF_CODE = {
    "queue_full": "queue_full",
    "token_budget_exhausted": "token_budget",
    "cost_budget_exhausted": "cost_budget",
    "never_fits_memory": "memory",
    "draining": "draining",
    "loading": "loading",
    "context_length_exceeded": "too_long",
    "body_too_large": "too_large",
    "invalid_api_key": "auth",
}


def length_bucket(tokens: int) -> str:
    return next((name for name, limit in LENGTH_BUCKETS if tokens <= limit), LONGEST)


def rejection_reason(code: str, status: int) -> str | None:
    """Why a request was turned away; None where it was not (it ran, or its client left)."""
    if code in _REASON_OF_CODE:
        return _REASON_OF_CODE[code]
    return "invalid" if 400 <= status < 500 and status != 499 else None


class Metrics:
    """Every metric of the service, one attribute each, named as in the exposition without ``longreach_``."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry(auto_describe=True)
        self._by_model: list[MetricWrapperBase] = []
        ProcessCollector(namespace="longreach", registry=self.registry)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.registry.register(CompiledKernels())
        counter, gauge, histogram = self._counter, self._gauge, self._histogram
        by_length = ("model", "operation", "attention", "length_bucket")
        by_operation = ("model", "operation")
        by_attention = ("model", "attention")
        by_phase = (*by_attention, "phase")

        self.requests = counter("requests", "Requests answered.", "model", "operation", "attention", "code")
        self.rejected = counter("requests_rejected", "Requests turned away.", "operation", "reason")
        self.cancelled = counter("requests_cancelled", "Requests whose client left.", "operation", "stage")
        self.deadline_exceeded = counter(
            "deadline_exceeded", "Requests past their deadline.", "operation", "stage"
        )
        self.request_duration = histogram(
            "request_duration_seconds", "Arrival to answer.", DURATION_S, *by_length
        )
        self.inference = histogram("inference_seconds", "First step to last.", DURATION_S, *by_length)
        self.queue = histogram("queue_seconds", "Submission to first step.", DURATION_S, *by_operation)
        self.tokenize = histogram("tokenize_seconds", "Tokenising the input.", TOKENIZE_S, *by_operation)
        self.first_token = histogram(
            "time_to_first_token_seconds", "Arrival to token.", DURATION_S, *by_attention
        )
        self.inter_token = histogram("inter_token_seconds", "Between two tokens.", STEP_S, *by_attention)
        self.input_tokens = histogram("input_tokens", "Prompt tokens of a request.", TOKENS, *by_operation)
        self.output_tokens = histogram("output_tokens", "Tokens generated.", TOKENS, *by_operation)
        self.batch_requests = histogram("batch_requests", "Requests in one step.", REQUESTS, "model")
        self.batch_tokens = histogram("batch_tokens", "Tokens in one step.", TOKENS, "model")
        self.step = histogram("step_seconds", "One engine step.", STEP_S, "model")
        self.step_prediction = histogram(
            "step_prediction_ratio", "Predicted over measured time of a step.", ESTIMATE_RATIO, "model"
        )
        self.lane_seconds = counter("lane_seconds", "Engine time of short and of long requests.", "lane")
        self.pauses = counter("long_step_pauses", "Times that a long forward was left for others.", "model")
        self.heartbeat_age = gauge("engine_heartbeat_age_seconds", "Since the engine's last sign of life.")
        self.queue_ms = gauge("queue_ms", "Predicted milliseconds of the work that waits.")
        self.queue_depth = gauge("queue_depth", "Requests waiting.", "model")
        self.queue_tokens = gauge("queue_tokens", "Prompt tokens waiting.", "model")
        self.running_requests = gauge("running_requests", "Requests running.", "model")
        self.truncated_inputs = counter("truncated_inputs", "Inputs cut on request.", "model")
        self.truncated_tokens = counter("truncated_tokens", "Tokens cut on request.", "model")
        self.density = histogram("attention_density_ratio", "Share of pairs kept.", RATIO, *by_attention)
        self.impl = counter("attention_impl", "Requests by the impl that ran.", *by_attention, "impl")
        self.fallback = counter(
            "attention_fallback", "Permitted substitutions.", "requested", "used", "reason"
        )
        self.measured_error = histogram(
            "measured_error",
            "Largest error of a layer's attention, of verified requests.",
            ERROR,
            *by_phase,
        )
        self.measured_row_bound = histogram(
            "measured_row_bound", "Error that 95 % of a verified prompt's rows stay below.", ERROR, *by_phase
        )
        self.verified_requests = counter(
            "verified_requests", "Requests whose error was measured.", "model", "attention", "cause"
        )
        self.verified_rows = counter("verified_rows", "Rows of a layer computed exactly too.", *by_phase)
        self.auto_requests = counter(
            "auto_requests", "Requests with an error budget, by what became of it.", "model", "outcome"
        )
        self.budget_violations = counter(
            "budget_violations", "Requests of which a layer's error is estimated above the budget.", "model"
        )
        self.auto_error_ratio = histogram(
            "auto_error_ratio",
            "Largest estimated error of a layer over the budget, of requests not planned exact.",
            ERROR_RATIO,
            "model",
        )
        self.auto_layers = counter("auto_layers", "Layers planned for a prompt.", "model", "backend")
        self.auto_repaired_layers = counter(
            "auto_repaired_layers", "Of these, layers that went on exactly to keep the budget.", "model"
        )
        self.profile_state = gauge(
            "profile_state", "1 for the state of the profile that auto plans with.", "model", "state"
        )
        self.memory_reserved = gauge("memory_reserved_bytes", "Bytes admitted requests may hold.", "device")
        self.memory_limit = gauge("memory_limit_bytes", "Bytes requests may hold.", "device")
        self.memory_estimate = histogram(
            "memory_estimate_ratio", "Estimated over measured peak.", ESTIMATE_RATIO, *by_attention
        )
        self.cache_bytes = gauge("kv_cache_bytes", "Cache pages by what they are kept for.", "model", "state")
        self.prefix_looked_up = counter(
            "prefix_cache_looked_up_tokens", "Prompt tokens looked up in the cache.", "model"
        )
        self.prefix_found = counter("prefix_cache_found_tokens", "Of these, tokens that were there.", "model")
        self.prefix_evicted = counter(
            "prefix_cache_evicted_pages", "Cached pages given up for others.", "model"
        )
        self.kernel_cache_bytes = gauge(
            "kernel_cache_bytes", "What kernels keep; masks in plans count twice.", "cache"
        )
        self.warm_up_progress = gauge("warm_up_progress_ratio", "Share of the warm-up that is done.")
        self.model_loads = counter("model_loads", "Models loaded, at the start or later.", "outcome")
        self.model_info = gauge("model_info", "1.", "model", "source", "architecture", "dtype", "device")
        self.build_info = gauge("build_info", "1.", "version", "torch", "transformers", "python")
        self.event_loop_lag = histogram("event_loop_lag_seconds", "How late the event loop wakes.", LAG_S)
        self.ready = gauge("ready", "1 where requests are taken.")
        self.draining = gauge("draining", "1 while shutting down.")
        self._cache_seen: dict[str, CacheUse] = {}
        self._create_common()

    def add_model(self, info: ModelInfo, backends: Iterable[str]) -> None:
        """Create every series of a model: its operations, the backends it supports, the lengths it can
        have."""
        used = list(backends)
        operations = [operation for task in info.tasks for operation in TASK_OPERATIONS[task]]
        lengths = _buckets_up_to(info.max_tokens)
        self._create_model(info.name, operations, [*used, AUTO] if info.applied_layers else used, lengths)
        self._create_auto(info.name, used)
        for operation in OF_NO_ATTENTION:
            self._create_operation(info.name, operation, [], ["none"], lengths)
        self.model_info.labels(info.name, info.source, info.architecture, info.dtype, info.device).set(1)

    def remove_model(self, name: str) -> None:
        """Forget every series of a model that is no longer served."""
        for metric in self._by_model:
            metric.remove_by_labels({"model": name})
        self._cache_seen.pop(name, None)

    def see_profile(self, name: str, now: str) -> None:
        """The state of a model's profile."""
        for state in PROFILE_STATES:
            self.profile_state.labels(name, state).set(state == now)

    def see_cache(self, name: str, use: CacheUse) -> None:
        """What a model's pages are now: bytes as they are, counts as far as they have grown."""
        before = self._cache_seen.get(name, CacheUse())
        self._cache_seen[name] = use
        for state, held in zip(CACHE_STATES, (use.held_bytes, use.cached_bytes, use.free_bytes), strict=True):
            self.cache_bytes.labels(name, state).set(held)
        for counter, now, then in (
            (self.prefix_looked_up, use.looked_up_tokens, before.looked_up_tokens),
            (self.prefix_found, use.found_tokens, before.found_tokens),
            (self.prefix_evicted, use.evicted_pages, before.evicted_pages),
        ):
            counter.labels(name).inc(max(now - then, 0))

    def render(self, accept: str) -> tuple[bytes, str]:
        """The exposition in the format that ``accept`` asks for, and its content type."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def _create_common(self) -> None:
        build = (version("longreach"), version("torch"), version("transformers"), platform.python_version())
        self.build_info.labels(*build).set(1)
        for gauge in (self.ready, self.draining, self.heartbeat_age, self.queue_ms, self.warm_up_progress):
            gauge.set(0)
        for name, kept in CACHES.items():
            self.kernel_cache_bytes.labels(name).set_function(partial(getattr, kept, "held_bytes"))
        for lane in LANES:
            self.lane_seconds.labels(lane)
        for outcome in LOAD_OUTCOMES:
            self.model_loads.labels(outcome)
        for operation in OPERATIONS.values():
            for reason in REJECTIONS:
                self.rejected.labels(operation, reason)
            for stage in ("queued", "running", "streaming"):
                self.cancelled.labels(operation, stage)
            for stage in ("queued", "running"):
                self.deadline_exceeded.labels(operation, stage)
            for code in _codes():
                self.requests.labels("unknown", operation, "none", code)
        for requested in BACKENDS:
            if requested != "exact":
                self.fallback.labels(requested, "exact", "unsupported")

    def _create_model(
        self, model: str, operations: list[str], backends: list[str], lengths: list[str]
    ) -> None:
        for operation in operations:
            self._create_operation(model, operation, backends, backends, lengths)
        for attention in backends:
            for by_attention in (self.first_token, self.inter_token, self.density, self.memory_estimate):
                by_attention.labels(model, attention)
            for impl in IMPLS:
                self.impl.labels(model, attention, impl)
            if attention != "exact":
                self._create_verified(model, attention)
        for by_model in (self.batch_requests, self.batch_tokens, self.step, self.step_prediction):
            by_model.labels(model)
        for gauge in (self.queue_depth, self.queue_tokens, self.running_requests):
            gauge.labels(model).set(0)
        for counter in (self.truncated_inputs, self.truncated_tokens, self.pauses):
            counter.labels(model)
        self.see_cache(model, CacheUse())

    def _create_auto(self, model: str, backends: list[str]) -> None:
        for outcome in AUTO_OUTCOMES:
            self.auto_requests.labels(model, outcome)
        for by_model in (self.budget_violations, self.auto_error_ratio, self.auto_repaired_layers):
            by_model.labels(model)
        for backend in backends:
            self.auto_layers.labels(model, backend)
        self.see_profile(model, "none")

    def _create_operation(
        self, model: str, operation: str, named: list[str], timed: list[str], lengths: list[str]
    ) -> None:
        for by_operation in (self.queue, self.tokenize, self.input_tokens, self.output_tokens):
            by_operation.labels(model, operation)
        for attention, code in itertools.product([*named, "none"], _codes()):
            self.requests.labels(model, operation, attention, code)
        for attention, length in itertools.product(timed, lengths):
            self.request_duration.labels(model, operation, attention, length)
            self.inference.labels(model, operation, attention, length)

    def _create_verified(self, model: str, attention: str) -> None:
        for phase in PHASES:
            for by_phase in (self.measured_error, self.measured_row_bound, self.verified_rows):
                by_phase.labels(model, attention, phase)
        for cause in CAUSES:
            self.verified_requests.labels(model, attention, cause)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return self._noted(Counter(name, text, labels, namespace="longreach", registry=self.registry), labels)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return self._noted(Gauge(name, text, labels, namespace="longreach", registry=self.registry), labels)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        metric = Histogram(name, text, labels, namespace="longreach", registry=self.registry, buckets=buckets)
        return self._noted(metric, labels)

    def _noted(self, metric: Metric, labels: tuple[str, ...]) -> Metric:
        if "model" in labels:
            self._by_model.append(metric)
        return metric


def _codes() -> list[str]:
    return ["200", *sorted({str(kind.status) for kind in KINDS.values()})]


def _buckets_up_to(max_tokens: int) -> list[str]:
    last = length_bucket(max_tokens)
    names = [name for name, _ in LENGTH_BUCKETS] + [LONGEST]
    return names[: names.index(last) + 1]
