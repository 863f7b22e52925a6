"""The queries, keys and values of attention layers, recorded while a decoder reads a text.

They are what the network itself computes along the trajectory of exact attention, chunk by chunk as served.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kernels.api import parse_params
from models.contract import Choice, ModelError
from models.kv_cache import Cache
from models.network import Network
from models.rotary import sequence_lengths
from models.seam import NAME, LayerPlan, Member, Step

PROJECTIONS = ("o_proj", "out_proj", "dense")


@dataclass(frozen=True)
class LayerRecord:
    """One layer's attention over the whole text: q [1, H, T, D], k [1, Hk, T, D], v [1, Hk, T, Dv], its
    output projection ``w_o`` [E, H Dv], and its place among the layers."""

    index: int
    plan: LayerPlan
    scale: float
    q: Tensor
    k: Tensor
    v: Tensor
    w_o: Tensor


@dataclass
class _Seen:
    queries: list[Tensor] = field(default_factory=list)
    scale: float = 0.0
    w_o: Tensor | None = None


class _Recorder:
    """The forward keyword ``longreach`` of one chunk: hands every call on to a serving step and keeps what
    the wanted layers asked for."""

    def __init__(self, step: Step, seen: dict[int, _Seen]) -> None:
        self._step = step
        self._seen = seen
        self._next = 0

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
        seen = self._seen.get(self._next)
        self._next += 1
        if seen is not None:
            seen.queries.append(q)
            seen.scale = scale
            seen.w_o = output_projection(module, q.shape[1] * v.shape[-1])
        return self._step.attend(module, q, k, v, mask, scale, extra)


def output_projection(module: nn.Module, width: int) -> Tensor:
    """W_O [E, H Dv] of an attention module. ModelError where none of its parts takes ``width`` = H Dv
    inputs."""
    for name in PROJECTIONS:
        linear = getattr(module, name, None)
        if isinstance(linear, nn.Linear) and linear.in_features == width:
            return linear.weight.detach()
    told = ", ".join(f"{name} ({type(child).__name__})" for name, child in module.named_children())
    raise ModelError(
        f"{type(module).__name__} has no output projection of {width} inputs named "
        f"{' or '.join(PROJECTIONS)}; it has {told or 'no parts'}"
    )


def chunks(tokens: int, chunk_tokens: int) -> Iterator[slice]:
    """Rows start .. stop of each chunk; ``chunk_tokens`` 0 is the whole text at once."""
    step = chunk_tokens or tokens
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


@torch.inference_mode()
def record_layers(
    network: Network, token_ids: Sequence[int], layers: Sequence[int], chunk_tokens: int
) -> list[LayerRecord]:
    """Read ``token_ids`` with exact attention and record ``layers``. ModelError for an encoder, or where a
    layer's output projection cannot be found."""
    if not network.plan.causal:
        raise ModelError("quality is measured on decoders; this model reads in both directions")
    cache = Cache(network.plan.shapes, len(token_ids), network.body.dtype, network.device)
    seen = {layer: _Seen() for layer in layers}
    for rows in chunks(len(token_ids), chunk_tokens):
        _read(network, token_ids, rows, cache, seen)
    return [_record(network, cache, layer, seen[layer], len(token_ids)) for layer in layers]


def _read(
    network: Network, token_ids: Sequence[int], rows: slice, cache: Cache, seen: dict[int, _Seen]
) -> None:
    choice = Choice("exact", parse_params("exact"))
    member = Member(slice(0, rows.stop - rows.start), rows.start, choice, cache)
    step = Step(network.plan.layers, [member])
    ids = torch.tensor(token_ids[rows], dtype=torch.int64, device=network.device)
    positions = torch.arange(rows.start, rows.stop, device=network.device)
    with sequence_lengths(torch.full_like(positions, len(token_ids))[None]):
        network.body(
            input_ids=ids[None],
            position_ids=positions[None] + network.plan.position_offset,
            **{NAME: _Recorder(step, seen)},
            **network.arguments,
        )
    step.finish()


def _record(network: Network, cache: Cache, layer: int, seen: _Seen, tokens: int) -> LayerRecord:
    assert seen.w_o is not None, "a layer that was never called. This is a bug."
    keys, values = cache.keys_values(layer, tokens)
    queries = torch.cat(seen.queries, dim=2)
    return LayerRecord(layer, network.plan.layers[layer], seen.scale, queries, keys, values, seen.w_o)
