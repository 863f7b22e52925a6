"""The JSON Schema of ``attention``, made from the registry: every backend with its params and their bounds.

To pydantic the field is any JSON value: ``service.attention`` parses it, with better messages than a union
gives. To readers of the OpenAPI file it is the full schema."""

from __future__ import annotations

import operator
from functools import cache, reduce
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, TypeAdapter, create_model
from pydantic_core import CoreSchema, core_schema

from kernels.registry import BACKENDS, load
from service.attention import MAX_SEED, MAX_SPECS, AskedImpl
from service.auto_spec import MAX_ROW
from service.verify_spec import MAX_LAYERS, MAX_ROWS, MIN_ROWS

_ClosedModel = ConfigDict(extra="forbid")


class VerifySpec(BaseModel):
    """How the error is measured: rows computed exactly too, beside what was asked for."""

    model_config = _ClosedModel
    rows: Annotated[int, Field(ge=MIN_ROWS, le=MAX_ROWS)] | Literal["all"] | None = Field(
        None,
        description="rows drawn in each layer, beside the first and last 16 and 64 drawn evenly; by default "
        "a 64th of the prompt less these 96, at least 64. 'all' costs one exact attention more",
    )
    layers: (
        Literal["all"]
        | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=MAX_LAYERS)]
    ) = Field("all", description="out of applied_layers")


class PlanEntry(BaseModel):
    """One layer of a plan, as an answer tells it."""

    model_config = _ClosedModel
    layer: int = Field(ge=0, description="one of applied_layers: a plan has an entry for each, in order")
    backend: Annotated[str, Field(json_schema_extra={"enum": list(BACKENDS)})]
    params: dict[str, Any]
    exact_from: int | None = Field(
        None, ge=0, le=MAX_ROW, description="rows of the prompt from here on run exactly"
    )


class AutoAttention(BaseModel):
    """Per layer the cheapest attention whose calibrated error keeps max_error, by the length of each input,
    watched while the prompt is read; or a plan from an answer, run again. New tokens are read with exact."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"oneOf": [{"required": ["max_error"]}, {"required": ["plan"]}]}
    )
    backend: Literal["auto"]
    max_error: float = Field(
        default_factory=float, gt=0, le=1, description="the largest error that a layer may have"
    )
    plan: Annotated[list[PlanEntry], Field(min_length=1, max_length=MAX_LAYERS)] = Field(
        default_factory=list, description="attention.plan of an answer of the same model"
    )
    fallback: Literal["error", "exact"] = Field("error", description="no effect: exact is always allowed")
    seed: int = Field(0, ge=0, le=MAX_SEED, description="seed of random draws")
    verify: bool | VerifySpec | None = Field(None, description="measure how wrong it was")


@cache
def documented_backend() -> Any:
    """A backend's name, or one model per backend, told apart by ``backend``."""
    return _documented([_spec_model(backend) for backend in BACKENDS])


@cache
def documented_spec() -> Any:
    """As ``documented_backend``, or ``auto``."""
    return _documented([*(_spec_model(backend) for backend in BACKENDS), AutoAttention])


def _documented(models: list[type[BaseModel]]) -> Any:
    name = Annotated[
        str, Field(json_schema_extra={"enum": list(BACKENDS)}, description="with default params")
    ]
    union: Any = reduce(operator.or_, models)
    return name | Annotated[union, Field(discriminator="backend")]


@cache
def documented_spec_or_pair() -> Any:
    spec = documented_spec()
    pair: Any = create_model(
        "PrefillDecodeAttention",
        __config__=_ClosedModel,
        __doc__="Attention of prefill and of decode, named apart; exact where one is left out.",
        prefill=(spec, "exact"),
        decode=(documented_backend(), "exact"),
    )
    return spec | pair


@cache
def documented_spec_or_pair_or_list() -> Any:
    one = documented_spec_or_pair()
    several: Any = list.__class_getitem__(one)
    return one | Annotated[several, Field(min_length=1, max_length=MAX_SPECS)]


@cache
def _spec_model(name: str) -> type[BaseModel]:
    backend = load(name)
    title = "".join(part.capitalize() for part in name.split("_"))
    fallback: Any = Literal["error", "exact"]
    named: Any = Literal[name]
    impl: Any = AskedImpl
    fields: dict[str, Any] = {
        "backend": (named, Field(description=backend.summary)),
        "params": (backend.params, Field(default_factory=backend.params, description=f"knobs of {name}")),
        "fallback": (fallback, Field("error", description="what to do where the model cannot run it")),
        "seed": (int, Field(0, ge=0, le=MAX_SEED, description="seed of random draws")),
        "verify": (bool | VerifySpec | None, Field(None, description="measure how wrong it was")),
        "impl": (impl, Field("auto", description="how it is executed; auto: triton on a GPU, else torch")),
    }
    return create_model(f"{title}Attention", __config__=_ClosedModel, __doc__=backend.summary, **fields)


class AttentionSpec:
    """A request's attention, as JSON."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> CoreSchema:
        return core_schema.any_schema()

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return dict(handler(TypeAdapter(cls.documented()).core_schema))

    @classmethod
    def documented(cls) -> Any:
        return documented_spec()


class BackendSpec(AttentionSpec):
    """A backend with its params: what cannot be planned."""

    @classmethod
    def documented(cls) -> Any:
        return documented_backend()


class AttentionSpecOrPair(AttentionSpec):
    """A spec, or one for prefill and one for decode."""

    @classmethod
    def documented(cls) -> Any:
        return documented_spec_or_pair()


class AttentionSpecOrPairOrList(AttentionSpec):
    """A spec or a pair, or several to compare."""

    @classmethod
    def documented(cls) -> Any:
        return documented_spec_or_pair_or_list()
