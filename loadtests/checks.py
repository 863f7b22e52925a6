"""Is an answer what was asked for? A fast server that answers something else has not been load tested."""

from __future__ import annotations

import math
from typing import Any


class BadAnswer(Exception):
    """Status 200, yet not what was asked for; the message says what."""


def check_answer(endpoint: str, backend: str, answer: dict[str, Any]) -> None:
    """Raises BadAnswer where attention was substituted, input truncated, or the payload empty or not finite.

    ``answer`` is the body of a plain answer or the ``done`` event of a stream.
    """
    try:
        used = answer["attention"]["used"]
        if used != backend:
            raise BadAnswer(f"asked for attention {backend!r}, the answer used {used!r}")
        if answer["usage"]["prompt_tokens"] < 1:
            raise BadAnswer("usage.prompt_tokens is below 1")
        if endpoint == "encode":
            _check_encoding(answer["data"])
        elif endpoint == "score":
            _check_scores(answer["data"])
    except (KeyError, IndexError, TypeError) as error:
        raise BadAnswer(f"a field is missing from the answer or has the wrong type: {error!r}") from error


def _check_encoding(data: list[dict[str, Any]]) -> None:
    if len(data) != 1:
        raise BadAnswer(f"one input, {len(data)} results")
    if data[0]["truncated_tokens"]:
        raise BadAnswer(f"{data[0]['truncated_tokens']} tokens were truncated unasked")
    _check_finite("embedding", data[0]["embedding"])


def _check_scores(data: list[dict[str, Any]]) -> None:
    _check_finite("token_logprobs", [each for each in data[0]["token_logprobs"] if each is not None])
    _check_finite("perplexity", [data[0]["perplexity"]])


def _check_finite(name: str, values: list[Any]) -> None:
    if not values or not all(isinstance(each, int | float) and math.isfinite(each) for each in values):
        raise BadAnswer(f"{name} is empty or holds something that is not a finite number")
