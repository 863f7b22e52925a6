"""The masks of the backends, and what Yun et al.'s theory says of them.

    self loops, Hamiltonian path, s        ``kernels.math.graph``, on the pairs that a backend really keeps

A mask is read from attention itself: with the identity as values its output is its weights, and a pair is
kept where the weight is above zero. Logits are 0 where they do not matter and small where they do, so no kept
weight is rounded away. Impl ``reference`` tells a fixed pattern. A choice that depends on the data is told by
impl ``torch``, which is the one that serves: the references go pair by pair. There is no mask where every
pair has some weight, or where the choice is a model's own (``why_no_mask``).

Yun et al., "O(n) connections are expressive enough" (arXiv 2006.04862). Its theorem asks for all three and
promises that a deep enough network of such layers can approximate any continuous map of sequences. It says
nothing about a model that was trained with other attention.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.api import attend, parse_params
from kernels.contract import Params
from kernels.math.graph import PathAnswer, Pattern, hamiltonian_path, has_self_loops, layers_to_cover
from kernels.registry import load

MAX_TOKENS = 4096
MAX_PATTERNS = 4
_HEAD_DIM = 16
_PROBE_ROWS = 16
_PROBE_COLUMNS = 8
_PROBE_ROUNDING = 1e-5


class NoMask(ValueError):
    """The backend has no mask: no pattern of pairs that are kept and others that are left out."""

    def __init__(self, backend: str, reason: str) -> None:
        self.backend, self.reason = backend, reason
        super().__init__(f"attention backend {backend!r} has no mask: {reason}")


def why_no_mask(backend: str) -> str | None:
    """Why no mask can be told for ``backend``; None where one can."""
    able = load(backend).capabilities
    if able.approximates:
        return "it approximates the pairs that it does not keep, so every visible pair has some weight"
    if able.learned:
        return "which pairs it keeps is decided by parameters that a model must carry for it"
    return None


@dataclass(frozen=True)
class Conditions:
    """What the pattern of one backend, at one length and in one direction, fulfils.

    Several heads count as the union of their patterns, as in the paper: a layer reaches what any of its heads
    reaches. Layers that take turns are the paper's p patterns.
    """

    num_tokens: int
    causal: bool
    self_loops: bool
    hamiltonian_path: PathAnswer
    s: int | None
    """Layers after which every token depends on every token; None: never, as in every causal model of two
    tokens or more."""
    causal_s: int | None
    """The same for what a causal model can reach at most: every token depends on itself and on all before it.
    None: never, or bidirectional."""
    nnz: tuple[int, ...]
    """Pairs in each of the p patterns, heads united."""
    density: float
    """Share of the pairs of ``exact`` that are kept, mean over patterns and heads."""
    num_patterns: int
    """p."""
    num_heads: int
    """Heads that were united: as many as differ; one, where they differ by chance alone."""
    one_example: bool
    """True where the pattern depends on the seed or on the data: this is the first layer's draw, or its
    choice for one sample of normal queries and keys, repeated in every layer as the paper does it. Served
    layers differ."""
    data_dependent: bool
    """True where the choice depends on queries and keys."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"nnz": list(self.nnz)}


def mask(
    backend: str,
    params: Mapping[str, Any] | Params | None,
    num_tokens: int,
    causal: bool,
    *,
    layer: int = 0,
    seed: int = 0,
    heads: int,
) -> Tensor:
    """The pairs that ``backend`` keeps in one layer: bool [heads, N, N], row = query, column = key.

    Every head has keys of its own. Where the choice depends on the data, queries and keys are standard normal
    and fixed by ``seed``: one example. Takes O(heads N^2) memory.

    Raises UnknownBackend, InvalidParams, Unsupported, NoMask, and ValueError for a length out of 1 .. 4096.
    """
    _check_length(num_tokens)
    _check_mask(backend)
    knobs, identity = parse_params(backend, params), torch.eye(num_tokens)
    return _attended(backend, knobs, identity, num_tokens, causal, layer, seed, heads) > 0


def conditions(
    backend: str,
    params: Mapping[str, Any] | Params | None = None,
    *,
    num_tokens: int,
    causal: bool,
    seed: int = 0,
) -> Conditions:
    """The three conditions for ``backend`` at this length. Raises what ``mask`` raises.

    Takes O(p N^2) memory and time O(s nnz N / 64); the search for a path is bounded.
    """
    _check_length(num_tokens)
    _check_mask(backend)
    knobs = parse_params(backend, params)
    num_patterns, num_heads = _turns(backend, knobs, num_tokens, causal, seed)
    masks = [
        mask(backend, knobs, num_tokens, causal, layer=layer, seed=seed, heads=num_heads).numpy()
        for layer in range(num_patterns)
    ]
    able = load(backend).capabilities
    return _conditions(
        masks,
        causal,
        data_dependent=able.selection != "none",
        one_example=able.random or able.selection != "none",
    )


