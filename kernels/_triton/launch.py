"""One launch of one kernel, as data: what runs is what the compile report compiles.

A builder makes a ``Launch`` from tensors. On a device it is ``run``; on tensors of device ``meta`` the
compile report reads its signature, constants and options from it and compiles them for chips that are not
there.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernels.compiled import listen

listen()

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Work:
    """What one launch computes, for the roofline estimate: operations of matrix products, exponentials, and
    bytes that must come from or go to memory once."""

    flops: float
    exps: float
    bytes: float


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a CUDA device the current one, to which Triton launches, where another is."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


@dataclass(frozen=True)
class Launch:
    """``args`` in the kernel's order: tensors, ints, floats. ``constants`` are its constexprs. ``sizes``
    names the ints that change from call to call (lengths, strides of a growing cache): the kernel must list
    them in ``do_not_specialize``, so that a new length compiles nothing."""

    kernel: str
    fn: Any
    grid: tuple[int, ...]
    args: Mapping[str, Tensor | int | float]
    constants: Mapping[str, int | bool | str | float]
    num_warps: int = 4
    num_stages: int = 2
    sizes: frozenset[str] = frozenset()
    multiplies: bool = True
    """Whether the kernel multiplies matrices: the compile report then looks for matrix instructions."""
    work: Work | None = None
    notes: Mapping[str, int | str] = field(default_factory=dict)
    """What else tells two variants of one kernel apart in the report."""

    def run(self) -> None:
        """Launch it, on the device of its tensors. A grid without programs launches nothing."""
        if 0 in self.grid:
            return
        with current(next(x.device for x in self.args.values() if isinstance(x, Tensor))):
            self.fn[self.grid](
                *self.args.values(),
                **self.constants,
                num_warps=self.num_warps,
                num_stages=self.num_stages,
                enable_fp_fusion=True,  # as the compile report has it; Triton's default is about to change
            )

    def signature(self) -> dict[str, str]:
        """Triton's type of every argument, constants included."""
        types = {name: self._type(name, value) for name, value in self.args.items()}
        return types | dict.fromkeys(self.constants, "constexpr")

    def divisible(self) -> list[str]:
        """Arguments that a launch specialises on being a multiple of 16."""
        return [
            name
            for name, value in self.args.items()
            if isinstance(value, Tensor)
            or (
                isinstance(value, int)
                and not isinstance(value, bool)
                and name not in self.sizes
                and value % 16 == 0
            )
        ]

    def _type(self, name: str, value: Tensor | int | float) -> str:
        if isinstance(value, Tensor):
            return "*" + _TYPES[value.dtype]
        if isinstance(value, float):
            return "fp32"
        if value == 1 and name not in self.sizes:
            return "constexpr"
        return "i64" if value > 2**31 - 1 else "i32"
