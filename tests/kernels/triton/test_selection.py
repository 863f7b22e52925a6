"""Choosing key blocks on the device: the same sets, rows and counts as torch's, wherever the call lies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import attend
from kernels.contract import Call
from kernels.math.query_tiles import QueryTiles, query_tiles
from kernels.math.selection import BlockScores, Keep
from kernels.math.selection import choose as choose_by_sorting
from tests.kernels.triton.agree import DEVICE, agree, operands, poisoned

SMALL: dict[str, Any] = {"query_tile": 128, "block_size": 32}
BACKENDS = ["xattention", "pooled", "topk"]


def chosen(
    mass: Tensor, tiles: QueryTiles, keep: Keep, stop: int, *, first_block: bool
) -> tuple[Tensor, Tensor, list[list[list[int]]]]:
    """Table, counts, and the lists made of them, from shares of every block [Hk, num_tiles, blocks]."""
    from kernels._triton.selection import choose_blocks, entries_of

    with poisoned():
        found = choose_blocks(mass.device, len(mass), mass, tiles, keep, stop, first_block=first_block)
        indptr, entries = entries_of(found, tiles.block, int(found.table.numel()))
    heads = range(len(mass))
    lists = [
        [entries[indptr[h, t] : indptr[h, t + 1]].tolist() for t in range(tiles.num_tiles)] for h in heads
    ]
    assert all(step == 1 for of_head in lists for of_tile in of_head for _, step in of_tile)
    blocks = [[[first // tiles.block for first, _ in of_tile] for of_tile in of_head] for of_head in lists]
    return found.table.bool().cpu(), found.counts.cpu(), blocks


def scores_of(mass: Tensor, tiles: QueryTiles, first_block: bool) -> BlockScores:
    """What torch's choice is given of the same shares."""
    candidates = torch.zeros(mass.shape[1:], dtype=torch.bool)
    candidates[:, : tiles.num_blocks] = tiles.candidates()
    own = mass.masked_fill(candidates, 0.0).sum(-1)
    return BlockScores(mass[..., : tiles.num_blocks], own, first_block=first_block)


