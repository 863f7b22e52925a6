"""The only list of kernels: name -> module, as strings. Each module has
``examples(target, dtype, head_dim)``, which gives the launches that the compile report compiles: its kernels
at their default tiles."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

import torch

from kernels._triton.launch import Launch
from kernels._triton.targets import Target

KERNELS: dict[str, str] = {
    "block_sparse": "kernels._triton.block_sparse",
    "paged_decode": "kernels._triton.paged_decode",
    "linear": "kernels._triton.linear",
    "bucketed": "kernels._triton.bucketed",
    "vertical_slash": "kernels._triton.vertical_slash",
    "edges": "kernels._triton.edges",
    "signed": "kernels._triton.signed",
    "antidiagonal": "kernels._triton.antidiagonal",
    "selection": "kernels._triton.selection",
    "row_error": "kernels._triton.row_error",
}


def examples(target: Target, dtype: torch.dtype, head_dim: int) -> Iterator[Launch]:
    """Every kernel's launches for a chip, a dtype and a head_dim, on tensors without memory."""
    for module in KERNELS.values():
        yield from import_module(module).examples(target, dtype, head_dim)
