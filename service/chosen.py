"""What a model will run for what a request asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from kernels.registry import load
from models.auto import LayerChoice, Reason
from models.contract import Choice, Verify
from models.planned import AUTO, AutoParams, Planned

if TYPE_CHECKING:
    from service.auto_spec import AutoSpec

PlanReason = Reason | Literal["replayed"]


@dataclass(frozen=True)
class AutoPlan:
    """Of one input: the attention of each layer as planned, why, and the budget (None: a plan was given)."""

    layers: tuple[LayerChoice, ...]
    reason: PlanReason
    max_error: float | None

    @property
    def is_exact(self) -> bool:
        return all(each.backend == "exact" for each in self.layers)


@dataclass(frozen=True)
class Chosen:
    """``choice``, and why it is not what was asked for, where it is not; how its error is to be measured,
    where ``path`` asks for it; and the plan that it came from under ``auto``."""

    requested: str
    choice: Choice
    fallback_reason: str | None = None
    verify: Verify | None = None
    path: str = "attention"
    plan: AutoPlan | None = None

    @property
    def used(self) -> str:
        return self.choice.backend

    @property
    def params(self) -> dict[str, Any]:
        """As JSON."""
        return self.choice.params.model_dump(mode="json")

    def of(self, place: int) -> Chosen:
        """For the input at ``place`` of a request: the same for all of them."""
        return self


@dataclass(frozen=True)
class ChosenAuto:
    """``auto``: what runs differs from input to input, and is not known before ``service.auto.resolve`` has
    seen their lengths. Until then asking for it is a bug, lest it be taken for exact. ``scores``: likelihoods
    of the prompt itself are wanted."""

    spec: AutoSpec
    scores: bool = False
    inputs: tuple[Chosen, ...] | None = None

    requested = AUTO
    used = AUTO
    fallback_reason = None

    @property
    def params(self) -> dict[str, Any]:
        return AutoParams(max_error=self.spec.max_error).model_dump(mode="json")

    @property
    def verify(self) -> Verify | None:
        return self.spec.verify

    @property
    def path(self) -> str:
        return self.spec.path

    @property
    def resolved(self) -> tuple[Chosen, ...]:
        """By input."""
        if self.inputs is None:
            raise RuntimeError("the choice of 'auto' was asked for before its plan was made. This is a bug.")
        return self.inputs

    @property
    def plans(self) -> tuple[AutoPlan, ...]:
        return tuple(chosen.plan for chosen in self.resolved if chosen.plan is not None)

    def of(self, place: int) -> Chosen:
        """For the input at ``place`` of the request."""
        return self.resolved[place]


def is_guarded(choice: Choice) -> bool:
    """Whether a guard watches how a prompt is read under it: then nothing of the prompt comes from the cache,
    or is left there."""
    return isinstance(choice, Planned) and choice.guarded


def exact_choice(seed: int = 0) -> Choice:
    return Choice("exact", load("exact").params(), seed)
