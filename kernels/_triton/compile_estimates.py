"""How fast a launch could be at best, estimated from what was compiled: no substitute for a measurement.

    occupancy = resident warps / warps of an SM,    as many as registers, shared memory and threads allow
    time      = max(flops / matrix rate, exps / exponential rate, bytes / bandwidth)      (a roofline)

Registers are given to a warp 256 at a time and lie in four parts of an SM (CUDA programming guide, "Hardware
multithreading"; NVIDIA's occupancy calculator); each block takes 1,024 bytes of shared memory beside its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from kernels._triton.compile_launch import WARP_THREADS, CompiledLaunch
from kernels._triton.launch import Work
from kernels._triton.targets import Target

Bound = Literal["matrix", "exp", "memory"]

REGISTERS_AT_ONCE = 256
SM_PARTS = 4
SHARED_BYTES_OF_SYSTEM = 1024
TENSOR_MEMORY_COLUMNS = 512
TF32_PRODUCTS = 6
"""What a product of fp32 costs in products of 16 bits: three of tf32, which run at half their rate."""


@dataclass(frozen=True)
class Roofline:
    bound: Bound
    ms: float


def occupancy(compiled: CompiledLaunch, target: Target) -> float:
    """Share of an SM's warps that are resident, in a grid of blocks enough; 0 where not one block fits."""
    warps_of_sm = target.threads_per_sm // WARP_THREADS
    warps = min(warps_of_sm, _warps_by_registers(compiled.registers, target))
    blocks = min(target.blocks_per_sm, warps // compiled.num_warps)
    blocks = min(blocks, target.shared_bytes_per_sm // (compiled.shared_bytes + SHARED_BYTES_OF_SYSTEM))
    if compiled.tensor_memory_columns:
        blocks = min(blocks, TENSOR_MEMORY_COLUMNS // compiled.tensor_memory_columns)
    return blocks * compiled.num_warps / warps_of_sm


def _warps_by_registers(registers: int, target: Target) -> int:
    of_warp = -(-max(1, registers) * WARP_THREADS // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE
    return target.registers_per_sm // SM_PARTS // of_warp * SM_PARTS


def roofline(work: Work, target: Target, dtype: torch.dtype) -> Roofline:
    """The slowest of the chip's three rates for this work, and its time."""
    cost = TF32_PRODUCTS if dtype == torch.float32 else 1
    seconds: dict[Bound, float] = {
        "matrix": work.flops * cost / (target.tflops * 1e12),
        "exp": work.exps / (target.texps * 1e12),
        "memory": work.bytes / (target.bandwidth_gb * 1e9),
    }
    bound = max(seconds, key=lambda rate: seconds[rate])
    return Roofline(bound, seconds[bound] * 1e3)
