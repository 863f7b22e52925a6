"""Every error that a client can see, and the one shape in which it is told.

The body is an RFC 9457 problem document whose extension member ``error`` has OpenAI's shape, so that plain
HTTP clients and OpenAI SDKs both find code, message and the field at fault. Nothing of the request's own
text is echoed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Kind:
    """One row of the table of errors: status, title, and OpenAI's error type."""

    status: int
    title: str
    openai_type: str = "invalid_request_error"


KINDS: dict[str, Kind] = {
    "invalid_request": Kind(400, "Invalid request"),
    "invalid_attention_params": Kind(400, "Invalid attention parameters"),
    "attention_not_supported": Kind(400, "Attention not supported"),
    "context_length_exceeded": Kind(400, "Input too long"),
    "empty_input": Kind(400, "Empty input"),
    "model_refused": Kind(400, "Model cannot be served"),
    "invalid_api_key": Kind(401, "Invalid API key", "authentication_error"),
    "model_not_found": Kind(404, "Model not found"),
    "not_found": Kind(404, "Not found"),
    "method_not_allowed": Kind(405, "Method not allowed"),
    "model_exists": Kind(409, "Model exists"),
    "model_changing": Kind(409, "Another model is being loaded or unloaded"),
    "request_timeout": Kind(408, "Request body not received in time"),
    "body_too_large": Kind(413, "Request too large"),
    "never_fits_memory": Kind(413, "Request never fits in memory"),
    "unsupported_media_type": Kind(415, "Unsupported media type"),
    "queue_full": Kind(429, "Queue full", "rate_limit_error"),
    "token_budget_exhausted": Kind(429, "Queue full of tokens", "rate_limit_error"),
    "cost_budget_exhausted": Kind(429, "Queue full of work", "rate_limit_error"),
    "client_closed_request": Kind(499, "Client closed request"),
    "internal_error": Kind(500, "Internal error", "server_error"),
    "non_finite_output": Kind(500, "Non-finite output", "server_error"),
    "loading": Kind(503, "Models are loading", "server_error"),
    "draining": Kind(503, "Server is shutting down", "server_error"),
    "engine_unhealthy": Kind(503, "Engine stopped", "server_error"),
    "model_unloaded": Kind(503, "Model was unloaded", "server_error"),
    "deadline_exceeded": Kind(504, "Deadline exceeded", "server_error"),
}
"""code -> what it means. A status appears in the OpenAPI file because it appears here."""


class ApiError(Exception):
    """An error with a place in the table. ``param`` names the field, ``limits`` the numbers that were
    crossed, ``retry_after_s`` when to come back (429 and 503)."""

    default_retry_after_s: ClassVar[float] = 1.0

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        param: str | None = None,
        limits: Mapping[str, Any] | None = None,
        retry_after_s: float | None = None,
        stage: str | None = None,
    ) -> None:
        super().__init__(detail)
        self.code = code
        self.kind = KINDS[code]
        self.detail = detail
        self.param = param
        self.limits = dict(limits or {})
        self.stage = stage
        """Where a running request was when it failed: queued, running or streaming."""
        needs_retry = self.status in (429, 503)
        self.retry_after_s = (retry_after_s or self.default_retry_after_s) if needs_retry else None

    @property
    def status(self) -> int:
        return self.kind.status

    def problem(self, request_id: str) -> dict[str, Any]:
        """The body: problem document and OpenAI error in one."""
        body: dict[str, Any] = {
            "type": f"urn:longreach:error:{self.code.replace('_', '-')}",
            "title": self.kind.title,
            "status": self.status,
            "detail": self.detail,
            "instance": f"/requests/{request_id}",
            "code": self.code,
            "param": self.param,
            "error": {
                "message": self.detail,
                "type": self.kind.openai_type,
                "param": self.param,
                "code": self.code,
            },
        }
        if self.limits:
            body["limits"] = self.limits
        return body

    def headers(self) -> dict[str, str]:
        """Retry headers; a deadline must not be retried by an SDK that retries every 5xx."""
        headers: dict[str, str] = {}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(math.ceil(self.retry_after_s))
            headers["retry-after-ms"] = str(math.ceil(self.retry_after_s * 1000))
        if self.code == "deadline_exceeded":
            headers["x-should-retry"] = "false"
        if self.status == 408:
            headers["connection"] = "close"
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers


def invalid(detail: str, param: str | None = None, **limits: Any) -> ApiError:
    """400 ``invalid_request``: the commonest error, named shortly."""
    return ApiError("invalid_request", detail, param=param, limits=limits)


def internal(stage: str | None = None) -> ApiError:
    """500 without a word about its cause: causes go to the log."""
    return ApiError(
        "internal_error", "The server failed on this request; its log holds the cause.", stage=stage
    )
