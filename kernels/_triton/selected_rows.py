"""How the kernels below a selection cut rows: those of one key head's query heads, packed into one tile.

Row m of a tile is row m // G of the kernel tile in query head m % G of the group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.block_sparse import tiles_of
from kernels._triton.primitives import power_of_two
from kernels._triton.targets import interpreting
from kernels.math.query_tiles import QueryTiles

NUM_WARPS = 8
"""Of 64 packed rows: with four, what a thread holds would not fit its registers."""


@triton.jit
def packed_rows(TILES, tile, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Row of the call, member of the group, and whether there is such a row [BLOCK_M]; the tile's first and
    last row, and the number of its selection tile."""
    first = tl.load(TILES + tile * 4)
    num = tl.load(TILES + tile * 4 + 1)
    listed = tl.load(TILES + tile * 4 + 3)
    m = tl.arange(0, BLOCK_M)
    live = (m // GROUP < num) & (m < ROWS * GROUP)
    return first + m // GROUP, m % GROUP, live, first, first + num - 1, listed


@dataclass(frozen=True)
class RowTiles:
    """``table`` as ``block_sparse.Tiles`` has it: selection tiles cut into at most ``rows`` rows each."""

    rows: int
    block_m: int
    table: Tensor

    @property
    def num_tiles(self) -> int:
        return len(self.table)


def row_tiles(tiles: QueryTiles, group: int, head_dim: int, device: torch.device) -> RowTiles:
    """Tiles whose packed rows fill ``block_rows``."""
    rows = max(1, block_rows(head_dim) // group)
    return RowTiles(rows, power_of_two(rows * group), tiles_of(tiles.borders, rows, device).table)


def block_rows(head_dim: int) -> int:
    """Packed rows of a tile, whose queries and sums in fp32 stay in registers."""
    if interpreting():
        return 128
    return 64 if head_dim <= 128 else 32
