"""Sampled rows and their errors by Triton's kernels, held against torch's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels.contract import Call
from kernels.math.dense import grouped
from kernels.math.probe_rows import probe_dropped_mass
from kernels.math.row_error import DrawnRows, RowErrors
from kernels.math.row_exact import exact_rows
from tests.kernels.kernel_cases import both_directions
from tests.kernels.triton.agree import DEVICE, poisoned

SHAPES = [
    # H, Hk, M, D, Dv, R, least keys of a split
    (1, 1, 1, 16, 16, 1, 512),
    (6, 2, 150, 24, 40, 30, 32),
    (5, 1, 70, 48, 16, 9, 32),
    (2, 2, 64, 20, 20, 64, 512),
]


@pytest.fixture(autouse=True)
def splits_of_few_keys(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels._triton import row_error

    shape = getattr(request.node, "callspec", None)
    least = shape.params["shape"][-1] if shape and "shape" in shape.params else 32
    monkeypatch.setattr(row_error, "MIN_SPLIT_KEYS", least)


def made(H: int, Hk: int, M: int, D: int, Dv: int, R: int, seed: int = 0) -> tuple[Tensor, ...]:
    """R rows of the sequence at positions in no order, keys, values; logits as sharp as in models."""
    g = torch.Generator().manual_seed(seed)
    q, k = (3 * torch.randn(1, heads, rows, D, generator=g) for heads, rows in ((H, R), (Hk, M)))
    v = torch.randn(1, Hk, M, Dv, generator=g)
    return q.to(DEVICE), torch.randperm(M, generator=g)[:R], k.to(DEVICE), v.to(DEVICE)


def both(
    q: Tensor, positions: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    with poisoned():
        found = exact_rows(q, positions, k, v, scale, causal, impl="triton")
    wide = (x.double() for x in (q, k, v))
    q, k, v = wide
    return found, exact_rows(q, positions, k, v, scale, causal, impl="torch").float()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@both_directions
def test_rows_in_any_order_are_those_of_torch(shape: tuple[int, ...], causal: bool) -> None:
    found, told = both(*made(*shape[:-1]), 0.2, causal)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, told, atol=1e-5, rtol=0)


def test_narrow_keys_and_values_lose_nothing_of_single_precision() -> None:
    q, positions, k, v = (x.half() if x.is_floating_point() else x for x in made(4, 2, 140, 16, 16, 12))
    found, told = both(q, positions, k, v, 0.25, True)
    torch.testing.assert_close(found, told, atol=1e-5, rtol=0)


def test_wide_queries_over_a_narrow_cache_are_computed_in_single_precision() -> None:
    q, positions, k, v = made(4, 2, 100, 16, 16, 5)
    found, told = both(q, positions, k.half(), v.half(), 0.25, True)
    torch.testing.assert_close(found, told, atol=1e-5, rtol=0)


def test_keys_of_a_strided_cache_are_read_where_they_lie() -> None:
    q, positions, k, v = made(4, 2, 90, 16, 16, 5)
    cache = torch.stack([k[0], v[0]]).transpose(1, 2).contiguous().transpose(1, 2)  # heads beside each other
    found, told = both(q, positions, cache[:1], cache[1:], 0.25, True)
    torch.testing.assert_close(found, told, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:All-NaN:RuntimeWarning")  # numpy's
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_no_row_feels_a_later_key_whatever_its_numbers(poison: float) -> None:
    q, _, k, v = made(4, 2, 110, 16, 16, 6)
    positions = torch.tensor([5, 68, 69, 70, 71, 109])
    clean, _ = both(q, positions, k, v, 0.3, True)
    for tensor in (k, v):
        tensor[:, :, 70:] = poison
    found, _ = both(q, positions, k, v, 0.3, True)
    torch.testing.assert_close(found[:, :, :3], clean[:, :, :3], atol=1e-6, rtol=0)
    assert not torch.isfinite(found[:, :, 3:]).any()


def test_a_value_that_is_not_finite_is_felt_by_the_rows_that_see_it_alone() -> None:
    q, _, k, v = made(2, 1, 110, 16, 16, 4)
    positions = torch.tensor([68, 69, 70, 109])
    clean, _ = both(q, positions, k, v, 0.3, True)
    v[:, :, 70] = math.nan
    found, _ = both(q, positions, k, v, 0.3, True)
    torch.testing.assert_close(found[:, :, :2], clean[:, :, :2], atol=1e-6, rtol=0)
    assert found[:, :, 2:].isnan().all()


def test_logits_of_a_thousand_stay_finite() -> None:
    found, told = both(*made(2, 1, 130, 16, 16, 6), 30.0, True)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, told, atol=5e-3, rtol=0)


def test_two_runs_give_the_same_bits() -> None:
    given = made(4, 2, 130, 16, 16, 6)
    first, second = (exact_rows(*given, 0.3, True, impl="triton") for _ in range(2))
    assert torch.equal(first, second)


def test_no_rows_and_no_keys_give_empty_and_zeros() -> None:
    q, positions, k, v = made(4, 2, 10, 16, 8, 2)
    assert exact_rows(q[:, :, :0], positions[:0], k, v, 1.0, True, impl="triton").shape == (1, 4, 0, 8)
    zeros = exact_rows(q, positions, k[:, :, :0], v[:, :, :0], 1.0, False, impl="triton")
    assert zeros.shape == (1, 4, 2, 8) and not zeros.any()


def test_what_triton_cannot_compute_is_told_and_left_to_torch_unasked() -> None:
    q, positions, k, v = (x.double() if x.is_floating_point() else x for x in made(2, 1, 40, 8, 8, 3))
    with pytest.raises(ValueError, match="not in float64"):
        exact_rows(q, positions, k, v, 1.0, True, impl="triton")
    assert exact_rows(q, positions, k, v, 1.0, True).dtype == torch.float64
    with pytest.raises(ValueError, match="auto, torch or triton"):
        exact_rows(q, positions, k, v, 1.0, True, impl="reference")


@pytest.mark.parametrize("splits", ["one", "many"])
@both_directions
def test_the_mass_that_probed_rows_dropped_is_torchs(
    causal: bool, splits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kernels._triton import row_error

    monkeypatch.setattr(row_error, "MIN_SPLIT_KEYS", 32 if splits == "many" else 512)
    g = torch.Generator().manual_seed(1)
    q, k = (torch.randn(2, heads, rows, 20, generator=g).to(DEVICE) for heads, rows in ((4, 262), (2, 270)))
    lse = torch.randn(2, 2, 2, 262, generator=g).to(DEVICE) + 4
    lse[0, 0] = -math.inf
    lse[1, 1, 0] = math.nan
    with poisoned():
        calls = [Call(causal, 0.2, 0, 0, 8, impl=impl) for impl in ("torch", "triton")]
        told, found = (probe_dropped_mass(grouped(q, 2), k, lse, call) for call in calls)
    assert found.dropped_mass == pytest.approx(told.dropped_mass, abs=1e-5)
    assert found.flops == told.flops


@pytest.mark.parametrize("width", [30, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_squares_of_errors_are_torchs(width: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(2)
    H, R, Dv = 3, 70, 40
    exact = torch.randn(1, H, R, Dv, generator=g).to(DEVICE)
    used = (exact + 0.1 * torch.randn(1, H, R, Dv, generator=g).to(DEVICE)).to(dtype)
    used[:, :, 4] = exact[:, :, 4] = 0.5
    w_o = torch.randn(width, H * Dv, generator=g).to(DEVICE, dtype)
    probability = torch.rand(R, generator=g, dtype=torch.float64) / 2 + 0.5
    drawn = DrawnRows(torch.arange(R), probability, torch.ones(R, dtype=torch.bool))
    told, found = RowErrors(), RowErrors()
    told.add(drawn, exact, used, w_o, impl="torch")
    with poisoned():
        found.add(drawn, exact, used, w_o, impl="triton")
    for errors in (told, found):
        errors.add_totals(2 * R, None)
    a, b = told.figures(0), found.figures(0)
    assert b.estimate == pytest.approx(a.estimate, rel=1e-5) and b.head_shares == pytest.approx(a.head_shares)
    assert b.row_bound == pytest.approx(a.row_bound, rel=1e-5)
    x, y = found._joined("x"), found._joined("y")
    assert x[4] == 0 and (y > 0).all()
