"""The figures that drawn rows give: estimate, upper limit, bound, shares of heads."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.math import row_bootstrap, row_error
from kernels.math.row_error import DecodeSampler, DrawnRows, ErrorFigures, RowErrors, RowSampler


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(total: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """exact and used [1, 3, total, 4], w_o [10, 12]; errors rise and fall with outputs, and with luck."""
    exact = normal(1, 3, total, 4, seed=seed) * torch.exp(normal(total, 1, seed=seed + 1))
    used = exact + 0.1 * normal(1, 3, total, 4, seed=seed + 2) * torch.exp(normal(total, 1, seed=seed + 3))
    return exact, used, normal(10, 12, seed=seed + 4)


def squares(rows: Tensor, w_o: Tensor) -> Tensor:
    """|row W|^2 of [1, H, N, Dv] -> [N]."""
    return (rows[0].transpose(0, 1).flatten(1) @ w_o.mT).square().sum(-1)


def looked(drawn: DrawnRows, exact: Tensor, used: Tensor, w_o: Tensor) -> RowErrors:
    errors = RowErrors()
    errors.add(drawn, exact[:, :, drawn.positions], used[:, :, drawn.positions], w_o)
    errors.add_totals(exact.shape[2], 50.0)
    return errors


def scalar_figures(drawn: DrawnRows, x: Tensor, y: Tensor, seed: int = 0) -> ErrorFigures:
    """Of rows with these squares, one head of one number each."""
    exact, used = torch.zeros(2, 1, 1, len(x), 2, dtype=torch.float64)
    exact[0, 0, :, 0] = y.sqrt()
    used[0, 0, :, 0], used[0, 0, :, 1] = y.sqrt(), x.sqrt()
    return looked(drawn, exact, used, torch.eye(2, dtype=torch.float64)).figures(seed)


@pytest.mark.parametrize("total", [1, 19, 128, 700])
def test_figures_are_exact_where_every_row_was_looked_at(total: int) -> None:
    exact, used, w_o = layer(total)
    drawn = RowSampler(0, 0, total, "all").draw(0, total, None)
    found = looked(drawn, exact, used, w_o).figures(0)
    x, y = squares(used - exact, w_o), squares(exact, w_o)
    assert found.estimate == pytest.approx(math.sqrt(x.sum() / y.sum()), rel=1e-9)
    assert found.approx_upper_95 == found.estimate
    assert (found.rows, found.rows_total) == (total, total)
    assert found.of_residual == pytest.approx(math.sqrt(x.sum() / 50.0), rel=1e-9)
    ratios = (x / y).sqrt()
    assert found.row_bound is not None
    bound = found.row_bound * (1 + 1e-9)
    assert (ratios <= bound).double().mean() >= 0.95
    assert (ratios < found.row_bound * (1 - 1e-9)).double().mean() < 0.95


def test_shares_of_heads_are_their_own_squares_over_all_rows() -> None:
    exact, used, w_o = layer(100)
    found = looked(RowSampler(0, 0, 100).draw(0, 100, None), exact, used, w_o).figures(0)
    own = [(((used - exact)[0, h] @ w_o[:, 4 * h : 4 * h + 4].mT).square()).sum() for h in range(3)]
    assert found.head_shares == pytest.approx([float(each / sum(own)) for each in own])
    assert sum(found.head_shares) == pytest.approx(1.0)


def test_the_estimate_is_near_the_truth_and_right_on_average() -> None:
    exact, used, w_o = layer(3000)
    truth = math.sqrt(squares(used - exact, w_o).sum() / squares(exact, w_o).sum())
    found = []
    for seed in range(150):
        drawn = RowSampler(seed, 0, 3000).draw(0, 3000, None)
        found.append(looked(drawn, exact, used, w_o).figures(seed).estimate / truth)
    assert abs(np.mean(found) - 1) < 0.06
    assert np.std(found) < 0.35


def test_errors_as_large_as_outputs_are_estimated_within_two_percent() -> None:
    y = torch.exp(normal(3000))
    x = 0.98**2 * y * torch.exp(0.05 * normal(3000, seed=1))
    for seed in range(20):
        found = scalar_figures(RowSampler(seed, 0, 3000).draw(0, 3000, None), x, y)
        assert found.estimate == pytest.approx(math.sqrt(x.sum() / y.sum()), rel=0.02)


def test_figures_do_not_depend_on_how_rows_were_gathered() -> None:
    exact, used, w_o = layer(1000)
    drawn = RowSampler(0, 0, 1000).draw(0, 1000, None)
    whole = looked(drawn, exact, used, w_o).figures(3)
    parts = []
    for rows in (slice(0, 50), slice(50, 51), slice(51, None)):
        part = DrawnRows(drawn.positions[rows], drawn.probability[rows], drawn.uniform[rows])
        parts.append(RowErrors())
        parts[-1].add(part, exact[:, :, part.positions], used[:, :, part.positions], w_o)
    errors = pickle.loads(pickle.dumps(parts[0]))
    for part_errors in parts[1:]:
        errors.merge(part_errors)
    errors.add_totals(400, 20.0)
    errors.add_totals(600, 30.0)
    found = errors.figures(3)
    assert found.head_shares == pytest.approx(whole.head_shares)
    for name in ("estimate", "approx_upper_95", "row_bound", "of_residual", "rows", "rows_total"):
        assert getattr(found, name) == pytest.approx(getattr(whole, name)), name


def test_rows_gathered_one_by_one_lie_in_few_pieces_and_in_order() -> None:
    exact, used, w_o = layer(500)
    drawn, errors = DecodeSampler(0, 0, "all").draw(0, 500), RowErrors()
    for i in range(500):
        one = DrawnRows(*(each[i : i + 1] for each in (drawn.positions, drawn.probability, drawn.uniform)))
        errors = errors.copy()
        errors.add(one, exact[:, :, i : i + 1], used[:, :, i : i + 1], w_o)
        errors.add_totals(1, 1.0)
    assert errors.rows == errors.rows_total == 500 and len(errors._looked) <= 9
    expected = (squares(used - exact, w_o.double()) / squares(exact, w_o.double())).sqrt()
    assert torch.allclose((errors._joined("x") / errors._joined("y")).sqrt(), expected)


def test_a_copy_and_its_original_gather_apart() -> None:
    exact, used, w_o = layer(300)
    drawn = RowSampler(0, 0, 300).draw(0, 300, None)
    errors = looked(drawn, exact, used, w_o)
    before, other = errors.figures(0), errors.copy()
    other.add(drawn, exact[:, :, drawn.positions], used[:, :, drawn.positions], w_o)
    other.add_totals(300, None)
    assert errors.figures(0) == before
    assert other.rows == 2 * errors.rows and other.figures(0).of_residual is None


def test_narrow_outputs_and_weights_are_compared_in_single_precision() -> None:
    exact, used, w_o = (each.bfloat16() for each in layer(100))
    drawn = RowSampler(0, 0, 100).draw(0, 100, None)
    x, y = (squares(each, w_o.double()) for each in (used.double() - exact.double(), exact.double()))
    found = looked(drawn, exact, used, w_o).figures(0)
    assert found.estimate == pytest.approx(math.sqrt(x.sum() / y.sum()), rel=1e-5)


def test_no_error_anywhere_is_an_estimate_of_zero_without_an_upper_limit() -> None:
    exact, _, w_o = layer(1000)
    found = looked(RowSampler(0, 0, 1000).draw(0, 1000, None), exact, exact, w_o).figures(0)
    assert (found.estimate, found.approx_upper_95, found.row_bound) == (0.0, None, 0.0)
    assert found.head_shares == (0.0, 0.0, 0.0)


def test_outputs_of_zero_are_no_error_where_they_were_met_and_without_limit_where_not() -> None:
    zeros, one = torch.zeros(100, dtype=torch.float64), torch.zeros(100, dtype=torch.float64)
    one[0] = 1.0
    drawn = RowSampler(0, 0, 100).draw(0, 100, None)
    assert scalar_figures(drawn, zeros, zeros).estimate == 0.0
    assert scalar_figures(drawn, one, zeros).estimate == math.inf


def test_nothing_looked_at_and_shapes_that_do_not_fit_are_refused() -> None:
    exact, used, w_o = layer(100)
    drawn = RowSampler(0, 0, 100).draw(0, 100, None)
    errors = RowErrors()
    with pytest.raises(ValueError, match="no row was looked at"):
        errors.figures(0)
    with pytest.raises(ValueError, match="R = 100 rows drawn"):
        errors.add(drawn, exact[:, :, :99], used[:, :, :99], w_o)
    with pytest.raises(ValueError, match=r"w_o has shape .*: \[E, 12\]"):
        errors.add(drawn, exact, used, w_o[:, :11])


@pytest.mark.parametrize("n", [0, 1, 58, 59, 64, 92, 93, 124, 625, 3000])
def test_the_bound_lets_as_many_rows_lie_above_it_as_the_binomial_distribution_allows(n: int) -> None:
    above = row_error._rows_above(n)

    def chance(a: int) -> float:
        terms = (math.comb(n, k) * 5**k * 95 ** (n - k) for k in range(a + 1))
        return sum(terms) / 100**n

    assert above < 0 or chance(above) <= 0.05
    assert chance(above + 1) > 0.05


def test_the_bound_holds_for_95_percent_of_rows_in_as_many_draws_as_arithmetic_says() -> None:
    """Two settings with 1,000 draws each: P(no row of the worst 5 % + 1 among 64 of N) is hypergeometric."""
    for N, tail in [(600, 3.0), (3000, 1.0)]:
        x = torch.exp(tail * normal(N))
        worst = N - math.ceil(0.95 * N) + 1
        true = float(x.sqrt().sort(descending=True).values[worst - 1])
        missed = 0
        for seed in range(1000):
            drawn = RowSampler(seed, 0, N).draw(0, N, None)
            ratios, uniform = x.sqrt()[drawn.positions], drawn.uniform
            bound = row_error._row_bound(ratios, uniform, False)
            assert bound is not None
            missed += bound < true * (1 - 1e-12)
        expected = math.comb(N - worst, 64) / math.comb(N, 64)
        assert expected < 0.05
        assert abs(missed / 1000 - expected) < 4 * math.sqrt(expected * (1 - expected) / 1000)


def test_decode_has_a_bound_from_59_rows_on() -> None:
    drawn = DecodeSampler(0, 0).draw(500, 2000)
    x, y = torch.exp(normal(2500)), torch.ones(2500, dtype=torch.float64)

    def bound(rows: int) -> float | None:
        some = DrawnRows(drawn.positions[:rows], drawn.probability[:rows], drawn.uniform[:rows])
        return scalar_figures(some, x, y).row_bound

    assert bound(58) is None
    assert bound(59) == pytest.approx(float(x[drawn.positions[:59]].max().sqrt()))
    assert bound(93) == pytest.approx(float(x[drawn.positions[:93]].sort().values[-2].sqrt()))


def test_a_prompt_that_was_read_in_part_has_no_bound_before_59_even_rows() -> None:
    drawn = RowSampler(0, 0, 4000).draw(0, 2000, None)
    assert drawn.uniform.sum() < 59
    x = y = torch.ones(4000, dtype=torch.float64)
    assert scalar_figures(drawn, x, y).row_bound is None


def test_the_upper_limit_is_the_same_for_the_same_rows_and_seed_and_scales_with_the_error() -> None:
    x, y = np.exp(normal(200).numpy()), np.exp(normal(200, seed=1).numpy())
    pi = np.full(200, 0.1)
    limit = row_bootstrap.upper_limit(x, y, pi, 7)
    assert limit is not None and limit > math.sqrt(x.sum() / y.sum())
    assert row_bootstrap.upper_limit(x, y, pi, 7) == limit != row_bootstrap.upper_limit(x, y, pi, 8)
    assert row_bootstrap.upper_limit(9 * x, y, pi, 7) == pytest.approx(3 * limit)
    assert row_bootstrap.upper_limit(x, 4 * y, pi, 7) == pytest.approx(limit / 2)


def test_rows_that_were_certain_narrow_the_limit() -> None:
    x, y = np.exp(normal(200).numpy()), np.ones(200)
    limits = [row_bootstrap.upper_limit(x, y, np.full(200, pi), 0) for pi in (0.01, 0.5, 0.9, 0.999)]
    assert limits == sorted(limits, reverse=True)
    assert limits[-1] == pytest.approx(math.sqrt(x.mean()), rel=0.02)
    assert row_bootstrap.upper_limit(x, y, np.ones(200), 0) is None


def test_replicates_vary_as_much_as_the_samples_they_stand_for() -> None:
    """Of 600 samples, the variance of R against the mean of the estimated ones."""
    N = 2000
    x, y = np.exp(0.5 * normal(N).numpy()), np.exp(0.5 * normal(N, seed=1).numpy())
    pi = 0.05 + 0.3 * np.random.default_rng(0).random(N)
    found, told = [], []
    for seed in range(600):
        rows = np.random.default_rng(seed).random(N) < pi
        w = 1 / pi[rows]
        X, Y = w @ x[rows], w @ y[rows]
        found.append(X / Y)
        terms = row_bootstrap._terms(x[rows], y[rows], pi[rows])
        told.append(float(row_bootstrap._variance(terms[:, 2:].sum(0), X / Y)) / Y**2)
    assert np.mean(told) == pytest.approx(np.var(found), rel=0.2)


@pytest.mark.parametrize(("spread", "least"), [(0.3, 0.9), (1.0, 0.82)])
def test_the_upper_limit_holds_about_as_often_as_it_says_where_tails_are_not_heavy(
    spread: float, least: float
) -> None:
    N = 3000
    y = torch.exp(0.5 * normal(N))
    x = 0.01 * y * torch.exp(spread * normal(N, seed=1))
    truth = math.sqrt(x.sum() / y.sum())
    held = 0
    for seed in range(150):
        limit = scalar_figures(RowSampler(seed, 0, N).draw(0, N, None), x, y, seed).approx_upper_95
        held += limit is not None and limit >= truth
    assert least <= held / 150


def test_poisson_draws_have_mean_and_variance_one() -> None:
    table = row_bootstrap._POISSON
    assert table.mean() == pytest.approx(1, abs=3e-4) and table.var() == pytest.approx(1, abs=1e-3)
    draws = row_bootstrap._poisson(np.random.PCG64(0), 100_001)
    assert len(draws) == 100_001 and draws.mean() == pytest.approx(1, abs=0.02)
