"""One document under ``auto``: read with every row of every layer computed exactly too, or timed in turns
with exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter

from models.auto import Plan, as_json
from models.auto_study_rows import AutoRow, FactRow, TimeRow
from models.contract import Kept, MeasuredError, Verify
from models.planned import AUTO, Planned, exact
from models.profile import Profile
from models.quality_auto import planned_choice
from models.quality_facts import Document
from models.quality_prompt import Outcome, change, read_document, timed
from models.runner import Model


def study_document(
    model: Model,
    document: Document,
    profile: Profile,
    max_error: float,
    exact_outcome: Outcome,
    chunk_tokens: int,
    seed: int,
) -> AutoRow:
    """A plan that is exact in every layer runs as plain exact: it is what ``exact_outcome`` is already."""
    plan, choice = planned_choice(profile, document.prompt_tokens, max_error, seed)
    if not isinstance(choice, Planned):
        return _row(document, max_error, plan, exact_outcome, exact_outcome, None)
    meter = model.meter(Verify(rows="all"), choice, document.prompt_tokens)
    outcome = read_document(model, document, choice, chunk_tokens, meter)
    measured = meter.measured()
    if measured is None or not outcome.kept:
        raise RuntimeError(f"{document.told}: nothing was measured, or no guard was there. This is a bug.")
    return _row(document, max_error, plan, outcome, exact_outcome, measured)


def _row(
    document: Document,
    max_error: float,
    plan: Plan,
    outcome: Outcome,
    exact_outcome: Outcome,
    measured: MeasuredError | None,
) -> AutoRow:
    layers = [each.layer for each in plan.layers]
    errors = {} if measured is None else {each.layer: each.estimate for each in measured.layers}
    kept = {each.layer: each for each in outcome.kept}
    nothing = {layer: Kept(layer, 0.0, 0, None) for layer in layers}
    if measured is not None and not set(errors) == set(kept) == set(layers):
        raise RuntimeError(f"{document.told}: layers measured, guarded and planned differ. This is a bug.")
    of_layer = [kept.get(layer, nothing[layer]) for layer in layers]
    realized = [
        replace(choice, exact_from=its.exact_from) for choice, its in zip(plan.layers, of_layer, strict=True)
    ]
    work = outcome.reading.work
    changed = change(document, outcome.reading, exact_outcome.reading)
    return AutoRow(
        text=document.text,
        document=document.number,
        tokens=document.tokens,
        prompt_tokens=document.prompt_tokens,
        max_error=max_error,
        reason=plan.reason,
        layers=layers,
        backends=[each.backend for each in plan.layers],
        plan=as_json(realized),
        errors=[errors.get(layer, 0.0) for layer in layers],
        estimates=[each.estimate for each in of_layer],
        exact_from=[each.exact_from for each in of_layer],
        guarded_rows=sum(each.rows for each in of_layer),
        density=work.pairs_kept / work.pairs_exact,
        perplexity=changed.perplexity,
        exact_perplexity=changed.exact_perplexity,
        change_percent=changed.percent,
        standard_error_percent=changed.standard_error_percent,
    )


def ask_document(
    model: Model,
    document: Document,
    profile: Profile,
    max_error: float,
    exact_outcome: Outcome,
    chunk_tokens: int,
    seed: int,
) -> FactRow:
    """Of a document with facts; nothing is measured beside its guard."""
    outcome = exact_outcome
    choice = planned_choice(profile, document.prompt_tokens, max_error, seed)[1]
    if isinstance(choice, Planned):
        outcome = read_document(model, document, choice, chunk_tokens)
    return FactRow(
        text=document.text,
        document=document.number,
        tokens=document.tokens,
        prompt_tokens=document.prompt_tokens,
        max_error=max_error,
        chosen=outcome.answers.chosen,
        exact_chosen=exact_outcome.answers.chosen,
        generated=outcome.answers.generated,
        exact_generated=exact_outcome.answers.generated,
    )


def time_document(
    model: Model,
    document: Document,
    profile: Profile,
    budgets: Sequence[float],
    turns: int,
    chunk_tokens: int,
    seed: int,
) -> list[TimeRow]:
    """Exact, auto, exact, auto ...: every reading of auto beside one of exact of its own."""
    auto_s: dict[float, list[float]] = {each: [] for each in budgets}
    exact_s: dict[float, list[float]] = {each: [] for each in budgets}
    exact_plan = {}
    for turn in range(turns):
        for each in budgets if turn % 2 == 0 else reversed(budgets):
            exact_s[each].append(timed(model, document.token_ids, exact(), chunk_tokens).seconds)
            began = perf_counter()
            choice = planned_choice(profile, document.prompt_tokens, each, seed)[1]
            planning_s = perf_counter() - began
            reading = timed(model, document.token_ids, choice, chunk_tokens)
            auto_s[each].append(planning_s + reading.seconds)
            exact_plan[each] = choice.backend != AUTO
    place = document.text, document.number, document.tokens
    return [TimeRow(*place, each, exact_plan[each], auto_s[each], exact_s[each]) for each in budgets]
