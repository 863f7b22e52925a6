"""How many bytes a step takes: measured at its high-water mark, and predicted before it runs."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from models.head import ROWS_AT_ONCE
from models.plan import ModelPlan
from models.seam import LayerPlan

MEASURED_FROM_TOKENS = 512
"""Below this many tokens a step's memory drowns in the allocator's noise, and measuring would cost more than
it tells."""

HEAP_FACTOR = 1.3
"""What the allocator takes beyond live tensors: pieces of freed blocks that fit nothing else. Measured
between 1.0 (blocks of many MB, which go back to the system at once) and 1.9."""

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_HIGH_WATER_MARK = "5"


class PeakBytes:
    """The high-water mark of what happens between construction and ``read``, beyond what was held before.

    On CUDA from torch's allocator; on Linux from the kernel's resident-set high-water mark, file-backed pages
    (weights read for the first time) left out. ``read`` gives None where neither can say.
    """

    def __init__(self, device: torch.device, num_tokens: int) -> None:
        self._device = device
        self._before: tuple[int, int] | None = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = (torch.cuda.memory_allocated(device), 0)
        elif device.type == "cpu" and num_tokens >= MEASURED_FROM_TOKENS:
            self._before = _reset_and_read()

    def read(self) -> int | None:
        if self._before is None:
            return None
        held, file_backed = self._before
        if self._device.type == "cuda":
            return max(0, torch.cuda.max_memory_allocated(self._device) - held)
        now = _status()
        if now is None:
            return None
        newly_mapped = now["RssFile"] - file_backed
        return max(0, now["VmHWM"] - held - newly_mapped)


def _reset_and_read() -> tuple[int, int] | None:
    """(resident bytes, file-backed ones) after giving free memory back and resetting the high-water mark."""
    _trim()
    try:
        _CLEAR_REFS.write_text(_RESET_HIGH_WATER_MARK)
    except OSError:
        return None
    status = _status()
    return None if status is None else (status["VmRSS"], status["RssFile"])


def _status() -> dict[str, int] | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    found = {
        name: int(rest.split()[0]) * 1024
        for name, _, rest in (line.partition(":") for line in lines)
        if name in ("VmHWM", "VmRSS", "RssFile")
    }
    return found if len(found) == 3 else None


@functools.cache
def _malloc_trim() -> object | None:
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except OSError:
        return None


def _trim() -> None:
    trim = _malloc_trim()
    if callable(trim):
        trim(0)


@dataclass(frozen=True)
class Sizes:
    """What the prediction needs to know of a network."""

    plan: ModelPlan
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    """0 where there is no language-model head."""
    itemsize: int

    @property
    def cache_bytes_per_token(self) -> int:
        return sum(shape.elements_per_token for shape in self.plan.shapes) * self.itemsize


def estimate_bytes(sizes: Sizes, tokens: int, new_tokens: int, chunk_tokens: int) -> int:
    """Peak bytes of one request: its cache, and the activations of its largest step.

    A decoder reads ``chunk_tokens`` at a time, an encoder everything at once. Within a step the largest
    moment is one layer's MLP or one layer's attention; the residual stream and the embeddings' leftovers stay
    beside it.
    """
    rows = min(tokens, chunk_tokens) if sizes.plan.causal else tokens
    cache = sizes.cache_bytes_per_token * (tokens + new_tokens) if sizes.plan.causal else 0
    return cache + int(HEAP_FACTOR * (rows * _bytes_per_row(sizes) + _head_bytes(sizes, rows)))


def _bytes_per_row(sizes: Sizes) -> int:
    attention = max(_attention_elements(layer) for layer in sizes.plan.layers)
    residual = 3 * sizes.hidden_size  # the stream, its normed copy, and the sum being formed
    mlp = 3 * sizes.intermediate_size  # gate, up, and their product
    return (residual + max(attention, mlp)) * sizes.itemsize


def _attention_elements(layer: LayerPlan) -> int:
    """Elements per row that exist at once around one layer's attention."""
    shape = layer.shape
    queries = 3 * layer.num_heads * shape.key_dim  # projected, rotated, and the rotation's intermediate
    keys_values = shape.num_kv_heads * (2 * shape.key_dim + shape.value_dim)
    outputs = 2 * layer.num_heads * shape.value_dim  # as the kernel gives it, and laid out for the projection
    return queries + keys_values + outputs


def _head_bytes(sizes: Sizes, rows: int) -> int:
    return 2 * min(rows, ROWS_AT_ONCE) * sizes.vocab_size * 4
