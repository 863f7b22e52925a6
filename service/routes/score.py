"""POST /v1/score: how likely a text is, token by token. POST /v1/tokenize: its tokens."""

from __future__ import annotations

import math

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from models.contract import Choice, Tokenizer
from service.answers import Attended, Score, ScoreAnswer, attention_of, stats_of, usage_of
from service.attention import choose, parse, selects_by_tile
from service.auto import resolve
from service.errors import ApiError, invalid
from service.flow import Asked, Flow
from service.inputs import Reading, Tokens
from service.problems import documented
from service.routes.common import ADMISSION_ERRORS, RUN_ERRORS, input_list
from service.schemas import ScoreRequest, TokenizeRequest
from service.sequences import ScoreSequence

router = APIRouter(tags=["native"])


class Tokenized(BaseModel):
    token_ids: list[int]
    char_spans: list[tuple[int, int]] = Field(
        description="[first, end) in characters; (0, 0) for special tokens"
    )
    tokens: int


class TokenizeAnswer(BaseModel):
    model: str
    max_tokens: int
    data: list[Tokenized]


@router.post(
    "/v1/score", response_model=ScoreAnswer, responses=documented(*RUN_ERRORS), summary="Score a text"
)
async def score(body: ScoreRequest, request: Request) -> Response:
    flow = Flow(request)
    model = flow.begin(body.model, "score")
    attended = Attended.one(choose(parse(body.attention), model, scores=True))
    reading = Reading(model, flow.runtime.settings, model.info.max_tokens, may_truncate=False)
    tokens = await flow.tokenise(lambda: reading.read(body.input, "input"), body.timeout_ms)
    if len(tokens.token_ids) < 2:
        raise invalid(
            "input has one token; scoring needs at least two (the first has nothing before it)", "input"
        )
    attended = await resolve(flow, model, attended, [len(tokens.token_ids)], body.timeout_ms)
    sequence = ScoreSequence(tokens.token_ids, attended.prefill.of(0).choice)
    job = flow.job("score_", model, [sequence], attended, Asked(body.timeout_ms, body.priority))
    await flow.run(job)
    scored = await flow.offload(lambda: _score(sequence.scores, tokens, model.tokenizer))
    now = flow.finish(job, attended, input_tokens=len(tokens.token_ids))
    answer = ScoreAnswer(
        id=job.id,
        model=model.info.name,
        data=[scored],
        usage=usage_of(flow.record),
        attention=attention_of(job, attended),
        stats=stats_of(job, flow.record, now),
        warnings=_warnings(sequence.choice),
    )
    return await flow.respond(
        lambda: answer, len(sequence.scores), exclude=None if body.include_stats else {"stats"}
    )


@router.post(
    "/v1/tokenize",
    response_model=TokenizeAnswer,
    responses=documented(*ADMISSION_ERRORS, "queue_full", "deadline_exceeded"),
    summary="Tokenise",
)
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    flow = Flow(request)
    flow.runtime.check_serving()
    model = flow.runtime.model(body.model, None)
    sources, _ = input_list(body.input, "input", flow.runtime.settings.max_batch_inputs)
    limit, chars = flow.runtime.settings.max_input_chars, sum(len(text) for text in sources)
    if chars > limit:
        detail = f"input has {chars:,} characters; the limit is {limit:,} (max_input_chars)."
        limits = {"max_chars": limit, "chars": chars}
        raise ApiError("context_length_exceeded", detail, param="input", limits=limits)

    def read() -> list[Tokenized]:
        found = [model.tokenizer.encode(text, special_tokens=body.special_tokens) for text in sources]
        return [
            Tokenized(token_ids=e.token_ids, char_spans=e.char_spans, tokens=len(e.token_ids)) for e in found
        ]

    data = await flow.tokenise(read)
    answer = TokenizeAnswer(model=model.info.name, max_tokens=model.info.max_tokens, data=data)
    return await flow.respond(lambda: answer, values=chars)


def _score(scores: list[float], tokens: Tokens, tokenizer: Tokenizer) -> Score:
    r"""perplexity = exp(-mean log p); bits per byte = -sum log p / (ln 2 * bytes of the scored tokens)."""
    total = math.fsum(scores)
    num_bytes = _scored_bytes(tokens, tokenizer)
    mean = -total / len(scores)
    if mean > math.log(1e300):
        raise ApiError("non_finite_output", "The perplexity of this input is not a finite number.")
    return Score(
        token_logprobs=scores,
        perplexity=math.exp(mean),
        bits_per_byte=-total / (math.log(2) * max(num_bytes, 1)),
        tokens=len(tokens.token_ids),
    )


def _scored_bytes(tokens: Tokens, tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of all tokens but the first, which has no score."""
    if tokens.text is None:
        return len(tokenizer.decode(tokens.token_ids[1:]).encode("utf-8"))
    first, end = tokens.char_spans[0]
    return len(tokens.text.encode("utf-8")) - len(tokens.text[first:end].encode("utf-8"))


def _warnings(choice: Choice) -> list[str]:
    if not selects_by_tile(choice):
        return []
    return [
        "keys were selected by whole query tiles, so a token's score may depend on later tokens of its tile"
    ]
