"""Query tiles: the rows that share one choice of key blocks, at absolute multiples of the tile's height.

    tile t = rows [t T, (t + 1) T) of the sequence, as far as the call has them
    own keys      causal: t T .. the row itself     bidirectional: the tile's positions, the last M mod L keys
    candidates    causal: whole blocks before t T   bidirectional: all other whole blocks

T rows of a tile (a multiple of L), L keys of a block. Own keys are always kept; candidates are what a
selection chooses from. A candidate holds no key that some row of the tile may not see: it needs no mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.contract import Call
from kernels.math.spans import Ints, Span, SpanPattern


@dataclass(frozen=True)
class QueryTiles:
    """The tiles of one call. ``borders`` [num_tiles + 1]: rows of the call where tiles begin and end."""

    height: int
    block: int
    start: int
    num_keys: int
    causal: bool
    borders: tuple[int, ...]

    @property
    def num_tiles(self) -> int:
        return len(self.borders) - 1

    @property
    def num_blocks(self) -> int:
        """Whole key blocks that the call's last row could select from."""
        if self.causal:
            return self.first_key(self.num_tiles - 1) // self.block
        return self.num_keys // self.block

    def rows(self, tile: int) -> slice:
        """The tile's rows of the call."""
        return slice(self.borders[tile], self.borders[tile + 1])

    def first_key(self, tile: int) -> int:
        """The absolute position at which the tile begins, whether the call has its first rows or not."""
        return (self.start + self.borders[tile]) // self.height * self.height

    def candidates(self) -> Tensor:
        """Bool [num_tiles, num_blocks]: blocks that each tile may choose."""
        begins = torch.tensor([self.first_key(tile) for tile in range(self.num_tiles)])[:, None] // self.block
        blocks = torch.arange(self.num_blocks)[None]
        if self.causal:
            return blocks < begins
        return (blocks < begins) | (blocks >= begins + self.height // self.block)

    def num_candidates(self) -> Tensor:
        """int64 [num_tiles]: how many blocks each tile may choose, without a table of them."""
        begins = torch.arange(self.num_tiles) * self.height + self.first_key(0)
        before = (begins // self.block).clamp(max=self.num_blocks)
        if self.causal:
            return before
        after = ((begins + self.height) // self.block).clamp(max=self.num_blocks)
        return before + self.num_blocks - after

    def own_keys(self) -> SpanPattern:
        """What every row keeps without asking."""
        return SpanPattern(("own", self.height, self.block), self._own_spans, tile=self.height)

    def _own_spans(self, rows: Ints, num_keys: int) -> list[Span]:
        begins = rows // self.height * self.height
        if self.causal:
            return [Span(begins, rows + 1)]
        ends = np.minimum(begins + self.height, num_keys)
        whole = np.full_like(rows, num_keys // self.block * self.block)
        return [Span(begins, ends), Span(np.maximum(whole, ends), np.full_like(rows, num_keys))]


def query_tiles(call: Call, num_rows: int, num_keys: int, height: int, block: int) -> QueryTiles:
    """The tiles of ``num_rows`` queries from ``call.start`` over ``num_keys`` keys."""
    stop = call.start + num_rows
    inside = range((call.start // height + 1) * height, stop, height)
    borders = (0, *(border - call.start for border in inside), num_rows)
    return QueryTiles(height, block, call.start, num_keys, call.causal, borders)
