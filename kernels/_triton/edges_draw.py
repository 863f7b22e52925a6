"""Keys that rows draw at random, as equal edge lists: drawn and sorted out where they are needed.

    draw t of row i, head h:  floor(u bound_i),  u = bits(bits(stream_h, i), t) / 2^32,   bound_i = i + 1 or M

Semantics in ``kernels.math.random_keys``, the generator in ``kernels.math.rng``: both to the bit. A draw
that equals an earlier one of its row does not count: earlier ones are drawn again to compare, some at a time,
which costs less than sorting. Nothing is cached.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.launch import Launch, Work
from kernels._triton.targets import interpreting

TILE_EDGES = 256
INTERPRETED_ROWS = 32
EARLIER = 16
"""Draws that are compared with a later one at a time."""
NUM_WARPS = 4
_GAMMA = tl.constexpr(0x9E3779B97F4A7C15 - 2**64)
_FIRST = tl.constexpr(0xBF58476D1CE4E5B9 - 2**64)
_SECOND = tl.constexpr(0x94D049BB133111EB - 2**64)


@dataclass(frozen=True)
class Drawing:
    """N rows of H query heads draw ``num_random`` keys each, below their own number + 1 (``causal``) or
    ``num_keys``.

    ``streams`` int64 [S, H]; ``start``: position of row 0, or ``positions`` int32 [N] and ``sequence`` int32
    [N], which say where each row of a packed call is and whose. ``spans`` int32 [s, 2, N]: draws in lo <= j <
    hi do not count. ``itself``: the row's own position follows the draws.
    """

    streams: Tensor
    num_rows: int
    num_random: int
    num_keys: int
    causal: bool
    itself: bool
    start: int = 0
    positions: Tensor | None = None
    sequence: Tensor | None = None
    spans: Tensor | None = None

    @property
    def width(self) -> int:
        return self.num_random + self.itself


@triton.jit
def random_bits(stream, counter):
    """``kernels.math.rng.bits``."""
    x = (counter + 1) * _GAMMA + stream
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _FIRST
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _SECOND
    return x ^ ((x >> 31) & ((1 << 33) - 1))


@triton.jit
def random_key(stream, turn, bound):
    """Draw ``turn`` below ``bound``: ``kernels.math.rng.below`` of its bits."""
    drawn = random_bits(stream, turn.to(tl.int64))
    return ((((drawn >> 32) & 0xFFFFFFFF) * bound) >> 32).to(tl.int32)


@triton.jit(do_not_specialize=["num_heads", "num_rows", "start", "num_keys", "num_spans"])
def draw_edges(
    edges, kept, streams, positions, sequence, spans, num_heads, num_rows, start, num_keys, num_spans,
    NUM_RANDOM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EARLIER: tl.constexpr,
    ROWS: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    head = tl.program_id(1)
    row = tile * ROWS + tl.arange(0, ROWS)
    here = row < num_rows
    if PACKED:
        position = tl.load(positions + row, mask=here, other=0).to(tl.int64)
        own = tl.load(sequence + row, mask=here, other=0).to(tl.int64)
    else:
        position = row.to(tl.int64) + start
        own = tl.full([ROWS], 0, tl.int64)
    stream = tl.load(streams + own * num_heads + head)
    stream = random_bits(stream, position)[:, None]
    bound = (position + 1 if CAUSAL else tl.full([ROWS], 0, tl.int64) + num_keys)[:, None]
    turn = tl.arange(0, BLOCK)[None, :]
    key = random_key(stream, turn, bound)
    fresh = here[:, None] & (turn < NUM_RANDOM)
    for first in range(0, NUM_RANDOM, EARLIER):
        other = first + tl.arange(0, EARLIER)[None, :]
        same = random_key(stream, other, bound)[:, None, :] == key[:, :, None]
        same &= other[:, None, :] < turn[:, :, None]
        fresh &= tl.max(same.to(tl.int32), 2) == 0
    wide_rows = tl.full([1], 0, tl.int64) + num_rows
    for span in range(num_spans):
        at = spans + span * 2 * wide_rows + row
        lo = tl.load(at, mask=here, other=0)
        hi = tl.load(at + wide_rows, mask=here, other=0)
        fresh &= (key < lo[:, None]) | (key >= hi[:, None])
    line = (head * wide_rows + row) * WIDTH
    count = tl.sum(fresh.to(tl.int32), 1)
    if WIDTH > NUM_RANDOM:
        itself = position.to(tl.int32)
        tl.store(edges + line + NUM_RANDOM, itself, mask=here)
        fresh &= key != itself[:, None]
        count = tl.sum(fresh.to(tl.int32), 1) + 1
    tl.store(edges + line[:, None] + turn, tl.where(fresh, key, -1), mask=here[:, None] & (turn < NUM_RANDOM))
    tl.store(kept + head * wide_rows + row, count, mask=here)


def draw(drawing: Drawing) -> tuple[Tensor, Tensor]:
    """edges int32 [H * N, E], -1 where a draw does not count; and how many of a row do, int32 [H, N]."""
    launch = draw_launch(drawing)
    launch.run()
    edges, kept = launch.args["edges"], launch.args["kept"]
    assert isinstance(edges, Tensor) and isinstance(kept, Tensor)
    return edges, kept


def draw_launch(drawing: Drawing) -> Launch:
    H, N, width = drawing.streams.shape[1], drawing.num_rows, drawing.width
    block = max(EARLIER, 1 << (drawing.num_random - 1).bit_length())
    height = INTERPRETED_ROWS if interpreting() else max(1, TILE_EDGES // block)
    tiles = -(-N // height)
    device = drawing.streams.device
    edges = torch.empty(H * N, width, dtype=torch.int32, device=device)
    kept = torch.empty(H, N, dtype=torch.int32, device=device)
    nothing = kept
    sizes = {
        "num_heads": H,
        "num_rows": N,
        "start": drawing.start,
        "num_keys": drawing.num_keys,
        "num_spans": 0 if drawing.spans is None else len(drawing.spans),
    }
    return Launch(
        kernel="draw_edges",
        fn=draw_edges,
        grid=(tiles, H),
        args={
            "edges": edges, "kept": kept, "streams": drawing.streams,
            "positions": nothing if drawing.positions is None else drawing.positions,
            "sequence": nothing if drawing.sequence is None else drawing.sequence,
            "spans": nothing if drawing.spans is None else drawing.spans,
            **sizes,
        },
        constants={
            "NUM_RANDOM": drawing.num_random, "WIDTH": width, "BLOCK": block, "EARLIER": EARLIER,
            "ROWS": height, "CAUSAL": drawing.causal, "PACKED": drawing.positions is not None,
        },
        num_warps=NUM_WARPS,
        num_stages=1,
        sizes=frozenset(sizes),
        multiplies=False,
        work=Work(0.0, 0.0, 4.0 * H * N * width),
        notes={"width": width},
    )  # fmt: skip


def draw_example(num_heads: int, num_rows: int, num_random: int) -> Launch:
    """A causal prefill of the backend random."""
    streams = torch.empty(1, num_heads, dtype=torch.int64, device="meta")
    return draw_launch(Drawing(streams, num_rows, num_random - 1, num_rows, causal=True, itself=True))
