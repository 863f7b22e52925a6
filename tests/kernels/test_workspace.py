"""What a call is predicted to take, against what it leaves behind and what sizes it depends on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from kernels.api import parse_params
from kernels.contract import CallShape, Segment
from kernels.math.cache import DRAWS, MASKS, PLANS
from kernels.math.kept import KeptStates
from kernels.math.sbm import MAX_CLUSTERS
from kernels.math.summaries import BlockSummaries
from kernels.math.workspace import most_keys
from kernels.registry import load
from tests.kernels.kernel_cases import (
    Case,
    attend,
    attend_packed,
    case_id,
    clusters,
    every_served_case,
    make_inputs,
    serves,
)

SHAPE = CallShape(512, 2048, 4, 2, 16, 16, 4, causal=True)


@pytest.fixture
def empty_caches() -> None:
    for kept in (DRAWS, MASKS, PLANS):
        kept.clear()


@every_served_case
def test_every_backend_counts_its_outputs_and_grows_with_rows_and_narrower_inputs(
    case: Any, causal: bool
) -> None:
    params = parse_params(*case)
    workspace = load(case[0]).workspace
    shape = replace(SHAPE, causal=causal, num_rows=512 if causal else 2048)
    found = workspace(params, shape)
    assert found.live_bytes > shape.num_rows * shape.num_heads * (shape.value_dim + 1) * 4
    assert min(found.kept_bytes, found.shared_bytes) >= 0
    wider = replace(shape, num_rows=2 * shape.num_rows, num_keys=2 * shape.num_keys)
    assert workspace(params, wider).live_bytes > found.live_bytes
    assert workspace(params, replace(shape, itemsize=2)).live_bytes > found.live_bytes
    assert workspace(params, replace(shape, on_cpu=False)).live_bytes >= found.live_bytes


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("backend", "params"),
    [
        ("random", {"num_random": 64, "block_size": 1}),
        ("random", {"num_random": 256, "block_size": 64}),
        ("bigbird", {"window": 128, "global_tokens": 16, "num_random": 256, "block_size": 64}),
        ("bigbird", {"window": 100, "global_tokens": 3, "num_random": 256, "block_size": 32}),
        ("bigbird", {"num_random": 64, "block_size": 1}),
    ],
)
def test_drawn_keys_are_predicted_as_they_are_kept(
    backend: str, params: dict[str, int], causal: bool, empty_caches: None
) -> None:
    rows = 512 if causal else 2048
    shape = replace(SHAPE, causal=causal, num_rows=rows)
    predicted = load(backend).workspace(parse_params(backend, params), shape).kept_bytes
    q, k, v = make_inputs(1, (4, 2), rows, 2048, 16)
    for _ in range(2):  # draws are kept from their second use
        attend(q, k, v, backend=backend, params=params, causal=causal, scale=0.25)
    assert 0.6 * DRAWS.held_bytes < predicted + 10_000 and predicted < 1.6 * DRAWS.held_bytes + 50_000


@pytest.mark.parametrize(
    ("backend", "params"),
    [
        ("window", {"window": 512}),
        ("window", {"window": 2000, "global_tokens": 5}),
        ("sinks", {}),
        ("star", {}),
        ("fixed", {"stride": 16}),
        ("strided", {"stride": 64}),
        ("exact", {}),
    ],
)
def test_masks_are_predicted_at_least_as_large_as_they_are_and_not_far_beyond(
    backend: str, params: dict[str, int], empty_caches: None
) -> None:
    shape = replace(SHAPE, num_rows=2048)
    predicted = load(backend).workspace(parse_params(backend, params), shape).shared_bytes
    q, k, v = make_inputs(1, (4, 2), 2048, 2048, 16)
    attend(q, k, v, backend=backend, params=params, causal=True, scale=0.25)
    assert MASKS.held_bytes <= predicted + 20_000 and predicted <= 4 * MASKS.held_bytes + 20_000


def test_single_draws_of_a_long_encoder_are_counted_as_the_hundreds_of_megabytes_they_are() -> None:
    shape = CallShape(8192, 8192, 12, 12, 64, 64, 4, causal=False)
    many = load("random").workspace(parse_params("random", {"num_random": 256}), shape)
    assert many.kept_bytes == 8192 * 12 * 257 * 5
    few = load("random").workspace(parse_params("random", {"num_random": 16}), shape)
    assert many.live_bytes > few.live_bytes


def peak_of_tensors(run: Callable[[], Any]) -> int:
    """The largest sum of what torch allocated and had not freed yet while ``run`` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = run()
    held = peak = 0
    for event in record.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    del kept
    return peak


