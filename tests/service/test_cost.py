"""The cost model against machines whose true costs are known."""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import dataclass

import pytest

from models.contract import Flops
from service.affine_fit import AffineFit
from service.cost import GIGA, CostModel, Prior, SliceRun


@dataclass(frozen=True)
class Truth:
    """A machine: ms per GFLOP and ms on top, times ``noise`` and ``speed``."""

    fixed: float = 12.0
    linear: float = 7.0
    attention: tuple[tuple[str, tuple[float, float]], ...] = (("exact", (0.4, 11.0)), ("window", (1.5, 30.0)))
    noise: float = 0.1
    slower: float = 1.0

    def attention_ms(self, backend: str, flops: Flops) -> float:
        overhead, rate = dict(self.attention)[backend]
        return self.slower * (overhead + rate * flops.attention / GIGA)

    def rest_ms(self, flops: list[Flops]) -> float:
        return self.slower * (self.fixed + self.linear * sum(f.linear for f in flops) / GIGA)

    def run(self, slices: list[tuple[str, Flops]], rng: random.Random) -> tuple[list[SliceRun], float]:
        """What a step says of itself: its slices as measured, and its seconds."""
        runs = [
            SliceRun(backend, flops, self.attention_ms(backend, flops) * self._wobble(rng))
            for backend, flops in slices
        ]
        rest = self.rest_ms([flops for _, flops in slices]) * self._wobble(rng)
        return runs, (rest + sum(run.attention_ms for run in runs)) / 1000

    def true_ms(self, slices: list[tuple[str, Flops]]) -> float:
        return self.rest_ms([f for _, f in slices]) + sum(self.attention_ms(b, f) for b, f in slices)

    def _wobble(self, rng: random.Random) -> float:
        return math.exp(rng.gauss(0.0, self.noise))


def flops(tokens: int, start: int = 0) -> Flops:
    """Of a small decoder."""
    return Flops(2e8 * tokens, 3e4 * tokens * (start + tokens / 2))


def decode(rng: random.Random, num: int, backend: str = "exact") -> list[tuple[str, Flops]]:
    return [(backend, flops(1, rng.randint(100, 4000))) for _ in range(num)]


def mixed_step(rng: random.Random) -> list[tuple[str, Flops]]:
    """Some decoding, some chunks."""
    backend = rng.choice(["exact", "window"])
    slices = decode(rng, rng.randint(0, 8), backend)
    if not slices or rng.random() < 0.5:
        slices.append((backend, flops(rng.choice([64, 128, 512]), rng.choice([0, 1024, 8192]))))
    return slices


def teach(costs: CostModel, truth: Truth, rng: random.Random, num_steps: int) -> None:
    for _ in range(num_steps):
        costs.observe("m", *truth.run(mixed_step(rng), rng))


def worst_error(costs: CostModel, truth: Truth) -> float:
    """Over steps of one slice each, from one token to a chunk far into a document."""
    shapes = [flops(1, 200), flops(1, 4000), flops(128), flops(512), flops(512, 4096), flops(512, 8192)]
    errors = []
    for backend, shape in itertools.product(("exact", "window"), shapes):
        predicted = costs.fixed_ms("m") + costs.price("m", backend, shape)
        errors.append(abs(predicted / truth.true_ms([(backend, shape)]) - 1))
    return max(errors)


@pytest.mark.parametrize("seed", range(10))
def test_it_converges_on_the_truth_within_a_tenth(seed: int) -> None:
    rng, costs = random.Random(seed), CostModel()
    teach(costs, Truth(), rng, 150)
    assert worst_error(costs, Truth()) <= 0.1


@pytest.mark.parametrize("start", [0.02, 1.0, 50.0])
def test_wherever_it_starts(start: float) -> None:
    rng = random.Random(1)
    costs = CostModel(Prior(5 * start, 16 * start, start, 32 * start))
    teach(costs, Truth(), rng, 150)
    assert worst_error(costs, Truth()) <= 0.12


@pytest.mark.parametrize("seed", range(5))
def test_a_few_steps_of_warm_up_are_enough_for_a_first_idea(seed: int) -> None:
    """Two lengths and one decoded token, each twice."""
    rng, costs = random.Random(seed), CostModel()
    assert not costs.calibrated("m", "exact") and not costs.calibrated("m")
    for shape in [flops(64), flops(512), flops(1, 512)] * 2:
        costs.observe("m", *Truth(noise=0.05).run([("exact", shape)], rng))
    assert costs.calibrated("m", "exact") and costs.calibrated("m")
    assert not costs.calibrated("m", "window") and not costs.calibrated("other", "exact")
    assert costs.basis("m", "exact") == "measured" and costs.basis("other", "exact") == "assumed"
    assert costs.basis("m", "exact", "window") == "predicted" == costs.basis("m", "window")
    for shape in (flops(1, 500), flops(128), flops(512, 4096)):
        predicted = costs.fixed_ms("m") + costs.price("m", "exact", shape)
        assert predicted == pytest.approx(Truth().true_ms([("exact", shape)]), rel=0.3)