def place(start: int, num_rows: int, num_keys: int, causal: bool) -> tuple[QueryTiles, int, int]:
    """Tiles, where the keys end that some row sees, and blocks up to there."""
    call = Call(causal=causal, scale=1.0, seed=0, layer=0, start=start)
    stop = start + num_rows if causal else num_keys
    return query_tiles(call, num_rows, num_keys, 128, 32), stop, -(-stop // 32)


@pytest.mark.parametrize("keep", [Keep(blocks=(3, 1)), Keep(blocks=(0, 40)), Keep(mass=(0.6, 0.95))])
@pytest.mark.parametrize(("causal", "first_block"), [(True, True), (False, False)])
def test_the_choice_equals_the_sorted_one_with_many_ties_and_broken_blocks(
    keep: Keep, causal: bool, first_block: bool
) -> None:
    tiles, stop, num_blocks = place(100, 40, 280, causal)
    generator = torch.Generator().manual_seed(7)
    mass = torch.randint(0, 4, (2, tiles.num_tiles, num_blocks), generator=generator) / 32
    mass[1, 1, 2] = float("nan")
    if causal:
        mass[:, 0, 4:] = 0.0  # beyond what the first tile sees
    table, counts, lists = chosen(mass.to(DEVICE), tiles, keep, stop, first_block=first_block)
    told = choose_by_sorting(scores_of(mass, tiles, first_block), tiles.candidates(), keep)
    assert torch.equal(table, told)
    assert torch.equal(counts, told.sum(-1).int())
    assert lists == [[row.nonzero()[:, 0].tolist() for row in of_head] for of_head in told]


def test_scores_below_zero_and_infinite_ones_are_ranked_too() -> None:
    tiles, stop, num_blocks = place(256, 2, 258, True)
    mass = torch.tensor([[-1.5, 2.0, -0.0, 0.0, float("inf"), -2.0, 1e-40, 0.5, 0.0]])[None]
    assert mass.shape[2] == num_blocks
    for count in (1, 4, 6):
        table, _, _ = chosen(mass.to(DEVICE), tiles, Keep(blocks=(count,)), stop, first_block=False)
        told = choose_by_sorting(scores_of(mass, tiles, False), tiles.candidates(), Keep(blocks=(count,)))
        assert torch.equal(table, told)


def test_more_blocks_than_are_looked_at_together_are_chosen_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels._triton import selection

    monkeypatch.setattr(selection, "CHUNK", 4)
    tiles, stop, num_blocks = place(512, 1, 513, True)
    mass = torch.rand(1, 1, num_blocks, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    for keep in (Keep(blocks=(6,)), Keep(mass=(0.7,))):
        table, _, lists = chosen(mass.to(DEVICE), tiles, keep, stop, first_block=True)
        told = choose_by_sorting(scores_of(mass, tiles, True), tiles.candidates(), keep)
        assert torch.equal(table, told)
        assert lists[0][0] == told[0, 0].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "amount", [{"budget": 64}, {"mass": 0.7}, {"budget": 96, "remainder": "gated", "skip": 0.3}]
)
def test_rows_and_counts_are_those_of_torch(backend: str, amount: dict[str, Any]) -> None:
    q, k, v = operands(9, 265, H=2, Hk=1, D=16)
    agree(q * 2, k, v, backend=backend, params={**SMALL, **amount})


@pytest.mark.parametrize(
    ("backend", "params", "where"),
    [
        ("xattention", {"mass": 0.8, "stride": 8}, {"N": 60, "M": 203, "start": 100, "D": 24}),
        (
            "xattention",
            {"budget": 32, "remainder": "mean"},
            {"N": 30, "M": 331, "causal": False, "start": 110},
        ),
        ("pooled", {"budget": [[64, 32]], "pool_rows": 32}, {"N": 20, "M": 148, "H": 2, "Hk": 2, "layer": 0}),
        ("topk", {"mass": 0.5, "skip": 0.2}, {"N": 9, "M": 170, "causal": False, "start": 3, "H": 3}),
        ("pooled", {"budget": 64}, {"N": 1, "M": 150, "H": 3}),
        ("xattention", {"budget": 64}, {"N": 1, "M": 300, "B": 2, "D": 40, "Dv": 24}),
        ("xattention", {"budget": 64}, {"N": 20, "M": 20}),
    ],
)
def test_calls_at_any_place_and_of_any_shape_agree(
    backend: str, params: dict[str, Any], where: dict[str, Any]
) -> None:
    shape = {"N": 1, "M": 1, "D": 16, **where}
    causal = shape.pop("causal", True)
    options = {name: shape.pop(name) for name in ("start", "layer") if name in shape}
    q, k, v = operands(shape.pop("N"), shape.pop("M"), **shape)
    agree(q * 2, k, v, backend=backend, params={**SMALL, **params}, causal=causal, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_agrees(backend: str) -> None:
    q, k, v = operands(6, 262, H=2, Hk=1, D=16, dtype=torch.float16)
    agree(q, k, v, backend=backend, params={**SMALL, "budget": 64, "remainder": "mean"})


def test_logits_of_a_thousand_stay_finite() -> None:
    q, k, v = operands(5, 261, D=16)
    found = agree(q * 300, k, v, backend="topk", params={**SMALL, "budget": 64}, tolerance=1e-3)
    assert torch.isfinite(found.out).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_in_a_key_is_chosen_and_one_that_no_row_sees_is_not(backend: str) -> None:
    q, k, v = operands(4, 265, D=16)
    k[0, 0, 40:72] = float("nan")
    params = {**SMALL, "budget": 64}
    options = {"causal": True, "scale": 0.25, "start": 256, "impl": "triton"}
    with poisoned():
        seen = attend(q, k, v, backend=backend, params=params, **options)
        k[0, 0, 40:72] = 0.0
        k[0, 0, 260:], v[0, 0, 260:] = float("nan"), float("nan")
        unseen = attend(q, k, v, backend=backend, params=params, **options)
    assert torch.isnan(seen.out).all()
    assert torch.isfinite(unseen.out).all()


def test_two_runs_give_the_same_bits() -> None:
    q, k, v = operands(7, 263, D=16)
    options = {"causal": True, "scale": 0.25, "impl": "triton", "backend": "xattention"}
    first, second = (attend(q, k, v, params={**SMALL, "mass": 0.6}, **options) for _ in range(2))
    assert torch.equal(first.out, second.out)
    assert torch.equal(first.lse, second.lse)
