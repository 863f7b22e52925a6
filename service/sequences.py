"""What the engine runs: one sequence of one request, from its tokens to its outcome.

A sequence says which ``Slice`` comes next and takes in its result. The scheduler sees only its ``Entry``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models.contract import Choice, SequenceState, Slice, SliceResult, Tokenizer, Want, Work
from models.errors import NonFiniteOutput
from service.sampling import Sampled, Sampler, SamplingParams
from service.scheduler import Entry
from service.text_stream import Detokeniser, StopFinder


@dataclass(frozen=True)
class TokenOut:
    """One generated token of choice ``index``; ``text`` is what may be shown by now."""

    index: int
    token_id: int
    text: str
    sampled: Sampled


class Sequence(ABC):
    """Tokens of one input, its state in the model, and the work done so far."""

    chunkable = True

    def __init__(self, index: int, token_ids: list[int], choice: Choice) -> None:
        self.index = index
        self.token_ids = token_ids
        self.choice = choice
        self.prefill_work = Work()
        self.decode_work = Work()
        self.state: SequenceState | None = None
        self.entry: Entry | None = None
        self.finished = False
        self.estimated_bytes = 0
        self.exact_bytes = 0

    @property
    def prompt_tokens(self) -> int:
        """Tokens that the model reads before it decodes."""
        return len(self.token_ids)

    @property
    def capacity(self) -> int:
        return len(self.token_ids)

    def next_slice(self, state: SequenceState, tokens: int) -> Slice:
        """The next ``tokens`` of the prompt."""
        ids = self.token_ids[state.length : state.length + tokens]
        return Slice(state, ids, self.choice, self._want(state.length, tokens), total=len(self.token_ids))

    @abstractmethod
    def _want(self, start: int, tokens: int) -> Want: ...

    @abstractmethod
    def accept(self, result: SliceResult, read: int) -> TokenOut | None:
        """Take in a step's result; ``read`` prompt tokens have been read in all."""

    def close(self) -> None:
        if self.state is not None:
            self.state.close()
            self.state = None


class EncodeSequence(Sequence):
    """Collects hidden states [n, E] fp32 of its tokens. A causal model reads it in chunks."""

    def __init__(
        self, index: int, token_ids: list[int], choice: Choice, *, chunkable: bool, last_only: bool
    ) -> None:
        super().__init__(index, token_ids, choice)
        self.chunkable = chunkable
        self._last_only = last_only
        self._parts: list[Tensor] = []

    def _want(self, start: int, tokens: int) -> Want:
        ends = start + tokens >= len(self.token_ids)
        return "hidden" if ends or not self._last_only else "nothing"

    def accept(self, result: SliceResult, read: int) -> TokenOut | None:
        self.prefill_work.add(result.work)
        if result.hidden is not None:
            hidden = _finite(result.hidden, "hidden states")
            self._parts.append((hidden[-1:] if self._last_only else hidden).to("cpu", torch.float32).clone())
        self.finished = read >= len(self.token_ids)
        return None

    @property
    def hidden(self) -> Tensor:
        """[n, E], or [1, E] where only the last token was wanted."""
        return torch.cat(self._parts)


class ScoreSequence(Sequence):
    """Log-likelihood of every token given those before it. The last token is a target only: it is not
    read."""

    def __init__(self, token_ids: list[int], choice: Choice) -> None:
        super().__init__(0, token_ids, choice)
        self.scores: list[float] = []

    @property
    def prompt_tokens(self) -> int:
        return len(self.token_ids) - 1

    def next_slice(self, state: SequenceState, tokens: int) -> Slice:
        start, end = state.length, state.length + tokens
        targets = self.token_ids[start + 1 : end + 1]
        total = len(self.token_ids)
        return Slice(state, self.token_ids[start:end], self.choice, "scores", total=total, targets=targets)

    def _want(self, start: int, tokens: int) -> Want:
        return "scores"

    def accept(self, result: SliceResult, read: int) -> TokenOut | None:
        self.prefill_work.add(result.work)
        if result.scores is not None:
            self.scores.extend(_finite(result.scores, "scores").tolist())
        self.finished = read >= self.prompt_tokens
        return None


@dataclass(frozen=True)
class Ending:
    """When generation ends."""

    max_new_tokens: int
    stops: tuple[str, ...]
    eos_token_ids: frozenset[int]


class GenerateSequence(Sequence):
    """Reads its prompt, then decodes token by token until eos, a stop string or ``max_new_tokens``."""

    def __init__(
        self,
        index: int,
        token_ids: list[int],
        prefill: Choice,
        decode: Choice,
        tokenizer: Tokenizer,
        sampling: SamplingParams,
        ending: Ending,
    ) -> None:
        super().__init__(index, token_ids, prefill)
        self.decode_choice = decode
        self.tokenizer = tokenizer
        self.tokens: list[TokenOut] = []
        self.finish_reason: Literal["stop", "length"] = "length"
        self._sampler = Sampler(sampling, index)
        self._detokeniser = Detokeniser(tokenizer)
        self._stops = StopFinder(ending.stops)
        self._ending = ending

    @property
    def capacity(self) -> int:
        return len(self.token_ids) + self._ending.max_new_tokens

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)

    def next_slice(self, state: SequenceState, tokens: int) -> Slice:
        if not self.tokens:
            return super().next_slice(state, tokens)
        last = [self.tokens[-1].token_id]
        return Slice(state, last, self.decode_choice, "logits", total=len(self.token_ids))

    def _want(self, start: int, tokens: int) -> Want:
        return "logits" if start + tokens >= len(self.token_ids) else "nothing"

    def accept(self, result: SliceResult, read: int) -> TokenOut | None:
        (self.decode_work if self.tokens else self.prefill_work).add(result.work)
        if result.logits is None:
            return None
        sampled = self._sampler.sample(_finite(result.logits, "logits"))
        token = TokenOut(self.index, sampled.token_id, self._shown(sampled.token_id), sampled)
        self.tokens.append(token)
        return token

    def _shown(self, token_id: int) -> str:
        """Text that this token makes visible; decides whether generation ends with it."""
        ended = token_id in self._ending.eos_token_ids
        text = "" if ended else self._stops.push(self._detokeniser.push(token_id))
        full = len(self.tokens) + 1 >= self._ending.max_new_tokens
        if ended or self._stops.stopped or full:
            self.finished = True
            text += self._stops.push(self._detokeniser.finish()) + self._stops.finish()
            self.finish_reason = "stop" if ended or self._stops.stopped else "length"
        return text


def _finite(values: Tensor, what: str) -> Tensor:
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteOutput(0, what)
    return values
