from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import kernels.bench
from kernels.api import attend
from kernels.benchmarks import arguments, edges, errors, flex_masks, group, measure
from kernels.benchmarks.arguments import options
from kernels.benchmarks.cases import Case, groups, why_not
from kernels.benchmarks.decode import DecodeRow, run_decode
from kernels.benchmarks.dense import dense, sdpa
from kernels.benchmarks.edges import EdgeRow, edge_cases, edge_growths, run_edges
from kernels.benchmarks.errors import exact_rows, own_error
from kernels.benchmarks.flex_masks import Blocks, fixed_mask, listed_mask, why_no_mask
from kernels.benchmarks.growth import DENSE, Growth, crossover, exponent, growths
from kernels.benchmarks.inputs import Inputs, make_inputs
from kernels.benchmarks.machine import machine
from kernels.benchmarks.measure import Budget, Contender, sgemm_gflops, take_turns
from kernels.benchmarks.plot import _styles
from kernels.benchmarks.record import LeftOut
from kernels.benchmarks.rows import Row
from kernels.benchmarks.tables import edge_growth_list, growth_table, line
from kernels.math.block_lists import BlockLists, lists_from_table
from kernels.math.dense import computed_elements
from kernels.math.query_tiles import query_tiles
from kernels.peak import PeakBytes, peak_bytes
from kernels.registry import load

CPU = torch.device("cpu")
CASE = Case("window", {"window": 40}, 4, 2, 16, 300, True)
PAGES = Case("pages", {"query_tile": 128, "block_size": 32, "budget": 64}, 4, 2, 16, 600, True)


@pytest.fixture(autouse=True)
def known_sgemm_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.bench, "sgemm_gflops", lambda: 100.0)


def row(length: int, **changed: Any) -> Row:
    one = Row(
        backend="window",
        impl="torch",
        params="default",
        shape="4x2x16",
        length=length,
        causal=True,
        rounds=3,
        time_ms=float(length),
        selection_ms=0.0,
        first_selection_ms=0.1,
        gflops=10.0,
        share_of_sgemm=0.1,
        dense_ms=length**2 / 6000,
        dense_extrapolated=False,
        dense_rounds=3,
        dense_gflops=10.0,
        ratio_to_dense=length / 6000,
        flex_ms=None,
        ratio_to_flex=None,
        flex_note="not asked for",
        flex_difference=None,
        pairs_computed=100 * length,
        other_flops=0,
        flops=6400 * length,
        density=0.1,
        density_computed=0.2,
        dense_share=0.0,
        dropped_mass=None,
        peak_bytes=1000,
        max_abs_error=1e-7,
        error_rows=8,
        error_to_exact=0.5,
    )
    return replace(one, **changed)


@pytest.mark.parametrize("power", [0.5, 1.0, 1.37, 2.0])
def test_the_exponent_of_a_power_law_is_found(power: float) -> None:
    assert exponent([(N, 3.7 * N**power) for N in (4096, 8192, 32768)]) == pytest.approx(power, abs=1e-9)


def test_lengths_below_4096_do_not_enter_the_fit() -> None:
    assert exponent([(1024, 1e9), (2048, 1e9), (4096, 1.0), (8192, 2.0)]) == pytest.approx(1.0)


def test_one_length_has_no_exponent() -> None:
    assert exponent([(1024, 1.0), (4096, 2.0)]) is None
    assert exponent([(4096, 2.0), (4096, 3.0)]) is None


@pytest.mark.parametrize("power", [0.3, 1.0, 1.7])
def test_the_crossover_is_interpolated_in_logarithms(power: float) -> None:
    found, note = crossover([(N, (N / 3000) ** power) for N in (1024, 2048, 4096, 8192)])
    assert found == pytest.approx(3000) and note == ""


def test_a_backend_that_is_faster_or_slower_everywhere_has_no_crossover_but_a_reason() -> None:
    assert crossover([(1024, 1.5), (2048, 3.0)]) == (None, "faster from 1024 on, the shortest")
    assert crossover([(1024, 0.1), (2048, 0.9)]) == (None, "not faster at 2048, the longest")


@pytest.mark.parametrize("ratio", [0.96, 1.0, 1.05])
def test_a_ratio_close_to_one_at_the_longest_length_is_noise_and_no_crossover(ratio: float) -> None:
    for shorter in (0.5, 1.5):
        expected = (None, "within noise of dense at 2048, the longest")
        assert crossover([(1024, shorter), (2048, ratio)]) == expected
    assert crossover([(1024, 0.5), (2048, 1.06)])[0] is not None


