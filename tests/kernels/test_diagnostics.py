"""Figures of attention against closed forms, and the published behaviour of attention without skips."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels.api import attend
from kernels.math.diagnostics import (
    entropy,
    kept_mass,
    keys_for_mass,
    keys_in_sight,
    relative_entropy,
    row_logits,
    sample_positions,
    sorted_mass,
)
from kernels.math.diagnostics_budget import budget_errors, budget_maps
from kernels.math.diagnostics_paths import each_path, linear_layer, num_paths, sum_paths
from kernels.math.diagnostics_rank import (
    composite_norm,
    effective_rank,
    logit_singular_values,
    rank_one_residual,
)

SEEDS = range(5)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_uniform_rows_have_the_entropy_of_their_number_of_keys() -> None:
    q, k = torch.zeros(2, 7, 4), normal(7, 4)
    positions = torch.arange(7)
    nats = entropy(row_logits(q, k, positions, 1.0, causal=True).softmax(-1))
    expected = torch.arange(1, 8, dtype=torch.float64).log()
    torch.testing.assert_close(nats, expected.expand(2, 7))
    relative = relative_entropy(nats, keys_in_sight(positions, 7, causal=True))
    assert relative[:, 0].isnan().all()
    torch.testing.assert_close(relative[:, 1:], torch.ones(2, 6, dtype=torch.float64))


def test_a_row_that_sees_one_key_alone_has_no_entropy() -> None:
    rows = torch.eye(5, dtype=torch.float64)
    assert entropy(rows).tolist() == [0.0] * 5


def test_two_level_rows_have_the_entropy_of_the_formula() -> None:
    p = 0.7
    row = torch.tensor([[p, *[(1 - p) / 9] * 9]], dtype=torch.float64)
    expected = -p * math.log(p) - (1 - p) * math.log((1 - p) / 9)
    assert entropy(row).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("share", "keys"), [(0.4, 1), (0.5, 1), (0.51, 2), (0.8, 2), (0.85, 3), (1.0, 4)])
def test_keys_for_a_mass_count_the_heaviest_first(share: float, keys: int) -> None:
    row = torch.tensor([[0.1, 0.5, 0.1, 0.3]], dtype=torch.float64)
    assert keys_for_mass(sorted_mass(row), share).item() == keys


@pytest.mark.parametrize("num", [1, 3, 7, 10, 1000])
def test_all_keys_of_a_uniform_row_are_needed_for_all_of_its_mass(num: int) -> None:
    row = torch.full((1, num), 1 / num, dtype=torch.float64)
    assert keys_for_mass(sorted_mass(row), 1.0).item() == num
    assert keys_for_mass(sorted_mass(row), 0.5).item() == math.ceil(num / 2)


def test_a_share_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match="share is 0"):
        keys_for_mass(torch.ones(1, 1), 0.0)


@pytest.mark.parametrize("total", [1, 5, 63, 500])
def test_sampled_positions_are_distinct_ascending_and_a_function_of_the_seed(total: int) -> None:
    for seed in SEEDS:
        drawn = sample_positions(total, 64, seed)
        assert drawn.tolist() == sorted(set(drawn.tolist())) and len(drawn) == min(64, total)
        assert drawn[0] >= 0 and drawn[-1] < total
        assert torch.equal(drawn, sample_positions(total, 64, seed))


def test_sampled_positions_reach_every_part_of_a_text() -> None:
    counts = torch.zeros(10)
    for seed in range(200):
        counts += torch.histc(sample_positions(1000, 50, seed).float(), 10, 0, 1000)
    assert (counts - 1000).abs().max() < 150  # 5 standard deviations of a sum of 200 draws


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", ["window", "sinks", "strided", "vertical_slash", "topk"])
def test_kept_mass_from_log_sums_is_the_mass_of_the_kept_keys(backend: str, causal: bool) -> None:
    n, d = 200, 16
    q, k = normal(1, 2, n, d, seed=1), normal(1, 2, n, d, seed=2)
    marks = torch.eye(n, dtype=torch.float64).expand(1, 2, n, n)
    small = {"window": {"window": 16}, "sinks": {"window": 16}, "topk": {"budget": 64}}
    told = small.get(backend, {})
    some = attend(q, k, marks, backend=backend, params=told, causal=causal, scale=0.25)
    every = attend(q, k, marks, backend="exact", causal=causal, scale=0.25)
    assert some.lse is not None and every.lse is not None
    logits = [row_logits(q[0, h : h + 1], k[0, h], torch.arange(n), 0.25, causal) for h in range(2)]
    exact_rows = torch.cat(logits).softmax(-1)
    wanted = (exact_rows * (some.out[0] > 0)).sum(-1)
    torch.testing.assert_close(kept_mass(some.lse, every.lse)[0], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 8, 16])
def test_gaussian_factors_of_a_rank_have_that_rank(rank: int) -> None:
    for seed in SEEDS:
        mix = normal(rank, 16, seed=seed)
        q, k = normal(90, rank, seed=seed + 10) @ mix, normal(70, 16, seed=seed + 20)
        values = logit_singular_values(q, k)
        assert int((values > 1e-9 * values[0]).sum()) == rank
        assert 1 <= effective_rank(values) <= rank


def test_singular_values_are_those_of_the_centred_logits() -> None:
    for n, m in ((5, 90), (90, 5), (40, 40), (1, 30)):
        q, k = normal(n, 12, seed=n), normal(m, 12, seed=m) + 3
        logits = q @ k.mT
        expected = torch.linalg.svdvals(logits - logits.mean(-1, keepdim=True))
        found = logit_singular_values(q, k)
        kept = min(len(found), len(expected))
        torch.testing.assert_close(found[:kept], expected[:kept], atol=1e-9, rtol=1e-9)


def test_adding_one_vector_to_every_key_changes_no_rank() -> None:
    q, k = normal(60, 8), normal(60, 8, seed=1)
    moved = logit_singular_values(q, k + 100 * normal(8, seed=2))
    torch.testing.assert_close(moved, logit_singular_values(q, k), rtol=1e-9, atol=1e-9)


def test_effective_rank_counts_the_energy() -> None:
    values = torch.tensor([3.0, 1.0, 1.0, 0.1])  # squares 9, 1, 1, 0.01
    assert effective_rank(values, 0.80) == 1
    assert effective_rank(values, 0.85) == 2
    assert effective_rank(values, 0.99) == 3
    assert effective_rank(values, 0.9999) == 4
    assert effective_rank(torch.zeros(4)) == 0


def test_isotropic_factors_need_nearly_all_of_head_dim() -> None:
    ratio = effective_rank(logit_singular_values(normal(4000, 32), normal(4000, 32, seed=1))) / 32
    assert ratio > 0.95


def test_the_composite_norm_is_the_geometric_mean_of_its_halves() -> None:
    x = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    assert composite_norm(x).item() == pytest.approx(math.sqrt(6 * 7))


def test_equal_tokens_have_no_residual_and_balanced_ones_all_of_it() -> None:
    token = normal(12)
    assert rank_one_residual(token.expand(9, 12)).item() < 1e-15
    balanced = torch.cat([torch.eye(4), -torch.eye(4)]).double()
    assert rank_one_residual(balanced).item() == pytest.approx(1.0)
    assert rank_one_residual(torch.zeros(3, 4)).item() == 0.0


def test_no_vector_tried_leaves_less_than_the_promised_part_of_the_residual() -> None:
    for seed in SEEDS:
        x = normal(30, 6, seed=seed) + normal(6, seed=seed + 100)
        found = rank_one_residual(x)
        assert found <= composite_norm(x - x.mean(0)) / composite_norm(x)
        tried = normal(3000, 6, seed=seed + 200) * 0.5 + x.mean(0)
        smallest = min(composite_norm(x - centre) for centre in tried) / composite_norm(x)
        assert found <= math.sqrt(3) * smallest


def network(
    seed: int, layers: int = 3, heads: int = 2, n: int = 9, width: int = 6, gain: float = 1.0
) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    x = normal(n, width, seed=seed)
    made = []
    for layer in range(layers):
        base = 1000 * seed + 10 * layer
        mixing = (gain * normal(heads, n, n, seed=base)).softmax(-1)
        made.append((mixing, normal(heads, width, width, seed=base + 1), normal(width, seed=base + 2)))
    return x, made


def run(x: Tensor, made: list[tuple[Tensor, Tensor, Tensor]], skip: bool) -> Tensor:
    for mixing, weights, bias in made:
        added = torch.einsum("hnm,me,hef->nf", mixing, x, weights) + bias
        x = x + added if skip else added
    return x


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_paths_sum_to_the_output_exactly(seed: int, skip: bool) -> None:
    x, made = network(seed)
    sums = sum_paths(x, [linear_layer(*layer) for layer in made], skip=skip)
    expected = run(x, made, skip)
    assert (sums.total - expected).abs().max() <= 1e-13 * expected.abs().max()


@pytest.mark.parametrize("skip", [True, False])
def test_sums_by_length_are_sums_of_single_paths(skip: bool) -> None:
    x, made = network(7, layers=3, heads=2)
    layers = [linear_layer(*layer) for layer in made]
    sums = sum_paths(x, layers, skip=skip)
    apart, counts = torch.zeros_like(sums.by_length), [0] * 4
    for path, term in each_path(x, layers, skip=skip):
        length = sum(chosen > 0 for chosen in path)
        apart[length] += term
        counts[length] += 1
    torch.testing.assert_close(apart, sums.by_length, rtol=1e-12, atol=1e-12)
    assert counts == ([num_paths(3, 2, k) for k in range(4)] if skip else [0, 0, 0, 8])


def test_too_many_paths_are_refused_with_the_other_way() -> None:
    x, made = network(1, layers=8, heads=3)
    with pytest.raises(ValueError, match=r"65,536 paths.*sum_paths"):
        next(each_path(x, [linear_layer(*layer) for layer in made]))


def collapse(skip: bool, seed: int, layers: int = 8) -> list[float]:
    """Residuals of a random network whose attention looks at its own input, rows normalised in between."""
    n, width, heads = 64, 64, 4
    x = normal(n, width, seed=seed)
    found = [rank_one_residual(x).item()]
    for layer in range(layers):
        base = 100 * seed + 10 * layer
        inner = torch.nn.functional.layer_norm(x, (width,))
        added = torch.zeros_like(x)
        for head in range(heads):
            queries, keys = (normal(width, 16, seed=base + i + 2 * head) / 8 for i in (0, 1))
            values = normal(width, width, seed=base + 9 + 7 * head) / 16
            attention = (inner @ queries @ (inner @ keys).mT / 4).softmax(-1)
            added += attention @ inner @ values
        x = x + added if skip else added
        found.append(rank_one_residual(x).item())
    return found


def test_attention_alone_collapses_doubly_exponentially_and_skips_prevent_it() -> None:
    """Published (arXiv 2103.03404), and computed for these sizes: below 1e-5 by the fourth layer, the
    logarithm about tripling at each; with skips 0.3 or more at the eighth."""
    runs = [(collapse(False, seed), collapse(True, seed)) for seed in SEEDS]
    alone = [sum(math.log(run[layer]) for run, _ in runs) / len(runs) for layer in range(9)]
    assert alone[4] < math.log(1e-5)
    steep = [value for value in alone if math.log(1e-13) < value < math.log(0.5)]
    assert len(steep) >= 3
    assert all(later / earlier > 2 for earlier, later in zip(steep, steep[1:], strict=False))
    assert all(skipping[8] > 0.3 for _, skipping in runs)


def test_a_flat_head_is_low_rank_and_a_peaked_one_sparse() -> None:
    n, d, budget = 512, 16, 64
    keys = torch.nn.functional.normalize(normal(n, d), dim=-1)
    q = torch.nn.functional.normalize(normal(1, 40, d, seed=3), dim=-1)
    positions = torch.arange(40)

    def errors(beta: float) -> tuple[float, float, float]:
        logits = row_logits(q, keys, positions, beta, causal=False)
        found = budget_errors(q, keys, logits, budget, budget_maps(budget, 1, d, beta, 0, 0))
        return found.sparse.mean().item(), found.low_rank.mean().item(), found.both.mean().item()

    flat, peaked = errors(0.3), errors(60.0)
    assert flat[1] < 0.1 < 0.5 < flat[0]
    assert peaked[0] < 0.1 < 0.5 < peaked[1]
    assert all(0 <= error <= 1 for error in flat + peaked)


def test_a_support_beside_the_features_helps_where_a_head_is_neither() -> None:
    """The intermediate band of the published figure: clusters at a middling temperature."""
    n, d, budget = 512, 32, 128
    centres = torch.nn.functional.normalize(normal(32, d), dim=-1).repeat_interleave(16, 0)
    keys = torch.nn.functional.normalize(centres + 0.05 * normal(n, d, seed=1), dim=-1)
    q, positions = keys[None], torch.arange(n)
    logits = row_logits(q, keys, positions, 4.0, causal=False)
    found = budget_errors(q, keys, logits, budget, budget_maps(budget, 1, d, 4.0, 0, 0))
    assert found.both.mean() < min(found.low_rank.mean(), found.sparse.mean())


def test_the_sparse_error_is_the_mass_left_out() -> None:
    q, k = normal(2, 30, 8), normal(30, 8, seed=1)
    logits = row_logits(q, k, torch.arange(30), 0.5, causal=True)
    found = budget_errors(q, k, logits, 8, budget_maps(8, 1, 8, 0.5, 0, 0))
    expected = 1 - sorted_mass(logits.softmax(-1))[..., 7]
    torch.testing.assert_close(found.sparse, expected.clamp(min=0))


@pytest.mark.parametrize("norm", [1e-3, 1.0, 1e3])
def test_budget_errors_stay_finite_whatever_the_norms(norm: float) -> None:
    q, k = norm * normal(2, 20, 8), norm * normal(50, 8, seed=1)
    logits = row_logits(q, k, torch.arange(30, 50), 1.0, causal=True)
    found = budget_errors(q, k, logits, 16, budget_maps(16, 1, 8, 1.0, 0, 0))
    for error in (found.sparse, found.low_rank, found.both):
        assert error.isfinite().all() and error.min() >= 0 and error.max() <= 1 + 1e-12


@pytest.mark.parametrize("budget", [0, 4, 30])
def test_a_budget_that_buys_no_features_is_refused(budget: int) -> None:
    with pytest.raises(ValueError, match="budget is"):
        budget_maps(budget, 1, 8, 1.0, 0, 0)
