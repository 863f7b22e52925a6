"""What the engine runs: one sequence of one request, from its tokens to its outcome.

A sequence says which ``Slice`` comes next and takes in its result. The scheduler sees only its ``Entry``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models.contract import (
    Choice,
    Kept,
    Meter,
    Prompt,
    SequenceState,
    Slice,
    SliceResult,
    Tokenizer,
    Want,
    Work,
)
from models.errors import NonFiniteOutput, all_finite
from models.planned import Planned
from service.chosen import is_guarded
from service.measured import Effort
from service.sampling import Sampled, Sampler, SamplingParams
from service.schedule import Entry
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
        self.salt = ""
        """Only prompts of the same salt share cached beginnings."""
        self.cached_tokens = 0
        """Tokens of the prompt that the cache held and nobody had to read again."""
        self.prefill_meter: Meter | None = None
        """Measures how wrong its attention is over the prompt; None where nobody wants to know, or where
        another sequence reads the prompt."""
        self.decode_meter: Meter | None = None
        """The same of the tokens that it generates."""
        self.effort = Effort()
        """What its meters are expected to take."""
        self.kept: tuple[Kept, ...] = ()
        """What the guard of its prompt saw, once it is finished."""
        self.estimated_bytes = 0
        self.exact_bytes = 0
        self.output_bytes = 0
        """Part of both estimates that stays until the whole request ends."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens that the model reads before it decodes."""
        return len(self.token_ids)

    @property
    def capacity(self) -> int:
        return len(self.token_ids)

    @property
    def kept_vectors(self) -> int:
        """Vectors [E] in fp32, one for each of so many tokens, that are kept for the answer."""
        return 0

    @property
    def held_bytes(self) -> int:
        """Bytes held now between steps: the cache, and what is kept for the answer."""
        return self.state.held_bytes if self.state is not None else 0

    @property
    def prompt(self) -> Prompt | None:
        """What may be taken from the cache instead of being read; None where every row is needed."""
        return None

    @property
    def decode_choice(self) -> Choice:
        """Attention under which single tokens are read after the prompt."""
        return self.choice

    def next_slice(self, state: SequenceState, tokens: int) -> Slice:
        """The next ``tokens`` of the prompt."""
        ids = self.token_ids[state.length : state.length + tokens]
        want, total = self.want(state.length, tokens), len(self.token_ids)
        return Slice(state, ids, self.choice, want, total, meter=self.prefill_meter)

    @abstractmethod
    def want(self, start: int, tokens: int) -> Want:
        """What a step that reads so many tokens of the prompt from ``start`` on must return."""

    @abstractmethod
    def accept(self, result: SliceResult, read: int) -> TokenOut | None:
        """Take in a step's result; ``read`` prompt tokens have been read in all."""

    def close(self) -> None:
        if self.state is not None:
            if self.finished and is_guarded(self.choice):
                self.kept = self.state.kept
            self.state.close()
            self.state = None