def test_exact_attention_has_no_crossover_with_itself() -> None:
    _, exact = growths([row(N, backend="exact", ratio_to_dense=1.5) for N in (4096, 8192)])
    assert exact.crossover_length is None and exact.crossover_note == "itself"


def test_the_growth_table_tells_the_lengths_of_each_fit_and_marks_what_was_extrapolated() -> None:
    rows = [row(N, dense_extrapolated=N == 16384) for N in (2048, 4096, 8192, 16384)]
    dense_line, window_line = growth_table(growths(rows)).splitlines()[-2:]
    assert "| 4k-16k (3) | ~2.00 | - | 2 | itself |" in dense_line
    assert "| 4k-16k (3) | 1.00 | 1.00 | 1 | 6000 |" in window_line, (
        "6000 lies between lengths that were timed"
    )
    rows = [row(N, dense_extrapolated=N == 8192) for N in (4096, 8192)]
    assert growth_table(growths(rows)).splitlines()[-1].endswith("| ~6000 |")
    assert "| - | - | - |" in growth_table(growths([row(1024)])).splitlines()[-1]


def test_a_row_whose_baseline_is_one_call_is_marked() -> None:
    assert "| 512 (1 call) |" in line(row(1024, dense_ms=512.0, dense_rounds=1))
    assert "| ~512 |" in line(row(1024, dense_ms=512.0, dense_rounds=2, dense_extrapolated=True))


def test_a_backend_that_computes_no_pairs_has_an_exponent_of_its_work() -> None:
    rows = [row(N, pairs_computed=0, flops=3 * N**2) for N in (4096, 8192, 16384)]
    _, found = growths(rows)
    assert found.pairs_exponent is None and found.work_exponent == pytest.approx(2.0)
    assert "| 1.00 | 2.00 | 1 |" in growth_table(growths(rows)).splitlines()[-1]


def test_a_later_dip_below_dense_moves_the_crossover_behind_it() -> None:
    found, _ = crossover([(1024, 2.0), (2048, 0.5), (4096, 2.0)])
    assert found == pytest.approx(2048 * 2**0.5)


def test_growth_tells_each_backend_and_dense_at_each_shape_and_direction() -> None:
    rows = [row(N, causal=causal) for causal in (True, False) for N in (2048, 4096, 16384)]
    found = growths([*rows, row(1024, impl="reference")])
    assert [(each.backend, each.causal) for each in found] == [
        (DENSE, True),
        ("window", True),
        (DENSE, False),
        ("window", False),
    ]
    window = found[1]
    assert window.time_exponent == pytest.approx(1.0) and window.pairs_exponent == pytest.approx(1.0)
    assert found[0].time_exponent == pytest.approx(2.0) and window.documented_exponent == 1.0
    assert window.fitted_lengths == (4096, 16384) and window.crossover_length == pytest.approx(6000)


def test_contenders_take_turns_spread_over_all_rounds() -> None:
    called: list[str] = []
    a, b = (Contender(lambda name=name: called.append(name)) for name in "ab")  # type: ignore[misc]
    a.rounds, b.rounds = 6, 2
    take_turns([a, b])
    assert "".join(called) == "abaaabaa"
    assert len(a.times_ms) == 6 and len(b.times_ms) == 2


def test_a_long_call_is_timed_once_and_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "LONG_MS", 0.0)
    calls: list[int] = []
    once = Contender(lambda: calls.append(1))
    once.begin(Budget(1.0))
    take_turns([once])
    assert len(calls) == 1 and len(once.times_ms) == 1


@pytest.mark.parametrize(("spent_ms", "samples"), [(900.0, 2), (6000.0, 2), (11_999.0, 2), (12_001.0, 1)])
def test_the_dense_baseline_has_two_samples_unless_a_call_takes_more_than_twelve_seconds(
    monkeypatch: pytest.MonkeyPatch, spent_ms: float, samples: int
) -> None:
    monkeypatch.setattr(Contender, "call", lambda self: (spent_ms, None))
    baseline = dense(replace(CASE, N=16384), make_inputs("random", (1, 1), 64, 8))
    effort = group.Effort(0.4, 7, frozenset(), "random")
    baseline.contender.begin(group.baseline_budget(effort, 16384))
    take_turns([baseline.contender])
    assert baseline.rounds == samples


