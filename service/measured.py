"""What meters say at the end: of several sequences of a request, the worst."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from typing import Literal

from models.contract import LayerError, MeasuredError, Meter
from models.measured_error import largest_limit

Cause = Literal["asked", "sampled"]
"""Why a request was measured."""
SAMPLED = frozenset({"encode", "embeddings", "generate", "completions", "chat", "score"})
"""Operations that may be measured unasked: those that answer with what one attention computed."""


@dataclass(frozen=True)
class Measured:
    """The errors of a request that is over: of its prompts and of its new tokens, each the worst over its
    sequences. None where nothing was looked at."""

    prefill: MeasuredError | None = None
    decode: MeasuredError | None = None


@dataclass(frozen=True)
class Effort:
    """What measuring is expected to take beside the attention that was asked for.

    ``prefill`` and ``decode``: how much of what exact attention computes over a prompt, and in a decode step,
    is computed again, over all layers that a choice applies to. ``rows``: the largest part of a prompt's rows
    that is looked at in one layer.
    """

    prefill: float = 0.0
    decode: float = 0.0
    rows: float = 0.0


def none_of(layers: Items[int], rows: int) -> MeasuredError | None:
    """The error of ``exact`` in these layers over ``rows`` rows each: there is none, and nobody has to look.
    None where there were no rows."""
    if not rows:
        return None
    each = tuple(LayerError(layer, 0.0, 0.0, 0.0, 0, rows, (), 0.0) for layer in layers)
    return MeasuredError(0.0, 0.0, 0.0, 0, rows * len(each), 0.0, each)


def worst(meters: Items[Meter | None]) -> MeasuredError | None:
    """One figure for several sequences: layer by layer the largest error, rows and costs summed."""
    return worst_of(
        [found for meter in meters if meter is not None if (found := meter.measured()) is not None]
    )


def worst_of(each: Items[MeasuredError]) -> MeasuredError | None:
    """As ``worst``, of what meters have said."""
    if len(each) < 2:
        return each[0] if each else None
    layers = tuple(_worst_layer(found) for found in zip(*(one.layers for one in each), strict=True))
    return MeasuredError(
        estimate=max(one.estimate for one in each),
        approx_upper_95=largest_limit([one.approx_upper_95 for one in each]),
        row_bound=largest_limit([one.row_bound for one in each]),
        rows=sum(one.rows for one in each),
        rows_total=sum(one.rows_total for one in each),
        cost_ms=sum(one.cost_ms for one in each),
        layers=layers,
    )


def _worst_layer(found: tuple[LayerError, ...]) -> LayerError:
    """The worst of one layer in several sequences; its heads are those of the largest estimate."""
    return replace(
        max(found, key=lambda one: one.estimate),
        approx_upper_95=largest_limit([one.approx_upper_95 for one in found]),
        row_bound=largest_limit([one.row_bound for one in found]),
        rows=sum(one.rows for one in found),
        rows_total=sum(one.rows_total for one in found),
    )
