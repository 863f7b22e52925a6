"""Linear layers whose product a forward can be left in: rows of a long document at a time.

    y[a:b] = x[a:b] W^T + bias          stretches of PRODUCT_FLOPS, only within a forward that can be left

One product over a whole document of 32k tokens would take seconds.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.forward import can_be_left, offer_to_pause

PRODUCT_FLOPS = 5e9
"""Operations of a product between two yield points: 50 ms on two slow cores. A document of 4,000 tokens under
`window` takes 13 % longer in pieces of 2e9, 1 % longer in these."""
MIN_ROWS = 256
"""Fewer rows at a time would read the weights too often."""


class LeavableLinear(nn.Linear):
    """``nn.Linear`` with yield points. Outside a forward that can be left, the same with one comparison
    more: cheaper than a hook, which takes every call off torch's short way."""

    def forward(self, input: Tensor) -> Tensor:
        if not can_be_left():
            return F.linear(input, self.weight, self.bias)
        offer_to_pause()
        height = rows_at_once(self)
        if input.numel() <= height * self.in_features:
            return F.linear(input, self.weight, self.bias)
        return _in_stretches(self, input, height)


def rows_at_once(linear: nn.Linear) -> int:
    """Rows of a stretch: a multiple of MIN_ROWS."""
    affordable = int(PRODUCT_FLOPS) // (2 * linear.in_features * linear.out_features)
    return max(1, affordable // MIN_ROWS) * MIN_ROWS


def _in_stretches(linear: nn.Linear, input: Tensor, height: int) -> Tensor:
    rows = input.reshape(-1, linear.in_features)
    out = rows.new_empty(len(rows), linear.out_features)
    weights, bias = linear.weight.t(), linear._parameters["bias"]
    for begin in range(0, len(rows), height):
        if begin:
            offer_to_pause()
        some, into = rows[begin : begin + height], out[begin : begin + height]
        if bias is None:
            torch.mm(some, weights, out=into)
        else:
            torch.addmm(bias, some, weights, out=into)
    return out.view(*input.shape[:-1], linear.out_features)


def make_leavable(body: nn.Module) -> None:
    """Give every matrix product of the body a yield point before it, and those of plain linear layers more
    within. Idempotent: a network may be built several times."""
    for module in body.modules():
        if type(module) is nn.Linear:
            module.__class__ = LeavableLinear
        elif _multiplies(module) and offer_to_pause not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(offer_to_pause)


def _multiplies(module: nn.Module) -> bool:
    if isinstance(module, LeavableLinear | nn.Embedding):
        return False
    return any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False))
