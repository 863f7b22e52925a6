"""The study of measured errors: what it takes for the truth, what it counts, and the page it writes."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.math.row_error import DrawnRows, RowSampler
from models import verify_study
from models.quality_contenders import contender
from models.quality_error import measure_errors
from models.quality_record import LayerRecord, record_layers
from models.runner import Model
from models.verify_study_decode import measure_decode
from models.verify_study_faults import broken_rows, hit_probability, measure_faults
from models.verify_study_figures import setting_row
from models.verify_study_replay import Draws, draw, judge, replay
from models.verify_study_rows import RowLosses, row_losses, triangles
from tests.models.test_quality_encoder import Words, prose
from tests.models.tiny import llama, network, nomic, random_ids, serve

TOKENS = 200


def losses_of(ratios: Tensor, seed: int = 0) -> RowLosses:
    """Rows with outputs of about length 1 and these relative errors, in random directions; u in keeping."""
    generator = torch.Generator().manual_seed(seed)
    exact = torch.randn(len(ratios), 8, generator=generator, dtype=torch.float64)
    wrong = torch.randn(len(ratios), 8, generator=generator, dtype=torch.float64)
    wrong *= (ratios * exact.norm(dim=-1) / wrong.norm(dim=-1))[:, None]
    x, y, u = (each.square().sum(-1) for each in (wrong, exact, exact + wrong))
    return RowLosses(0, x, y, u, torch.zeros_like(x), None)


def even(total: int = 1000, ratio: float = 0.1, seed: int = 0) -> RowLosses:
    """Errors that differ by a factor of two."""
    generator = torch.Generator().manual_seed(seed)
    return losses_of(ratio * (1 + torch.rand(total, generator=generator, dtype=torch.float64)), seed)


def drawn_of(losses: RowLosses, seeds: int) -> list[DrawnRows]:
    return [draw(losses, None, seed) for seed in range(seeds)]


@pytest.fixture(scope="module")
def model() -> Model:
    return serve(network(llama), max_tokens=256)


@pytest.fixture(scope="module")
def records(model: Model) -> list[LayerRecord]:
    return record_layers(model._network, random_ids(TOKENS), (0, 2), 64)


def test_the_errors_of_the_rows_add_up_to_that_of_the_layer(records: list[LayerRecord]) -> None:
    its = [contender("window", {"window": 9}), contender("performer", {"num_features": 32})]
    wanted = measure_errors(records, its, chunk_tokens=64)
    for number, record in enumerate(records):
        found = row_losses(record, its, 64, seed=0)
        assert [each.layer for each in found] == [record.plan.ordinal] * 2
        for each, row in zip(found, wanted, strict=True):
            assert each.total == TOKENS
            assert each.error == pytest.approx(row.layer_errors[number], rel=1e-4)
            assert bool(((each.u - each.y - each.x).abs() <= 2.001 * (each.x * each.y).sqrt() + 1e-6).all())


def test_rows_bring_the_backends_own_estimate_of_what_it_dropped(records: list[LayerRecord]) -> None:
    window, topk = row_losses(
        records[0],
        [
            contender("window", {"window": 9}),
            contender("topk", {"budget": 32, "block_size": 32, "query_tile": 128}),
        ],
        128,
        seed=0,
    )
    assert window.dropped is None
    assert topk.dropped is not None and topk.dropped.shape == (TOKENS,)
    assert float(topk.dropped[0]) < 1e-5 < 1e-3 < float(topk.dropped[128:].mean())


@pytest.mark.parametrize("ratio", [0.0, 1e-3, 0.3, 1.0, 7.0])
def test_three_numbers_stand_for_a_row(ratio: float) -> None:
    losses = losses_of(torch.full((50,), ratio, dtype=torch.float64))
    losses = losses.with_fault(torch.arange(50) % 3 == 0)
    positions = torch.tensor([0, 3, 17, 49])
    exact, used = (each[0, 0].double() for each in triangles(losses, positions))
    for got, wanted in ((used - exact, losses.x), (exact, losses.y), (used, losses.u)):
        found = got.square().sum(-1)
        assert torch.allclose(found, wanted[positions], rtol=2e-3, atol=1e-9)


def test_a_row_without_an_output_keeps_its_error() -> None:
    one, nothing = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    exact, used = triangles(RowLosses(0, one, nothing, one, nothing, None), torch.tensor([0]))
    assert float(exact.abs().max()) == 0 and float((used - exact).norm()) == 1


def test_looking_at_every_row_tells_the_truth() -> None:
    losses = even(500).with_fault(torch.arange(500) < 20)
    rows = RowSampler(0, 0, 500, "all").draw(0, 500, None)
    told = judge(losses, rows, seed=0)
    assert told.rows == told.rows_total == 500
    assert told.estimate == pytest.approx(losses.error, rel=1e-5)
    assert told.approx_upper_95 == pytest.approx(losses.error, rel=1e-5)


def test_a_draw_does_not_depend_on_the_chunks_of_the_prompt() -> None:
    dropped = torch.rand(1000, generator=torch.Generator().manual_seed(1))
    losses = even(1000)
    losses = RowLosses(3, losses.x, losses.y, losses.u, losses.fault, dropped)
    whole = draw(losses, None, seed=5)
    sampler = RowSampler(5, 3, 1000, None)
    parts = [sampler.draw(at, min(300, 1000 - at), dropped[at : at + 300]) for at in range(0, 1000, 300)]
    assert torch.equal(whole.positions, torch.cat([part.positions for part in parts]))
    assert torch.equal(whole.probability, torch.cat([part.probability for part in parts]))


def test_the_served_estimate_is_the_one_whose_denominator_is_sampled() -> None:
    losses = even()
    draws = replay(losses, drawn_of(losses, 20))
    assert torch.allclose(draws.estimate, draws.by_denominator["sampled"], rtol=1e-3)
    assert not torch.allclose(draws.estimate, draws.by_denominator["used"], rtol=1e-3)


def test_errors_that_differ_little_are_told_without_bias_and_covered() -> None:
    losses = even(2000)
    draws = replay(losses, drawn_of(losses, 200))
    assert abs(draws.bias) < 0.02 and 0 < draws.spread < 0.1
    assert draws.upper_covers >= 0.88 and draws.bound_covers >= 0.9
    assert float((draws.upper / draws.truth).median()) < 1.2


def test_an_error_in_few_rows_escapes_the_upper_value_and_the_study_says_so() -> None:
    ratios = torch.full((4000,), 0.01, dtype=torch.float64)
    ratios[100:4000:1000] = 3.0
    losses = losses_of(ratios)
    draws = replay(losses, drawn_of(losses, 100))
    assert draws.upper_covers < 0.5
    assert draws.bound_covers == 1


def test_coverage_of_the_bound_counts_rows_not_above_it() -> None:
    losses = losses_of(torch.arange(1, 101, dtype=torch.float64) / 100)
    nothing = torch.zeros(4, dtype=torch.float64)
    bounds = torch.tensor([0.94, 0.95, 1.0, math.nan], dtype=torch.float64)
    assert Draws(losses, nothing, nothing, bounds, nothing, {}).bound_covers == pytest.approx(2 / 3)


def test_figures_that_were_not_given_cover_nothing() -> None:
    losses, none = even(100), torch.full((3,), math.nan, dtype=torch.float64)
    draws = Draws(losses, none, none, none, none, {})
    assert draws.upper_covers == 0 and math.isnan(draws.bound_covers)


def test_the_answers_figures_are_the_largest_over_the_layers() -> None:
    small, large = even(ratio=0.1), even(ratio=0.2, seed=1)
    ones = torch.ones(2, dtype=torch.float64)
    upper = {0.1: torch.tensor([1.0, 0.0]), 0.2: torch.tensor([0.0, 0.0])}
    layers = [
        Draws(each, ones * each.error, upper[name].double(), ones, ones, {})
        for name, each in ((0.1, small), (0.2, large))
    ]
    row = setting_row("tiny", contender("window", {}), layers)
    assert row.answer_covers == 0.5 and row.answer_bias == pytest.approx(0)
    assert row.upper_covers == 0.25 and row.worst_upper_covers == 0
    assert (row.least_error, row.worst_error) == (small.error, large.error)


@pytest.mark.parametrize(
    ("total", "broken", "drawn"), [(7, 2, 3), (6, 1, 1), (8, 5, 4), (9, 0, 4), (5, 5, 1)]
)
def test_the_probability_of_a_hit_counts_the_draws_that_hit(total: int, broken: int, drawn: int) -> None:
    every = list(combinations(range(total), drawn))
    hits = sum(min(rows) < broken for rows in every)
    assert hit_probability(total, broken, drawn) == pytest.approx(hits / len(every), abs=1e-12)


@pytest.mark.parametrize("shape", ["scattered", "stretch"])
@pytest.mark.parametrize(
    ("total", "part", "count"), [(1000, 0.01, 10), (10, 0.01, 1), (77, 0.2, 15), (9, 0.0, 0)]
)
def test_a_fault_breaks_so_many_rows(shape: str, total: int, part: float, count: int) -> None:
    seen = set()
    for seed in range(30):
        rows = broken_rows(total, part, shape, seed).nonzero().flatten().tolist()
        assert len(rows) == count
        assert shape == "scattered" or not rows or rows[-1] - rows[0] == count - 1
        seen.add(tuple(rows))
    assert len(seen) > 3 or count == 0


def test_a_fault_adds_an_error_as_large_as_the_output() -> None:
    losses = even(300)
    broken = broken_rows(300, 0.1, "scattered", 0)
    faulty = losses.with_fault(broken)
    assert torch.allclose(faulty.ratios[broken] ** 2, losses.ratios[broken] ** 2 + 1)
    assert torch.equal(faulty.x[~broken], losses.x[~broken])
    added = float(losses.y[broken].sum() / losses.y.sum())
    assert faulty.error**2 == pytest.approx(losses.error**2 + added)


def test_faults_are_found_as_often_as_the_formula_says() -> None:
    losses, seeds = even(2000), 60
    drawn = drawn_of(losses, seeds)
    rows = measure_faults("tiny", contender("sinks", {}), [replay(losses, drawn)], [drawn])
    assert [row.broken for row in rows] == [0.0, *2 * [0.01, 0.02, 0.05, 0.1, 0.2]]
    assert rows[0].bound_alarms == rows[0].hit == rows[0].hit_formula == 0 and rows[0].upper_alarms <= 0.06
    for row in rows[1:]:
        around = 4 * math.sqrt(row.hit_formula * (1 - row.hit_formula) / seeds) + 1e-9
        assert abs(row.hit - row.hit_formula) <= around
        assert row.bound_alarms == row.hit
        assert row.upper_alarms >= row.hit
    assert rows[1].hit_formula == pytest.approx(1 - 0.99**64, abs=0.02)


def test_few_decode_steps_give_no_bound_and_many_do() -> None:
    (few, many) = measure_decode("tiny", contender("sinks", {}), [even(3000)], 20, (64, 2048, 4096))
    assert (few.steps, many.steps) == (64, 2048)
    assert few.bound_given == 0 and math.isnan(few.bound_covers)
    assert many.bound_given == many.given == many.upper_given == 1 and many.bound_covers > 0.8
    assert few.looked_at == pytest.approx(4, abs=2) and many.looked_at == pytest.approx(128, abs=8)
    assert abs(many.bias) < 0.05


@pytest.fixture()
def tiny_models(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = serve(network(nomic), max_tokens=256)
    words: Any = Words()
    made = {
        "dec": Model(model._network, model.info, words),
        "enc": Model(encoder._network, encoder.info, words),
    }
    monkeypatch.setattr(verify_study, "load_model", lambda name, *_, **__: made[name])


def test_a_run_writes_its_page_and_its_figures(tiny_models: None, tmp_path: Path) -> None:
    text, page, figures = (tmp_path / name for name in ("text.txt", "page.md", "figures.json"))
    text.write_text(prose(200), encoding="utf-8")
    options = ["--smoke", "--decoder", "dec", "--encoder", "enc", "--text", str(text)]
    threads = torch.get_num_threads()
    assert verify_study.main([*options, "--markdown", str(page), "--json", str(figures)]) == 0
    assert torch.get_num_threads() == threads
    told, found = page.read_text(encoding="utf-8"), json.loads(figures.read_text(encoding="utf-8"))
    assert [(row["model"], row["backend"]) for row in found["rows"]] == [
        (name, backend) for name in ("dec", "enc") for backend in ("sinks", "performer")
    ]
    assert all(row["error"] > 0 and row["draws"] == 8 and row["rows"] > 64 for row in found["rows"])
    assert len(found["faults"]) == 22 and {row["backend"] for row in found["faults"]} == {"sinks"}
    assert [row["steps"] for row in found["decode"]] == [64, 256]
    assert "`python -m models.verify_study --decoder dec --encoder enc --text text.txt --smoke`" in told
    assert str(tmp_path) not in told and "{" not in told
    assert all(line.count("|") > 5 for line in told.splitlines() if line.startswith("|"))


def test_a_decoder_given_as_the_encoder_is_refused(tiny_models: None, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(prose(200), encoding="utf-8")
    options = ["--smoke", "--decoder", "enc", "--encoder", "dec", "--text", str(text)]
    with pytest.raises(SystemExit, match="error: 'enc' is no decoder"):
        verify_study.main(options)
