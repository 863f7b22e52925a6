"""The paths of a real network: attention and skips alone, every norm replaced by what it really did.

Given the row scales that a norm had, it is linear but for its bias:   N(X) = D X C G + 1 b^T
D the rows' 1 / rms (or 1 / std), C takes off a token's mean (LayerNorm alone), G the norm's weights. So a
layer is what ``kernels.math.diagnostics_paths`` sums over, exactly; in fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernels.math.diagnostics_paths import PathLayer, PathSums, num_paths, sum_paths
from kernels.math.diagnostics_rank import rank_one_residual
from models.diagnose_arms import Apart, NotTakenApart, OnlyExact, Parts
from models.diagnose_told import MAX_PATH_HEADS, MAX_PATH_VALUES, PathLength, Paths
from models.forward import offer_to_pause

SAME = 1e-3
ROUNDING = 8.0
"""Units in the last place that the layers of a network of that dtype may add up to."""
VALUES = ("v_proj", "value")
FP64_BYTES = 8
COPIES = 6
"""Of the terms of all lengths: before and after a layer, and what is added up between."""


@dataclass(frozen=True)
class RealNorm:
    """A norm as it was for one text: rows [n, 1] and weights [E], a bias [E], and whether it takes means."""

    rows: Tensor
    weight: Tensor
    bias: Tensor
    centred: bool

    def linear(self, x: Tensor) -> Tensor:
        inner = x - x.mean(-1, keepdim=True) if self.centred else x
        return inner * self.rows * self.weight


def real_norm(norm: Any, x: Tensor) -> RealNorm:
    """What ``norm`` does to x [n, E] fp64. NotTakenApart where it is of no known form."""
    weight, centred = getattr(norm, "weight", None), isinstance(norm, nn.LayerNorm)
    eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
    if weight is None or eps is None or not (centred or "RMSNorm" in type(norm).__name__):
        raise NotTakenApart(f"a norm of the form {type(norm).__name__} has no known linear part")
    bias = getattr(norm, "bias", None)
    inner = x - x.mean(-1, keepdim=True) if centred else x
    rows = (inner.square().mean(-1, keepdim=True) + eps).rsqrt()
    none = torch.zeros_like(x[0])
    return RealNorm(rows, weight.double(), none if bias is None else bias.double(), centred)


def refusal(num_layers: int, num_heads: int, tokens: int, width: int) -> str | None:
    """Why the paths of such a network are not summed; None where they are."""
    if num_layers * num_heads > MAX_PATH_HEADS:
        return f"{num_layers} layers of {num_heads} heads; paths are summed up to {MAX_PATH_HEADS:,} heads"
    values = (num_layers + 1) * tokens * width
    if values > MAX_PATH_VALUES:
        return f"{values:,} numbers of path sums; the limit is {MAX_PATH_VALUES:,}: ask for fewer arm_tokens"
    return None


def paths_of(apart: Apart) -> Paths:
    """NotTakenApart where the layers' values cannot be found, or the sum does not equal the output."""
    layers: list[PathLayer] = []
    inputs: list[Tensor] = []

    def see(index: int, x: Tensor, context: OnlyExact) -> None:
        assert context.probabilities is not None
        inputs.append(x[0].double())
        layers.append(_layer(apart.parts[index], inputs[-1], context.probabilities))

    output = apart.run(True, False, see, keep=True)[0].double()
    sums = sum_paths(inputs[0], [_yielding(layer) for layer in layers])
    return _told(sums, output, apart.plans[0].num_heads, apart.calls[0].before.dtype)


def path_bytes(num_layers: int, num_heads: int, tokens: int, width: int, itemsize: int) -> int:
    """About what the sum holds at once: every layer's probabilities, and a few copies of its terms."""
    if refusal(num_layers, num_heads, tokens, width) is not None:
        return 0
    terms = COPIES * (num_layers + 2) * tokens * width * FP64_BYTES
    return terms + num_heads * tokens * tokens * (num_layers * itemsize + 2 * FP64_BYTES)


