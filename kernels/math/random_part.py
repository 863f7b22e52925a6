"""The random part of a pattern, added to rows that may hold another part: random and bigbird.

Semantics in ``random_keys``. Pairs that the other part (``base``, spans) has are left out, so each counts
once. Single keys are drawn in tiles at absolute rows, which are cached; one row (decode) draws its own and
gathers. Whole blocks: ``random_blocks``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from kernels.contract import Call, PackedResult, Segment
from kernels.math.accumulate import Accumulator
from kernels.math.cache import DRAWS
from kernels.math.edges import attend_edges, attend_row_edges
from kernels.math.random_blocks import add_blocks
from kernels.math.random_keys import RandomParams, block_draws, row_draws
from kernels.math.spans import Span, SpanPattern

EDGE_ROWS = 8192
TILE_ROWS = 64
"""Rows of a causal tile: what they draw depends on nothing but where they are, so every length shares it."""
DRAWS_AT_ONCE = 1 << 15


def add_random(acc: Accumulator, params: RandomParams, base: SpanPattern | None) -> None:
    """Add the drawn keys that ``base`` does not have. Without a base every row also keeps itself
    (block_size 1 only: whole blocks need a base that has the row itself, added before)."""
    if acc.call.impl == "triton" and params.block_size == 1:
        from kernels._triton.edges_random import add_random_edges

        add_random_edges(acc, params.num_random, base)
    elif acc.q.shape[-2] == 1:
        _add_row(acc, params, base)
    elif params.block_size == 1:
        _add_edges(acc, params.num_random, base)
    else:
        assert base is not None and acc.filled
        add_blocks(acc, params, base)


def prefill_random(
    q: Tensor, segments: Sequence[Segment], params: RandomParams, call: Call
) -> PackedResult | None:
    """Segments of a packed call under impl ``triton``, every row over itself and single keys that it draws,
    as ``contract.PrefillRows`` has it; None where that is bidirectional."""
    if not call.causal:
        return None
    from kernels._triton.edges_random import prefill_random_edges

    return prefill_random_edges(q, segments, params.num_random, call)


@dataclass(frozen=True)
class EdgeTile:
    """Keys of some rows of every head: edges int32 [H, R, E] ascending, ``drop`` [H, R, E] where one does not
    count.
    """

    edges: Tensor
    drop: Tensor
    kept: int

    @property
    def nbytes(self) -> int:
        return self.edges.nbytes + self.drop.nbytes


def edge_tile(
    call: Call, num_heads: int, rows: Tensor, num_keys: int, num_random: int, base: SpanPattern | None
) -> EdgeTile:
    """The edges of query rows at positions ``rows`` [R]."""
    shape = (num_heads, len(rows), num_random + (base is None))
    edges = torch.empty(shape, dtype=torch.int32, device=rows.device)
    drop = torch.zeros(shape, dtype=torch.bool, device=rows.device)
    step = max(1, DRAWS_AT_ONCE // (num_heads * num_random))
    for a in range(0, len(rows), step):
        some = slice(a, a + step)
        _draw(edges[:, some], drop[:, some], call, rows[some], num_keys, num_random, base)
    return EdgeTile(edges, drop, drop.numel() - int(drop.sum()))


def _draw(
    edges: Tensor,
    drop: Tensor,
    call: Call,
    rows: Tensor,
    num_keys: int,
    num_random: int,
    base: SpanPattern | None,
) -> None:
    """Fill the edges of a few rows, ascending, and mark repeats and what the base has."""
    edges[..., :num_random] = row_draws(call, len(edges), rows, num_random, num_keys)
    edges[..., num_random:] = rows[:, None]
    edges.copy_(_sorted(edges))
    drop[..., 1:] = edges[..., 1:] == edges[..., :-1]
    for span in _spans(base, rows, num_keys):
        lo, hi = (_like(bound, edges)[:, None] for bound in (span.lo, span.hi))
        drop |= (edges >= lo) & (edges < hi)


def _add_edges(acc: Accumulator, num_random: int, base: SpanPattern | None) -> None:
    call, B, G = acc.call, acc.q.shape[0], acc.q.shape[2]
    kept = computed = 0
    sources = [
        [(_dense(k, acc.q), _dense(v, acc.q)) for k, v in zip(acc.k[b], acc.v[b], strict=True)]
        for b in range(B)
    ]
    for rows in _edge_rows(call.start, acc.q.shape[-2]):
        tile = _edges_of(acc, rows, num_random, base)
        kept, computed = kept + B * tile.kept, computed + B * tile.edges.numel()
        for b in range(B):
            for h in range(tile.edges.shape[0]):
                q = acc.q[b, h // G, h % G, rows]
                part, lse = attend_edges(q, *sources[b][h // G], tile.edges[h], tile.drop[h], call.scale)
                acc.put_into(acc.out[b, h // G, h % G, rows], acc.lse[b, h // G, h % G, rows], part, lse)
    acc.complete(kept, computed)


def _edges_of(acc: Accumulator, rows: slice, num_random: int, base: SpanPattern | None) -> EdgeTile:
    """The edges of these rows of the call: of a causal one cut from tiles at absolute rows, of another drawn
    for its number of keys."""
    began = perf_counter()
    first, stop = acc.call.start + rows.start, acc.call.start + rows.stop
    if acc.call.causal:
        begins = range(first // TILE_ROWS * TILE_ROWS, stop, TILE_ROWS)
        tiles = [_cached_tile(acc, a, a + TILE_ROWS, a + TILE_ROWS, num_random, base) for a in begins]
        tile = _joined(tiles, slice(first - begins[0], stop - begins[0]))
    else:
        tile = _cached_tile(acc, first, stop, acc.k.shape[2], num_random, base)
    acc.selection_s += perf_counter() - began
    return tile


def _cached_tile(
    acc: Accumulator, first: int, stop: int, num_keys: int, num_random: int, base: SpanPattern | None
) -> EdgeTile:
    """Kept from its second use: a seed or a length that never comes again leaves no tile behind."""
    call, num_heads, device = acc.call, acc.q.shape[1] * acc.q.shape[2], acc.q.device
    key = ("edges", call.seed, call.layer, call.causal, num_heads, first, stop, num_keys, num_random)
    return DRAWS.get(
        (*key, base and base.key, device),
        lambda: edge_tile(
            call, num_heads, torch.arange(first, stop, device=device), num_keys, num_random, base
        ),
        from_second_use=True,
    )


def _joined(tiles: Sequence[EdgeTile], rows: slice) -> EdgeTile:
    """Some rows of tiles that follow each other."""
    edges, drop = (
        tensors[0][:, rows] if len(tensors) == 1 else torch.cat(tensors, 1)[:, rows]
        for tensors in ([tile.edges for tile in tiles], [tile.drop for tile in tiles])
    )
    return EdgeTile(edges, drop, drop.numel() - int(drop.sum()))


def _edge_rows(start: int, num_rows: int) -> Iterator[slice]:
    first = start // EDGE_ROWS * EDGE_ROWS
    for a in range(first, start + num_rows, EDGE_ROWS):
        yield slice(max(a, start) - start, min(a + EDGE_ROWS, start + num_rows) - start)


def _dense(keys: Tensor, q: Tensor) -> Tensor:
    return keys.to(q.dtype).contiguous()


def _sorted(drawn: Tensor) -> Tensor:
    """Ascending along the last dimension. numpy sorts short integer rows several times faster than torch on a
    CPU.
    """
    if drawn.device.type != "cpu":
        return drawn.sort(-1).values
    return torch.from_numpy(np.sort(drawn.numpy(), axis=-1))


def _spans(base: SpanPattern | None, rows: Tensor, num_keys: int) -> Sequence[Span]:
    return () if base is None else base.spans(rows.cpu().numpy(), num_keys)


def _like(bound: np.ndarray[tuple[int, ...], np.dtype[np.int64]], edges: Tensor) -> Tensor:
    return torch.from_numpy(bound).to(edges.device, edges.dtype)


def _add_row(acc: Accumulator, params: RandomParams, base: SpanPattern | None) -> None:
    began = perf_counter()
    call, device = acc.call, acc.q.device
    B, Hk, G, _, D = acc.q.shape
    per_query_head = params.block_size == 1
    if acc.call.impl == "triton":
        from kernels._triton.edges_random import add_shared_row

        add_shared_row(acc, *_row_blocks(acc, params, base), began)
        return
    if per_query_head:
        rows = torch.tensor([call.start], device=device)
        tile = edge_tile(
            call, Hk * G, rows, call.start + 1 if call.causal else acc.k.shape[2], params.num_random, base
        )
        edges, drop, kept = tile.edges[:, 0].long(), tile.drop[:, 0], tile.kept
        head = torch.arange(Hk, device=device).repeat_interleave(G)
    else:
        edges, drop = _row_blocks(acc, params, base)
        kept = G * (drop.numel() - int(drop.sum()))
        head = torch.arange(Hk, device=device)
    acc.selection_s += perf_counter() - began
    for b in range(B):
        q = acc.q[b].reshape(len(head), -1, D)
        out, lse = attend_row_edges(q, acc.k[b], acc.v[b], head, edges, drop, call.scale)
        acc.put_into(acc.out[b], acc.lse[b], out.view(Hk, G, 1, -1), lse.view(Hk, G, 1))
    acc.complete(B * kept, B * edges.numel() * (1 if per_query_head else G))


def _row_blocks(acc: Accumulator, params: RandomParams, base: SpanPattern | None) -> tuple[Tensor, Tensor]:
    """The keys [Hk, P] in the blocks drawn by a single row, and which of them do not count."""
    call, L, device, num_keys = acc.call, params.block_size, acc.q.device, acc.k.shape[2]
    own = torch.tensor([call.start // L], device=device)
    drawn = (
        block_draws(call, acc.k.shape[1], own, params.num_random // L, -(-num_keys // L))[:, 0]
        .sort(-1)
        .values
    )
    repeat = torch.zeros_like(drawn, dtype=torch.bool)
    repeat[:, 1:] = drawn[:, 1:] == drawn[:, :-1]
    repeat |= drawn < 0
    edges = (drawn[..., None] * L + torch.arange(L, device=device)).flatten(1)
    drop = repeat.repeat_interleave(L, 1) | (edges >= num_keys)
    for span in _spans(base, torch.tensor([call.start]), num_keys):
        drop |= (edges >= int(span.lo[0])) & (edges < int(span.hi[0]))
    # what does not count is read all the same, at weight 0: it must be a key that the row may see
    return edges.masked_fill(drop, call.start), drop
