"""POST /v1/generate: text from a prompt, plain or as server-sent events."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from service.answers import (
    AttentionUsed,
    GenerateAnswer,
    Logprobs,
    Stats,
    Usage,
    attention_of,
    stats_of,
    usage_of,
)
from service.attention import parse_pair
from service.auto import resolve
from service.flow import Asked, Flow
from service.generation import (
    Wanted,
    attended_pair,
    check_new_tokens,
    check_output,
    choice_of,
    logprobs_of,
    num_values,
    sequences_of,
    stops_of,
)
from service.inputs import Reading, Tokens
from service.jobs import Job
from service.problems import documented
from service.routes.common import RUN_ERRORS
from service.routes.encode import count_truncation
from service.sampling import SamplingParams
from service.schemas import GenerateRequest
from service.sequences import GenerateSequence, TokenOut
from service.streams import EventFormat, event, stream_job

router = APIRouter(tags=["native"])


class TokenEvent(BaseModel):
    """Event ``token``. Texts of a choice concatenate to its whole text; a text may be empty."""

    index: int
    text: str
    token_id: int
    logprobs: Logprobs | None = None


class Finished(BaseModel):
    index: int
    finish_reason: str
    truncated_tokens: int = 0


class DoneEvent(BaseModel):
    """Event ``done``, the last one."""

    id: str
    model: str
    finish_reason: str
    choices: list[Finished]
    usage: Usage
    attention: AttentionUsed
    stats: Stats | None = None


STREAM_DOC: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "JSON, or with 'stream': true the events token, done and error (server-sent events)",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


@router.post(
    "/v1/generate",
    response_model=GenerateAnswer,
    responses={**STREAM_DOC, **documented(*RUN_ERRORS)},
    summary="Generate text",
)
async def generate(body: GenerateRequest, request: Request) -> Response:
    flow = Flow(request)
    model = flow.begin(body.model, "generate")
    check_new_tokens(body.max_new_tokens, flow.runtime.settings.max_new_tokens, model, "max_new_tokens")
    attended = attended_pair(parse_pair(body.attention, seed=body.seed), model)
    room = model.info.max_tokens - body.max_new_tokens
    reserved = f" (its {model.info.max_tokens:,} less max_new_tokens {body.max_new_tokens:,})"
    reading = Reading(model, flow.runtime.settings, room, body.truncate, reserved=reserved)
    sampling = SamplingParams(body.temperature, body.top_k, body.top_p, body.seed, body.logprobs)
    wanted = Wanted(body.max_new_tokens, sampling, stops_of(body.stop), body.n)
    check_output(body.n, wanted, flow.runtime.settings, "max_new_tokens")
    prompt = await flow.tokenise(lambda: reading.read(body.prompt, "prompt"), body.timeout_ms)
    attended = await resolve(flow, model, attended, [len(prompt.token_ids)], body.timeout_ms)
    sequences = sequences_of([prompt], wanted, model, attended, body.cache_salt or "")
    asked = Asked(body.timeout_ms, body.priority, body.stream)
    job = flow.job("gen_", model, sequences, attended, asked)
    made = _Made(flow, job, sequences, prompt)
    count_truncation(flow, [prompt])
    await flow.prepare(job)

    def finish() -> None:
        generated = sum(len(sequence.tokens) for sequence in sequences)
        flow.finish(job, attended, input_tokens=len(prompt.token_ids), output_tokens=generated)

    def measured() -> dict[str, Any]:
        now = flow.runtime.clock()
        stats = {"stats": stats_of(job, flow.record, now)} if body.include_stats else {}
        return {"usage": usage_of(flow.record), "attention": attention_of(job, attended), **stats}

    if body.stream:
        return await stream_job(flow, job, _NativeEvents(made, measured), finish)
    await flow.run(job)
    finish()
    told = measured()

    def build() -> GenerateAnswer:
        choices = [choice_of(sequence, model.tokenizer, prompt.truncated_tokens) for sequence in sequences]
        return GenerateAnswer(id=job.id, model=model.info.name, choices=choices, **told)

    exclude = None if body.include_stats else {"stats"}
    return await flow.respond(build, num_values(sequences), exclude=exclude)


class _Made:
    """What the events of one generation are written from."""

    def __init__(self, flow: Flow, job: Job, sequences: list[GenerateSequence], prompt: Tokens) -> None:
        self.flow, self.job, self.sequences, self.prompt = flow, job, sequences, prompt


class _NativeEvents(EventFormat):
    def __init__(self, made: _Made, measured: Callable[[], dict[str, Any]]) -> None:
        self._made, self._measured = made, measured

    def token(self, token: TokenOut) -> bytes:
        logprobs = logprobs_of([token], self._made.job.model.tokenizer)
        told = TokenEvent(index=token.index, text=token.text, token_id=token.token_id, logprobs=logprobs)
        return event("token", told.model_dump_json(exclude={"logprobs"} if logprobs is None else None))

    def done(self) -> bytes:
        made = self._made
        cut = made.prompt.truncated_tokens
        choices = [
            Finished(index=sequence.index, finish_reason=sequence.finish_reason, truncated_tokens=cut)
            for sequence in made.sequences
        ]
        first = choices[0].finish_reason
        name = made.job.model.info.name
        told = DoneEvent(id=made.job.id, model=name, finish_reason=first, choices=choices, **self._measured())
        return event("done", told.model_dump_json(exclude={"stats"} if told.stats is None else None))

    def error(self, problem: dict[str, Any]) -> bytes:
        return event("error", json.dumps(problem))
