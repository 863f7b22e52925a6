"""Queries, keys and values to run on.

``random``: independent normal numbers. Every key is about as good as every other: nothing to select.

``structured``: what attention over a document has and random numbers have not. The sequence is cut into
passages of about ``PASSAGE`` tokens, each about one of ``NUM_TOPICS`` topics, drawn with weight 1 / rank.
With u_c the topic's point in a subspace of rank ``RANK``, w_c its mean value and a_i a local walk (AR(1) with
correlation ``LOCAL`` between neighbours), independent per key head,

    k_i = D^(-1/4) (TOPIC u_c(i) + WALK a_i) + noise     q_i = D^(-1/4) (TOPIC u_t(i) + WALK a_i) + noise
    v_i = w_c(i) + noise

where t(i) is the topic of i's own passage, or with probability ``FAR`` any topic; the heads of a group share
t and a, not the noise. The factor makes scaled logits alike at every head width. Mass gathers near the row
and in passages far away: rows 4,096 to 8,191 have 70 % of their mass in their best 16 blocks of 64 keys,
with random numbers 22 %. It is synthetic all the same: it says how methods differ, not how wrong they are on
text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Inputs = Literal["structured", "random"]
PASSAGE = 256
NUM_TOPICS = 32
RANK = 16
LOCAL = 0.97
FAR = 0.3
TOPIC = 1.7
WALK = 1.9


@dataclass(frozen=True)
class Tensors:
    """q [1, H, N, D], k and v [1, Hk, N, D], fp32."""

    q: Tensor
    k: Tensor
    v: Tensor


def make_inputs(kind: Inputs, heads: tuple[int, int], num_rows: int, width: int, seed: int = 0) -> Tensors:
    """Inputs for ``heads`` (H, Hk) of that width; the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "random":
        return _random(heads, num_rows, width, generator)
    return _structured(heads, num_rows, width, generator)


def _random(heads: tuple[int, int], N: int, D: int, generator: torch.Generator) -> Tensors:
    q, k, v = (torch.randn(1, count, N, D, generator=generator) for count in (heads[0], heads[1], heads[1]))
    return Tensors(q, k, v)


def _structured(heads: tuple[int, int], N: int, D: int, generator: torch.Generator) -> Tensors:
    H, Hk = heads
    topics = torch.randn(Hk, NUM_TOPICS, RANK, generator=generator)
    subspace = torch.randn(Hk, RANK, D, generator=generator) / math.sqrt(RANK)
    strength = D**-0.25
    points = strength * TOPIC * (topics @ subspace)
    own = _passages(N, generator)
    walk = strength * WALK * _walk(Hk, N, D, generator)
    k = points[:, own] + walk + torch.randn(Hk, N, D, generator=generator)
    wanted = _wanted(own, generator)
    near = (points[:, wanted] + walk).repeat_interleave(H // Hk, 0)
    q = near + torch.randn(H, N, D, generator=generator)
    meaning = torch.randn(Hk, NUM_TOPICS, D, generator=generator)
    v = meaning[:, own] + torch.randn(Hk, N, D, generator=generator)
    return Tensors(q[None], k[None], v[None])


def _passages(N: int, generator: torch.Generator) -> Tensor:
    """The topic of each position, int64 [N]: passages end anywhere with probability 1 / PASSAGE."""
    begins = torch.rand(N, generator=generator) < 1 / PASSAGE
    passage = begins.cumsum(0)
    weights = 1 / torch.arange(1, NUM_TOPICS + 1)
    drawn = torch.multinomial(weights, int(passage[-1]) + 1, replacement=True, generator=generator)
    return drawn[passage]


def _wanted(own: Tensor, generator: torch.Generator) -> Tensor:
    """The topic that each query looks for."""
    far = torch.rand(len(own), generator=generator) < FAR
    return torch.where(far, torch.randint(NUM_TOPICS, own.shape, generator=generator), own)


def _walk(Hk: int, N: int, D: int, generator: torch.Generator) -> Tensor:
    """[Hk, N, D] of unit variance, neighbours correlated by LOCAL."""
    steps = torch.randn(N, Hk, D, generator=generator)
    steps[1:] *= math.sqrt(1 - LOCAL**2)
    for i in range(1, N):
        steps[i] += LOCAL * steps[i - 1]
    return steps.transpose(0, 1)
