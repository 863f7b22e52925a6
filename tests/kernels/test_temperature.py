from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import kernels.temperature
from kernels.api import parse_params
from kernels.contract import Call
from kernels.math.features import FeatureParams, feature_map
from kernels.temperature import figure, main
from kernels.temperature_methods import (
    CLUSTER_SIZE,
    HEAD_DIM,
    LOW_RANK,
    NUM_CLUSTERS,
    NUM_TOKENS,
    ORACLE_SCATTERBRAIN,
    ORACLE_TOP,
    REALISABLE,
    SCATTERBRAIN,
    SPARSE,
    Point,
    Sample,
    _answer,
    draw_sample,
    settings,
)
from kernels.temperature_told import EARLIER_BAND, comparison, markdown, runs, series


def scores_of(sample: Sample, beta: float) -> torch.Tensor:
    return beta * (sample.q[0, 0] @ sample.k[0, 0].T)


def answer(sample: Sample, budget: int, beta: float, method: str) -> Any:
    return _answer(Point(budget, 0.05, beta), sample, *settings(budget)[method])


@pytest.mark.parametrize("spread", [0.05, 0.3])
def test_samples_are_clusters_of_unit_vectors_in_two_orders(spread: float) -> None:
    one = draw_sample(spread, 3)
    assert one.q.shape == one.k.shape == (1, 1, NUM_TOKENS, HEAD_DIM) and one.q.dtype == torch.float64
    for x in (one.q, one.k):
        torch.testing.assert_close(x.norm(dim=-1), torch.ones(1, 1, NUM_TOKENS, dtype=torch.float64))
    again, other = draw_sample(spread, 3), draw_sample(spread, 4)
    assert torch.equal(one.q, again.q) and torch.equal(one.k, again.k) and not torch.equal(one.q, other.q)
    cosines = one.q[0, 0] @ one.k[0, 0].T
    near = cosines.topk(NUM_TOKENS // NUM_CLUSTERS, -1)
    assert abs(float(near.values.mean()) - 1 / (1 + spread**2)) < 0.02  # two noisy vectors of one centre
    assert float((near.indices[:-1] - near.indices[1:]).abs().float().mean()) > NUM_TOKENS / 8


@pytest.mark.parametrize("budget", [32, 64, 128, 256])
def test_every_method_gets_the_same_memory(budget: int) -> None:
    known = settings(budget)
    for backend, params in known.values():
        parse_params(backend, params)
    sparse, low_rank, both = (known[name][1] for name in (SPARSE, LOW_RANK, SCATTERBRAIN))
    found = both["support_params"]
    assert sparse["num_hash_rounds"] * sparse["cluster_size"] == budget
    assert 2 * low_rank["num_features"] == budget
    assert found["num_hash_rounds"] * found["cluster_size"] + 2 * both["num_features"] == budget


def test_the_backends_answers_are_weights_and_only_the_sparse_one_leaves_keys_out() -> None:
    sample = draw_sample(0.05, 0)
    for name in REALISABLE:
        got = answer(sample, 64, 3.0, name)
        weights = got.out[0, 0]
        torch.testing.assert_close(weights.sum(-1), torch.ones(NUM_TOKENS, dtype=torch.float64))
        num_kept = int((weights > 0).sum())
        assert num_kept == (got.stats.pairs_kept if name == SPARSE else NUM_TOKENS**2)
    kept = answer(sample, 64, 3.0, SPARSE).stats.pairs_kept / NUM_TOKENS
    assert 32 < kept <= 64 + 3, "two rounds of 32 keys, some found twice, and a window of three"


def test_scatterbrain_s_weights_are_exact_where_its_hashes_look_and_features_elsewhere() -> None:
    sample, budget, beta = draw_sample(0.05, 1), 128, 3.0
    both = settings(budget)[SCATTERBRAIN][1]
    support = _answer(Point(budget, 0.05, beta), sample, "lsh", both["support_params"])
    params = FeatureParams(num_features=both["num_features"], centre_keys=0)
    call = Call(causal=False, scale=beta, seed=1, layer=0, start=0)
    fmap = feature_map(params, call, 1, HEAD_DIM, torch.float64, sample.q.device)
    exponents = fmap.log_queries(sample.q.unsqueeze(1))[0, 0, 0, :, None] + fmap.log_keys(sample.k)[0, 0]
    estimate = torch.logsumexp(exponents, -1).exp()
    weights = torch.where(support.out[0, 0] > 0, scores_of(sample, beta).exp(), estimate)
    got = answer(sample, budget, beta, SCATTERBRAIN)
    torch.testing.assert_close(got.out[0, 0], weights / weights.sum(-1, keepdim=True), atol=1e-9, rtol=1e-6)
    assert got.stats.pairs_kept == support.stats.pairs_kept


@pytest.fixture(scope="module")
def points() -> list[Point]:
    return figure([0.5, 2.0, 4.0, 12.0], [128], [0.05], 2)


def test_recalls_are_the_mass_that_the_hashes_found(points: list[Point]) -> None:
    point = points[2]
    for draw in range(2):
        sample = draw_sample(0.05, draw)
        exact = torch.softmax(scores_of(sample, point.beta), -1)
        found = answer(sample, 128, point.beta, SPARSE).out[0, 0] > 0
        mass = float((exact * found).sum(-1).mean())
        assert point.sparse_recalls[draw] == pytest.approx(mass, abs=1e-5)
    for point in points:
        assert 0 < point.support_recall < point.sparse_recall < 1
        # dropping a share of the mass and scaling the rest up costs it twice
        assert point.error(SPARSE) == pytest.approx(2 * (1 - point.sparse_recall), abs=1e-4)


def test_low_rank_worsens_and_sparse_improves_with_beta_and_scatterbrain_leads_between(
    points: list[Point],
) -> None:
    for before, after in zip(points, points[1:], strict=False):
        assert before.error(LOW_RANK) < after.error(LOW_RANK)
        assert before.error(SPARSE) > after.error(SPARSE)
        assert before.entropy > after.entropy
    assert [point.best for point in points] == [LOW_RANK, LOW_RANK, SCATTERBRAIN, SPARSE]
    for point in points:
        assert point.error(ORACLE_TOP) < point.error(SPARSE)
        assert point.error(ORACLE_SCATTERBRAIN) < point.error(SCATTERBRAIN)


EARLIER = {
    0.5: (0.999, 1.59, 0.039, 0.092, 0.087, 1.43),
    2.0: (0.965, 1.38, 0.311, 0.347, 0.307, 1.10),
    4.0: (0.778, 0.729, 0.818, 0.509, 0.373, 0.479),
    12.0: (0.447, 0.026, 1.30, 0.125, 0.003, 0.0),
}
"""Budget 128, spread 0.05: entropy, sparse, low-rank, scatterbrain, its oracle, oracle top-k in a simulation
in numpy that shares nothing with the package."""


def test_the_numbers_are_those_of_a_simulation_that_shares_no_code(points: list[Point]) -> None:
    for point in points:
        entropy, *errors = EARLIER[point.beta]
        assert point.entropy == pytest.approx(entropy, abs=0.01)
        names = (SPARSE, LOW_RANK, SCATTERBRAIN, ORACLE_SCATTERBRAIN, ORACLE_TOP)
        for name, expected in zip(names, errors, strict=True):
            assert point.error(name) == pytest.approx(expected, rel=0.2, abs=0.02), (point.beta, name)


def made(beta: float, entropy: float, sparse: float, low_rank: float, both: float, **changed: Any) -> Point:
    """A point whose two draws differ by ``apart`` around the given errors, scatterbrain's the other way."""
    apart = changed.pop("apart", 0.0)
    errors = {
        SPARSE: [sparse - apart, sparse + apart],
        LOW_RANK: [low_rank - apart, low_rank + apart],
        SCATTERBRAIN: [both + apart, both - apart],
        ORACLE_SCATTERBRAIN: [0.1, 0.1],
        ORACLE_TOP: [0.1, 0.1],
    }
    keys = {SPARSE: 60.0, LOW_RANK: 0.0, SCATTERBRAIN: 30.0}
    where = {"budget": 64, "spread": 0.05, **changed}
    return Point(**where, beta=beta, entropies=[entropy], support_recalls=[0.3], sparse_recalls=[0.5],
                 errors=errors, keys_per_row=keys)  # fmt: skip


THREE = [made(1, 1.0, 3, 1, 2), made(2, 0.8, 3, 2, 1), made(3, 0.6, 2, 4, 1), made(4, 0.4, 1, 4, 3)]


def test_bands_reach_to_where_the_errors_of_neighbouring_winners_meet() -> None:
    low_rank, both, sparse = runs(THREE)
    assert [run.method for run in (low_rank, both, sparse)] == [LOW_RANK, SCATTERBRAIN, SPARSE]
    assert both.betas == (2, 3)
    # ahead by 1 at entropy 1.0, behind by 1 at 0.8; then ahead by 1 at 0.6, behind by 2 at 0.4
    assert both.entropy_high == low_rank.entropy_low == pytest.approx(0.9)
    assert both.entropy_low == sparse.entropy_high == pytest.approx(0.6 - 0.2 / 3)
    assert low_rank.open_high and not low_rank.open_low and sparse.open_low and not both.open_high
    assert low_rank.entropy_high == 1.0 and sparse.entropy_low == 0.4


def test_a_lead_within_the_draws_noise_is_marked() -> None:
    assert made(1, 0.9, 3, 2, 1, apart=0.1).told_apart
    assert not made(1, 0.9, 3, 1.2, 1, apart=0.3).told_apart
    told = markdown([made(1, 0.9, 3, 1.2, 1, apart=0.3)], "command", 2)
    assert "**1.000** ~" in told and "**1.000** ~" not in markdown([made(1, 0.9, 3, 2, 1)], "command", 2)


def test_the_last_sentence_is_read_off_the_numbers() -> None:
    told = markdown(THREE, "command", 2).splitlines()[-1]
    assert (
        "low-rank at entropies above 0.90 ln n, scatterbrain between 0.53 and 0.90 ln n, sparse below 0.53"
        in told
    )
    assert told.endswith("between 0.78 and 0.90, which a band found here contains.") and EARLIER_BAND == (
        0.78,
        0.9,
    )
    assert "0.53 to 0.90 (spread 0.05, budget 64, beta 2, 3)" in told
    never = [made(1, 1.0, 3, 1, 2), made(2, 0.5, 1, 3, 2)]
    assert "scatterbrain nowhere" in markdown(never, "command", 2)
    assert comparison(never).startswith("Scatterbrain is nowhere the best of the three")
    below = [made(1, 0.7, 3, 1, 2), made(2, 0.5, 3, 2, 1)]
    assert comparison(below).endswith("which this run does not confirm.")
    part = [made(1, 0.9, 3, 1, 2), made(2, 0.8, 3, 2, 1), made(3, 0.6, 3, 4, 1)]
    assert comparison(part).endswith("which overlaps in part.")
    alone = [made(1, 0.9, 3, 2, 1), made(2, 0.8, 3, 2, 1)]
    assert "scatterbrain everywhere; sparse and low-rank nowhere" in markdown(alone, "command", 2)
    elsewhere = [made(1, 0.9, 3, 2, 1, spread=0.3)]
    assert comparison(elsewhere).endswith("between 0.78 and 0.90.")


def test_points_are_told_by_spread_and_budget() -> None:
    mixed = [made(2, 0.8, 3, 2, 1, budget=budget) for budget in (64, 128)] + [made(1, 1.0, 3, 1, 2)]
    assert [[p.beta for p in some] for some in series(mixed)] == [[1, 2], [2]]
    assert markdown(mixed, "command", 2).count("| beta |") == 2


def test_a_run_writes_its_numbers_its_table_and_its_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    files = {name: tmp_path / f"x.{name}" for name in ("json", "markdown", "plot")}
    options = ["--betas", "12", "0.5", "--budgets", "32", "--spreads", "0.05", "--draws", "1"]
    assert main([*options, *(part for name, file in files.items() for part in (f"--{name}", str(file)))]) == 0
    told = json.loads(files["json"].read_text())
    assert [point["beta"] for point in told["points"]] == [0.5, 12.0]
    for point in told["points"]:
        assert point["best"] in REALISABLE and len(point["errors"][SPARSE]) == 1
        assert all(0 <= error[0] <= 2 for error in point["errors"].values())
    assert told["bands"][0]["runs"][0]["method"] == told["points"][0]["best"]
    assert files["markdown"].read_text() in capsys.readouterr().out
    assert files["plot"].read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--betas", "0"], "above 0"),
        (["--betas", "nan"], "above 0"),
        (["--budgets", "48"], f"multiple of {CLUSTER_SIZE}"),
        (["--budgets", "288"], "up to 256"),
        (["--draws", "0"], "at least 1"),
        (["--json", "no/such/folder/x"], "there is no directory"),
    ],
)
def test_a_wrong_option_is_named(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(argv)
    assert words in capsys.readouterr().err


def test_a_plot_without_matplotlib_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels.temperature, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["--plot", "x.png"])
    assert "needs matplotlib" in capsys.readouterr().err


def test_betas_may_be_huge_without_a_number_that_is_not_finite() -> None:
    (point,) = figure([100.0], [64], [0.3], 1)
    assert all(math.isfinite(error[0]) and error[0] <= 2 + 1e-6 for error in point.errors.values())