class EncodeSequence(Sequence):
    """Pools the hidden states [n, E] of its tokens as they come, so that one vector is left of a finished
    input; ``pooling`` "none" keeps them all, in fp32. A causal model reads it in chunks."""

    def __init__(
        self, index: int, token_ids: list[int], choice: Choice, *, chunkable: bool, pooling: str
    ) -> None:
        super().__init__(index, token_ids, choice)
        self.chunkable = chunkable
        self._pooling = pooling
        self._rows = 0
        self._kept: Tensor | None = None

    @property
    def kept_vectors(self) -> int:
        return len(self.token_ids) if self._pooling == "none" else 0

    @property
    def held_bytes(self) -> int:
        width = 0 if self._kept is None else self._kept.shape[-1] * self._kept.itemsize
        return super().held_bytes + width * (self._rows if self._pooling == "none" else 1)

    def want(self, start: int, tokens: int) -> Want:
        ends = start + tokens >= len(self.token_ids)
        return "hidden" if ends or self._pooling != "last" else "nothing"

    def accept(self, result: SliceResult, read: int) -> TokenOut | None:
        self.prefill_work.then(result.work)
        if result.hidden is not None:
            self._take(_finite(result.hidden, "hidden states"))
        self.finished = read >= len(self.token_ids)
        return None

    def _take(self, hidden: Tensor) -> None:
        """The next rows [r, E] of the input."""
        first, self._rows = self._rows, self._rows + len(hidden)
        if self._pooling == "none":
            if self._kept is None:
                self._kept = torch.empty(len(self.token_ids), hidden.shape[1])
            self._kept[first : self._rows] = hidden
        elif self._pooling == "mean":
            total = hidden.sum(0, keepdim=True, dtype=torch.float64).cpu()
            self._kept = total if self._kept is None else self._kept + total
        elif self._pooling == "last" or self._kept is None:
            row = hidden[-1:] if self._pooling == "last" else hidden[:1]
            self._kept = row.to("cpu", torch.float32).clone()

    @property
    def hidden(self) -> Tensor:
        """[n, E] fp32 where nothing is pooled, else the pooled [1, E]."""
        assert self._kept is not None and self.finished, "the input has not been read yet"
        return (self._kept / self._rows).float() if self._pooling == "mean" else self._kept


class ScoreSequence(Sequence):
    """Log-likelihood of every token given those before it. The last token is a target only: it is read where
    ``reads_last`` says so, and under a plan: its guard sees the whole of a prompt, and what is replayed has
    the same rows."""

    def __init__(self, token_ids: list[int], choice: Choice, *, reads_last: bool = False) -> None:
        super().__init__(0, token_ids, choice)
        self.scores: list[float] = []
        self._reads_last = reads_last or isinstance(choice, Planned)

    @property
    def prompt_tokens(self) -> int:
        return len(self.token_ids) - (not self._reads_last)

    def next_slice(self, state: SequenceState, tokens: int) -> Slice:
        start, end = state.length, state.length + tokens
        targets = self.token_ids[start + 1 : end + 1]
        if len(targets) < tokens:  # what follows the last token is not known: that score is thrown away
            targets = [*targets, self.token_ids[-1]]
        total = len(self.token_ids)
        ids, meter = self.token_ids[start:end], self.prefill_meter
        return Slice(state, ids, self.choice, "scores", total, targets, meter)

    def want(self, start: int, tokens: int) -> Want:
        return "scores"

    def accept(self, result: SliceResult, read: int) -> TokenOut | None:
        self.prefill_work.then(result.work)
        if result.scores is not None:
            self.scores.extend(_finite(result.scores, "scores").tolist())
        self.finished = read >= self.prompt_tokens
        if self.finished and self._reads_last:
            self.scores.pop()
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
        self._decode_choice = decode
        self.leader: GenerateSequence | None = None
        """The choice that reads the prompt for this one too; None where it reads for itself."""
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
    def prompt(self) -> Prompt | None:
        return None if is_guarded(self.choice) else Prompt(self.token_ids, self.choice, self.salt)

    @property
    def decode_choice(self) -> Choice:
        return self._decode_choice

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)

    def next_slice(self, state: SequenceState, tokens: int) -> Slice:
        if not self.tokens:
            return super().next_slice(state, tokens)
        last = [self.tokens[-1].token_id]
        total, meter = len(self.token_ids), self.decode_meter
        return Slice(state, last, self.decode_choice, "logits", total, meter=meter)

    def want(self, start: int, tokens: int) -> Want:
        return "logits" if start + tokens >= len(self.token_ids) else "nothing"

    def accept(self, result: SliceResult, read: int) -> TokenOut | None:
        (self.decode_work if self.tokens else self.prefill_work).then(result.work)
        return None if result.logits is None else self.draw(result.logits)

    def draw(self, logits: Tensor) -> TokenOut:
        """The next token, from logits [V] fp32."""
        sampled = self._sampler.sample(_finite(logits, "logits"))
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
    if not all_finite(values):
        raise NonFiniteOutput(0, what)
    return values
