"""How many bytes a step takes, predicted before it runs; ``kernels.peak`` measures them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kernels.contract import CallShape, Workspace
from kernels.math.workspace import selection_bytes
from kernels.peak import PeakBytes
from kernels.registry import load as load_backend
from models.contract import Choice
from models.head import ROWS_AT_ONCE
from models.plan import ModelPlan
from models.seam import LayerPlan, window_params

MEASURED_FROM_TOKENS = 512
"""Below this many tokens a step's memory drowns in the allocator's noise, and measuring would cost more than
it tells."""

HEAP_FACTOR = 1.3
"""What the allocator takes beyond live tensors: pieces of freed blocks that fit nothing else. Measured
between 1.0 (blocks of many MB, which go back to the system at once) and 1.9."""

WHOLE_DOCUMENT_HEAP_FACTOR = 1.8
"""The same for an encoder's whole document on a CPU as long as its hidden states come from glibc's heap:
1.75 to 1.97 was measured on the demo encoder at 3,000 to 7,000 tokens, 1.15 to 1.3 at 16,384."""

LARGEST_HEAP_BLOCK = 32 << 20
"""Blocks beyond this come from the system and go back to it (glibc's highest mmap threshold)."""


def watch_step(device: torch.device, num_tokens: int) -> Callable[[], int | None]:
    """Called before a step; what it gives, called after it, tells the step's peak bytes, or None."""
    if device.type == "cpu" and num_tokens < MEASURED_FROM_TOKENS:
        return lambda: None
    return PeakBytes(device).read


@dataclass(frozen=True)
class Sizes:
    """What the prediction needs to know of a network."""

    plan: ModelPlan
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    """0 where there is no language-model head."""
    itemsize: int
    on_cpu: bool

    @property
    def cache_bytes_per_token(self) -> int:
        return sum(shape.elements_per_token for shape in self.plan.shapes) * self.itemsize


def estimate_bytes(sizes: Sizes, tokens: int, new_tokens: int, choice: Choice, chunk_tokens: int) -> int:
    """Peak bytes of one request: its cache with what stays beside it, and the activations of its largest
    step.

    A decoder reads ``chunk_tokens`` at a time, an encoder everything at once; the last chunk sees most keys.
    Within a step the largest moment is one layer's MLP, its projections, or its attention kernel under the
    chosen backend; the residual stream stays beside it, and so do the selections (masks, drawn keys) that the
    step leaves in the kernels' caches. What earlier steps left there is not counted: those caches are bounded
    for the whole process.
    """
    rows = min(tokens, chunk_tokens) if sizes.plan.causal else tokens
    cache = sizes.cache_bytes_per_token * (tokens + new_tokens) if sizes.plan.causal else 0
    calls = [_workspace(sizes, layer, choice, rows, tokens) for layer in sizes.plan.layers]
    live = _activations(sizes, rows, calls) + _head_bytes(sizes, 1 if new_tokens else rows)
    at_the_end = [_workspace(sizes, layer, choice, 1, tokens + new_tokens) for layer in sizes.plan.layers]
    cache += sum(call.cache_bytes for call in at_the_end) if sizes.plan.causal else 0
    return cache + selection_bytes(calls) + int(_heap_factor(sizes, rows) * live)


def _heap_factor(sizes: Sizes, rows: int) -> float:
    from_heap = rows * sizes.hidden_size * sizes.itemsize < LARGEST_HEAP_BLOCK
    whole = sizes.on_cpu and not sizes.plan.causal
    return WHOLE_DOCUMENT_HEAP_FACTOR if whole and from_heap else HEAP_FACTOR


def _workspace(sizes: Sizes, layer: LayerPlan, choice: Choice, rows: int, keys: int) -> Workspace:
    """What the layer's kernel takes for the step's rows: the choice's, or that of the layer's own window."""
    shape = layer.shape
    call = CallShape(
        num_rows=rows,
        num_keys=keys,
        num_heads=layer.num_heads,
        num_kv_heads=shape.num_kv_heads,
        key_dim=shape.key_dim,
        value_dim=shape.value_dim,
        itemsize=sizes.itemsize,
        causal=layer.causal,
        on_cpu=sizes.on_cpu,
    )
    if layer.window is not None:
        return load_backend("window").workspace(window_params(layer.window), call)
    return load_backend(choice.backend).workspace(choice.params, call)


def _activations(sizes: Sizes, rows: int, calls: Sequence[Workspace]) -> int:
    residual = 3 * sizes.hidden_size  # the stream, its normed copy, and the sum being formed
    mlp = 3 * sizes.intermediate_size  # gate, up, and their product
    moments = [rows * mlp * sizes.itemsize]
    for layer, call in zip(sizes.plan.layers, calls, strict=True):
        moments.append(rows * _projected(layer) * sizes.itemsize)
        moments.append(rows * _around_kernel(layer) * sizes.itemsize + call.live_bytes)
    return rows * residual * sizes.itemsize + max(moments)


def _projected(layer: LayerPlan) -> int:
    """Elements per row that exist at once while queries and keys are rotated."""
    shape = layer.shape
    queries = 3 * layer.num_heads * shape.key_dim  # projected, rotated, and the rotation's intermediate
    return queries + shape.num_kv_heads * (2 * shape.key_dim + shape.value_dim)


def _around_kernel(layer: LayerPlan) -> int:
    """Elements per row beside the kernel's own: queries, keys, values, and the answer of the whole pack."""
    shape = layer.shape
    queries_and_answer = layer.num_heads * (shape.key_dim + shape.value_dim)
    return queries_and_answer + shape.elements_per_token


def _head_bytes(sizes: Sizes, rows: int) -> int:
    """Logits and their fp32 copy; a request that generates wants those of one row."""
    return 2 * min(rows, ROWS_AT_ONCE) * sizes.vocab_size * 4
