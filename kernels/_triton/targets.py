"""What a kernel's tiles are chosen for: a chip, or Triton's interpreter.

The numbers of each chip are its maker's: NVIDIA's data sheets and the CUDA programming guide's table of
technical specifications per compute capability.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

import torch

INTERPRETED = "interpreted"


@dataclass(frozen=True)
class Target:
    """``capability`` 90 means sm_90. Rates are peaks: dense products of 16-bit floats in TFLOP/s,
    exponentials in 10^12 a second, memory in GB/s."""

    name: str
    capability: int
    chip: str
    shared_bytes: int
    """Shared memory that one block of threads may have."""
    shared_bytes_per_sm: int
    num_sms: int
    registers_per_sm: int = 65536
    threads_per_sm: int = 2048
    blocks_per_sm: int = 32
    tflops: float = 0.0
    texps: float = 0.0
    bandwidth_gb: float = 0.0


TARGETS = {
    80: Target("sm_80", 80, "A100 SXM 80GB", 166912, 167936, 108, tflops=312, texps=2.4, bandwidth_gb=2039),
    90: Target("sm_90", 90, "H100 SXM", 232448, 233472, 132, tflops=989, texps=3.7, bandwidth_gb=3350),
    100: Target("sm_100", 100, "B200", 232448, 233472, 148, tflops=2250, texps=4.4, bandwidth_gb=8000),
}
"""The chips that kernels are compiled for ahead of time, by capability."""


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU: decided by the environment before any kernel
    is imported (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def target_of(device: torch.device) -> Target:
    """The chip of a CUDA device, as the nearest of ``TARGETS`` that is not newer than it and multiplies with
    the same instructions; sm_90's tiles in the interpreter."""
    if device.type != "cuda":
        return TARGETS[90]
    return _target_of(device.index if device.index is not None else torch.cuda.current_device())


@cache
def _target_of(index: int) -> Target:
    return nearest(*torch.cuda.get_device_capability(index))


def nearest(major: int, minor: int) -> Target:
    """The target for a compute capability. From sm_120 on, consumers' chips have sm_80's instructions and
    less shared memory than sm_90's tiles may take."""
    capability = 10 * major + minor
    older = [known for known in TARGETS if known <= capability]
    return TARGETS[80 if capability >= 120 else max(older, default=80)]