@pytest.mark.parametrize("slower", [0.3, 3.0])
@pytest.mark.parametrize("seed", range(5))
def test_it_follows_a_machine_that_changes_its_speed(seed: int, slower: float) -> None:
    rng, costs = random.Random(seed), CostModel()
    teach(costs, Truth(), rng, 100)
    changed = Truth(slower=slower)
    teach(costs, changed, rng, 120)
    assert worst_error(costs, changed) <= 0.2


@pytest.mark.parametrize("num_before", [6, 30, 200])
@pytest.mark.parametrize("hiccup", [0.01, 10.0, 1000.0])
@pytest.mark.parametrize("seed", range(5))
def test_one_hiccup_moves_no_rate_by_a_fifth(seed: int, hiccup: float, num_before: int) -> None:
    rng, costs = random.Random(seed), CostModel()
    for shape in [flops(64), flops(512), flops(1, 512)] * 2:
        for backend in ("exact", "window"):
            costs.observe("m", *Truth().run([(backend, shape)], rng))
    teach(costs, Truth(), rng, num_before)
    shapes = [(b, f) for b in ("exact", "window") for f in (flops(1, 500), flops(512), flops(512, 4096))]
    before = [costs.fixed_ms("m") + costs.price("m", *shape) for shape in shapes]
    costs.observe("m", *Truth(slower=hiccup).run([("exact", flops(512, 4096))], rng))
    after = [costs.fixed_ms("m") + costs.price("m", *shape) for shape in shapes]
    for old, new in zip(before, after, strict=True):
        assert 1 / 1.2 <= new / old <= 1.2


def test_a_first_step_that_was_slow_is_forgotten() -> None:
    """The first run of anything pays for much that later ones do not."""
    rng, costs = random.Random(0), CostModel()
    costs.observe("m", *Truth(slower=20.0).run([("exact", flops(64))], rng))
    teach(costs, Truth(), rng, 40)
    assert costs.fixed_ms("m") + costs.price("m", "exact", flops(64)) == pytest.approx(
        Truth().true_ms([("exact", flops(64))]), rel=0.2
    )


def test_a_long_stretch_of_decoding_forgets_nothing_about_prompts() -> None:
    rng, costs, truth = random.Random(3), CostModel(), Truth()
    teach(costs, truth, rng, 150)
    for _ in range(5000):
        costs.observe("m", *truth.run(decode(rng, 8), rng))
    assert worst_error(costs, truth) <= 0.15


def test_decoding_alone_moves_the_price_of_a_prompt_that_never_ran_within_bounds() -> None:
    """What one size of work cannot tell stays near what was assumed."""
    rng, costs, truth = random.Random(3), CostModel(), Truth()
    before = costs.price("m", "exact", flops(512, 4096))
    for _ in range(3000):
        costs.observe("m", *truth.run([("exact", flops(1, 100))], rng))
    after = costs.price("m", "exact", flops(512, 4096))
    assert before / 5 <= after <= before * 5
    step = [("exact", flops(1, 100))]
    assert costs.fixed_ms("m") + costs.price("m", *step[0]) == pytest.approx(truth.true_ms(step), rel=0.1)


def test_a_bend_that_a_line_cannot_follow_does_not_make_good_measurements_hiccups() -> None:
    """Small calls are thirty times dearer per FLOP than large ones: all are met within a factor, and the line
    keeps still."""
    fit, rng = AffineFit(1.0, 10.0), random.Random(0)
    works, lines = (0.01, 0.1, 1.0, 10.0), []
    for _ in range(300):
        for work in works:
            fit.observe(1, work, 3.0 * math.sqrt(work) * math.exp(rng.gauss(0, 0.1)))
        lines.append([fit.predict(1, work) for work in works])
    for work, *predicted in zip(works, *lines[100:], strict=True):
        assert all(1 / 2.5 <= one / (3.0 * math.sqrt(work)) <= 2.5 for one in predicted)
        assert max(predicted) / min(predicted) <= 1.35


def test_it_follows_a_machine_that_becomes_a_little_slower() -> None:
    """Nothing that surprises: old measurements fade."""
    rng, costs, changed = random.Random(0), CostModel(), Truth(slower=1.4)
    teach(costs, Truth(), rng, 400)
    teach(costs, changed, rng, 200)
    assert worst_error(costs, changed) <= 0.15


