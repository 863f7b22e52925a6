"""What one finished request leaves behind: its counters and one line in the access log."""

from __future__ import annotations

import logging
from collections import Counter

from service.auto_answers import Budget, budget_of
from service.chosen import ChosenAuto
from service.error_answers import finite, largest_estimate
from service.errors import KINDS
from service.jobs import Job, leads
from service.metrics import AutoOutcome, length_bucket, rejection_reason
from service.record import OF_NO_ATTENTION, Record
from service.runtime import Runtime

log = logging.getLogger("longreach.access")

MAX_ERROR_RATIO = 100.0
"""What is above counts as this: one request with next to no budget must not drown the sum of all others."""
_PROBES = frozenset({"/livez", "/readyz", "/health", "/metrics"})


def report(runtime: Runtime, record: Record, now: float) -> None:
    """Called once per request, whatever became of it."""
    if record.disconnected and record.error_code is None and record.status != 200:
        record.error_code = "client_closed_request"
    if record.model not in runtime.models:
        record.model = "unknown"  # unloaded meanwhile: its series must not come back
    status = _outcome(record)
    _count(runtime, record, status, now)
    fields = {
        "request_id": record.request_id,
        "method": record.method,
        "path": record.path[:200],
        "status": status,
        "duration_ms": round((now - record.started) * 1e3, 1),
    }
    if record.operation is not None:
        fields |= {"model": record.model, "attention": record.told_attention}
        fields |= {"input_tokens": record.input_tokens, "output_tokens": record.output_tokens}
    if record.measured_error is not None and record.told_attention != "none":
        fields["measured_error"] = round(record.measured_error, 6)
    if record.error_code is not None:
        fields["error"] = record.error_code
    log.log(logging.DEBUG if record.path in _PROBES else logging.INFO, "request", extra={"fields": fields})


def _outcome(record: Record) -> int:
    """The status that counts: what was sent, or what went wrong after a stream had begun with 200."""
    if record.error_code is not None and (record.streaming or record.disconnected or not record.status):
        return KINDS[record.error_code].status
    return record.status or 500


def _count(runtime: Runtime, record: Record, status: int, now: float) -> None:
    operation, metrics = record.operation, runtime.metrics
    if operation is None:
        return
    metrics.requests.labels(record.model, operation, record.told_attention, str(status)).inc()
    if record.error_code is not None:
        _count_error(runtime, record, operation, record.error_code, status)
    if record.computed:
        tokens = record.input_tokens if record.length_tokens is None else record.length_tokens
        labels = (record.model, operation, record.told_attention, length_bucket(tokens))
        metrics.request_duration.labels(*labels).observe(now - record.started)
        metrics.inference.labels(*labels).observe(record.inference_s)


def _count_error(runtime: Runtime, record: Record, operation: str, code: str, status: int) -> None:
    metrics = runtime.metrics
    if code == "client_closed_request":
        stage = "streaming" if record.streaming else record.error_stage or "queued"
        metrics.cancelled.labels(operation, stage).inc()
    elif code == "deadline_exceeded":
        metrics.deadline_exceeded.labels(operation, record.error_stage or "queued").inc()
    elif (reason := rejection_reason(code, status)) is not None:
        metrics.rejected.labels(operation, reason).inc()


def observe_request(runtime: Runtime, record: Record) -> None:
    """What there is once of a request that ran to its end, however many jobs it was."""
    metrics, model, operation = runtime.metrics, record.model, record.operation
    if operation is None or model not in runtime.models:
        return
    metrics.queue.labels(model, operation).observe(record.queue_s)
    metrics.tokenize.labels(model, operation).observe(record.tokenize_s)
    metrics.input_tokens.labels(model, operation).observe(record.input_tokens)


def observe_job(runtime: Runtime, record: Record, job: Job) -> None:
    """The histograms of a job that ran to its end. ``record`` knows its attention and operation."""
    metrics, model, operation, times = runtime.metrics, record.model, record.operation, job.times
    if operation is None or model not in runtime.models:
        return
    if times.first_token is not None:
        metrics.output_tokens.labels(model, operation).observe(record.output_tokens)
        metrics.first_token.labels(model, record.attention).observe(times.first_token - times.arrival)
        for gap in times.token_gaps:
            metrics.inter_token.labels(model, record.attention).observe(gap)
    if record.density is not None:
        metrics.density.labels(model, record.attention).observe(record.density)
    for impl in filter(None, record.impl.split(", ")):
        metrics.impl.labels(model, record.attention, impl).inc()
    _observe_errors(runtime, record, job)
    peak = job.memory.peak_bytes
    if peak and operation not in OF_NO_ATTENTION:  # a comparison keeps more than such a request does
        metrics.memory_estimate.labels(model, record.attention).observe(job.memory.estimated_bytes / peak)


def _observe_errors(runtime: Runtime, record: Record, job: Job) -> None:
    """How wrong it was, where somebody looked. An exact attention is not: it would only dilute the others."""
    metrics, measured = runtime.metrics, job.measured
    read = {sequence.choice.backend for sequence in job.sequences}
    decoded = {sequence.decode_choice.backend for sequence in job.sequences}
    phases = {"prefill": (read, measured.prefill), "decode": (decoded, measured.decode)}
    verified = set()
    for phase, (backends, error) in phases.items():
        looked_at = backends - {"exact"}
        if error is None or not looked_at:
            continue
        [backend] = looked_at
        labels = (record.model, backend, phase)
        estimate, row_bound = largest_estimate(error), finite(error.row_bound)
        if estimate is not None:
            metrics.measured_error.labels(*labels).observe(estimate)
        if row_bound is not None:
            metrics.measured_row_bound.labels(*labels).observe(row_bound)
        metrics.verified_rows.labels(*labels).inc(error.rows)
        verified.add(backend)
    for backend in verified:
        metrics.verified_requests.labels(record.model, backend, job.verify_cause).inc()


def observe_auto(runtime: Runtime, record: Record, job: Job, auto: ChosenAuto) -> None:
    """Of a request with a budget: what was planned, and whether it was kept. A plan that was given has none,
    and a comparison is a study, no service."""
    metrics, model = runtime.metrics, record.model
    kept = [sequence.kept for sequence in job.sequences if leads(sequence)]
    budget = budget_of(auto, kept)
    if budget is None or record.operation in OF_NO_ATTENTION or model not in runtime.models:
        return
    for backend, layers in Counter(each.backend for plan in auto.plans for each in plan.layers).items():
        metrics.auto_layers.labels(model, backend).inc(layers)
    repaired = sum(each.exact_from is not None for of_input in kept for each in of_input)
    metrics.auto_repaired_layers.labels(model).inc(repaired)
    if not budget.within:
        metrics.budget_violations.labels(model).inc()
    planned_exact = all(plan.is_exact for plan in auto.plans)
    if not planned_exact and budget.estimate is not None:
        ratio = min(budget.estimate / budget.max_error, MAX_ERROR_RATIO)
        metrics.auto_error_ratio.labels(model).observe(ratio)
    metrics.auto_requests.labels(model, _auto_outcome(budget, planned_exact)).inc()


def _auto_outcome(budget: Budget, planned_exact: bool) -> AutoOutcome:
    if not budget.within:
        return "violated"
    if planned_exact:
        return "exact"
    return "repaired" if budget.repaired_layers else "within"
