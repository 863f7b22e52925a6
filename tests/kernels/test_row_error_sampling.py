"""Which rows are drawn, and how likely each is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.math.row_error import DecodeSampler, DrawnRows, RowSampler
from kernels.math.row_sampling import expected_rows


def drawn_in(
    chunks: list[int], seed: int, total: int, dropped: Tensor | None, first: int = 0, rows: int | None = None
) -> DrawnRows:
    sampler, start, parts = RowSampler(seed, 3, total, rows), first, []
    for n in chunks:
        parts.append(sampler.draw(start, n, None if dropped is None else dropped[start : start + n]))
        start += n
    return joined(parts)


def joined(parts: list[DrawnRows]) -> DrawnRows:
    return DrawnRows(
        *(torch.cat([getattr(p, n) for p in parts]) for n in ("positions", "probability", "uniform"))
    )


def assert_same(one: DrawnRows, other: DrawnRows) -> None:
    for name in ("positions", "probability", "uniform"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def cut(total: int, seed: int) -> list[int]:
    g = torch.Generator().manual_seed(seed)
    borders = torch.randint(1, total, (int(torch.randint(0, 12, (1,), generator=g)),), generator=g)
    borders = [0, *sorted(set(borders.tolist())), total]
    return [b - a for a, b in zip(borders, borders[1:], strict=False)]


def mass(total: int, seed: int = 0) -> Tensor:
    """Dropped mass as a window leaves it: none at first, then more and more, with noise."""
    noise = torch.rand(total, generator=torch.Generator().manual_seed(seed))
    return (torch.arange(total) / total - 0.1).clamp(min=0) * noise


@pytest.mark.parametrize("first", [0, 700])
def test_draws_do_not_depend_on_how_a_prompt_is_cut(first: int) -> None:
    for seed in range(25):
        total = 1500 + 37 * seed
        dropped = mass(total, seed) if seed % 3 else None
        whole = drawn_in([total - first], seed, total, dropped, first)
        assert_same(whole, drawn_in(cut(total - first, seed), seed, total, dropped, first))


def test_draws_do_not_depend_on_what_else_is_drawn_in_between() -> None:
    alone = drawn_in([800, 800], 5, 1600, mass(1600))
    mine, other = RowSampler(5, 3, 1600), RowSampler(6, 3, 900)
    parts = [mine.draw(0, 800, mass(1600)[:800])]
    other.draw(0, 900, mass(900, 1))
    assert_same(alone, joined([*parts, mine.draw(800, 800, mass(1600)[800:])]))


def test_a_step_that_failed_is_drawn_again_from_a_copy() -> None:
    sampler, dropped = RowSampler(1, 3, 2000), mass(2000)
    first = sampler.draw(0, 900, dropped[:900])
    before = sampler.copy()
    sampler.draw(900, 600, torch.ones(600))
    assert_same(drawn_in([2000], 1, 2000, dropped), joined([first, before.draw(900, 1100, dropped[900:])]))


def test_another_seed_or_layer_draws_other_rows() -> None:
    draws = [
        RowSampler(seed, layer, 3000).draw(0, 3000, None).positions.tolist()
        for seed, layer in [(0, 0), (1, 0), (0, 1), (-1, 0)]
    ]
    assert len({tuple(each) for each in draws}) == 4


def test_the_even_draw_has_64_different_rows_fixed_before_any_is_computed() -> None:
    for seed in range(20):
        draws = [drawn_in([2500], seed, 2500, d) for d in (None, mass(2500), torch.ones(2500))]
        members = [each.positions[each.uniform].tolist() for each in draws]
        assert members[0] == members[1] == members[2]
        assert len(set(members[0])) == 64


def test_a_cached_prefix_replaces_only_the_even_rows_it_swallowed() -> None:
    whole, rest = drawn_in([3000], 4, 3000, None), drawn_in([1800], 4, 3000, None, first=1200)
    members = {p for p in whole.positions[whole.uniform].tolist() if p >= 1200}
    after = set(rest.positions[rest.uniform].tolist())
    assert members < after and len(after) == 64


def test_the_first_and_last_16_rows_are_always_drawn() -> None:
    for seed in range(10):
        drawn = drawn_in([1000], seed, 1000, mass(1000))
        certain = drawn.positions[drawn.probability == 1.0].tolist()
        assert {*range(16), *range(984, 1000)} <= set(certain)


@pytest.mark.parametrize(("total", "rows"), [(1, None), (128, None), (500, "all"), (500, 500), (300, 9000)])
def test_short_prompts_and_all_rows_are_drawn_whole(total: int, rows: int | str | None) -> None:
    drawn = RowSampler(0, 0, total, rows).draw(0, total, None)  # type: ignore[arg-type]
    assert drawn.positions.tolist() == list(range(total))
    assert (drawn.probability == 1.0).all() and drawn.uniform.all()


def test_a_short_rest_behind_a_cached_prefix_is_drawn_whole() -> None:
    drawn = RowSampler(0, 0, 5000).draw(4900, 100, None)
    assert len(drawn) == 100 and (drawn.probability == 1.0).all()


@pytest.mark.parametrize("with_mass", [False, True])
def test_every_row_is_drawn_as_often_as_its_probability_says(with_mass: bool) -> None:
    total, seeds = 400, 3000
    dropped = mass(total) if with_mass else None
    chance = torch.ones(total, dtype=torch.float64)
    counts = torch.zeros(total, dtype=torch.float64)
    for seed in range(seeds):
        drawn = drawn_in([total], seed, total, dropped)
        counts[drawn.positions] += 1
        chance[drawn.positions] = drawn.probability
    assert (counts[chance == 1.0] == seeds).all()
    some = chance < 1.0
    z = (counts[some] / seeds - chance[some]) / (chance[some] * (1 - chance[some]) / seeds).sqrt()
    assert z.abs().max() < 4.5
    assert 0.75 < z.square().mean() < 1.25


@pytest.mark.parametrize("with_mass", [False, True])
def test_the_expanded_sum_is_right_on_average(with_mass: bool) -> None:
    total, seeds = 1000, 1500
    x = torch.exp(2 * torch.randn(total, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    dropped = mass(total) if with_mass else None
    sums = torch.empty(seeds, dtype=torch.float64)
    for seed in range(seeds):
        drawn = drawn_in([total], seed, total, dropped)
        sums[seed] = (x[drawn.positions] / drawn.probability).sum()
    assert abs(sums.mean() - x.sum()) < 4 * sums.std() / seeds**0.5


def test_rows_that_say_they_dropped_more_are_drawn_more_often() -> None:
    dropped = torch.zeros(4000)
    dropped[2000::10] = 0.5
    drawn = drawn_in([4000], 0, 4000, dropped)
    heavy = drawn.probability[dropped[drawn.positions] > 0]
    light = drawn.probability[(dropped[drawn.positions] == 0) & (drawn.probability < 1)]
    assert heavy.min() > 2 * light.max()


@pytest.mark.parametrize(("total", "rows", "r"), [(2000, None, 64), (16000, None, 154), (16000, 1000, 1000)])
def test_the_number_of_rows_stays_near_what_was_asked_for(total: int, rows: int | None, r: int) -> None:
    growing = (torch.arange(total) / total) ** 2
    for dropped in (None, mass(total), torch.ones(total), growing, growing.flip(0)):
        found = len(drawn_in([total], 7, total, dropped, rows=rows))
        assert 0.9 * r + 64 - 4 * r**0.5 < found < 96 + 1.15 * r + 4 * r**0.5
    assert expected_rows(total, rows) == 96 + r


def test_a_long_prompt_has_one_row_in_64_looked_at_in_all() -> None:
    assert [expected_rows(n) for n in (100, 1000, 10_240, 16_384, 131_072)] == [100, 160, 160, 256, 2048]
    assert expected_rows(500, "all") == 500 == expected_rows(500, 450)


def formula(dropped: Tensor, first: int, total: int, r: int) -> Tensor:
    """pi of the positions from ``first`` on, word by word as the module's docstring has it."""
    computed, chances = total - first, []
    dropped = (dropped.double() * 2**32).floor() / 2**32
    for i in range(first, total):
        usual = dropped[max(first, 256 * (i // 256 - 1)) : i + 1].mean()
        ratio = min(16.0, float(dropped[i] / usual)) if usual > 0 else 1.0
        rho = min(1.0, r / computed * (0.5 + 0.5 * ratio))
        edge = i < 16 or i >= total - 16
        chances.append(1.0 if edge else 1 - (1 - 64 / computed) * (1 - rho))
    return torch.tensor(chances, dtype=torch.float64)


@pytest.mark.parametrize("first", [0, 300])
def test_a_rows_chance_is_told_by_what_is_dropped_beside_it(first: int) -> None:
    total, dropped = 1400, mass(1400, 3) ** 3
    chances = formula(dropped, first, total, 400)
    drawn = drawn_in([100, total - first - 100], 9, total, dropped, first, rows=400)
    torch.testing.assert_close(drawn.probability, chances[drawn.positions - first], rtol=1e-6, atol=0)


def test_rows_drawn_one_by_one_are_those_drawn_at_once() -> None:
    total, dropped = 1100, mass(1100, 5)
    for first in (0, 200):
        apart = drawn_in([1] * (total - first), 2, total, dropped, first)
        assert_same(drawn_in([total - first], 2, total, dropped, first), apart)


def test_estimates_that_are_no_number_count_as_everything_dropped() -> None:
    broken = mass(1000)
    broken[500:600] = float("nan")
    whole = torch.where(torch.isnan(broken), 1.0, broken)
    assert_same(drawn_in([1000], 2, 1000, broken), drawn_in([1000], 2, 1000, whole))


def test_what_cannot_be_drawn_is_refused() -> None:
    for make, told in [
        (lambda: RowSampler(0, 0, 0), "total is 0"),
        (lambda: RowSampler(0, -1, 10), "layer is -1"),
        (lambda: RowSampler(0, 0, 10, 0), "rows is 0"),
        (lambda: RowSampler(0, 0, 10, "some"), "rows is 'some'"),  # type: ignore[arg-type]
        (lambda: RowSampler(0, 0, 10).draw(5, 6, None), "not rows of a prompt of 10"),
        (lambda: RowSampler(0, 0, 1000).draw(0, 10, torch.zeros(9)), "one number for each of 10 rows"),
        (lambda: DecodeSampler(0, 0).draw(-1), "no 1 positions from -1"),
    ]:
        with pytest.raises(ValueError, match=told):
            make()
    sampler = RowSampler(0, 0, 1000)
    sampler.draw(0, 10, None)
    with pytest.raises(ValueError, match="10 comes next, not 11"):
        sampler.draw(11, 5, None)


def test_one_decode_step_in_sixteen_is_drawn_whatever_else_was() -> None:
    sampler = DecodeSampler(0, 0)
    together = sampler.draw(100, 32000)
    assert abs(len(together) / 32000 - 1 / 16) < 4 * (15 / 256 / 32000) ** 0.5
    assert (together.probability == 1 / 16).all() and together.uniform.all()
    apart = [DecodeSampler(0, 0).draw(position) for position in range(1000, 1400)]
    inside = (together.positions >= 1000) & (together.positions < 1400)
    assert torch.equal(joined(apart).positions, together.positions[inside])


def test_all_decode_steps_are_drawn_when_asked_for() -> None:
    drawn = DecodeSampler(0, 0, "all").draw(7)
    assert drawn.positions.tolist() == [7] and drawn.probability.tolist() == [1.0]
