"""The path decomposition of a network of attention alone.

    X_(l+1) = M_l( X_l + sum_h P_h X_l W_h + b_l )         (skip; without it the first term is left out)
    X_L     = sum over paths (h_1 .. h_L) of  M_L A_(h_L) .. M_1 A_(h_1) X  +  what the biases add

with h = 0 the skip connection (A_0 = 1) and A_h X = P_h X W_h. Given the attention matrices that the network
really had, every layer is linear, so the sum is exact. A path's length is the number of attention heads on
it; C(L, k) H^k paths have length k. Dong, Cordonnier, Loukas, "Attention is not all you need" (arXiv
2103.03404), section 2: without skips only the longest are left, and each of them is nearly of rank one.

All paths of one length are summed in L (L + 1) / 2 applications of a layer, never one by one:

    T_k <- M_l( T_k + sum_h A_h T_(k-1) )
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import comb

import torch
from torch import Tensor

MAX_PATHS = 4096


def _same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class PathLayer:
    """One layer, given what it really attended to. ``heads`` and ``after`` are linear, on [K, N, E] at once.

    ``heads(x, h)`` is A_h x of one head, or the sum over all heads where h is None; ``after`` is M, ``bias``
    [N, E] what the layer adds to its output whatever its input is (behind ``after``)."""

    num_heads: int
    heads: Callable[[Tensor, int | None], Tensor]
    bias: Tensor
    after: Callable[[Tensor], Tensor] = _same


@dataclass(frozen=True)
class PathSums:
    """``by_length`` [L + 1, N, E]: the sum of all paths of each length. ``from_biases`` [N, E]: the rest."""

    by_length: Tensor
    from_biases: Tensor

    @property
    def total(self) -> Tensor:
        """The network's output [N, E]."""
        return self.by_length.sum(0) + self.from_biases


def linear_layer(probabilities: Tensor, weights: Tensor, bias: Tensor) -> PathLayer:
    """P [H, N, N], W [H, E, E] (values and output projection of each head), b [E] -> a layer."""

    def heads(x: Tensor, head: int | None) -> Tensor:
        chosen = range(len(weights)) if head is None else [head]
        return torch.stack([probabilities[h] @ x @ weights[h] for h in chosen]).sum(0)

    return PathLayer(len(weights), heads, bias.expand(probabilities.shape[1], -1))


def num_paths(layers: int, heads: int, length: int) -> int:
    """Paths of one length through ``layers`` layers of ``heads`` heads with skip connections."""
    return comb(layers, length) * int(heads**length)


def sum_paths(x: Tensor, layers: Sequence[PathLayer], *, skip: bool = True) -> PathSums:
    """Every path summed by its length, of x [N, E]."""
    terms = x[None]
    biases = torch.zeros_like(x)
    for layer in layers:
        longer = layer.heads(torch.cat([terms, biases[None]]), None)
        empty = torch.zeros_like(x)[None]
        stay = torch.cat([terms, empty]) if skip else torch.zeros_like(x).expand(len(terms) + 1, -1, -1)
        terms = layer.after(stay + torch.cat([empty, longer[:-1]]))
        biases = layer.after((biases if skip else 0) + longer[-1:])[0] + layer.bias
    return PathSums(terms, biases)


def each_path(
    x: Tensor, layers: Sequence[PathLayer], *, skip: bool = True, max_paths: int = MAX_PATHS
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Every path alone: its choice at each layer (0 the skip, h + 1 head h) and its term [N, E]. ValueError
    where there are more than ``max_paths``."""
    choices = [range(0 if skip else 1, layer.num_heads + 1) for layer in layers]
    count = 1
    for some in choices:
        count *= len(some)
    if count > max_paths:
        raise ValueError(f"there are {count:,} paths; at most {max_paths:,} are listed one by one: sum_paths")
    for path in product(*choices):
        term = x[None]
        for layer, chosen in zip(layers, path, strict=True):
            term = layer.after(term if chosen == 0 else layer.heads(term, chosen - 1))
        yield path, term[0]