def _conditions(
    masks: Sequence[Pattern], causal: bool, *, data_dependent: bool, one_example: bool
) -> Conditions:
    """Of masks [H, N, N], one for each pattern."""
    patterns: list[Pattern] = [np.logical_or.reduce(each) for each in masks]
    num_tokens = len(patterns[0])
    allowed = np.tri(num_tokens, dtype=bool) if causal else np.ones_like(patterns[0])
    depth = layers_to_cover(patterns, allowed)
    return Conditions(
        num_tokens=num_tokens,
        causal=causal,
        self_loops=has_self_loops(patterns),
        hamiltonian_path=hamiltonian_path(patterns),
        s=None if causal and num_tokens > 1 else depth,
        causal_s=depth if causal else None,
        nnz=tuple(int(pattern.sum()) for pattern in patterns),
        density=float(np.mean([each.sum((1, 2)).mean() for each in masks]) / allowed.sum()),
        num_patterns=len(masks),
        num_heads=len(masks[0]),
        one_example=one_example,
        data_dependent=data_dependent,
    )


def _turns(backend: str, params: Params, num_tokens: int, causal: bool, seed: int) -> tuple[int, int]:
    """After how many layers, and heads, the pattern repeats: told by what the last rows, which see the most,
    read of a few columns of noise."""
    able = load(backend).capabilities
    if able.random or able.selection != "none":
        return 1, 1
    rows = min(num_tokens, _PROBE_ROWS)
    noise = torch.randn(num_tokens, _PROBE_COLUMNS, generator=torch.Generator().manual_seed(0))

    def probe(layer: int, heads: int) -> Tensor:
        return _attended(backend, params, noise, rows, causal, layer, seed, heads)

    by_layer = torch.cat([probe(layer, 1) for layer in range(2 * MAX_PATTERNS)])
    return _period(backend, by_layer), _period(backend, probe(0, 2 * MAX_PATTERNS))


def _period(backend: str, turns: Tensor) -> int:
    """The smallest period of ``turns`` [T, ...] along T."""
    for period in range(1, MAX_PATTERNS + 1):
        if torch.allclose(turns[period:], turns[:-period], rtol=0, atol=_PROBE_ROUNDING):
            return period
    raise AssertionError(f"the patterns of {backend!r} do not repeat within {MAX_PATTERNS} turns")


def _attended(
    backend: str,
    params: Params,
    values: Tensor,
    num_rows: int,
    causal: bool,
    layer: int,
    seed: int,
    heads: int,
) -> Tensor:
    """What the last ``num_rows`` rows read of ``values`` [M, Dv], the same for every head: [H, rows, Dv]."""
    q, k = _queries_and_keys(backend, len(values), heads, seed)
    return attend(
        q[..., -num_rows:, :],
        k,
        values.expand(1, heads, *values.shape),
        backend=backend,
        params=_nothing_merged(params),
        causal=causal,
        scale=1 / math.sqrt(_HEAD_DIM),
        seed=seed,
        layer=layer,
        impl="reference" if load(backend).capabilities.selection == "none" else "torch",
    ).out[0]


def _queries_and_keys(backend: str, num_tokens: int, heads: int, seed: int) -> tuple[Tensor, Tensor]:
    if load(backend).capabilities.selection == "none":
        nothing = torch.zeros(1, heads, num_tokens, 1)
        return nothing, nothing
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, heads, num_tokens, _HEAD_DIM, generator=generator)
    return q, k


def _nothing_merged(params: Params) -> Params:
    """Merged remainders give every pair some weight; the mask is of the pairs attended one by one."""
    return params.model_copy(update={"remainder": "none"}) if hasattr(params, "remainder") else params


def directions(backend: str, params: Params) -> dict[str, bool]:
    """The directions that ``backend`` serves with these params, by name: their ``causal``."""
    method = load(backend)
    serves = {False: method.capabilities.bidirectional, True: method.capabilities.causal}
    return {
        name: causal
        for name, causal in (("bidirectional", False), ("causal", True))
        if serves[causal] and not method.unsupported(params, causal)
    }


def _check_mask(backend: str) -> None:
    reason = why_no_mask(backend)
    if reason is not None:
        raise NoMask(backend, reason)


def _check_length(num_tokens: int) -> None:
    if not 1 <= num_tokens <= MAX_TOKENS:
        raise ValueError(f"num_tokens must lie in 1 .. {MAX_TOKENS}, got {num_tokens}")
