"""Errors of a running model. What concerns loading is ``models.contract.ModelError``."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class NonFiniteOutput(ArithmeticError):
    """A step produced NaN or infinity for one slice; nothing advanced, the other slices can be run again.

    ``index`` is the position of the slice in the call to ``step``.
    """

    def __init__(self, index: int, what: str) -> None:
        self.index = index
        super().__init__(
            f"slice {index}: the model's {what} contain NaN or infinity. Try another dtype (float32), "
            "attention or input; the weights may be damaged."
        )


def all_finite(values: Tensor) -> bool:
    """Whether no number is NaN or infinite. Their sum tells as a rule; where it does not (it may overflow),
    every number is looked at, which takes ten times as long."""
    return math.isfinite(float(values.sum())) or bool(torch.isfinite(values).all())
