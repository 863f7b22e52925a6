"""A small random network of the same class as a large one, for the self-test: fewer layers, narrower, with
short windows and rotary thresholds."""

from __future__ import annotations

import copy
from typing import Any

import torch

from models.rotary import is_length_dependent
from models.seam import NAME

SHRUNKEN_LENGTH = 16
SHRUNKEN_WINDOW = 8
SHRUNKEN_WIDTH = 64


def largest_window(config: Any) -> int:
    return max((w for w in _windows(config).values() if w is not None), default=0)


def _windows(config: Any) -> dict[str, int | None]:
    return {name: getattr(config, name, None) for name in ("sliding_window", "local_attention")}


def shrink(network: Any) -> Any:
    """A small random network of the same class: fewer layers, narrower, short windows and rotary
    thresholds."""
    config = copy.deepcopy(network.config)
    layers = _layers_to_keep(config)
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == config.num_hidden_layers and name != "architectures":
            setattr(config, name, value[:layers])
    config.num_hidden_layers = layers
    for name in ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"):
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, min(getattr(config, name), SHRUNKEN_WIDTH))
    for name, window in _windows(config).items():
        if window is not None and window > SHRUNKEN_WINDOW:
            setattr(config, name, SHRUNKEN_WINDOW)
    _shrink_heads(config)
    if is_length_dependent(network):
        _shrink_lengths(config)
    config._attn_implementation = NAME
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small = type(network)(config).eval()
        _randomise(small)
    return small


def _layers_to_keep(config: Any) -> int:
    """The shortest beginning, of at least two layers, that has every type of layer."""
    types = list(getattr(config, "layer_types", None) or [])
    if not types:
        return min(2, int(config.num_hidden_layers))
    first_seen = [int(types.index(kind)) for kind in set(types)]
    return max(min(2, len(types)), 1 + max(first_seen))


def _shrink_heads(config: Any) -> None:
    """Fewer heads of the same head_dim and the same ratio of query to key heads."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    keep = min(kv_heads, 2)
    if keep * (heads // kv_heads) >= heads:
        return
    config.hidden_size = head_dim * keep * (heads // kv_heads)
    if hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = keep
    config.num_attention_heads = keep * (heads // kv_heads)


def _shrink_lengths(config: Any) -> None:
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [p for p in parameters.values() if isinstance(p, dict)] or [parameters]
    for rope in nested:
        if "original_max_position_embeddings" in rope:
            rope["original_max_position_embeddings"] = SHRUNKEN_LENGTH
    if hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = SHRUNKEN_LENGTH
    config.max_position_embeddings = SHRUNKEN_LENGTH


def _randomise(network: Any) -> None:
    """Noise on every weight: fresh biases and norms are zeros and ones, which would hide mistakes."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
