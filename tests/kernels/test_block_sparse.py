"""The block-sparse computation against softmax under a dense mask in float64, over random lists."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.contract import Call
from kernels.math import block_common, block_skip, block_sparse
from kernels.math.accumulate import Accumulator, accumulator
from kernels.math.block_lists import BlockLists, lists_from_table
from kernels.math.block_sparse import add_block_lists, crossover
from kernels.math.query_tiles import QueryTiles, query_tiles
from kernels.math.spans import add_spans, plan_for
from tests.kernels.kernel_cases import make_inputs

HEADS = [(4, 4), (6, 2), (3, 1)]


@dataclass
class Case:
    """Inputs, lists, and what another part has put into the rows: softmax over ``before`` [N, M]."""

    q: Tensor
    k: Tensor
    v: Tensor
    lists: BlockLists
    table: Tensor
    before: Tensor
    scale: float = 0.2


def make_case(
    seed: int,
    *,
    borders: tuple[int, ...],
    M: int,
    block: int = 32,
    heads: tuple[int, int] = (6, 2),
    per_query_head: bool = False,
    density: float = 0.4,
    D: int = 60,
    Dv: int | None = None,
    B: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """Random lists over all but the last whole block: that and the keys behind it the rows have already."""
    q, k, v = make_inputs(B, heads, borders[-1], M, D, Dv, seed=seed, dtype=dtype)
    num_blocks = M // block
    generator = torch.Generator().manual_seed(seed)
    num_lists = heads[0] if per_query_head else heads[1]
    table = torch.rand(num_lists, len(borders) - 1, num_blocks, generator=generator) < density
    table[:, :, num_blocks - 1 :] = False
    before = (torch.arange(M) >= (num_blocks - 1) * block).expand(borders[-1], M)
    return Case(q, k, v, lists_from_table(table, block, borders), table, before)


def filled(case: Case) -> Accumulator:
    """An accumulator that holds what came before, and has counted nothing."""
    acc = accumulator(case.q, case.k, case.v, Call(False, case.scale, 0, 0, 0))
    out, lse = oracle(case, torch.zeros_like(case.table))
    acc.put(slice(None), out.view(acc.out.shape).to(acc.out.dtype), lse.view(acc.lse.shape).to(acc.lse.dtype))
    acc.complete(0, 0)
    return acc


def run(case: Case, **options: Any) -> Accumulator:
    acc = filled(case)
    for b in range(len(case.q)):
        add_block_lists(acc, b, case.lists, **options)
    return acc


def oracle(case: Case, table: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax in float64, a dropped key never multiplied: out [B, H, N, Dv], lse [B, H, N]."""
    H, Hk = case.q.shape[1], case.k.shape[1]
    keep = case.before | element_mask(case, table)
    q, k, v = (x.double() for x in (case.q, case.k, case.v))
    k, v = (x.repeat_interleave(H // Hk, 1) for x in (k, v))
    scores = (q @ k.mT * case.scale).masked_fill(~keep, -math.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.unsqueeze(-1)).masked_fill(~keep, 0.0)
    return torch.where(keep, weights, 0.0) @ v.nan_to_num(0.0, 0.0, 0.0), lse


def element_mask(case: Case, table: Tensor) -> Tensor:
    """[H, N, M] of a table [heads, tiles, blocks]."""
    heights = torch.tensor(case.lists.borders).diff()
    keep = table.repeat_interleave(heights, 1).repeat_interleave(case.lists.block, 2)
    keep = keep.repeat_interleave(case.q.shape[1] // len(table), 0)
    rest = case.k.shape[2] - keep.shape[2]
    return torch.cat([keep, keep.new_zeros(*keep.shape[:2], rest)], 2)


def check(case: Case, atol: float = 2e-5, **options: Any) -> Accumulator:
    acc = run(case, **options)
    out, lse = oracle(case, case.table)
    torch.testing.assert_close(acc.out.flatten(1, 2).double(), out, atol=atol, rtol=0)
    torch.testing.assert_close(acc.lse.flatten(1, 2).double(), lse, atol=atol, rtol=0)
    pairs = len(case.q) * int(element_mask(case, case.table).sum())
    assert acc.kept == pairs <= acc.computed
    return acc


@pytest.fixture(params=["as tuned", "views and masks everywhere", "tiny panels", "common parts everywhere"])
def tuning(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of the three ways a list takes depends on sizes that tests do not reach."""
    if request.param == "views and masks everywhere":
        monkeypatch.setattr(block_sparse, "VIEW_ELEMENTS", 1)
        monkeypatch.setattr(block_sparse, "crossover", lambda num_rows: 0.3)
        monkeypatch.setattr(block_sparse, "VIEW_ROWS", 300)
        monkeypatch.setattr(block_sparse, "TILE_ROWS", 150)
    if request.param == "tiny panels":
        monkeypatch.setattr(block_sparse, "PANEL_BYTES", 1 << 15)
        monkeypatch.setattr(block_sparse, "LOOSE_ELEMENTS", 1 << 12)
    if request.param == "common parts everywhere":
        monkeypatch.setattr(block_common, "COMMON_KEYS", 1)
        monkeypatch.setattr(block_common, "MAX_TILES", 1000)
    return str(request.param)


SHAPES: list[dict[str, Any]] = [
    {"borders": (0, 64, 128, 192, 256), "M": 420},
    {"borders": (0, 37, 101, 165, 200), "M": 333},
    {"borders": (0, 1, 2, 66), "M": 97, "D": 64},
    {"borders": (0, 128, 256), "M": 1000, "block": 64, "D": 64},
    {"borders": (0, 200), "M": 900, "block": 128, "B": 2},
    {"borders": (0, 64, 128, 140), "M": 300, "Dv": 24, "B": 2},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("per_query_head", [False, True], ids=["key heads", "query heads"])
def test_random_lists_equal_softmax_under_a_dense_mask(
    shape: dict[str, Any], per_query_head: bool, tuning: str
) -> None:
    for seed in range(6):
        density = (0.05, 0.3, 0.5, 0.8, 0.95, 1.0)[seed]
        check(make_case(seed, heads=HEADS[seed % 3], per_query_head=per_query_head, density=density, **shape))


@pytest.mark.parametrize("per_query_head", [False, True], ids=["key heads", "query heads"])
def test_lists_without_gaps_equal_softmax_under_a_dense_mask(per_query_head: bool, tuning: str) -> None:
    """Windows that move, stand still for some tiles, and are shared by some heads."""
    for seed in range(8):
        case = make_case(
            seed,
            heads=HEADS[seed % 3],
            borders=(0, 40, 104, 168, 232, 296),
            M=500,
            per_query_head=per_query_head,
        )
        generator = torch.Generator().manual_seed(seed)
        first = torch.randint(0, 4, (*case.table.shape[:2], 1), generator=generator)
        width = torch.randint(0, 3, (*case.table.shape[:2], 1), generator=generator) * 4
        first[:, 1:3], width[:, 1:3] = first[:, :1], width[:, :1]
        first[:2], width[:2] = first[:1], width[:1]
        blocks = torch.arange(case.table.shape[2])
        table = (blocks >= first) & (blocks < first + width) & (blocks < case.table.shape[2] - 1)
        check(replace(case, table=table, lists=lists_from_table(table, 32, case.lists.borders)))


@pytest.mark.parametrize("per_query_head", [False, True], ids=["key heads", "query heads"])
def test_one_row_equals_softmax_under_a_dense_mask(per_query_head: bool) -> None:
    for seed in range(9):
        density, M, D = (0.0, 0.3, 1.0)[seed % 3], 333 + seed, (60, 64)[seed % 2]
        check(
            make_case(
                seed,
                heads=HEADS[seed % 3],
                borders=(0, 1),
                M=M,
                D=D,
                density=density,
                per_query_head=per_query_head,
            )
        )


def test_empty_lists_change_nothing_bit_for_bit() -> None:
    case = make_case(0, borders=(0, 64, 100), M=300, density=0.0)
    before, after = filled(case), run(case)
    assert torch.equal(before.out, after.out) and torch.equal(before.lse, after.lse)
    assert (after.kept, after.computed, after.dense) == (0, 0, 0)


@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float64, 1e-12), (torch.bfloat16, 2e-5), (torch.float16, 2e-5)]
)
def test_fp64_stays_fp64_and_narrow_keys_are_widened_exactly(
    dtype: torch.dtype, atol: float, tuning: str
) -> None:
    for borders in ((0, 64, 128, 150), (0, 1)):
        check(make_case(1, borders=borders, M=500, dtype=dtype), atol=atol)


@pytest.mark.parametrize("layout", ["cache slice", "packed"])
def test_keys_need_not_be_contiguous(layout: str, tuning: str) -> None:
    for seed, borders in enumerate([(0, 64, 128, 150), (0, 1), (0, 200)]):
        case = make_case(seed, borders=borders, M=333, B=2, density=0.8)
        for name in ("k", "v"):
            setattr(case, name, _laid_out(getattr(case, name), layout))
        check(case)


def _laid_out(keys: Tensor, layout: str) -> Tensor:
    if layout == "cache slice":
        return torch.cat([keys, torch.full_like(keys, math.nan)], 2)[:, :, : keys.shape[2]]
    return keys.transpose(1, 2).contiguous().transpose(1, 2)


def test_rows_that_are_views_of_a_packed_stream_are_written_in_place(tuning: str) -> None:
    for per_query_head in (False, True):
        case = make_case(3, borders=(0, 64, 128, 150), M=400, per_query_head=per_query_head)
        case.q = case.q.transpose(1, 2).contiguous().transpose(1, 2)
        acc = filled(case)
        acc.out = _laid_out(acc.out.flatten(1, 2), "packed").unflatten(1, acc.out.shape[1:3])
        add_block_lists(acc, 0, case.lists)
        torch.testing.assert_close(
            acc.out.flatten(1, 2).double(), oracle(case, case.table)[0], atol=2e-5, rtol=0
        )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("guard", [False, True])
def test_what_a_block_holds_that_nobody_lists_is_never_felt(
    bad: float, where: str, guard: bool, tuning: str
) -> None:
    for seed, density in enumerate([0.2, 0.6, 0.9]):
        case = make_case(seed, borders=(0, 64, 128, 190), M=500, density=density)
        case.table[:, :, 5] = False
        case.lists = lists_from_table(case.table, 32, case.lists.borders)
        getattr(case, where)[:, :, 5 * 32 : 6 * 32] = bad
        check(case, guard=guard)


@pytest.mark.parametrize("where", ["k", "v"])
def test_a_key_that_is_not_a_number_reaches_exactly_the_rows_that_list_it(where: str, tuning: str) -> None:
    for seed, density in enumerate([0.2, 0.6, 0.9]):
        case = make_case(seed, borders=(0, 64, 128, 190), M=500, density=density)
        getattr(case, where)[:, :, 5 * 32 + 7] = math.nan
        spoiled = ~torch.isfinite(run(case).out.flatten(1, 2)).all(-1)
        assert torch.equal(spoiled[0], element_mask(case, case.table)[:, :, 5 * 32 + 7])


def test_uninitialised_memory_is_never_read(tuning: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [
        make_case(seed, borders=borders, M=400) for seed, borders in enumerate([(0, 64, 128, 150), (0, 1)])
    ]
    clean = [run(case, skip=0.01) for case in cases]
    empty, new_empty = torch.empty, Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **kw: empty(*a, **kw).fill_(math.nan))
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *a, **kw: new_empty(self, *a, **kw).fill_(math.nan))
    for case, want in zip(cases, clean, strict=True):
        assert torch.equal(run(case, skip=0.01).out, want.out)


def test_gathered_lists_compute_what_they_keep_and_dense_ones_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(5, borders=(0, 64, 128), M=500, density=0.7)
    acc = check(case)
    assert (acc.computed, acc.dense) == (acc.kept, 0)
    monkeypatch.setattr(block_sparse, "VIEW_ELEMENTS", 1)
    monkeypatch.setattr(block_sparse, "crossover", lambda num_rows: 0.0)
    listed = case.table.nonzero()
    spans = [
        int((rows := listed[(listed[:, 0] == h) & (listed[:, 1] == t), 2]).max() - rows.min() + 1)
        for h in range(2)
        for t in range(2)
    ]
    acc = check(case)
    assert acc.computed == acc.dense == sum(spans) * 32 * 64 * 3 > acc.kept


def test_the_crossover_rises_with_the_rows_that_share_a_copy_and_never_beyond_what_a_mask_costs() -> None:
    shares = [crossover(rows) for rows in (32, 128, 256, 512, 1 << 20)]
    assert shares == sorted(shares)
    assert 0.5 < shares[0] < shares[2] < 1.0 and shares[-1] <= block_sparse.MASK_COST


def test_lists_that_do_not_fit_the_call_are_refused() -> None:
    case = make_case(0, borders=(0, 64, 100), M=300)
    with pytest.raises(ValueError, match="lists for 3 heads, expected 2 key heads or 6 query heads"):
        add_block_lists(filled(case), 0, replace(case.lists, indptr=torch.zeros(3, 3, dtype=torch.int64)))
    with pytest.raises(ValueError, match=r"tiles span rows 0 \.\. 90, the call has 0 \.\. 100"):
        add_block_lists(filled(case), 0, replace(case.lists, borders=(0, 64, 90)))
    with pytest.raises(ValueError, match="outside the 9 whole blocks"):
        add_block_lists(filled(case), 0, replace(case.lists, indices=case.lists.indices + 9))
    with pytest.raises(ValueError, match="skip must lie in"):
        add_block_lists(filled(case), 0, case.lists, skip=1.0)
    empty = accumulator(case.q, case.k, case.v, Call(False, 0.1, 0, 0, 0))
    with pytest.raises(ValueError, match="another part has filled"):
        add_block_lists(empty, 0, case.lists)


def test_a_skip_of_zero_is_no_skip_bit_for_bit() -> None:
    case = make_case(2, borders=(0, 64, 128), M=500)
    plain, zero = filled(case), filled(case)
    add_block_lists(plain, 0, case.lists)
    left = add_block_lists(zero, 0, case.lists, skip=0.0)
    assert left is case.lists
    assert torch.equal(plain.out, zero.out) and torch.equal(plain.lse, zero.lse)
    assert plain.computed == zero.computed


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("per_query_head", [False, True], ids=["key heads", "query heads"])
def test_skipped_blocks_are_those_of_the_definition(causal: bool, per_query_head: bool) -> None:
    skipped = 0
    for seed, (N, M, start) in enumerate([(300, 300, 0), (130, 429, 299), (1, 400, 399), (200, 333, 100)]):
        call = Call(causal, 0.5, 0, 0, start)
        tiles = query_tiles(call, N, M, height=128, block=32)
        q, k, v = make_inputs(1, (6, 2), N, M, 48, seed=seed)
        k[:, :, : M // 32 * 32] *= torch.linspace(0.1, 1.5, M // 32).repeat_interleave(32)[:, None]
        table = tiles.candidates() & (
            torch.rand(6 if per_query_head else 2, tiles.num_tiles, tiles.num_blocks) < 0.7
        )
        lists = lists_from_table(table, 32, tiles.borders)
        for skip in (1e-3, 0.05, 0.6):
            acc = accumulator(q, k, v, call)
            add_spans(acc, plan_for(acc, tiles.own_keys()))
            left = add_block_lists(acc, 0, lists, skip=skip, own=tiles)
            want = _left(q[0], k[0], tiles, table, call, skip)
            assert torch.equal(left.table(tiles.num_blocks), want)
            assert acc.kept == _own_pairs(tiles, N) * 6 + left.listed_pairs() * (1 if per_query_head else 3)
            skipped += int(table.sum() - want.sum())
            plain = accumulator(q, k, v, call)
            add_spans(plain, plan_for(plain, tiles.own_keys()))
            add_block_lists(plain, 0, left)
            torch.testing.assert_close(acc.out, plain.out, atol=0, rtol=0)
    assert skipped > 20


def _own_pairs(tiles: QueryTiles, num_rows: int) -> int:
    return int(_own_mask(tiles, num_rows).sum())


def _own_mask(tiles: QueryTiles, num_rows: int) -> Tensor:
    i, j = torch.arange(num_rows)[:, None] + tiles.start, torch.arange(tiles.num_keys)
    begin = i // tiles.height * tiles.height
    if tiles.causal:
        return (j >= begin) & (j <= i)
    return (j >= begin) & (j < begin + tiles.height) | (j >= tiles.num_keys // tiles.block * tiles.block)


def _left(q: Tensor, k: Tensor, tiles: QueryTiles, table: Tensor, call: Call, skip: float) -> Tensor:
    """The definition, tile by tile."""
    H, N, _ = q.shape
    logits = call.scale * q.double() @ k.double().repeat_interleave(H // len(k), 0).mT
    per_block = logits.unfold(-1, tiles.block, tiles.block).amax(-1)
    own_best = logits.masked_fill(~_own_mask(tiles, N), -math.inf).amax(-1)
    left = table.clone()
    for head, tile in table.any(-1).nonzero().tolist():
        shared = slice(head * H // len(table), (head + 1) * H // len(table))
        listed = table[head, tile].nonzero()[:, 0]
        tops = per_block[shared, tiles.rows(tile)][..., listed]
        best = torch.maximum(tops.amax(-1), own_best[shared, tiles.rows(tile)])
        left[head, tile, listed] = (torch.exp(tops - best[..., None]) >= skip).any(0).any(0)
    return left


def test_a_block_that_is_not_a_number_is_never_skipped() -> None:
    case = make_case(4, borders=(0, 64, 128), M=500, density=1.0)
    case.k[:, :, 3 * 32 + 1] = math.nan
    left = add_block_lists(filled(case), 0, case.lists, skip=0.9)
    assert left.table(15)[:, :, 3].all()


def test_logits_for_skipping_are_made_in_bounded_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = make_inputs(1, (2, 2), 70, 400, 48)
    blocks = torch.tensor([0, 3, 5, 11])
    whole = block_skip.block_tops(q[0, 0], k[0, 0], blocks, 32)
    monkeypatch.setattr(block_skip, "LOGITS_AT_ONCE", 70 * 32)
    torch.testing.assert_close(block_skip.block_tops(q[0, 0], k[0, 0], blocks, 32), whole, atol=1e-6, rtol=0)
    want = (q[0, 0] @ k[0, 0, :384].mT).unflatten(1, (12, 32)).amax(-1)[:, blocks]
    torch.testing.assert_close(whole, want, atol=1e-6, rtol=0)


def test_common_part_and_rest_name_every_listed_block_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_common, "COMMON_KEYS", 64)
    split = 0
    for seed in range(20):
        borders = [(0, 256, 512, 768, 1024, 1280), (0, 100, 356, 612), (0, 384, 768, 900)][seed % 3]
        generator = torch.Generator().manual_seed(seed)
        table = torch.rand(3, len(borders) - 1, 12, generator=generator) < (0.3, 0.8, 0.97)[seed // 7]
        lists = lists_from_table(table, 32, borders)
        parts = block_common.common_and_rest(lists, 1 + seed % 2)
        rows = torch.arange(borders[-1])
        named = sum(_by_row(part, rows).int() for part in parts)
        assert torch.equal(named, _by_row(lists, rows).int())
        assert all(len(part.indices) == int(part.indptr[-1, -1]) for part in parts)
        split += len(parts) - 1
    assert 5 < split < 20


def _by_row(lists: BlockLists, rows: Tensor) -> Tensor:
    tile = torch.bucketize(rows, torch.tensor(lists.borders[1:]), right=True)
    return lists.table(12)[:, tile]
