"""Whether impl ``triton`` can run a call, and every reason why not."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from kernels._triton.targets import TARGETS, interpreting

MIN_CAPABILITY = 80
MAX_HEAD_DIM = 256
MIN_SHARED_BYTES = TARGETS[MIN_CAPABILITY].shared_bytes
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(q: Tensor, v: Tensor) -> list[str]:
    """Reasons why Triton kernels cannot compute attention of q [..., D] over v [..., Dv]; [] where they
    can."""
    return why_not_there(q.device, q.dtype, max(q.shape[-1], v.shape[-1]))


def why_not_there(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    """The same before there are tensors; ``head_dim`` is the widest of keys and values."""
    reasons = [*_why_not_installed(), *_why_not_device(device)]
    if dtype not in _DTYPES:
        reasons.append(f"impl 'triton' computes in float32, bfloat16 or float16, not in {_name(dtype)}")
    if dtype == torch.bfloat16 and device.type == "cpu" and interpreting():
        reasons.append("Triton's interpreter has no bfloat16: take float32 or float16")
    if head_dim > MAX_HEAD_DIM:
        reasons.append(f"impl 'triton' takes a head_dim of at most {MAX_HEAD_DIM}, got {head_dim}")
    return reasons


@cache
def _why_not_installed() -> tuple[str, ...]:
    if find_spec("triton") is None:
        return ("the package triton is not installed: pip install 'longreach[gpu]'",)
    return ()


def _why_not_device(device: torch.device) -> list[str]:
    if device.type == "cpu":
        if interpreting():
            return []
        return ["impl 'triton' needs tensors on a CUDA device, these are on the CPU"]
    if device.type != "cuda":
        return [f"impl 'triton' needs tensors on a CUDA device, these are on {device.type}"]
    return _why_not_chip(device.index if device.index is not None else torch.cuda.current_device())


@cache
def _why_not_chip(index: int) -> list[str]:
    if torch.version.hip is not None:
        return ["impl 'triton' is written for NVIDIA's chips"]
    major, minor = torch.cuda.get_device_capability(index)
    if 10 * major + minor < MIN_CAPABILITY:
        return [f"impl 'triton' needs compute capability 8.0 or later, this device has {major}.{minor}"]
    chip: Any = torch.cuda.get_device_properties(index)  # torch's types do not know the name
    shared: int = chip.shared_memory_per_block_optin
    if shared < MIN_SHARED_BYTES:
        return [
            f"impl 'triton' has tiles for chips with {MIN_SHARED_BYTES:,} bytes of shared memory a block "
            f"(A100, H100, B200), this device has {shared:,}"
        ]
    return []


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
