"""How many floating-point operations a slice takes, predicted before it runs.

linear    = 2 (weights per token * rows + weights of the head * rows with logits)
attention = sum over layers of Backend.flops on the layer's shape; of a plan's exact rows exact's (no repair
            is foreseen)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache

from kernels.registry import load as load_backend
from models.contract import Choice, Flops, Want
from models.network import Network
from models.plan import ModelPlan
from models.planned import Planned, exact
from models.seam import LayerPlan, window_params


def predict_flops(network: Network, rows: int, start: int, choice: Choice, want: Want) -> Flops:
    """Of ``rows`` tokens that begin at position ``start``, under ``choice``, in one step. ValueError where
    there are no rows or the position is negative."""
    if rows < 1 or start < 0:
        raise ValueError(f"rows must be at least 1 and start at least 0, got {rows} and {start}")
    rows_of_logits = {"logits": 1, "scores": rows}.get(want, 0)
    linear = 2.0 * (network.linear_params * rows + network.head_params * rows_of_logits)
    sizes = network.sizes
    attention = sum(
        count * layer_flops(layer, num_rows, keys, each, sizes.itemsize, sizes.on_cpu)
        for layer, part, border, count in _distinct(sizes.plan, choice)
        for num_rows, keys, each in _stretches(layer, rows, start, part, border)
    )
    return Flops(linear, attention)


def layer_flops(layer: LayerPlan, rows: int, keys: int, choice: Choice, itemsize: int, on_cpu: bool) -> float:
    """Of one layer's attention on the last ``rows`` of ``keys`` positions."""
    call = layer.call_shape(rows, keys, itemsize, on_cpu)
    if layer.window is not None:
        return load_backend("window").flops(window_params(layer.window), call)
    return load_backend(choice.backend).flops(choice.params, call)


def _stretches(
    layer: LayerPlan, rows: int, start: int, choice: Choice, border: int | None
) -> Iterator[tuple[int, int, Choice]]:
    """Rows that run one attention, how many positions they may see, and which: from ``border`` on exact."""
    stop = start + rows
    before = rows if border is None else min(max(border - start, 0), rows)
    if before:
        yield before, start + before if layer.causal else stop, choice
    if before < rows:
        yield rows - before, stop, exact()


@lru_cache(256)
def _distinct(plan: ModelPlan, choice: Choice) -> tuple[tuple[LayerPlan, Choice, int | None, int], ...]:
    """Layers that cost the same, once each with what runs there, the position from which on it is exact, and
    how many there are."""
    parts = [_part(layer, choice) for layer in plan.layers]
    kinds = [
        (layer.causal, layer.window, layer.num_heads, layer.shape, part.method, border)
        for layer, (part, border) in zip(plan.layers, parts, strict=True)
    ]
    first = {kind: place for place, kind in reversed(list(enumerate(kinds)))}
    return tuple(
        (plan.layers[first[kind]], *parts[first[kind]], count) for kind, count in Counter(kinds).items()
    )


def _part(layer: LayerPlan, choice: Choice) -> tuple[Choice, int | None]:
    if layer.window is not None:
        return choice, None
    border = choice.exact_from[layer.ordinal] if isinstance(choice, Planned) else None
    return choice.at(layer.ordinal), border
