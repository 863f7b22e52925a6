"""The queries, keys and values of attention layers, recorded while a model reads a text.

They are what the network itself computes along the trajectory of exact attention, read as served: by a
decoder chunk by chunk, by an encoder at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kernels.api import parse_params
from models.contract import Choice, ModelError
from models.kv_cache import Cache
from models.network import Network
from models.rotary import sequence_lengths
from models.seam import NAME, LayerPlan
from models.step import Member, Step


@dataclass(frozen=True)
class LayerRecord:
    """One layer's attention over the whole text: q [1, H, T, D], k [1, Hk, T, D], v [1, Hk, T, Dv], its
    output projection ``w_o`` [E, H Dv], its place among the layers, and what the model carries there for
    backends that need parameters of their own."""

    index: int
    plan: LayerPlan
    scale: float
    q: Tensor
    k: Tensor
    v: Tensor
    w_o: Tensor
    learned: Mapping[str, object] = field(default_factory=dict)


@dataclass
class _Seen:
    queries: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    scale: float = 0.0


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
            for held, tensor in ((seen.queries, q), (seen.keys, k), (seen.values, v)):
                held.append(tensor)
            seen.scale = scale
        return self._step.attend(module, q, k, v, mask, scale, extra)


def chunks(tokens: int, chunk_tokens: int) -> Iterator[slice]:
    """Rows start .. stop of each chunk; ``chunk_tokens`` 0 is the whole text at once."""
    step = chunk_tokens or tokens
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


@torch.inference_mode()
def record_layers(
    network: Network, token_ids: Sequence[int], layers: Sequence[int], chunk_tokens: int
) -> list[LayerRecord]:
    """Read ``token_ids`` with exact attention and record ``layers``. ModelError where an encoder is to read
    in chunks, or where a layer's output projection cannot be found."""
    if chunk_tokens and not network.plan.causal:
        raise ModelError("a model that reads in both directions reads a text at once: give 0 chunk tokens")
    weights = [_output_projection(network, layer) for layer in layers]
    cache = _cache(network, len(token_ids))
    seen = {layer: _Seen() for layer in layers}
    for rows in chunks(len(token_ids), chunk_tokens):
        _read(network, token_ids, rows, cache, seen)
    return [_record(network, layer, seen.pop(layer), w_o) for layer, w_o in zip(layers, weights, strict=True)]


def _output_projection(network: Network, layer: int) -> Tensor:
    place = network.places[layer]
    if isinstance(place, str):
        raise ModelError(f"the output projection of layer {layer} is not known: {place}")
    return place.w_o


def _cache(network: Network, tokens: int) -> Cache | None:
    if not network.plan.causal:
        return None
    return Cache(network.plan.shapes, tokens, network.body.dtype, network.device)


def _read(
    network: Network, token_ids: Sequence[int], rows: slice, cache: Cache | None, seen: dict[int, _Seen]
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


def _record(network: Network, layer: int, seen: _Seen, w_o: Tensor) -> LayerRecord:
    queries, keys, values = (torch.cat(parts, dim=2) for parts in (seen.queries, seen.keys, seen.values))
    plan = network.plan.layers[layer]
    learned = {backend: layers[plan.ordinal] for backend, layers in network.learned.items()}
    return LayerRecord(layer, plan, seen.scale, queries, keys, values, w_o, learned)
