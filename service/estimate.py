"""What a request would take, predicted from its sizes alone: bytes, and milliseconds of an otherwise idle
engine.

    prefill_ms = sum over pieces of (fixed + slice_ms(start, tokens))
    decode_ms  = sum over new tokens but the first of (fixed + slice_ms(position, 1))

The first new token comes out of the reading. A step that others share costs them its fixed part together, so
a busy engine does the same work in less time per request, and later."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kernels.registry import load
from models.contract import Choice, Flops, Prompt, ServedModel, Want
from models.meter import HELD_ROWS
from service.chosen import exact_choice, is_guarded
from service.cost import Basis, CostModel
from service.measured import Effort
from service.schedule import CHUNK_MULTIPLE

MAX_SAMPLES = 32
"""Decoded tokens that are priced one by one; where there are more, these stand for those between them."""

VERIFY_VECTORS = 24
"""Vectors of the model's width, in fp32, that a row takes while it is measured: query, both outputs and their
difference, running sums, stretches of logits, and what the output projection makes of them; as measured."""
HELD_VECTORS = 2
"""Query and output of a row that waits, in every layer, until enough of them are there."""
CLUSTERED = 2.0
"""A step may have so many times its part of the rows that are looked at."""
FP32_BYTES = 4

Slice = tuple[int, int]
"""(start, tokens)"""


@dataclass(frozen=True)
class Plan:
    """What would be read and generated under which attention, and in pieces of which size."""

    prefill: Choice
    decode: Choice
    tokens: int
    new_tokens: int
    chunk_tokens: int
    effort: Effort = Effort()
    """Of measuring its error."""


@dataclass(frozen=True)
class Predicted:
    """``prompt_ms`` prices what is to be read as one piece, as the lanes do; ``basis`` says what the
    numbers rest on."""

    cached_tokens: int
    prefill_ms: float
    decode_ms: float
    prompt_ms: float
    basis: Basis


def predict(model: ServedModel, costs: CostModel, plan: Plan, cached_tokens: int) -> Predicted:
    """Milliseconds of ``plan`` where ``cached_tokens`` of its prompt need not be read."""
    name, last = model.info.name, plan.tokens
    fixed = costs.fixed_ms(name)
    ends: Want = "logits" if model.info.causal else "hidden"

    def price(start: int, tokens: int) -> float:
        choice = plan.prefill if start < last else plan.decode
        share = plan.effort.prefill if start < last else plan.effort.decode
        want: Want = ends if start + tokens >= last else "nothing"
        own_ms = costs.price(name, choice.backend, model.flops(tokens, start, choice, want))
        return own_ms + verify_ms(model, costs, share, start, tokens)

    pieces = pieces_of(plan, cached_tokens, model.info.causal)
    decode_steps = max(plan.new_tokens - 1, 0)
    return Predicted(
        cached_tokens=cached_tokens,
        prefill_ms=sum(fixed + price(*piece) for piece in pieces),
        decode_ms=decode_steps * fixed + summed(lambda i: price(last + i, 1), decode_steps),
        prompt_ms=price(cached_tokens, last - cached_tokens),
        basis=costs.basis(name, plan.prefill.backend, plan.decode.backend),
    )


def verify_ms(model: ServedModel, costs: CostModel, share: float, start: int, tokens: int) -> float:
    """Of computing ``share`` of a slice's rows exactly beside the attention that was asked for, and of taking
    them and their errors through the output projection."""
    if not share:
        return 0.0
    info = model.info
    pairs = model.flops(tokens, start, exact_choice(), "nothing").attention
    projected = tokens * len(info.applied_layers) * 2 * (2 * info.embedding_dim**2)
    return costs.price(info.name, "exact", Flops(share * projected, share * pairs))


def cached_tokens_of(model: ServedModel, token_ids: Sequence[int], choice: Choice, salt: str) -> int:
    """Tokens of the prompt that a generation would find in the cache now."""
    if not model.info.causal or is_guarded(choice):
        return 0
    return min(model.cached_tokens(Prompt(token_ids, choice, salt)), len(token_ids) - 1)


def pieces_of(plan: Plan, start: int, causal: bool) -> list[Slice]:
    """The prompt from ``start`` on as an idle engine reads it."""
    if not causal or looks_ahead(plan.prefill):
        return [(start, plan.tokens - start)]
    multiple = max(CHUNK_MULTIPLE, plan.prefill.params.chunk_multiple())
    size = max(plan.chunk_tokens, multiple)
    pieces = []
    while start < plan.tokens:
        end = min((start + size) // multiple * multiple, plan.tokens)
        pieces.append((start, end - start))
        start = end
    return pieces


def bytes_of(model: ServedModel, plan: Plan) -> int:
    """Peak bytes of the request: the dearer of its two attentions, each over the whole of it."""
    return max(_bytes(model, plan, choice) for choice in (plan.prefill, plan.decode))


def _bytes(model: ServedModel, plan: Plan, choice: Choice) -> int:
    chunk = plan.tokens
    if model.info.causal and not looks_ahead(choice):
        chunk = min(max(plan.chunk_tokens, choice.params.chunk_multiple()), plan.tokens)
    rows = math.ceil(min(CLUSTERED * plan.effort.rows, 1.0) * chunk)
    waiting = HELD_ROWS * HELD_VECTORS * len(model.info.applied_layers) if rows else 0
    beside = (rows * VERIFY_VECTORS + waiting) * model.info.embedding_dim * FP32_BYTES
    return model.estimate_bytes(plan.tokens, plan.new_tokens, choice, chunk) + beside


def looks_ahead(choice: Choice) -> bool:
    """Whether some layer chooses keys by looking at the whole prompt, so that it must be read whole."""
    return any(load(part.backend).capabilities.selection == "prompt" for part in choice.parts)


def summed(value: Callable[[int], float], count: int) -> float:
    """Sum of ``value(i)`` over i in [0, count): of all of them, or by trapezoids between ``MAX_SAMPLES`` of
    them."""
    if count <= MAX_SAMPLES:
        return sum(value(i) for i in range(count))
    places = sorted({round(i * (count - 1) / (MAX_SAMPLES - 1)) for i in range(MAX_SAMPLES)})
    values = [value(i) for i in places]
    total = values[0]
    for i in range(1, len(places)):
        steps = places[i] - places[i - 1]
        # Every whole position in (a, b] of the line through both ends.
        total += steps * (values[i - 1] + values[i]) / 2 + (values[i] - values[i - 1]) / 2
    return total
