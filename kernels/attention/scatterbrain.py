"""Scatterbrain: exact attention on a sparse support, random features for everything outside it.

    out_i = (sum_{j in S_i} e^{s_ij} v_j + sum_{j not in S_i} L_ij v_j) / (the same without v)
    s_ij = scale <q_i, k_j>,   L_ij = sum_r e^(a_r(q_i) + e_r(k_j)),   E[L_ij] = e^{s_ij}

j over the keys that row i may see, S_i: what the ``support``, another backend, keeps. Chen et al.,
"Scatterbrain: unifying sparse and low-rank attention approximation" (arXiv 2110.15343), section 4; FAVOR+
features (``kernels.math.features``) of keys that lost their mean. The paper adds (e^s - L) on the support
to L everywhere; here L is summed over the complement itself, which is the same number without the
cancellation. Only under ``lsh`` and ``kmeans``, whose support has no shape, is the support's L taken off a
sum (``kernels.math.complement_buckets``). Numerator and denominator are unbiased over seeds; their quotient
is not.

Causal rows among the first ``centre_keys`` attend exactly to all their keys: the mean that later rows take
off would tell them of keys to come. Under a block selection that holds up to the end of their query tile.
``dropped`` is the share of the normaliser that the features carry: the estimated mass outside the support.

Cost: the support's, and O(N num_features D) for ``local`` and ``lsh``, O(N M num_features D / (query_tile
block_size)) for block selections. Under ``strided``, ``fixed``, ``random`` and whatever else touches most
blocks of keys the complement costs as much as exact attention: for measuring. Accumulates in fp32, returns
q's dtype.

When not to use it: where attention is sharp and the support finds the keys (there the features add noise:
their relative variance grows as e^(scale |q + k|^2)), or flat (there ``performer`` with twice the features
is better).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal, cast

from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import InitErrorDetails, PydanticCustomError
from torch import Tensor

from kernels.contract import AttentionResult, Backend, Call, CallShape, Capabilities, Params, Workspace
from kernels.math.complement import Support
from kernels.math.complement_blocks import blocks_attention
from kernels.math.complement_buckets import buckets_attention
from kernels.math.complement_flops import complement_flops
from kernels.math.complement_reference import scatterbrain_reference
from kernels.math.complement_tiles import tiles_attention
from kernels.math.complement_window import near_of, window_attention
from kernels.math.complement_workspace import complement_workspace
from kernels.math.features import FeatureParams
from kernels.math.per_layer import refused

SupportName = Literal[
    "local",
    "lsh",
    "kmeans",
    "window",
    "sinks",
    "strided",
    "fixed",
    "star",
    "random",
    "bigbird",
    "xattention",
    "pooled",
    "topk",
    "pages",
]
LOCAL = {"window": 256, "sinks": 4}
"""``local`` is backend ``sinks`` with these defaults."""


class ScatterbrainParams(FeatureParams):
    num_features: int = Field(default=64, ge=2, le=4096, description="Random features per head.")
    support: SupportName = Field(
        default="local",
        description="What is attended to exactly: local (a window and the first tokens), or another backend.",
    )
    support_params: dict[str, Any] = Field(
        default_factory=dict,
        description="That backend's own params (local: window 256 and sinks 4 unless given); its defaults "
        "stand for what is left out.",
        validate_default=True,
    )

    @field_validator("support_params", mode="before")
    @classmethod
    def _fits_the_support(cls, given: Any, info: ValidationInfo) -> Any:
        """The support's params with all its defaults, so that what means the same is equal."""
        if not isinstance(given, Mapping):
            return given
        if "support" not in info.data:  # it was refused itself: nothing to check these against
            return {}
        return _checked(info.data["support"], given).model_dump(mode="json")

    def support_backend(self) -> str:
        return "sinks" if self.support == "local" else self.support

    def support_knobs(self) -> Params:
        """The support's params, checked."""
        return self.parsed_support

    @cached_property
    def parsed_support(self) -> Params:
        """Made once per instance: every call of every layer asks."""
        return _checked(self.support, self.support_params)

    def chunk_multiple(self) -> int:
        return self.support_knobs().chunk_multiple()

    def reads_whole(self) -> bool:
        return self.support_knobs().reads_whole()

    def size_problems(self, num_layers: int, num_kv_heads: int) -> list[str]:
        own = self.support_knobs().size_problems(num_layers, num_kv_heads)
        return [f"support_params: {problem}" for problem in own]


