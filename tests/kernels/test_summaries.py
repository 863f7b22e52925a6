"""Bounds and means of key blocks, and what is left out as its means."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels.contract import Call
from kernels.math.accumulate import Accumulator, accumulator
from kernels.math.block_lists import lists_from_table
from kernels.math.query_tiles import QueryTiles, query_tiles
from kernels.math.remainder import add_left_out
from kernels.math.spans import add_spans, plan_for
from kernels.math.summaries import BlockSummaries, Summary

T, L = 128, 32


def keys_values(M: int, Hk: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(M)
    return torch.randn(Hk, M, 8, dtype=dtype), torch.randn(Hk, M, 5, dtype=dtype)


def check(k: Tensor, v: Tensor, found: Summary, num_blocks: int) -> None:
    assert found.num_blocks == num_blocks
    for b in range(num_blocks):
        keys, values = (x[:, b * L : (b + 1) * L].double() for x in (k, v))
        assert torch.equal(found.kmin[:, b].double(), keys.amin(1))
        assert torch.equal(found.kmax[:, b].double(), keys.amax(1))
        torch.testing.assert_close(found.kmean[:, b].double(), keys.mean(1), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(found.vmean[:, b].double(), values.mean(1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_summary_is_the_extremes_and_means_of_every_whole_block(dtype: torch.dtype) -> None:
    k, v = keys_values(5 * L + 7, dtype=dtype)
    found = BlockSummaries().get(k, v, L, 5)
    check(k, v, found, 5)
    assert found.kmean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_strided_views_of_a_packed_stream_are_summarised_too() -> None:
    k, v = keys_values(4 * L)
    packed_k, packed_v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (k, v))
    check(k, v, BlockSummaries().get(packed_k, packed_v, L, 4), 4)


def test_blocks_that_are_known_are_not_read_again() -> None:
    k, v = keys_values(9 * L)
    kept = BlockSummaries()
    kept.get(k, v, L, 3)
    spoilt_k, spoilt_v = k.clone(), v.clone()
    spoilt_k[:, : 3 * L], spoilt_v[:, : 3 * L] = math.nan, math.nan
    check(k, v, kept.get(spoilt_k, spoilt_v, L, 9), 9)
    check(k, v, kept.get(spoilt_k, spoilt_v, L, 2), 2)


def test_storage_is_copied_a_logarithmic_number_of_times() -> None:
    k, v = keys_values(500 * L)
    kept = BlockSummaries()
    places = [kept.get(k[:, : n * L], v[:, : n * L], L, n).kmean.data_ptr() for n in range(1, 501)]
    moves = sum(a != b for a, b in zip(places, places[1:], strict=False))
    assert moves <= 9
    check(k, v, kept.get(k, v, L, 500), 500)


def test_storage_never_exceeds_what_a_sequence_of_known_length_can_need() -> None:
    k, v = keys_values(9 * L)
    bounded, free = BlockSummaries(9 * L + 3), BlockSummaries()
    for n in (1, 5, 9):
        bounded.get(k, v, L, n)
        free.get(k, v, L, n)
    assert bounded.nbytes == 9 * 2 * (3 * 8 + 5) * 4 < free.nbytes


def test_truncating_forgets_every_block_that_is_not_whole_within_what_stays() -> None:
    k, v = keys_values(6 * L)
    kept = BlockSummaries()
    kept.get(k, v, L, 6)
    kept.get(k, v, 2 * L, 3)
    kept.truncate(3 * L + 1)
    other = k.clone()
    other[:, 3 * L :] += 1.0
    check(other, v, kept.get(other, v, L, 6), 6)
    coarse = kept.get(other, v, 2 * L, 3)
    assert torch.equal(coarse.kmax[:, 1], other[:, 2 * L : 4 * L].amax(1)), "truncation cut block 1"
    kept.truncate(10**9)
    check(other, v, kept.get(torch.full_like(k, math.nan), v, L, 6), 6)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_what_is_broken_in_a_key_shows_in_its_block_and_in_no_other(broken: float) -> None:
    k, v = keys_values(3 * L)
    k[1, L + 3, 2] = broken
    found = BlockSummaries().get(k, v, L, 3)
    shown = torch.stack([~torch.isfinite(found.kmean), ~torch.isfinite(found.kmin + found.kmax)])
    assert shown.nonzero()[:, 1:].tolist() == [[1, 1, 2]] * 2


def test_more_blocks_than_there_are_keys_are_refused() -> None:
    k, v = keys_values(3 * L - 1)
    with pytest.raises(ValueError, match="3 blocks of 32 keys asked for, there are 95 keys"):
        BlockSummaries().get(k, v, L, 3)


def one_call(
    N: int, M: int, *, causal: bool, G: int, Dv: int = 8, seed: int = 0, spread: float = 1.0
) -> tuple[Accumulator, QueryTiles]:
    torch.manual_seed(seed)
    q, k = torch.randn(1, 2 * G, N, 8) * spread, torch.randn(1, 2, M, 8)
    call = Call(causal=causal, scale=0.5, seed=0, layer=0, start=M - N if causal else 0)
    acc = accumulator(q, k, torch.randn(1, 2, M, Dv), call)
    tiles = query_tiles(call, N, M, T, L)
    add_spans(acc, plan_for(acc, tiles.own_keys()))
    return acc, tiles


def expected(
    acc: Accumulator, tiles: QueryTiles, table: Tensor, merge: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dropped, out, lse), head by head and row by row, in fp64."""
    _, Hk, G, N, _ = acc.q.shape
    lse, out = acc.lse[0].double(), acc.out[0].double()
    dropped = torch.zeros_like(lse)
    left_out = tiles.candidates() & ~table
    for h in range(Hk):
        for g in range(G):
            listed = left_out[h if len(table) == Hk else h * G + g]
            for tile in range(tiles.num_tiles):
                blocks = listed[tile].nonzero()[:, 0].tolist()
                if not blocks:
                    continue
                means, values = (
                    torch.stack([x[0, h, b * L : (b + 1) * L].double().mean(0) for b in blocks])
                    for x in (acc.k, acc.v)
                )
                for i in range(tiles.rows(tile).start, tiles.rows(tile).stop):
                    logits = math.log(L) + acc.call.scale * (means @ acc.q[0, h, g, i].double())
                    rest = torch.logsumexp(logits, 0)
                    total = torch.logaddexp(lse[h, g, i], rest)
                    dropped[h, g, i] = torch.exp(rest - total)
                    if merge:
                        kept = out[h, g, i] * torch.exp(lse[h, g, i] - total)
                        out[h, g, i] = kept + torch.exp(logits - total) @ values
                        lse[h, g, i] = total
    return dropped, out, lse


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize(
    ("N", "M", "causal", "G", "per_query_head", "Dv"),
    [
        (300, 700, True, 3, False, 8),
        (300, 700, True, 3, True, 8),
        (1, 500, True, 2, False, 8),
        (1, 500, True, 2, True, 8),
        (1, 500, False, 1, False, 5),
        (333, 333, False, 2, False, 8),
        (130, 400, True, 1, False, 5),
        (40, 40, True, 1, False, 8),
    ],
)
def test_left_out_blocks_count_as_their_means_with_the_weight_of_their_keys(
    N: int, M: int, causal: bool, G: int, per_query_head: bool, Dv: int, merge: bool
) -> None:
    acc, tiles = one_call(N, M, causal=causal, G=G, Dv=Dv, seed=N + M)
    heads = 2 * G if per_query_head else 2
    table = (torch.rand(heads, tiles.num_tiles, tiles.num_blocks) < 0.5) & tiles.candidates()
    dropped, out, lse = expected(acc, tiles, table, merge)
    lists = lists_from_table(table, L, tiles.borders)
    summary = BlockSummaries().get(acc.k[0], acc.v[0], L, tiles.num_blocks)
    found = add_left_out(acc, 0, tiles, lists, summary, merge=merge)
    for a, b in ((found, dropped), (acc.out[0], out), (acc.lse[0], lse)):
        torch.testing.assert_close(a.double(), b, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("N", [1, 200])
def test_rows_with_nothing_left_out_stay_as_they_are_bit_for_bit(N: int, merge: bool) -> None:
    acc, tiles = one_call(N, 600, causal=True, G=2)
    out, lse = acc.out.clone(), acc.lse.clone()
    table = tiles.candidates().repeat(2, 1, 1)
    table[1, -1, 0] = False  # the second key head's last tile leaves one block out
    lists = lists_from_table(table, L, tiles.borders)
    summary = BlockSummaries().get(acc.k[0], acc.v[0], L, tiles.num_blocks)
    dropped = add_left_out(acc, 0, tiles, lists, summary, merge=merge)
    last = tiles.rows(tiles.num_tiles - 1)
    untouched = torch.ones(1, 2, 2, N, dtype=torch.bool)
    untouched[0, 1, :, last] = False
    assert torch.equal(acc.out[untouched], out[untouched]) and torch.equal(acc.lse[untouched], lse[untouched])
    assert bool((dropped[untouched[0]] == 0).all()) and bool((dropped[~untouched[0]] > 0).all())
    assert torch.equal(acc.out, out) is not merge


def test_the_estimate_is_never_above_the_mass_that_was_really_left_out() -> None:
    for seed in range(5):
        acc, tiles = one_call(150, 800, causal=True, G=1, seed=seed, spread=0.5 + seed)
        lists = lists_from_table(
            torch.zeros(2, tiles.num_tiles, tiles.num_blocks, dtype=torch.bool), L, tiles.borders
        )
        summary = BlockSummaries().get(acc.k[0], acc.v[0], L, tiles.num_blocks)
        found = add_left_out(acc, 0, tiles, lists, summary, merge=False)
        logits = acc.call.scale * acc.q[0] @ acc.k[0, :, None].mT
        seen = torch.arange(800) <= torch.arange(650, 800)[:, None]
        full = torch.logsumexp(logits.masked_fill(~seen, -math.inf), -1)
        assert bool((found <= 1 - torch.exp(acc.lse[0] - full) + 1e-5).all())
        assert seed or float(found.mean()) > 0.5, "flat logits: hardly below"


def test_a_broken_mean_of_a_block_left_out_reaches_the_rows_it_is_merged_into() -> None:
    for N in (1, 100):
        acc, tiles = one_call(N, 500, causal=True, G=1)
        lists = lists_from_table(
            torch.zeros(2, tiles.num_tiles, tiles.num_blocks, dtype=torch.bool), L, tiles.borders
        )
        acc.k[0, 1, 5, 0] = math.nan
        summary = BlockSummaries().get(acc.k[0], acc.v[0], L, tiles.num_blocks)
        dropped = add_left_out(acc, 0, tiles, lists, summary, merge=True)
        assert bool(acc.out[0, 1].isnan().all()) and not bool(acc.out[0, 0].isnan().any())
        assert bool(torch.isfinite(dropped).all())
