"""Cases and inputs shared by the kernel tests, and the calls that give every backend what it needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from kernels.api import parse_params
from kernels.contract import AttentionResult, PackedResult, Segment
from kernels.math.sbm import ClusterParams, random_clusters
from kernels.registry import load
from tests.kernels.oracles import Expected, expected

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
    ("performer", {}),
    ("performer", {"num_features": 33, "features": "positive", "centre_keys": 64}),
    ("performer", {"num_features": 130, "projection": "iid", "centre_keys": 7}),
    ("performer", {"num_features": 2, "centre_keys": 150}),
    ("nystrom", {}),
    ("nystrom", {"num_landmarks": 1}),
    ("nystrom", {"num_landmarks": 7, "pinv": "exact"}),
    ("nystrom", {"num_landmarks": 129, "num_iterations": 12}),
    ("lsh", {}),
    ("lsh", {"num_buckets": 4, "cluster_size": 16, "window": 3, "sinks": 0, "centre_keys": 0}),
    ("lsh", {"num_buckets": 1, "num_hash_rounds": 3, "cluster_size": 48, "window": 1, "centre_keys": 5}),
    ("lsh", {"num_buckets": 6, "num_hash_rounds": 8, "cluster_size": 16, "window": 70, "sinks": 70}),
    ("lsh", {"variant": "smyrf", "cluster_size": 32, "window": 5, "sinks": 1}),
    ("lsh", {"variant": "smyrf", "num_hash_rounds": 3, "cluster_size": 16, "window": 1, "sinks": 0}),
    ("kmeans", {}),
    ("kmeans", {"num_clusters": 5, "num_probes": 1, "cluster_size": 16, "window": 3, "train_keys": 20}),
    (
        "kmeans",
        {"num_clusters": 9, "num_probes": 4, "cluster_size": 32, "window": 1, "sinks": 0, "train_keys": 100},
    ),
    ("scatterbrain", {}),
    ("scatterbrain", {"support_params": {"window": 9, "sinks": 0}, "num_features": 10, "centre_keys": 64}),
    ("scatterbrain", {"support_params": {"window": 100, "sinks": 90}, "centre_keys": 33}),
    ("scatterbrain", {"support": "strided", "support_params": {"stride": 7}, "centre_keys": 5}),
    ("scatterbrain", {"support": "fixed", "support_params": {"stride": 64, "combine": "multihead"}}),
    (
        "scatterbrain",
        {
            "support": "bigbird",
            "support_params": {"window": 9, "global_tokens": 3, "num_random": 5, "block_size": 1},
        },
    ),
    ("scatterbrain", {"support": "star", "features": "positive", "num_features": 31}),
    (
        "scatterbrain",
        {"support": "topk", "support_params": {"query_tile": 128, "block_size": 32, "budget": 96}},
    ),
    (
        "scatterbrain",
        {
            "support": "pages",
            "support_params": {"query_tile": 128, "block_size": 64, "budget": 64},
            "centre_keys": 64,
        },
    ),
    (
        "scatterbrain",
        {
            "support": "lsh",
            "support_params": {"num_buckets": 6, "cluster_size": 16, "window": 3},
            "centre_keys": 64,
        },
    ),
    (
        "scatterbrain",
        {"support": "kmeans", "support_params": {"num_clusters": 5, "cluster_size": 16, "window": 3}},
    ),
    ("sbm", {}),
    ("sbm", {"exploration": 0.05}),
    ("sbm", {"sampler": "bernoulli", "exploration": 0.2}),
]

"""Every backend of the registry at its defaults and at parameters that put tile borders in awkward places."""


def case_id(case: Case) -> str:
    return "-".join([case[0], *(f"{name}={value}" for name, value in case[1].items())])


def serves(case: Case, causal: bool) -> bool:
    """Whether the backend answers causal, or bidirectional, calls with these params."""
    method = load(case[0])
    able = method.capabilities.causal if causal else method.capabilities.bidirectional
    return able and not method.unsupported(parse_params(*case), causal)


def reads_all_rows(case: Case) -> bool:
    """Whether a row's answer depends on which other rows are in the call."""
    params = {**case[1], **case[1].get("support_params", {})}
    return load(case[0]).capabilities.selection == "prompt" or params.get("variant") == "smyrf"


def query_tile(case: Case) -> int:
    """Rows that choose together: 1 where each row chooses for itself, or nothing is chosen."""
    if load(case[0]).capabilities.selection in ("none", "row"):
        return 1
    return parse_params(*case).chunk_multiple()


def _served(*wanted: Callable[[Case, bool], bool]) -> Any:
    """Parametrizes a test by every case and direction that is served and wanted."""
    pairs = [
        pytest.param(case, causal, id=f"{case_id(case)}-{'causal' if causal else 'bidirectional'}")
        for case in CASES
        for causal in (True, False)
        if serves(case, causal) and all(test(case, causal) for test in wanted)
    ]
    return pytest.mark.parametrize(("case", "causal"), pairs)


def _cases(wanted: Callable[[Case], bool]) -> Any:
    return pytest.mark.parametrize("case", [case for case in CASES if wanted(case)], ids=case_id)


every_case = pytest.mark.parametrize("case", CASES, ids=case_id)
every_served_case = _served()
every_chunked_case = _served(lambda case, causal: not reads_all_rows(case))
"""Those whose rows may come in several calls."""
every_causal_case = _cases(lambda case: serves(case, True))
every_decoding_case = _cases(
    lambda case: serves(case, True) and load(case[0]).capabilities.decode and query_tile(case) == 1
)
"""Those whose steps equal a prefill: where a query tile chooses, a decoded row is a tile of its own."""
both_directions = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


def keeps_pairs(backend: str) -> bool:
    """Whether the answer is a softmax over the pairs kept and nothing else."""
    return not load(backend).capabilities.approximates


def learned_for(backend: str, q: Tensor) -> Any:
    """Parameters of the backend for queries q [B, H, N, D], the same for every call; None where it needs
    none."""
    if not load(backend).capabilities.learned:
        return None
    return LEARNED[backend](q.shape[1], q.shape[-1])


@cache
def clusters(num_heads: int, head_dim: int, num_clusters: int = 5) -> ClusterParams:
    return random_clusters(num_heads, head_dim, num_clusters, seed=7)


LEARNED: dict[str, Callable[[int, int], Any]] = {"sbm": clusters}
"""Parameters for so many query heads of such a width, by backend."""


def attend(q: Tensor, k: Tensor, v: Tensor, *, backend: str, **options: Any) -> AttentionResult:
    """``kernels.attend`` with what a model would have to carry for the backend."""
    options.setdefault("learned", learned_for(backend, q))
    return kernels.attend(q, k, v, backend=backend, **options)


def attend_packed(q: Tensor, segments: Sequence[Segment], *, backend: str, **options: Any) -> PackedResult:
    options.setdefault("learned", learned_for(backend, q))
    return kernels.attend_packed(q, segments, backend=backend, **options)


def answer(case: Case, q: Tensor, k: Tensor, v: Tensor, **where: Any) -> Expected:
    """What the oracle says to the same call."""
    wide = (x.double().numpy() for x in (q, k, v))
    where.setdefault("scale", scale_of(q))
    return expected(*case, *wide, learned=learned_for(case[0], q), **where)


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
