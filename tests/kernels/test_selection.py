"""Selections by estimated mass: how much they keep, what they choose, and what they promise about it."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import jsonschema
import pytest
import torch
from torch import Tensor

from kernels import attend, describe
from kernels.api import InvalidParams, parse_params
from kernels.contract import Call
from kernels.math import antidiagonal
from kernels.math.block_lists import BlockLists
from kernels.math.masked import masked_attention
from kernels.math.query_tiles import query_tiles
from kernels.math.selected import OneSequence, select_lists, selected_attention
from kernels.math.selection import BlockScores, SelectParams
from kernels.registry import load
from tests.kernels.kernel_cases import both_directions, make_inputs, scale_of

both_backends = pytest.mark.parametrize("backend", ["xattention", "topk"])


def lists_of(backend: str, params: dict[str, Any], q: Tensor, k: Tensor, **where: Any) -> BlockLists:
    """What a call would choose; v plays no part in it."""
    start = where.pop("start", k.shape[2] - q.shape[2])
    call = Call(**{"causal": True, "scale": scale_of(q), "seed": 0, "layer": 0, "start": start, **where})
    method = load(backend)
    assert method.select is not None
    return method.select(q, k, k, parse_params(backend, params), call)


def table_of(backend: str, params: dict[str, Any], q: Tensor, k: Tensor, **where: Any) -> Tensor:
    """The same as booleans [Hk, num_tiles, num_blocks]."""
    L = params.get("block_size", 64)
    return lists_of(backend, params, q, k, **where).table(k.shape[2] // L)


def clustered(seed: int, heads: tuple[int, int], N: int, D: int, topics: int = 6) -> tuple[Tensor, ...]:
    """Text-like inputs: stretches of 64 keys share a topic, and rows of 128 look for one each."""
    q, k, v = make_inputs(1, heads, N, N, D, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(topics, D, generator=generator)
    topic = torch.randint(topics, (N // 64,), generator=generator).repeat_interleave(64)
    wanted = torch.randint(topics, (N // 128,), generator=generator).repeat_interleave(128)
    return q + 1.5 * centres[wanted], k + 1.5 * centres[topic], v + centres[topic]


def draw_params(backend: str, rng: random.Random) -> dict[str, Any]:
    L = rng.choice([32, 64, 128])
    params: dict[str, Any] = {"query_tile": rng.choice([128, 256, 512]), "block_size": L}
    params["remainder"] = rng.choice(["none", "mean", "gated"])
    params["skip"] = rng.choice([0.0, 0.0, 0.02, 0.3])
    if backend == "xattention":
        params["stride"] = rng.choice([4, 8, 16, 32])
    if rng.random() < 0.4:
        return {**params, "mass": rng.choice([0.2, 0.7, 0.95, 1.0])}
    return {**params, "budget": rng.choice([L * rng.randint(0, 4), [L, [L, 2 * L][: rng.choice([1, 2])]]])}


def fitting_heads(params: dict[str, Any], rng: random.Random) -> tuple[int, int]:
    """Heads (H, Hk) for which a budget per head, if any, has the right length."""
    if isinstance(params.get("budget"), list):
        Hk = len(params["budget"][1])
        return Hk * rng.choice([1, 3]), Hk
    return rng.choice([(1, 1), (2, 2), (3, 1), (4, 2)])


@both_backends
@pytest.mark.parametrize("seed", range(4))
def test_the_fast_path_equals_the_reference_for_any_params_at_any_place(backend: str, seed: int) -> None:
    rng = random.Random(f"{backend} {seed}")
    for trial in range(10):
        params, causal = draw_params(backend, rng), rng.random() < 0.6
        heads = fitting_heads(params, rng)
        M = rng.choice([1, 2, 100, 257, 512, 640, 901])
        N = rng.choice([1, M, M, rng.randint(1, M)])
        place: dict[str, Any] = {
            "start": rng.choice([M - N, rng.randint(0, M - N)]),
            "layer": rng.randint(0, 1),
        }
        D, B = rng.choice([4, 20, 60]), rng.choice([1, 2])
        q, k, v = make_inputs(B, heads, N, M, D, seed=trial, dtype=torch.float64)
        scale = rng.choice([0.05, 1.0, 2.5]) / math.sqrt(D)
        common: dict[str, Any] = {"params": params, "causal": causal, "scale": scale, **place}
        got, want = (attend(q, k, v, backend=backend, impl=impl, **common) for impl in ("torch", "reference"))
        told = f"{params} causal={causal} N={N} M={M} heads={heads} D={D} {place} scale={scale}"
        assert got.stats.pairs_kept == want.stats.pairs_kept, told
        assert got.stats.pairs_exact == want.stats.pairs_exact, told
        for name in ("out", "lse", "dropped"):
            pair = getattr(got, name).double(), getattr(want, name).double()
            assert torch.allclose(*pair, atol=2e-6, rtol=1e-5), f"{name} {told}"


@both_backends
@both_directions
def test_narrow_inputs_and_value_dims_give_what_the_reference_gives(backend: str, causal: bool) -> None:
    for dtype, atol in ((torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
        q, k, v = make_inputs(1, (4, 2), 600, 600, 60, 20, seed=1, dtype=dtype)
        common: dict[str, Any] = {"causal": causal, "scale": scale_of(q), "params": {"budget": 128}}
        got, want = (attend(q, k, v, backend=backend, impl=impl, **common) for impl in ("torch", "reference"))
        assert got.out.dtype == dtype
        assert torch.allclose(got.out.float(), want.out.float(), atol=atol)


@both_backends
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_turn_or_level_the_logits_are_scales_like_any_other(backend: str, scale: float) -> None:
    q, k, v = make_inputs(1, (2, 1), 512, 512, 16, seed=3, dtype=torch.float64)
    params = {"query_tile": 128, "budget": 128}
    common: dict[str, Any] = {"causal": False, "scale": scale, "params": params}
    got, want = (attend(q, k, v, backend=backend, impl=impl, **common) for impl in ("torch", "reference"))
    assert torch.allclose(got.out, want.out, atol=1e-6)
    turned = table_of(backend, params, q, k, causal=True, scale=scale)
    assert torch.equal(turned, table_of(backend, params, -q, k, causal=True, scale=-scale))


@both_backends
def test_level_scores_choose_the_lower_blocks(backend: str) -> None:
    q, k, _ = make_inputs(1, (1, 1), 1024, 1024, 16)
    table = table_of(backend, {"budget": 128}, q, torch.zeros_like(k))
    assert table[0, 3].nonzero()[:, 0].tolist() == [0, 1]


@both_backends
@pytest.mark.parametrize("how", [{"budget": 192}, {"mass": 0.6}], ids=str)
def test_chunks_that_end_at_tile_borders_choose_what_the_whole_chooses(
    backend: str, how: dict[str, Any]
) -> None:
    params = {"query_tile": 128, **how}
    for seed in range(6):
        q, k, _ = clustered(seed, (4, 2), 1024, 32)
        q, k = q[:, :, :1000], k[:, :, :1000]
        whole = table_of(backend, params, q, k)
        borders = (0, 128, 512, 896, 1000)
        for begin, stop in zip(borders[:-1], borders[1:], strict=True):
            part = table_of(backend, params, q[:, :, begin:stop], k[:, :, :stop])
            tiles = slice(begin // 128, -(-stop // 128))
            assert torch.equal(part, whole[:, tiles, : part.shape[-1]])
            assert not whole[:, tiles, part.shape[-1] :].any()


@both_backends
def test_keys_after_the_last_row_of_a_causal_chunk_change_nothing(backend: str) -> None:
    q, k, _ = make_inputs(1, (2, 1), 300, 1000, 16)
    params = {"query_tile": 128, "budget": 64}
    want = table_of(backend, params, q, k, start=250)
    k[:, :, 550:] = math.nan
    assert torch.equal(table_of(backend, params, q, k, start=250), want)


@both_backends
def test_sequences_of_a_batch_choose_for_themselves(backend: str) -> None:
    q, k, v = make_inputs(3, (4, 2), 700, 700, 16)
    common: dict[str, Any] = {
        "backend": backend, "params": {"budget": 128}, "causal": True, "scale": scale_of(q)
    }  # fmt: skip
    whole = attend(q, k, v, **common)
    for b in range(3):
        one = attend(q[b : b + 1], k[b : b + 1], v[b : b + 1], **common)
        assert torch.allclose(whole.out[b], one.out[0], atol=1e-5)
        assert whole.dropped is not None and one.dropped is not None
        assert torch.allclose(whole.dropped[b], one.dropped[0], atol=1e-5)


@both_backends
@both_directions
@pytest.mark.parametrize("how", [{"budget": 1024}, {"mass": 1}], ids=str)
def test_keeping_every_candidate_is_exact_and_drops_nothing(
    backend: str, causal: bool, how: dict[str, Any]
) -> None:
    q, k, v = make_inputs(1, (3, 1), 900, 900, 20)
    common: dict[str, Any] = {"causal": causal, "scale": scale_of(q)}
    exact = attend(q, k, v, backend="exact", **common)
    got = attend(q, k, v, backend=backend, params=how, **common)
    assert torch.allclose(got.out, exact.out, atol=1e-5)
    assert got.dropped is not None and not got.dropped.any()
    assert got.stats.density == 1.0 and got.stats.dropped_mass == 0.0


def test_all_candidates_are_kept_without_looking_at_them() -> None:
    def refuses(one: OneSequence, params: SelectParams) -> BlockScores:
        raise AssertionError("scored")

    q, k, v = make_inputs(1, (1, 1), 600, 600, 8)
    call = Call(causal=True, scale=1.0, seed=0, layer=0, start=0)
    for params in (SelectParams(mass=1.0), SelectParams(budget=512)):
        selected_attention(q, k, v, params, call, refuses)
    with pytest.raises(AssertionError, match="scored"):
        selected_attention(q, k, v, SelectParams(budget=448), call, refuses)


@pytest.mark.parametrize("mass", [0.5, 0.8, 0.95])
@both_directions
def test_topk_reaches_its_mass_with_the_fewest_blocks(mass: float, causal: bool) -> None:
    for seed in range(5):
        q, k, _ = clustered(seed, (4, 2), 1024, 32)
        table = table_of("topk", {"mass": mass, "query_tile": 128}, q, k, causal=causal)
        true, own, candidates = tile_mass(q, k, 128, causal)
        kept = own + (true * table).sum(-1)
        assert bool((kept >= mass - 1e-6).all())
        smallest = true.masked_fill(~table, math.inf).amin(-1)
        assert bool((kept - smallest < mass + 1e-6)[table.any(-1)].all())
        left = true.masked_fill(table | ~candidates, -math.inf).amax(-1)
        assert bool((left <= smallest + 1e-6).all())


def tile_mass(q: Tensor, k: Tensor, T: int, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """True mass of blocks of 64 [Hk, tiles, blocks], own mass, candidates [tiles, blocks]: N and M whole
    tiles."""
    N, Hk = q.shape[2], k.shape[1]
    rows = torch.arange(N)
    logits = q[0].double().unflatten(0, (Hk, -1)) @ k[0].double()[:, None].mT * scale_of(q)
    if causal:
        logits = logits.masked_fill(rows[None] > rows[:, None], -math.inf)
    weights = logits.softmax(-1).mean(1).unflatten(1, (-1, T)).mean(2)
    blocks = weights.unflatten(-1, (-1, 64)).sum(-1)
    tile, block = torch.arange(N // T)[:, None] * T, torch.arange(N // 64)[None] * 64
    candidates = (block < tile) | (~torch.tensor(causal) & (block >= tile + T))
    return blocks * candidates, (blocks * ~candidates).sum(-1), candidates


def test_topk_tells_exactly_what_it_dropped() -> None:
    q, k, v = clustered(0, (4, 2), 1024, 32)
    common: dict[str, Any] = {"causal": True, "scale": scale_of(q)}
    exact = attend(q, k, v, backend="exact", **common)
    for extra in (
        {},
        {"skip": 0.3},
        {"remainder": "mean"},
        {"remainder": "gated"},
        {"budget": 1024, "skip": 0.3},
    ):
        params = {"budget": 128, **extra}
        got = attend(q, k, v, backend="topk", params=params, **common)
        kept = attend(q, k, v, backend="topk", params={**params, "remainder": "none"}, **common)
        assert exact.lse is not None and kept.lse is not None and got.dropped is not None
        assert torch.allclose(got.dropped, -torch.expm1(kept.lse - exact.lse).clamp(max=0), atol=1e-5)
        assert float(got.dropped.mean()) == pytest.approx(got.stats.dropped_mass)
        assert float(got.dropped.max()) > 0.01


def test_dropped_mass_of_means_is_a_lower_bound_of_the_true_one() -> None:
    for seed in range(4):
        q, k, v = clustered(seed, (2, 1), 1024, 32)
        common: dict[str, Any] = {"causal": True, "scale": scale_of(q)}
        exact = attend(q, k, v, backend="exact", **common)
        got = attend(q, k, v, backend="xattention", params={"budget": 128}, **common)
        assert got.dropped is not None and got.lse is not None and exact.lse is not None
        assert bool((got.dropped <= -torch.expm1(got.lse - exact.lse) + 1e-5).all())
        assert float(got.dropped[:, :, 512:].mean()) > 0.01


def test_topk_errs_less_than_xattention_and_that_less_than_chance() -> None:
    def chance(one: OneSequence, params: SelectParams) -> BlockScores:
        shape = len(one.k), one.tiles.num_tiles, one.tiles.num_blocks
        return BlockScores(torch.rand(shape, generator=torch.Generator().manual_seed(7)))

    errors = {"topk": 0.0, "xattention": 0.0, "chance": 0.0}
    for seed in range(6):
        q, k, v = clustered(seed, (2, 1), 2048, 32)
        call = Call(causal=True, scale=scale_of(q), seed=0, layer=0, start=0)
        exact = attend(q, k, v, backend="exact", causal=True, scale=call.scale).out
        for name in ("topk", "xattention"):
            out = attend(q, k, v, backend=name, params={"budget": 256}, causal=True, scale=call.scale).out
            errors[name] += float((out - exact).square().sum())
        out = selected_attention(q, k, v, SelectParams(budget=256), call, chance).out
        errors["chance"] += float((out - exact).square().sum())
    assert errors["topk"] <= errors["xattention"] < 0.5 * errors["chance"], errors


def test_means_of_the_left_out_lower_the_error() -> None:
    errors = {"none": 0.0, "mean": 0.0}
    for seed in range(4):
        q, k, v = clustered(seed, (2, 1), 1024, 32)
        exact = attend(q, k, v, backend="exact", causal=True, scale=scale_of(q)).out
        for remainder in errors:
            params = {"budget": 128, "remainder": remainder}
            out = attend(q, k, v, backend="xattention", params=params, causal=True, scale=scale_of(q)).out
            errors[remainder] += float((out - exact).square().sum())
    assert errors["mean"] < 0.7 * errors["none"], errors


@pytest.mark.parametrize("stride", [4, 8, 16, 32])
@pytest.mark.parametrize("rows", [1, 256, 2048])
def test_xattention_finds_a_planted_block(stride: int, rows: int) -> None:
    for seed in range(8):
        q, k, _ = make_inputs(1, (2, 1), rows, 2048, 64, seed=seed)
        needle = random.Random(seed).randrange((2048 - max(rows, 256)) // 64 or 1)
        direction = torch.randn(64, generator=torch.Generator().manual_seed(seed))
        k[:, :, needle * 64 : needle * 64 + 64] += direction
        q += direction
        table = table_of("xattention", {"budget": 128, "stride": stride}, q, k)
        assert bool(table[:, -1, needle].all())


@both_directions
@pytest.mark.parametrize("how", [{"budget": 64}, {"mass": 0.1}], ids=str)
def test_xattention_always_keeps_the_first_block(causal: bool, how: dict[str, Any]) -> None:
    """A model's resting place is a single key, which its cell's mean hides."""
    q, k, v = make_inputs(1, (4, 2), 1024, 1024, 32)
    k[:, :, :16] -= 4 * q.mean((1, 2))[:, None, None]
    table = table_of("xattention", how, q, k, causal=causal)
    assert bool(table[:, 1:, 0].all())
    assert not table_of("xattention", {"budget": 0}, q, k, causal=causal).any()
    common: dict[str, Any] = {"params": how, "causal": causal, "scale": scale_of(q)}
    got, want = (attend(q, k, v, backend="xattention", impl=i, **common) for i in ("torch", "reference"))
    assert torch.allclose(got.out, want.out, atol=1e-5)


def test_a_sink_that_single_keys_make_costs_xattention_little() -> None:
    q, k, v = clustered(3, (2, 1), 2048, 32)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    q, v[:, :, 0] = q + direction, 0.0
    k[:, :, 0] = 3 * direction
    common: dict[str, Any] = {"causal": True, "scale": scale_of(q)}
    exact = attend(q, k, v, backend="exact", **common).out
    out = attend(q, k, v, backend="xattention", params={"budget": 256}, **common).out
    assert float((out - exact).norm() / exact.norm()) < 0.5


@both_backends
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_key_that_is_not_finite_is_kept_and_felt_as_exact_feels_it(backend: str, bad: float) -> None:
    q, k, v = make_inputs(1, (2, 1), 1024, 1024, 16, seed=2)
    k[0, 0, 5 * 64 + 7] = bad
    common: dict[str, Any] = {"causal": True, "scale": scale_of(q)}
    exact = attend(q, k, v, backend="exact", **common)
    params = {"budget": 64, "query_tile": 128}
    for impl in ("torch", "reference"):
        got = attend(q, k, v, backend=backend, params=params, impl=impl, **common)
        assert torch.equal(torch.isnan(got.out), torch.isnan(exact.out)), impl
        assert got.dropped is not None and bool(torch.isfinite(got.dropped).all())
    table = table_of(backend, params, q, k)
    assert bool(table[0, 3:, 5].all())


@pytest.mark.parametrize("backend", ["xattention", "topk", "pooled", "pages"])
@pytest.mark.parametrize("remainder", ["none", "mean", "gated"])
@pytest.mark.parametrize("what", ["k", "v"])
def test_a_number_that_is_not_finite_moves_no_row_of_the_tiles_before_it(
    backend: str, remainder: str, what: str
) -> None:
    """Row 582 lies in the tile of rows 512 .. 639."""
    q, k, v = make_inputs(1, (2, 1), 1100, 1100, 16, seed=8)
    common: dict[str, Any] = {
        "backend": backend,
        "params": {"query_tile": 128, "block_size": 32, "budget": 64, "remainder": remainder},
        "causal": True,
        "scale": 2 * scale_of(q),
    }
    clean = attend(q, k, v, **common)
    assert clean.lse is not None and clean.dropped is not None and float(clean.dropped.max()) > 0.1
    for bad in (math.nan, math.inf, -math.inf):
        spoilt = {"k": k.clone(), "v": v.clone()}
        spoilt[what][0, 0, 582, 3] = bad
        for impl in ("torch", "reference") if backend == "topk" else ("torch",):
            got = attend(q, **spoilt, impl=impl, **common)
            for name in ("out", "lse", "dropped"):
                pair = getattr(got, name)[:, :, :512], getattr(clean, name)[:, :, :512]
                assert torch.allclose(*pair, atol=1e-5), f"{impl} {name} {bad}"
            assert not got.out[:, :, 582].isfinite().all()


@pytest.mark.parametrize("backend", ["xattention", "topk", "pooled", "pages"])
@pytest.mark.parametrize("remainder", ["none", "mean", "gated"])
@pytest.mark.parametrize("rows", [1, 400])
def test_what_is_left_out_and_not_finite_counts_as_all_of_the_mass(
    backend: str, remainder: str, rows: int
) -> None:
    """Nothing is chosen, so that the rows feel no broken key but one of their own tile."""
    q, k, v = make_inputs(1, (2, 1), rows, 600, 16, seed=9)
    k[0, 0, 70, 3] = math.nan
    params = {"query_tile": 256, "budget": 0, "remainder": remainder}
    for impl in ("torch", "reference"):
        got = attend(q, k, v, backend=backend, params=params, causal=True, scale=0.2, impl=impl)
        assert got.dropped is not None
        there = torch.arange(600 - rows, 600) >= 256
        assert bool((got.dropped[..., there] == 1).all()), impl
        assert not got.dropped[..., ~there].any(), "the rows of the first tile leave nothing out"
        assert bool(got.out[:, :, there].isfinite().all()) == (remainder == "none")


def test_a_row_that_keeps_what_is_not_finite_drops_nothing() -> None:
    q, k, v = make_inputs(1, (2, 1), 1, 600, 16, seed=9)
    k[0, 0, [70, 590], 3] = math.nan
    for backend in ("xattention", "topk", "pooled", "pages"):
        for remainder in ("none", "mean", "gated"):
            for impl in ("torch", "reference"):
                params = {"budget": 0, "remainder": remainder}
                got = attend(q, k, v, backend=backend, params=params, causal=True, scale=0.2, impl=impl)
                assert got.dropped is not None and not got.dropped.any(), (backend, remainder, impl)


def test_the_slow_attention_lets_a_value_be_felt_only_where_it_is_kept() -> None:
    q, k, v = make_inputs(1, (2, 1), 50, 50, 8, 6, dtype=torch.float64)
    keep = torch.rand(2, 50, 50, generator=torch.Generator().manual_seed(0)) < 0.5
    keep |= torch.eye(50, dtype=torch.bool)
    call = Call(causal=True, scale=0.3, seed=0, layer=0, start=0)
    clean = masked_attention(q, k, v, keep, call).out
    seen = keep & torch.ones(50, 50, dtype=torch.bool).tril()
    v[0, 0, 10, 1], v[0, 0, 20, 2], v[0, 0, 30, 2] = math.nan, math.inf, -math.inf
    got = masked_attention(q, k, v, keep, call).out[0]
    expected = clean[0].clone()
    expected[..., 1][seen[..., 10]] = math.nan
    expected[..., 2][seen[..., 20]] = math.inf
    expected[..., 2][seen[..., 30]] = -math.inf
    expected[..., 2][seen[..., 20] & seen[..., 30]] = math.nan
    assert torch.allclose(got, expected, atol=1e-12, equal_nan=True)


@both_directions
def test_choosing_is_counted_in_products_of_rows_and_keys(causal: bool) -> None:
    q, k, v = make_inputs(1, (4, 2), 1000, 1000, 16)
    params = {"query_tile": 128, "block_size": 32, "budget": 64}
    own = {"xattention": {"stride": 8}, "pooled": {"pool_rows": 32}}

    def scored(backend: str, rows: int = 1000, **extra: Any) -> int:
        knobs = params | own.get(backend, {}) | extra
        found = attend(q[:, :, -rows:], k, v, backend=backend, params=knobs, causal=causal, scale=0.2).stats
        assert found.density_computed == found.pairs_computed / found.pairs_exact
        return found.pairs_scored

    tiles = [(min(128 * t + 128, 1000), 128 if t < 7 else 104) for t in range(8)]
    every_pair = 4 * (sum(stop * rows for stop, rows in tiles) if causal else 1000 * 1000)
    assert scored("topk") == every_pair
    assert every_pair >= attend(q, k, v, backend="exact", causal=causal, scale=0.2).stats.pairs_exact
    assert every_pair // 2 // 8 <= scored("xattention") < 1.2 * 1000 * 1000 * 4 / 8
    assert every_pair // 2 // 32 <= scored("pooled") < 1.2 * 1000 * 1000 * 4 / 32
    if causal:
        assert scored("pages") == 4 * 2 * sum(rows * ((stop - 1) // 128) * 4 for stop, rows in tiles)
        assert [scored(name, 1) for name in ("topk", "pooled", "pages")] == [4000, 4000, 4 * 2 * 896 // 32]
        assert scored("xattention", 1) == 4 * 125
    else:
        assert scored("pages") == 4 * 2 * (896 * 31 + 104 * 28)
    assert [scored(name, budget=1024) for name in ("topk", "xattention", "pooled", "pages")] == [0] * 4


@both_backends
def test_under_mass_a_tile_with_a_broken_score_keeps_all_its_candidates(backend: str) -> None:
    q, k, _ = make_inputs(1, (2, 2), 1024, 1024, 16, seed=2)
    params = {"mass": 0.3, "query_tile": 128}
    before = table_of(backend, params, q, k)
    k[0, 0, 5 * 64 + 7] = math.nan
    table = table_of(backend, params, q, k)
    candidates = query_tiles(Call(True, 1.0, 0, 0, 0), 1024, 1024, 128, 64).candidates()
    assert torch.equal(table[0, 3:, : candidates.shape[-1]], candidates[3:])
    assert torch.equal(table[0, :2], before[0, :2]) and torch.equal(table[1], before[1])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("start", "num_rows", "num_keys"), [(0, 1, 1), (0, 700, 700), (130, 500, 900)])
def test_candidates_are_counted_as_the_table_has_them(
    start: int, num_rows: int, num_keys: int, causal: bool
) -> None:
    tiles = query_tiles(Call(causal, 1.0, 0, 0, start), num_rows, num_keys, 256, 64)
    assert torch.equal(tiles.num_candidates(), tiles.candidates().sum(-1))


def test_decode_reads_one_key_in_stride_to_choose() -> None:
    q, k, _ = make_inputs(1, (2, 1), 1, 1000, 16, seed=4)
    params = {"budget": 128, "stride": 16}
    want = table_of("xattention", params, q, k)
    read = torch.arange(1000) % 16 == 15 - 999 % 16
    k[:, :, ~read] = math.nan
    assert torch.equal(table_of("xattention", params, q, k), want)


@both_directions
def test_scores_made_in_small_pieces_choose_the_same(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = make_inputs(1, (4, 2), 1000, 1000, 16, seed=5, dtype=torch.float64)
    whole = table_of("xattention", {"budget": 128, "stride": 8}, q, k, causal=causal)
    monkeypatch.setattr(antidiagonal, "SCORE_BYTES", 7 * 2 * 125 * 8)
    assert torch.equal(table_of("xattention", {"budget": 128, "stride": 8}, q, k, causal=causal), whole)
    monkeypatch.setattr(antidiagonal, "SCORE_BYTES", 1)
    assert torch.equal(table_of("xattention", {"budget": 128, "stride": 8}, q, k, causal=causal), whole)


@both_backends
def test_budgets_act_per_layer_and_head(backend: str) -> None:
    q, k, _ = make_inputs(1, (4, 2), 1024, 1024, 16)
    params = {"budget": [64, [128, 0], 256]}
    for layer, blocks in enumerate([[1, 1], [2, 0], [4, 4]]):
        lists = lists_of(backend, params, q, k, layer=layer)
        assert lists.counts()[:, -1].tolist() == blocks


@both_backends
def test_masses_act_per_layer_and_head(backend: str) -> None:
    q, k, _ = clustered(0, (4, 2), 1024, 16)
    each = {m: table_of(backend, {"mass": m}, q, k) for m in (0.4, 0.9, 1.0)}
    lists = {"mass": [[0.4, 0.9], [1.0, 0.4], 0.9]}
    for layer, (first, second) in enumerate([(0.4, 0.9), (1.0, 0.4), (0.9, 0.9)]):
        table = table_of(backend, lists, q, k, layer=layer)
        assert torch.equal(table, torch.stack([each[first][0], each[second][1]]))
    assert int(each[0.4].sum()) < int(each[0.9].sum()) < int(each[1.0].sum())


def test_lists_are_of_one_sequence() -> None:
    q, k, v = make_inputs(2, (1, 1), 8, 8, 4)
    call = Call(causal=True, scale=1.0, seed=0, layer=0, start=0)
    with pytest.raises(ValueError, match="one sequence, the call has 2"):
        select_lists(q, k, v, SelectParams(), call, lambda one, params: BlockScores(one.k))


def test_skipping_passes_over_what_matters_least() -> None:
    q, k, v = clustered(1, (2, 1), 1024, 32)
    common: dict[str, Any] = {"causal": True, "scale": 4 * scale_of(q), "backend": "xattention"}
    kept = [attend(q, k, v, params={"budget": 512, "skip": s}, **common) for s in (0.0, 1e-4, 0.05, 0.9)]
    pairs = [one.stats.pairs_kept for one in kept]
    assert pairs == sorted(pairs, reverse=True) and pairs[-1] < pairs[0]
    plain = attend(q, k, v, params={"budget": 512}, **common)
    assert torch.equal(plain.out, kept[0].out)


def test_the_call_computes_what_its_lists_say() -> None:
    q, k, v = clustered(2, (4, 2), 1024, 32)
    params = {"budget": 128, "query_tile": 128}
    table = table_of("xattention", params, q, k)
    blocks = table.repeat_interleave(128, 1).repeat_interleave(64, 2).repeat_interleave(2, 0)
    keep = torch.zeros(4, 1024, 1024, dtype=torch.bool)
    keep[:, :, : blocks.shape[-1]] = blocks
    i, j = torch.arange(1024)[:, None], torch.arange(1024)[None]
    call = Call(causal=True, scale=scale_of(q), seed=0, layer=0, start=0)
    want = masked_attention(q, k, v, keep | (j >= i // 128 * 128), call)
    got = attend(q, k, v, backend="xattention", params=params, causal=True, scale=scale_of(q))
    assert torch.allclose(got.out, want.out, atol=1e-5)
    assert got.stats.pairs_kept == want.stats.pairs_kept


BAD: list[tuple[dict[str, Any], str]] = [
    ({"budget": 100}, "budget must be a multiple of block_size (64), got 100"),
    ({"budget": [64, [96]]}, "budget[1][0] must be a multiple of block_size (64), got 96"),
    ({"budget": "1024"}, "budget must be a whole number of keys from 0 to 1048576"),
    ({"budget": True}, "budget must be a whole number of keys"),
    ({"budget": 64.0}, "budget must be a whole number of keys"),
    ({"budget": -64}, "budget must be a whole number of keys"),
    ({"budget": 1 << 21}, "budget must be a whole number of keys"),
    ({"budget": [64, "1"]}, "budget[1] must be a whole number of keys"),
    ({"budget": [[64, True]]}, "budget[0][1] must be a whole number of keys"),
    ({"budget": [[[64]]]}, "budget[0][0] must be a whole number of keys"),
    ({"budget": []}, "budget is an empty list"),
    ({"budget": [64, []]}, "budget[1] is an empty list"),
    ({"budget": {}}, "budget must be a whole number of keys"),
    ({"budget": None}, "exactly one of budget and mass must be given, neither is given: give one of them"),
    (
        {"mass": 0.9, "budget": 64},
        "exactly one of budget and mass must be given, both are given: leave one of them out",
    ),
    ({"mass": 0}, "mass must be a number above 0 and at most 1"),
    ({"mass": 1.01}, "mass must be a number above 0 and at most 1"),
    ({"mass": math.nan}, "mass must be a number above 0 and at most 1"),
    ({"mass": True}, "mass must be a number above 0 and at most 1"),
    ({"mass": [0.5, "0.5"]}, "mass[1] must be a number above 0 and at most 1"),
    ({"query_tile": 64}, "query_tile: Input should be 128, 256 or 512"),
    ({"block_size": 16}, "block_size: Input should be 32, 64 or 128"),
    ({"remainder": "all"}, "remainder: Input should be 'none', 'mean' or 'gated'"),
    ({"skip": 1}, "skip: Input should be less than 1"),
    ({"skip": -0.1}, "skip: Input should be greater than or equal to 0"),
    ({"keys": 3}, "keys: no such parameter"),
]


@both_backends
@pytest.mark.parametrize(("params", "told"), BAD, ids=lambda value: str(value)[:40])
def test_params_out_of_bounds_are_refused_in_one_sentence(
    backend: str, params: dict[str, Any], told: str
) -> None:
    with pytest.raises(InvalidParams) as refusal:
        parse_params(backend, params)
    assert told in str(refusal.value) and len(refusal.value.problems) == 1


def test_strides_are_those_that_divide_every_block() -> None:
    with pytest.raises(InvalidParams, match="stride: Input should be 4, 8, 16 or 32"):
        parse_params("xattention", {"stride": 64})


@both_backends
def test_lists_of_another_length_than_the_model_name_its_layers(backend: str) -> None:
    params = parse_params(backend, {"budget": [64, [64, 64], 128]})
    assert params.size_problems(3, 2) == []
    assert [("3 entries" in p, "30 layers" in p) for p in params.size_problems(30, 2)] == [(True, True)]
    heads = params.size_problems(3, 4)
    assert len(heads) == 1 and heads[0].startswith("budget[1] has 2 entries") and "3 layers" in heads[0]
    assert len(parse_params(backend, {"mass": [[0.5]]}).size_problems(2, 2)) == 1
    assert parse_params(backend, {}).size_problems(7, 5) == []


@both_backends
def test_many_lists_of_a_wrong_length_are_told_in_one_sentence(backend: str) -> None:
    params = parse_params(backend, {"budget": [64, *[[64, 64]] * 1000]})
    assert params.size_problems(1001, 4) == [
        "budget[1] has 2 entries (and 999 more have a wrong number of them), but the choice applies to 1001 "
        "layers with 4 key heads each: give one number, or one per key head"
    ]
    assert [len(params.size_problems(*shape)) for shape in ((7, 4), (1001, 2))] == [1, 0]


@pytest.mark.parametrize(
    ("budget", "told"),
    [
        (
            "x",
            "budget must be a whole number of keys from 0 to 1048576, or a list with one entry per layer, "
            "each such a number or a list with one per key head (got",
        ),
        (
            ["x"],
            "budget[0] must be a whole number of keys from 0 to 1048576, or a list with one per key head",
        ),
        (
            [[]],
            "budget[0] is an empty list: give a whole number of keys from 0 to 1048576, or a list with one "
            "per key head (got",
        ),
        ([["x"]], "budget[0][0] must be a whole number of keys from 0 to 1048576 (got"),
    ],
    ids=str,
)
def test_a_refusal_offers_what_may_stand_in_that_place(budget: Any, told: str) -> None:
    with pytest.raises(InvalidParams) as refusal:
        parse_params("topk", {"budget": budget})
    assert refusal.value.problems[0][1].startswith(told)


@both_backends
def test_attend_refuses_a_layer_or_head_that_the_lists_do_not_have(backend: str) -> None:
    q, k, v = make_inputs(1, (2, 2), 8, 8, 4)
    common: dict[str, Any] = {"backend": backend, "causal": True, "scale": 1.0}
    with pytest.raises(ValueError, match="budget has 2 entries, one per layer, but this is layer number 2"):
        attend(q, k, v, params={"budget": [64, 64]}, layer=2, **common)
    with pytest.raises(ValueError, match=r"mass\[1\] has 3 entries, but there are 2 key heads"):
        attend(q, k, v, params={"mass": [0.5, [0.5] * 3]}, layer=1, **common)


@both_backends
def test_params_survive_json_and_serve_as_keys(backend: str) -> None:
    schema = describe(backend)["params_schema"]
    for given in ({}, {"mass": 0.9}, {"budget": [64, [64, 0]]}, {"mass": [[0.5, 1], 1]}, {"budget": 0}):
        params = parse_params(backend, given)
        told = json.loads(json.dumps(params.model_dump(mode="json")))
        jsonschema.validate(told, schema)
        jsonschema.validate(given, schema)
        assert parse_params(backend, told) == params and hash(parse_params(backend, told)) == hash(params)
    assert params.chunk_multiple() == 256
    for bad in ({"budget": "1"}, {"budget": []}, {"budget": [[[64]]]}, {"mass": 0}, {"mass": [2]}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, schema)
    defaults = describe(backend)["defaults"]
    assert defaults["budget"] == 1024 and defaults["mass"] is None


def test_a_gate_takes_back_the_harm_that_means_do_where_contents_stand_everywhere() -> None:
    """Every query looks for one content that stands once in every block: what is kept tells the truth, means
    of the blocks do not. Where keys of a block are alike, the gate stays open."""
    errors = {}
    for kind in ("scattered", "alike"):
        for remainder in ("none", "mean", "gated"):
            q, k, v = _scattered() if kind == "scattered" else _alike()
            common: dict[str, Any] = {"causal": True, "scale": scale_of(q)}
            want = attend(q, k, v, backend="exact", **common).out
            params = {"query_tile": 128, "block_size": 32, "budget": 128, "remainder": remainder}
            got = attend(q, k, v, backend="xattention", params=params, **common).out
            errors[kind, remainder] = float((got - want).norm() / want.norm())
    assert errors["scattered", "none"] < 0.8 * errors["scattered", "mean"], errors
    assert errors["scattered", "gated"] < 1.05 * errors["scattered", "none"], errors
    assert errors["alike", "gated"] < 0.7 * errors["alike", "none"], errors


def _scattered() -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = make_inputs(1, (2, 1), 1024, 1024, 32, seed=1)
    content = torch.zeros(32).index_fill_(0, torch.tensor([0]), 1.0)
    q = 0.3 * q + 6.0 * content
    k[:, :, ::32] += 4.0 * content
    v[:, :, ::32] = 0.1 * v[:, :, ::32] + 3.0 * content
    return q, k, v


def _alike() -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = make_inputs(1, (2, 1), 1024, 1024, 32, seed=2)
    own = [torch.unflatten(x[:, :, :], 2, (32, 32)) for x in (k, v)]
    k, v = ((0.2 * x + x[:, :, :, :1]).flatten(2, 3) for x in own)
    return q, k, v
