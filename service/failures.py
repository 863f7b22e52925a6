"""What went wrong inside the engine, as errors that a client can act on."""

from __future__ import annotations

from models.errors import NonFiniteOutput
from service.errors import ApiError, internal
from service.jobs import Job
from service.scheduler import Rejected


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
        largest = max(job.sequences, key=lambda sequence: sequence.estimated_bytes)
        estimated = error.value  # with what the other inputs leave for the answer
        exact = largest.exact_bytes + estimated - largest.estimated_bytes
        detail = (
            f"This request needs about {error.value:,} bytes at once with the attention asked for "
            f"({exact:,} with 'exact'); requests may hold {error.limit:,} (memory_limit_bytes). "
            "Send a shorter input, fewer new tokens, or raise the limit."
        )
        limits = {"estimated_bytes": estimated, "exact_bytes": exact, "memory_limit_bytes": error.limit}
        return ApiError("never_fits_memory", detail, limits=limits)
    if error.reason == "too_many_tokens":
        detail = (
            f"The request has {error.value:,} tokens; the queue holds {error.limit:,}. Send fewer inputs."
        )
        return ApiError(
            "body_too_large", detail, limits={"tokens": error.value, "max_queue_tokens": error.limit}
        )
    code = "queue_full" if error.reason == "queue_full" else "token_budget_exhausted"
    what = "requests" if error.reason == "queue_full" else "tokens"
    detail = f"{error.value:,} {what} are waiting; the limit is {error.limit:,}. Come back after Retry-After."
    return ApiError(
        code, detail, limits={f"max_queue_{what}": error.limit}, retry_after_s=error.retry_after_s
    )
