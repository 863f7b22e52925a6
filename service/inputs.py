"""From what a client sent to the tokens a model reads. Nothing is cut unless ``truncate`` asks, and what is
cut is counted. Runs in a worker thread: tokenising a long document takes seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from models.contract import ModelInfo, ServedModel
from service.errors import ApiError, invalid
from service.schemas import TokenInput, Truncate
from service.settings import Settings

MAX_CHARS_PER_TOKEN = 64
"""No text of ordinary tokens is longer: beyond this many characters per token of context, an input cannot
fit."""


@dataclass(frozen=True)
class Tokens:
    """``char_spans`` (empty for token-id inputs) are positions in the client's own text; ``(0, 0)`` for
    special tokens and the model's prefix."""

    token_ids: list[int]
    char_spans: list[tuple[int, int]]
    truncated_tokens: int = 0
    text: str | None = None
    leading_tokens: int = 0
    """Tokens before the client's own text where the model's prefix was put there: truncation keeps them."""


@dataclass(frozen=True)
class Reading:
    """How inputs of one request become tokens: the room there is, what may be cut, and what is put before."""

    model: ServedModel
    settings: Settings
    max_tokens: int
    truncate: Truncate = "error"
    prefix: str = ""
    special_tokens: bool = True
    reserved: str = ""
    """Said in errors where part of the context is kept for something else."""
    may_truncate: bool = True
    """Whether the request has the field ``truncate`` at all."""

    def read(self, source: str | TokenInput, path: str) -> Tokens:
        tokens = (
            self._of_text(source, path) if isinstance(source, str) else self._of_ids(source.token_ids, path)
        )
        return self._fit(tokens, path)

    def read_all(self, sources: Sequence[str | TokenInput], path: str, *, many: bool) -> list[Tokens]:
        return [self.read(source, f"{path}[{i}]" if many else path) for i, source in enumerate(sources)]

    def _of_text(self, text: str, path: str) -> Tokens:
        if not text:
            raise ApiError("empty_input", f"{path} is empty; send at least one character.", param=path)
        self._check_chars(text, path)
        encoding = self.model.tokenizer.encode(self.prefix + text, special_tokens=self.special_tokens)
        if not encoding.token_ids:
            raise ApiError("empty_input", f"{path} has no tokens; send other text.", param=path)
        spans = _without_prefix(encoding.char_spans, len(self.prefix))
        leading = next((i for i, span in enumerate(spans) if span != (0, 0)), len(spans))
        return Tokens(
            list(encoding.token_ids), spans, text=text, leading_tokens=leading if self.prefix else 0
        )

    def _of_ids(self, token_ids: list[int], path: str) -> Tokens:
        if not token_ids:
            raise ApiError("empty_input", f"{path}.token_ids is empty; send at least one token.", param=path)
        if self.prefix:
            raise invalid(
                f"{path}: input_type adds a text prefix, so it needs text, not token ids", "input_type"
            )
        vocab_size = self.model.tokenizer.vocab_size
        if max(token_ids) >= vocab_size:
            where = f"{path}.token_ids[{next(i for i, token in enumerate(token_ids) if token >= vocab_size)}]"
            detail = f"{where}: the model's vocabulary has {vocab_size:,} tokens, ids 0 to {vocab_size - 1:,}"
            raise invalid(detail, where, vocab_size=vocab_size)
        return Tokens(list(token_ids), [])

    def _check_chars(self, text: str, path: str) -> None:
        possible = self.max_tokens * MAX_CHARS_PER_TOKEN
        cutting = self.truncate != "error"
        limit = self.settings.max_input_chars if cutting else min(possible, self.settings.max_input_chars)
        if len(text) <= limit:
            return
        detail = (
            f"{path} has {len(text):,} characters; the limit is {limit:,} for model {self.model.info.name!r}"
            + (
                ""
                if cutting
                else f" with its {self.max_tokens:,} tokens of context; split it"
                + (" or ask for 'truncate'" if self.may_truncate else "")
            )
        )
        limits = {"max_chars": limit, "chars": len(text), "max_tokens": self.max_tokens}
        raise ApiError("context_length_exceeded", detail + ".", param=path, limits=limits)

    def _fit(self, tokens: Tokens, path: str) -> Tokens:
        length, limit = len(tokens.token_ids), self.max_tokens
        if length <= limit:
            return tokens
        if self.truncate == "error" or limit < 1:
            asking = ", or ask for 'truncate': 'end' or 'start'" if self.may_truncate else ""
            detail = (
                f"{path} has {length:,} tokens; the limit of model {self.model.info.name!r} is {limit:,}"
                f"{self.reserved}. Shorten it{asking}."
            )
            limits = {"max_tokens": limit, "tokens": length}
            raise ApiError("context_length_exceeded", detail, param=path, limits=limits)
        keep = kept_positions(tokens, self.model.info, limit, self.truncate)
        if not keep:
            taken = tokens.leading_tokens
            detail = (
                f"{path}: the prefix of input_type takes {taken:,} of the {limit:,} tokens of model "
                f"{self.model.info.name!r} and leaves no room for text; leave input_type out"
            )
            raise invalid(detail, "input_type", max_tokens=limit, prefix_tokens=taken)
        ids = [tokens.token_ids[i] for i in keep]
        spans = [tokens.char_spans[i] for i in keep] if tokens.char_spans else []
        return Tokens(ids, spans, length - len(ids), tokens.text, tokens.leading_tokens)


def kept_positions(tokens: Tokens, info: ModelInfo, limit: int, truncate: Truncate) -> list[int]:
    """Positions that stay: special tokens that the tokenizer put around the text, the model's prefix, then
    the text's start or end. [] where these leave no room for text."""
    length, special = len(tokens.token_ids), set(info.special_token_ids)

    def added(i: int) -> bool:
        return bool(tokens.char_spans) and tokens.char_spans[i] == (0, 0) and tokens.token_ids[i] in special

    head = tokens.leading_tokens or (1 if added(0) and limit > 2 else 0)
    tail = 1 if added(length - 1) and limit > 2 else 0
    room = limit - head - tail
    if room < 1:
        return []
    body = range(head, head + room) if truncate == "end" else range(length - tail - room, length - tail)
    return [*range(head), *body, *range(length - tail, length)]


def _without_prefix(spans: Sequence[tuple[int, int]], prefix_chars: int) -> list[tuple[int, int]]:
    if not prefix_chars:
        return list(spans)
    return [(max(a - prefix_chars, 0), max(b - prefix_chars, 0)) for a, b in spans]
