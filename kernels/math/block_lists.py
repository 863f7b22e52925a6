"""Lists of key blocks per query tile in compressed sparse rows: what block-sparse attention runs on.

    tile t of list head h reads blocks  indices[indptr[h, t] : indptr[h, t + 1]]

Tiles are consecutive rows of one call and may differ in height. Every listed block is whole, seen by every
row of its tile, and listed once; blocks of which a tile sees only a part belong to another part of the
pattern (spans, or ``PartialBlocks``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockLists:
    """``borders``: rows of the call where tiles begin and end, [num_tiles + 1]. ``indptr`` int64
    [heads, num_tiles + 1] into ``indices`` int32 [nnz], ascending within a tile. ``heads`` is the number of
    key heads (one list for each group of query heads) or of query heads."""

    block: int
    borders: tuple[int, ...]
    indptr: Tensor
    indices: Tensor

    @property
    def heads(self) -> int:
        return int(self.indptr.shape[0])

    @property
    def num_tiles(self) -> int:
        return len(self.borders) - 1

    @property
    def nbytes(self) -> int:
        return self.indptr.nbytes + self.indices.nbytes

    def counts(self) -> Tensor:
        """Blocks listed, int64 [heads, num_tiles]."""
        return self.indptr[:, 1:] - self.indptr[:, :-1]

    def listed_pairs(self) -> int:
        """Pairs summed over list heads: rows of each tile x keys listed for it."""
        heights = torch.tensor(self.borders).diff()
        return int((self.counts() * heights).sum()) * self.block

    def table(self, num_blocks: int) -> Tensor:
        """Bool [heads, num_tiles, num_blocks], of memory like the scores': which blocks are left out is read
        from it. The attention itself runs on the lists."""
        table = torch.zeros(self.heads * self.num_tiles, num_blocks, dtype=torch.bool)
        owner = torch.repeat_interleave(torch.arange(len(table)), self.counts().flatten())
        table[owner, self.indices.long()] = True
        return table.view(self.heads, self.num_tiles, num_blocks)


def lists_from_table(table: Tensor, block: int, borders: Sequence[int]) -> BlockLists:
    """Lists of the blocks that are True in ``table`` [heads, num_tiles, num_blocks]."""
    heads, num_tiles, _ = table.shape
    ends = table.sum(-1).flatten().cumsum(0)
    begins = torch.cat([ends.new_zeros(1), ends[:-1]])
    indptr = torch.cat([begins.view(heads, num_tiles), ends.view(heads, num_tiles)[:, -1:]], 1)
    return BlockLists(block, tuple(borders), indptr, table.nonzero()[:, 2].int())
