"""Answers and stream chunks of the OpenAI text routes."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field

from models.contract import Tokenizer
from service.answers import AttentionUsed, Stats, Usage
from service.jobs import Job
from service.sequences import GenerateSequence, TokenOut
from service.streams import EventFormat, event


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class ChatTopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(ChatTopLogprob):
    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatTokenLogprob]
    refusal: None = None


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"]


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class OpenAIUsage(Usage):
    """``cached_tokens`` where OpenAI's SDK looks for it too."""

    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, usage: Usage) -> OpenAIUsage:
        details = PromptTokensDetails(cached_tokens=usage.cached_tokens)
        return cls(**usage.model_dump(), prompt_tokens_details=details)


class _Answer(BaseModel):
    id: str
    created: int
    model: str
    usage: OpenAIUsage
    attention: AttentionUsed
    stats: Stats = Field(description="an extension: where the time went")


class CompletionAnswer(_Answer):
    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class ChatAnswer(_Answer):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class Shape(ABC):
    """What differs between completions and chat."""

    prefix: ClassVar[str]
    chunk_object: ClassVar[str]

    @abstractmethod
    def answer(
        self, job: Job, sequences: Items[GenerateSequence], created: int, measured: dict[str, Any]
    ) -> BaseModel: ...

    @abstractmethod
    def delta(self, sequence: GenerateSequence, token: TokenOut, first: bool, offset: int) -> dict[str, Any]:
        """The choice of one stream chunk, without its finish_reason."""

    @abstractmethod
    def ended(self, index: int) -> dict[str, Any]:
        """The choice of the chunk that carries only finish_reason."""


class CompletionShape(Shape):
    prefix = "cmpl-"
    chunk_object = "text_completion"

    def answer(
        self, job: Job, sequences: Items[GenerateSequence], created: int, measured: dict[str, Any]
    ) -> BaseModel:
        choices = [
            CompletionChoice(
                index=sequence.index,
                text=sequence.text,
                logprobs=self._logprobs(sequence.tokens, job.model.tokenizer, 0),
                finish_reason=sequence.finish_reason,
            )
            for sequence in sequences
        ]
        return CompletionAnswer(
            id=job.id, created=created, model=job.model.info.name, choices=choices, **measured
        )

    def delta(self, sequence: GenerateSequence, token: TokenOut, first: bool, offset: int) -> dict[str, Any]:
        logprobs = self._logprobs([token], sequence.tokenizer, offset)
        return {
            "index": token.index,
            "text": token.text,
            "logprobs": None if logprobs is None else logprobs.model_dump(),
        }

    def ended(self, index: int) -> dict[str, Any]:
        return {"index": index, "text": "", "logprobs": None}

    def _logprobs(
        self, tokens: Items[TokenOut], tokenizer: Tokenizer, offset: int
    ) -> CompletionLogprobs | None:
        if not tokens or tokens[0].sampled.logprob is None:
            return None
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token.text)
        return CompletionLogprobs(
            tokens=[tokenizer.token_text(token.token_id) for token in tokens],
            token_logprobs=[token.sampled.logprob or 0.0 for token in tokens],
            top_logprobs=[
                {tokenizer.token_text(i): value for i, value in token.sampled.top} for token in tokens
            ],
            text_offset=offsets,
        )


class ChatShape(Shape):
    prefix = "chatcmpl-"
    chunk_object = "chat.completion.chunk"

    def answer(
        self, job: Job, sequences: Items[GenerateSequence], created: int, measured: dict[str, Any]
    ) -> BaseModel:
        choices = [
            ChatChoice(
                index=sequence.index,
                message=ChatMessage(content=sequence.text),
                logprobs=self._logprobs(sequence.tokens, job.model.tokenizer),
                finish_reason=sequence.finish_reason,
            )
            for sequence in sequences
        ]
        return ChatAnswer(id=job.id, created=created, model=job.model.info.name, choices=choices, **measured)

    def delta(self, sequence: GenerateSequence, token: TokenOut, first: bool, offset: int) -> dict[str, Any]:
        logprobs = self._logprobs([token], sequence.tokenizer)
        delta = {"role": "assistant", "content": token.text} if first else {"content": token.text}
        told = None if logprobs is None else logprobs.model_dump()
        return {"index": token.index, "delta": delta, "logprobs": told}

    def ended(self, index: int) -> dict[str, Any]:
        return {"index": index, "delta": {}, "logprobs": None}

    def _logprobs(self, tokens: Items[TokenOut], tokenizer: Tokenizer) -> ChatLogprobs | None:
        if not tokens or tokens[0].sampled.logprob is None:
            return None
        return ChatLogprobs(content=[_chat_logprob(token, tokenizer) for token in tokens])


def _chat_logprob(token: TokenOut, tokenizer: Tokenizer) -> ChatTokenLogprob:
    def told(token_id: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.token_text(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}

    top = [ChatTopLogprob(**told(token_id, logprob)) for token_id, logprob in token.sampled.top]
    return ChatTokenLogprob(**told(token.token_id, token.sampled.logprob or 0.0), top_logprobs=top)


class OpenAIEvents(EventFormat):
    """``data:`` lines: a chunk per visible token, a chunk per choice with its finish_reason, ``[DONE]``.
    Attention and stats ride on the chunk of the last choice; usage comes in a chunk of its own where it was
    asked for."""

    def __init__(
        self,
        shape: Shape,
        job: Job,
        sequences: Items[GenerateSequence],
        created: int,
        measured: Callable[[], dict[str, Any]],
        include_usage: bool,
    ) -> None:
        self._shape, self._job, self._sequences = shape, job, sequences
        self._created, self._measured, self._include_usage = created, measured, include_usage
        self._offsets: dict[int, int] = {}

    def token(self, token: TokenOut) -> bytes:
        first = token.index not in self._offsets
        offset = self._offsets.get(token.index, 0)
        self._offsets[token.index] = offset + len(token.text)
        if not token.text and not first and token.sampled.logprob is None:
            return b""
        return self._chunk([self._shape.delta(self._sequences[token.index], token, first, offset)])

    def done(self) -> bytes:
        measured = {name: value.model_dump() for name, value in self._measured().items()}
        usage = measured.pop("usage")
        last = len(self._sequences) - 1
        chunks = []
        for i, sequence in enumerate(self._sequences):
            choice = {**self._shape.ended(sequence.index), "finish_reason": sequence.finish_reason}
            chunks.append(self._chunk([choice], **(measured if i == last else {})))
        if self._include_usage:
            chunks.append(self._chunk([], usage=usage))
        return b"".join([*chunks, event(None, "[DONE]")])

    def error(self, problem: dict[str, Any]) -> bytes:
        return event(None, json.dumps(problem)) + event(None, "[DONE]")

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        body: dict[str, Any] = {
            "id": self._job.id,
            "object": self._shape.chunk_object,
            "created": self._created,
            "model": self._job.model.info.name,
            "choices": [{"finish_reason": None, **choice} for choice in choices],
            **more,
        }
        if self._include_usage and "usage" not in body:
            body["usage"] = None
        return event(None, json.dumps(body, ensure_ascii=False, allow_nan=False))
