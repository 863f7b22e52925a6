"""Shares of blocks from antidiagonal sums, mean rows and single rows: those of torch's scorings."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.attention.topk import TopKParams
from kernels.attention.topk import _scores as every_logit_scores
from kernels.contract import Call
from kernels.math.accumulate import accumulator
from kernels.math.antidiagonal import antidiagonal_scores
from kernels.math.mean_query import mean_query_scores
from kernels.math.query_tiles import query_tiles
from kernels.math.selected import OneSequence
from kernels.math.selection import BlockScores
from tests.kernels.triton.agree import DEVICE, operands, poisoned

Told = Callable[[OneSequence], BlockScores]
SCORINGS: list[tuple[str, int, Told]] = [
    ("antidiagonal", 16, lambda one: antidiagonal_scores(one, 16)),
    ("antidiagonal", 32, lambda one: antidiagonal_scores(one, 32)),
    ("mean", 32, lambda one: mean_query_scores(one, 32)),
    ("row", 1, lambda one: every_logit_scores(one, TopKParams(query_tile=128, block_size=32))),
]


def both(
    scoring: tuple[str, int, Told], q: Tensor, k: Tensor, *, causal: bool, start: int
) -> tuple[Tensor, BlockScores, Tensor, Tensor | None]:
    """Triton's shares [Hk, num_tiles, blocks], torch's, which blocks are candidates, and triton's lse."""
    from kernels._triton.antidiagonal import antidiagonal_items, mean_items
    from kernels._triton.selection import tile_scores

    name, size, told = scoring
    call = Call(causal=causal, scale=0.3, seed=0, layer=0, start=start)
    tiles = query_tiles(call, q.shape[2], k.shape[2], 128, 32)
    stop = start + q.shape[2] if causal else k.shape[2]
    make = mean_items if name == "mean" else antidiagonal_items
    with poisoned():
        items = make(q[0], k[0], size, start, stop, causal)
        found = tile_scores(items, tiles, 0.3, wants_lse=name == "row")
    acc = accumulator(q.float(), k.float(), k.float(), call)
    one = OneSequence(acc.q[0], k[0].float(), k[0].float(), tiles, call)
    mass = found.mass.cpu()
    candidates = torch.zeros(mass.shape[1:], dtype=torch.bool)
    candidates[:, : tiles.num_blocks] = tiles.candidates()
    return mass, told(one), candidates, found.lse


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize(("N", "M", "start", "causal"), [(45, 170, 100, True), (30, 145, 110, False)])
def test_shares_are_those_of_torch(
    scoring: tuple[str, int, Told], N: int, M: int, start: int, causal: bool
) -> None:
    q, k, _ = operands(N, M, H=4 if scoring[1] == 16 else 2, Hk=2 if scoring[1] == 16 else 1, D=24)
    mass, told, candidates, lse = both(scoring, q, k, causal=causal, start=start)
    width = told.mass.shape[2]
    inside = candidates[:, :width].expand_as(told.mass)
    torch.testing.assert_close(mass[..., :width][inside], told.mass[inside], atol=1e-6, rtol=1e-5)
    assert torch.all(mass[..., :width][inside] >= 0)
    if not causal:
        assert told.own is not None
        own = mass.masked_fill(candidates, 0.0).sum(-1)
        torch.testing.assert_close(own, told.own, atol=1e-6, rtol=1e-5)
    if lse is not None:
        assert told.lse is not None
        torch.testing.assert_close(lse.cpu(), told.lse.flatten(0, 1), atol=1e-5, rtol=1e-5)


def test_means_of_half_precision_rows_are_not_rounded_to_half_precision() -> None:
    q, k, _ = operands(40, 300, D=16, dtype=torch.float16)
    mass, told, candidates, _ = both(SCORINGS[2], q * 8, k * 8, causal=True, start=256)
    inside = candidates[:, : told.mass.shape[2]].expand_as(told.mass)
    torch.testing.assert_close(
        mass[..., : told.mass.shape[2]][inside], told.mass[inside], atol=2e-5, rtol=2e-4
    )


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("scoring", [SCORINGS[0], SCORINGS[2], SCORINGS[3]])
def test_a_logit_that_is_not_finite_marks_its_block_and_no_other(scoring: tuple[str, int, Told]) -> None:
    q, k, _ = operands(5, 261, D=16)
    k[0, 0, 64:80] = math.nan
    k[0, 0, 130:150] = math.inf
    mass, told, candidates, _ = both(scoring, q, k, causal=True, start=256)
    width = told.mass.shape[2]
    inside = candidates[:, :width].expand_as(told.mass)
    torch.testing.assert_close(
        mass[..., :width][inside], told.mass[inside], atol=1e-6, rtol=1e-5, equal_nan=True
    )
    assert torch.isnan(mass[0, 0, [2, 4]]).all()
    assert torch.isfinite(mass[0, 0, [0, 1, 3, 5, 6, 7]]).all()


def test_scores_made_tile_by_tile_are_those_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels._triton import selection

    q, k, _ = operands(150, 160, H=1, D=16)
    at_once, _, candidates, _ = both(SCORINGS[1], q, k, causal=True, start=10)
    monkeypatch.setattr(selection, "SUMS_BYTES", 1)
    by_tile, _, _, _ = both(SCORINGS[1], q, k, causal=True, start=10)
    assert torch.equal(at_once[0][candidates], by_tile[0][candidates])
    assert DEVICE in str(q.device)
