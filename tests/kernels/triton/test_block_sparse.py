"""The block-sparse kernel against sums written down key by key."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels._triton.block_sparse import Lists, Tiles, block_sparse, tiles_of
from kernels._triton.operands import Keys, Rows, keys_of_call, rows_of
from kernels.contract import Call
from kernels.math.accumulate import accumulator
from kernels.math.block_lists import BlockLists
from kernels.math.block_sparse import add_block_lists
from tests.kernels.triton.agree import DEVICE, operands, poisoned

Seen = list[list[int]]


def _call(impl: str = "triton", scale: float = 0.2) -> Call:
    return Call(causal=False, scale=scale, seed=0, layer=0, start=0, impl=impl)


def _ints(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def _attended(q: Tensor, k: Tensor, v: Tensor, seen: Seen, scale: float) -> tuple[Tensor, Tensor]:
    """One head: row i over the keys seen[i]."""
    out, lse = torch.zeros(len(q), v.shape[-1]), torch.full((len(q),), -math.inf)
    for i, keys in enumerate(seen):
        if keys:
            logits = scale * (k[keys].double() @ q[i].double())
            out[i] = (torch.softmax(logits, 0) @ v[keys].double()).float()
            lse[i] = torch.logsumexp(logits, 0).float()
    return out, lse


def _check(rows: Rows, k: Tensor, v: Tensor, seen: Seen, scale: float, tolerance: float = 1e-5) -> None:
    group = rows.q.shape[1] // k.shape[1]
    for b in range(rows.q.shape[0]):
        for h in range(rows.q.shape[1]):
            told = _attended(rows.q[b, h].cpu(), k[b, h // group].cpu(), v[b, h // group].cpu(), seen, scale)
            torch.testing.assert_close(rows.out[b, h].cpu().float(), told[0], atol=tolerance, rtol=tolerance)
            torch.testing.assert_close(rows.lse[b, h].cpu(), told[1], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scale", [0.2, -0.2, 0.0])
def test_ranges_full_and_masked_entries_add_up(dtype: torch.dtype, scale: float) -> None:
    """Rows 5 .. 9 have tile 1; keys end within an entry; the mask's random bits hide most of another."""
    q, k, v = operands(10, 50, B=2, H=2, Hk=2 if scale else 1, D=20, Dv=24, dtype=dtype)
    bits = np.random.default_rng(0).integers(-(2**31), 2**31, (2, 5, 1))
    table = [[0, 5, 0, 0], [5, 5, 0, 1], [0, 5, 1, 0], [5, 5, 1, 1]]
    lists = Lists(
        32,
        ranges=_ints([[0, 9], [3, 3], [0, 9], [3, 3]]),
        full_indptr=_ints([[0, 1, 2]]),
        full=_ints([[9, 2], [40, 1]]),
        masked_indptr=_ints([[0, 1, 2, 3, 4]]),
        masked=_ints([[10, 2, 0], [0, 1, 1], [10, 2, 0], [0, 1, 1]]),
        masks=_ints(bits.tolist()),
        order=_ints([[3, 1, 0, 2]]),
    )
    with poisoned():
        rows = rows_of(q, 24)
        block_sparse(rows, keys_of_call(k, v, _call()), Tiles(5, _ints(table)), lists, scale=scale)
    seen: Seen = []
    for row in range(10):
        tile = row // 5
        run = range(9) if tile == 0 else range(0)
        full = range(9, 50, 2) if tile == 0 else range(40, 50)
        first, step = ((10, 2), (0, 1))[tile]
        word = int(bits[tile, row % 5, 0])
        masked = [first + n * step for n in range(32) if (word >> n) & 1]
        seen.append([*run, *full, *(j for j in masked if j < 50)])
    _check(rows, k, v, seen, scale, 1e-5 if dtype == torch.float32 else 4e-3)


