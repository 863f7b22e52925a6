"""The other side of every ratio: torch's dense SDPA on the same inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from kernels.benchmarks.cases import Case
from kernels.benchmarks.inputs import Tensors
from kernels.benchmarks.measure import Contender
from kernels.math.dense import grouped

SLICED_FROM = 32768
_PARTS = 8
MIN_ROUNDS = 2
TWICE_UP_TO_MS = 12_000.0
"""Every ratio of a group rests on this one time: longer calls alone are timed once."""


@dataclass(frozen=True)
class Dense:
    """``parts`` > 1: only the last 1 / parts of the rows were timed, over all keys, and the whole is
    extrapolated linearly in the rows (without a mask every row costs the same)."""

    contender: Contender
    parts: int

    @property
    def time_ms(self) -> float:
        return self.contender.time_ms * self.parts

    @property
    def rounds(self) -> int:
        return len(self.contender.times_ms)


def dense(case: Case, x: Tensors) -> Dense:
    """SDPA over every pair, or over the pairs of the last rows where bidirectional calls take too long."""
    parts = _PARTS if not case.causal and case.N >= SLICED_FROM else 1
    q = x.q[:, :, case.N - case.N // parts :]
    run = lambda: sdpa(q, x.k, x.v, case.causal, case.scale)  # noqa: E731
    return Dense(Contender(run, twice_up_to_ms=TWICE_UP_TO_MS), parts)


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """torch's own attention, key heads shared by groups of query heads where there are fewer.

    One row without a mask: the group's heads are given as rows of their key head, which reads every key once
    and not once per query head; ``enable_gqa`` would make dense decode look twice as slow as torch is."""
    if q.shape[2] == 1 and not causal:
        rows = grouped(q, k.shape[1])[:, :, :, 0]
        return F.scaled_dot_product_attention(rows, k, v, scale=scale).flatten(1, 2).unsqueeze(2)
    shared = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=shared)
