"""What a call is predicted to take, against what it leaves behind and what sizes it depends on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kernels import attend
from kernels.api import parse_params
from kernels.contract import CallShape
from kernels.math.cache import DRAWS, MASKS, PLANS
from kernels.registry import load
from tests.kernels.kernel_cases import CASES, make_inputs

SHAPE = CallShape(512, 2048, 4, 2, 16, 16, 4, causal=True)


@pytest.fixture
def empty_caches() -> None:
    for kept in (DRAWS, MASKS, PLANS):
        kept.clear()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
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
