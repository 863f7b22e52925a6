"""Predicted operations against those that calls count, and how they grow with the sizes."""

from __future__ import annotations

import math
import random
import sys
from dataclasses import replace
from functools import cache
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.api import parse_params
from kernels.contract import CallShape, Segment, dense_flops
from kernels.math.kept import KeptStates
from kernels.math.sbm import MAX_CLUSTERS, random_clusters
from kernels.math.summaries import BlockSummaries
from kernels.registry import BACKENDS, load
from tests.kernels.kernel_cases import CASES, Case, attend_packed, both_directions, case_id, serves

FIXED: list[Case] = [
    ("exact", {}),
    ("window", {}),
    ("window", {"window": 37, "global_tokens": 5}),
    ("window", {"window": 64, "global_tokens": 300}),
    ("sinks", {}),
    ("sinks", {"window": 20, "sinks": 0}),
    ("sinks", {"window": 33, "sinks": 100}),
    ("strided", {}),
    ("strided", {"stride": 7, "combine": "multihead"}),
    ("strided", {"stride": 64, "combine": "sequential"}),
    ("fixed", {}),
    ("fixed", {"stride": 9, "combine": "multihead"}),
    ("fixed", {"stride": 64, "combine": "sequential"}),
    ("star", {}),
    ("star", {"window": 40}),
    ("star", {"window": 300}),
    ("random", {}),
    ("random", {"num_random": 64, "block_size": 32}),
    ("random", {"num_random": 128, "block_size": 128}),
    ("bigbird", {}),
    ("bigbird", {"window": 9, "global_tokens": 3, "num_random": 5, "block_size": 1}),
    ("bigbird", {"window": 40, "global_tokens": 70, "num_random": 96, "block_size": 32}),
    ("xattention", {}),
    ("xattention", {"query_tile": 128, "block_size": 32, "budget": 64, "stride": 8}),
    ("topk", {}),
    ("topk", {"query_tile": 128, "block_size": 32, "budget": 96}),
    ("pooled", {}),
    ("pooled", {"query_tile": 128, "block_size": 32, "budget": 64, "pool_rows": 32}),
    ("pages", {}),
    ("pages", {"query_tile": 128, "block_size": 32, "budget": 64}),
    ("pages", {"budget": [[512, 256]]}),
    ("performer", {}),
    ("performer", {"num_features": 33, "features": "positive", "centre_keys": 64}),
    ("performer", {"num_features": 130, "projection": "iid", "centre_keys": 7}),
    ("nystrom", {}),
    ("nystrom", {"num_landmarks": 7, "pinv": "exact"}),
    ("nystrom", {"num_landmarks": 129, "num_iterations": 12}),
    ("scatterbrain", {}),
    ("scatterbrain", {"support_params": {"window": 100, "sinks": 90}, "centre_keys": 33}),
]
"""What they compute follows from the sizes alone, or nearly: draws that meet, lists that have gaps."""

BY_DATA: list[Case] = [
    ("xattention", {"mass": 0.9}),
    ("topk", {"query_tile": 128, "mass": 0.9}),
    ("pooled", {"mass": 0.9, "pool_rows": 128}),
    ("pages", {"budget": 512, "skip": 0.001}),
    ("vertical_slash", {}),
    ("vertical_slash", {"query_tile": 256, "block_size": 32, "num_verticals": 20, "num_slashes": 2}),
    ("vertical_slash", {"num_verticals": 200, "num_slashes": 20}),
    ("lsh", {}),
    ("lsh", {"num_buckets": 4, "cluster_size": 16, "window": 3, "sinks": 0, "centre_keys": 0}),
    ("lsh", {"variant": "smyrf", "cluster_size": 32, "window": 5, "sinks": 1}),
    ("kmeans", {}),
    ("kmeans", {"num_clusters": 5, "num_probes": 1, "cluster_size": 16, "window": 3, "train_keys": 20}),
    ("kmeans", {"num_clusters": 16, "cluster_size": 512}),
    ("sbm", {}),
    ("sbm", {"exploration": 0.05}),
    ("sbm", {"sampler": "bernoulli", "exploration": 0.2}),
    (
        "scatterbrain",
        {"support": "topk", "support_params": {"query_tile": 128, "block_size": 32, "budget": 96}},
    ),
    ("scatterbrain", {"support": "lsh", "centre_keys": 64}),
    ("scatterbrain", {"support": "kmeans"}),
    ("scatterbrain", {"support": "bigbird"}),
]

SHAPES = {
    "prefill of 200": (200, 200, True),
    "prefill of 1,000": (1000, 1000, True),
    "prefill of 4,096": (4096, 4096, True),
    "chunk of 128": (128, 4096, True),
    "chunk of 512": (512, 4096, True),
    "decode at 1,000": (1, 1000, True),
    "decode at 4,000": (1, 4000, True),
    "document of 200": (200, 200, False),
    "document of 1,000": (1000, 1000, False),
    "document of 4,096": (4096, 4096, False),
}
"""(rows, keys, causal)."""
SLOW = ("sbm", "bigbird", "topk", "kmeans")
"""The backend, and supports of scatterbrain, of which 4,096 rows take seconds: up to 1,000 are measured, and
a chunk of 128."""
HEADS = {"6 heads, 2 with keys": (6, 2), "4 heads": (4, 4)}
D = 32


