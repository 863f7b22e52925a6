"""Splits block lists into what neighbouring tiles have in common and the rest.

    lists of n neighbouring tiles:   A_1 .. A_n   =   (A_1 ∩ .. ∩ A_n)  for all their rows at once,  and each
                                                      A_t without it

torch's CPU kernel takes its largest query blocks from 768 rows on and is then up to a third faster; so blocks
that enough neighbours list are attended to by all their rows together. The nearer lists come to having every
block, the more is common: the computation then costs what dense attention costs.
"""

from __future__ import annotations

import numpy as np
import torch

from kernels.math.block_lists import BlockLists

JOINED_ROWS = 768
"""Rows, over the query heads that share a list, from which the kernel takes its largest query blocks."""
MAX_TILES = 8
COMMON_KEYS = 512
"""Fewer common keys than this do not pay for merging one more part."""


def common_and_rest(lists: BlockLists, group: int) -> tuple[BlockLists, ...]:
    """Lists that name together what ``lists`` names, each pair once. ``group``: query heads per list.

    The first has joined tiles, the second the given ones; ``lists`` alone where nothing is to be gained.
    """
    heights = np.diff(lists.borders)
    n = -(-JOINED_ROWS // (group * int(heights.max())))
    counts = lists.counts().cpu().numpy()
    if not 1 < n <= MAX_TILES or len(heights) < n or counts.max() * lists.block < COMMON_KEYS:
        return (lists,)
    num_blocks = int(lists.indices.max()) + 1
    owner = np.repeat(np.arange(counts.size), counts.reshape(-1))
    head, tile = owner // len(heights), owner % len(heights)
    joined = -(-len(heights) // n)
    place = (head * joined + tile // n) * num_blocks + lists.indices.cpu().numpy()
    named, back, times = np.unique(place, return_inverse=True, return_counts=True)
    members = np.minimum(n, len(heights) - named // num_blocks % joined * n)
    common = (times == members) & (members > 1)
    enough = np.bincount(named[common] // num_blocks, minlength=lists.heads * joined)
    common &= (enough * lists.block >= COMMON_KEYS)[named // num_blocks]
    if not common.any():
        return (lists,)
    both = named[common]
    shared = np.bincount(both // num_blocks, minlength=lists.heads * joined).reshape(lists.heads, joined)
    borders = (*lists.borders[:-1:n], lists.borders[-1])
    rest = ~common[back]
    left = np.bincount(owner[rest], minlength=counts.size).reshape(counts.shape)
    return (
        _lists(lists.block, borders, shared, both % num_blocks),
        _lists(lists.block, lists.borders, left, lists.indices.cpu().numpy()[rest]),
    )


def _lists(block: int, borders: tuple[int, ...], counts: np.ndarray, indices: np.ndarray) -> BlockLists:
    ends = counts.reshape(-1).cumsum().reshape(counts.shape)
    indptr = np.concatenate([ends[:, :1] - counts[:, :1], ends], 1)
    return BlockLists(block, borders, torch.from_numpy(indptr), torch.from_numpy(indices).int())
