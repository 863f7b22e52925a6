"""POST /v1/encode: embeddings of texts, each its own sequence, batched by the engine."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from models.contract import ServedModel
from service.answers import (
    Attended,
    ChunkEmbedding,
    Embedding,
    EncodeAnswer,
    attention_of,
    stats_of,
    usage_of,
)
from service.attention import choose, parse
from service.auto import resolve
from service.errors import ApiError, invalid
from service.flow import Asked, Flow
from service.inputs import Reading, Tokens
from service.jobs import Job
from service.pooling import Chunk, check_chunking, chunks_of, finish, num_chunks, pool
from service.problems import documented
from service.routes.common import RUN_ERRORS, input_list
from service.schemas import EncodeRequest, TokenInput
from service.sequences import EncodeSequence

router = APIRouter(tags=["native"])


@router.post(
    "/v1/encode", response_model=EncodeAnswer, responses=documented(*RUN_ERRORS), summary="Embed texts"
)
async def encode(body: EncodeRequest, request: Request) -> Response:
    flow = Flow(request)
    model = flow.begin(body.model, "encode")
    pooling = check_options(body, model)
    attended = Attended.one(choose(parse(body.attention), model))
    sources: list[str | TokenInput]
    sources, many = input_list(body.input, "input", flow.runtime.settings.max_batch_inputs)
    reading = Reading(
        model, flow.runtime.settings, model.info.max_tokens, body.truncate, prefix_of(body, model)
    )

    def read() -> tuple[list[Tokens], list[list[Chunk] | None], int]:
        found = reading.read_all(sources, "input", many=many)
        values = check_size(found, body, pooling, model, flow.runtime.settings.max_output_values)
        return found, [plan_chunks(tokens, body, i) for i, tokens in enumerate(found)], values

    inputs, chunks, values = await flow.tokenise(read, body.timeout_ms)
    lengths = [len(tokens.token_ids) for tokens in inputs]
    attended = await resolve(flow, model, attended, lengths, body.timeout_ms)
    job, sequences = encode_job(flow, "enc_", model, inputs, attended, pooling, body)
    await flow.run(job)
    count_truncation(flow, inputs)
    used = sum(lengths)

    def render() -> list[Embedding]:
        parts = zip(inputs, sequences, chunks, strict=True)
        return [embedding_of(i, *part, pooling, body) for i, part in enumerate(parts)]

    data = await flow.offload(render)
    now = flow.finish(job, attended, input_tokens=used)
    answer = EncodeAnswer(
        id=job.id,
        model=model.info.name,
        data=data,
        usage=usage_of(flow.record),
        attention=attention_of(job, attended),
        stats=stats_of(job, flow.record, now),
    )
    return await flow.respond(lambda: answer, values, exclude=None if body.include_stats else {"stats"})


def check_options(body: EncodeRequest, model: ServedModel) -> str:
    """The pooling to use; 400 where options contradict each other or the model."""
    info = model.info
    pooling = body.pooling or info.pooling or ("last" if info.causal else "mean")
    if pooling == "cls" and info.causal:
        raise invalid(
            "pooling 'cls' means nothing on a causal model: its first token sees only itself", "pooling"
        )
    if body.dimensions is not None and body.dimensions > info.embedding_dim:
        detail = f"dimensions must be at most {info.embedding_dim}, the width of model {info.name!r}"
        raise invalid(detail, "dimensions", le=info.embedding_dim)
    if body.late_chunking is not None:
        check_chunking(body.late_chunking)
        if pooling != "mean":
            raise invalid("late_chunking needs mean pooling: ask for 'pooling': 'mean'", "late_chunking")
    return pooling


def prefix_of(body: EncodeRequest, model: ServedModel) -> str:
    """The model's prefix for ``input_type``, which alone adds one."""
    if body.input_type is None:
        return ""
    prompts = model.info.prompts
    if body.input_type not in prompts:
        known = ", ".join(sorted(prompts)) or "none"
        raise invalid(
            f"model {model.info.name!r} has no prefix for this input_type; it has: {known}", "input_type"
        )
    return prompts[body.input_type]


def plan_chunks(tokens: Tokens, body: EncodeRequest, index: int) -> list[Chunk] | None:
    return None if body.late_chunking is None else chunks_of(tokens, body.late_chunking, f"input[{index}]")


def check_size(
    inputs: list[Tokens], body: EncodeRequest, pooling: str, model: ServedModel, limit: int
) -> int:
    """How many numbers the answer will hold. Refuses more than ``max_output_values`` before a chunk is
    planned or anything runs."""
    vectors = sum(len(tokens.token_ids) if pooling == "none" else 1 for tokens in inputs)
    if body.late_chunking is not None:
        vectors += sum(num_chunks(len(tokens.token_ids), body.late_chunking) for tokens in inputs)
    values = vectors * model.info.embedding_dim
    if values > limit:
        detail = f"the answer would hold {values:,} numbers; the limit is {limit:,} (max_output_values)"
        param = "pooling" if pooling == "none" else "late_chunking"
        raise ApiError(
            "invalid_request", detail, param=param, limits={"max_output_values": limit, "values": values}
        )
    return values


def encode_job(
    flow: Flow,
    prefix: str,
    model: ServedModel,
    inputs: list[Tokens],
    attended: Attended,
    pooling: str,
    body: EncodeRequest,
) -> tuple[Job, list[EncodeSequence]]:
    kept = pooling if body.late_chunking is None else "none"
    chunkable = model.info.causal
    sequences = [
        EncodeSequence(i, tokens.token_ids, attended.prefill.of(i).choice, chunkable=chunkable, pooling=kept)
        for i, tokens in enumerate(inputs)
    ]
    return flow.job(prefix, model, sequences, attended, Asked(body.timeout_ms, body.priority)), sequences


def count_truncation(flow: Flow, inputs: list[Tokens]) -> None:
    cut = [tokens.truncated_tokens for tokens in inputs if tokens.truncated_tokens]
    if cut and flow.record.model in flow.runtime.models:
        flow.runtime.metrics.truncated_inputs.labels(flow.record.model).inc(len(cut))
        flow.runtime.metrics.truncated_tokens.labels(flow.record.model).inc(sum(cut))


def embedding_of(
    index: int,
    tokens: Tokens,
    sequence: EncodeSequence,
    chunks: list[Chunk] | None,
    pooling: str,
    body: EncodeRequest,
) -> Embedding:
    hidden = sequence.hidden
    parts = None
    if chunks is not None:
        parts = [
            ChunkEmbedding(
                token_range=list(chunk.token_range),
                char_range=list(chunk.char_range) if chunk.char_range else None,
                embedding=finish(
                    pool(hidden[slice(*chunk.token_range)], "mean"), body.dimensions, body.normalize
                ),
            )
            for chunk in chunks
        ]
    return Embedding(
        index=index,
        embedding=finish(pool(hidden, pooling), body.dimensions, body.normalize),
        tokens=len(tokens.token_ids),
        truncated_tokens=tokens.truncated_tokens,
        chunks=parts,
    )
