"""From a request's sampling fields to sequences, and from finished sequences to choices: shared by
``/v1/generate`` and the OpenAI routes."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

from models.contract import ServedModel, Tokenizer
from service.answers import Attended, Choice, Logprobs, TopLogprob
from service.attention import SpecPair, choose
from service.errors import invalid
from service.inputs import Tokens
from service.sampling import SamplingParams
from service.sequences import Ending, GenerateSequence, TokenOut
from service.settings import Settings


@dataclass(frozen=True)
class Wanted:
    """What to generate, however it was asked for."""

    max_new_tokens: int
    sampling: SamplingParams
    stops: tuple[str, ...]
    n: int = 1


def attended_pair(pair: SpecPair, model: ServedModel, *, decodes: bool = True) -> Attended:
    """Attention of prefill and of decode on this model."""
    decode = choose(pair.decode, model, decodes=decodes)
    alike = pair.prefill is pair.decode
    return Attended(decode if alike else choose(pair.prefill, model), decode, pair.split)


def sequences_of(
    prompts: list[Tokens], wanted: Wanted, model: ServedModel, attended: Attended, salt: str = ""
) -> list[GenerateSequence]:
    """``n`` sequences a prompt, in order; choice i draws from stream (seed, i). The first of a prompt's
    sequences leads: it reads the prompt, the others go on from what it has read."""
    ending = Ending(wanted.max_new_tokens, wanted.stops, frozenset(model.info.eos_token_ids))
    decode = attended.decode.choice
    sequences: list[GenerateSequence] = []
    for place, prompt in enumerate(prompts):
        prefill = attended.prefill.of(place).choice
        leader: GenerateSequence | None = None
        for _ in range(wanted.n):
            i = len(sequences)
            sequence = GenerateSequence(
                i, prompt.token_ids, prefill, decode, model.tokenizer, wanted.sampling, ending
            )
            sequence.salt, sequence.leader = salt, leader
            leader = leader or sequence
            sequences.append(sequence)
    return sequences


def stops_of(stop: str | list[str] | None) -> tuple[str, ...]:
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


def check_new_tokens(asked: int, limit: int, model: ServedModel, param: str) -> None:
    """``asked`` must leave room for a prompt and stay below the server's limit."""
    bound = min(limit, model.info.max_tokens - 1)
    if asked > bound:
        raise invalid(f"{param} must be at most {bound} for model {model.info.name!r}", param, le=bound)


def check_output(choices: int, wanted: Wanted, settings: Settings, param: str) -> None:
    """400 where the answer could hold more numbers than ``max_output_values``: a token is one, its
    log-probability and each alternative's add three."""
    top = wanted.sampling.logprobs
    values = choices * wanted.max_new_tokens * (1 if top is None else 4 + 3 * top)
    if values > settings.max_output_values:
        limit = settings.max_output_values
        named = param if top is None else "logprobs"
        detail = (
            f"the answer could hold {values:,} numbers ({choices} choices of {wanted.max_new_tokens:,} tokens"
            f"{'' if top is None else f' with {top} alternatives each'}); the limit is {limit:,} "
            f"(max_output_values). Ask for fewer choices, a smaller {param} or fewer logprobs"
        )
        raise invalid(detail, named, max_output_values=limit, values=values)


def num_values(sequences: Items[GenerateSequence]) -> int:
    """Numbers that an answer of these holds, counted as ``check_output`` does."""
    return sum(
        1 if token.sampled.logprob is None else 4 + 3 * len(token.sampled.top)
        for sequence in sequences
        for token in sequence.tokens
    )


def choice_of(sequence: GenerateSequence, tokenizer: Tokenizer, truncated_tokens: int) -> Choice:
    return Choice(
        index=sequence.index,
        text=sequence.text,
        finish_reason=sequence.finish_reason,
        logprobs=logprobs_of(sequence.tokens, tokenizer),
        truncated_tokens=truncated_tokens,
    )


def logprobs_of(tokens: list[TokenOut], tokenizer: Tokenizer) -> Logprobs | None:
    """The table of log-probabilities; None where none were asked for."""
    if not tokens or tokens[0].sampled.logprob is None:
        return None
    return Logprobs(
        tokens=[tokenizer.token_text(token.token_id) for token in tokens],
        token_ids=[token.token_id for token in tokens],
        token_logprobs=[token.sampled.logprob or 0.0 for token in tokens],
        top_logprobs=[
            [
                TopLogprob(token=tokenizer.token_text(token_id), token_id=token_id, logprob=logprob)
                for token_id, logprob in token.sampled.top
            ]
            for token in tokens
        ],
    )
