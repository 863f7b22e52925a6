"""Drawn keys of the one-row segments of a packed call together: decode of random and bigbird.

    S_sh = keys drawn by row s and head h (``random_keys``) that the base does not have
    out_s = merge of base(row s) and softmax(scale q_sh K_s[S_sh]^T) V_s[S_sh]

Drawing, sorting and sorting out take a few dozen small operations, whatever the number of rows: here they are
done once for all. Keys are gathered segment by segment into one buffer of bounded size, and the products over
it are one call for all segments.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.contract import Call, PackedResult, Segment
from kernels.math.decode_rows import packed_rows, queries_of, row_with_lse, stats_of_rows
from kernels.math.merge import merge_into
from kernels.math.random_keys import Ints, RandomParams, draws_of_rows
from kernels.math.spans import RowRuns, SpanPattern, row_runs

GATHERED_BYTES = 8 << 20
"""Keys gathered at once, and as many values, unless one segment's are more."""
_NOTHING = RowRuns((), 0)


@dataclass(frozen=True)
class _Drawn:
    """Of every segment: keys ``edges`` int64 [S, h, E] drawn by h heads (query heads, or key heads where
    whole blocks are drawn), ``drop`` [S, h, E] where one does not count, and the key head of each of h."""

    edges: Ints
    drop: npt.NDArray[np.bool_]
    key_head: Ints

    def kept(self, rows_per_head: int) -> list[int]:
        """Pairs that count, per segment, over all query heads."""
        counts = (~self.drop).sum((1, 2)) * rows_per_head
        return [int(count) for count in counts]


