"""Vertical-slash attention: the few keys that all rows look at, and the few distances at which rows look.

    A_i = own keys of i's query tile  ∪  verticals of the tile
          ∪  {j : floor(i / L) - floor(j / L) in slashes of the tile}

Jiang et al., "MInference 1.0: accelerating pre-filling for long-context LLMs via dynamic sparse attention"
(arXiv 2407.02490), section 3. Here, per key head and per query tile of ``query_tile`` rows: ``probe_rows``
rows spread over the tile are probed exactly (``kernels.math.vertical_slash`` has the equations), the
``num_verticals`` keys on whose mass the rows agree most, and the ``num_slashes`` block offsets of largest
mass per computed pair are kept, and so are always the tile's own keys. A slash is a band of whole blocks:
the rows of query block b see key block b - d (bidirectional: d may be negative). The paper probes the last
rows of the whole prompt, which a chunk does not have; a tile has its own, so chunked prefill and reused
prefixes work. A pair kept by both counts once. Where a probed score is not finite, its key head keeps the
whole tile.

Decode (a tile of one row) probes the row itself: it reads all keys once, keeps its own largest ones and the
blocks with most mass beside them, and reads the values of those alone: exact top-k, up to the sharing in a
group. Cost O(N^2 D probe_rows / query_tile) to choose and O(N D (num_verticals + num_slashes L + query_tile))
to attend; O(N) memory. Accumulates in fp32, returns q's dtype.

``dropped`` of a row is the softmax mass left out as the probe saw it, the mean over the probe rows of the
row's query block and its group's heads. Mass on a chosen key counts as kept as far as the probe rows agree on
it: beyond that it stands for the keys that unprobed rows have to themselves.

When not to use it: below some thousands of keys, where exact attention costs no more; where what matters
moves from row to row (then the rows of a tile share nothing that a few columns could hold).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from kernels.contract import AttentionResult, Backend, Call, CallShape, Capabilities, Params, Workspace
from kernels.math.accumulate import Accumulator, accumulator, result
from kernels.math.flops import attention_flops, begins, mean_of, own_pairs, tile_ends
from kernels.math.masked import masked_attention
from kernels.math.per_layer import Count, largest, of_layer, size_problems
from kernels.math.query_tiles import QueryTiles, query_tiles
from kernels.math.spans import add_spans, plan_for
from kernels.math.vertical_slash import Chooser, choice_bytes, place_of
from kernels.math.vertical_slash_part import KeyRows, add_choice, part_bytes, tile_rows
from kernels.math.vertical_slash_reference import Sizes, kept_pairs
from kernels.math.workspace import spans

_USED = 0.8
"""Of a tile's slashes, those that a query block can use: near diagonals reach into the own keys."""


class VerticalSlashParams(Params):
    num_verticals: Count = Field(
        default=1024,
        description="Single keys that each query tile reads beyond its own; or a list with one entry per "
        "layer, each such a number or a list with one per key head.",
    )
    num_slashes: Count = Field(
        default=8,
        description="Block offsets at which each query block reads a whole key block; or lists as for "
        "num_verticals.",
    )
    query_tile: Literal[256, 512, 1024] = Field(
        default=512, description="Rows, at absolute multiples, that share one choice of keys and offsets."
    )
    probe_rows: Literal[16, 32, 64] = Field(
        default=16, description="Rows of a query tile whose exact attention makes its choice."
    )
    block_size: Literal[32, 64, 128] = Field(
        default=64, description="Width of a slash: rows of one block see one block of keys per offset."
    )

    def chunk_multiple(self) -> int:
        return self.query_tile

    def size_problems(self, num_layers: int, num_kv_heads: int) -> list[str]:
        return [
            problem
            for name in ("num_verticals", "num_slashes")
            for problem in size_problems(name, getattr(self, name), num_layers, num_kv_heads)
        ]

    def numbers(self, layer: int, num_kv_heads: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Verticals and slashes of one layer, an entry per key head. ValueError where lists do not fit."""
        return (
            of_layer("num_verticals", self.num_verticals, layer, num_kv_heads),
            of_layer("num_slashes", self.num_slashes, layer, num_kv_heads),
        )


def attend(q: Tensor, k: Tensor, v: Tensor, params: VerticalSlashParams, call: Call) -> AttentionResult:
    began = perf_counter()
    acc = accumulator(q, k, v, call)
    tiles = query_tiles(call, q.shape[2], k.shape[2], params.query_tile, params.block_size)
    numbers = params.numbers(call.layer, k.shape[1])
    add_spans(acc, plan_for(acc, tiles.own_keys()))
    if call.impl == "triton":
        return _on_device(acc, q, tiles, params, numbers, began)
    dropped = torch.zeros_like(acc.lse)
    for b in range(len(q)):
        _add_sequence(acc, b, tiles, params, numbers, dropped[b])
    return result(acc, q, began, dropped=dropped)


def _on_device(
    acc: Accumulator,
    q: Tensor,
    tiles: QueryTiles,
    params: VerticalSlashParams,
    numbers: tuple[tuple[int, ...], tuple[int, ...]],
    began: float,
) -> AttentionResult:
    """Choice and attention by kernels, for all tiles at once; what they count is read after all of them."""
    from kernels._triton.vertical_slash import add_vertical_slash

    added = add_vertical_slash(acc, tiles, numbers, params.probe_rows)
    dropped = added.dropped[:, :, None].expand_as(acc.lse)
    acc.scored += added.scored
    kept, computed = torch.stack([added.kept, added.computed]).tolist()
    acc.complete(kept, computed)
    return result(acc, q, began, dropped=dropped)


def _add_sequence(
    acc: Accumulator,
    b: int,
    tiles: QueryTiles,
    params: VerticalSlashParams,
    numbers: tuple[tuple[int, ...], tuple[int, ...]],
    dropped: Tensor,
) -> None:
    """Every tile's choice, made and merged; fills ``dropped`` [Hk, G, N]."""
    k, v = KeyRows(acc.k[b], acc.q.dtype), KeyRows(acc.v[b], acc.q.dtype)
    chooser = Chooser(
        k.heads,
        group=acc.q.shape[2],
        num_verticals=numbers[0],
        num_slashes=numbers[1],
        probe_rows=min(params.probe_rows, acc.q.shape[-2]),
        scale=acc.call.scale,
    )
    kept = computed = 0
    for tile in range(tiles.num_tiles):
        place, at = place_of(tiles, tile), tiles.rows(tile)
        if not place.num_candidates:
            continue
        began = perf_counter()
        choice = chooser.choose(acc.q[b, :, :, at], place)
        dropped[:, :, at] = choice.dropped_by_row(place).to(dropped)[:, None]
        acc.selection_s += perf_counter() - began
        acc.scored += choice.scored
        more_kept, more_computed = add_choice(tile_rows(acc, b, at), k, v, place, choice)
        kept, computed = kept + more_kept, computed + more_computed
    acc.complete(kept, computed)


def reference(q: Tensor, k: Tensor, v: Tensor, params: VerticalSlashParams, call: Call) -> AttentionResult:
    """Masks of single pairs from every probed row's full softmax, sequence by sequence."""
    verticals, slashes = params.numbers(call.layer, k.shape[1])
    sizes = Sizes(params.query_tile, params.block_size, params.probe_rows, verticals, slashes)
    answers, left_out = [], []
    for b in range(len(q)):
        keep, dropped = kept_pairs(q[b], k[b], sizes, call)
        answers.append(masked_attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], keep, call))
        left_out.append(dropped)
    return _joined(answers, torch.stack(left_out))