def _checked(name: str, given: Mapping[str, Any]) -> Params:
    """The support's params. What they refuse comes as a ValidationError, which pydantic puts below
    ``support_params``, field by field."""
    from kernels.registry import load

    params = load("sinks" if name == "local" else name).params
    _refuse_unknown(params, given)
    knobs = params.model_validate({**(LOCAL if name == "local" else {}), **given})
    if getattr(knobs, "remainder", "none") != "none":
        raise _problems(
            {"remainder": "must be 'none' in a support: the features already stand for the blocks left out"}
        )
    if getattr(knobs, "skip", 0.0) > 0:
        raise _problems(
            {
                "skip": "must be 0 in a support: here no block that was chosen is passed over; lower the "
                "budget or mass instead"
            }
        )
    return knobs


def _refuse_unknown(params: type[Params], given: Mapping[str, Any]) -> None:
    from kernels.api import no_such, too_many

    fields = params.model_fields
    refusal = too_many(fields, given)
    if refusal is not None:
        raise refused(refusal)
    unknown = [name for name in given if name not in fields]
    if unknown:
        raise _problems(dict.fromkeys(unknown, no_such(fields)))


def _problems(found: Mapping[str, str]) -> ValidationError:
    """One complaint per field, none with the value given."""
    return ValidationError.from_exception_data(
        "support_params",
        [
            InitErrorDetails(
                type=PydanticCustomError("support", "{text}", {"text": text}), loc=(str(field),), input={}
            )
            for field, text in found.items()
        ],
    )


def support_of(params: ScatterbrainParams) -> Support:
    """The support as the mathematics below takes it."""
    from kernels.registry import load

    return Support(load(params.support_backend()), params.support_knobs())


def reference(q: Tensor, k: Tensor, v: Tensor, params: ScatterbrainParams, call: Call) -> AttentionResult:
    return scatterbrain_reference(q, k, v, params, call, support_of(params))


def attend(q: Tensor, k: Tensor, v: Tensor, params: ScatterbrainParams, call: Call) -> AttentionResult:
    support = support_of(params)
    near = near_of(support, call.causal)
    if near is not None:
        return window_attention(q, k, v, params, call, near)
    if support.backend.select is not None:
        return blocks_attention(q, k, v, params, call, support)
    if support.name in ("lsh", "kmeans"):
        return buckets_attention(q, k, v, params, call, support)
    return tiles_attention(q, k, v, params, call, support)


def unsupported(params: Params, causal: bool) -> list[str]:
    """The support's own reasons."""
    support = support_of(cast(ScatterbrainParams, params))
    able, reasons = support.backend.capabilities, []
    if not (able.causal if causal else able.bidirectional):
        reasons.append(f"it has no {'causal' if causal else 'bidirectional'} form")
    reasons += support.backend.unsupported(support.params, causal)
    return [f"its support {support.name!r}: {reason}" for reason in reasons]


def workspace(params: ScatterbrainParams, shape: CallShape) -> Workspace:
    support = support_of(params)
    return complement_workspace(params, shape, support, near_of(support, shape.causal))


def flops(params: ScatterbrainParams, shape: CallShape) -> float:
    support = support_of(params)
    return complement_flops(params, shape, support, near_of(support, shape.causal))


BACKEND = Backend(
    name="scatterbrain",
    summary="Exact attention on a sparse support, random features for all keys outside it (Scatterbrain).",
    paper="Chen et al., Scatterbrain (arXiv 2110.15343)",
    params=ScatterbrainParams,
    capabilities=Capabilities(
        causal=True,
        bidirectional=True,
        decode=True,
        exact=False,
        selection="tile",
        random=True,
        approximates=True,
        complexity="O(N (window + num_features)) for support local; else the support's",
        exponent=1.0,
    ),
    impls={"reference": reference, "torch": attend, "triton": attend},
    workspace=workspace,
    flops=flops,
    conditions=(
        "Numerator and denominator are unbiased over seeds, the quotient is not. It beats both of its halves "
        "where attention is neither flat nor sharp; at equal cost random features alone are better where it "
        "is flat, and the support alone where it is sharp. Only a local support decodes from a state of "
        "constant size. A key that is not finite reaches every row that may see it."
    ),
    unsupported=unsupported,
)
