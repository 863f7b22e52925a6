"""vertical_slash: the fast path equals its reference, and both find what is there."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import attend
from kernels.api import InvalidParams, parse_params
from kernels.contract import AttentionResult
from tests.kernels.kernel_cases import both_directions, make_inputs, scale_of

SMALL: dict[str, Any] = {"query_tile": 256, "num_verticals": 24, "num_slashes": 2}


def run(q: Tensor, k: Tensor, v: Tensor, causal: bool, **more: Any) -> AttentionResult:
    more.setdefault("params", SMALL)
    more.setdefault("scale", scale_of(q))
    return attend(q, k, v, backend="vertical_slash", causal=causal, **more)


def draw_params(rng: random.Random) -> dict[str, Any]:
    return {
        "query_tile": rng.choice([256, 256, 512]),
        "block_size": rng.choice([32, 64, 128]),
        "probe_rows": rng.choice([16, 32, 64]),
        "num_verticals": rng.choice([0, 1, 17, 64, 200, 5000]),
        "num_slashes": rng.choice([0, 1, 2, 5, 300]),
    }


@pytest.mark.parametrize("seed", range(30))
def test_fast_and_slow_choose_the_same_pairs_and_give_the_same_rows(seed: int) -> None:
    rng = random.Random(seed)
    params, causal = draw_params(rng), rng.random() < 0.5
    M = rng.choice([63, 300, 513, 640, 777, 900])
    N = rng.choice([1, M, M, rng.randint(1, M)])
    start, heads, D = rng.randint(0, M - N), rng.choice([(1, 1), (2, 2), (4, 2), (3, 1)]), rng.choice([8, 60])
    q, k, v = make_inputs(rng.choice([1, 2]), heads, N, M, D, seed=seed, dtype=torch.float64)
    fast, slow = (
        run(q, k, v, causal, params=params, start=start, impl=impl) for impl in ("torch", "reference")
    )
    told = f"{params} causal={causal} N={N} M={M} start={start} heads={heads}"
    torch.testing.assert_close(fast.out, slow.out, atol=1e-11, rtol=0, msg=told)
    torch.testing.assert_close(fast.lse, slow.lse, atol=1e-5, rtol=0, msg=told)
    torch.testing.assert_close(fast.dropped, slow.dropped, atol=1e-6, rtol=0, msg=told)
    assert fast.stats.pairs_kept == slow.stats.pairs_kept <= fast.stats.pairs_computed, told


@both_directions
def test_numbers_that_cover_every_candidate_are_exact(causal: bool) -> None:
    q, k, v = make_inputs(1, (4, 2), 700, 700, 32)
    want = attend(q, k, v, backend="exact", causal=causal, scale=scale_of(q))
    for params in ({"num_verticals": 700}, {"num_verticals": 0, "num_slashes": 60}):
        got = run(q, k, v, causal, params={"query_tile": 256, "block_size": 32, **params})
        torch.testing.assert_close(got.out, want.out, atol=1e-5, rtol=0)
        assert got.stats.density == 1.0 and got.stats.dropped_mass == 0.0


def test_a_prefill_in_chunks_at_tile_borders_equals_the_whole() -> None:
    q, k, v = make_inputs(1, (4, 2), 900, 900, 32)
    whole, kept = run(q, k, v, True), 0
    assert parse_params("vertical_slash", SMALL).chunk_multiple() == 256
    for a, b in ((0, 256), (256, 768), (768, 900)):
        part = run(q[:, :, a:b], k[:, :, :b], v[:, :, :b], True, start=a)
        torch.testing.assert_close(part.out, whole.out[:, :, a:b], atol=1e-5, rtol=0)
        kept += part.stats.pairs_kept
    assert kept == whole.stats.pairs_kept


def test_a_row_does_not_feel_keys_after_it_in_a_later_tile() -> None:
    q, k, v = make_inputs(1, (2, 2), 700, 700, 32)
    before = run(q, k, v, True).out[:, :, :512]
    k[:, :, 512:], v[:, :, 512:] = 9.0, -9.0
    torch.testing.assert_close(run(q, k, v, True).out[:, :, :512], before, atol=0, rtol=0)


@both_directions
def test_a_planted_column_is_found_by_every_tile_that_may_choose_it(causal: bool) -> None:
    """All rows of every head point to key 77: with one vertical to spend, nearly no mass is left out."""
    q, k, v = make_inputs(1, (4, 2), 1024, 1024, 32)
    q += 3.0
    k[:, :, 77] = 3.0
    with_it = run(
        q, k, v, causal, scale=0.1, params={"query_tile": 256, "num_verticals": 1, "num_slashes": 0}
    )
    without = run(
        q, k, v, causal, scale=0.1, params={"query_tile": 256, "num_verticals": 0, "num_slashes": 0}
    )
    want = attend(q, k, v, backend="exact", causal=causal, scale=0.1)
    others = slice(256, 1024)
    assert without.dropped is not None and float(without.dropped[..., others].min()) > 0.9
    assert with_it.dropped is not None and float(with_it.dropped[..., others].max()) < 0.05
    torch.testing.assert_close(with_it.out[:, :, others], want.out[:, :, others], atol=0.1, rtol=0)


@pytest.mark.parametrize("distance", [7, -5])
def test_a_planted_diagonal_is_found_ahead_of_the_columns(distance: int) -> None:
    """Row i is its key i - 64 d, and unlike all others. The keys of the probed rows, far fewer than there are
    columns to choose, are no columns: other rows do not look at them."""
    N, L = 1280, 64
    generator = torch.Generator().manual_seed(1)
    k = torch.nn.functional.normalize(torch.randn(1, 1, N, 48, generator=generator), dim=-1)
    _, _, v = make_inputs(1, (1, 1), N, N, 48)
    q = torch.roll(k, distance * L, dims=2)
    common: dict[str, Any] = {"scale": 40.0}
    got = run(q, k, v, False, params={"query_tile": 256, "num_verticals": 200, "num_slashes": 1}, **common)
    want = attend(q, k, v, backend="exact", causal=False, **common)
    there = slice(512, 768)  # a tile whose rows all have the distance, none beyond an end
    assert got.dropped is not None and float(got.dropped[..., there].mean()) < 0.05
    close = (got.out - want.out)[:, :, there].norm() / want.out[:, :, there].norm()
    assert float(close) < 0.1


def test_pairs_that_a_column_and_a_slash_share_count_once() -> None:
    """With equal values the answer is that value, and with equal logits lse tells how many pairs counted."""
    q, k, v = make_inputs(1, (2, 1), 768, 768, 16)
    q.zero_()
    v[:] = 1.5
    params = {"query_tile": 256, "num_verticals": 100, "num_slashes": 3, "block_size": 32}
    got = run(q, k, v, True, params=params)
    assert got.lse is not None
    assert round(float(got.lse.double().exp().sum())) == got.stats.pairs_kept < got.stats.pairs_computed
    torch.testing.assert_close(got.out, torch.full_like(got.out, 1.5))


def test_dropped_is_the_mass_left_out_where_the_probe_saw_all_rows() -> None:
    """A chunk of 16 rows in one query block: every row is probed."""
    q, k, v = make_inputs(1, (2, 2), 16, 528, 32)
    got = run(q, k, v, True)
    want = attend(q, k, v, backend="exact", causal=True, scale=scale_of(q))
    assert got.dropped is not None and got.lse is not None and want.lse is not None
    lost = (1 - (got.lse - want.lse).exp()).mean(-1)
    torch.testing.assert_close(got.dropped[..., 0], lost, atol=1e-4, rtol=0)


@both_directions
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_key_that_is_not_finite_reaches_the_rows_that_may_see_it_and_no_others(
    bad: float, causal: bool
) -> None:
    q, k, v = make_inputs(1, (4, 2), 900, 900, 32)
    clean = run(q, k, v, causal)
    k[:, 1, 300, 5] = bad
    got = run(q, k, v, causal)
    want = attend(q, k, v, backend="exact", causal=causal, scale=scale_of(q), impl="reference")
    assert torch.equal(got.out.isnan().any(-1), want.out.isnan().any(-1))
    torch.testing.assert_close(got.out[:, :2], clean.out[:, :2], atol=1e-5, rtol=0)
    assert not got.out[:, 2:, :256].isnan().any() or not causal


def test_a_value_that_is_not_finite_is_not_felt_where_its_key_is_dropped() -> None:
    q, k, v = make_inputs(1, (2, 1), 900, 900, 32)
    q = q.abs()
    k[:, :, 100] = -9.0  # nobody chooses it
    params = {**SMALL, "num_slashes": 0}
    clean = run(q, k, v, True, params=params)
    v[:, :, 100] = math.nan
    got = run(q, k, v, True, params=params)
    torch.testing.assert_close(got.out[:, :, 256:], clean.out[:, :, 256:], atol=1e-5, rtol=0)
    assert got.out[:, :, 100:256].isnan().all()


@pytest.mark.parametrize("position", [0, 255, 256, 800, 899])
def test_a_decoded_row_keeps_its_own_largest_keys(position: int) -> None:
    q, k, v = make_inputs(1, (2, 2), 1, position + 1, 32, seed=position)
    params = {"query_tile": 256, "num_verticals": 40, "num_slashes": 0}
    got = run(q, k, v, True, params=params)
    begin = position // 256 * 256
    scores = (q @ k.mT)[0, :, 0] * scale_of(q)
    for head in range(2):
        chosen = scores[head, :begin].topk(min(40, begin)).indices
        keys = torch.cat([chosen, torch.arange(begin, position + 1)])
        out = torch.softmax(scores[head, keys], -1) @ v[0, head, keys]
        torch.testing.assert_close(got.out[0, head, 0], out, atol=1e-5, rtol=0)


def test_views_of_a_longer_cache_give_what_copies_give() -> None:
    q, k, v = make_inputs(1, (4, 2), 300, 900, 32)
    room = torch.full((1, 2, 1000, 32), math.nan)
    packed = torch.empty(1, 900, 2, 32)
    in_cache, in_pack = room.clone(), packed.clone()
    in_cache[:, :, :900], in_pack[:] = k, v.transpose(1, 2)
    want = run(q, k, v, True)
    got = run(q, in_cache[:, :, :900], in_pack.transpose(1, 2), True)
    assert torch.equal(got.out, want.out)


@both_directions
def test_numbers_may_differ_by_layer_and_key_head(causal: bool) -> None:
    q, k, v = make_inputs(1, (4, 2), 600, 600, 32, dtype=torch.float64)
    params = {"query_tile": 256, "num_verticals": [8, [0, 30]], "num_slashes": [1, [3, 0]]}
    for layer in (0, 1):
        fast, slow = (
            run(q, k, v, causal, params=params, layer=layer, impl=impl) for impl in ("torch", "reference")
        )
        torch.testing.assert_close(fast.out, slow.out, atol=1e-11, rtol=0)
        assert fast.stats.pairs_kept == slow.stats.pairs_kept
    alone = run(
        q[:, 2:], k[:, 1:], v[:, 1:], causal, params={**params, "num_verticals": 30, "num_slashes": 0}
    )
    torch.testing.assert_close(run(q, k, v, causal, params=params, layer=1).out[:, 2:], alone.out)


def test_lists_of_a_wrong_length_are_told_by_name() -> None:
    knobs = parse_params("vertical_slash", {"num_verticals": [8, [1, 2, 3]], "num_slashes": [1, 2, 3]})
    assert knobs.size_problems(3, 3) == [
        "num_verticals has 2 entries, but the choice applies to 3 layers with 3 key heads each: give one "
        "number, or one per layer"
    ]
    problems = knobs.size_problems(2, 2)
    assert len(problems) == 2
    assert "num_verticals[1] has 3 entries" in problems[0] and "num_slashes has 3" in problems[1]
    q, k, v = make_inputs(1, (2, 2), 8, 8, 8)
    with pytest.raises(ValueError, match=r"num_verticals\[1\] has 3 entries, but there are 2 key heads"):
        run(q, k, v, True, params=knobs, layer=1)
    with pytest.raises(ValueError, match="num_verticals has 2 entries, one per layer, but this is layer"):
        run(q, k, v, True, params=knobs, layer=2)


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"num_verticals": -1}, "whole number from 0 to"),
        ({"num_verticals": 1.5}, "whole number from 0 to"),
        ({"num_slashes": True}, "whole number from 0 to"),
        ({"num_slashes": []}, "empty list"),
        ({"num_slashes": [1, []]}, r"num_slashes\[1\] is an empty list"),
        ({"num_verticals": [1, [2, "x"]]}, r"num_verticals\[1\]\[1\] must be a whole number"),
        ({"query_tile": 128}, "256, 512 or 1024"),
        ({"probe_rows": 20}, "16, 32 or 64"),
        ({"block_size": 1}, "32, 64 or 128"),
        ({"budget": 5}, "no such parameter"),
    ],
)
def test_bad_params_are_refused_by_name(params: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidParams, match=told) as refusal:
        parse_params("vertical_slash", params)
    assert refusal.value.problems[0][0].split(".")[0] in params


def test_the_probes_logits_count_as_scored_and_every_key_of_a_decode_step_is_one() -> None:
    q, k, v = make_inputs(1, (4, 2), 1024, 1024, 16)
    stats = run(q, k, v, True).stats
    assert stats.pairs_scored == 4 * 16 * (512 + 768 + 1024), (
        "16 probe rows a tile, the first chooses nothing"
    )
    assert run(q[:, :, -1:], k, v, True).stats.pairs_scored == 4 * 1024
    assert run(q, k, v, True, params={**SMALL, "num_verticals": 1024}).stats.pairs_scored == 0


def test_params_survive_their_own_json() -> None:
    given = {"num_verticals": [8, [1, 2]], "num_slashes": 3}
    knobs = parse_params("vertical_slash", given)
    again = parse_params("vertical_slash", knobs.model_dump(mode="json"))
    assert again == knobs and hash(again) == hash(knobs)
