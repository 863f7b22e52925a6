"""POST /v1/completions and /v1/chat/completions: as OpenAI has them, with ``attention`` beside."""

from __future__ import annotations

import secrets
import time
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from models.contract import ModelError, ServedModel
from service.answers import Attended, attention_of, stats_of, usage_of
from service.attention import parse_pair
from service.auto import resolve
from service.errors import invalid
from service.flow import Asked, Flow
from service.generation import (
    Wanted,
    attended_pair,
    check_new_tokens,
    check_output,
    num_values,
    sequences_of,
    stops_of,
)
from service.inputs import Reading, Tokens
from service.jobs import Job
from service.openai_answers import (
    ChatAnswer,
    ChatShape,
    CompletionAnswer,
    CompletionShape,
    OpenAIEvents,
    OpenAIUsage,
    Shape,
)
from service.openai_schemas import ChatRequest, CompletionRequest
from service.problems import documented
from service.routes.common import RUN_ERRORS, as_inputs, note_ignored
from service.routes.generate import STREAM_DOC
from service.sampling import SamplingParams
from service.streams import stream_job

router = APIRouter(tags=["openai"])
DEFAULT_COMPLETION_TOKENS = 16
MAX_CHOICES = 64
RESPONSES = {**STREAM_DOC, **documented(*RUN_ERRORS)}


@router.post(
    "/v1/completions", response_model=CompletionAnswer, responses=RESPONSES, summary="Complete (OpenAI)"
)
async def completions(body: CompletionRequest, request: Request) -> Response:
    flow = Flow(request)
    model = flow.begin(body.model, "generate")
    note_ignored(flow, body)
    asked = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    check_new_tokens(asked, flow.runtime.settings.max_new_tokens, model, "max_tokens")
    sources, many = as_inputs(body.prompt, "prompt", flow.runtime.settings.max_batch_inputs)
    n = body.n or 1
    if len(sources) * n > MAX_CHOICES:
        raise invalid(
            f"prompts times n must be at most {MAX_CHOICES} choices", "prompt", max_choices=MAX_CHOICES
        )
    reading = _reading(flow, model, asked, "max_tokens")
    prompts = await flow.tokenise(lambda: reading.read_all(sources, "prompt", many=many), body.timeout_ms)
    return await _answer(flow, model, body, prompts, (asked, "max_tokens"), body.logprobs, CompletionShape())


@router.post("/v1/chat/completions", response_model=ChatAnswer, responses=RESPONSES, summary="Chat (OpenAI)")
async def chat(body: ChatRequest, request: Request) -> Response:
    flow = Flow(request)
    model = flow.begin(body.model, "generate")
    note_ignored(flow, body)
    logprobs = _chat_logprobs(body)
    messages = [message.plain() for message in body.messages]
    max_input_chars = flow.runtime.settings.max_input_chars
    if sum(len(message["content"]) for message in messages) > max_input_chars:
        raise invalid(f"messages have more than {max_input_chars:,} characters (max_input_chars)", "messages")
    limit = flow.runtime.settings.max_new_tokens
    named = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    asked = body.max_completion_tokens or body.max_tokens
    if asked is not None:
        check_new_tokens(asked, limit, model, named)
    reading = _reading(flow, model, asked or 1, named)
    prompt = await flow.tokenise(lambda: _chat_prompt(model, messages, reading), body.timeout_ms)
    room = model.info.max_tokens - len(prompt.token_ids)
    new_tokens = asked or min(limit, room)
    return await _answer(flow, model, body, [prompt], (new_tokens, named), logprobs, ChatShape())


async def _answer(
    flow: Flow,
    model: ServedModel,
    body: CompletionRequest | ChatRequest,
    prompts: list[Tokens],
    new_tokens: tuple[int, str],
    logprobs: int | None,
    shape: Shape,
) -> Response:
    """``new_tokens``: how many at most, and the field that says so."""
    # OpenAI samples at temperature 1 where nothing is said, and differently each time without a seed.
    seed = secrets.randbits(63) if body.seed is None else body.seed
    temperature = 1.0 if body.temperature is None else body.temperature
    sampling = SamplingParams(
        temperature, body.top_k, 1.0 if body.top_p is None else body.top_p, seed, logprobs
    )
    max_new_tokens, named = new_tokens
    wanted = Wanted(max_new_tokens, sampling, stops_of(body.stop), body.n or 1)
    check_output(len(prompts) * wanted.n, wanted, flow.runtime.settings, named)
    attended = attended_pair(parse_pair(body.attention, seed=body.seed or 0), model)
    lengths = [len(prompt.token_ids) for prompt in prompts]
    attended = await resolve(flow, model, attended, lengths, body.timeout_ms)
    sequences = sequences_of(prompts, wanted, model, attended, body.salt)
    stream = bool(body.stream)
    asked = Asked(body.timeout_ms, body.priority or 0, stream)
    job = flow.job(shape.prefix, model, sequences, attended, asked)
    await flow.prepare(job)
    used = sum(lengths)

    def finish() -> None:
        generated = sum(len(sequence.tokens) for sequence in sequences)
        flow.finish(job, attended, input_tokens=used, output_tokens=generated)

    created = int(time.time())
    if stream:
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        events = OpenAIEvents(
            shape, job, sequences, created, lambda: _measured(flow, job, attended), include_usage
        )
        return await stream_job(flow, job, events, finish)
    await flow.run(job)
    finish()
    told = _measured(flow, job, attended)
    return await flow.respond(lambda: shape.answer(job, sequences, created, told), num_values(sequences))


def _measured(flow: Flow, job: Job, attended: Attended) -> dict[str, Any]:
    return {
        "usage": OpenAIUsage.of(usage_of(flow.record)),
        "attention": attention_of(job, attended),
        "stats": stats_of(job, flow.record, flow.runtime.clock()),
    }


def _reading(flow: Flow, model: ServedModel, new_tokens: int, named: str) -> Reading:
    room = model.info.max_tokens - new_tokens
    reserved = f" (its {model.info.max_tokens:,} less {named} {new_tokens:,})"
    return Reading(model, flow.runtime.settings, room, reserved=reserved, may_truncate=False)


def _chat_prompt(model: ServedModel, messages: list[dict[str, str]], reading: Reading) -> Tokens:
    """The template writes special tokens itself, so the tokenizer adds none."""
    try:
        text = model.tokenizer.chat(messages)
    except ModelError as error:
        raise invalid(f"model {model.info.name!r} cannot chat: {error}", "messages") from None
    except ValueError:
        detail = (
            f"the chat template of model {model.info.name!r} does not take these messages; check their roles "
            "and order (many templates want user and assistant in turn, some take no system message)"
        )
        raise invalid(detail, "messages") from None
    return replace(reading, special_tokens=False).read(text, "messages")


def _chat_logprobs(body: ChatRequest) -> int | None:
    if not body.logprobs:
        if body.top_logprobs:
            raise invalid("top_logprobs needs 'logprobs': true", "top_logprobs")
        return None
    return body.top_logprobs or 0