@cache
def structured(num_heads: int, num_kv_heads: int, N: int = 4096) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys that turn together through four directions, at two speeds, beside as much noise: rows
    look at places that they share with their neighbours, and clusters come and go along the text."""
    draw = torch.Generator().manual_seed(3)
    turn = 2 * math.pi * torch.arange(N)[:, None] / N * torch.tensor([5.0, 31.0])
    drift = torch.cat([turn.cos(), turn.sin()], -1) @ torch.randn(4, D, generator=draw)
    q, k, v = (torch.randn(1, h, N, D, generator=draw) for h in (num_heads, num_kv_heads, num_kv_heads))
    return q + drift, k + drift, v


@cache
def learned(num_heads: int) -> Any:
    """As many clusters as the prediction assumes, at the paper's initialisation."""
    return random_clusters(num_heads, D, MAX_CLUSTERS, seed=7)


def shape_of(num_rows: int, num_keys: int, heads: tuple[int, int], causal: bool) -> CallShape:
    return CallShape(num_rows, num_keys, *heads, D, D, 4, causal)


def counted(case: Case, shape: CallShape, layer: int) -> float:
    """Operations that a call's Stats tell; causal calls follow one that has read all earlier keys."""
    start, stop = shape.num_keys - shape.num_rows, shape.num_keys
    q, k, v = (x[:, :, :stop] for x in structured(shape.num_heads, shape.num_kv_heads, max(stop, 4096)))
    kept = {"kept": KeptStates(), "summaries": BlockSummaries()} if shape.causal else {}
    options: dict[str, Any] = {"backend": case[0], "params": case[1], "layer": layer, "causal": shape.causal}
    if case[0] == "sbm":
        options["learned"] = learned(shape.num_heads)

    def call(first: int, last: int) -> float:
        segment = Segment(slice(0, last - first), k[:, :, :last], v[:, :, :last], start=first, **kept)
        stats = attend_packed(q[:, :, first:last], [segment], scale=1.3 / math.sqrt(D), **options).stats[0]
        return 4 * D * stats.pairs_computed + 2 * D * stats.pairs_scored + stats.other_flops

    if start and shape.causal:
        call(start - 1, start)
    return call(start, stop)


def ratios(case: Case, heads: tuple[int, int]) -> dict[str, float]:
    """Predicted over counted operations, shape by shape: of the mean layer where layers take turns, of four
    steps where a call is one row."""
    method, params = load(case[0]), parse_params(*case)
    layers = 2 if case[1].get("combine") == "sequential" else 1
    slow = case[1].get("support", case[0]) in SLOW and case[0] in ("sbm", "scatterbrain")
    found = {}
    for name, (num_rows, num_keys, causal) in SHAPES.items():
        if not serves(case, causal) or (slow and num_rows * num_keys > 1 << 20):
            continue
        lengths = range(num_keys - 300, num_keys + 1, 100) if num_rows == 1 else [num_keys]
        shapes = [shape_of(num_rows, length, heads, causal) for length in lengths]
        total = sum(counted(case, shape, layer) for shape in shapes for layer in range(layers))
        found[name] = sum(method.flops(params, shape) for shape in shapes) * layers / total
    return found


def _with_heads(cases: list[Case]) -> Any:
    """Every case with shared key heads, defaults also without."""
    return pytest.mark.parametrize(
        ("case", "heads"),
        [
            pytest.param(case, heads, id=f"{case_id(case)}-{name}")
            for case in cases
            for name, heads in HEADS.items()
            if heads == (6, 2) or not case[1]
        ],
    )


@_with_heads(FIXED)
def test_a_call_whose_sizes_tell_all_is_predicted_within_a_fifth(case: Case, heads: tuple[int, int]) -> None:
    off = {name: ratio for name, ratio in ratios(case, heads).items() if not 0.8 <= ratio <= 1.25}
    assert not off


@_with_heads(BY_DATA)
def test_a_call_that_depends_on_the_data_is_predicted_within_a_factor_of_two(
    case: Case, heads: tuple[int, int]
) -> None:
    off = {name: ratio for name, ratio in ratios(case, heads).items() if not 0.5 <= ratio <= 2.0}
    assert not off


def test_lists_beyond_the_crossover_are_predicted_with_their_gaps() -> None:
    case: Case = ("pages", {"query_tile": 128, "budget": 3776})
    shape = shape_of(128, 4352, (4, 4), True)  # 4,224 keys to choose from
    predicted = load("pages").flops(parse_params(*case), shape)
    assert predicted == pytest.approx(counted(case, shape, 0), rel=0.02)
    assert predicted > 1.1 * 4 * D * 4 * 128 * (128 + 3776)


