"""What went wrong inside the engine, as errors that a client can act on."""

from __future__ import annotations

from models.errors import NonFiniteOutput
from service.errors import ApiError, internal
from service.jobs import Job, groups_of
from service.schedule import Rejected


def failure_of(error: Exception, job: Job) -> ApiError:
    """An exception of a step or a sequence."""
    if isinstance(error, NonFiniteOutput):
        detail = (
            f"Model {job.model.info.name!r} produced NaN or infinity for this request, so there is no answer "
            "to give; try attention 'exact', another input or dtype float32."
        )
        return ApiError("non_finite_output", detail, stage=job.stage)
    return internal(stage=job.stage)


def refusal_of(error: Rejected, job: Job | None) -> ApiError:
    """The scheduler's refusal, with the numbers and the way out."""
    if error.reason == "never_fits" and job is not None:
        return _never_fits(error, job)
    if error.reason == "too_many_tokens":
        detail = (
            f"The request has {error.value:,} tokens; the queue holds {error.limit:,}. Send fewer inputs."
        )
        return ApiError(
            "body_too_large", detail, limits={"tokens": error.value, "max_queue_tokens": error.limit}
        )
    if error.reason == "too_many_places":
        detail = (
            f"{error.value:,} choices of one prompt decode together; the server holds {error.limit:,} "
            "sequences at once (max_running). Ask for fewer choices."
        )
        return ApiError("body_too_large", detail, limits={"n": error.value, "max_running": error.limit})
    return _no_room(error)


def _never_fits(error: Rejected, job: Job) -> ApiError:
    largest = max(groups_of(job), key=lambda group: sum(sequence.estimated_bytes for sequence in group))
    estimated = error.value  # with what the other inputs leave for the answer
    exact = estimated + sum(sequence.exact_bytes - sequence.estimated_bytes for sequence in largest)
    detail = (
        f"This request needs about {estimated:,} bytes at once with the attention asked for "
        f"({exact:,} with 'exact'); requests may hold {error.limit:,} (memory_limit_bytes). "
        "Send a shorter input, fewer new tokens, or raise the limit."
    )
    limits = {"estimated_bytes": estimated, "exact_bytes": exact, "memory_limit_bytes": error.limit}
    return ApiError("never_fits_memory", detail, limits=limits)


def _no_room(error: Rejected) -> ApiError:
    """429: the queue is full of requests, of tokens or of predicted work."""
    code, what, name = {
        "queue_full": ("queue_full", "requests", "max_queue_requests"),
        "token_budget": ("token_budget_exhausted", "tokens", "max_queue_tokens"),
        "cost_budget": ("cost_budget_exhausted", "seconds of work", "max_queue_seconds"),
    }[error.reason]
    value, limit = error.value, error.limit
    if error.reason == "cost_budget":
        value, limit = round(value / 1e3), round(limit / 1e3)
    detail = f"{value:,} {what} are waiting; the limit is {limit:,}. Come back after Retry-After."
    return ApiError(code, detail, limits={name: limit}, retry_after_s=error.retry_after_s)
