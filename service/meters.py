"""Which meters a request's sequences carry, what measuring is predicted to cost, and what was measured.

A sequence that reads its prompt carries one for it, a sequence that decodes one for its new tokens. They are
there where the request asks (``verify``), and in a random share of all other requests that are not exact
(``verify_fraction``): drawn by chance alone, so that no document is measured more often than another.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import replace

from kernels.math.row_sampling import DECODE_PROBABILITY, expected_rows
from models.contract import Choice, ServedModel, Verify
from service.chosen import Chosen, ChosenAuto
from service.errors import ApiError
from service.measured import Cause, Effort, Measured, worst
from service.sequences import GenerateSequence, Sequence

log = logging.getLogger("longreach.verify")


class Sampling:
    """Draws the requests that are measured though nobody asked. Event loop only."""

    def __init__(self, fraction: float, draws: random.Random | None = None) -> None:
        self._fraction = fraction
        self._draws = draws or random.Random()
        self._told: set[str] = set()

    def draw(self) -> Verify | None:
        """For one request: what to measure, rows drawn by a seed of its own; None for most."""
        if self._draws.random() >= self._fraction:
            return None
        return Verify(seed=self._draws.getrandbits(63))

    def cannot(self, model: str, error: ValueError) -> None:
        """``model`` cannot be measured: said once, as nobody else is told."""
        if model not in self._told:
            self._told.add(model)
            log.warning("verify_fraction does nothing on model %s: %s", model, error)


def attach(
    model: ServedModel,
    sequences: Iterable[Sequence],
    prefill: Chosen | ChosenAuto,
    decode: Chosen,
    sampling: Sampling | None,
) -> Cause:
    """Give each sequence its meters, before it is priced and submitted; whether they would be there because
    the request asks. ``sampling`` None: nothing is measured unasked. ApiError 400 where it asks for what the
    model cannot measure."""
    asked = prefill.verify is not None or decode.verify is not None
    drawn = None if asked or sampling is None else sampling.draw()
    try:
        for sequence in sequences:
            _attach(model, sequence, drawn or prefill.verify, drawn or decode.verify)
    except ValueError as error:
        if asked:
            raise _refused(model, prefill if prefill.verify is not None else decode, error) from None
        assert sampling is not None
        sampling.cannot(model.info.name, error)
    return "asked" if asked else "sampled"


def effort_of(model: ServedModel, prefill: Chosen, decode: Chosen, tokens: int) -> Effort:
    """What measuring a prompt of so many tokens, and what is generated after it, is expected to take."""
    return _effort(
        model, _wanted(prefill.choice, prefill.verify), _wanted(decode.choice, decode.verify), tokens
    )


def _effort(model: ServedModel, of_prompt: Verify | None, of_new: Verify | None, tokens: int) -> Effort:
    rows = 0.0 if of_prompt is None else rows_share(of_prompt, tokens)
    steps = 0.0 if of_new is None else 1.0 if of_new.rows == "all" else DECODE_PROBABILITY
    applied = max(len(model.info.applied_layers), 1)

    def layers(verify: Verify | None) -> float:
        return 0.0 if verify is None else 1.0 if verify.layers is None else len(verify.layers) / applied

    return Effort(layers(of_prompt) * rows, layers(of_new) * steps, rows)


def rows_share(verify: Verify, tokens: int) -> float:
    """The part of a prompt's rows that is expected to be looked at."""
    return expected_rows(max(tokens, 1), verify.rows) / max(tokens, 1)


def is_measured(sequences: Iterable[Sequence]) -> bool:
    return any(s.prefill_meter is not None or s.decode_meter is not None for s in sequences)


def measured_of(sequences: Items[Sequence]) -> Measured:
    """What the meters of finished sequences say. Takes a while where many rows were looked at."""
    return Measured(
        worst([sequence.prefill_meter for sequence in sequences]),
        worst([sequence.decode_meter for sequence in sequences]),
    )


def _wanted(choice: Choice, verify: Verify | None) -> Verify | None:
    """What there is to measure: exact attention needs no second look."""
    return None if choice.backend == "exact" else verify


def _attach(model: ServedModel, sequence: Sequence, prefill: Verify | None, decode: Verify | None) -> None:
    """Of the choices that the sequence has: inputs of one request may have different ones."""
    total = len(sequence.token_ids)
    generates = isinstance(sequence, GenerateSequence)
    follows = isinstance(sequence, GenerateSequence) and sequence.leader is not None
    of_prompt, of_new = _wanted(sequence.choice, prefill), _wanted(sequence.decode_choice, decode)
    if of_prompt is not None and not follows:
        sequence.prefill_meter = model.meter(of_prompt, sequence.choice, total)
    if of_new is not None and generates:
        sequence.decode_meter = model.meter(of_new, sequence.decode_choice, total, decode=True)
    effort = _effort(model, of_prompt, of_new, total)
    of_prompt_alone = replace(effort, decode=0.0)
    sequence.effort = (
        replace(effort, prefill=0.0, rows=0.0) if follows else effort if generates else of_prompt_alone
    )


def _refused(model: ServedModel, chosen: Chosen | ChosenAuto, error: ValueError) -> ApiError:
    path = f"{chosen.path}.verify"
    detail = f"{path}: the error of model {model.info.name!r} cannot be measured: {error}. Leave verify out."
    return ApiError("attention_not_supported", detail, param=path, limits={})