def test_every_backend_but_exact_is_measured_at_its_defaults_and_others() -> None:
    for name in BACKENDS:
        own = [params for backend, params in FIXED + BY_DATA if backend == name]
        assert {} in own and len(own) >= (1 if name == "exact" else 3)


def test_every_backend_has_a_prediction_of_its_own() -> None:
    own = [load(name).flops for name in BACKENDS]
    assert dense_flops not in own
    assert len(set(own)) == len(own)


MORE: list[Case] = [
    ("window", {"window": 4096}),
    ("strided", {"stride": 1024}),
    ("fixed", {"stride": 1000}),
    ("bigbird", {"num_random": 1024, "block_size": 128}),
    ("topk", {"budget": 2048}),
    ("pages", {"budget": 512, "skip": 0.01}),
    ("xattention", {"mass": 1.0, "skip": 0.001}),
    ("xattention", {"budget": [[1024, 512], 64]}),
    ("vertical_slash", {"num_verticals": 64, "num_slashes": 60}),
    ("vertical_slash", {"num_verticals": 0, "num_slashes": 0}),
    ("lsh", {"num_buckets": 16, "num_hash_rounds": 4, "cluster_size": 256}),
    ("kmeans", {"num_clusters": 16, "cluster_size": 512}),
    ("scatterbrain", {"support": "xattention"}),
    ("scatterbrain", {"support": "random", "centre_keys": 700}),
    ("scatterbrain", {"support": "pages", "support_params": {"budget": 64}, "centre_keys": 700}),
]
ALL = pytest.mark.parametrize("case", CASES + MORE, ids=case_id)


@ALL
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_no_chunk_is_predicted_cheaper_than_a_part_of_it(case: Case, heads: tuple[int, int]) -> None:
    if not serves(case, True):
        pytest.skip("it has no causal form")
    method, params, draw = load(case[0]), parse_params(*case), random.Random(5)
    for _ in range(400):
        far = draw.choice([40, 300, 1500, 6000, 140_000])
        start = draw.randrange(far)
        stop = start + 1 + draw.choice([draw.randrange(3), draw.randrange(300), draw.randrange(far)])
        first = draw.choice([start, draw.randrange(start, stop), max(start, stop - 2)])
        last = draw.choice([stop, draw.randrange(first, stop) + 1])
        whole = method.flops(params, shape_of(stop - start, stop, heads, True))
        part = method.flops(params, shape_of(last - first, last, heads, True))
        assert 0 < part <= whole * (1 + 1e-12), f"rows {first} .. {last} of {start} .. {stop}"


@ALL
@both_directions
def test_twice_the_length_is_never_predicted_cheaper(case: Case, causal: bool) -> None:
    if not serves(case, causal):
        pytest.skip("it does not answer such calls")
    method, params = load(case[0]), parse_params(*case)
    for length in [*range(1, 300), *range(300, 70_000, 501)]:
        once, twice = (method.flops(params, shape_of(n, n, (6, 2), causal)) for n in (length, 2 * length))
        assert once <= twice, length


@ALL
def test_a_short_input_is_never_predicted_far_dearer_than_it_is(case: Case) -> None:
    """Attention alone stays below a small multiple of dense; what is made of every row (features, clusters,
    hashes) can be more than that, and is measured above."""
    able = load(case[0]).capabilities
    if able.approximates or able.learned or case[0] in ("lsh", "kmeans"):
        pytest.skip("most of its operations are not attention's")
    method, params = load(case[0]), parse_params(*case)
    for length in (64, 100, 200, 300):
        for causal in (True, False):
            shape = shape_of(length, length, (6, 2), causal)
            assert method.flops(params, shape) <= 3 * dense_flops(params, replace(shape, causal=False))


class _NoTensors(TorchDispatchMode):
    """Any tensor that is made or touched is an error."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"a prediction called {func}")


def instructions(case: Case, shape: CallShape) -> int:
    """Bytecode instructions that a prediction takes, with everything that it calls."""
    method, params = load(case[0]), parse_params(*case)
    method.flops(params, shape)  # what is cached per params is
    count = 0

    def tally(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return tally

    before = sys.gettrace()
    sys.settrace(tally)
    try:
        method.flops(params, shape)
    finally:
        sys.settrace(before)
    return count


@ALL
def test_a_prediction_takes_no_tensor_and_as_few_steps_for_a_million_tokens_as_for_a_thousand(
    case: Case,
) -> None:
    with _NoTensors():
        for causal in (True, False):
            if not serves(case, causal):
                continue
            taken = [instructions(case, shape_of(n, n, (6, 2), causal)) for n in (5000, 1 << 20)]
            assert max(taken) < 2500
            assert taken[1] < 1.5 * taken[0] + 50
