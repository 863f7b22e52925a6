"""Attention through random features: sums, states, borders, rare numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import attend
from kernels.contract import Call
from kernels.math import linear_attention
from kernels.math.features import FeatureMap, FeatureParams, feature_map
from kernels.math.kept import KeptStates
from kernels.math.linear_attention import CHUNK, KeptSums, feature_part
from kernels.math.signed import Part
from kernels.registry import load

DIM, WIDTH = 16, 5
FP64 = torch.float64


def draw(
    B: int, Hk: int, G: int, N: int, M: int, *, seed: int = 0, dtype: torch.dtype = FP64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, Hk, G, N, DIM), (B, Hk, M, DIM), (B, Hk, M, WIDTH))
    q, k, v = (torch.randn(*shape, generator=generator, dtype=FP64).to(dtype) for shape in shapes)
    return q, k, v


def make_map(call: Call, Hk: int, dtype: torch.dtype = FP64, **params: Any) -> FeatureMap:
    knobs = FeatureParams(**{"num_features": 48, **params})
    return feature_map(knobs, call, Hk, DIM, dtype, torch.device("cpu"))


def direct(
    q: Tensor, k: Tensor, v: Tensor, fmap: FeatureMap, call: Call, first: int, shift: int
) -> tuple[Tensor, Tensor]:
    """Numerators and denominators of ``feature_part``, from a matrix L."""
    logs = fmap.log_queries(q)[:, :, :, :, None] + fmap.log_keys(k)[:, :, None, None]
    i = torch.arange(call.start, call.start + q.shape[3])[:, None]
    j = torch.arange(k.shape[2])
    keep = (j >= first) & ((j <= i - shift) if call.causal else ((i - j).abs() >= shift))
    kernel = torch.exp(torch.logsumexp(logs, -1)).masked_fill(~keep, 0.0)
    return kernel @ v[:, :, None], kernel.sum(-1)


PLACES = [(1, 2, 2, 200, 200, 0), (2, 1, 3, 130, 233, 90), (1, 2, 1, 1, 150, 149), (1, 1, 2, 63, 300, 100)]
SUPPORTS = [(0, 0), (4, 0), (4, 30), (0, 1), (150, 70), (0, 1000), (299, 0)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", [0.2, -0.1, 0.0])
@pytest.mark.parametrize(("first", "shift"), SUPPORTS)
def test_a_part_sums_exactly_the_keys_asked_for(causal: bool, scale: float, first: int, shift: int) -> None:
    for number, (*sizes, start) in enumerate(PLACES):
        q, k, v = draw(*sizes, seed=number)
        call = Call(causal, scale, number, 1, start)
        fmap = make_map(call, sizes[1])
        part = feature_part(q, k, v, fmap, call, first=first, shift=shift)
        numerator, denominator = direct(q, k, v, fmap, call, first, shift)
        weight = torch.exp(part.log_scale)
        torch.testing.assert_close(part.numerator * weight.unsqueeze(-1), numerator, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(part.denominator * weight, denominator, rtol=1e-10, atol=1e-10)
        empty = denominator == 0
        assert torch.equal(empty, part.log_scale == -math.inf)
        assert not part.numerator[empty].any() and not part.denominator[empty].any()
        assert (part.denominator[~empty] > 1e-20).all()


def test_a_centre_is_taken_off_the_keys_as_they_are_read() -> None:
    q, k, v = draw(2, 2, 2, 90, 150)
    call = Call(True, 0.3, 0, 0, 60)
    fmap, centre = make_map(call, 2), k[:, :, :40].mean(2, keepdim=True)
    lazy = feature_part(q, k, v, fmap, call, first=3, shift=20, centre=centre)
    eager = feature_part(q, k - centre, v, fmap, call, first=3, shift=20)
    _assert_same(lazy, eager)


def _assert_same(a: Part, b: Part) -> None:
    """The same sums, whatever they are relative to."""
    unscaled = []
    for part in (a, b):
        weight = torch.exp(part.log_scale)
        unscaled.append((part.numerator * weight.unsqueeze(-1), part.denominator * weight))
    for x, y in zip(*unscaled, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shift", [0, 1, 70])
def test_rows_that_a_later_key_of_their_chunk_outweighs_by_any_factor_keep_their_sums(shift: int) -> None:
    """Keys grow or shrink by orders of magnitude within a chunk: relative to the chunk's largest weights the
    early rows are 0."""
    q, k, v = draw(1, 2, 2, 150, 150, dtype=torch.float32)
    steps = torch.tensor([0.5, 60.0, 0.3, 30.0, 9.0]).repeat(30)
    k *= steps[:, None]
    call = Call(True, 0.9, 0, 0, 0)
    fine = make_map(call, 2)
    part = feature_part(q, k, v, make_map(call, 2, torch.float32), call, shift=shift)
    want = feature_part(q.double(), k.double(), v.double(), fine, call, shift=shift)
    seen = want.log_scale > -math.inf
    assert torch.equal(seen, part.log_scale > -math.inf)
    assert float(part.denominator[seen].min()) > 1e-20
    got, expected = (x.numerator / x.denominator[..., None] for x in (part, want))
    torch.testing.assert_close(got[seen].double(), expected[seen], rtol=2e-2, atol=2e-2)


def test_the_slow_way_for_outweighed_rows_agrees_with_the_fast_one(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = draw(2, 2, 3, 140, 200)
    call = Call(True, 0.3, 0, 0, 33)
    fmap = make_map(call, 2)
    for first, shift in ((0, 0), (5, 12)):
        fast = feature_part(q, k, v, fmap, call, first=first, shift=shift)
        with monkeypatch.context() as patch:
            patch.setattr(linear_attention, "_FAINT", math.inf)
            slow = feature_part(q, k, v, fmap, call, first=first, shift=shift)
        seen = fast.log_scale > -math.inf
        got, want = (torch.log(part.denominator[seen]) + part.log_scale[seen] for part in (slow, fast))
        torch.testing.assert_close(got, want, atol=1e-10, rtol=0)
        means = [part.numerator[seen] / part.denominator[seen][..., None] for part in (slow, fast)]
        torch.testing.assert_close(means[0], means[1], atol=1e-10, rtol=0)


@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("shift", [0, 3])
def test_a_broken_key_is_felt_by_the_rows_that_see_it_alone(where: str, poison: float, shift: int) -> None:
    for bad in (0, CHUNK - 1, CHUNK, 100, 199):
        q, k, v = draw(1, 2, 2, 200, 200, seed=bad)
        call = Call(True, 0.3, 0, 0, 0)
        want = feature_part(q, k, v, make_map(call, 2), call, shift=shift)
        {"k": k, "v": v}[where][:, :, bad, 2] = poison
        got = feature_part(q, k, v, make_map(call, 2), call, shift=shift)
        rows = [
            x.numerator / x.denominator.masked_fill(x.denominator == 0, 1)[..., None] for x in (got, want)
        ]
        torch.testing.assert_close(rows[0][..., : bad + shift, :], rows[1][..., : bad + shift, :])
        felt = ~torch.isfinite(rows[0]).all(-1)
        assert felt[..., bad + shift :].all() and not felt[..., : bad + shift].any()


def kept_sums(kept: KeptStates) -> KeptSums:
    (state,) = kept._states.values()
    assert isinstance(state, KeptSums)
    return state


@pytest.mark.parametrize(("first", "shift"), [(0, 0), (4, 37), (0, 200)])
def test_a_kept_state_spares_reading_old_keys_and_changes_nothing(first: int, shift: int) -> None:
    q, k, v = draw(1, 2, 2, 330, 330)
    kept, common = KeptStates(), {"first": first, "shift": shift}
    whole = Call(True, 0.3, 0, 0, 0)
    fmap = make_map(whole, 2)
    want = feature_part(q, k, v, fmap, whole, **common)
    for begin, end in ((0, 100), (100, 101), (101, 230), (230, 231), (231, 232), (232, 300), (329, 330)):
        call = Call(True, 0.3, 0, 0, begin, kept=kept)
        old = k.clone()
        if kept._states:
            old[:, :, first : kept_sums(kept).sums.length] = math.nan  # whoever reads them again is lost
        got = feature_part(q[..., begin:end, :], old[:, :, :end], v[:, :, :end], fmap, call, **common)
        _assert_same(got, Part(*(x[:, :, :, begin:end] for x in vars(want).values())))
        assert kept_sums(kept).sums.length == max(first, end - shift)


def test_a_state_has_the_same_size_whatever_the_length_and_is_dropped_when_its_keys_are() -> None:
    q, k, v = draw(1, 2, 1, 400, 400, dtype=torch.float32)
    kept, sizes = KeptStates(), []
    fmap = make_map(Call(True, 0.3, 0, 0, 0), 2, torch.float32)
    for end in (100, 101, 400):
        begin = kept_sums(kept).sums.length if kept._states else 0
        call = Call(True, 0.3, 0, 0, begin, kept=kept)
        feature_part(q[..., begin:end, :], k[:, :, :end], v[:, :, :end], fmap, call)
        sizes.append(kept.nbytes)
    assert sizes[0] == sizes[1] == sizes[2] == 2 * 48 * ((WIDTH + 1) * 8 + 4)
    kept.truncate(400)
    assert kept_sums(kept).sums.length == 400
    kept.truncate(399)
    assert kept_sums(kept).sums.length == 0 and kept.nbytes == 0
    call = Call(True, 0.3, 0, 0, 250, kept=kept)
    got = feature_part(q[..., 250:251, :], k[:, :, :251], v[:, :, :251], fmap, call)
    want = feature_part(q[..., 250:251, :], k, v, fmap, Call(True, 0.3, 0, 0, 250))
    torch.testing.assert_close(got.numerator, want.numerator, atol=1e-5, rtol=1e-5)


def test_earlier_rows_asked_for_again_do_not_use_a_state_that_reaches_beyond_them() -> None:
    q, k, v = draw(1, 2, 2, 200, 200)
    kept = KeptStates()
    fmap = make_map(Call(True, 0.3, 0, 0, 0), 2)
    want = feature_part(q, k, v, fmap, Call(True, 0.3, 0, 0, 0, kept=kept))
    for begin, end in ((20, 60), (50, 51), (199, 200), (150, 200)):
        call = Call(True, 0.3, 0, 0, begin, kept=kept)
        got = feature_part(q[..., begin:end, :], k, v, fmap, call)
        _assert_same(got, Part(*(x[:, :, :, begin:end] for x in vars(want).values())))
        assert kept_sums(kept).sums.length == 200


def test_maps_and_supports_keep_their_states_apart() -> None:
    q, k, v = draw(1, 2, 2, 100, 100)
    kept, call = KeptStates(), Call(True, 0.3, 0, 0, 0)
    with_states = Call(True, 0.3, 0, 0, 0, kept=kept)
    for params, first, shift in (({}, 0, 0), ({"projection": "iid"}, 0, 0), ({}, 2, 0), ({}, 0, 9)):
        fmap = make_map(call, 2, **params)
        _assert_same(
            feature_part(q, k, v, fmap, with_states, first=first, shift=shift),
            feature_part(q, k, v, fmap, call, first=first, shift=shift),
        )
    assert len(kept._states) == 4


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (6, 3), (5, 1)])
@pytest.mark.parametrize("causal", [True, False])
def test_jobs_of_several_threads_give_what_one_gives(
    heads: tuple[int, int], causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_attention, "MIN_FLOPS", 0)
    monkeypatch.setattr(linear_attention, "PANEL_ELEMENTS", 1 << 14)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, heads[0], 900, DIM, generator=generator)
    k, v = (torch.randn(1, heads[1], 1000, DIM, generator=generator) for _ in range(2))
    common: dict[str, Any] = {"backend": "performer", "causal": causal, "scale": 0.3, "start": 50}
    alone = attend(q, k, v, **common)
    torch.set_num_threads(3)
    together = attend(q, k, v, **common)
    torch.testing.assert_close(together.out, alone.out, atol=1e-5, rtol=1e-5)
    assert torch.equal(together.out, attend(q, k, v, **common).out)
    assert together.stats.other_flops == alone.stats.other_flops


@pytest.mark.parametrize("causal", [True, False])
def test_the_error_falls_as_features_grow_like_one_over_their_number(causal: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, 400, DIM, generator=generator, dtype=FP64) * 0.5 for _ in range(3))
    common: dict[str, Any] = {"causal": causal, "scale": 0.25}
    want = attend(q, k, v, backend="exact", **common).out

    def squared_error(num_features: int) -> float:
        params = {"num_features": num_features}
        found = [
            attend(q, k, v, backend="performer", params=params, seed=seed, **common).out for seed in range(6)
        ]
        return float(sum(((out - want)[:, :, 64:] ** 2).mean() for out in found))

    errors = [squared_error(count) for count in (16, 128, 1024)]
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.5)
    assert errors[1] / errors[2] == pytest.approx(8, rel=0.5)


def test_the_first_rows_attend_exactly_and_their_pairs_count() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, 200, DIM, generator=generator, dtype=FP64) for _ in range(3))
    params = {"centre_keys": 70, "num_features": 8}
    common: dict[str, Any] = {"causal": True, "scale": 0.5}
    got = attend(q, k, v, backend="performer", params=params, **common)
    want = attend(q, k, v, backend="exact", **common)
    torch.testing.assert_close(got.out[:, :, :70], want.out[:, :, :70], atol=1e-12, rtol=0)
    assert (got.out[:, :, 70:] - want.out[:, :, 70:]).abs().amax((0, 1, 3)).min() > 1e-6
    assert got.stats.pairs_kept == 2 * 70 * 71 // 2 and got.lse is None and got.dropped is None
    few = attend(q[:, :, :70], k[:, :, :70], v[:, :, :70], backend="performer", params=params, **common)
    assert few.stats.density == 1.0 and few.stats.other_flops == 0


def test_a_constant_added_to_all_keys_changes_nothing_once_they_are_centred() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, 150, DIM, generator=generator, dtype=FP64) for _ in range(3))
    for causal in (True, False):
        common: dict[str, Any] = {"backend": "performer", "causal": causal, "scale": 0.3}
        common["params"] = {"centre_keys": 64}
        moved = attend(q, k + 7.0, v, **common).out
        torch.testing.assert_close(moved, attend(q, k, v, **common).out, atol=1e-9, rtol=0)


@pytest.mark.parametrize("features", ["positive", "hyperbolic"])
def test_keys_beyond_any_range_of_floats_leave_finite_means_of_values(features: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, 300, DIM, generator=generator) for _ in range(3))
    params = {"features": features, "num_features": 64}
    for scale in (1e3, -1e3):
        for causal in (True, False):
            out = attend(q, k, v, backend="performer", params=params, causal=causal, scale=scale).out
            assert torch.isfinite(out).all()
            assert out.min() >= v.min() - 1e-4 and out.max() <= v.max() + 1e-4


def test_what_it_says_of_itself() -> None:
    able = load("performer").capabilities
    assert able.approximates and able.random and not able.exact and able.selection == "row"
    assert able.exponent == 1.0 and able.decode and able.causal and able.bidirectional