def test_a_backend_that_has_not_run_is_priced_above_exact_and_above_linear_layers() -> None:
    costs, rng, shape = CostModel(), random.Random(0), Flops(0.0, 5 * GIGA)
    exact, unseen = costs.price("m", "exact", shape), costs.price("m", "star", shape)
    assert unseen == pytest.approx(1.5 * exact)
    teach(costs, Truth(), rng, 60)
    assert costs.price("m", "star", shape) == pytest.approx(1.5 * costs.price("m", "exact", shape))
    fast = Truth(attention=(("exact", (0.1, 0.5)), ("window", (0.1, 0.5))))
    other = CostModel()
    teach(other, fast, rng, 60)
    assert other.price("m", "star", shape) > other.price("m", "exact", shape) * 3
    linear = other.price("m", "exact", Flops(5 * GIGA, 0.0)) - other.price("m", "exact", Flops(0.0, 0.0))
    assert other.price("m", "star", shape) >= linear


def test_models_are_priced_apart_and_one_that_leaves_is_forgotten() -> None:
    costs, rng = CostModel(), random.Random(0)
    teach(costs, Truth(), rng, 50)
    fresh = CostModel()
    assert costs.price("other", "exact", flops(512)) == fresh.price("other", "exact", flops(512))
    assert costs.price("m", "exact", flops(512)) != fresh.price("m", "exact", flops(512))
    costs.remove_model("m")
    assert costs.price("m", "exact", flops(512)) == fresh.price("m", "exact", flops(512))
    assert costs.ratio("m") is None and costs.summary() == {}


def test_attention_that_is_not_measured_is_taken_as_predicted() -> None:
    """The step's time still corrects the rest of the price."""
    costs, truth, rng = CostModel(), Truth(noise=0.02), random.Random(0)
    for _ in range(60):
        slices = mixed_step(rng)
        runs, seconds = truth.run(slices, rng)
        costs.observe("m", [SliceRun(run.backend, run.flops) for run in runs], seconds)
    assert not costs.calibrated("m", "exact") and costs.calibrated("m")
    step = [("exact", flops(512))]
    assert costs.fixed_ms("m") + costs.price("m", *step[0]) == pytest.approx(truth.true_ms(step), rel=0.25)


@pytest.mark.parametrize("seed", range(20))
def test_no_price_is_ever_negative_or_without_end_and_more_work_is_never_cheaper(seed: int) -> None:
    """Whatever is observed: zeros, contradictions, numbers of any size, NaN, infinity."""
    rng, costs = random.Random(seed), CostModel()
    odd = [0.0, -1.0, math.nan, math.inf]

    def number() -> float:
        return rng.choice(odd) if rng.random() < 0.05 else 10 ** rng.uniform(-12, 16)

    for _ in range(400):
        runs = [
            SliceRun(rng.choice(["exact", "window"]), Flops(number(), number()), rng.choice([0.0, number()]))
            for _ in range(rng.randint(0, 4))
        ]
        costs.observe("m", runs, number() / 1e6)
        for backend in ("exact", "window", "unseen"):
            prices = [costs.price("m", backend, Flops(x, x)) for x in (0.0, 1e3, 1e9, 1e12)]
            assert all(math.isfinite(price) and price >= 0 for price in prices)
            assert prices == sorted(prices)
        assert math.isfinite(costs.fixed_ms("m")) and costs.fixed_ms("m") >= 0
        ratio = costs.ratio("m")
        assert ratio is None or (math.isfinite(ratio) and ratio >= 0)


def test_the_ratio_is_of_the_prediction_before_the_step_was_learned_from() -> None:
    costs = CostModel()
    run = SliceRun("exact", flops(512), 5.0)
    predicted = costs.step_ms("m", [run])
    assert predicted == pytest.approx(costs.fixed_ms("m") + costs.price("m", "exact", flops(512)))
    costs.observe("m", [run], predicted / 1000 * 4)
    assert costs.ratio("m") == pytest.approx(0.25)


def test_the_same_observations_give_the_same_numbers_and_the_summary_is_json() -> None:
    summaries = []
    for _ in range(2):
        costs = CostModel()
        teach(costs, Truth(), random.Random(7), 40)
        summaries.append(json.dumps(costs.summary(), allow_nan=False))
    assert summaries[0] == summaries[1]
    (found,) = json.loads(summaries[0]).values()
    assert found["steps"] == 40 and found["calibrated"] and set(found["backends"]) == {"exact", "window"}
    assert found["fixed_ms"] == pytest.approx(12, rel=0.2)
    assert found["linear_ms_per_gflop"] == pytest.approx(7, rel=0.1)
