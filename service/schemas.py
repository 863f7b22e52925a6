"""Requests of the native routes. Strict: a bool is no int, "5" is no number, unknown fields are refused,
and every string, list and number is bounded here or by a setting that the routes check."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StringConstraints, Tag

from service.attention_schema import AttentionSpec, AttentionSpecOrPair, AttentionSpecOrPairOrList

MAX_SEED = (1 << 63) - 1
MAX_TOKEN_IDS = 1 << 20
MAX_TEXT_CHARS = 1 << 30
MAX_LIST = 4096

TokenId = Annotated[int, Field(ge=0, le=(1 << 31) - 1)]
TokenIds = Annotated[list[TokenId], Field(max_length=MAX_TOKEN_IDS, fail_fast=True)]
Text = Annotated[str, Field(max_length=MAX_TEXT_CHARS)]
ModelName = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
TimeoutMs = Annotated[int, Field(ge=1, le=86_400_000, description="deadline, counted from arrival")]
Priority = Annotated[
    int,
    Field(
        ge=-10,
        le=10,
        description="larger ones begin first; ten seconds of waiting count as one, so nothing starves",
    ),
]
Salt = Annotated[str, StringConstraints(min_length=1, max_length=128)]
SALT = "cached beginnings of prompts are shared only among requests with the same salt"
NO_SALT = "accepted as on generate; nothing of this request is kept for another, so it has no effect"
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Truncate = Literal["error", "start", "end"]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class TokenInput(Strict):
    """Token ids, used as they are: no special tokens are added."""

    token_ids: TokenIds


def kind_of_input(value: Any) -> str | None:
    """Which member of the union a value belongs to, by its JSON type alone."""
    if isinstance(value, str):
        return "input_text"
    if isinstance(value, list):
        return "input_list"
    return "input_token_ids" if isinstance(value, dict | TokenInput) else None


OneInput = Annotated[
    Annotated[Text, Tag("input_text")] | Annotated[TokenInput, Tag("input_token_ids")],
    Discriminator(
        kind_of_input,
        custom_error_type="input_type",
        custom_error_message="must be a string or {'token_ids': [...]}",
    ),
]
Inputs = Annotated[
    Annotated[Text, Tag("input_text")]
    | Annotated[TokenInput, Tag("input_token_ids")]
    | Annotated[Annotated[list[OneInput], Field(max_length=MAX_LIST, fail_fast=True)], Tag("input_list")],
    Discriminator(
        kind_of_input,
        custom_error_type="input_type",
        custom_error_message="must be a string, {'token_ids': [...]}, or a list of these",
    ),
]


class LateChunking(Strict):
    """Embeddings of parts of a document, each pooled from token vectors that have seen the whole document.

    Either ``chunk_tokens`` (with ``overlap``), counted in tokens as processed, special tokens included; or
    ``spans``, [first, end) in characters of the text.
    """

    chunk_tokens: int | None = Field(None, ge=1, le=MAX_TOKEN_IDS)
    overlap: int = Field(0, ge=0, le=MAX_TOKEN_IDS, description="tokens shared by neighbouring chunks")
    spans: list[Annotated[list[int], Field(min_length=2, max_length=2)]] | None = Field(
        None,
        min_length=1,
        max_length=MAX_LIST,
        fail_fast=True,
        description="character ranges [first, end)",
    )


class EncodeRequest(Strict):
    model: ModelName | None = Field(None, description="may be left out where one model alone can encode")
    input: Inputs
    attention: AttentionSpec | None = None
    input_type: Literal["query", "document"] | None = Field(None, description="adds the model's own prefix")
    pooling: Literal["mean", "cls", "last", "none"] | None = Field(
        None, description="the model's own by default"
    )
    normalize: bool = True
    dimensions: int | None = Field(None, ge=1, le=1 << 20, description="keep the first ones and renormalise")
    truncate: Truncate = "error"
    late_chunking: LateChunking | None = None
    priority: Priority = 0
    timeout_ms: TimeoutMs | None = None
    cache_salt: Salt | None = Field(None, description=NO_SALT)
    include_stats: bool = True


class GenerateRequest(Strict):
    model: ModelName | None = Field(None, description="may be left out where one model alone can generate")
    prompt: OneInput
    max_new_tokens: int = Field(128, ge=1, le=1 << 20)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(None, ge=1, le=1 << 20)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    seed: Seed = 0
    n: int = Field(1, ge=1, le=8)
    logprobs: int | None = Field(None, ge=0, le=20)
    stream: bool = False
    attention: AttentionSpecOrPair | None = None
    truncate: Truncate = "error"
    priority: Priority = 0
    timeout_ms: TimeoutMs | None = None
    cache_salt: Salt | None = Field(None, description=SALT)
    include_stats: bool = True


class ScoreRequest(Strict):
    model: ModelName | None = Field(None, description="may be left out where one model alone can score")
    input: OneInput
    attention: AttentionSpec | None = None
    priority: Priority = 0
    timeout_ms: TimeoutMs | None = None
    cache_salt: Salt | None = Field(None, description=NO_SALT)
    include_stats: bool = True


class EstimateRequest(Strict):
    """What a request would take under one attention or several. Nothing is run."""

    model: ModelName | None = Field(None, description="may be left out where one model alone is served")
    input: OneInput
    max_new_tokens: int = Field(0, ge=0, le=1 << 20, description="0: the input is read, nothing is generated")
    attention: AttentionSpecOrPairOrList | None = None
    truncate: Truncate = "error"
    timeout_ms: TimeoutMs | None = None
    cache_salt: Salt | None = Field(None, description=SALT)


class LoadRequest(Strict):
    """A model to load while the server serves."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=128)]
    source: Annotated[str, StringConstraints(min_length=1, max_length=4096)] = Field(
        description="a directory, a hub id, a GGUF file, or the name of a demo model"
    )


class TokenizeRequest(Strict):
    model: ModelName | None = Field(None, description="may be left out where one model alone is served")
    input: Text | Annotated[list[Text], Field(max_length=MAX_LIST)]
    special_tokens: bool = True