@pytest.mark.parametrize("backend", ["pages", "xattention", "topk"])
@pytest.mark.parametrize(
    "params",
    [
        {"budget": 512, "remainder": "mean"},
        {"budget": 256, "query_tile": 128, "block_size": 32},
        {"budget": 512, "remainder": "gated"},
    ],
)
@pytest.mark.parametrize(
    ("heads", "rows", "keys", "causal", "value_dim", "dtype"),
    [
        ((6, 3), 512, 3072, True, 32, torch.float32),
        ((8, 2), 1024, 4096, True, 32, torch.float32),
        ((6, 6), 2048, 2048, True, 32, torch.float32),
        ((6, 6), 2048, 2048, False, 32, torch.float32),
        ((6, 2), 2060, 2060, False, 32, torch.float32),
        ((6, 3), 512, 3072, True, 32, torch.bfloat16),
        ((6, 3), 512, 3072, True, 48, torch.float32),
    ],
)
def test_what_a_selection_is_predicted_to_take_is_what_its_tensors_take(
    backend: str,
    params: dict[str, Any],
    heads: tuple[int, int],
    rows: int,
    keys: int,
    causal: bool,
    value_dim: int,
    dtype: torch.dtype,
    empty_caches: None,
) -> None:
    q, k, v = (x.to(dtype) for x in make_inputs(1, heads, rows, keys, 32))
    v = v.repeat(1, 1, 1, 2)[..., :value_dim].contiguous()
    knobs = parse_params(backend, params)
    shape = CallShape(rows, keys, *heads, 32, value_dim, dtype.itemsize, causal)
    predicted = load(backend).workspace(knobs, shape)
    summaries = BlockSummaries(keys) if causal else None
    segment = Segment(slice(0, rows), k, v, keys - rows, 0, summaries)
    packed = rows * heads[0] * value_dim * dtype.itemsize
    peak = peak_of_tensors(
        lambda: attend_packed(q, [segment], backend=backend, params=knobs, causal=causal, scale=0.2)
    )
    ratio = (predicted.live_bytes + predicted.shared_bytes + predicted.cache_bytes) / (peak - packed)
    assert 0.85 < ratio < 1.75
    if summaries is not None:
        assert summaries.nbytes <= predicted.cache_bytes
        assert predicted.cache_bytes == keys // params.get("block_size", 64) * heads[1] * (96 + value_dim) * 4
    else:
        assert predicted.cache_bytes == 0


STATEFUL: list[Case] = [
    ("performer", {}),
    ("performer", {"num_features": 64, "features": "positive", "centre_keys": 0}),
    ("nystrom", {}),
    ("nystrom", {"num_landmarks": 256, "pinv": "exact"}),
    ("lsh", {}),
    ("lsh", {"num_hash_rounds": 4, "num_buckets": 16, "cluster_size": 64, "window": 16, "sinks": 0}),
    ("lsh", {"variant": "smyrf"}),
    ("kmeans", {}),
    ("kmeans", {"num_clusters": 64, "num_probes": 4, "cluster_size": 64}),
    ("scatterbrain", {}),
    ("scatterbrain", {"support_params": {"window": 64, "sinks": 0}, "num_features": 128}),
    ("scatterbrain", {"support": "topk", "support_params": {"budget": 256}}),
    ("scatterbrain", {"support": "lsh"}),
    ("sbm", {}),
    ("sbm", {"sampler": "bernoulli"}),
]
"""What estimates, and what draws or hashes row by row."""


@pytest.mark.parametrize("case", STATEFUL, ids=case_id)
@pytest.mark.parametrize(
    ("heads", "rows", "keys", "causal", "value_dim", "dtype"),
    [
        ((6, 3), 512, 3072, True, 32, torch.float32),
        ((6, 6), 2048, 2048, True, 32, torch.float32),
        ((6, 6), 2048, 2048, False, 32, torch.float32),
        ((6, 2), 2060, 2060, False, 32, torch.float32),
        ((6, 3), 512, 3072, True, 32, torch.bfloat16),
        ((6, 3), 512, 3072, True, 48, torch.float32),
        ((6, 2), 1, 3072, True, 32, torch.float32),
    ],
)
def test_features_hashes_and_draws_take_what_is_predicted(
    case: Case,
    heads: tuple[int, int],
    rows: int,
    keys: int,
    causal: bool,
    value_dim: int,
    dtype: torch.dtype,
    empty_caches: None,
) -> None:
    """A step, of one row, at most so: what it takes is too little to be told apart. Params do not tell how
    many clusters a model has: predicted is what the most of them take."""
    if not serves(case, causal):
        pytest.skip("this direction is not served")
    q, k, v = (x.to(dtype) for x in make_inputs(1, heads, rows, keys, 32))
    v = v.repeat(1, 1, 1, 2)[..., :value_dim].contiguous()
    knobs = parse_params(*case)
    shape = CallShape(rows, keys, *heads, 32, value_dim, dtype.itemsize, causal)
    predicted = load(case[0]).workspace(knobs, shape)
    kept, summaries = (KeptStates(), BlockSummaries(keys)) if causal else (None, None)
    segment = Segment(slice(0, rows), k, v, keys - rows, 0, summaries, kept)
    packed = rows * heads[0] * value_dim * dtype.itemsize
    options: dict[str, Any] = {"params": knobs, "causal": causal, "scale": 0.2}
    learned = clusters(heads[0], 32, MAX_CLUSTERS) if case[0] == "sbm" else None
    attend(q[:, :, :1], k[:, :, :1], v[:, :, :1], backend=case[0], learned=learned, **options)
    peak = peak_of_tensors(lambda: attend_packed(q, [segment], backend=case[0], learned=learned, **options))
    told = predicted.live_bytes + predicted.shared_bytes + predicted.cache_bytes + predicted.kept_bytes
    ratio = told / (peak - packed)
    assert ratio > 0.85 and (rows == 1 or ratio < 1.75), f"{told} bytes predicted, {peak - packed} taken"
    if kept is None or summaries is None:
        assert predicted.cache_bytes == 0
    else:
        left = kept.nbytes + summaries.nbytes
        assert 0.95 * left <= predicted.cache_bytes <= 1.5 * left + 10_000


def test_the_largest_budget_of_any_layer_and_head_counts() -> None:
    assert most_keys(512) == 512 and most_keys(None) is None
    assert most_keys((64, (128, 1024), 256)) == 1024
