"""The third step of ``auto``: once the lengths of a request's inputs are known, each gets its plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

from kernels.registry import load
from models.auto import plan as plan_of
from models.contract import ServedModel
from models.profile import Ladder, Profile
from service.answers import Attended
from service.attention import unsupported
from service.auto_spec import AutoSpec, choice_of, replayed
from service.chosen import AutoPlan, Chosen, ChosenAuto
from service.errors import ApiError
from service.flow import Flow
from service.runtime import Runtime

_waiting: WeakKeyDictionary[Runtime, Counter[str]] = WeakKeyDictionary()
"""Requests that wait for a profile, by model: they count as waiting like any others."""


async def resolve(
    flow: Flow, model: ServedModel, attended: Attended, lengths: Sequence[int], timeout_ms: int | None
) -> Attended:
    """``attended`` with the plan of each input, by its tokens. ApiError: 504 at the deadline and 499 where
    the client leaves, should the model's profile still have to be measured; 429 where too many wait."""
    if not isinstance(attended.prefill, ChosenAuto):
        return attended
    return replace(attended, prefill=await resolve_auto(flow, model, attended.prefill, lengths, timeout_ms))


async def resolve_auto(
    flow: Flow, model: ServedModel, auto: ChosenAuto, lengths: Sequence[int], timeout_ms: int | None
) -> ChosenAuto:
    """As ``resolve``."""
    spec = auto.spec
    if spec.max_error is None:
        choice, plan = replayed(spec)
        given = Chosen(spec.name, choice, verify=spec.verify, path=spec.path, plan=plan)
        return replace(auto, inputs=(given,) * len(lengths))
    profile = await profile_of(flow, model, spec, timeout_ms)
    if auto.scores:
        profile = without_prompt_selection(profile)
    made = await flow.offload(lambda: {tokens: chosen_of(spec, profile, tokens) for tokens in set(lengths)})
    for chosen in made.values():
        _check(chosen, model)
    return replace(auto, inputs=tuple(made[tokens] for tokens in lengths))


def chosen_of(spec: AutoSpec, profile: Profile, tokens: int) -> Chosen:
    """For an input of so many tokens: a function of its arguments alone."""
    assert spec.max_error is not None
    found = plan_of(profile, tokens, spec.max_error)
    choice = choice_of(found.layers, spec.seed, spec.max_error)
    plan = AutoPlan(found.layers, found.reason, spec.max_error)
    return Chosen(spec.name, choice, verify=spec.verify, path=spec.path, plan=plan)


def without_prompt_selection(profile: Profile) -> Profile:
    """Without rungs that look at the whole prompt: a token's likelihood must not depend on later ones."""

    def kept(ladder: Ladder) -> Ladder:
        rungs = [r for r in ladder.rungs if load(r.backend).capabilities.selection != "prompt"]
        return ladder.model_copy(update={"rungs": tuple(rungs)})

    return profile.model_copy(update={"layers": tuple(kept(ladder) for ladder in profile.layers)})


async def profile_of(flow: Flow, model: ServedModel, spec: AutoSpec, timeout_ms: int | None) -> Profile:
    """The model's, waited for like any request in the queue. ApiError as ``resolve``."""
    runtime, name = flow.runtime, model.info.name
    waiting = _waiting.setdefault(runtime, Counter())
    if waiting.total() and runtime.profiles.state(name)["state"] != "ready":
        runtime.engine.check_room(1 + waiting.total())
    waiting[name] += 1
    try:
        return await runtime.profiles.of(flow, model, timeout_ms)
    except ApiError as error:
        raise _own(error, spec) from None
    finally:
        waiting[name] -= 1


def _own(error: ApiError, spec: AutoSpec) -> ApiError:
    """What all who wait are told, as this request's own: it names the field as the request has it, and what
    it becomes on its way to the answer is no other's."""
    param = f"{spec.path}.backend" if error.code == "attention_not_supported" else error.param
    limits, retry_s = error.limits, error.retry_after_s
    return ApiError(
        error.code, error.detail, param=param, limits=limits, retry_after_s=retry_s, stage=error.stage
    )


def _check(chosen: Chosen, model: ServedModel) -> None:
    """ApiError where the model cannot run the plan, as where its errors cannot be measured."""
    assert chosen.plan is not None
    layers = tuple(each.layer for each in chosen.plan.layers)
    if layers != model.info.applied_layers:
        raise RuntimeError(f"the profile of {model.info.name!r} has the layers {layers}. This is a bug.")
    reasons = model.unsupported(chosen.choice)
    if reasons:
        way_out = "Name a backend (GET /v1/attention/backends)."
        raise unsupported("'auto'", model, reasons, way_out, chosen.path)
