"""Compile what a model's requests will need before the first of them waits for it.

Each backend is run on random tensors as small as its kernels allow, in the shapes that decide which variants
are compiled: head_dim, query heads per key head, dtype, and prefill, chunk and decode. Lengths are arguments
of the kernels and compile nothing. What was compiled is kept on disk by Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.api import attend_packed, chosen_impl
from kernels.contract import Segment, Unsupported
from kernels.registry import load

ROWS = 650
"""Of a prompt: more than one query tile of every default, and a last one, and a last block, that are not
full."""
CHUNK_ROWS = 192
FEW_KEYS = 64
"""What one program reads at once in a decode step: rows over longer ones are merged of parts."""
NUM_SEQUENCES = 3


@dataclass(frozen=True)
class HeadShape:
    """What decides which variants of the kernels a layer needs."""

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    causal: bool
    dtype: torch.dtype
    device: torch.device


def compiles(names: Sequence[str], shape: HeadShape) -> list[str]:
    """Those backends that would run by impl ``triton``."""
    q, _, v = _tensors(shape, 1)
    return [name for name in names if chosen_impl(load(name), q, v, "auto") == "triton"]


def warm(name: str, shape: HeadShape, *, learned: object | None = None) -> None:
    """Run the backend at its default params: many prompts at once, the next chunk of one, and, where rows are
    causal, a decode step of many. What it cannot do for such a shape is left out."""
    calls = [(ROWS, 0, 1), (CHUNK_ROWS, 0, NUM_SEQUENCES)]
    if shape.causal:
        calls += [(CHUNK_ROWS, ROWS, 1), (1, ROWS, 1), (1, ROWS, NUM_SEQUENCES), (1, FEW_KEYS, NUM_SEQUENCES)]
    for rows, before, num_sequences in calls:
        _run(name, shape, rows, before, num_sequences, learned)


def _run(
    name: str, shape: HeadShape, rows: int, before: int, num_sequences: int, learned: object | None
) -> None:
    q, k, v = _tensors(shape, rows * num_sequences, (before + rows) * num_sequences)
    keys = before + rows
    segments = [
        Segment(
            slice(n * rows, (n + 1) * rows),
            k[:, :, n * keys : (n + 1) * keys],
            v[:, :, n * keys : (n + 1) * keys],
            before,
        )
        for n in range(num_sequences)
    ]
    try:
        attend_packed(
            q,
            segments,
            backend=name,
            causal=shape.causal,
            scale=shape.key_dim**-0.5,
            learned=learned,
        )
    except Unsupported:
        return


def _tensors(shape: HeadShape, rows: int, keys: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (
        (1, shape.num_heads, rows, shape.key_dim),
        (1, shape.num_kv_heads, keys, shape.key_dim),
        (1, shape.num_kv_heads, keys, shape.value_dim),
    )
    q, k, v = (torch.randn(size, dtype=shape.dtype, device=shape.device) for size in sizes)
    return q, k, v
