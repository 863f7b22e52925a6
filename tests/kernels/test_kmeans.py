"""Buckets by clusters of keys."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import attend
from kernels.api import InvalidParams
from kernels.contract import Call
from kernels.math.clusters import KMeansParams, centroids, kmeans_codes
from kernels.math.kept import KeptStates
from tests.kernels.kernel_cases import both_directions, make_inputs


def call_of(causal: bool = True, start: int = 0, **more: Any) -> Call:
    return Call(causal=causal, scale=1.0, seed=7, layer=2, start=start, **more)


def spread_of(k: Tensor, middle: Tensor) -> float:
    return float(torch.cdist(k.double(), middle).amin(-1).square().mean())


def test_more_iterations_never_spread_keys_farther_from_their_centroids() -> None:
    k = make_inputs(1, (2, 2), 1, 500, 16)[1][0]
    spreads = [
        spread_of(k, centroids(KMeansParams(num_clusters=12, iterations=n), k, call_of()))
        for n in range(1, 20)
    ]
    assert all(after <= before + 1e-12 for before, after in zip(spreads[:-1], spreads[1:], strict=True))
    assert spreads[-1] < 0.95 * spreads[0]


def test_centroids_are_means_of_their_keys_once_they_rest() -> None:
    k = make_inputs(1, (1, 1), 1, 200, 4)[1][0]
    middle = centroids(KMeansParams(num_clusters=5, iterations=32), k, call_of())
    code = torch.cdist(k.double(), middle)[0].argmin(-1)
    for c in range(5):
        torch.testing.assert_close(middle[0, c], k[0, code == c].double().mean(0))


def test_an_empty_cluster_keeps_its_centroid() -> None:
    k = torch.ones(1, 60, 4)
    k[0, 30:] = 2.0
    middle = centroids(KMeansParams(num_clusters=8), k, call_of())
    assert torch.isfinite(middle).all()
    assert set(middle.flatten().tolist()) <= {1.0, 2.0}


def test_fewer_keys_than_clusters_are_a_cluster_each() -> None:
    k = make_inputs(1, (1, 1), 1, 5, 8)[1][0]
    middle = centroids(KMeansParams(num_clusters=32), k, call_of(causal=False))
    assert middle.shape == (1, 5, 8)
    assert torch.equal(middle[0].sort(0).values, k[0].double().sort(0).values)


def test_rows_find_the_keys_of_the_cluster_that_they_like() -> None:
    """Tight clusters, and queries that point at one each: most of the mass is kept at little density."""
    generator = torch.Generator().manual_seed(0)
    ways = torch.nn.functional.normalize(torch.randn(16, 32, generator=generator), dim=-1)
    of_keys, of_rows = (torch.randint(0, 16, (2048,), generator=generator) for _ in range(2))
    k = (ways[of_keys] + 0.02 * torch.randn(2048, 32, generator=generator))[None, None]
    q, v = ways[of_rows][None, None], torch.randn(1, 1, 2048, 32, generator=generator)
    knobs = {"num_clusters": 64, "num_probes": 6, "cluster_size": 256, "window": 1, "sinks": 0}
    for causal in (True, False):
        got = attend(q, k, v, backend="kmeans", params=knobs, causal=causal, scale=20.0)
        alone = attend(q, k, v, backend="kmeans", params=knobs | {"num_probes": 1}, causal=causal, scale=20.0)
        assert got.stats.dropped_mass is not None and alone.stats.dropped_mass is not None
        assert got.stats.dropped_mass < 0.15 < alone.stats.dropped_mass
        assert got.stats.density < 0.3


@both_directions
def test_rows_look_into_different_clusters_and_into_the_best_first(causal: bool) -> None:
    q, k, _ = make_inputs(1, (4, 2), 300, 300, 16)
    params = KMeansParams(num_clusters=9, num_probes=4, train_keys=100)
    codes = kmeans_codes(params, torch.unflatten(q[0], 0, (2, 2)), k[0], call_of(causal))
    middle = centroids(params, k[0, :, :100] if causal else k[0], call_of(causal))
    liking = torch.unflatten(q[0], 0, (2, 2)).double() @ middle[:, None].mT
    want = liking.sort(-1, descending=True).indices[..., :4].transpose(2, 3)
    assert torch.equal(codes.rows.long(), want)
    assert torch.equal(codes.keys[:, 0].long(), torch.cdist(k[0].double(), middle).argmin(-1))


def test_causal_rows_among_the_first_keep_all_that_they_see() -> None:
    q, k, v = make_inputs(1, (4, 2), 400, 400, 32)
    common: dict[str, Any] = {"causal": True, "scale": 0.2}
    got = attend(q, k, v, backend="kmeans", params={"train_keys": 300, "window": 2}, **common)
    want = attend(q, k, v, backend="exact", **common)
    torch.testing.assert_close(got.out[:, :, :300], want.out[:, :, :300], atol=1e-5, rtol=0)
    assert not torch.isclose(got.out[:, :, 300:], want.out[:, :, 300:], atol=1e-3).all(-1).any()


def test_later_keys_move_no_centroid_and_no_code() -> None:
    q, k, _ = make_inputs(1, (2, 2), 400, 400, 16)
    params = KMeansParams(train_keys=64, num_clusters=8)
    want = kmeans_codes(params, q[0, :, None], k[0], call_of())
    k[:, :, 300:] = 100.0
    got = kmeans_codes(params, q[0, :, None], k[0], call_of())
    assert torch.equal(got.keys[..., :300], want.keys[..., :300]) and torch.equal(got.rows, want.rows)


def test_long_texts_are_fitted_on_keys_spread_evenly_over_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels.math import clusters

    k = make_inputs(1, (1, 1), 1, 9001, 4)[1][0]
    fitted: list[Tensor] = []

    def note(params: KMeansParams, keys: Tensor, call: Call) -> Tensor:
        fitted.append(keys)
        return centroids(params, keys, call)

    monkeypatch.setattr(clusters, "centroids", note)
    kmeans_codes(KMeansParams(iterations=1), k[:, None, :5], k, call_of(causal=False))
    assert torch.equal(fitted[0], k[:, [t * 9001 // 4096 for t in range(4096)]])


def test_a_step_codes_its_own_key_and_fits_nothing_again() -> None:
    q, k, _ = make_inputs(1, (2, 2), 400, 400, 16)
    params, kept = KMeansParams(train_keys=64), KeptStates()
    kmeans_codes(params, q[0, :, None, :399], k[0, :, :399], call_of(kept=kept))
    want = kmeans_codes(params, q[0, :, None, 399:], k[0], call_of(start=399))
    k[:, :, :399] = math.nan
    got = kmeans_codes(params, q[0, :, None, 399:], k[0], call_of(start=399, kept=kept))
    assert torch.equal(got.keys, want.keys) and torch.equal(got.rows, want.rows)


def test_more_probes_than_clusters_are_refused() -> None:
    q, k, v = make_inputs(1, (2, 2), 9, 9, 16)
    with pytest.raises(InvalidParams, match=r"at most num_clusters \(3\), got 4"):
        attend(
            q,
            k,
            v,
            backend="kmeans",
            params={"num_clusters": 3, "num_probes": 4},
            causal=True,
            scale=1.0,
        )
