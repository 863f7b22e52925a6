"""When a guard says that a layer must be repaired: held against the plain sums over all rows looked at."""

from __future__ import annotations

import math
import random

import pytest
import torch

from models.auto import LayerChoice
from models.guard import SHARE, LayerGuard, Looked, SequenceGuard
from models.places import Place
from models.planned import STRATUM, planned


def guard(total: int, seed: int = 0) -> SequenceGuard:
    choice = planned(
        [LayerChoice(3, "sinks"), LayerChoice(8, "exact"), LayerChoice(9, "window")], seed=seed, max_error=0.1
    )
    place = Place(torch.nn.Linear(4, 4), None)
    return SequenceGuard(choice, total, {3: 0, 8: 1, 9: 2}, {3: place, 9: place})


@pytest.mark.parametrize("total", [1, 15, 16, 17, 127, 128, 2048, 2049, 5000, 8192, 30_001])
def test_one_row_of_every_block_is_looked_at_whatever_the_chunks(total: int) -> None:
    for seed in range(5):
        one = guard(total, seed)
        rows = one.rows(3, 0, total).tolist()
        assert [row // one.block for row in rows] == list(range(-(-total // one.block)))
        assert rows[-1] < total and sum(one._weight(row) for row in rows) == total
        cut = sorted({0, total, *random.Random(seed).sample(range(total + 1), min(3, total))})
        parts = [one.rows(3, a, b).tolist() for a, b in zip(cut, cut[1:], strict=False)]
        assert [row for part in parts for row in part] == rows
        if total > 2048:
            assert rows != one.rows(9, 0, total).tolist() and len(rows) >= 128


def brute(one: SequenceGuard, rows: list[Looked]) -> int | None:
    """The stratum of the first row at which the sums exceed what the whole prompt may spend."""
    for i in range(1, len(rows) + 1):
        weights = [one._weight(row.position) for row in rows[:i]]
        spent = sum(w * row.spent for w, row in zip(weights, rows, strict=False))
        energy = sum(w * row.energy for w, row in zip(weights, rows, strict=False))
        if spent > (SHARE * 0.1) ** 2 * one.total * energy / sum(weights):
            return rows[i - 1].position // STRATUM * STRATUM
    return None


@pytest.mark.parametrize("seed", range(40))
def test_a_layer_is_repaired_from_the_stratum_in_which_its_budget_is_spent(seed: int) -> None:
    draw = random.Random(seed)
    one = guard(draw.randint(1, 9000), seed)
    scale = draw.choice([0.02, 0.1, 0.2, 0.5])
    rows = [
        Looked(position, (scale * draw.lognormvariate(0, 1)) ** 2, draw.lognormvariate(0, 0.5))
        for position in one.rows(3, 0, one.total).tolist()
    ]
    whole = one.judge(LayerGuard(), rows, 0)
    assert whole.exact_from == brute(one, rows)
    at, cut = LayerGuard(), draw.choice([STRATUM, 3 * STRATUM])
    for start in range(0, one.total, cut):
        part = [row for row in rows if start <= row.position < start + cut]
        if at.exact_from is not None:
            part = [Looked(row.position, 0.0, row.energy) for row in part]
        at = one.judge(at, part, start)
    assert at.exact_from == whole.exact_from and at.rows == whole.rows
    assert at.estimate == pytest.approx(whole.estimate)
    if whole.exact_from is not None:
        spent = sum(one._weight(r.position) * r.spent for r in rows if r.position < whole.exact_from)
        assert whole.spent == pytest.approx(spent)


def test_no_row_before_the_call_is_repaired() -> None:
    one = guard(4096)
    rows = [Looked(position, 1.0, 1.0) for position in (1300, 1330)]
    assert one.judge(LayerGuard(), rows, 1290).exact_from == 1290
    assert one.judge(LayerGuard(), rows, 0).exact_from == 1280


def test_a_stratum_is_as_tall_as_the_layers_query_tile() -> None:
    tall = LayerChoice(9, "vertical_slash", {"query_tile": 512})
    choice = planned([LayerChoice(3, "sinks"), LayerChoice(8, "exact"), tall], max_error=0.1)
    one = SequenceGuard(choice, 4096, {3: 0, 8: 1, 9: 2}, {})
    assert [one.stratum(layer) for layer in (3, 8, 9)] == [STRATUM, STRATUM, 512]
    assert choice.params.chunk_multiple() == 512
    rows = [Looked(1300, 2.0, 1.0)]
    assert one.judge(LayerGuard(), rows, 0, 512).exact_from == 1024


def test_every_row_of_a_block_is_looked_at_as_often_as_the_others() -> None:
    """So that what a row stands for, the size of its block, makes the sums unbiased."""
    total, seeds = 16 * 3 + 5, 4000
    counts = torch.zeros(total)
    for seed in range(seeds):
        counts[guard(total, seed).rows(3, 0, total)] += 1
    for block, size in ((slice(0, 16), 16), (slice(32, 48), 16), (slice(48, 53), 5)):
        expected = seeds / size
        assert float(((counts[block] - expected) ** 2 / expected).sum()) < 3 * size + 10


@pytest.mark.parametrize("spent, energy", [(math.nan, 1.0), (math.inf, 1.0), (math.nan, math.nan)])
def test_an_error_that_is_no_number_is_repaired(spent: float, energy: float) -> None:
    one = guard(1000)
    assert one.judge(LayerGuard(), [Looked(0, 0.0, 1.0), Looked(300, spent, energy)], 0).exact_from == 256


def test_outputs_of_zero_are_no_error_unless_something_else_was_given() -> None:
    one = guard(100)
    nothing = one.judge(LayerGuard(), [Looked(0, 0.0, 0.0)], 0)
    assert nothing.exact_from is None and nothing.estimate == 0.0
    assert LayerGuard(spent=1.0).estimate == math.inf
    assert one.judge(LayerGuard(), [Looked(0, 1.0, 0.0)], 0).exact_from == 0


def test_layers_that_are_exact_by_plan_have_nothing_to_keep() -> None:
    kept = guard(500).kept
    assert [(each.layer, each.estimate, each.rows, each.exact_from) for each in kept] == [
        (3, 0.0, 0, None),
        (8, 0.0, 0, None),
        (9, 0.0, 0, None),
    ]
