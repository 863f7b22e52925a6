"""What ``POST /v1/diagnose`` takes and gives."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag

from models.diagnose_told import (
    MAX_ARM_TOKENS,
    MAX_TOKENS,
    BudgetFigures,
    LayerFigures,
    RankCollapse,
    Regime,
)
from service.answers import Stats, Usage
from service.attention_schema import BackendSpec
from service.schemas import ModelName, OneInput, Priority, Seed, Strict, TimeoutMs

MAX_LAYERS = 4096
MAX_BUDGET = 4096
MAX_ROWS = 512


Numbers = Annotated[
    list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=MAX_LAYERS, fail_fast=True)
]
Layers = Annotated[
    Annotated[Literal["all"], Tag("input_text")] | Annotated[Numbers, Tag("input_list")],
    Discriminator(
        lambda value: "input_list" if isinstance(value, list) else "input_text",
        custom_error_type="layers_type",
        custom_error_message="must be 'all' or a list of layers",
    ),
]
"""Tags that the paths of errors leave out."""


class DiagnoseRequest(Strict):
    """One text, read once with exact attention."""

    model: ModelName | None = Field(None, description="may be left out where one model alone is served")
    input: OneInput = Field(description=f"at most {MAX_TOKENS:,} tokens")
    layers: Layers = Field("all", description="out of the model's applied_layers; each takes time")
    support: BackendSpec | None = Field(
        None, description="whose kept mass is told; by default sinks with a window of the budget"
    )
    budget: int = Field(
        256,
        ge=8,
        le=MAX_BUDGET,
        multiple_of=4,
        description="keys per row that a sparse method may keep; features get the same memory",
    )
    tolerance: float = Field(0.1, gt=0, lt=1, description="share of a row's mass that may be misplaced")
    rows: int = Field(64, ge=16, le=MAX_ROWS, description="rows drawn evenly and computed in full")
    arm_tokens: int = Field(
        128,
        ge=0,
        le=MAX_ARM_TOKENS,
        description="first tokens that are also read without skips and without MLPs; 0: none",
    )
    seed: Seed = 0
    priority: Priority = 0
    timeout_ms: TimeoutMs | None = None
    include_stats: bool = True


class SupportUsed(BaseModel):
    requested: str
    used: str
    params: dict[str, Any]
    fallback_reason: str | None = None


class Question(BaseModel):
    """What was asked, every default filled in."""

    layers: list[int]
    support: SupportUsed
    budget: int
    tolerance: float
    rows: int
    arm_tokens: int
    seed: int


class DiagnoseAnswer(BaseModel):
    """Entropies in nats; masses, ratios and errors 0 .. 1. Means are over the sampled rows unless said
    otherwise; regimes hold for this text alone."""

    id: str
    model: str
    tokens: int
    asked: Question
    rows: list[int] = Field(description="positions of the sampled rows, the same in every layer")
    regime: Regime | None = Field(
        description="of the means over all layers; null where no row is wide enough"
    )
    errors: BudgetFigures | None
    recommended: dict[str, Any] = Field(description="a spec that can be sent as 'attention'")
    reason: str
    layers: list[LayerFigures]
    rank_collapse: RankCollapse
    usage: Usage
    stats: Stats | None = None
