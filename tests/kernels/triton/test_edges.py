"""Softmax over edge lists by the kernel, held against impl torch and against what lists mean."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels._triton.edges import EdgeLists, EdgeRows, attend_edges, merge_launch, softmax_launch
from kernels._triton.operands import keys_of_call
from kernels.contract import Call
from kernels.math import edges as by_torch
from tests.kernels.triton.agree import TOLERANCE, operands, poisoned

CALL = Call(causal=True, scale=0.3, seed=0, layer=0, start=0, impl="triton")
COUNTS = [0, 1, 9, 90, 8, 0, 17, 2, 40]


def rows_of(q: Tensor, v: Tensor) -> EdgeRows:
    heads = v.shape[1]
    grouped = q.unflatten(1, (heads, q.shape[1] // heads))
    with poisoned():
        out = torch.empty(*grouped.shape[:-1], v.shape[-1], device=q.device)
        return EdgeRows(grouped, out, torch.empty(grouped.shape[:-1], device=q.device))


def equal_lists(q: Tensor, M: int, E: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """edges int32 [H, N, E] and which of them do not count: a whole row of them, too."""
    generator = torch.Generator().manual_seed(seed)
    edges = torch.randint(0, M, (*q.shape[1:3], E), generator=generator).int()
    drop = torch.rand(edges.shape, generator=generator) < 0.3
    drop[:, 3] = True
    return edges.to(q.device), drop.to(q.device)


def ragged_lists(M: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """edges int32 [n] and ends int64 [lines + 1] of lists as long as COUNTS says."""
    generator = torch.Generator().manual_seed(seed)
    lists = [torch.randperm(M, generator=generator)[:count] for count in COUNTS]
    ends = torch.tensor([0, *COUNTS]).cumsum(0)
    return torch.cat(lists).int(), ends


def close(rows: EdgeRows, out: Tensor, lse: Tensor, dtype: torch.dtype = torch.float32) -> None:
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(rows.out.flatten(1, 2)[0], out, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(rows.lse.flatten(1, 2)[0], lse, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("E", "D", "Dv"), [(1, 16, 16), (21, 24, 40)])
def test_equal_lists_are_what_impl_torch_computes(E: int, D: int, Dv: int, dtype: torch.dtype) -> None:
    q, k, v = operands(37, 50, H=4, Hk=2, D=D, Dv=Dv, dtype=dtype)
    edges, drop = equal_lists(q, 50, E)
    rows, (H, N) = rows_of(q, v), q.shape[1:3]
    lists = EdgeLists(edges.masked_fill(drop, -1).view(H * N, E), (0, 2 * N, N))
    attend_edges(rows, keys_of_call(k, v, CALL), lists, scale=0.3)
    told = [
        by_torch.attend_edges(
            q[0, h].float(), k[0, h // 2].float(), v[0, h // 2].float(), edges[h], drop[h], 0.3
        )
        for h in range(H)
    ]
    close(rows, torch.stack([out for out, _ in told]), torch.stack([lse for _, lse in told]), dtype)


def test_parts_are_merged_by_their_log_sum_exp_whatever_the_strides() -> None:
    q, k, v = operands(10, 30)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    edges = torch.stack([torch.randperm(30)[:12] for _ in range(20)]).int().to(q.device)
    edges[4] = -1
    edges[7, :6] = -1
    first, both, keys = rows_of(q, v), rows_of(q, v), keys_of_call(k, v, CALL)
    lines = (0, 20, 10)
    attend_edges(both, keys, EdgeLists(edges, lines), scale=0.3)
    attend_edges(first, keys, EdgeLists(edges[:, :6].contiguous(), lines), scale=0.3)
    filled = EdgeRows(first.q, first.out, first.lse, filled=True)
    attend_edges(filled, keys, EdgeLists(edges[:, 6:].contiguous(), lines), scale=0.3)
    close(first, both.out.flatten(1, 2)[0], both.lse.flatten(1, 2)[0])


@pytest.mark.parametrize("splits", [1, 3])
def test_ragged_lists_are_what_impl_torch_computes_in_any_number_of_parts(splits: int) -> None:
    q, k, v = operands(len(COUNTS), 120, H=1)
    edges, ends = (x.to(q.device) for x in ragged_lists(120))
    rows, keys = rows_of(q, v), keys_of_call(k, v, CALL)
    lists = EdgeLists(edges, (0, 0, 0), ends[:-1].contiguous(), ends.diff().int(), longest=90)
    if splits == 1:
        softmax_launch(rows, keys, lists, scale=0.3).run()
    else:
        with poisoned():
            out, lse = torch.empty(splits, *rows.out.shape), torch.empty(splits, *rows.lse.shape)
        part = EdgeRows(rows.q, out.to(q.device), lse.to(q.device))
        softmax_launch(part, keys, lists, scale=0.3, splits=splits).run()
        merge_launch(part.out, part.lse, rows.out, rows.lse).run()
    told, told_lse = by_torch.attend_ragged(q[0, 0], k[0, 0], v[0, 0], ends, edges, 0.3)
    close(rows, told[None], told_lse[None])
    assert bool((rows.lse[0, 0, 0, torch.tensor(COUNTS) == 0] == -math.inf).all())


def test_a_long_list_of_one_row_goes_to_several_programs_and_joins_what_is_there() -> None:
    q, k, v = operands(1, 520)
    every = torch.arange(520, dtype=torch.int32, device=q.device).expand(2, -1).contiguous()
    rows, whole, keys = rows_of(q, v), rows_of(q, v), keys_of_call(k, v, CALL)
    attend_edges(whole, keys, EdgeLists(every, (0, 2, 1)), scale=0.3)
    attend_edges(rows, keys, EdgeLists(every[:, :8].contiguous(), (0, 2, 1)), scale=0.3)
    filled = EdgeRows(rows.q, rows.out, rows.lse, filled=True)
    attend_edges(filled, keys, EdgeLists(every[:, 8:].contiguous(), (0, 2, 1)), scale=0.3)
    softmax = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(rows.out.flatten(1, 2), softmax, atol=2e-5, rtol=2e-5)
    close(rows, whole.out.flatten(1, 2)[0], whole.lse.flatten(1, 2)[0])


def test_a_key_that_no_list_names_is_not_felt_and_one_that_is_named_is() -> None:
    q, k, v = operands(6, 20, H=1)
    k[0, 0, 7], v[0, 0, 7] = math.nan, math.inf
    edges = torch.full((6, 3), 5, dtype=torch.int32, device=q.device)
    edges[:, 1] = -1
    edges[2, 2] = 7
    rows = rows_of(q, v)
    attend_edges(rows, keys_of_call(k, v, CALL), EdgeLists(edges, (0, 6, 6)), scale=0.3)
    broken = rows.out[0, 0, 0].isnan().any(-1)
    assert broken.tolist() == [False, False, True, False, False, False]


def test_huge_logits_stay_finite() -> None:
    q, k, v = operands(5, 20, H=1)
    q[0, 0] = 100.0 * q[0, 0]
    edges, drop = equal_lists(q, 20, 9)
    rows = rows_of(q, v)
    attend_edges(
        rows, keys_of_call(k, v, CALL), EdgeLists(edges.masked_fill(drop, -1)[0], (0, 5, 5)), scale=3.0
    )
    told, lse = by_torch.attend_edges(q[0, 0], k[0, 0], v[0, 0], edges[0], drop[0], 3.0)
    assert float(lse[lse > -math.inf].abs().max()) > 1e3
    torch.testing.assert_close(rows.out[0, 0, 0], told, atol=1e-3, rtol=1e-3)
