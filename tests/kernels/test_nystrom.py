from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kernels import Unsupported, attend
from kernels.api import InvalidParams, attend_packed, parse_params
from kernels.contract import CallShape, Segment
from kernels.math.pinv import exact_inverse, iterative_inverse, pseudo_inverse
from kernels.registry import load
from tests.kernels.kernel_cases import make_inputs, scale_of
from tests.kernels.oracles.nystrom import expected
from tests.kernels.test_workspace import peak_of_tensors

EXACT = {"pinv": "exact"}


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **params: Any) -> torch.Tensor:
    return attend(q, k, v, backend="nystrom", params=params, causal=False, scale=scale_of(q)).out


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return attend(q, k, v, backend="exact", causal=False, scale=scale_of(q)).out


@pytest.mark.parametrize(
    "params", [{}, EXACT, {"num_landmarks": 7, "num_iterations": 12}, {"num_landmarks": 1}]
)
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_both_impls_equal_the_formula_written_in_numpy(params: dict[str, Any], impl: Any) -> None:
    for seed, (N, M, start) in enumerate([(1, 1, 0), (500, 500, 0), (63, 300, 40), (1, 130, 129)]):
        q, k, v = make_inputs(1 + seed % 2, (6, 2), N, M, 60, 24, seed=seed, dtype=torch.float64)
        where: dict[str, Any] = {"causal": False, "scale": scale_of(q), "start": start}
        want = expected(params, q.numpy(), k.numpy(), v.numpy(), **where, layer=0, seed=0, learned=None)
        got = attend(q, k, v, backend="nystrom", params=params, impl=impl, **where)
        tolerance = 1e-5 if params == EXACT else 1e-11
        np.testing.assert_allclose(got.out.numpy(), want.out, atol=tolerance, err_msg=str((N, M)))
        assert got.lse is None and got.dropped is None and got.stats.impl == impl
        assert got.stats.pairs_kept == got.stats.pairs_computed == 0 and got.stats.other_flops > 0
        assert got.stats.pairs_exact == q.shape[0] * 6 * N * M


def test_fp32_and_narrow_types_stay_within_their_rounding() -> None:
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        q, k, v = make_inputs(1, (6, 2), 5000, 5000, 16, dtype=dtype)
        wide = [x.double().numpy() for x in (q, k, v)]
        for params in ({}, {"num_landmarks": 129, "num_iterations": 12}):
            want = expected(
                params, *wide, causal=False, scale=scale_of(q), start=0, layer=0, seed=0, learned=None
            )
            got = run(q, k, v, **params)
            assert got.dtype == dtype
            np.testing.assert_allclose(got.double().numpy(), want.out, atol=tolerance)


@pytest.mark.parametrize("length", [1, 2, 17, 64])
def test_sequences_no_longer_than_the_landmarks_are_exact_with_the_exact_inverse(length: int) -> None:
    for seed in range(5):
        q, k, v = make_inputs(2, (4, 2), length, length, 32, seed=seed)
        torch.testing.assert_close(run(q, k, v, **EXACT), exact(q, k, v), atol=1e-5, rtol=0)


def test_few_rows_over_many_keys_are_exact_too_since_every_row_is_a_landmark() -> None:
    q, k, v = make_inputs(1, (4, 2), 20, 700, 32)
    torch.testing.assert_close(run(q, k, v, **EXACT), exact(q, k, v), atol=1e-5, rtol=0)


