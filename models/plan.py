"""What a network does with attention, learnt from one instrumented forward at load, and every reason to
refuse it.

The probe is the forward keyword ``longreach`` of that one forward. It sees each attention call as the network
makes it: the mask asked for, extra arguments, head counts. Whatever the seam does not implement is refused
here, with the reason; what remains is checked in numbers by ``models.self_test``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.contract import ModelError
from models.kv_cache import LayerShape
from models.masks import read_mask
from models.seam import NAME, LayerPlan, MaskRequest

PROBE_TOKENS = 12

REFUSED_ARGUMENTS = {
    "softcap": "soft-capped attention logits",
    "s_aux": "learned attention sinks",
    "sinks": "learned attention sinks",
    "position_bias": "an additive position bias",
    "alibi": "an additive position bias (ALiBi)",
    "head_mask": "a head mask",
    "layer_head_mask": "a head mask",
}
KNOWN_TENSORS = {"position_ids", "cache_position", "input_ids"}
KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class ModelPlan:
    """The attention layers of a network in calling order, and where its positions begin."""

    layers: tuple[LayerPlan, ...]
    position_offset: int = 0

    @property
    def causal(self) -> bool:
        return self.layers[0].causal

    @property
    def shapes(self) -> tuple[LayerShape, ...]:
        return tuple(layer.shape for layer in self.layers)

    @property
    def applied_layers(self) -> tuple[int, ...]:
        return tuple(i for i, layer in enumerate(self.layers) if layer.window is None)

    @property
    def local_layers(self) -> dict[int, int]:
        return {i: layer.window for i, layer in enumerate(self.layers) if layer.window is not None}


class Probe:
    """Records every attention call; answers with zeros of the right shape."""

    def __init__(self, max_tokens: int) -> None:
        self.layers: list[LayerPlan] = []
        self._max_tokens = max_tokens
        self._keys: list[Tensor] = []  # kept, so that an address seen twice means a tensor seen twice

    def attend(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Any,
        scale: float,
        extra: dict[str, Any],
    ) -> Tensor:
        _refuse_arguments(module, extra)
        self._refuse_shapes(module, q, k, v)
        causal, window = _causal_and_window(module, mask, extra, self._max_tokens)
        ordinal = sum((layer.window is None) == (window is None) for layer in self.layers)
        shape = LayerShape(k.shape[1], k.shape[-1], v.shape[-1])
        self.layers.append(LayerPlan(causal, window, ordinal, q.shape[1], shape))
        return v.new_zeros(1, q.shape[2], q.shape[1], v.shape[-1])

    def _refuse_shapes(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> None:
        name = type(module).__name__
        if getattr(module, "is_cross_attention", False) or not q.shape[2] == k.shape[2] == v.shape[2]:
            raise ModelError(
                f"{name} attends to another sequence (cross attention), which the seam does not serve"
            )
        if q.shape[0] != 1 or q.shape[1] % k.shape[1] or k.shape[1] != v.shape[1]:
            raise ModelError(
                f"{name} has {q.shape[1]} query heads over {k.shape[1]} key and {v.shape[1]} value heads "
                f"for a batch of {q.shape[0]}: the seam needs a multiple"
            )
        if any(k.data_ptr() == other.data_ptr() for other in self._keys):
            raise ModelError(
                f"{name} shares keys and values with an earlier layer, which the seam does not serve"
            )
        self._keys.append(k)


def refuse_config(config: Any) -> None:
    """Refuse what the configuration alone gives away. Raises ModelError."""
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{config.model_type!r} is an encoder-decoder: only networks with one stack are served"
        )
    if any(getattr(config, name, None) is not None for name in ("vision_config", "audio_config")):
        raise ModelError(
            f"{config.model_type!r} is multimodal: only text models are served. Load its text model alone."
        )
    unknown = sorted(set(getattr(config, "layer_types", None) or ()) - KNOWN_LAYER_TYPES)
    if unknown:
        raise ModelError(
            f"{config.model_type!r} has layers of type {', '.join(unknown)}; served are "
            "full_attention and sliding_attention (no chunked attention, convolution or state space)"
        )
    if getattr(config, "num_kv_shared_layers", 0):
        raise ModelError(
            f"{config.model_type!r} shares keys and values between layers, which the seam does not serve"
        )
    if getattr(config, "add_cross_attention", False):
        raise ModelError(
            f"{config.model_type!r} is configured with cross attention, which the seam does not serve"
        )


def refuse_class(network_class: type) -> None:
    """Refuse an architecture that does not call transformers' attention interface. Raises ModelError."""
    if not getattr(network_class, "_supports_attention_backend", False):
        raise ModelError(
            f"{network_class.__name__} does not dispatch its attention through transformers' interface: "
            "its attention cannot be chosen per request"
        )


