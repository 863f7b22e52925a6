"""Planted faults: how likely a broken row is looked at, by arithmetic and by trial.

K of N rows are broken, none of them among the first or last 16. All of them are missed

    by the even draw of n = 64 with C(N - K, n) / C(N, n),      by the Poisson draw with (1 - r / N)^K.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels.math.row_error import RowErrors, RowSampler

N, R = 4000, 64
SEEDS = 800


def broken_rows(share: float, together: bool) -> Tensor:
    """Bool [N]; ``together``: one run of rows, as a wrong tile would be."""
    num_broken, broken = round(share * N), torch.zeros(N, dtype=torch.bool)
    rows = torch.randperm(N - 32, generator=torch.Generator().manual_seed(0))[:num_broken] + 16
    broken[slice(1000, 1000 + num_broken) if together else rows] = True
    return broken


def missed_by_even_draw(num_broken: int) -> float:
    return math.comb(N - num_broken, 64) / math.comb(N, 64)


@pytest.mark.parametrize("together", [False, True], ids=["scattered", "run"])
@pytest.mark.parametrize("share", [0.01, 0.05, 0.2])
def test_broken_rows_are_found_as_often_as_arithmetic_says(share: float, together: bool) -> None:
    broken = broken_rows(share, together)
    by_even, by_any = 0, 0
    for seed in range(SEEDS):
        drawn = RowSampler(seed, 0, N).draw(0, N, None)
        found = broken[drawn.positions]
        by_even += bool((found & drawn.uniform).any())
        by_any += bool(found.any())
    miss_even = missed_by_even_draw(int(broken.sum()))
    miss_any = miss_even * (1 - R / N) ** int(broken.sum())
    for seen, miss in [(by_even, miss_even), (by_any, miss_any)]:
        assert abs(1 - seen / SEEDS - miss) <= 4 * math.sqrt(miss * (1 - miss) / SEEDS) + 1 / SEEDS


def figures_with(broken: Tensor, seed: int) -> tuple[float, float]:
    """(estimate, row_bound) where good rows err by 0.01 and broken ones by 1."""
    drawn = RowSampler(seed, 0, N).draw(0, N, None)
    exact = torch.tensor([1.0, 0.0]).expand(1, 1, len(drawn), 2)
    used = exact + torch.where(broken[drawn.positions], 1.0, 0.01)[:, None] * torch.tensor([0.0, 1.0])
    errors = RowErrors()
    errors.add(drawn, exact, used, torch.eye(2))
    errors.add_totals(N, None)
    found = errors.figures(seed)
    assert found.row_bound is not None
    return found.estimate, found.row_bound


@pytest.mark.parametrize("share", [0.01, 0.06, 0.2])
def test_a_found_fault_shows_in_the_bound_and_one_above_5_percent_hardly_ever_hides(share: float) -> None:
    broken, seeds = broken_rows(share, together=False), 200
    bounds = [figures_with(broken, seed)[1] for seed in range(seeds)]
    assert {round(bound, 3) for bound in bounds} <= {0.01, 1.0}
    hidden = sum(bound < 0.5 for bound in bounds) / seeds
    miss = missed_by_even_draw(int(broken.sum()))
    assert abs(hidden - miss) <= 4 * math.sqrt(miss * (1 - miss) / seeds) + 1 / seeds
    assert share <= 0.05 or hidden <= 0.05


def test_the_estimate_counts_faults_rightly_on_average() -> None:
    broken = broken_rows(0.05, together=True)
    truth = torch.where(broken, 1.0, 1e-4).mean()
    squares = torch.tensor([figures_with(broken, seed)[0] for seed in range(200)]).square()
    assert abs(squares.mean() - truth) < 4 * squares.std() / 200**0.5


def test_rows_that_say_they_lost_mass_are_found_more_often() -> None:
    broken = broken_rows(0.01, together=False)
    knowing, blind = 0, 0
    for seed in range(200):
        told = RowSampler(seed, 0, N).draw(0, N, torch.where(broken, 0.9, 0.05))
        untold = RowSampler(seed, 0, N).draw(0, N, torch.full((N,), 0.05))
        knowing += int(broken[told.positions].sum())
        blind += int(broken[untold.positions].sum())
    assert knowing > 2 * blind > 0
