"""Linear attention over random features: by kernels what torch gives, in every direction and from kept
states."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import attend
from kernels.contract import Call
from kernels.math.features import FeatureMap, FeatureParams, feature_map
from kernels.math.kept import KeptStates
from kernels.math.linear_attention import KeptSums, feature_part
from kernels.math.signed import Part
from tests.kernels.triton.agree import DEVICE, agree, operands, poisoned

SMALL = {"num_features": 14}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_agree_with_torch(causal: bool, dtype: torch.dtype) -> None:
    q, k, v = operands(70, 70, D=16, dtype=dtype)
    agree(q, k, v, backend="performer", params=SMALL, causal=causal)


@pytest.mark.parametrize("causal", [True, False])
def test_ugly_shapes_a_later_start_and_batches_agree_with_torch(causal: bool) -> None:
    q, k, v = operands(7, 75, B=2, H=3, Hk=1, D=24, Dv=17, seed=1)
    agree(q, k, v, backend="performer", params={"num_features": 18}, causal=causal, scale=-0.15, start=60)


@pytest.mark.parametrize("causal", [True, False])
def test_centred_keys_agree_with_torch(causal: bool) -> None:
    q, k, v = operands(30, 40, D=16, seed=2)
    agree(q, k + 3.0, v, backend="performer", params={**SMALL, "centre_keys": 25}, causal=causal)


def draw(
    N: int, M: int, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """q [1, 1, 1, N, 16], k and v [1, 1, M, 16]."""
    q, k, v = operands(N, M, H=1, Hk=1, D=16, seed=seed, dtype=dtype)
    return q.unsqueeze(2), k, v


def make_map(call: Call, **params: Any) -> FeatureMap:
    knobs = FeatureParams(**{"num_features": 14, **params})
    return feature_map(knobs, call, 1, 16, torch.float32, torch.device(DEVICE))


def assert_same(part: Part, want: Part, close: float = 2e-5) -> None:
    """The same means and the same logarithms of the sums, where there are any."""
    seen = want.log_scale > -math.inf
    assert torch.equal(seen, part.log_scale > -math.inf)
    assert not part.numerator[~seen].any() and not part.denominator[~seen].any()
    means = [x.numerator[seen] / x.denominator[seen].unsqueeze(-1) for x in (part, want)]
    torch.testing.assert_close(means[0], means[1], atol=close, rtol=close)
    sums = [x.log_scale[seen] + torch.log(x.denominator[seen]) for x in (part, want)]
    torch.testing.assert_close(sums[0], sums[1], atol=10 * close, rtol=close)


@pytest.mark.parametrize(
    ("causal", "first", "shift", "start"),
    [
        (True, 4, 30, 0),
        (True, 70, 1, 20),
        (True, 0, 500, 0),
        (False, 3, 0, 0),
        (False, 2, 25, 20),
        (False, 99, 1, 0),
    ],
)
def test_a_part_sums_the_keys_asked_for(causal: bool, first: int, shift: int, start: int) -> None:
    q, k, v = draw(67, 99)
    call = Call(causal, 0.3, 0, 1, start)
    want = feature_part(q, k, v, make_map(call), call, first=first, shift=shift)
    with poisoned():
        got = feature_part(q, k, v, make_map(call), replace(call, impl="triton"), first=first, shift=shift)
    assert_same(got, want)


def kept_length(kept: KeptStates) -> int:
    (state,) = kept._states.values()
    assert isinstance(state, KeptSums)
    return state.sums.length


@pytest.mark.parametrize(("first", "shift"), [(0, 0), (3, 9)])
def test_chunks_and_steps_go_on_from_the_kept_state_and_read_no_older_key(first: int, shift: int) -> None:
    q, k, v = draw(120, 120)
    whole = Call(True, 0.3, 0, 0, 0)
    want = feature_part(q, k, v, make_map(whole), whole, first=first, shift=shift)
    kept = KeptStates()
    for begin, end in ((0, 50), (50, 51), (51, 70), (70, 71), (71, 72), (119, 120)):
        old = k.clone()
        if kept._states:
            old[:, :, first : kept_length(kept)] = math.nan  # whoever reads them again is lost
        call = Call(True, 0.3, 0, 0, begin, kept=kept, impl="triton")
        with poisoned():
            got = feature_part(
                q[..., begin:end, :],
                old[:, :, :end],
                v[:, :, :end],
                make_map(call),
                call,
                first=first,
                shift=shift,
            )
        assert_same(got, Part(*(x[:, :, :, begin:end] for x in vars(want).values())))
        assert kept_length(kept) == max(first, end - shift)


def test_a_step_without_kept_sums_agrees_with_torch() -> None:
    q, k, v = operands(1, 50, H=3, Hk=1, D=16)
    agree(q, k, v, backend="performer", params=SMALL)


def test_a_long_call_goes_piece_by_piece_and_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels._triton import linear

    q, k, v = draw(80, 80)
    call = Call(True, 0.3, 0, 0, 0, impl="triton")
    whole = feature_part(q, k, v, make_map(call), call)
    monkeypatch.setattr(linear, "STATE_BYTES", 1)
    with poisoned():
        pieces = feature_part(q, k, v, make_map(call), call)
    assert_same(pieces, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_that_a_later_key_of_their_chunk_outweighs_keep_their_sums(dtype: torch.dtype) -> None:
    q, k, v = draw(40, 40, dtype=dtype)
    k *= torch.tensor([0.5, 20.0, 0.3, 9.0, 2.0], device=k.device).repeat(8)[:, None]
    call = Call(True, 0.9, 0, 0, 0)
    want = feature_part(q.double(), k.double(), v.double(), _wide(make_map(call)), call)
    got = feature_part(q, k, v, make_map(call), replace(call, impl="triton"))
    means = [x.numerator / x.denominator.unsqueeze(-1) for x in (got, want)]
    torch.testing.assert_close(means[0].double(), means[1], atol=3e-2, rtol=3e-2)


def _wide(fmap: FeatureMap) -> FeatureMap:
    return FeatureMap(fmap.directions.double(), fmap.scale)


@pytest.mark.filterwarnings(
    "ignore:All-NaN:RuntimeWarning"
)  # what numpy says of a row of NaN in the interpreter
@pytest.mark.parametrize("where", ["k", "v"])
def test_a_broken_key_is_felt_by_the_rows_that_see_it_alone(where: str) -> None:
    q, k, v = draw(70, 70)
    call = Call(True, 0.3, 0, 0, 0, impl="triton")
    want = feature_part(q, k, v, make_map(call), call)
    {"k": k, "v": v}[where][:, :, 21, 2] = math.nan
    got = feature_part(q, k, v, make_map(call), call)
    torch.testing.assert_close(got.numerator[..., :21, :], want.numerator[..., :21, :], atol=2e-5, rtol=2e-5)
    assert not torch.isfinite(got.numerator[..., 21:, :]).all(-1).any()


def test_two_runs_give_the_same_bits() -> None:
    q, k, v = operands(20, 40, D=16)
    options: dict[str, Any] = {"backend": "performer", "params": SMALL, "causal": True, "scale": 0.2}
    first, second = (attend(q, k, v, impl="triton", **options).out for _ in range(2))
    assert torch.equal(first, second)


def test_keys_of_a_strided_cache_are_read_where_they_lie() -> None:
    q, k, v = operands(20, 40, H=2, Hk=2, D=16)
    wide = torch.full((1, 50, 2, 21), math.nan, device=k.device)
    wide[:, :40, :, 1:17] = k.transpose(1, 2)
    there = wide[:, :40, :, 1:17].transpose(1, 2)
    options: dict[str, Any] = {"backend": "performer", "params": SMALL, "causal": True, "scale": 0.2}
    got, want = (attend(q, keys, v, impl="triton", **options).out for keys in (there, k))
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
