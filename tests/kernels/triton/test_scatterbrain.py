"""Scatterbrain's kernels against its torch path, over every support."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from kernels import attend, attend_packed
from kernels.contract import Segment
from kernels.math import complement_tiles
from kernels.math.block_lists import BlockLists, lists_from_table
from kernels.math.kept import KeptStates
from tests.kernels.triton.agree import DEVICE, agree, operands, poisoned

CHOSEN = {"query_tile": 128, "block_size": 32}
SUPPORTS: dict[str, dict[str, Any]] = {
    "local": {"window": 11, "sinks": 3},
    "window": {"window": 9, "global_tokens": 5},
    "star": {"window": 16},
    "strided": {"stride": 7, "combine": "multihead"},
    "fixed": {"stride": 16},
    "random": {"num_random": 32, "block_size": 32},
    "bigbird": {"window": 9, "global_tokens": 3, "num_random": 2, "block_size": 1},
    "xattention": CHOSEN | {"budget": 32},
    "pooled": CHOSEN | {"budget": 64},
    "topk": CHOSEN | {"mass": 0.5},
    "pages": CHOSEN | {"budget": 32},
    "lsh": {"num_buckets": 4, "cluster_size": 16, "window": 3},
    "kmeans": {"num_clusters": 3, "cluster_size": 16, "train_keys": 30, "window": 5},
}
TALL = ("random", "xattention", "pooled", "topk", "pages")


def _params(support: str, **more: Any) -> dict[str, Any]:
    return {"support": support, "support_params": SUPPORTS[support], "num_features": 16} | more


def _length(support: str) -> int:
    return 140 if support in TALL else 70


@pytest.fixture(autouse=True)
def _low_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of a height at which short texts have blocks to leave out; torch keeps its own."""
    from kernels._triton import signed_calls

    monkeypatch.setattr(signed_calls, "TILE", 64)
    assert complement_tiles.TILE == 256


def test_every_support_is_in_these_tests() -> None:
    from kernels.attention.scatterbrain import SupportName

    assert set(SUPPORTS) == set(get_args(SupportName)) - {"sinks"}  # "local" is "sinks" with other defaults


@pytest.mark.parametrize(
    ("support", "causal"),
    [(support, True) for support in SUPPORTS]
    + [(support, False) for support in ("local", "star", "bigbird", "pages", "lsh")],
)
def test_a_call_equals_the_torch_path(support: str, causal: bool) -> None:
    n = _length(support)
    q, k, v = operands(n, n, H=2, D=24, Dv=16)
    found = agree(
        q,
        k,
        v,
        backend="scatterbrain",
        params=_params(support, centre_keys=5 if causal else 1),
        causal=causal,
        scale=0.2,
        seed=3,
    )
    assert found.dropped is not None and 0.0 < float(found.dropped.mean()) < 1.0
    assert found.lse is None


@pytest.mark.parametrize("support", ["local", "fixed", "topk", "lsh"])
def test_half_precision_equals_the_torch_path_of_the_same_numbers(support: str) -> None:
    n = _length(support)
    q, k, v = operands(n, n, H=2, D=16, dtype=torch.float16, seed=1)
    agree(
        q, k, v, backend="scatterbrain", params=_params(support, features="positive"), causal=True, scale=0.2
    )


@pytest.mark.parametrize("support", ["strided", "pooled"])
def test_rows_that_are_the_last_of_a_text_equal_the_torch_path_in_a_batch_of_two(support: str) -> None:
    M = 150 if support in TALL else 90
    q, k, v = operands(21, M, B=2, H=2, D=16, seed=2)
    agree(
        q, k, v, backend="scatterbrain", params=_params(support, centre_keys=4), causal=True, seed=5, layer=1
    )


@pytest.mark.parametrize("support", ["local", "xattention", "bigbird"])
def test_steps_from_kept_states_equal_calls_that_start_anew(support: str) -> None:
    first = 128 if support in TALL else 64
    q, k, v = operands(first + 8, first + 8, H=1, D=16, seed=3)
    kept, params = KeptStates(), _params(support, centre_keys=6)

    def step(a: int, b: int, states: KeptStates | None) -> Tensor:
        segment = Segment(slice(0, b - a), k[:, :, :b], v[:, :, :b], a, 3, None, states)
        with poisoned():
            return attend_packed(
                q[:, :, a:b],
                [segment],
                backend="scatterbrain",
                params=params,
                causal=True,
                scale=0.2,
                impl="triton",
            ).out

    for a, b in ((0, first), (first, first + 6), (first + 6, first + 7)):
        torch.testing.assert_close(step(a, b, kept), step(a, b, None), atol=2e-5, rtol=0)
    k[:, :, first - 20 :] = k[:, :, first - 20 :].flip(2)
    kept.truncate(first - 20)
    a, b = first + 7, first + 8
    torch.testing.assert_close(step(a, b, kept), step(a, b, None), atol=2e-5, rtol=0)


