"""POST /v1/embeddings: as OpenAI has it, with ``attention`` beside."""

from __future__ import annotations

import struct
from base64 import b64encode
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from service.answers import Attended, AttentionUsed, attention_of
from service.attention import choose, parse
from service.auto import resolve
from service.errors import invalid
from service.flow import Asked, Flow
from service.inputs import Reading
from service.openai_schemas import EmbeddingsRequest
from service.pooling import finish, pool
from service.problems import documented
from service.routes.common import RUN_ERRORS, as_inputs, note_ignored
from service.sequences import EncodeSequence

router = APIRouter(tags=["openai"])


class EmbeddingObject(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingsUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsAnswer(BaseModel):
    object: Literal["list"] = "list"
    data: list[EmbeddingObject]
    model: str
    usage: EmbeddingsUsage
    attention: AttentionUsed


@router.post(
    "/v1/embeddings",
    response_model=EmbeddingsAnswer,
    responses=documented(*RUN_ERRORS),
    summary="Embed (OpenAI)",
)
async def embeddings(body: EmbeddingsRequest, request: Request) -> Response:
    flow = Flow(request)
    model = flow.begin(body.model, "encode")
    note_ignored(flow, body)
    info, settings = model.info, flow.runtime.settings
    if body.dimensions is not None and body.dimensions > info.embedding_dim:
        detail = f"dimensions must be at most {info.embedding_dim}, the width of model {info.name!r}"
        raise invalid(detail, "dimensions", le=info.embedding_dim)
    attended = Attended.one(choose(parse(body.attention), model))
    pooling = info.pooling or ("last" if info.causal else "mean")
    sources, many = as_inputs(body.input, "input", settings.max_batch_inputs)
    reading = Reading(model, settings, info.max_tokens, may_truncate=False)
    inputs = await flow.tokenise(lambda: reading.read_all(sources, "input", many=many), body.timeout_ms)
    lengths = [len(tokens.token_ids) for tokens in inputs]
    attended = await resolve(flow, model, attended, lengths, body.timeout_ms)
    sequences = [
        EncodeSequence(
            i, tokens.token_ids, attended.prefill.of(i).choice, chunkable=info.causal, pooling=pooling
        )
        for i, tokens in enumerate(inputs)
    ]
    job = flow.job("embd-", model, sequences, attended, Asked(body.timeout_ms, body.priority or 0))
    await flow.run(job)

    def render() -> list[EmbeddingObject]:
        return [EmbeddingObject(index=s.index, embedding=_vector(s, pooling, body)) for s in sequences]

    data = await flow.offload(render)
    used = sum(lengths)
    flow.finish(job, attended, input_tokens=used)
    answer = EmbeddingsAnswer(
        data=data,
        model=info.name,
        usage=EmbeddingsUsage(prompt_tokens=used, total_tokens=used),
        attention=attention_of(job, attended),
    )
    return await flow.respond(lambda: answer, values=len(data) * info.embedding_dim)


def _vector(sequence: EncodeSequence, pooling: str, body: EmbeddingsRequest) -> list[float] | str:
    values: Any = finish(pool(sequence.hidden, pooling), body.dimensions, normalize=True)
    return base64_floats(values) if body.encoding_format == "base64" else values


def base64_floats(values: list[float]) -> str:
    """Little-endian float32, as OpenAI's SDK decodes them."""
    return b64encode(struct.pack(f"<{len(values)}f", *values)).decode("ascii")