def _refuse_arguments(module: nn.Module, extra: dict[str, Any]) -> None:
    name = type(module).__name__
    for argument, meaning in REFUSED_ARGUMENTS.items():
        if extra.get(argument) is not None:
            raise ModelError(f"{name} uses {meaning} ({argument}), which the seam does not implement")
    if extra.get("dropout"):
        raise ModelError(f"{name} drops attention weights (dropout={extra['dropout']}) in evaluation mode")
    for argument, value in extra.items():
        if isinstance(value, Tensor) and argument not in KNOWN_TENSORS:
            raise ModelError(
                f"{name} passes a tensor {argument!r} to attention, which the seam does not know"
            )


def _causal_and_window(
    module: nn.Module, mask: Any, extra: dict[str, Any], max_tokens: int
) -> tuple[bool, int | None]:
    name = type(module).__name__
    if isinstance(mask, MaskRequest):
        return read_mask(mask, name, max_tokens)
    if mask is not None:
        raise ModelError(
            f"{name} builds an attention mask of its own ({type(mask).__name__}) instead of asking for one"
        )
    if extra.get("sliding_window") is not None:
        raise ModelError(f"{name} declares a sliding window without asking for its mask")
    is_causal = extra.get("is_causal")
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal), None


def body_arguments(body: nn.Module) -> dict[str, Any]:
    """The fixed keywords of every forward of this network: no cache of transformers' own."""
    parameters = inspect.signature(body.forward).parameters
    if "position_ids" not in parameters:
        raise ModelError(f"{type(body).__name__} takes no position_ids: it cannot run on a packed stream")
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise ModelError(
            f"{type(body).__name__} hands no keywords on to attention: it does not use the interface"
        )
    return {"use_cache": False} if "use_cache" in parameters else {}


def make_plan(body: Any, max_tokens: int, token_ids: Callable[[int], Tensor]) -> ModelPlan:
    """Run one short forward and read the plan off it. ``token_ids(n)`` gives [1, n] ordinary tokens.
    ModelError."""
    config = body.config
    refuse_config(config)
    refuse_class(type(body))
    probe = Probe(max_tokens)
    num_tokens = min(PROBE_TOKENS, max_tokens)
    positions = torch.arange(num_tokens, device=body.device)[None]
    arguments = body_arguments(body)
    try:
        with torch.inference_mode():
            body(input_ids=token_ids(num_tokens), position_ids=positions, **{NAME: probe}, **arguments)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{type(body).__name__} does not run on a packed stream: {error}") from error
    _refuse_layers(type(body).__name__, probe.layers, int(getattr(config, "num_hidden_layers", 1)))
    return ModelPlan(tuple(probe.layers))


def _refuse_layers(name: str, layers: list[LayerPlan], expected: int) -> None:
    if len(layers) < expected:
        raise ModelError(
            f"{name} has {expected} layers and called attention {len(layers)} times: some layers mix tokens "
            "in another way (convolution, state space) or do not use transformers' interface"
        )
    if len({layer.causal for layer in layers}) > 1:
        raise ModelError(f"{name} mixes causal and bidirectional layers, which the seam does not serve")
