"""What scatterbrain promises beyond the contract of every backend."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import Unsupported, attend, backend_names, parallel
from kernels.api import InvalidParams, attend_packed, parse_params
from kernels.attention.scatterbrain import ScatterbrainParams, SupportName, support_of
from kernels.contract import AttentionResult, Call, Segment
from kernels.math import complement_buckets, complement_difference
from kernels.math.accumulate import accumulator
from kernels.math.complement import features_of
from kernels.math.complement_reference import kept_pairs
from kernels.math.complement_tiles import pattern_keep
from kernels.math.complement_window import NOTHING, window_attention
from kernels.math.kept import KeptStates
from kernels.math.masked import positions
from kernels.registry import load
from tests.kernels.kernel_cases import both_directions, make_inputs, scale_of
from tests.kernels.oracles.performer import directions, exponents

SUPPORTS: list[dict[str, Any]] = [
    {"support_params": {"window": 20, "sinks": 3}},
    {"support": "window", "support_params": {"window": 30, "global_tokens": 7}},
    {"support": "star"},
    {"support": "strided", "support_params": {"stride": 7, "combine": "multihead"}},
    {"support": "fixed", "support_params": {"stride": 16}},
    {"support": "random", "support_params": {"num_random": 64, "block_size": 32}},
    {"support": "bigbird", "support_params": {"window": 9, "num_random": 5, "block_size": 1}},
    {"support": "xattention", "support_params": {"query_tile": 128, "block_size": 32, "budget": 64}},
    {"support": "pooled", "support_params": {"query_tile": 128, "block_size": 32, "budget": 64}},
    {"support": "topk", "support_params": {"query_tile": 128, "block_size": 64, "mass": 0.6}},
    {"support": "pages", "support_params": {"query_tile": 128, "block_size": 32, "budget": 32}},
    {"support": "lsh", "support_params": {"num_buckets": 6, "cluster_size": 16, "window": 3}},
    {"support": "kmeans", "support_params": {"num_clusters": 5, "cluster_size": 16, "train_keys": 50}},
]
every_support = pytest.mark.parametrize(
    "params", SUPPORTS, ids=lambda params: str(params.get("support", "local"))
)
FULL: list[dict[str, Any]] = [
    {"support_params": {"window": 600}},
    {"support": "strided", "support_params": {"stride": 600}},
    {"support": "topk", "support_params": {"mass": 1.0, "query_tile": 128}},
    {"support": "pages", "support_params": {"budget": 4096, "query_tile": 128}},
    {"support": "lsh", "support_params": {"num_buckets": 1, "cluster_size": 1024}},
]


def _attend(q: Tensor, k: Tensor, v: Tensor, params: dict[str, Any], **options: Any) -> AttentionResult:
    common: dict[str, Any] = {"causal": True, "scale": scale_of(q), "seed": 3} | options
    return attend(q, k, v, backend="scatterbrain", params=params, **common)


def test_the_supports_are_local_and_the_registered_backends_that_keep_pairs_without_a_model_s_help() -> None:
    others = {"exact", "vertical_slash", "scatterbrain"}
    fit = {
        name
        for name in backend_names()
        if name not in others
        and not load(name).capabilities.approximates
        and not load(name).capabilities.learned
    }
    assert set(get_args(SupportName)) == fit | {"local"}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"support_params": {"window": 0}}, "support_params.window"),
        ({"support_params": {"budget": 3}}, "no such parameter; there are: sinks, window"),
        ({"support": "lsh", "support_params": {"num_buckets": 7}}, "num_buckets must be 1 or even"),
        (
            {"support": "pooled", "support_params": {"remainder": "mean"}},
            "support_params.remainder: must be 'none'",
        ),
        ({"support": "topk", "support_params": {"skip": 0.1}}, "support_params.skip: must be 0"),
        ({"support": "exact"}, "support"),
        ({"num_features": 7}, "must be even"),
        ({"support_params": {"window": object()}}, "support_params.window: .*valid integer"),
    ],
)
def test_params_are_refused_with_the_field_and_the_reason(given: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidParams, match=told):
        parse_params("scatterbrain", given)


def test_a_support_s_own_reasons_and_sizes_pass_through() -> None:
    q, k, v = make_inputs(1, (2, 2), 40, 40, 16)
    smyrf = {"support": "lsh", "support_params": {"variant": "smyrf"}}
    with pytest.raises(Unsupported, match="its support 'lsh': variant smyrf"):
        _attend(q, k, v, smyrf)
    lists = ScatterbrainParams(support="pages", support_params={"budget": [64, 128]})
    assert lists.size_problems(2, 4) == []
    assert "support_params: budget has 2 entries" in lists.size_problems(3, 4)[0]
    assert ScatterbrainParams().chunk_multiple() == 1
    assert ScatterbrainParams(support="lsh").chunk_multiple() == 1
    assert lists.chunk_multiple() == 256


@pytest.mark.parametrize("name", ["strided", "fixed", "star", "random", "bigbird"])
@both_directions
def test_the_masks_of_fixed_patterns_are_those_of_their_own_references(name: str, causal: bool) -> None:
    for own in ({}, {"num_random": 5, "block_size": 1} if name in ("random", "bigbird") else {}):
        params = ScatterbrainParams(support=name, support_params=own, centre_keys=0)  # type: ignore[arg-type]
        q, k, _ = make_inputs(1, (4, 2), 130, 200, 8)
        call = Call(causal=causal, scale=1.0, seed=5, layer=1, start=70)
        i, j = positions(q, k, call)
        found = pattern_keep(support_of(params), call, (4, 2), i, j) & ((j <= i) | (not causal))
        want = kept_pairs(q, k, params, call, support_of(params))[0]
        assert torch.equal(found.expand(4, -1, -1), want)


@pytest.mark.parametrize("params", FULL, ids=lambda params: str(params.get("support", "local")))
@both_directions
def test_a_support_of_all_pairs_is_exact_for_any_features_and_seed(
    params: dict[str, Any], causal: bool
) -> None:
    narrow = make_inputs(1, (4, 2), 300, 300, 32)
    wide = tuple(x.double() for x in narrow)  # at logits of thousands fp32 itself is off by more
    for (q, k, v), scale in ((narrow, 0.2), (wide, 100.0)):
        want = attend(q, k, v, backend="exact", causal=causal, scale=scale)
        for num_features, seed in ((2, 0), (64, 9)):
            knobs = params | {"num_features": num_features}
            got = _attend(q, k, v, knobs, causal=causal, seed=seed, scale=scale)
            torch.testing.assert_close(got.out, want.out, atol=1e-5, rtol=0)
            assert got.stats.density == 1.0 and float(got.dropped.max()) < 1e-9  # type: ignore[union-attr]


@both_directions
def test_no_support_is_performer_to_the_last_digits(causal: bool) -> None:
    q, k, v = make_inputs(2, (4, 2), 300, 300, 32)
    for centre_keys in (0, 64):
        params = ScatterbrainParams(num_features=32, centre_keys=centre_keys)
        call = Call(causal=causal, scale=scale_of(q), seed=4, layer=2, start=0)
        got = window_attention(q, k, v, params, call, NOTHING)
        same = {"num_features": 32, "centre_keys": centre_keys}
        want = attend(
            q, k, v, backend="performer", params=same, causal=causal, scale=call.scale, seed=4, layer=2
        )
        torch.testing.assert_close(got.out, want.out, atol=2e-6, rtol=0)
        assert got.stats.pairs_kept == want.stats.pairs_kept


@pytest.mark.parametrize(("support", "seeds", "centre_keys"), [("local", 1500, 64), ("lsh", 1000, 0)])
def test_numerator_and_normaliser_are_unbiased_over_seeds_and_exact_on_the_support(
    support: str, seeds: int, centre_keys: int
) -> None:
    """Norms of .6: with larger ones the estimate's tail is too heavy for any mean over seeds to settle."""
    n, d = 10, 8
    q, k, v = (x.double() for x in make_inputs(1, (1, 1), n, n, d))
    q, k = (0.6 * x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    values = torch.cat([v[0, 0], torch.ones(n, 1)], -1)
    own = {"window": 2, "sinks": 1} | ({"cluster_size": 16} if support == "lsh" else {})
    params = ScatterbrainParams(
        num_features=16,
        support=support,  # type: ignore[arg-type]
        support_params=own,
        centre_keys=centre_keys,
    )
    call = Call(causal=False, scale=1.0, seed=0, layer=0, start=0)
    exact = torch.exp(q[0, 0] @ k[0, 0].mT)
    kept = kept_pairs(q, k, params, call, support_of(params))[0, 0]
    assert 0 < kept.sum() < n * n
    acc = accumulator(q, k, v, call)
    logs, shift = [], torch.zeros(())
    for seed in range(seeds):
        features = features_of(replace(acc, call=replace(call, seed=seed)), params)
        rows, keys = features.map.log_queries(acc.q), features.map.log_keys(features.centred(k))
        logs.append(rows[0, 0, 0, :, None] + keys[0, 0])
        shift = torch.as_tensor(features.shift(acc.q))
    estimates = torch.exp(torch.logsumexp(torch.stack(logs), -1) + shift.reshape(-1, 1))
    sums = torch.where(kept, exact, estimates) @ values  # [seeds, n, d + 1]
    error = (sums.mean(0) - exact @ values).abs()
    standard = sums.std(0) / math.sqrt(seeds)
    assert float((error / standard.clamp_min(1e-9)).max()) < 5.0
    got = load("scatterbrain").impls["torch"](q, k, v, params, call).out[0, 0]
    torch.testing.assert_close(got, sums[0, :, :-1] / sums[0, :, -1:], atol=1e-11, rtol=0)


@every_support
@both_directions
def test_rows_whose_values_live_on_the_support_see_exact_weights_times_one_normaliser(
    params: dict[str, Any], causal: bool
) -> None:
    """With values that are 1 on one kept key and 0 elsewhere the output is e^s / Z: its ratio over two kept
    keys of a row is that of the exact exponentials, whatever the features say."""
    q, k, _ = (x.double() for x in make_inputs(1, (2, 1), 260, 260, 16))
    knobs = parse_params("scatterbrain", params)
    call = Call(causal=causal, scale=0.2, seed=3, layer=0, start=0)
    kept = kept_pairs(q, k, knobs, call, support_of(knobs))[0]  # type: ignore[arg-type]
    values = torch.eye(260, dtype=torch.float64)[None, None]
    got = _attend(q, k, values, params, causal=causal, scale=0.2).out[0]
    logits = (q[0] @ k[0].mT) * 0.2
    for head, row in ((0, 259), (1, 200), (0, 77)):
        keys = kept[head, row].nonzero()[:, 0]
        ratio = torch.log(got[head, row, keys]) - logits[head, row, keys]
        assert float(ratio.max() - ratio.min()) < 1e-10
        assert float(got[head, row].sum()) == pytest.approx(1.0, abs=1e-12)


def test_a_pair_that_several_hash_rounds_find_counts_once() -> None:
    q, k, v = make_inputs(1, (2, 1), 200, 200, 16)
    one = {"num_buckets": 1, "num_hash_rounds": 1, "cluster_size": 32, "window": 4}
    for causal in (True, False):
        first, five = (
            _attend(
                q, k, v, {"support": "lsh", "support_params": one | {"num_hash_rounds": n}}, causal=causal
            )
            for n in (1, 5)
        )
        torch.testing.assert_close(first.out, five.out, atol=1e-6, rtol=0)
        assert first.stats.pairs_kept == five.stats.pairs_kept


@every_support
@both_directions
def test_logits_of_thousands_stay_finite_and_equal_the_reference(
    params: dict[str, Any], causal: bool
) -> None:
    q, k, v = make_inputs(1, (2, 1), 300, 300, 16)
    for scale in (30.0, -30.0):
        got, want = (
            _attend(q, k, v, params, causal=causal, scale=scale, impl=impl) for impl in ("torch", "reference")
        )
        assert float((q @ k.mT).abs().max()) * 30 > 4e2
        assert torch.isfinite(got.out).all()
        torch.testing.assert_close(got.out, want.out, atol=2e-3, rtol=0)


@pytest.mark.parametrize("cancellation", [0.0, 1.0, 1e30])
def test_rows_summed_again_under_a_hash_are_those_that_were_subtracted(
    cancellation: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = (x.double() for x in make_inputs(1, (4, 2), 300, 300, 16))
    params = SUPPORTS[-2]
    for causal in (True, False):
        want = _attend(q, k, v, params, causal=causal, impl="reference", scale=0.1)
        monkeypatch.setitem(complement_difference.CANCELLATION, torch.float64, cancellation)
        got = _attend(q, k, v, params, causal=causal, scale=0.1)
        torch.testing.assert_close(got.out, want.out, atol=1e-11, rtol=0)


@pytest.mark.parametrize("params", [SUPPORTS[0], SUPPORTS[5], SUPPORTS[10], SUPPORTS[11], SUPPORTS[12]])
def test_steps_from_kept_states_equal_the_call_that_starts_anew(params: dict[str, Any]) -> None:
    q, k, v = make_inputs(1, (4, 2), 420, 420, 16)
    kept = KeptStates()

    def step(a: int, b: int, states: KeptStates | None) -> Tensor:
        segment = Segment(slice(0, b - a), k[:, :, :b], v[:, :, :b], a, 3, None, states)
        common: dict[str, Any] = {"backend": "scatterbrain", "params": params, "causal": True, "scale": 0.3}
        return attend_packed(q[:, :, a:b], [segment], **common).out

    for a, b in ((0, 256), (256, 384), (384, 400), *((i, i + 1) for i in range(400, 412))):
        torch.testing.assert_close(step(a, b, kept), step(a, b, None), atol=1e-5, rtol=0)
    k[:, :, 300:] = k[:, :, 300:].flip(2)
    kept.truncate(300)
    for a, b in ((300, 410), (410, 411)):
        torch.testing.assert_close(step(a, b, kept), step(a, b, None), atol=1e-5, rtol=0)


@pytest.mark.parametrize("params", [SUPPORTS[7], SUPPORTS[10], SUPPORTS[11], SUPPORTS[12]])
@pytest.mark.parametrize("most", [0.0, 1e30])
def test_a_decode_step_s_difference_and_its_direct_sum_equal_the_reference(
    params: dict[str, Any], most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``most`` 0 every row is summed again over what it leaves out, with 1e30 hardly one is."""
    monkeypatch.setitem(complement_difference.CANCELLATION, torch.float64, most)
    q, k, v = (x.double() for x in make_inputs(1, (4, 2), 420, 420, 16))
    kept, knobs = KeptStates(), parse_params("scatterbrain", params | {"centre_keys": 20})
    for i in (390, 391, 419):
        call = Call(causal=True, scale=0.2, seed=3, layer=0, start=i, kept=kept)
        rows = q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1]
        got, want = (load("scatterbrain").impls[impl](*rows, knobs, call) for impl in ("torch", "reference"))
        torch.testing.assert_close(got.out, want.out, atol=1e-11, rtol=0)
        assert got.dropped is not None and want.dropped is not None
        torch.testing.assert_close(got.dropped, want.dropped, atol=1e-6, rtol=0)
        assert got.stats.pairs_kept == want.stats.pairs_kept


@both_directions
def test_panels_in_fp32_and_those_made_again_in_fp64_equal_the_direct_sum(
    causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = make_inputs(1, (1, 1), 300, 300, 24)
    params = {"support": "lsh", "support_params": {"num_buckets": 2, "cluster_size": 512, "window": 3}}
    want = _attend(q.double(), k.double(), v.double(), params, causal=causal, scale=1.0, seed=0)
    made_again, repair = [], complement_buckets._taken_again

    def counted(*given: Any) -> tuple[Tensor, Tensor]:
        made_again.append(int(given[2].sum()))
        return repair(*given)

    monkeypatch.setattr(complement_buckets, "_taken_again", counted)
    for rough in (10.0, 0.0):
        monkeypatch.setattr(complement_buckets, "ROUGH", rough)
        got = _attend(q, k, v, params, causal=causal, scale=1.0, seed=0)
        torch.testing.assert_close(got.out.double(), want.out, atol=1e-5, rtol=0)
    assert made_again[-1] > 200


def test_a_key_that_fp32_features_do_not_reach_is_repaired() -> None:
    """The last keys' features outweigh all others by e^100: in fp32 the others would be nothing."""
    q, k, v = make_inputs(1, (2, 1), 200, 200, 16)
    k[:, :, 150:] *= 0.1
    k[:, :, :150] *= 6.0
    for scale in (1.0, 4.0):
        want = _attend(q.double(), k.double(), v.double(), SUPPORTS[11], scale=scale)
        got = _attend(q, k, v, SUPPORTS[11], scale=scale)
        torch.testing.assert_close(got.out.double(), want.out, atol=2e-4, rtol=0)


@pytest.mark.parametrize("params", [SUPPORTS[8], SUPPORTS[10]])
@both_directions
def test_a_block_support_gives_the_same_on_two_threads(
    params: dict[str, Any], causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = make_inputs(1, (2, 1), 1100, 1100, 16)
    alone = _attend(q, k, v, params, causal=causal)
    monkeypatch.setattr(parallel, "MIN_FLOPS", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        spread = _attend(q, k, v, params, causal=causal)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(spread.out, alone.out, atol=2e-6, rtol=0)
    assert spread.dropped is not None and alone.dropped is not None
    torch.testing.assert_close(spread.dropped, alone.dropped, atol=2e-6, rtol=0)
    assert spread.stats.pairs_kept == alone.stats.pairs_kept


def test_a_local_support_decodes_from_a_state_of_constant_size() -> None:
    q, k, v = make_inputs(1, (4, 2), 900, 900, 16)
    kept, sizes = KeptStates(), set()
    whole = _attend(q, k, v, SUPPORTS[0])
    for i in (300, 301, 500, 700, 899):
        segment = Segment(slice(0, 1), k[:, :, : i + 1], v[:, :, : i + 1], i, 3, None, kept)
        step = attend_packed(
            q[:, :, i : i + 1],
            [segment],
            backend="scatterbrain",
            params=SUPPORTS[0],
            causal=True,
            scale=scale_of(q),
        )
        torch.testing.assert_close(step.out, whole.out[:, :, i : i + 1], atol=1e-5, rtol=0)
        sizes.add(kept.nbytes)
    assert len(sizes) == 1 and 0 < sizes.pop() < 2 * 64 * 17 * 12 + 2 * 64 * 8 + 1


def test_more_features_bring_the_answer_nearer() -> None:
    q, k, v = make_inputs(1, (4, 2), 400, 400, 16)
    want = attend(q, k, v, backend="exact", causal=True, scale=0.15).out
    few, many = (
        np.mean(
            [
                float(
                    (
                        _attend(q, k, v, SUPPORTS[0] | {"num_features": n}, scale=0.15, seed=s).out - want
                    ).norm()
                )
                for s in range(6)
            ]
        )
        for n in (16, 1024)
    )
    assert many < 0.5 * few


def test_what_the_features_carry_is_reported_as_the_mass_outside_the_support() -> None:
    q, k, v = make_inputs(1, (4, 2), 400, 400, 16)
    for params in (SUPPORTS[0], SUPPORTS[10], SUPPORTS[11]):
        got = _attend(q, k, v, params | {"num_features": 2048}, scale=0.1)
        alone = attend(
            q,
            k,
            v,
            backend=load("scatterbrain").params(**params).support_backend(),  # type: ignore[attr-defined]
            params=params["support_params"],
            causal=True,
            scale=0.1,
            seed=3,
        )
        exact = attend(q, k, v, backend="exact", causal=True, scale=0.1)
        assert alone.lse is not None and exact.lse is not None and got.dropped is not None
        true = 1 - torch.exp(alone.lse - exact.lse)
        assert float((got.dropped - true)[:, :, 64:].abs().mean()) < 0.03


def test_oracle_directions_are_the_ones_the_estimate_was_measured_with() -> None:
    """The features of the oracle, once more against the exact kernel: many of them come near."""
    q, k, _ = (x[0, 0].double().numpy() * 0.3 for x in make_inputs(1, (1, 1), 5, 6, 8))
    weights = directions({"num_features": 4096}, 1, 0, 0, 8)
    rows = np.exp(exponents(weights, q, 1.0, key=False))
    keys = np.exp(exponents(weights, k, 1.0, key=True))
    np.testing.assert_allclose(rows @ keys.T, np.exp(q @ k.T), rtol=0.1)
