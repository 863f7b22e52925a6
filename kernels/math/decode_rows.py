"""The one-row segments of a packed call together: a decode step of many sequences.

    out_s = softmax(scale q_s K_s[runs of row s]^T) V_s[runs of row s]        for every segment s

What a short sequence's row costs is calls, not arithmetic. So queries are cast, scaled and grouped for all at
once, rows are looked up once, the G query heads of a key head are rows of one product, and a row whose keys
are one run is a single call of torch's kernel (about as fast as plain products at every length, and a third
of their calls). Log-sum-exps are not computed: a packed call returns none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernels.contract import Call, PackedResult, Segment, Stats
from kernels.math.decode import attend_row, scores_of_runs, values_of_runs
from kernels.math.dense import accumulator_dtype
from kernels.math.spans import RowRuns, SpanPattern, row_runs


def decode_spans(q: Tensor, segments: Sequence[Segment], pattern: SpanPattern, call: Call) -> PackedResult:
    """Rows of a causal pattern that is nothing but spans; q and result as ``contract.DecodeRows`` says."""
    return decode_runs(q, segments, lambda position: row_runs(pattern, position), call)


def decode_runs(
    q: Tensor,
    segments: Sequence[Segment],
    runs_of: Callable[[int], RowRuns],
    call: Call,
    *,
    nothing_dropped: bool = False,
) -> PackedResult:
    """The same with the keys of the row at a position as ``runs_of`` says. ``nothing_dropped``: every row
    keeps every key, and says so."""
    began = perf_counter()
    plans = [runs_of(segment.start) for segment in segments]
    planned = perf_counter()
    out = (_by_kernels if call.impl == "triton" else _by_calls)(q, segments, plans, call.scale)
    kept = [plan.kept * q.shape[1] for plan in plans]
    spent = planned - began, perf_counter() - planned
    stats = stats_of_rows(q, segments, kept, kept, *spent, nothing_dropped, impl=call.impl)
    dropped: tuple[Tensor | None, ...] = (None,) * len(segments)
    if nothing_dropped:
        dropped = (q.new_zeros(1, q.shape[1], 1, dtype=torch.float32),) * len(segments)
    return PackedResult(out, stats, dropped)


def _by_calls(q: Tensor, segments: Sequence[Segment], plans: Sequence[RowRuns], scale: float) -> Tensor:
    queries = queries_of(q, segments[0].k.shape[1])
    parts = [
        _row(query, segment.k, segment.v, plan.runs, scale)
        for query, segment, plan in zip(queries, segments, plans, strict=True)
    ]
    return packed_rows(parts, q.dtype)


def _by_kernels(q: Tensor, segments: Sequence[Segment], plans: Sequence[RowRuns], scale: float) -> Tensor:
    from kernels._triton.paged_rows import attend_runs

    return attend_runs(q, segments, [plan.runs for plan in plans], scale)[0]


def queries_of(q: Tensor, num_key_heads: int) -> tuple[Tensor, ...]:
    """[1, H, S, D] -> S times [1, Hk, G, D], in the accumulator's dtype."""
    rows = q[0].transpose(0, 1).to(accumulator_dtype(q.dtype))
    return torch.unflatten(rows, 1, (num_key_heads, -1)).unsqueeze(1).unbind(0)


def packed_rows(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """S times [1, Hk, G, Dv] -> [1, H, S, Dv], a row's heads next to each other in memory."""
    return torch.cat(list(parts)).flatten(1, 2).to(dtype).transpose(0, 1).unsqueeze(0)


def stats_of_rows(
    q: Tensor,
    segments: Sequence[Segment],
    kept: Sequence[int],
    computed: Sequence[int],
    selection_s: float,
    compute_s: float,
    nothing_dropped: bool = False,
    *,
    impl: str = "torch",
) -> tuple[Stats, ...]:
    """Of each row, from its pairs over all heads; the time was spent on all alike."""
    num_heads, share = q.shape[1], 1e3 / len(segments)
    dropped_mass = 0.0 if nothing_dropped else None
    return tuple(
        Stats(
            pairs_kept=own,
            pairs_exact=num_heads * (segment.start + 1),
            pairs_computed=read,
            selection_ms=selection_s * share,
            compute_ms=compute_s * share,
            impl=impl,
            dropped_mass=dropped_mass,
        )
        for segment, own, read in zip(segments, kept, computed, strict=True)
    )


def row_with_lse(
    query: Tensor, k: Tensor, v: Tensor, runs: Sequence[slice], scale: float
) -> tuple[Tensor, Tensor]:
    """query [1, Hk, G, D] over at least one run of k [1, Hk, M, D], v [1, Hk, M, Dv] -> out [1, Hk, G, Dv],
    lse [1, Hk, G]."""
    if not _is_one_call(query, v, runs):
        out, lse = attend_row(query.unsqueeze(3), k, v, runs, scale)
        return out[:, :, :, 0], lse[:, :, :, 0]
    part: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, *_keys_of_run(query, k, v, runs[0]), 0.0, False, attn_mask=None, scale=scale
    )
    return part


def _row(query: Tensor, k: Tensor, v: Tensor, runs: Sequence[slice], scale: float) -> Tensor:
    """The same without lse; zeros where there is no run."""
    if not runs:
        return query.new_zeros(*query.shape[:3], v.shape[-1])
    if not _is_one_call(query, v, runs):
        weights = torch.softmax(scores_of_runs(query[0] * scale, k[0], runs), -1)
        return values_of_runs(weights, v[0], runs).unsqueeze(0)
    return scaled_dot_product_attention(query, *_keys_of_run(query, k, v, runs[0]), scale=scale)


def _is_one_call(query: Tensor, v: Tensor, runs: Sequence[slice]) -> bool:
    return len(runs) == 1 and query.device.type == "cpu" and query.shape[-1] == v.shape[-1]


def _keys_of_run(query: Tensor, k: Tensor, v: Tensor, run: slice) -> tuple[Tensor, Tensor]:
    if run.start or run.stop != k.shape[2] or run.step != 1:
        k, v = k[:, :, run], v[:, :, run]
    if k.dtype != query.dtype:
        k, v = k.to(query.dtype), v.to(query.dtype)
    return k, v
