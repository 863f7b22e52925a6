"""How well a calibration's plans carry over: each text's documents under plans made by the other texts alone.

The errors are those of all rows, measured on the document itself along exact's trajectory; the times are
predicted. A layer-document is one layer on one document.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from models.auto import DEFAULT_POLICY, LayerChoice, Plan, Policy, plan
from models.calibrate_ladders import Calibration, Sample
from models.profile import EXACT

FAR = 1.5
"""Times the budget."""


@dataclass(frozen=True)
class CheckRow:
    """One length and budget. Shares of layer-documents: ``within`` the budget, ``far_above`` it (more than
    ``FAR`` times), ``exact`` (they cannot err). ``worst`` error over budget; ``density`` and predicted shares
    of exact's attention time and time to first token, mean over documents."""

    tokens: int
    max_error: float
    documents: int
    layer_documents: int
    within: float
    far_above: float
    exact: float
    worst: float
    density: float
    attention_share: float
    time_share: float


@dataclass(frozen=True)
class _Held:
    """A document under the plan of other texts: error over budget and density of each layer."""

    plan: Plan
    ratios: list[float]
    densities: list[float]


def check(measured: Calibration, budgets: Sequence[float], policy: Policy = DEFAULT_POLICY) -> list[CheckRow]:
    """By length and budget. A length that no other text has is left out. ValueError for a single text."""
    if len(measured.made.texts) < 2:
        raise ValueError("a check needs two texts or more: plans are made without the text they are tried on")
    rows = []
    for tokens in sorted({sample.tokens for sample in measured.samples}):
        for budget in budgets:
            held = list(_held_out(measured, tokens, budget, policy))
            rows += [_row(tokens, budget, held)] if held else []
    return rows


def _held_out(measured: Calibration, tokens: int, budget: float, policy: Policy) -> Iterator[_Held]:
    for text in range(len(measured.made.texts)):
        rest = measured.without(text)
        own = [s for s in measured.samples if measured.text_of(s) == text and s.tokens == tokens]
        if not own or not any(sample.tokens == tokens for sample in rest.samples):
            continue
        found = plan(rest.profile(), tokens, budget, policy)
        for document in sorted({sample.document for sample in own}):
            its = [sample for sample in own if sample.document == document]
            yield _tried(measured, found, its, budget)


def _tried(measured: Calibration, found: Plan, samples: Sequence[Sample], budget: float) -> _Held:
    by_place = {(sample.layer, sample.rung): sample for sample in samples}
    held = [_sample_of(measured, each, by_place) for each in found.layers]
    return _Held(
        found,
        [0.0 if sample is None else sample.error / budget for sample in held],
        [1.0 if sample is None else sample.density for sample in held],
    )


def _sample_of(
    measured: Calibration, choice: LayerChoice, by_place: dict[tuple[int, int], Sample]
) -> Sample | None:
    """None: exact."""
    for place, (backend, params) in enumerate(measured.rungs):
        if (backend, dict(params)) == (choice.backend, dict(choice.params)):
            return by_place[choice.layer, place]
    return None


def _row(tokens: int, budget: float, held: Sequence[_Held]) -> CheckRow:
    ratios = [ratio for each in held for ratio in each.ratios]
    return CheckRow(
        tokens=tokens,
        max_error=budget,
        documents=len(held),
        layer_documents=len(ratios),
        within=fmean(ratio <= 1 for ratio in ratios),
        far_above=fmean(ratio > FAR for ratio in ratios),
        exact=fmean(layer.backend == EXACT for each in held for layer in each.plan.layers),
        worst=max(ratios),
        density=fmean(density for each in held for density in each.densities),
        attention_share=fmean(each.plan.attention_share for each in held),
        time_share=fmean(each.plan.time_share for each in held),
    )
