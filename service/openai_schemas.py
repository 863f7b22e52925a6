"""Requests of the OpenAI routes. Fields that change nothing here are accepted and named in a response
header; fields that would change the answer and are not implemented are refused, unless they hold their
neutral value."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StringConstraints, Tag

from service.attention_schema import AttentionSpec, AttentionSpecOrPair
from service.errors import invalid
from service.schemas import (
    MAX_LIST,
    MAX_SEED,
    NO_SALT,
    SALT,
    ModelName,
    Priority,
    Salt,
    Stop,
    Text,
    TimeoutMs,
    TokenIds,
)
from service.validation import shown_name

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}
"""Fields that would change the answer -> the values that do not (null never does)."""


class Lenient(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, frozen=True)

    def ignored(self) -> list[str]:
        """Names of fields that were sent and change nothing; 400 where one would have."""
        extra = self.model_extra or {}
        for name, value in extra.items():
            if (
                name in NEUTRAL
                and value is not None
                and not any(_same(value, neutral) for neutral in NEUTRAL[name])
            ):
                raise invalid(f"{name} is not supported by this server; leave it out", name)
        return sorted(shown_name(name).strip("'") for name in extra if name not in NEUTRAL)


def _same(value: Any, neutral: Any) -> bool:
    if isinstance(value, bool) != isinstance(neutral, bool):
        return False
    return bool(value == neutral)


def kind_of_openai_input(value: Any) -> str | None:
    """str | list[str] | list[int] | list[list[int]], told apart by the first element."""
    if isinstance(value, str):
        return "input_text"
    if not isinstance(value, list):
        return None
    if value and isinstance(value[0], int):
        return "input_token_ids"
    return "input_list"


def _kind_of_item(value: Any) -> str | None:
    if isinstance(value, str):
        return "input_text"
    return "input_token_ids" if isinstance(value, list) else None


_Item = Annotated[
    Annotated[Text, Tag("input_text")] | Annotated[TokenIds, Tag("input_token_ids")],
    Discriminator(
        _kind_of_item,
        custom_error_type="input_type",
        custom_error_message="must be a string or a list of token ids",
    ),
]
OpenAIInput = Annotated[
    Annotated[Text, Tag("input_text")]
    | Annotated[TokenIds, Tag("input_token_ids")]
    | Annotated[Annotated[list[_Item], Field(max_length=MAX_LIST, fail_fast=True)], Tag("input_list")],
    Discriminator(
        kind_of_openai_input,
        custom_error_type="input_type",
        custom_error_message="must be a string, a list of strings, a list of token ids, or a list of those",
    ),
]
Probability = Annotated[float, Field(gt=0, le=1)]


class EmbeddingsRequest(Lenient):
    model: ModelName
    input: OpenAIInput
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, le=1 << 20)
    user: str | None = Field(None, max_length=512)
    attention: AttentionSpec | None = None
    priority: Priority | None = None
    timeout_ms: TimeoutMs | None = None
    cache_salt: Salt | None = Field(None, description=NO_SALT)


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    include_usage: bool = False


class _Sampling(Lenient):
    model: ModelName
    temperature: float | None = Field(None, ge=0, le=2, description="1 by default, as OpenAI has it")
    top_p: Probability | None = None
    top_k: int | None = Field(None, ge=1, le=1 << 20)
    n: int | None = Field(None, ge=1, le=8)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    attention: AttentionSpecOrPair | None = None
    priority: Priority | None = None
    timeout_ms: TimeoutMs | None = None
    cache_salt: Salt | None = Field(None, description=SALT)
    prompt_cache_key: str | None = Field(
        None, max_length=512, description="OpenAI's field: what cache_salt is where that is not given"
    )
    user: str | None = Field(None, max_length=512)

    @property
    def salt(self) -> str:
        """Only requests of the same one share cached prefixes."""
        return self.cache_salt or self.prompt_cache_key or ""


class CompletionRequest(_Sampling):
    prompt: OpenAIInput
    max_tokens: int | None = Field(None, ge=1, le=1 << 20, description="16 by default, as OpenAI has it")
    logprobs: int | None = Field(None, ge=0, le=20)


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: Text


def _kind_of_content(value: Any) -> str | None:
    if isinstance(value, str):
        return "content_text"
    return "content_parts" if isinstance(value, list) else None


class Message(BaseModel):
    """Text only: a message with an image or a URL to fetch is refused."""

    model_config = ConfigDict(extra="allow", strict=True)
    role: Annotated[str, StringConstraints(pattern=r"^(system|developer|user|assistant)$")]
    content: Annotated[
        Annotated[Text, Tag("content_text")]
        | Annotated[
            Annotated[list[TextPart], Field(min_length=1, max_length=256, fail_fast=True)],
            Tag("content_parts"),
        ],
        Discriminator(
            _kind_of_content,
            custom_error_type="content_type",
            custom_error_message="must be a string or a list of text parts",
        ),
    ]

    def plain(self) -> dict[str, str]:
        """As chat templates take it; ``developer`` is OpenAI's newer word for ``system``."""
        content = (
            self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        )
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatRequest(_Sampling):
    messages: Annotated[list[Message], Field(min_length=1, max_length=1024, fail_fast=True)]
    max_tokens: int | None = Field(None, ge=1, le=1 << 20)
    max_completion_tokens: int | None = Field(
        None, ge=1, le=1 << 20, description="the newer name of max_tokens"
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
