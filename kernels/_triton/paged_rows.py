"""Decode of rows whose keys are known before any score: runs, and keys drawn at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kernels._triton.operands import keys_of_segments
from kernels._triton.paged_decode import Pages, Queries, decode
from kernels._triton.paged_plan import Run, plan_runs
from kernels.contract import Segment
from kernels.math.merge import merge_into


def packed_queries(q: Tensor, num_key_heads: int) -> Queries:
    """[1, H, S, D] as S rows."""
    return Queries(torch.unflatten(q[0].transpose(0, 1), 1, (num_key_heads, -1)), q.dtype)


def packed_out(out: Tensor) -> Tensor:
    """[S, H, Dv] -> [1, H, S, Dv], a view: a row's heads next to each other in memory."""
    return out.transpose(0, 1).unsqueeze(0)


def runs_of_slices(row: int, slices: Sequence[slice]) -> list[Run]:
    """The runs of one row."""
    return [
        (row, one.start, one.step or 1, len(range(one.start, one.stop, one.step or 1)), -1) for one in slices
    ]


def attend_runs(
    q: Tensor, segments: Sequence[Segment], slices: Sequence[Sequence[slice]], scale: float
) -> tuple[Tensor, Tensor]:
    """q [1, H, S, D], whose row s keeps the keys of slices[s] -> out [1, H, S, Dv], lse [S, H]."""
    keys = keys_of_segments(segments)
    plan = plan_runs(_runs(slices), len(segments), keys.num_heads, q.device)
    out, lse = decode(packed_queries(q, keys.num_heads), keys, plan, scale)
    return packed_out(out), lse


def attend_drawn(
    q: Tensor, segments: Sequence[Segment], slices: Sequence[Sequence[slice]], drawn: Tensor, scale: float
) -> Tensor:
    """The same where each head of row s also keeps keys drawn[s] of its own: int32 [S, Hk or H, n], -1 for
    none, on the CPU -> out alone. Lists of query heads take a launch of their own beside the runs'."""
    keys = keys_of_segments(segments)
    pages = Pages(drawn.to(q.device, non_blocking=True), 1)
    lists = [(row, 0, 1, drawn.shape[2], row) for row in range(len(segments))]
    queries, runs = packed_queries(q, keys.num_heads), _runs(slices)
    if not runs or drawn.shape[1] == keys.num_heads:
        plan = plan_runs(sorted(runs + lists, key=_row), len(segments), drawn.shape[1], q.device)
        return packed_out(decode(queries, keys, plan, scale, pages)[0])
    wide = replace(queries, dtype=torch.float32)
    out, lse = decode(wide, keys, plan_runs(runs, len(segments), keys.num_heads, q.device), scale)
    plan = plan_runs(lists, len(segments), drawn.shape[1], q.device)
    merge_into(out, lse, *decode(wide, keys, plan, scale, pages))
    return packed_out(out.to(q.dtype))


def _runs(slices: Sequence[Sequence[slice]]) -> list[Run]:
    return [run for row, own in enumerate(slices) for run in runs_of_slices(row, own)]


def _row(run: Run) -> int:
    return run[0]


def attend_row(
    q: Tensor, k: Tensor, v: Tensor, slices: Sequence[slice], scale: float
) -> tuple[Tensor, Tensor]:
    """q [B, Hk, G, 1, D] over k [B, Hk, M, D], v [B, Hk, M, Dv], of which every row keeps ``slices`` -> out
    [B, Hk, G, 1, Dv] and lse [B, Hk, G, 1], fp32."""
    B, Hk, G = q.shape[:3]
    keys = keys_of_segments([Segment(slice(b, b + 1), k[b : b + 1], v[b : b + 1], 0) for b in range(B)])
    runs = [run for row in range(B) for run in runs_of_slices(row, slices)]
    plan = plan_runs(runs, B, Hk, q.device)
    out, lse = decode(Queries(q[:, :, :, 0], torch.float32), keys, plan, scale)
    return out.view(B, Hk, G, 1, -1), lse.view(B, Hk, G, 1)
