"""Where a transformers network meets the kernels: one attention function and one mask function, registered
under the name ``longreach``.

The network runs on a packed token stream [1, T]. What a step has to know about its sequences travels as the
forward keyword ``longreach``, never in the config: a ``models.step.Step`` while serving, a
``models.plan.Probe`` once at load. Masks are never built: the mask function hands on what transformers would
have masked, and the probe reads from it whether a layer is causal and how wide its own window is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Protocol

from transformers import AttentionInterface, AttentionMaskInterface

from kernels.contract import CallShape, Params
from kernels.registry import load as load_backend
from models.arena import LayerShape

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "longreach"

Learned = Mapping[str, Sequence[object]]
"""Backend -> its parameters in each layer to which a choice applies, in order."""


@dataclass(frozen=True)
class MaskRequest:
    """What a layer asked to be masked: transformers' own element-wise predicate (batch, head, query, key) ->
    bool, and the window it mentions, if any."""

    allowed: Callable[..., Any]
    window: int | None
    padding: Any


@dataclass(frozen=True)
class LayerPlan:
    """One attention call of the forward, in calling order.

    ``window`` is the layer's own sliding window as the ``window`` backend counts it, None where the request's
    choice applies; ``ordinal`` counts the layers of the same kind.
    """

    causal: bool
    window: int | None
    ordinal: int
    num_heads: int
    shape: LayerShape

    @cached_property
    def flops_per_pair(self) -> int:
        return 2 * (self.shape.key_dim + self.shape.value_dim)

    def call_shape(self, num_rows: int, num_keys: int, itemsize: int, on_cpu: bool) -> CallShape:
        """The sizes of its call for the last ``num_rows`` of ``num_keys`` positions."""
        return CallShape(
            num_rows=num_rows,
            num_keys=num_keys,
            num_heads=self.num_heads,
            num_kv_heads=self.shape.num_kv_heads,
            key_dim=self.shape.key_dim,
            value_dim=self.shape.value_dim,
            itemsize=itemsize,
            causal=self.causal,
            on_cpu=on_cpu,
        )


class Context(Protocol):
    """What the forward keyword ``longreach`` must offer: [1, H, T, D] in, [1, T, H, Dv] out."""

    def attend(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Any,
        scale: float,
        extra: dict[str, Any],
    ) -> Tensor: ...


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    *,
    scaling: float | None = None,
    longreach: Context | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls for every attention layer."""
    if longreach is None:
        raise RuntimeError(
            f"{type(module).__name__} did not hand on the forward keyword 'longreach': "
            "its attention cannot be chosen per request"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return longreach.attend(module, query, key, value, attention_mask, scale, extra), None


def mask(*, mask_function: Callable[..., Any], attention_mask: Any = None, **extra: Any) -> MaskRequest:
    """The function transformers calls to build a mask: builds none, says what was asked for."""
    return MaskRequest(mask_function, extra.get("local_size"), attention_mask)


@cache
def window_params(window: int) -> Params:
    """The ``window`` backend's params for a layer's own window. ValueError where the backend has no such
    window."""
    return load_backend("window").params.model_validate({"window": window})


def register() -> None:
    """Make ``attn_implementation="longreach"`` known to transformers. Idempotent."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
