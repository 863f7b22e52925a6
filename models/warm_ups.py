"""The kernels that a model's requests need, compiled before the first of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from kernels.warm import HeadShape, compiles, warm
from models.contract import ModelInfo, WarmUp
from models.network import Network


def warm_ups_of(network: Network, info: ModelInfo, backends: Sequence[str]) -> tuple[WarmUp, ...]:
    """One for each of the backends that would run by impl triton on the model's device."""
    device = torch.device(info.device)
    if device.type != "cuda":
        return ()
    shapes = _shapes(network, info, device)
    names = [name for name in backends if any(compiles([name], shape) for shape in shapes)]
    return tuple(WarmUp(name, partial(_warm, name, shapes, _learned(network, name))) for name in names)


def _shapes(network: Network, info: ModelInfo, device: torch.device) -> tuple[HeadShape, ...]:
    """Different ones, in the layers' order."""
    found = (
        HeadShape(
            layer.num_heads,
            layer.shape.num_kv_heads,
            layer.shape.key_dim,
            layer.shape.value_dim,
            layer.causal,
            getattr(torch, info.dtype),
            device,
        )
        for layer in network.plan.layers
    )
    return tuple(dict.fromkeys(found))


def _learned(network: Network, name: str) -> object | None:
    """Any layer's: they differ in their numbers alone."""
    of_layers = network.learned.get(name)
    return of_layers[0] if of_layers else None


def _warm(name: str, shapes: Sequence[HeadShape], learned: object | None) -> None:
    for shape in shapes:
        warm(name, shape, learned=learned)