def test_one_landmark_is_the_mean_query_s_attention_in_every_row() -> None:
    q, k, v = make_inputs(1, (2, 2), 300, 300, 32)
    want = exact(q.mean(2, keepdim=True), k, v).expand_as(q)
    for params in ({}, EXACT):
        torch.testing.assert_close(run(q, k, v, num_landmarks=1, **params), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("params", [{}, EXACT])
def test_segments_of_equal_tokens_are_exact_where_the_inverse_is(params: dict[str, Any]) -> None:
    """A landmark is then each of its segment's tokens, and equal segments weigh alike."""
    q, k, v = make_inputs(1, (2, 2), 16, 16, 8)
    repeated = [x.repeat_interleave(8, 2) for x in (4 * q, 4 * k, v)]
    found, want = run(*repeated, num_landmarks=16, **{"num_iterations": 12, **params}), exact(*repeated)
    assert float((found - want).norm() / want.norm()) < (1e-5 if params else 0.02)


def test_more_landmarks_come_closer_where_attention_varies_slowly() -> None:
    steps = torch.linspace(0, 6.0, 512)[:, None] * torch.linspace(0.5, 2.0, 16)[None]
    slow = torch.cat([torch.sin(steps), torch.cos(steps)], -1)[None, None]
    v = make_inputs(1, (1, 1), 1, 512, 32)[2]
    want = exact(slow, slow, v)
    errors = [
        float((run(slow, slow, v, num_landmarks=m, num_iterations=12) - want).norm() / want.norm())
        for m in (2, 8, 32)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 0.1


@pytest.mark.parametrize("seed", range(6))
def test_the_iteration_converges_to_the_exact_inverse_of_a_well_conditioned_matrix(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    rows, columns = [(5, 5), (30, 30), (12, 40), (40, 12), (1, 7), (64, 64)][seed]
    noise = torch.rand(3, rows, columns, generator=draw, dtype=torch.float64)
    a = torch.softmax(4 * torch.eye(rows, columns, dtype=torch.float64) + noise, -1)
    torch.testing.assert_close(iterative_inverse(a, 12), exact_inverse(a), atol=1e-6, rtol=1e-6)
    gaps = [float((a @ iterative_inverse(a, n) @ a - a).norm()) for n in (0, 1, 2)]
    assert gaps[0] > gaps[1] > gaps[2] or gaps[0] < 1e-12


def test_the_iteration_never_diverges_from_its_start_whatever_the_matrix() -> None:
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        logits = 10.0 ** (seed % 5 - 2) * torch.randn(2, 48, 48, generator=draw, dtype=torch.float64)
        logits[:, 10:20] = logits[:, :1]  # equal rows: singular
        a = torch.softmax(logits, -1)
        for count in (1, 6, 12):
            z = iterative_inverse(a, count)
            values = torch.linalg.eigvals(a @ z).real
            assert torch.isfinite(z).all() and -1e-6 < float(values.min()) <= float(values.max()) < 1 + 1e-6


def test_one_matrix_of_a_batch_does_not_move_another() -> None:
    a = torch.softmax(
        torch.randn(4, 9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64), -1
    )
    for method in ("iterative", "exact"):
        alone = torch.cat([pseudo_inverse(a[i : i + 1], method, 6) for i in range(4)])  # type: ignore[arg-type]
        torch.testing.assert_close(pseudo_inverse(a, method, 6), alone, atol=1e-13, rtol=0)  # type: ignore[arg-type]
        spoiled = a.clone()
        spoiled[2, 3, 3] = torch.nan
        found = pseudo_inverse(spoiled, method, 6)  # type: ignore[arg-type]
        assert torch.isnan(found[2]).all()
        torch.testing.assert_close(found[[0, 1, 3]], alone[[0, 1, 3]], atol=1e-13, rtol=0)


@pytest.mark.parametrize("params", [{}, EXACT])
def test_a_broken_token_spoils_its_own_head_and_sequence_alone(params: dict[str, Any]) -> None:
    q, k, v = make_inputs(2, (4, 2), 200, 200, 16)
    want = run(q, k, v, **params)
    k[1, 1, 77] = torch.nan
    got = run(q, k, v, **params)
    assert torch.isnan(got[1, 2:]).all()
    assert torch.equal(got[0], want[0]) and torch.equal(got[1, :2], want[1, :2])


@pytest.mark.parametrize("params", [{}, EXACT, {"num_landmarks": 8}])
@pytest.mark.parametrize("scale", [100.0, 0.0, -0.2])
def test_huge_zero_and_negative_scales_stay_finite_and_agree(params: dict[str, Any], scale: float) -> None:
    q, k, v = make_inputs(1, (6, 2), 300, 300, 64)
    common: dict[str, Any] = {"backend": "nystrom", "params": params, "causal": False, "scale": scale}
    got, want = attend(q, k, v, **common).out, attend(q, k, v, **common, impl="reference").out
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got, want, atol=2e-3, rtol=1e-3)
    if scale == 0.0:
        torch.testing.assert_close(
            got, v.mean(2, keepdim=True).repeat_interleave(3, 1).expand_as(got), atol=1e-5, rtol=0
        )


def test_many_heads_and_landmarks_go_in_groups_without_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels.attention import nystrom

    q, k, v = make_inputs(2, (6, 2), 260, 300, 16)
    want = run(q, k, v)
    monkeypatch.setattr(nystrom, "_MATRIX", 1)
    monkeypatch.setattr(nystrom, "_ROWS", 7)
    torch.testing.assert_close(run(q, k, v), want, atol=1e-5, rtol=0)


def test_packed_sequences_equal_each_alone() -> None:
    q, _, _ = make_inputs(1, (6, 2), 300, 1, 16)
    lengths = (1, 199, 100)
    keys = [make_inputs(1, (6, 2), 1, n, 16, seed=n)[1:] for n in lengths]
    borders = (0, 1, 200, 300)
    segments = [Segment(slice(borders[i], borders[i + 1]), *keys[i], start=0) for i in range(3)]
    packed = attend_packed(q, segments, backend="nystrom", causal=False, scale=0.3)
    for segment in segments:
        alone = attend(
            q[:, :, segment.rows], segment.k, segment.v, backend="nystrom", causal=False, scale=0.3
        )
        torch.testing.assert_close(packed.out[:, :, segment.rows], alone.out, atol=1e-6, rtol=0)


def test_a_causal_call_is_refused_with_its_reason() -> None:
    q, k, v = make_inputs(1, (2, 2), 8, 8, 16)
    with pytest.raises(Unsupported, match="no causal form"):
        attend(q, k, v, backend="nystrom", causal=True, scale=1.0)


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"num_landmarks": 0}, "num_landmarks"),
        ({"num_iterations": 13}, "num_iterations"),
        ({"pinv": "svd"}, "pinv"),
    ],
)
def test_a_wrong_parameter_is_named(params: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidParams, match=field):
        parse_params("nystrom", params)


