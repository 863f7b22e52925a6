"""Errors as responses, and the handlers that bring every exception into the one shape."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from service.errors import KINDS, ApiError, internal
from service.record import Record
from service.validation import limits_of, message_of, param_path

MEDIA_TYPE = "application/problem+json"


class OpenAIError(BaseModel):
    """The same error in the shape that OpenAI's SDKs read."""

    message: str
    type: str
    param: str | None
    code: str


class Problem(BaseModel):
    """RFC 9457 problem document."""

    model_config = ConfigDict(extra="allow")
    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str
    param: str | None
    limits: dict[str, Any] = {}
    error: OpenAIError


def problem_response(error: ApiError, record: Record) -> Response:
    record.error_code, record.error_stage = error.code, error.stage
    body = error.problem(record.request_id)
    return JSONResponse(body, status_code=error.status, headers=error.headers(), media_type=MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Replace FastAPI's own handlers: its 422 echoes the input, and fails itself on what JSON cannot say."""
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)


def documented(*codes: str) -> dict[int | str, dict[str, Any]]:
    """OpenAPI responses of a route: one entry per status, naming its codes."""
    by_status: dict[int, list[str]] = {}
    for code in codes:
        by_status.setdefault(KINDS[code].status, []).append(code)
    responses: dict[int | str, dict[str, Any]] = {}
    for status, named in sorted(by_status.items()):
        responses[status] = _described(", ".join(named))
        if status in (429, 503):
            header = {"description": "seconds to wait", "schema": {"type": "integer", "minimum": 1}}
            responses[status]["headers"] = {"Retry-After": header}
    responses["default"] = _described("any other error")
    return responses


def _described(text: str) -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/Problem"}
    return {"description": text, "content": {MEDIA_TYPE: {"schema": schema}}}


def _record(request: Request) -> Record:
    record: Record = request.scope["state"]["record"]
    return record


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return problem_response(error, _record(request))


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return problem_response(from_validation(error), _record(request))


def from_validation(error: RequestValidationError) -> ApiError:
    """The first complaint as an error that names the field and its bound."""
    problems = error.errors()
    problem = problems[0]
    if problem["type"] == "json_invalid":
        position = problem["loc"][-1]
        return ApiError("invalid_request", f"The body is not valid JSON (at character {position}).")
    location = problem["loc"][1:] if problem["loc"][:1] == ("body",) else problem["loc"]
    where = param_path(location)
    if not where:
        return ApiError("invalid_request", "The body must be a JSON object with the fields of this route.")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    detail = f"{where}: {message_of(problem)}{more}"
    return ApiError("invalid_request", detail, param=where, limits=limits_of(problem))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    carried = getattr(error, "error", None)
    response = problem_response(carried or _from_status(error.status_code), _record(request))
    if error.status_code == 405 and error.headers:
        response.headers.update(error.headers)
    return response


def _from_status(status: int) -> ApiError:
    if status == 404:
        return ApiError("not_found", "There is no such route; GET /openapi.json lists them.")
    if status == 405:
        return ApiError(
            "method_not_allowed",
            "This route does not take that method; the Allow header names those it does.",
        )
    if status == 413:
        return ApiError("body_too_large", "The body is too large.")
    if 400 <= status < 500:
        return ApiError("invalid_request", "The body cannot be read as JSON.")
    return internal()