def test_a_later_part_is_merged_by_log_sum_exp() -> None:
    """Row 1 has no key in the first part and row 2 none in the second; row 3 has none at all."""
    q, k, v = operands(4, 40, D=16)
    parts = [[range(0, 32), range(0), range(3), range(0)], [range(32, 40), range(35, 40), range(0), range(0)]]
    table = _ints([[row, 1, 0, row] for row in range(4)])
    with poisoned():
        rows = rows_of(q, 16, parts=2)
        for part in parts:
            ranges = _ints([[own.start, own.stop] for own in part])
            tiles = Tiles(1, table)
            block_sparse(rows, keys_of_call(k, v, _call()), tiles, Lists(32, ranges=ranges), scale=0.3)
    assert rows.filled
    _check(rows, k, v, [[*one, *other] for one, other in zip(*parts, strict=True)], 0.3)


def test_lists_may_differ_by_query_head() -> None:
    q, k, v = operands(6, 64, H=2, Hk=1, D=16)
    lists = Lists(32, full_indptr=_ints([[0, 1], [1, 3]]), full=_ints([[0, 1], [0, 1], [32, 1]]), whole=True)
    rows = rows_of(q, 16)
    block_sparse(rows, keys_of_call(k, v, _call()), Tiles(6, _ints([[0, 6, 0, 0]])), lists, scale=0.3)
    for head, keys in enumerate((range(32), range(64))):
        told = _attended(q[0, head].cpu(), k[0, 0].cpu(), v[0, 0].cpu(), [list(keys)] * 6, 0.3)
        torch.testing.assert_close(rows.out[0, head].cpu(), told[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(rows.lse[0, head].cpu(), told[1], atol=1e-5, rtol=1e-5)


def test_lists_of_key_heads_serve_groups_too_large_for_one_tile() -> None:
    """72 query heads of each key head would be 144 rows beside each other: every query head goes alone."""
    q, k, v = operands(2, 64, H=144, Hk=2, D=16)
    lists = Lists(32, full_indptr=_ints([[0, 1], [1, 2]]), full=_ints([[0, 1], [32, 1]]), whole=True)
    with poisoned():
        rows = rows_of(q, 16)
        block_sparse(rows, keys_of_call(k, v, _call()), Tiles(2, _ints([[0, 2, 0, 0]])), lists, scale=0.3)
    for head in (0, 71, 72, 143):
        keys = list(range(32) if head < 72 else range(32, 64))
        told = _attended(q[0, head].cpu(), k[0, head // 72].cpu(), v[0, head // 72].cpu(), [keys] * 2, 0.3)
        torch.testing.assert_close(rows.out[0, head].cpu(), told[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(rows.lse[0, head].cpu(), told[1], atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_an_entry_with_a_logit_that_is_no_number_is_never_skipped() -> None:
    q, k, v = operands(4, 64, D=16)
    q, k[..., :32, :], k[..., 32:, :] = torch.ones_like(q), 0.0, -20 / 16
    k[..., 40, :] = math.nan
    lists = Lists(32, full_indptr=_ints([[0, 2]]), full=_ints([[0, 1], [32, 1]]), whole=True)
    rows = rows_of(q, 16)
    tiles = Tiles(4, _ints([[0, 4, 0, 0]]))
    block_sparse(rows, keys_of_call(k, v, _call()), tiles, lists, scale=1.0, skip=1e-4)
    assert rows.out.isnan().all() and rows.lse.isnan().all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_value_that_is_no_number_reaches_the_rows_that_see_it_and_no_others() -> None:
    q, k, v = operands(2, 32, D=16)
    k[..., 7, :], v[..., 7, 3], v[..., 9, 0] = math.nan, math.inf, math.nan
    masks = _ints([[[-1 ^ (1 << 7) ^ (1 << 9)], [-1 ^ (1 << 7)]]])
    lists = Lists(32, masked_indptr=_ints([[0, 1]]), masked=_ints([[0, 1, 0]]), masks=masks)
    rows = rows_of(q, 16)
    block_sparse(rows, keys_of_call(k, v, _call()), Tiles(2, _ints([[0, 2, 0, 0]])), lists, scale=0.3)
    keys = [j for j in range(32) if j not in (7, 9)]
    for head in range(2):
        told = _attended(q[0, head, :1].cpu(), k[0, 0].cpu(), v[0, 0].cpu(), [keys], 0.3)
        torch.testing.assert_close(rows.out[0, head, :1].cpu(), told[0], atol=1e-5, rtol=1e-5)
        assert rows.out[0, head, 1, 0].isnan()


def test_logits_of_a_thousand_stay_finite() -> None:
    q, k, v = operands(3, 33, D=16)
    q, k = 1e3 * torch.ones_like(q) / 16, torch.ones_like(k)
    k[..., ::2, :] = -1.0
    rows = rows_of(q, 16)
    lists = Lists(32, ranges=_ints([[0, 33]]))
    block_sparse(rows, keys_of_call(k, v, _call()), Tiles(3, _ints([[0, 3, 0, 0]])), lists, scale=1.0)
    _check(rows, k, v, [list(range(33))] * 3, 1.0, 2e-4)


def test_skip_leaves_out_only_what_is_far_below_what_was_seen() -> None:
    """The second entry's logits lie 20 below the first's, the third's 1: exp(-20) < 1e-4 < exp(-1)."""
    q, k, v = operands(4, 96, D=16)
    q = torch.ones_like(q)
    for entry, logit in enumerate((0.0, -20.0, -1.0)):
        k[..., 32 * entry : 32 * entry + 32, :] = logit / 16
    lists = Lists(32, full_indptr=_ints([[0, 3]]), full=_ints([[0, 1], [32, 1], [64, 1]]), whole=True)
    rows = rows_of(q, 16)
    keys = keys_of_call(k, v, _call())
    block_sparse(rows, keys, Tiles(4, _ints([[0, 4, 0, 0]])), lists, scale=1.0, skip=1e-4)
    _check(rows, k, v, [[*range(32), *range(64, 96)]] * 4, 1.0)
    with pytest.raises(ValueError, match="skip must lie in 0 <= skip < 1, got 1.5"):
        block_sparse(rows, keys, Tiles(4, _ints([[0, 4, 0, 0]])), lists, scale=1.0, skip=1.5)


def test_keys_of_any_layout_are_read_where_they_lie() -> None:
    """Heads that alternate, and keys that begin at an odd element."""
    q, k, v = operands(5, 33, H=2, Hk=2, D=16)
    k = torch.zeros(1, 33, 2, 17, device=DEVICE)[..., 1:].transpose(1, 2).copy_(k)
    v = v.transpose(1, 2).contiguous().transpose(1, 2)
    keys = keys_of_call(k, v, _call())
    assert isinstance(keys, Keys) and not keys.aligned
    rows = rows_of(q, 16)
    block_sparse(rows, keys, Tiles(5, _ints([[0, 5, 0, 0]])), Lists(32, ranges=_ints([[0, 33]])), scale=0.3)
    _check(rows, k, v, [list(range(33))] * 5, 0.3)


def test_kernel_tiles_cut_selection_tiles_and_keep_their_lists() -> None:
    tiles = tiles_of([0, 5, 12, 13], 4, torch.device(DEVICE), num_sequences=2)
    told = [[0, 4, 0, 0], [4, 1, 0, 0], [5, 4, 0, 1], [9, 3, 0, 1], [12, 1, 0, 2]]
    assert tiles.table.tolist() == told + [[row, num, 1, own + 3] for row, num, _, own in told]


@pytest.mark.parametrize("heads", [2, 4])
def test_block_lists_are_added_as_by_torch(heads: int) -> None:
    q, k, v = operands(21, 130, H=4, Hk=2, D=16, seed=heads)
    generator = torch.Generator().manual_seed(heads)
    table = torch.rand(heads, 3, 4, generator=generator) < 0.5
    ends = table.sum(-1).flatten().cumsum(0)
    begins = torch.cat([ends.new_zeros(1), ends[:-1]]).view(heads, 3)
    indptr = torch.cat([begins, ends.view(heads, 3)[:, -1:]], 1)
    lists = BlockLists(32, (0, 8, 16, 21), indptr, table.nonzero()[:, 2].int())
    found = []
    for impl in ("triton", "torch"):
        acc = accumulator(q, k, v, _call(impl))
        acc.out.fill_(0.5)
        acc.lse.fill_(1.0)
        acc.complete(0, 0)
        add_block_lists(acc, 0, lists)
        found.append(acc)
    torch.testing.assert_close(found[0].out, found[1].out, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(found[0].lse, found[1].lse, atol=2e-5, rtol=2e-5)
    assert found[0].kept == found[1].kept > 0
