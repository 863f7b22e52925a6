"""Cases and inputs shared by the kernel tests."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

Case = tuple[str, dict[str, Any]]

CASES: list[Case] = [
    ("exact", {}),
    ("window", {}),
    ("window", {"window": 1}),
    ("window", {"window": 37, "global_tokens": 5}),
    ("window", {"window": 64, "global_tokens": 300}),
    ("sinks", {}),
    ("sinks", {"window": 20, "sinks": 0}),
    ("sinks", {"window": 33, "sinks": 100}),
    ("strided", {}),
    ("strided", {"stride": 2}),
    ("strided", {"stride": 7, "combine": "multihead"}),
    ("strided", {"stride": 64, "combine": "sequential"}),
    ("fixed", {}),
    ("fixed", {"stride": 2}),
    ("fixed", {"stride": 9, "combine": "multihead"}),
    ("fixed", {"stride": 64, "combine": "sequential"}),
    ("star", {}),
    ("star", {"window": 40}),
    ("random", {}),
    ("random", {"num_random": 3}),
    ("random", {"num_random": 64, "block_size": 32}),
    ("random", {"num_random": 128, "block_size": 128}),
    ("bigbird", {}),
    ("bigbird", {"window": 9, "global_tokens": 3, "num_random": 5, "block_size": 1}),
    ("bigbird", {"window": 40, "global_tokens": 70, "num_random": 96, "block_size": 32}),
    ("bigbird", {"window": 1, "global_tokens": 0, "num_random": 64, "block_size": 64}),
    ("xattention", {}),
    ("xattention", {"query_tile": 128, "block_size": 32, "budget": 64, "stride": 8}),
    ("xattention", {"query_tile": 128, "block_size": 64, "mass": 0.6, "stride": 16}),
    ("pooled", {}),
    ("pooled", {"query_tile": 128, "block_size": 32, "budget": 64, "pool_rows": 32}),
    ("pooled", {"query_tile": 128, "block_size": 64, "mass": 0.6, "pool_rows": 128}),
    ("topk", {}),
    ("topk", {"query_tile": 128, "block_size": 32, "budget": 96}),
    ("topk", {"query_tile": 128, "block_size": 64, "mass": 0.7}),
    ("pages", {}),
    ("pages", {"query_tile": 128, "block_size": 32, "budget": 64}),
    ("vertical_slash", {}),
    ("vertical_slash", {"query_tile": 256, "block_size": 32, "num_verticals": 20, "num_slashes": 2}),
]
"""Every backend of the registry at its defaults and at parameters that put tile borders in awkward places."""


def case_id(case: Case) -> str:
    return "-".join([case[0], *(f"{name}={value}" for name, value in case[1].items())])


every_case = pytest.mark.parametrize("case", CASES, ids=case_id)
both_directions = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


def make_inputs(
    B: int,
    heads: tuple[int, int],
    N: int,
    M: int,
    D: int,
    Dv: int | None = None,
    *,
    seed: int = 0,
    dtype: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dtype = dtype or torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return normal(B, heads[0], N, D), normal(B, heads[1], M, D), normal(B, heads[1], M, Dv or D)


def scale_of(q: Tensor) -> float:
    return 1.3 / math.sqrt(q.shape[-1])
