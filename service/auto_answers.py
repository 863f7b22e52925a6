"""What an answer tells of ``auto``: the plan that ran, layer by layer, and whether it kept its budget."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, Field

from models.auto import LayerChoice, as_json
from models.contract import Kept
from service.chosen import AutoPlan, ChosenAuto
from service.error_answers import finite
from service.jobs import leads
from service.sequences import Sequence


class PlannedLayer(BaseModel):
    """The attention of one layer, as a request may give it again."""

    layer: int = Field(description="one of applied_layers")
    backend: str
    params: dict[str, Any]
    exact_from: int | None = Field(
        description="the row of the prompt from which on it ran exactly, to keep the budget; null: none"
    )


class Budget(BaseModel):
    """How near the error came to the budget, estimated while the prompt was read from rows that were computed
    exactly too, in every layer that is not exact by plan."""

    max_error: float = Field(description="as asked, for every layer")
    estimate: float | None = Field(
        description="the largest over layers and inputs, repairs included; 0 where all are exact by plan, "
        "null where it is no finite number"
    )
    within: bool = Field(description="whether the estimate is at most max_error")
    rows: int = Field(description="rows computed exactly too, summed over layers and inputs")
    repaired_layers: list[int] = Field(description="layers that went on exactly, of any input")


def told_auto(auto: ChosenAuto, sequences: Items[Sequence]) -> dict[str, Any]:
    """The fields of a finished request's answer. Its sequences lead in the order of its inputs."""
    kept = [sequence.kept for sequence in sequences if leads(sequence)]
    plans = [_told(realised(chosen, found)) for chosen, found in zip(auto.plans, kept, strict=True)]
    return {**told_plans(auto, plans), "budget": budget_of(auto, kept)}


def told_exact(auto: ChosenAuto) -> dict[str, Any]:
    """The fields of an answer whose one input was planned to be exact in every layer."""
    return {**planned_alone(auto), "budget": budget_of(auto, [()])}


def planned_alone(auto: ChosenAuto) -> dict[str, Any]:
    """The fields of what was not run."""
    return told_plans(auto, [_told(chosen.layers) for chosen in auto.plans])


def told_plans(auto: ChosenAuto, plans: list[list[PlannedLayer]]) -> dict[str, Any]:
    """``plans`` by input. What is the same for all is told once."""
    reasons = [chosen.reason for chosen in auto.plans]
    alike = all(each == plans[0] for each in plans)
    one_reason = len(set(reasons)) == 1
    return {
        "plan": plans[0] if alike else None,
        "plans": None if alike else plans,
        "plan_reason": reasons[0] if one_reason else None,
        "plan_reasons": None if one_reason else reasons,
    }


def realised(plan: AutoPlan, kept: Items[Kept]) -> tuple[LayerChoice, ...]:
    """The plan with its repairs: run again as it is, it computes the same rows."""
    repairs = {found.layer: found.exact_from for found in kept if found.exact_from is not None}
    return tuple(replace(each, exact_from=repairs.get(each.layer, each.exact_from)) for each in plan.layers)


def budget_of(auto: ChosenAuto, kept: Items[Items[Kept]]) -> Budget | None:
    """``kept`` by input. None where a plan was given: then nobody looks."""
    if auto.spec.max_error is None:
        return None
    found = [each for of_input in kept for each in of_input]
    estimates = [finite(each.estimate) for each in found]
    known = [estimate for estimate in estimates if estimate is not None]
    estimate = max(known, default=0.0) if len(known) == len(estimates) else None
    return Budget(
        max_error=auto.spec.max_error,
        estimate=estimate,
        within=estimate is not None and estimate <= auto.spec.max_error,
        rows=sum(each.rows for each in found),
        repaired_layers=sorted({each.layer for each in found if each.exact_from is not None}),
    )


def _told(layers: Items[LayerChoice]) -> list[PlannedLayer]:
    return [PlannedLayer.model_validate(each) for each in as_json(layers)]
