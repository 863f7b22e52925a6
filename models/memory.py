"""How many bytes a step takes, predicted before it runs; ``kernels.peak`` measures them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from kernels.contract import Workspace
from kernels.math.workspace import selection_bytes
from kernels.peak import PeakBytes
from kernels.registry import load as load_backend
from models.arena import PAGE_TOKENS
from models.contract import Choice
from models.head import ROWS_AT_ONCE
from models.heap import border_for
from models.plan import ModelPlan
from models.planned import Planned, exact
from models.seam import LayerPlan, window_params

MEASURED_FROM_TOKENS = 512
"""Below this many tokens a step's memory drowns in the allocator's noise, and measuring would cost more than
it tells."""

HEAP_FACTOR = 2.5
"""What blocks from the C library's heap take beyond what lives in them: holes that no aligned block fits.
About what small steps take; near the largest measured for documents of some thousand tokens, which took
between half of it and all of it."""

SYSTEM_FACTOR = 1.15
"""The same for large blocks, which come from the system: whole pages, and the small tensors beside them."""

SCRATCH_BYTES = 4 << 20
"""What the linear algebra library keeps for itself from its first large product on."""


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
    mlp_blocks: int
    """Blocks of ``intermediate_size`` columns that an MLP holds at once: gate, up and their product; two
    where nothing is gated."""

    @property
    def cache_bytes_per_token(self) -> int:
        return sum(shape.elements_per_token for shape in self.plan.shapes) * self.itemsize

    def hidden_bytes(self, rows: int) -> int:
        """Of the hidden states of so many rows."""
        return rows * self.hidden_size * self.itemsize


def mlp_blocks(body: nn.Module, widest: int) -> int:
    """``Sizes.mlp_blocks`` of a network whose widest linear layers have ``widest`` columns: gated where two
    of them lie side by side."""
    for module in body.modules():
        beside = [m for m in module.children() if isinstance(m, nn.Linear) and m.out_features == widest]
        if len(beside) > 1:
            return 3
    return 2


def estimate_bytes(sizes: Sizes, tokens: int, new_tokens: int, choice: Choice, chunk_tokens: int) -> int:
    """Peak bytes of one request: its cache with what stays beside it, and the activations of its largest
    step.

    A decoder reads ``chunk_tokens`` at a time, an encoder everything at once; the last chunk sees most keys.
    Within a step the largest moment is one layer's MLP, its projections, or its attention kernel under the
    chosen backend; the residual stream stays beside it, and so do the selections (masks, drawn keys) that the
    step leaves in the kernels' caches. What earlier steps left there is not counted: those caches are bounded
    for the whole process. A CPU's pages count as far as they are written, other devices' as a whole.
    """
    rows = min(tokens, chunk_tokens) if sizes.plan.causal else tokens
    calls = [_workspace(sizes, layer, choice, rows, tokens) for layer in sizes.plan.layers]
    live = _activations(sizes, rows, calls) + _head_bytes(sizes, rows, 1 if new_tokens else rows)
    cache = _cache_bytes(sizes, tokens + new_tokens, choice) if sizes.plan.causal else 0
    return cache + selection_bytes(calls) + live + (SCRATCH_BYTES if sizes.on_cpu else 0)


def _cache_bytes(sizes: Sizes, tokens: int, choice: Choice) -> int:
    """Keys and values of so many tokens, and what is kept beside them."""
    held = tokens if sizes.on_cpu else -(-tokens // PAGE_TOKENS) * PAGE_TOKENS
    beside = [_workspace(sizes, layer, choice, 1, tokens).cache_bytes for layer in sizes.plan.layers]
    return sizes.cache_bytes_per_token * held + sum(beside)


def _taken(sizes: Sizes, rows: int, live_bytes: int, block_bytes: int) -> int:
    """Bytes that tensors of ``live_bytes`` in blocks of about ``block_bytes`` take, in a step of so many
    rows."""
    from_heap = sizes.on_cpu and block_bytes < border_for(sizes.hidden_bytes(rows))
    return int((HEAP_FACTOR if from_heap else SYSTEM_FACTOR) * live_bytes)


def _workspace(sizes: Sizes, layer: LayerPlan, choice: Choice, rows: int, keys: int) -> Workspace:
    """What the layer's kernel takes for the step's rows: the choice's, or that of the layer's own window."""
    call = layer.call_shape(rows, keys, sizes.itemsize, sizes.on_cpu)
    if layer.window is not None:
        return load_backend("window").workspace(window_params(layer.window), call)
    part = choice.at(layer.ordinal)
    found = load_backend(part.backend).workspace(part.params, call)
    if not isinstance(choice, Planned):
        return found
    again = exact()  # it may come to be repaired, into an answer of its own
    repair = load_backend(again.backend).workspace(again.params, call).live_bytes
    answer = rows * layer.num_heads * layer.shape.value_dim * sizes.itemsize
    return replace(found, live_bytes=max(found.live_bytes, repair + answer))


def _activations(sizes: Sizes, rows: int, calls: Sequence[Workspace]) -> int:
    """The residual stream and the largest moment beside it."""
    row = rows * sizes.itemsize

    def taken(elements: int, width: int, beside_bytes: int = 0) -> int:
        return _taken(sizes, rows, row * elements + beside_bytes, row * width)

    stream = taken(3 * sizes.hidden_size, sizes.hidden_size)  # itself, its normed copy, the sum being formed
    moments = [taken(sizes.mlp_blocks * sizes.intermediate_size, sizes.intermediate_size)]
    for layer, call in zip(sizes.plan.layers, calls, strict=True):
        heads = layer.num_heads * layer.shape.key_dim
        moments.append(taken(_projected(layer), heads))
        moments.append(taken(_around_kernel(layer), heads, call.live_bytes))
    return stream + max(moments)


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


def _head_bytes(sizes: Sizes, rows: int, rows_of_logits: int) -> int:
    """Logits and their fp32 copy; a request that generates wants those of one row."""
    block = min(rows_of_logits, ROWS_AT_ONCE) * sizes.vocab_size * 4
    return _taken(sizes, rows, 2 * block, block)