def decode_random(
    q: Tensor, segments: Sequence[Segment], params: RandomParams, base: SpanPattern | None, call: Call
) -> PackedResult | None:
    """q and result as ``contract.DecodeRows`` says; impl torch on a CPU only. Without a base every row also
    keeps itself (block_size 1 only)."""
    if q.device.type != "cpu" and call.impl != "triton":
        return None
    began = perf_counter()
    Hk, H = segments[0].k.shape[1], q.shape[1]
    plans = [_NOTHING if base is None else row_runs(base, segment.start) for segment in segments]
    drawn = _drawn(H, Hk, segments, params, plans, call, itself=base is None)
    planned = perf_counter()
    out = (_by_kernels if call.impl == "triton" else _by_calls)(q, segments, plans, drawn, base, call.scale)
    per_head = len(drawn.key_head)
    read = drawn.edges.shape[1] * drawn.edges.shape[2] * (H // per_head)
    kept = [H * plan.kept + more for plan, more in zip(plans, drawn.kept(H // per_head), strict=True)]
    computed = [H * plan.kept + read for plan in plans]
    spent = planned - began, perf_counter() - planned
    stats = stats_of_rows(q, segments, kept, computed, *spent, impl=call.impl)
    return PackedResult(out, stats, (None,) * len(segments))


def _by_calls(
    q: Tensor,
    segments: Sequence[Segment],
    plans: Sequence[RowRuns],
    drawn: _Drawn,
    base: SpanPattern | None,
    scale: float,
) -> Tensor:
    queries = queries_of(q, segments[0].k.shape[1])
    out, lse = _over_drawn(torch.cat(queries), segments, drawn, scale)
    if base is not None:
        merge_into(out, lse, *_over_base(queries, segments, plans, scale))
    return packed_rows((out,), q.dtype)


def _by_kernels(
    q: Tensor,
    segments: Sequence[Segment],
    plans: Sequence[RowRuns],
    drawn: _Drawn,
    base: SpanPattern | None,
    scale: float,
) -> Tensor:
    from kernels._triton.paged_rows import attend_drawn

    listed = np.where(drawn.drop, -1, drawn.edges).astype(np.int32)
    return attend_drawn(q, segments, [plan.runs for plan in plans], torch.from_numpy(listed), scale)


def _drawn(
    num_heads: int,
    num_key_heads: int,
    segments: Sequence[Segment],
    params: RandomParams,
    plans: Sequence[RowRuns],
    call: Call,
    itself: bool,
) -> _Drawn:
    """Draw for all rows, ascending, and mark repeats and what the base has."""
    L, seeds = params.block_size, [segment.seed for segment in segments]
    rows = np.array([segment.start for segment in segments], dtype=np.int64)
    if L == 1:
        edges = draws_of_rows(call.layer, seeds, rows, num_heads, params.num_random, blocks=False)
        if itself:
            own = np.broadcast_to(rows[:, None, None], (*edges.shape[:2], 1))
            edges = np.concatenate([edges, own], -1)
        edges.sort(-1)
        drop = _repeats(edges)
        key_head = np.arange(num_heads) // (num_heads // num_key_heads)
    else:
        blocks = draws_of_rows(
            call.layer, seeds, rows // L, num_key_heads, params.num_random // L, blocks=True
        )
        blocks.sort(-1)
        drop = np.repeat(_repeats(blocks) | (blocks < 0), L, axis=-1)
        edges = (blocks[..., None] * L + np.arange(L)).reshape(*blocks.shape[:2], -1)
        key_head = np.arange(num_key_heads)
    for lo, hi in _bounds(plans):
        drop |= (edges >= lo) & (edges < hi)
    # what does not count is read all the same, at weight 0: it must be a key that the row may see
    return _Drawn(np.where(drop, rows[:, None, None], edges), drop, key_head)


def _repeats(ascending: Ints) -> npt.NDArray[np.bool_]:
    found = np.zeros(ascending.shape, dtype=np.bool_)
    found[..., 1:] = ascending[..., 1:] == ascending[..., :-1]
    return found


def _bounds(plans: Sequence[RowRuns]) -> Iterator[tuple[Ints, Ints]]:
    """The first runs of all rows, the second, ... as bounds [S, 1, 1]; 0..0 where a row has no more."""
    for turn in range(max(len(plan.runs) for plan in plans)):
        runs = [plan.runs[turn] if turn < len(plan.runs) else slice(0, 0) for plan in plans]
        lo, hi = (
            np.array(ends)[:, None, None] for ends in zip(*((r.start, r.stop) for r in runs), strict=True)
        )
        yield lo, hi


def _over_drawn(
    queries: Tensor, segments: Sequence[Segment], drawn: _Drawn, scale: float
) -> tuple[Tensor, Tensor]:
    """queries [S, Hk, G, D] over the drawn keys -> out [S, Hk, G, Dv], lse [S, Hk, G]; 0 and -inf where none
    counts."""
    S, num_heads = drawn.edges.shape[:2]
    rows = queries.reshape(S * num_heads, -1, queries.shape[-1]) * scale
    drop = torch.from_numpy(drawn.drop.reshape(S * num_heads, 1, -1))
    parts = [
        _over_gathered(rows[some], segments[own], drawn.edges[own], drawn.key_head, drop[some])
        for own, some in _turns(segments, drawn.edges[0].size, num_heads)
    ]
    out, lse = (torch.cat(each) for each in zip(*parts, strict=True))
    shape = queries.shape[:3]
    return out.view(*shape, -1), lse.view(shape)


def _turns(segments: Sequence[Segment], num_edges: int, num_heads: int) -> Iterator[tuple[slice, slice]]:
    """Segments whose keys are gathered together, and their rows."""
    k = segments[0].k
    at_once = max(1, GATHERED_BYTES // (num_edges * k.shape[3] * k.itemsize))
    for first in range(0, len(segments), at_once):
        stop = min(first + at_once, len(segments))
        yield slice(first, stop), slice(first * num_heads, stop * num_heads)


def _over_gathered(
    rows: Tensor, segments: Sequence[Segment], edges: Ints, key_head: Ints, drop: Tensor
) -> tuple[Tensor, Tensor]:
    """rows [S * h, g, D], scaled -> out [S * h, g, Dv], lse [S * h, g]."""
    keys = _gathered([segment.k for segment in segments], edges, key_head).to(rows.dtype)
    scores = torch.bmm(rows, keys.mT).masked_fill_(drop, -math.inf)
    lse = torch.logsumexp(scores, -1)
    weights = scores.sub_(lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1)).exp_()
    values = _gathered([segment.v for segment in segments], edges, key_head).to(rows.dtype)
    return torch.bmm(weights, values), lse


def _gathered(keys: Sequence[Tensor], edges: Ints, key_head: Ints) -> Tensor:
    """S times [1, Hk, M, D] at edges [S, h, E] of the heads ``key_head`` [h] -> [S * h, E, D]."""
    tables = [_table(one) for one in keys]
    steps = np.array([step for _, step in tables], dtype=np.int64)[:, :, None, None]
    indices = torch.from_numpy((edges * steps[:, 0] + key_head[:, None] * steps[:, 1]).reshape(len(keys), -1))
    found = keys[0].new_empty(*indices.shape, keys[0].shape[3])
    for (table, _), index, to in zip(tables, indices.unbind(), found.unbind(), strict=True):
        torch.index_select(table, 0, index, out=to)
    return found.view(-1, edges.shape[2], found.shape[2])


def _table(keys: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """[1, Hk, M, D] as rows of D numbers, a view wherever rows lie at multiples of D, and how many rows on
    the next key and the next head are."""
    _, Hk, M, D = keys.shape
    _, per_head, per_key, _ = keys.stride()
    if per_head % D or per_key % D:
        keys = keys.contiguous()
        _, per_head, per_key, _ = keys.stride()
    head, key = per_head // D, per_key // D
    num_rows = (Hk - 1) * head + (M - 1) * key + 1
    return keys.as_strided((num_rows, D), (D, 1)), (key, head)


def _over_base(
    queries: Sequence[Tensor], segments: Sequence[Segment], plans: Sequence[RowRuns], scale: float
) -> tuple[Tensor, Tensor]:
    """Rows over the base's runs -> out [S, Hk, G, Dv], lse [S, Hk, G]."""
    parts = [
        row_with_lse(query, segment.k, segment.v, plan.runs, scale)
        for query, segment, plan in zip(queries, segments, plans, strict=True)
    ]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])