def _joined(answers: Sequence[AttentionResult], dropped: Tensor) -> AttentionResult:
    stats = [answer.stats for answer in answers]
    together = replace(
        stats[0],
        pairs_kept=sum(one.pairs_kept for one in stats),
        pairs_exact=sum(one.pairs_exact for one in stats),
        pairs_computed=sum(one.pairs_computed for one in stats),
        compute_ms=sum(one.compute_ms for one in stats),
        dropped_mass=float(dropped.mean()),
    )
    lse = torch.cat([answer.lse for answer in answers if answer.lse is not None])
    return AttentionResult(torch.cat([answer.out for answer in answers]), lse, together, dropped)


def workspace(params: VerticalSlashParams, shape: CallShape) -> Workspace:
    """Own keys, then for one tile at a time the probe's scores, and the panels of what it chose."""
    own = spans(shape, params.query_tile, params.query_tile, num_masks=2)
    most = largest(params.num_verticals), largest(params.num_slashes)
    extra = choice_bytes(shape, params.query_tile, params.block_size, params.probe_rows)
    extra += part_bytes(shape, params.query_tile, params.block_size, *most)
    return Workspace(own.live_bytes + extra, shared_bytes=own.shared_bytes)


def flops(params: VerticalSlashParams, shape: CallShape) -> float:
    """Own keys, the probe rows' logits of every tile that has to choose, and what it chooses. Assumes that
    every query block can use ``_USED`` of the slashes."""
    T, L, stop = params.query_tile, params.block_size, shape.num_keys
    start, own = stop - shape.num_rows, own_pairs(shape, T, L)
    columns, slashes = mean_of(params.num_verticals), mean_of(params.num_slashes)
    chosen = columns + _USED * slashes * L
    probes = min(params.probe_rows, shape.num_rows)
    if not shape.causal:
        candidates = max(0, stop // L * L - T)
        if columns >= candidates or slashes >= (candidates + T) // L:
            return attention_flops(shape, own + shape.num_rows * candidates)
        tiles = -(-shape.num_rows // T)
        return attention_flops(shape, own + shape.num_rows * min(chosen, candidates), tiles * probes * stop)
    # tiles up to the one at ``bend`` keep all that lies before them
    bend = (max(int(columns), int(slashes + 1) * L - min(T, shape.num_rows)) // T + 1) * T
    early, late = min(stop, bend), max(start, bend)
    pairs = float(begins(start, early, T)) if early > start else 0.0
    scored = 0.0
    if stop > late:
        pairs += (stop - late) * min(chosen, float(late // T * T))
        scored = probes * tile_ends(late, stop, T)
    return attention_flops(shape, own + pairs, scored)


BACKEND = Backend(
    name="vertical_slash",
    summary="A few keys that all rows look at and a few diagonals, found by probing some rows (MInference).",
    paper="Jiang et al., MInference 1.0 (arXiv 2407.02490)",
    params=VerticalSlashParams,
    capabilities=Capabilities(
        causal=True,
        bidirectional=True,
        decode=True,
        exact=False,
        selection="tile",
        complexity="O(N^2 probe_rows / query_tile + N (num_verticals + num_slashes block_size + query_tile))",
        exponent=2.0,
    ),
    impls={"reference": reference, "torch": attend, "triton": attend},
    workspace=workspace,
    flops=flops,
    conditions=(
        "The choice looks at a whole query tile: a row's result depends on later rows of its tile, and "
        "chunks that end at tile borders change nothing. It is as good as the probed rows speak for the "
        "others: what only rows between them look at is not seen. A value (not a key) that is not finite "
        "reaches only rows that keep its key."
    ),
)