def _layer(parts: Parts, x: Tensor, probabilities: Tensor) -> PathLayer:
    value = next(
        (found for name in VALUES if (found := getattr(parts.attention, name, None)) is not None), None
    )
    if not isinstance(value, nn.Linear) or not isinstance(parts.output, nn.Linear):
        raise NotTakenApart(
            f"{type(parts.attention).__name__} has no value and output projections of its own"
        )
    mixing = _Mixing(probabilities, value, parts.output)
    if parts.norm_first:
        norm = real_norm(parts.norms[0], x)
        bias = mixing.affine(norm.bias.expand_as(x))
        return PathLayer(len(probabilities), lambda y, h: mixing.linear(norm.linear(y), h), bias)
    norm = real_norm(parts.norms[0], x + mixing.affine(x))
    bias = norm.linear(mixing.affine(torch.zeros_like(x))) + norm.bias
    return PathLayer(len(probabilities), mixing.linear, bias, norm.linear)


class _Mixing:
    """Attention with values and output projection, given its probabilities [H, n, n], in fp64. Nothing is
    kept in fp64: all layers exist at once."""

    def __init__(self, probabilities: Tensor, value: nn.Linear, output: nn.Linear) -> None:
        self._mix = probabilities
        self._value, self._output = value, output

    def linear(self, x: Tensor, head: int | None) -> Tensor:
        """x [K, n, E] -> [K, n, E]: one head, or all."""
        return self._project(self._values(x), head)

    def affine(self, x: Tensor) -> Tensor:
        """With both biases: [n, E] -> [n, E]."""
        of_values, of_output = self._value.bias, self._output.bias
        values = self._values(x[None], None if of_values is None else of_values.double())
        found = self._project(values, None)[0]
        return found if of_output is None else found + of_output.double()

    def _values(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[K, Hk, n, Dv]."""
        flat = x @ self._value.weight.double().mT
        flat = flat if bias is None else flat + bias
        num_heads = len(self._mix)
        width = self._output.in_features // num_heads
        return flat.view(*flat.shape[:-1], -1, width).transpose(1, 2)

    def _project(self, values: Tensor, head: int | None) -> Tensor:
        num_heads = len(self._mix)
        spread = values.repeat_interleave(num_heads // values.shape[1], dim=1)
        mixed = self._mix.double() @ spread
        if head is not None:
            keep = torch.zeros(num_heads, 1, 1, dtype=mixed.dtype, device=mixed.device)
            keep[head] = 1
            mixed = mixed * keep
        return mixed.transpose(1, 2).flatten(2) @ self._output.weight.double().mT


def _yielding(layer: PathLayer) -> PathLayer:
    """Term by term, with a yield point before each."""

    def heads(x: Tensor, head: int | None) -> Tensor:
        found = []
        for place in range(len(x)):
            offer_to_pause()
            found.append(layer.heads(x[place : place + 1], head))
        return torch.cat(found)

    inner: Callable[[Tensor, int | None], Tensor] = heads
    return PathLayer(layer.num_heads, inner, layer.bias, layer.after)


def _told(sums: PathSums, output: Tensor, num_heads: int, dtype: torch.dtype) -> Paths:
    """``dtype``: that the network's own output was computed in."""
    off = ((sums.total - output).abs().max() / output.abs().max()).item()
    if not off <= max(SAME, ROUNDING * torch.finfo(dtype).eps):
        raise NotTakenApart(
            f"the paths' sum is {off:.2g} off the network's output: its layers do more than that"
        )
    norm, num_layers = output.norm(), len(sums.by_length) - 1
    residuals = rank_one_residual(sums.by_length)
    lengths = tuple(
        PathLength(
            length,
            float(num_paths(num_layers, num_heads, length)),
            (term.norm() / norm).item(),
            residuals[length].item(),
        )
        for length, term in enumerate(sums.by_length)
    )
    return Paths(lengths, (sums.from_biases.norm() / norm).item(), off)
