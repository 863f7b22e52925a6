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
from service.attention import MAX_SEED, MAX_SPECS
from service.verify_spec import MAX_LAYERS, MAX_ROWS, MIN_ROWS

_ClosedModel = ConfigDict(extra="forbid")


class VerifySpec(BaseModel):
    """How the error is measured: rows computed exactly too, beside what was asked for."""

    model_config = _ClosedModel
    rows: Annotated[int, Field(ge=MIN_ROWS, le=MAX_ROWS)] | Literal["all"] | None = Field(
        None,
        description="rows drawn in each layer, beside the first and last 16 and 64 drawn evenly; by default "
        "the larger of 64 and a 64th of the prompt. 'all' costs one exact attention more",
    )
    layers: (
        Literal["all"]
        | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=MAX_LAYERS)]
    ) = Field("all", description="out of applied_layers")


@cache
def documented_spec() -> Any:
    """A backend's name, or one model per backend, told apart by ``backend``."""
    name = Annotated[
        str, Field(json_schema_extra={"enum": list(BACKENDS)}, description="with default params")
    ]
    models: Any = reduce(operator.or_, [_spec_model(backend) for backend in BACKENDS])
    return name | Annotated[models, Field(discriminator="backend")]


@cache
def documented_spec_or_pair() -> Any:
    spec = documented_spec()
    pair: Any = create_model(
        "PrefillDecodeAttention",
        __config__=_ClosedModel,
        __doc__="Attention of prefill and of decode, named apart; exact where one is left out.",
        prefill=(spec, "exact"),
        decode=(spec, "exact"),
    )
    return spec | pair


@cache
def documented_spec_or_pair_or_list() -> Any:
    one = documented_spec_or_pair()
    several: Any = list.__class_getitem__(one)
    return one | Annotated[several, Field(min_length=1, max_length=MAX_SPECS)]


def _spec_model(name: str) -> type[BaseModel]:
    backend = load(name)
    title = "".join(part.capitalize() for part in name.split("_"))
    fallback: Any = Literal["error", "exact"]
    named: Any = Literal[name]
    fields: dict[str, Any] = {
        "backend": (named, Field(description=backend.summary)),
        "params": (backend.params, Field(default_factory=backend.params, description=f"knobs of {name}")),
        "fallback": (fallback, Field("error", description="what to do where the model cannot run it")),
        "seed": (int, Field(0, ge=0, le=MAX_SEED, description="seed of random draws")),
        "verify": (bool | VerifySpec | None, Field(None, description="measure how wrong it was")),
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
