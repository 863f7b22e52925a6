"""Keys that rows draw one by one, drawn and attended to on the device: random and bigbird at block_size 1.

Rows are taken in stretches, so that their edges fit in EDGES_AT_ONCE numbers. How many pairs were kept is
read back once, when everything has been launched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from kernels._triton.edges import EdgeLists, EdgeRows, attend_edges
from kernels._triton.edges_draw import Drawing, draw
from kernels._triton.operands import Keys, keys_of_call, keys_of_segments, rows_of
from kernels.contract import Call, PackedResult, Segment, Stats
from kernels.math.accumulate import Accumulator
from kernels.math.cache import PLANS
from kernels.math.random_keys import row_streams
from kernels.math.spans import SpanPattern

EDGES_AT_ONCE = 1 << 24
ALIGNED_ROWS = 16
"""Stretches begin at multiples of it: their slices are as aligned as the whole, and compile nothing anew."""


def add_random_edges(acc: Accumulator, num_random: int, base: SpanPattern | None) -> None:
    """Add the draws of every row, but those that ``base`` has; without a base also the row itself."""
    call, num_rows = acc.call, acc.q.shape[-2]
    heads = acc.q.shape[1] * acc.q.shape[2]
    began = perf_counter()
    drawing = Drawing(
        streams=row_streams(call.layer, [call.seed], heads, acc.q.device),
        num_rows=num_rows,
        num_random=num_random,
        num_keys=acc.k.shape[2],
        causal=call.causal,
        itself=base is None,
        start=call.start,
        spans=None if base is None else _bounds(acc, base),
    )
    acc.selection_s += perf_counter() - began
    rows = EdgeRows(acc.q, acc.out, acc.lse, acc.filled)
    kept = _over_draws(rows, keys_of_call(acc.k, acc.v, call), drawing, call.scale)
    batch = acc.q.shape[0]
    acc.complete(batch * int(kept.sum()), batch * heads * num_rows * drawing.width)


def _over_draws(rows: EdgeRows, keys: Keys, drawing: Drawing, scale: float) -> Tensor:
    """Draw and attend, some rows at a time; pairs that count, int64 [N]."""
    num_rows, group = drawing.num_rows, rows.q.shape[2]
    step = max(ALIGNED_ROWS, EDGES_AT_ONCE // (drawing.streams.shape[1] * drawing.width))
    step = step // ALIGNED_ROWS * ALIGNED_ROWS
    kept = []
    for a in range(0, num_rows, step):
        b = min(a + step, num_rows)
        edges, counts = draw(_stretch(drawing, a, b))
        lists = EdgeLists(edges, (0, group * (b - a), b - a))
        some = replace(
            rows,
            q=rows.q[..., a:b, :],
            out=rows.out[..., a:b, :],
            lse=rows.lse[..., a:b],
            sequence=None if rows.sequence is None else rows.sequence[a:b],
        )
        attend_edges(some, keys, lists, scale=scale)
        kept.append(counts.sum(0))
    return torch.cat(kept)


def _stretch(drawing: Drawing, a: int, b: int) -> Drawing:
    if b - a == drawing.num_rows:
        return drawing
    return replace(
        drawing,
        num_rows=b - a,
        start=drawing.start + a,
        positions=None if drawing.positions is None else drawing.positions[a:b],
        sequence=None if drawing.sequence is None else drawing.sequence[a:b],
        spans=None if drawing.spans is None else drawing.spans[..., a:b].contiguous(),
    )


def _bounds(acc: Accumulator, base: SpanPattern) -> Tensor:
    """The base's spans as int32 [s, 2, N] on the device, cached: every layer asks again."""
    start, num_rows, device = acc.call.start, acc.q.shape[-2], acc.q.device
    num_keys = start + num_rows if acc.call.causal else acc.k.shape[2]

    def build() -> Tensor:
        rows = np.arange(start, start + num_rows, dtype=np.int64)
        spans = base.spans(rows, num_keys)
        return torch.from_numpy(np.stack([np.stack([x.lo, x.hi]) for x in spans]).astype(np.int32)).to(device)

    return PLANS.get(("span bounds", base.key, acc.call.causal, start, num_rows, num_keys, device), build)


def add_shared_row(acc: Accumulator, edges: Tensor, drop: Tensor, began: float) -> None:
    """One row over keys [Hk, P] that the heads of a group share, without those of ``drop`` [Hk, P]."""
    batch, _, group = acc.q.shape[:3]
    acc.selection_s += perf_counter() - began
    lists = EdgeLists(edges.masked_fill(drop, -1).int(), (0, 1, 0))
    rows = EdgeRows(acc.q, acc.out, acc.lse, acc.filled)
    attend_edges(rows, keys_of_call(acc.k, acc.v, acc.call), lists, scale=acc.call.scale)
    kept = group * (drop.numel() - int(drop.sum()))
    acc.complete(batch * kept, batch * group * drop.numel())


def prefill_random_edges(q: Tensor, segments: Sequence[Segment], num_random: int, call: Call) -> PackedResult:
    """Segments of a packed call, each row over itself and its draws. q and result as
    ``contract.PrefillRows`` says."""
    began = perf_counter()
    heads, device, num_rows = q.shape[1], q.device, q.shape[2]
    keys = keys_of_segments(segments)
    sequence, positions = (x.to(device, non_blocking=True) for x in _places(segments, num_rows))
    drawing = Drawing(
        streams=row_streams(call.layer, [segment.seed for segment in segments], heads, device),
        num_rows=num_rows,
        num_random=num_random,
        num_keys=0,
        causal=True,
        itself=True,
        positions=positions,
        sequence=sequence,
    )
    planned = perf_counter()
    rows = rows_of(q, keys.value_dim, parts=1)
    sizes = (keys.num_heads, heads // keys.num_heads)
    views = EdgeRows(
        rows.q.unflatten(1, sizes),
        rows.out.unflatten(1, sizes),
        rows.lse.unflatten(1, sizes),
        sequence=sequence,
    )
    kept = _over_draws(views, keys, drawing, call.scale)
    sums = torch.nn.functional.pad(kept.cumsum(0), (1, 0)).tolist()
    share = 1e3 / len(segments)
    spent_ms = (perf_counter() - planned) * share
    stats = []
    for segment in segments:
        own = segment.rows.stop - segment.rows.start
        stats.append(
            Stats(
                pairs_kept=sums[segment.rows.stop] - sums[segment.rows.start],
                pairs_exact=heads * (own * segment.start + own * (own + 1) // 2),
                pairs_computed=heads * own * drawing.width,
                selection_ms=(planned - began) * share,
                compute_ms=spent_ms,
                impl="triton",
            )
        )
    return PackedResult(rows.result(), tuple(stats), (None,) * len(segments))


def _places(segments: Sequence[Segment], num_rows: int) -> tuple[Tensor, Tensor]:
    """Whose each row is and where: int32 [T] twice. Rows of no segment are read as the first one's first."""
    sequence, positions = np.zeros(num_rows, np.int32), np.zeros(num_rows, np.int32)
    for number, segment in enumerate(segments):
        sequence[segment.rows] = number
        own = segment.rows.stop - segment.rows.start
        positions[segment.rows] = np.arange(segment.start, segment.start + own)
    return torch.from_numpy(sequence), torch.from_numpy(positions)
