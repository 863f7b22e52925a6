"""FlexAttention's side of the bench: the patterns it can express by blocks, compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from kernels.bench import Case


def runner(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor] | str:
    return "todo"
