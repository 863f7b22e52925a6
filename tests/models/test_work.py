"""What a step's statistics become in the work of a request."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kernels.contract import Stats
from models.contract import Work
from models.kv_cache import LayerShape
from models.seam import LayerPlan
from models.step import _count
from tests.models.tiny import choice

PLAN = LayerPlan(causal=True, window=None, ordinal=0, num_heads=2, shape=LayerShape(1, 8, 8))
SOME = Stats(pairs_kept=40, pairs_exact=200, pairs_computed=60, selection_ms=1, compute_ms=2, impl="torch")
PER_PAIR = 2 * (8 + 8)


def counted(stats: Stats, num_rows: int = 10, plan: LayerPlan = PLAN) -> Work:
    work = Work()
    _count(work, stats, plan, num_rows)
    return work


def test_other_operations_are_the_choices_own_cost_and_not_exacts() -> None:
    work = counted(replace(SOME, pairs_scored=7, other_flops=1000))
    assert work.flops == PER_PAIR * 60 + 2 * 8 * 7 + 1000
    assert work.flops_exact == PER_PAIR * 200
    own = counted(replace(SOME, other_flops=1000), plan=replace(PLAN, window=9))
    assert own.flops_exact == PER_PAIR * 60 and own.pairs_exact == 0


def test_a_choice_that_keeps_no_pair_has_density_0_and_the_full_cost_of_exact_beside_it() -> None:
    work = counted(replace(SOME, pairs_kept=0, pairs_computed=0, other_flops=500))
    assert (work.pairs_kept, work.pairs_exact) == (0, 200)
    assert work.flops == 500 and work.flops_exact == PER_PAIR * 200


def test_masked_pairs_are_exacts_own_cost_only_where_nothing_else_was_done() -> None:
    exact = counted(replace(SOME, pairs_kept=200, pairs_computed=256))
    assert exact.flops == exact.flops_exact == PER_PAIR * 256
    hashed = counted(replace(SOME, pairs_kept=200, pairs_computed=256, other_flops=64))
    assert hashed.flops == PER_PAIR * 256 + 64 and hashed.flops_exact == PER_PAIR * 200


def test_rows_that_measured_nothing_are_spoken_for_by_the_next_that_did() -> None:
    """A prompt of 10 rows with an estimate, then 20 decode steps of which the 15th has one."""
    total = counted(replace(SOME, dropped_mass=0.1))
    for step in range(20):
        total.then(counted(replace(SOME, dropped_mass=0.4 if step == 14 else None), num_rows=1))
    assert total.dropped_rows == 25 and total.unmeasured_rows == 5
    assert total.dropped_mass == pytest.approx(10 * 0.1 + 15 * 0.4)


def test_without_any_estimate_there_is_none() -> None:
    total = Work()
    for _ in range(5):
        total.then(counted(SOME))
    assert total.dropped_rows == 0 and total.dropped_mass == 0 and total.unmeasured_rows == 50


def test_one_sequence_does_not_speak_for_the_rows_of_another() -> None:
    first, second, both = Work(), Work(), Work()
    first.then(counted(SOME))
    second.then(counted(replace(SOME, dropped_mass=0.5)))
    for work in (first, second):
        both.add(work)
    assert both.dropped_rows == 10 and both.dropped_mass == 5


def test_heads_are_counted_apart_layer_by_layer_over_steps() -> None:
    step, total = Work(), Work()
    _count(step, replace(SOME, kept_per_head=(10, 30)), PLAN, 10)
    _count(step, replace(SOME, kept_per_head=(0, 40)), replace(PLAN, ordinal=1), 10)
    for _ in range(3):
        total.then(step)
    assert total.kept_per_head == {0: [30, 90], 1: [0, 120]} and total.exact_per_head == {0: 300, 1: 300}
    assert step.kept_per_head == {0: [10, 30], 1: [0, 40]}, "a step's own work stays as it was"
    assert counted(SOME).kept_per_head == {}


def test_choices_with_the_same_knobs_are_one_method_whatever_their_seeds() -> None:
    one, other = choice("window", 1, window=4), choice("window", 2, window=4)
    assert one.method == other.method != choice("window", window=5).method
    assert hash(one) == hash(choice("window", 1, window=4)) and one == choice("window", 1, window=4)
    assert one != other
