"""Random features estimate the exponential kernel without bias, with the variance that theory gives them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from kernels.contract import Call
from kernels.math.cache import DRAWS
from kernels.math.features import FeatureMap, FeatureParams, feature_map, key_centre, normals
from tests.kernels.oracles import performer as oracle

DIM = 8
NUM_SEEDS = 1500
KINDS = [("positive", "iid"), ("positive", "orthogonal"), ("hyperbolic", "iid"), ("hyperbolic", "orthogonal")]


def call(scale: float = 0.5, *, causal: bool = True, seed: int = 0, layer: int = 0) -> Call:
    return Call(causal, scale, seed, layer, 0)


def make_map(params: FeatureParams, call: Call, heads: int = 1, dim: int = DIM) -> FeatureMap:
    return feature_map(params, call, heads, dim, torch.float64, torch.device("cpu"))


def small_pair(norm: float) -> tuple[Tensor, Tensor]:
    """q and k of that norm: large ones have log-normal tails that no number of seeds reaches."""
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randn(2, DIM, generator=generator, dtype=torch.float64)
    q, k = drawn * norm / drawn.norm(dim=-1, keepdim=True)
    return q, k


def estimates(params: FeatureParams, q: Tensor, k: Tensor, scale: float, heads: int = NUM_SEEDS) -> Tensor:
    """[heads]: L of one pair, every key head an independent draw."""
    fmap = make_map(params, call(scale), heads)
    of_q = fmap.log_queries(q.expand(1, heads, 1, 1, DIM))[0, :, 0, 0]
    of_k = fmap.log_keys(k.expand(1, heads, 1, DIM))[0, :, 0]
    return torch.exp(of_q + of_k).sum(-1)


@pytest.mark.parametrize(("features", "projection"), KINDS)
@pytest.mark.parametrize("scale", [0.9, -0.7, 0.0])
def test_the_mean_of_the_estimate_is_the_kernel(features: Any, projection: Any, scale: float) -> None:
    q, k = small_pair(0.8)
    params = FeatureParams(num_features=16, features=features, projection=projection)
    found = estimates(params, q, k, scale)
    error = float(found.std()) / math.sqrt(NUM_SEEDS)
    assert abs(float(found.mean()) - math.exp(scale * float(q @ k))) < 4 * error + 1e-12


def variances(q: Tensor, k: Tensor, scale: float, num_gaussians: int) -> tuple[float, float]:
    """Of the positive and the hyperbolic estimator over independent directions."""
    s = scale * float((q + k).square().sum())
    positive = math.exp(s + 2 * scale * float(q @ k)) * (1 - math.exp(-s)) / num_gaussians
    return positive, positive * (1 - math.exp(-s)) / 2


@pytest.mark.parametrize("norm", [0.3, 0.6])
def test_the_variance_is_what_theory_says(norm: float) -> None:
    """m^-1 e^s A^2 (1 - e^-s), and (1 - e^-s) / 2 of it for both signs of as many Gaussians."""
    q, k = small_pair(norm)
    wanted = variances(q, k, 1.0, 16)
    for features, num_features, want in (("positive", 16, wanted[0]), ("hyperbolic", 32, wanted[1])):
        params = FeatureParams(num_features=num_features, features=features, projection="iid")
        found = float(estimates(params, q, k, 1.0).var())
        assert found == pytest.approx(want, rel=0.15), features


@pytest.mark.parametrize("features", ["positive", "hyperbolic"])
def test_orthogonal_directions_are_no_worse_than_independent_ones(features: Any) -> None:
    q, k = small_pair(0.9)
    of = {
        projection: float(estimates(FeatureParams(num_features=16, **kind), q, k, 1.0).var())
        for projection in ("iid", "orthogonal")
        for kind in ({"features": features, "projection": projection},)
    }
    assert of["orthogonal"] < 1.05 * of["iid"]


@pytest.mark.parametrize(("features", "projection"), KINDS)
def test_the_variance_falls_like_one_over_the_number_of_features(features: Any, projection: Any) -> None:
    q, k = small_pair(0.7)
    few, many = (
        float(
            estimates(
                FeatureParams(num_features=m, features=features, projection=projection), q, k, 1.0
            ).var()
        )
        for m in (16, 128)
    )
    assert few / many == pytest.approx(8, rel=0.2)


@pytest.mark.parametrize("features", ["positive", "hyperbolic"])
@pytest.mark.parametrize("projection", ["iid", "orthogonal"])
def test_directions_are_those_of_an_independent_writing(features: Any, projection: Any) -> None:
    params = {"num_features": 2 * DIM + 6, "features": features, "projection": projection}
    drawn = make_map(FeatureParams(**params), call(seed=9, layer=4), heads=3).directions
    for head in range(3):
        want = oracle.directions(params, 9, 4, head, DIM)
        np.testing.assert_allclose(drawn[head].numpy(), want, atol=1e-12)


def test_orthogonal_directions_are_orthogonal_within_a_block_with_norms_of_independent_ones() -> None:
    rows = make_map(FeatureParams(num_features=4096, features="positive"), call(), heads=2).directions
    blocks = rows.view(-1, DIM, DIM)
    products = blocks @ blocks.mT
    off_diagonal = products - torch.diag_embed(products.diagonal(dim1=1, dim2=2))
    assert float(off_diagonal.abs().max()) < 1e-10
    assert float(rows.square().sum(-1).mean()) == pytest.approx(DIM, rel=0.03)
    assert float(rows.square().sum(-1).var()) == pytest.approx(2 * DIM, rel=0.1)


def test_the_second_half_of_hyperbolic_directions_mirrors_the_first() -> None:
    rows = make_map(FeatureParams(num_features=20), call(), heads=2).directions
    assert torch.equal(rows[:, 10:], -rows[:, :10])


def test_normals_have_the_moments_of_normals() -> None:
    drawn = normals(5, 1000, 200)
    for power, moment in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
        assert float(drawn.pow(power).mean()) == pytest.approx(moment, abs=0.05)
    assert abs(float((drawn[:, :-1] * drawn[:, 1:]).mean())) < 0.02


def test_seed_layer_and_key_head_draw_apart_and_a_call_draws_again_the_same() -> None:
    params = FeatureParams(num_features=8)
    base = make_map(params, call(seed=1, layer=2), heads=2).directions
    DRAWS.clear()
    assert torch.equal(make_map(params, call(seed=1, layer=2), heads=2).directions, base)
    assert not torch.equal(base[0], base[1])
    for other in (call(seed=2, layer=2), call(seed=1, layer=3)):
        assert not torch.equal(make_map(params, other, heads=2).directions, base)


def test_a_drawn_map_is_remembered_whatever_the_scale_and_its_bytes_are_counted() -> None:
    params = FeatureParams(num_features=8)
    first, second = (make_map(params, call(scale), heads=2) for scale in (0.1, 0.2))
    assert first.directions is second.directions and first.key != second.key
    assert DRAWS.held_bytes >= first.directions.nbytes


def test_maps_that_differ_in_any_knob_have_different_keys() -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"num_features": 10},
        {"features": "positive"},
        {"projection": "iid"},
        {"centre_keys": 3},
    ]
    keys = {make_map(FeatureParams(**{"num_features": 8, **each}), call()).key for each in changes}
    keys |= {make_map(FeatureParams(num_features=8), each).key for each in (call(seed=1), call(layer=1))}
    assert len(keys) == len(changes) + 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_centre_is_the_mean_of_the_first_keys_and_of_all_where_rows_see_all(dtype: torch.dtype) -> None:
    k = torch.randn(2, 3, 50, DIM, generator=torch.Generator().manual_seed(0)).to(dtype)
    params = FeatureParams(centre_keys=20)
    for causal, keys in ((True, k[:, :, :20]), (False, k)):
        centre = key_centre(k, params, call(causal=causal))
        assert centre is not None and centre.dtype == torch.float32
        torch.testing.assert_close(centre, keys.float().mean(2, keepdim=True))
    assert key_centre(k, FeatureParams(centre_keys=0), call()) is None


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"num_features": 7}, "num_features must be even where features is hyperbolic, got 7"),
        ({"num_features": 1}, "num_features"),
        ({"num_features": 4098}, "num_features"),
        ({"centre_keys": -1}, "centre_keys"),
        ({"centre_keys": 4097}, "centre_keys"),
        ({"features": "trigonometric"}, "features"),
    ],
)
def test_bad_params_are_refused_by_name(params: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        FeatureParams(**params)
    assert FeatureParams(num_features=7, features="positive").num_features == 7