@pytest.mark.parametrize("params", [{}, EXACT, {"num_landmarks": 256}])
@pytest.mark.parametrize(
    ("heads", "rows", "keys", "value_dim", "dtype"),
    [
        ((6, 2), 2048, 2048, 32, torch.float32),
        ((6, 6), 5000, 5000, 32, torch.float32),
        ((6, 6), 3000, 3000, 48, torch.float32),
        ((6, 2), 3000, 6000, 32, torch.bfloat16),
        ((2, 2), 300, 300, 32, torch.float64),
    ],
)
def test_what_it_is_predicted_to_take_is_what_its_tensors_take(
    params: dict[str, Any], heads: tuple[int, int], rows: int, keys: int, value_dim: int, dtype: torch.dtype
) -> None:
    q, k, v = make_inputs(1, heads, rows, keys, 32, value_dim, dtype=dtype)
    shape = CallShape(rows, keys, *heads, 32, value_dim, dtype.itemsize, causal=False)
    predicted = load("nystrom").workspace(parse_params("nystrom", params), shape)
    assert predicted.kept_bytes == predicted.shared_bytes == predicted.cache_bytes == 0
    peak = peak_of_tensors(lambda: run(q, k, v, **params))
    assert 1 < predicted.live_bytes / peak < 2.4  # moments add up, since freed pieces are not given back
