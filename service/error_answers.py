"""How wrong a request's attention was, as its answer tells it."""

from __future__ import annotations

import math

from pydantic import BaseModel, Field

from models.contract import LayerError, MeasuredError


class LayerErrorAnswer(BaseModel):
    """One layer: |(used - exact) W_O| / |exact W_O| over its rows, on the same queries, keys and values."""

    layer: int = Field(description="one of applied_layers")
    estimate: float | None = Field(description="null where it is no finite number")
    approx_upper_95: float | None = Field(
        description="the error is about 95 % sure to lie below; null where too few rows were looked at"
    )
    row_bound: float | None = Field(
        description="95 % of the rows lie below, with 95 % confidence; null where fewer than 59 rows were "
        "drawn evenly, and not all were looked at"
    )
    rows: int = Field(description="rows that were computed exactly too; 0 where nothing was left out")
    rows_total: int = Field(description="rows that this request computed; cached tokens are not in them")
    head_shares: list[float] = Field(
        description="by query head, its part of the squared error: they sum to 1, or are all 0 without one; "
        "[] for exact"
    )
    of_residual: float | None = Field(
        description="the same difference relative to the layer's input; null where that is not known"
    )

    @classmethod
    def of(cls, found: LayerError) -> LayerErrorAnswer:
        return cls(
            layer=found.layer,
            estimate=finite(found.estimate),
            approx_upper_95=finite(found.approx_upper_95),
            row_bound=finite(found.row_bound),
            rows=found.rows,
            rows_total=found.rows_total,
            head_shares=[share if math.isfinite(share) else 0.0 for share in found.head_shares],
            of_residual=finite(found.of_residual),
        )


class MeasuredErrorAnswer(BaseModel):
    """The largest over layers, and over the inputs of a request. Errors are local to a layer: they do not
    bound how far the answer is off."""

    estimate: float | None = Field(description="null where it is no finite number in some layer")
    approx_upper_95: float | None = Field(description="null where a layer has none")
    row_bound: float | None = Field(description="null where a layer has none")
    rows: int = Field(description="rows computed exactly too, summed over layers and inputs")
    rows_total: int
    cost_ms: float = Field(description="what measuring took of the forwards; not part of attention_ms")
    layers: list[LayerErrorAnswer] | None = Field(
        description="only where the request asked with 'verify', not where the server measured unasked"
    )
    decode: MeasuredErrorAnswer | None = Field(
        None,
        description="of the new tokens, where some of them were looked at; in attention.decode where prefill "
        "and decode were chosen apart",
    )


def finite(value: float | None) -> float | None:
    """JSON has no infinities."""
    return value if value is not None and math.isfinite(value) else None


def largest_estimate(found: MeasuredError) -> float | None:
    """None where some layer's is no finite number."""
    known = all(math.isfinite(layer.estimate) for layer in found.layers)
    return finite(found.estimate) if known else None


def told_error(found: MeasuredError | None, *, with_layers: bool) -> MeasuredErrorAnswer | None:
    if found is None:
        return None
    return MeasuredErrorAnswer(
        estimate=largest_estimate(found),
        approx_upper_95=finite(found.approx_upper_95),
        row_bound=finite(found.row_bound),
        rows=found.rows,
        rows_total=found.rows_total,
        cost_ms=round(found.cost_ms, 3),
        layers=[LayerErrorAnswer.of(layer) for layer in found.layers] if with_layers else None,
    )


def both_phases(
    prefill: MeasuredErrorAnswer | None, decode: MeasuredErrorAnswer | None
) -> MeasuredErrorAnswer | None:
    """Of one attention that read the prompt and decoded. Where nothing of the prompt was looked at, what is
    known of the new tokens stands for both."""
    whole = prefill or decode
    return None if whole is None else whole.model_copy(update={"decode": decode})
