"""Rows anywhere in a sequence, computed exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import attend
from kernels.math import row_exact
from kernels.math.row_error import exact_rows
from tests.kernels.kernel_cases import both_directions

SHAPES = [
    # H, Hk, M, D, Dv, R
    (1, 1, 1, 8, 8, 1),
    (4, 2, 63, 60, 60, 7),
    (6, 2, 500, 16, 24, 500),
    (3, 3, 2049, 8, 8, 90),
    (8, 1, 4500, 16, 16, 33),
    (6, 3, 9000, 4, 12, 150),
]


def made(H: int, Hk: int, M: int, D: int, Dv: int, R: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Every query of the sequence, R positions in no order, keys, values; logits as sharp as in models."""
    g = torch.Generator().manual_seed(seed)
    q, k = (3 * torch.randn(1, heads, M, D, generator=g) for heads in (H, Hk))
    v = torch.randn(1, Hk, M, Dv, generator=g)
    return q, torch.randperm(M, generator=g)[:R], k, v


def truth(q: Tensor, positions: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """The rows' softmax in fp64, key by key that they see."""
    G = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(G, 1) for x in (k, v))
    rows = []
    for r, position in enumerate(positions.tolist()):
        stop = position + 1 if causal else k.shape[2]
        weights = torch.softmax(q[:, :, r : r + 1].double() @ k[:, :, :stop].mT * scale, -1)
        rows.append(weights @ v[:, :, :stop])
    return torch.cat(rows, 2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@both_directions
def test_rows_in_any_order_are_the_softmax_over_the_keys_they_see(
    shape: tuple[int, ...], causal: bool
) -> None:
    q, positions, k, v = made(*shape)
    rows = q[:, :, positions]
    found = exact_rows(rows, positions, k, v, 0.3, causal)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), truth(rows, positions, k, v, 0.3, causal), atol=2e-5, rtol=0)


@both_directions
def test_rows_equal_those_of_exact_attention_in_double_precision(causal: bool) -> None:
    q, positions, k, v = (x.double() if x.is_floating_point() else x for x in made(4, 2, 2600, 8, 8, 70))
    whole = attend(q, k, v, backend="exact", causal=causal, scale=0.3).out
    found = exact_rows(q[:, :, positions], positions, k, v, 0.3, causal)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, whole[:, :, positions], atol=1e-12, rtol=0)


def test_rows_of_one_chunk_of_a_strided_cache_are_those_of_contiguous_keys() -> None:
    q, _, k, v = made(6, 2, 7000, 16, 16, 1)
    cache = torch.stack([k[0], v[0]]).transpose(1, 2).contiguous()  # [2, M, Hk, D]
    positions = torch.tensor([6500, 6501, 6640, 6999])
    k_view, v_view = cache.transpose(1, 2)[:1], cache.transpose(1, 2)[1:]
    found = exact_rows(q[:, :, positions], positions, k_view, v_view, 0.25, True)
    torch.testing.assert_close(found, exact_rows(q[:, :, positions], positions, k, v, 0.25, True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_keys_and_values_are_computed_with_in_single_precision(dtype: torch.dtype) -> None:
    q, positions, k, v = (x.to(dtype) if x.is_floating_point() else x for x in made(4, 2, 5000, 16, 16, 40))
    rows = q[:, :, positions]
    found = exact_rows(rows, positions, k, v, 0.25, True)
    torch.testing.assert_close(found.double(), truth(rows, positions, k, v, 0.25, True), atol=2e-5, rtol=0)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_no_row_feels_a_later_key_whatever_its_numbers(poison: float) -> None:
    q, _, k, v = made(4, 2, 3000, 8, 8, 1)
    positions = torch.tensor([5, 2100, 2200, 2201, 2990])
    rows = q[:, :, positions]
    clean = exact_rows(rows, positions, k, v, 0.3, True)
    for tensor in (k, v):
        tensor[:, :, 2201:] = poison
    found = exact_rows(rows, positions, k, v, 0.3, True)
    torch.testing.assert_close(found[:, :, :3], clean[:, :, :3], atol=1e-6, rtol=0)
    assert not torch.isfinite(found[:, :, 3:]).any()


def test_logits_of_a_thousand_stay_finite() -> None:
    q, positions, k, v = made(2, 1, 2500, 8, 8, 20)
    found = exact_rows(q[:, :, positions], positions, k, v, 30.0, True)
    expected = truth(q[:, :, positions], positions, k, v, 30.0, True)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found.double(), expected, atol=5e-3, rtol=0)


def test_no_rows_and_no_keys_give_empty_and_zeros() -> None:
    q, _, k, v = made(4, 2, 10, 8, 6, 1)
    none = torch.zeros(0, dtype=torch.int64)
    assert exact_rows(q[:, :, :0], none, k, v, 1.0, True).shape == (1, 4, 0, 6)
    zeros = exact_rows(q[:, :, :2], torch.tensor([0, 1]), k[:, :, :0], v[:, :, :0], 1.0, False)
    assert zeros.shape == (1, 4, 2, 6) and not zeros.any()


def test_rows_are_grouped_so_that_little_is_masked_and_keys_are_read_seldom() -> None:
    chunk = sorted(torch.randperm(2048, generator=torch.Generator().manual_seed(0))[:64].tolist())
    assert list(row_exact._groups([14336 + row for row in chunk], True)) == [slice(0, 64)]
    spread = list(range(0, 16384, 64))
    for rows in row_exact._groups(spread, True):
        first, last = spread[rows.start], spread[rows.stop - 1]
        assert rows.stop - rows.start <= 64 and last - first <= max(2048, first // 2)
    assert list(row_exact._groups(spread[:64], False)) == [slice(0, 64)]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"positions": torch.tensor([0, 1])}, "one for each of 3 rows"),
        ({"positions": torch.tensor([0, 1, 10])}, "positions must lie in 0 .. 9"),
        ({"positions": torch.tensor([-1, 1, 2])}, "positions must lie in 0 .. 9"),
        ({"k": torch.zeros(1, 2, 9, 8)}, "keys and values of one length"),
        ({"q": torch.zeros(1, 4, 3, 7)}, "as wide as k"),
        ({"q": torch.zeros(1, 5, 3, 8)}, "5 query heads are no multiple of 2"),
        ({"q": torch.zeros(4, 3, 8)}, "heads, rows, dim"),
    ],
)
def test_what_does_not_fit_together_is_refused(change: dict[str, Tensor], told: str) -> None:
    q, k, v = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 10, 8), torch.zeros(1, 2, 10, 6)
    given = {"q": q, "positions": torch.tensor([0, 1, 2]), "k": k, "v": v, **change}
    with pytest.raises(ValueError, match=told):
        exact_rows(**given, scale=1.0, causal=True)
