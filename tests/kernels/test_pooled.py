"""Pooled: what mean rows see, what is chosen from it, and what it costs to look."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import attend
from kernels.api import InvalidParams, parse_params
from kernels.contract import Call, CallShape
from kernels.math import mean_query
from kernels.math.accumulate import accumulator
from kernels.math.block_lists import BlockLists
from kernels.math.mean_query import mean_query_scores, scoring_bytes
from kernels.math.query_tiles import query_tiles
from kernels.math.selected import OneSequence
from kernels.math.selection import BlockScores
from kernels.registry import load
from tests.kernels.kernel_cases import both_directions, make_inputs, scale_of
from tests.kernels.test_workspace import peak_of_tensors

T, L = 128, 32
SMALL: dict[str, Any] = {"query_tile": T, "block_size": L, "budget": 2 * L}
PIECES = [("SCORE_BYTES", 1), ("SCORE_BYTES", 60_000), ("ROWS_AT_ONCE", 32), ("ROWS_AT_ONCE", 300)]


def sequence(q: Tensor, k: Tensor, scale: float, start: int, causal: bool) -> OneSequence:
    call = Call(causal=causal, scale=scale, seed=0, layer=0, start=start)
    acc = accumulator(q, k, k, call)
    return OneSequence(acc.q[0], k[0], k[0], query_tiles(call, q.shape[2], k.shape[2], T, L), call)


def scores_of(
    q: Tensor, k: Tensor, pool_rows: int, *, scale: float = 0.4, start: int | None = None, causal: bool = True
) -> BlockScores:
    start = k.shape[2] - q.shape[2] if start is None else start
    return mean_query_scores(sequence(q, k, scale, start, causal), pool_rows)


def lists_of(backend: str, params: dict[str, Any], q: Tensor, k: Tensor, **where: Any) -> BlockLists:
    """What a call would choose; v plays no part in it."""
    start = k.shape[2] - q.shape[2]
    call = Call(**{"causal": True, "scale": scale_of(q), "seed": 0, "layer": 0, "start": start, **where})
    method = load(backend)
    assert method.select is not None
    return method.select(q, k, k, parse_params(backend, params), call)


def table_of(backend: str, params: dict[str, Any], q: Tensor, k: Tensor, **where: Any) -> Tensor:
    """The same as booleans [Hk, num_tiles, num_blocks]."""
    L = params.get("block_size", 64)
    return lists_of(backend, params, q, k, **where).table(k.shape[2] // L)


def draw_params(rng: random.Random) -> dict[str, Any]:
    block = rng.choice([32, 64, 128])
    params = {
        "query_tile": rng.choice([128, 256, 512]),
        "block_size": block,
        "pool_rows": rng.choice([32, 64, 128]),
        "remainder": rng.choice(["none", "mean", "gated"]),
        "skip": rng.choice([0.0, 0.0, 0.02, 0.3]),
    }
    if rng.random() < 0.4:
        return {**params, "mass": rng.choice([0.2, 0.7, 0.95, 1.0])}
    return {**params, "budget": block * rng.randint(0, 4)}


@pytest.mark.parametrize("seed", range(6))
def test_the_fast_path_equals_the_reference_for_any_params_at_any_place(seed: int) -> None:
    rng = random.Random(f"pooled {seed}")
    for trial in range(10):
        params, causal = draw_params(rng), rng.random() < 0.6
        M = rng.choice([1, 2, 100, 257, 512, 640, 901])
        N = rng.choice([1, M, M, rng.randint(1, M)])
        start = rng.choice([M - N, rng.randint(0, M - N)])
        D, B = rng.choice([4, 20, 60]), rng.choice([1, 2])
        heads = rng.choice([(1, 1), (2, 2), (3, 1), (4, 2)])
        q, k, v = make_inputs(B, heads, N, M, D, seed=trial, dtype=torch.float64)
        scale = rng.choice([0.05, 1.0, -1.0, 2.5]) / math.sqrt(D)
        common: dict[str, Any] = {"params": params, "causal": causal, "scale": scale, "start": start}
        got, want = (attend(q, k, v, backend="pooled", impl=i, **common) for i in ("torch", "reference"))
        told = f"N={N} M={M} heads={heads} D={D} {common}"
        assert got.stats.pairs_kept == want.stats.pairs_kept, told
        for name in ("out", "lse", "dropped"):
            pair = getattr(got, name).double(), getattr(want, name).double()
            assert torch.allclose(*pair, atol=2e-6, rtol=1e-5), f"{name} {told}"


@both_directions
@pytest.mark.parametrize("pool_rows", [32, 64, 128])
def test_the_shares_of_candidates_and_own_keys_are_a_whole(causal: bool, pool_rows: int) -> None:
    for N, M, start in ((700, 700, 0), (301, 700, 399), (301, 700, 77), (1, 700, 699), (2, 700, 127)):
        q, k, _ = make_inputs(1, (4, 2), N, M, 16, dtype=torch.float64)
        scores = scores_of(q, k, pool_rows, start=start, causal=causal)
        candidates = sequence(q, k, 0.4, start, causal).tiles.candidates()
        assert scores.own is not None
        total = scores.own + scores.mass.masked_fill(~candidates, 0.0).sum(-1)
        assert torch.allclose(total, torch.ones_like(total))


@both_directions
def test_groups_of_one_row_tell_the_true_mass(causal: bool) -> None:
    """By hand: the softmax of every row, summed over blocks, averaged over rows and heads."""
    for N, M in ((1, 500), (130, 500), (500, 500)):
        q, k, _ = make_inputs(1, (4, 2), N, M, 16, dtype=torch.float64)
        scores, start = scores_of(q, k, 1, causal=causal), M - N
        logits = 0.4 * (q[0] @ k[0].repeat_interleave(2, 0).mT)
        if causal:
            later = torch.arange(M)[None] > torch.arange(start, M)[:, None]
            logits = logits.masked_fill(later, -math.inf)
        by_head = torch.unflatten(torch.softmax(logits, -1), 0, (2, 2)).mean(1)
        candidates = sequence(q, k, 0.4, start, causal).tiles.candidates()
        for tile, blocks in enumerate(candidates):
            first = max(0, (start // T + tile) * T - start)
            rows = by_head[:, first : (start // T + tile + 1) * T - start].mean(1)
            for block in blocks.nonzero()[:, 0].tolist():
                want = rows[:, block * L : (block + 1) * L].sum(-1)
                assert torch.allclose(scores.mass[:, tile, block], want)


def test_a_group_cut_by_the_call_is_the_mean_of_the_rows_there() -> None:
    q, k, _ = make_inputs(1, (1, 1), 200, 500, 16, dtype=torch.float64)
    cut = scores_of(q[:, :, 20:50], k, 64, start=320)  # rows 320 .. 349 of the group 320 .. 383
    logits = 0.4 * (k[0, 0, :350] @ q[0, 0, 20:50].mean(0))
    want = torch.softmax(logits, -1)[:256].view(-1, L).sum(-1)
    assert torch.allclose(cut.mass[0, 0], want)


@both_directions
@pytest.mark.parametrize(("name", "value"), PIECES, ids=str)
def test_scores_made_in_small_pieces_are_the_same(
    causal: bool, name: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, _ = make_inputs(1, (4, 2), 900, 1000, 16, seed=5, dtype=torch.float64)
    k[0, 0, 300], k[0, 1, 700] = math.nan, math.inf
    whole = scores_of(q, k, 32, start=77, causal=causal)
    monkeypatch.setattr(mean_query, name, value)
    pieces = scores_of(q, k, 32, start=77, causal=causal)
    assert whole.own is not None and pieces.own is not None
    assert torch.allclose(pieces.mass, whole.mass, equal_nan=True)
    assert torch.allclose(pieces.own, whole.own, equal_nan=True)


@both_directions
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_turn_or_level_the_logits_are_scales_like_any_other(scale: float, causal: bool) -> None:
    q, k, v = make_inputs(1, (2, 1), 512, 512, 16, seed=3, dtype=torch.float64)
    common: dict[str, Any] = {"causal": causal, "scale": scale, "params": SMALL}
    got, want = (attend(q, k, v, backend="pooled", impl=i, **common) for i in ("torch", "reference"))
    assert torch.allclose(got.out, want.out, atol=1e-6)
    turned = table_of("pooled", SMALL, q, k, causal=causal, scale=scale)
    assert torch.equal(turned, table_of("pooled", SMALL, -q, k, causal=causal, scale=-scale))
    if scale == 0.0 and causal:
        assert turned[0, 3].nonzero()[:, 0].tolist() == [0, 1]


@pytest.mark.parametrize("how", [{"budget": 192}, {"mass": 0.6}], ids=str)
@pytest.mark.parametrize("pool_rows", [32, 128])
def test_chunks_that_end_at_tile_borders_choose_what_the_whole_chooses(
    how: dict[str, Any], pool_rows: int
) -> None:
    q, k, _ = make_inputs(1, (4, 2), 1000, 1000, 32, dtype=torch.float64)
    params = {"query_tile": T, "pool_rows": pool_rows, **how}
    whole = table_of("pooled", params, q, k)
    borders = (0, 128, 512, 896, 1000)
    for begin, stop in zip(borders[:-1], borders[1:], strict=True):
        part = table_of("pooled", params, q[:, :, begin:stop], k[:, :, :stop])
        assert torch.equal(part, whole[:, begin // T : -(-stop // T), : part.shape[-1]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "extra", [{}, {"mass": 0.5, "budget": None}, {"remainder": "mean"}, {"skip": 0.3}, {"remainder": "gated"}]
)
def test_decode_chooses_and_drops_what_topk_does(dtype: torch.dtype, extra: dict[str, Any]) -> None:
    for M in (1, 130, 900, 1000):
        q, k, v = make_inputs(1, (4, 2), 1, M, 16, seed=M, dtype=dtype)
        params = SMALL | {"pool_rows": 128} | extra
        plain = {name: value for name, value in params.items() if name != "pool_rows"}
        common: dict[str, Any] = {"causal": True, "scale": scale_of(q)}
        ours = attend(q, k, v, backend="pooled", params=params, **common)
        best = attend(q, k, v, backend="topk", params=plain, **common)
        assert torch.equal(table_of("pooled", params, q, k), table_of("topk", plain, q, k))
        assert ours.dropped is not None and best.dropped is not None
        assert torch.allclose(ours.out, best.out) and torch.allclose(ours.dropped, best.dropped, atol=1e-6)


def test_decode_reads_the_values_of_what_it_keeps_alone() -> None:
    q, k, v = make_inputs(1, (4, 2), 1, 1000, 16)
    common: dict[str, Any] = {
        "backend": "pooled", "params": SMALL, "causal": True, "scale": scale_of(q)
    }  # fmt: skip
    before = attend(q, k, v, **common).out
    for head, block in (~table_of("pooled", SMALL, q, k)[:, 0, : 896 // L]).nonzero().tolist():
        v[0, head, block * L : (block + 1) * L] = math.nan
    assert torch.equal(attend(q, k, v, **common).out, before)


@both_directions
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rows", [1, 700])
def test_a_key_that_is_not_finite_spoils_the_score_of_its_own_block_alone(
    rows: int, causal: bool, bad: float
) -> None:
    q, k, _ = make_inputs(1, (4, 2), rows, 700, 16, dtype=torch.float64)
    q[..., 0] = q[..., 0].abs() + 0.1
    clean = scores_of(q, k, 32, causal=causal)
    place = 5 * L + 7
    broken = k.clone()
    broken[0, 1, place, 0] = bad
    spoilt = scores_of(q, broken, 32, causal=causal)
    tiles = sequence(q, k, 0.4, 700 - rows, causal).tiles
    looks = tiles.candidates()[:, 5]
    assert looks.any() and spoilt.mass[1, looks, 5].isnan().all()
    others = torch.arange(tiles.num_blocks) != 5
    assert torch.isfinite(spoilt.mass[1][:, others]).all()
    assert torch.allclose(spoilt.mass[0], clean.mass[0], rtol=1e-12)
    k[0, 1, place] = -1e9 * torch.eye(16, dtype=torch.float64)[0]  # a logit so low that it weighs nothing
    removed = scores_of(q, k, 32, causal=causal)
    assert torch.allclose(spoilt.mass[1][:, others], removed.mass[1][:, others])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("how", [{"budget": 64}, {"mass": 0.3}], ids=str)
def test_a_key_that_is_not_finite_is_felt_as_exact_feels_it(bad: float, how: dict[str, Any]) -> None:
    q, k, v = make_inputs(1, (2, 1), 1024, 1024, 16, seed=2)
    k[0, 0, 5 * 64 + 7] = bad
    common: dict[str, Any] = {"causal": True, "scale": scale_of(q)}
    exact = attend(q, k, v, backend="exact", **common)
    for impl in ("torch", "reference"):
        got = attend(q, k, v, backend="pooled", params={"query_tile": T, **how}, impl=impl, **common)
        assert torch.equal(torch.isnan(got.out), torch.isnan(exact.out)), impl
        assert got.dropped is not None and bool(torch.isfinite(got.dropped).all())


@pytest.mark.parametrize("how", [{"budget": 64}, {"mass": 0.3}], ids=str)
def test_a_query_row_that_is_not_finite_moves_its_own_tile_alone(how: dict[str, Any]) -> None:
    q, k, v = make_inputs(1, (4, 2), 600, 600, 16)
    common: dict[str, Any] = {
        "backend": "pooled", "params": {"query_tile": T, **how}, "causal": True, "scale": scale_of(q)
    }  # fmt: skip
    before = attend(q, k, v, **common).out
    q[0, 1, 300] = math.nan
    after = attend(q, k, v, **common).out
    assert after[0, 1, 300].isnan().all() and int(after.isnan().sum()) == 16
    same = torch.ones(600, dtype=torch.bool)
    same[256:384] = False
    assert torch.equal(after[:, :, same], before[:, :, same])
    assert torch.equal(after[:, 2:], before[:, 2:])


@both_directions
@pytest.mark.parametrize("rows", [1, 256, 2048])
def test_a_key_that_all_rows_look_for_is_found_alone_in_its_block(rows: int, causal: bool) -> None:
    for seed in range(6):
        q, k, _ = make_inputs(1, (2, 1), rows, 2048, 64, seed=seed)
        place = random.Random(seed).randrange(2048 - max(rows, 256) or 64)
        direction = torch.randn(64, generator=torch.Generator().manual_seed(seed))
        q, k[:, :, place] = q + direction, 2 * direction
        table = table_of("pooled", {"budget": 64}, q, k, causal=causal, start=2048 - rows)
        assert bool(table[:, -1, place // 64].all())


def test_it_drops_more_than_topk_and_far_less_than_a_choice_by_chance() -> None:
    """Rows of 64 look for one topic each, stretches of 64 keys have one; true mass, from every logit."""
    for seed in range(4):
        q, k, _ = make_inputs(1, (4, 2), 1536, 1536, 32, seed=seed)
        topics = torch.randn(6, 32, generator=torch.Generator().manual_seed(seed))
        pick = torch.randint(6, (24,), generator=torch.Generator().manual_seed(seed + 50))
        q = q + 1.5 * topics[pick.roll(3)].repeat_interleave(64, 0)
        k = k + 1.5 * topics[pick].repeat_interleave(64, 0)
        noise = torch.randn(q.shape, generator=torch.Generator().manual_seed(seed))
        best, ours, chance = (
            true_dropped(table_of(name, {"budget": 256}, rows, k), q, k)
            for name, rows in (("topk", q), ("pooled", q), ("pooled", noise))
        )
        assert best <= ours + 1e-6 and ours - best < 0.2 * (chance - best), (best, ours, chance)


def true_dropped(table: Tensor, q: Tensor, k: Tensor) -> float:
    """Mean share of the softmax mass that own keys and the blocks of ``table``, tiles of 256, do not keep."""
    N = q.shape[2]
    blocks = table.repeat_interleave(256, 1).repeat_interleave(64, 2).repeat_interleave(2, 0)
    i, j = torch.arange(N)[:, None], torch.arange(N)[None]
    logits = scale_of(q) * (q[0] @ k[0].repeat_interleave(2, 0).mT).masked_fill(j > i, -math.inf)
    kept = torch.softmax(logits, -1) * (blocks | (j >= i // 256 * 256))
    return 1 - float(kept.sum(-1).mean())


@pytest.mark.parametrize("rows", [1, 512, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
def test_a_scoring_takes_the_memory_that_is_predicted(rows: int, dtype: torch.dtype, causal: bool) -> None:
    M = 4096
    q, k, v = make_inputs(1, (6, 2), rows, M, 32, dtype=dtype)
    one = sequence(q, k, 0.2, M - rows, causal)
    peak = peak_of_tensors(lambda: mean_query_scores(one, 32))
    shape = CallShape(rows, M, 6, 2, 32, 32, dtype.itemsize, causal)
    assert 0.8 < scoring_bytes(shape, T, L, 32) / peak < 1.8


@pytest.mark.parametrize("value", [16, 48, 256, "64"])
def test_pool_rows_are_those_that_divide_every_tile(value: Any) -> None:
    with pytest.raises(InvalidParams, match="pool_rows: Input should be 32, 64 or 128"):
        parse_params("pooled", {"pool_rows": value})
