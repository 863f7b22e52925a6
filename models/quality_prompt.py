"""A document read under a choice, as a server reads a prompt: chunk by chunk, timed up to its last logits.

    time to first token = sum of the steps of the prompt, the last of which gives the logits of its last row

Where the text is scored too, the head runs over the other rows aside, off the clock: one reading gives time
and perplexity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from kernels.math.cache import DRAWS
from models.contract import Choice, Kept, Meter, SequenceState, Slice, Want, Work
from models.quality_answers import Answers, ask
from models.quality_facts import Document
from models.quality_perplexity import SKIPPED_TOKENS, Change, change_of
from models.quality_record import chunks
from models.runner import Model


@dataclass(frozen=True)
class PromptReading:
    """``scores`` [T]: log-likelihood of every next token, where asked for."""

    seconds: float
    work: Work
    scores: Tensor | None


@dataclass(frozen=True)
class Outcome:
    """A document read under one choice: what it costs, what it scores, what is remembered, and what a guard
    saw."""

    reading: PromptReading
    answers: Answers
    kept: tuple[Kept, ...]


def read_prompt(
    model: Model,
    sequence: SequenceState,
    token_ids: Sequence[int],
    choice: Choice,
    chunk_tokens: int,
    *,
    scored: bool = False,
    meter: Meter | None = None,
) -> PromptReading:
    """Read all of ``token_ids`` but the last, which is only predicted. Random keys that an earlier reading
    left behind are drawn again."""
    DRAWS.clear()
    tokens, seconds, work, scores = len(token_ids) - 1, 0.0, Work(), []
    for rows in chunks(tokens, chunk_tokens):
        s = _slice(sequence, token_ids[rows], choice, tokens, rows.stop == tokens, scored, meter)
        began = perf_counter()
        result = model.step([s]).results[0]
        seconds += perf_counter() - began
        work.then(result.work)
        if result.hidden is not None:
            scores.append(_scores(model, result.hidden, token_ids[rows.start + 1 : rows.stop + 1]))
    return PromptReading(seconds, work, torch.cat(scores) if scores else None)


def _slice(
    sequence: SequenceState,
    token_ids: Sequence[int],
    choice: Choice,
    total: int,
    last: bool,
    scored: bool,
    meter: Meter | None,
) -> Slice:
    want: Want = "hidden" if scored else "logits" if last else "nothing"
    logit_rows = (len(token_ids) - 1,) if scored and last else ()
    return Slice(sequence, token_ids, choice, want, total, meter=meter, logit_rows=logit_rows)


@torch.inference_mode()
def _scores(model: Model, hidden: Tensor, targets: Sequence[int]) -> Tensor:
    """hidden [n, E] as the step gave it -> log-likelihood [n] of ``targets``."""
    network = model._network
    assert network.head is not None, "refused before anything is read"
    told = torch.tensor(list(targets), dtype=torch.int64, device=hidden.device)
    return network.head.scores(hidden.to(network.body.dtype), told)


def read_document(
    model: Model, document: Document, choice: Choice, chunk_tokens: int, meter: Meter | None = None
) -> Outcome:
    """Read, score and ask."""
    sequence = model.open(document.prompt_tokens)
    try:
        reading = read_prompt(
            model, sequence, document.token_ids, choice, chunk_tokens, scored=True, meter=meter
        )
        return Outcome(reading, ask(model, sequence, document), sequence.kept)
    finally:
        sequence.close()


def change(document: Document, reading: PromptReading, exact: PromptReading) -> Change:
    """Of the perplexity over the text's own tokens: planted ones are not counted. ValueError where none is
    left after the first ``SKIPPED_TOKENS``."""
    assert reading.scores is not None and exact.scores is not None
    counted = ~torch.tensor(document.planted[1:], device=reading.scores.device)
    counted[:SKIPPED_TOKENS] = False
    if not counted.any():
        raise ValueError(f"{document.told} leaves no token to score after the first {SKIPPED_TOKENS}")
    return change_of(reading.scores[counted], exact.scores[counted])


def timed(
    model: Model, token_ids: Sequence[int], choice: Choice, chunk_tokens: int, scored: bool = False
) -> PromptReading:
    """Read once and let go. To be held against a scored reading it must be scored too: the head's logits pass
    through the caches between two steps, and slow the next one."""
    sequence = model.open(len(token_ids) - 1)
    try:
        return read_prompt(model, sequence, token_ids, choice, chunk_tokens, scored=scored)
    finally:
        sequence.close()