@pytest.mark.parametrize("support", ["topk", "lsh"])
def test_logits_of_thousands_stay_finite_and_equal_the_reference(support: str) -> None:
    n = _length(support)
    q, k, v = operands(n, n, H=1, D=16, seed=4)
    params, common = _params(support), {"backend": "scatterbrain", "causal": True, "scale": -30.0, "seed": 3}
    got, want = (attend(q, k, v, params=params, impl=impl, **common) for impl in ("triton", "reference"))  # type: ignore[arg-type]
    assert torch.isfinite(got.out).all()
    torch.testing.assert_close(got.out, want.out, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("support", "at", "broken"), [("topk", 20, "key"), ("fixed", 67, "value"), ("fixed", 20, "key")]
)
def test_a_number_that_is_not_finite_reaches_the_rows_that_may_see_it_and_no_other(
    support: str, at: int, broken: str
) -> None:
    q, k, v = operands(_length(support), _length(support), H=1, D=16, seed=5)
    params, common = (
        _params(support),
        {"backend": "scatterbrain", "causal": True, "scale": 0.2, "impl": "triton"},
    )
    want = attend(q, k, v, params=params, **common).out  # type: ignore[arg-type]
    (k if broken == "key" else v)[0, 0, at, 3] = float("nan")
    got = attend(q, k, v, params=params, **common).out  # type: ignore[arg-type]
    torch.testing.assert_close(got[:, :, :at], want[:, :, :at], atol=1e-6, rtol=0)
    assert torch.isnan(got[:, :, at:]).any(-1).all()


def test_pairs_that_kept_keys_outweigh_are_estimated_from_logarithms() -> None:
    """Two keys of each stride of 16 are so small that their features vanish beside those of the others."""
    q, k, v = operands(64, 64, H=1, D=16, seed=6)
    k *= 0.05
    k[:, :, 15::16] *= 400.0
    params = _params("fixed")
    for scale in (0.2, 2.0):
        agree(q, k, v, backend="scatterbrain", params=params, causal=True, scale=scale, tolerance=1e-4)


@pytest.mark.parametrize("num_features", [2, 20])
def test_any_number_of_features_and_heads_of_a_group_will_do(num_features: int) -> None:
    q, k, v = operands(40, 40, H=4, Hk=2, D=20, Dv=33, seed=7)
    params = {"support": "strided", "support_params": {"stride": 8}, "num_features": num_features}
    agree(q, k, v, backend="scatterbrain", params=params, causal=False, scale=0.1)


def test_sums_of_left_out_blocks_are_those_of_their_keys() -> None:
    """Tile by tile against one sum over the keys of the blocks, one of which is not finite."""
    from kernels._triton.signed import Map, block_features, left_out_sums, room

    generator = torch.Generator().manual_seed(0)
    Hk, P, L, F, D, Dv = 2, 6, 32, 5, 12, 7
    k, v = (torch.randn(Hk, P * L, size, generator=generator).to(DEVICE) for size in (D, Dv))
    v[0, 4 * L + 1, 2] = float("inf")
    directions, centre = (torch.randn(s, generator=generator).to(DEVICE) for s in ((Hk, F, D), (Hk, D)))
    left_out = (torch.rand(Hk, 3, P, generator=generator) < 0.5).to(DEVICE)
    left_out[:, 1] = False
    left_out[0, :, 4] = torch.tensor([True, False, False])
    with poisoned():
        fmap, blocks, tiles = Map(directions, centre, 0.3), room(Hk, P, F, v), room(Hk, 3, F, v)
        block_features(k, v, fmap, L, 0, blocks).run()
        ends = torch.full((3,), P, dtype=torch.int32, device=DEVICE)
        left_out_sums(left_out.to(torch.uint8), ends, blocks, tiles).run()
    centred = k - centre[:, None]
    logs = centred @ directions.mT * 0.3**0.5 - centred.square().sum(-1, keepdim=True) * 0.15
    for head in range(Hk):
        for tile in range(3):
            mine = left_out[head, tile].repeat_interleave(L)
            if not bool(mine.any()):
                assert torch.isneginf(tiles.bias[head, tile]).all()
                continue
            weights = torch.exp(logs[head, mine])
            want = (weights.mT @ v[head, mine]) / weights.sum(0)[:, None]
            torch.testing.assert_close(tiles.bias[head, tile], torch.log2(weights.sum(0)), atol=1e-4, rtol=0)
            fine = torch.isfinite(want)
            assert torch.equal(torch.isfinite(tiles.means[head, tile]), fine)
            torch.testing.assert_close(tiles.means[head, tile][fine], want[fine], atol=1e-4, rtol=0)


def test_tables_of_blocks_are_read_from_lists_that_are_longer_than_they_need() -> None:
    from kernels._triton.signed_calls import table_on

    generator = torch.Generator().manual_seed(1)
    for heads, tiles, blocks in ((1, 1, 1), (2, 3, 5), (3, 4, 9)):
        table = torch.rand(heads, tiles, blocks, generator=generator) < 0.4
        lists = lists_from_table(table, 32, range(tiles + 1))
        longer = torch.cat([lists.indices, torch.zeros(4, dtype=torch.int32)])
        padded = BlockLists(32, lists.borders, lists.indptr, longer)
        assert torch.equal(table_on(padded, blocks, torch.device(DEVICE)).cpu(), table)