@pytest.mark.parametrize(("H", "Hk"), [(4, 4), (4, 2), (6, 1)])
def test_one_dense_row_with_the_group_as_rows_is_dense_attention(H: int, Hk: int) -> None:
    generator = torch.Generator().manual_seed(H)
    q, k, v = (torch.randn(2, heads, N, 8, generator=generator) for heads, N in ((H, 1), (Hk, 33), (Hk, 33)))
    weights = torch.softmax(0.3 * q @ k.repeat_interleave(H // Hk, 1).mT, -1)
    expected = weights @ v.repeat_interleave(H // Hk, 1)
    assert torch.allclose(sdpa(q, k, v, False, 0.3), expected, atol=1e-5)


def test_random_patterns_draw_anew_in_every_round_and_others_keep_their_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seeds: dict[str, list[int]] = {"random": [], "window": []}

    def noted(*args: Any, **kwargs: Any) -> Any:
        seeds[kwargs["backend"]].append(kwargs["seed"])
        return attend(*args, **kwargs)

    monkeypatch.setattr(group, "attend", noted)
    cases = [replace(CASE, backend=name, params={}) for name in seeds]
    done = group.run_group(cases, group.Effort(0.001, 2, frozenset(), "structured"), 100.0)
    assert done.failures == [] and len(seeds["random"]) >= 3
    assert seeds["random"] == list(range(len(seeds["random"])))
    assert set(seeds["window"]) == {0}


def test_a_first_call_that_prepares_is_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "LONG_MS", 0.0)
    calls: list[int] = []
    compiled = Contender(lambda: calls.append(1), prepares=True)
    compiled.begin(Budget(1.0))
    assert len(calls) == 2 and len(compiled.times_ms) == 1


@pytest.mark.parametrize(("spent_ms", "rounds"), [(1.0, 7), (200.0, 5), (900.0, 2)])
def test_the_first_call_decides_how_many_rounds_follow(
    monkeypatch: pytest.MonkeyPatch, spent_ms: float, rounds: int
) -> None:
    monkeypatch.setattr(Contender, "call", lambda self: (spent_ms, None))
    one = Contender(lambda: None)
    one.begin(Budget(1.0))
    assert one.rounds == rounds
    one.begin(Budget(0.1, min_rounds=1))
    assert one.rounds == (7 if spent_ms == 1.0 else 1)


def test_selection_time_is_the_median_of_the_timed_calls() -> None:
    one = Contender(lambda: ours(PAGES))
    one.begin(Budget(1e-6))
    assert one.selections_ms == []
    take_turns([one])
    assert len(one.selections_ms) == 2 and one.selection_ms > 0


def test_sgemm_has_a_rate() -> None:
    assert sgemm_gflops(64) > 0


@pytest.mark.parametrize("megabytes", [64, 128])  # what is larger than 32 MB never comes from the heap
def test_a_peak_counts_what_was_held_at_once_and_free_again(megabytes: int) -> None:
    def run() -> None:
        first = torch.ones(megabytes << 18)
        del first
        torch.ones(megabytes << 18)

    peak = peak_bytes(run, CPU, calls=3)
    if peak is None:
        pytest.skip("this system does not tell its high-water mark")
    assert (megabytes - 1) << 20 <= peak < (megabytes + 8) << 20


def test_a_peak_leaves_out_what_was_held_before() -> None:
    held = torch.ones(64 << 18)
    peak = PeakBytes(CPU).read()
    assert peak is None or peak < 8 << 20
    assert held.sum() > 0


def ours(case: Case, inputs: Inputs = "structured") -> Any:
    x = make_inputs(inputs, (case.H, case.Hk), case.N, case.D)
    return attend(
        x.q, x.k, x.v, backend=case.backend, params=case.params, causal=case.causal, scale=case.scale
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("case", [CASE, PAGES])
def test_a_right_answer_has_no_error_and_a_wrong_row_has_one(case: Case, causal: bool) -> None:
    case = replace(case, causal=causal)
    x, out = make_inputs("structured", (case.H, case.Hk), case.N, case.D), ours(case).out
    right = own_error(case, x, out)
    assert right.max_abs is not None and right.max_abs < 1e-4
    assert right.num_rows == (32 if case.backend == "window" else 128 + 88)
    out[:, :, -1] += 1.0
    wrong = own_error(case, x, out)
    assert wrong.max_abs is not None and wrong.max_abs > 0.5


NEW = ("performer", "nystrom", "lsh", "kmeans", "scatterbrain", "sbm")


@pytest.mark.parametrize("backend", NEW)
@pytest.mark.parametrize("causal", [True, False])
def test_backends_that_estimate_draw_or_learn_have_every_figure_of_a_row(backend: str, causal: bool) -> None:
    case = Case(backend, {}, 4, 2, 16, 300, causal)
    if backend == "nystrom" and causal:
        assert why_not(case) == "it has no causal form"
        return
    effort = group.Effort(0.001, 2, frozenset([((4, 2, 16), 300)]), "structured")
    done = group.run_group([case], effort, 100.0)
    assert done.failures == []
    (found,) = done.rows
    approximates = load(backend).capabilities.approximates
    assert found.max_abs_error is not None and found.max_abs_error < 1e-4 and found.error_rows >= 32
    assert 0 <= found.error_to_exact < 2 and found.gflops > 0 and found.flops > 0
    assert (found.other_flops > 0) or not approximates
    assert found.flex_ms is None and ("estimates" in found.flex_note) == approximates


@pytest.mark.parametrize("backend", NEW)
def test_a_wrong_answer_of_theirs_is_found(backend: str) -> None:
    case = Case(backend, {}, 4, 2, 16, 300, False)
    x = make_inputs("random", (4, 2), 300, 16)
    out = group._ours(case, x, 0, case.learned).out.clone()
    out[:, :, -1] += 1.0
    wrong = own_error(case, x, out)
    assert wrong.max_abs is not None and wrong.max_abs > 0.5


def test_a_choice_that_sorts_the_whole_call_is_checked_on_the_whole_call() -> None:
    smyrf = Case("lsh", {"variant": "smyrf"}, 4, 2, 16, 300, False)
    inside = Case(
        "scatterbrain", {"support": "lsh", "support_params": {"variant": "smyrf"}}, 4, 2, 16, 300, False
    )
    for case in (smyrf, inside, Case("nystrom", {}, 4, 2, 16, 300, False)):
        assert list(errors._samples(case)) == [slice(0, 300)]
        assert list(errors._samples(replace(case, N=8192))) == []
    assert list(errors._samples(Case("scatterbrain", {}, 4, 2, 16, 4096, False))) == []
    x = make_inputs("random", (4, 2), 300, 16)
    found = own_error(smyrf, x, group._ours(smyrf, x, 0, None).out)
    assert found.max_abs is not None and found.max_abs < 1e-4


def test_a_learned_backend_gets_clusters_of_its_density_and_others_get_none() -> None:
    case = Case("sbm", {}, 4, 2, 16, 300, False)
    assert CASE.learned is None
    first, again, denser = (
        case.learned,
        case.learned,
        replace(case, density=0.3).learned,
    )
    assert torch.equal(first.clusters, again.clusters)  # type: ignore[attr-defined]
    assert not torch.equal(first.clusters, denser.clusters)  # type: ignore[attr-defined]
    x = make_inputs("random", (4, 2), 300, 16)
    sparse = group._ours(case, x, 0, first).stats.density
    dense_one = group._ours(case, x, 0, denser).stats.density
    assert 0.01 < sparse < 0.04 < 0.2 < dense_one < 0.35


def edge_row(num_edges: int, time_ms: float, **changed: Any) -> EdgeRow:
    one = EdgeRow("sbm", "default", "4x2x16", 1024, True, 0.1, num_edges, 3, time_ms, 0.0, 9.0, 9.0 / time_ms)
    return replace(one, **changed)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_growth_with_edges_is_the_slope_and_a_fixed_time_is_taken_off(power: float) -> None:
    plain = [edge_row(count, 0.1 * count**power) for count in (100, 200, 400, 1600)]
    (found,) = edge_growths(plain)
    assert found.exponent == pytest.approx(power)
    (linear,) = edge_growths([edge_row(count, 50 + 0.1 * count) for count in (0, 100, 200, 400, 1600)])
    assert linear.exponent is not None and linear.exponent < 0.6
    assert linear.exponent_beyond == pytest.approx(1.0)


def test_the_growth_with_edges_is_told_for_each_direction_and_length() -> None:
    rows = [edge_row(n, float(n), causal=causal) for causal in (True, False) for n in (10, 20, 40)]
    told = edge_growth_list(edge_growths([*rows, edge_row(10, 1.0, length=2048)]))
    assert "N = 1024, causal: 1.00, beyond the time without edges 1.00" in told
    assert "N = 1024, bidirectional: 1.00" in told and "N = 2048, causal: -, beyond" in told


def test_time_against_edges_runs_learned_backends_at_growing_numbers_of_edges() -> None:
    some = list(groups(["window", "sbm"], [{}], ["torch"], [(4, 2, 16)], [256]))
    causal, both = (edge_cases(cases) for cases in some)
    assert [case.density for case in causal] == list(edges.DENSITIES)
    assert {case.backend for case in [*causal, *both]} == {"sbm"}
    found = list(run_edges(both, group.Effort(0.001, 2, frozenset(), "random")))
    counts = [row.num_edges for row in found]
    assert counts == sorted(counts) and counts[0] < 10 and counts[-1] > 10 * counts[1] > 0
    for row in found:
        assert row.density == pytest.approx(row.num_edges / (4 * 256**2))
        assert row.ratio_to_dense == pytest.approx(row.dense_ms / row.time_ms) and row.rounds >= 2


def test_every_backend_has_a_line_of_its_own_in_the_plot() -> None:
    names = [f"method {number}" for number in range(40)]
    styles = _styles([row(1024, backend=name) for name in names])
    assert len({(style["color"], style["marker"]) for style in styles.values()}) == len(names)


def test_few_tiles_are_checked_where_the_reference_is_slow() -> None:
    counted = [
        sum(rows.stop - rows.start for rows in errors._samples(replace(PAGES, N=N)))
        for N in (4096, 8192, 32768)
    ]
    assert counted == [256, 128, 0]


def test_the_reference_itself_has_nothing_to_be_compared_with() -> None:
    x = make_inputs("random", (4, 2), 300, 16)
    assert own_error(replace(CASE, impl="reference"), x, x.q).max_abs is None


@pytest.mark.parametrize("causal", [True, False])
def test_the_error_to_exact_is_relative(causal: bool) -> None:
    case = replace(CASE, backend="exact", params={}, causal=causal)
    x = make_inputs("structured", (case.H, case.Hk), case.N, case.D)
    exact, out = exact_rows(x, causal, case.scale), ours(case).out
    assert exact.relative_error(out) < 1e-5
    assert exact.relative_error(1.1 * out) == pytest.approx(0.1, abs=1e-4)
    assert exact.relative_error(0 * out) == pytest.approx(1.0)


def test_dense_is_sliced_only_where_whole_calls_take_too_long() -> None:
    assert dense(replace(CASE, N=32768), make_inputs("random", (1, 1), 64, 8)).parts == 1
    wide = make_inputs("random", (1, 1), 64, 8)
    sliced = dense(replace(CASE, N=32768, causal=False), wide)
    assert sliced.parts == 8
    sliced.contender.times_ms = [2.0]
    assert sliced.time_ms == 16.0


def test_structured_inputs_gather_mass_in_few_blocks_at_every_width() -> None:
    def best_blocks(kind: Inputs, D: int) -> float:
        x = make_inputs(kind, (2, 2), 2048, D)
        weights = torch.softmax(x.q[0, :, ::16] @ x.k[0].mT / D**0.5, -1)
        blocks = torch.unflatten(weights, -1, (32, 64)).sum(-1)
        return float(blocks.topk(4, -1).values.sum(-1).mean())

    random, narrow, wide = (
        best_blocks("random", 64),
        best_blocks("structured", 64),
        best_blocks("structured", 256),
    )
    assert random < 0.25 < 0.4 < min(narrow, wide) and max(narrow, wide) < 0.9


def test_inputs_are_the_same_every_time_and_have_the_shapes_asked_for() -> None:
    for kind in ("random", "structured"):
        x, again = (make_inputs(kind, (6, 2), 100, 8) for _ in range(2))  # type: ignore[arg-type]
        assert x.q.shape == (1, 6, 100, 8) and x.k.shape == x.v.shape == (1, 2, 100, 8)
        assert torch.equal(x.q, again.q) and torch.equal(x.k, again.k) and torch.equal(x.v, again.v)


def as_dense(blocks: Blocks, heads: int, N: int) -> torch.Tensor:
    """The mask that FlexAttention computes from the blocks, bool [heads, N, N]."""
    h, i, j = torch.meshgrid(torch.arange(heads), torch.arange(N), torch.arange(N), indexing="ij")
    list_head = h * blocks.touched.shape[0] // heads
    at = (list_head, i // blocks.query_block, j // blocks.key_block)
    return blocks.whole[at] | (blocks.touched[at] & blocks.keep(torch.zeros_like(h), h, i, j))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("backend", "params"),
    [
        ("exact", {}),
        ("window", {"window": 70, "global_tokens": 3}),
        ("sinks", {"window": 50}),
        ("star", {}),
        ("random", {"num_random": 64, "block_size": 32}),
        ("bigbird", {"window": 40, "global_tokens": 5, "num_random": 64, "block_size": 64}),
    ],
)
@pytest.mark.parametrize("N", [256, 300])
def test_flex_attention_gets_the_mask_of_the_pattern(
    backend: str, params: dict[str, Any], N: int, causal: bool
) -> None:
    case = Case(backend, params, 4, 2, 16, N, causal)
    mask = as_dense(fixed_mask(case), 4, N)
    stats = ours(case).stats
    assert int(mask.sum()) == stats.pairs_kept
    x = make_inputs("random", (4, 2), N, 16)
    scores = case.scale * (x.q[0] @ x.k[0].repeat_interleave(2, 0).mT)
    out = torch.softmax(scores.masked_fill(~mask, -torch.inf), -1) @ x.v[0].repeat_interleave(2, 0)
    assert torch.allclose(out, ours(case, "random").out[0], atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("N", [512, 600])
@pytest.mark.parametrize("list_heads", [1, 2, 4])
def test_flex_attention_gets_the_chosen_blocks_and_the_own_keys(
    N: int, causal: bool, list_heads: int
) -> None:
    case = replace(PAGES, N=N, causal=causal)
    tiles = query_tiles(case.call, N, N, 128, 32)
    drawn = torch.rand(
        list_heads, tiles.num_tiles, tiles.num_blocks, generator=torch.Generator().manual_seed(1)
    )
    table = (drawn < 0.3) & tiles.candidates()
    mask = as_dense(
        listed_mask(case, selector(lists_from_table(table, 32, tiles.borders)), inputs_of(case)), 4, N
    )
    for h in range(4):
        for i in range(N):
            tile, chosen = i // 128, table[h * list_heads // 4, i // 128]
            kept = torch.zeros(N, dtype=torch.bool)
            kept[: len(chosen) * 32] = chosen.repeat_interleave(32)
            kept[tile * 128 : i + 1 if causal else min(N, tile * 128 + 128)] = True
            if not causal:
                kept[N // 32 * 32 :] = True
            assert torch.equal(mask[h, i], kept)


def selector(lists: BlockLists) -> Callable[..., BlockLists]:
    return lambda q, k, v, params, call: lists


def inputs_of(case: Case) -> Any:
    return make_inputs("random", (case.H, case.Hk), case.N, case.D)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", ["xattention", "pooled", "topk", "pages"])
def test_flex_attention_gets_what_each_selecting_backend_chooses(name: str, causal: bool) -> None:
    case = Case(name, {"query_tile": 128, "block_size": 32, "budget": 64}, 4, 2, 16, 600, causal)
    select = load(name).select
    assert select is not None and why_no_mask(case) == ""
    mask = as_dense(listed_mask(case, select, make_inputs("structured", (4, 2), 600, 16)), 4, 600)
    assert int(mask.sum()) == ours(case).stats.pairs_kept


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("backend", "params"), [("star", {"window": 8}), ("sinks", {"window": 50}), ("exact", {})]
)
def test_only_blocks_that_hold_a_pair_of_a_real_row_are_computed(
    backend: str, params: dict[str, Any], causal: bool
) -> None:
    case = Case(backend, params, 1, 1, 16, 900, causal)
    blocks = fixed_mask(case)
    i, j = torch.meshgrid(torch.arange(900), torch.arange(900), indexing="ij")
    pairs = blocks.keep(torch.tensor(0), torch.tensor(0), i, j).expand(900, 900)
    padded = torch.nn.functional.pad(pairs, (0, 124, 0, 124))
    held = torch.unflatten(torch.unflatten(padded, 1, (8, 128)), 0, (8, 128)).any(3).any(1)
    assert torch.equal(blocks.touched[0], held)


def test_rows_beyond_the_last_hold_no_pairs() -> None:
    touched, _ = flex_masks._classified(lambda i, j: j <= i - 200, 128, 300)
    # the last row, 299, reaches key 99; row 383, which is none, would reach key 183 in the second block
    assert touched[0].tolist() == [[False] * 3, [True, False, False], [True, False, False]]


def test_a_mask_that_key_blocks_cannot_express_is_told() -> None:
    assert "every key block" in why_no_mask(replace(CASE, backend="strided", params={}))
    assert "single random keys" in why_no_mask(replace(CASE, backend="random", params={}))
    assert why_no_mask(CASE) == "" == why_no_mask(PAGES)


def test_what_is_too_dear_is_left_out_with_a_reason() -> None:
    assert why_not(CASE) is None and why_not(replace(CASE, N=1024, impl="reference")) is None
    assert "up to N = 1024" in str(why_not(replace(CASE, N=2048, impl="reference")))
    assert "checks" in str(why_not(replace(PAGES, impl="reference")))
    assert why_not(Case("topk", {}, 4, 2, 16, 8192, True)) is None
    assert "8192" in str(why_not(Case("topk", {}, 4, 2, 16, 16384, True)))
    for name in ("scatterbrain", "sbm"):
        assert "row by row" in str(why_not(Case(name, {}, 4, 2, 16, 64, True, "reference")))
    assert "no impl" in str(why_not(replace(CASE, impl="cuda")))


def test_groups_hold_one_length_shape_and_direction() -> None:
    found = list(groups(["window", "star"], [{}], ["torch", "reference"], [(4, 2, 16)], [64, 128]))
    assert [len(cases) for cases in found] == [4] * 4
    for cases in found:
        assert len({(case.N, case.shape, case.causal) for case in cases}) == 1


def test_defaults_are_the_full_run_and_quick_is_small() -> None:
    full, quick = options([], ""), options(["--quick"], "")
    assert full.lengths == (1024, 2048, 4096, 8192, 16384, 32768) and len(full.shapes) == 3
    assert set(full.impls) >= {"torch", "reference"}
    assert quick.lengths == (1024, 4096) and len(quick.shapes) == 1 and not quick.flex_at
    assert options(["--quick", "--lengths", "64"], "").lengths == (64,)


def test_flex_attention_runs_at_the_first_shape_alone_unless_every_one_is_asked_for() -> None:
    first, *others = options([], "").shapes
    assert options([], "").flex_at == {(first, 4096), (first, 16384)}
    every = options(["--flex-every-shape", "--flex-lengths", "16384"], "").flex_at
    assert every == {(shape, 16384) for shape in (first, *others)}
    assert not options(["--no-flex"], "").flex_at
    assert options(["--quick", "--flex-lengths", "64"], "").flex_at == {(first, 64)}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--shapes", "12x64"], "expected HxHkxD"),
        (["--shapes", "9x2x64"], "H must be a multiple of Hk"),
        (["--lengths", "0"], "at least 1"),
        (["--seconds", "-1"], "seconds above 0"),
        (["--params", "{"], "not JSON"),
        (["--params", "[1]"], "expected a JSON object"),
        (["--backends", "window", "--params", '{"windows": 3}'], "windows"),
        (["--backends", "nothing"], "invalid choice"),
        (["--no-prefill"], "add --decode"),
        (["--json", "no/such/folder/x.json"], "there is no directory"),
    ],
)
def test_a_wrong_option_is_named(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        options(argv, "")
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_a_plot_without_matplotlib_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(arguments, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        options(["--plot", "x.png"], "")
    assert "needs matplotlib" in capsys.readouterr().err


def test_edges_alone_are_a_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    argv = ["--shapes", "2x1x16", "--seconds", "0.001", "--no-prefill", "--edges", "--edges-length", "128"]
    assert kernels.bench.main([*argv, "--json", str(file)]) == 0
    told = json.loads(file.read_text())
    assert len(told["edges"]) == 2 * len(edges.DENSITIES) and len(told["edge_growth"]) == 2
    assert told["rows"] == []
    assert "Exponents of growth with the edges" in capsys.readouterr().out


SMALL = ["--shapes", "2x1x16", "--backends", "window", "star", "--seconds", "0.001", "--no-flex"]


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    file = tmp_path_factory.mktemp("bench") / "bench.json"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kernels.bench, "sgemm_gflops", lambda: 100.0)
        lengths = ["--lengths", "128", "2080", "--decode", "--decode-lengths", "256"]
        assert kernels.bench.main([*SMALL, *lengths, "--json", str(file)]) == 0
    assert not list(file.parent.glob("*.part"))
    yield json.loads(file.read_text())


def test_the_json_file_has_the_machine_and_every_figure(small_run: dict[str, Any]) -> None:
    facts = {"date", "command", "cpu", "num_cpus", "threads", "torch", "python", "sgemm_gflops", "inputs"}
    parts = {"complete", "rows", "growth", "decode", "edges", "edge_growth", "left_out", "failures"}
    assert set(small_run) == facts | parts
    for part, kind in (("rows", Row), ("growth", Growth), ("decode", DecodeRow), ("left_out", LeftOut)):
        assert small_run[part], part
        names = {each.name for each in fields(kind)}  # type: ignore[arg-type]
        assert all(set(found) == names for found in small_run[part])
    assert small_run["complete"] is True and small_run["failures"] == []
    assert small_run["command"].startswith("python -m kernels.bench --shapes 2x1x16 --backends window star")


def test_every_backend_impl_length_and_direction_has_a_row_or_a_reason(small_run: dict[str, Any]) -> None:
    found = {
        (each["backend"], each["impl"], each["length"], each["causal"])
        for part in ("rows", "left_out")
        for each in small_run[part]
    }
    impls = options([], "").impls
    assert found == {
        (name, impl, N, causal)
        for name in ("window", "star")
        for impl in impls
        for N in (128, 2080)
        for causal in (True, False)
    }


def test_a_row_s_figures_belong_together(small_run: dict[str, Any]) -> None:
    for each in small_run["rows"]:
        assert each["ratio_to_dense"] == pytest.approx(each["dense_ms"] / each["time_ms"])
        assert each["gflops"] == pytest.approx(4 * 16 * each["pairs_computed"] / each["time_ms"] / 1e6)
        assert each["share_of_sgemm"] == pytest.approx(each["gflops"] / 100)
        dense_elements = 2 * computed_elements(each["length"], each["length"], each["causal"])
        assert each["dense_gflops"] == pytest.approx(4 * 16 * dense_elements / each["dense_ms"] / 1e6)
        assert each["dense_rounds"] >= 2
        assert each["rounds"] >= 2 and each["flex_note"] == "not asked for"
        assert 0 < each["density"] <= 1 and 0 <= each["error_to_exact"] < 2
        assert (each["max_abs_error"] is None) == (each["impl"] == "reference")
        assert each["max_abs_error"] is None or each["max_abs_error"] < 1e-4


def test_a_quick_run_prints_its_tables_and_draws_its_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    picture = tmp_path / "bench.png"
    assert kernels.bench.main(["--quick", *SMALL, "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    printed = capsys.readouterr().out
    table = [
        line for line in printed.splitlines() if line.startswith("| window") or line.startswith("| star")
    ]
    assert len(table) == 2 * 2 * 2 + 2 * 2
    widths = {line.count("|") for line in printed.splitlines() if line.startswith("|")}
    assert len(widths) == 2
    assert "error to exact (structured inputs)" in printed and "crossover N" in printed


def test_a_plot_with_flex_and_many_shapes_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    from kernels.benchmarks.plot import plot

    rows = [
        row(N, backend=name, shape=shape, causal=causal, flex_ms=2.0 * N if N == 4096 else None)
        for name in ("exact", "window", "pages")
        for shape in ("4x2x16", "2x2x8")
        for causal in (True, False)
        for N in (1024, 4096)
    ]
    plot(rows, machine([], 100.0), tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_a_backend_that_raises_is_told_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        if kwargs["backend"] == "star":
            raise RuntimeError("broken on purpose")
        return attend(*args, **kwargs)

    monkeypatch.setattr(group, "attend", broken)
    file = tmp_path / "x.json"
    assert kernels.bench.main([*SMALL, "--lengths", "64", "--impls", "torch", "--json", str(file)]) == 1
    told = json.loads(file.read_text())
    assert {each["backend"] for each in told["rows"]} == {"window"}
    assert len(told["failures"]) == 2 and "broken on purpose" in told["failures"][0]
    assert "broken on purpose" in capsys.readouterr().err


def test_decode_tells_the_share_of_keys_it_read() -> None:
    cases = [replace(CASE, N=512, params={"window": 64}), replace(PAGES, N=512)]
    window, pages = run_decode(cases, "structured", Budget(0.001))
    assert window.read_share == 64 / 512 and window.num_keys == 512 and window.rounds >= 2
    # the last position's own tile has 128 keys, 64 more are chosen
    assert pages.read_share == (128 + 64) / 512
    assert window.ratio_to_dense == pytest.approx(window.dense_us / window.time_us)


def test_flex_attention_is_timed_where_it_has_a_mask_and_else_told_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def flex(case: Case, x: Any) -> Any:
        if case.backend == "star":
            return "no reason"
        return (lambda: 1 / 0) if case.backend == "sinks" else (lambda: ours(case).out + 0.25)

    monkeypatch.setattr(group.flex_attention, "runner", flex)
    cases = [replace(CASE, backend=name, params={}) for name in ("window", "star", "sinks")]
    done = group.run_group(
        cases, group.Effort(0.001, 2, frozenset([((4, 2, 16), CASE.N)]), "structured"), 100.0
    )
    window, star, sinks = done.rows
    assert window.flex_ms is not None and window.flex_note == ""
    assert window.ratio_to_flex == window.flex_ms / window.time_ms
    assert window.flex_difference == pytest.approx(0.25, abs=1e-5)
    assert star.flex_ms is None and star.flex_note == "no reason"
    assert sinks.flex_ms is None and "it failed: ZeroDivisionError" in sinks.flex_note
    elsewhere = group.run_group(
        cases[:1], group.Effort(0.001, 2, frozenset([((4, 2, 16), 64)]), "structured"), 100.0
    )
    assert elsewhere.rows[0].flex_note == "not asked for"
