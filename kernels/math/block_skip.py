"""Leaving out listed key blocks whose every logit is far below the best of each row that would see it.

    skip block b of tile t:   exp(m_ib - m_i) < skip   for every row i of the tile, in all heads of the list

m_ib is row i's largest logit in block b, m_i its largest over the listed blocks and its own keys. Deciding
costs the products q k^T of every listed block and of the own keys: 0.53 of what attending to the lists does
(4x4x64, tile 256, half of 4096 keys, one thread), so skipping pays where more than half of the blocks go.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from kernels.math.accumulate import Accumulator
from kernels.math.block_lists import BlockLists
from kernels.math.query_tiles import QueryTiles

LOGITS_AT_ONCE = 1 << 19
"""Logits that exist at a time: 2 MB of them, or one block's of a tile that has more rows."""


def without_skipped(
    acc: Accumulator, b: int, lists: BlockLists, skip: float, own: QueryTiles | None
) -> BlockLists:
    """The lists without the skipped blocks. Without ``own``, m_i is taken over the listed blocks alone.

    A block with a logit that is not a number is kept, and so is every block beside it. The logits are
    counted into ``acc.computed``. Raises ValueError for a skip outside 0 .. 1, or own tiles that differ from
    the lists'.
    """
    if not 0.0 <= skip < 1.0:
        raise ValueError(f"skip must lie in 0 <= skip < 1, got {skip}")
    if skip == 0.0:
        return lists
    if own is not None and own.borders != lists.borders:
        raise ValueError("own tiles begin and end at other rows than the lists' tiles")
    keep = torch.ones(lists.indices.shape, dtype=torch.bool)
    indptr = lists.indptr.tolist()
    for tile, (row, stop) in enumerate(zip(lists.borders[:-1], lists.borders[1:], strict=True)):
        own_keys = None if own is None else _own_keys(own, tile)
        for head in range(lists.heads):
            listed = slice(indptr[head][tile], indptr[head][tile + 1])
            if listed.stop > listed.start:
                blocks = lists.indices[listed].long()
                keep[listed] = _kept(acc, b, lists, head, slice(row, stop), blocks, own_keys, math.log(skip))
    kept_before = torch.cat([torch.zeros(1, dtype=torch.int64), keep.cumsum(0)])
    left = lists.indices[keep.to(lists.indices.device)]
    return BlockLists(lists.block, lists.borders, kept_before[lists.indptr.cpu()], left)


def _kept(
    acc: Accumulator,
    b: int,
    lists: BlockLists,
    head: int,
    rows: slice,
    blocks: Tensor,
    own: tuple[Tensor, Tensor] | None,
    limit: float,
) -> Tensor:
    Hk, G = acc.q.shape[1:3]
    key_head, group = (head, slice(None)) if lists.heads == Hk else (head // G, slice(head % G, head % G + 1))
    q = (acc.q[b, key_head, group, rows] * acc.call.scale).flatten(0, 1)
    keys = acc.k[b, key_head]
    tops = block_tops(q, keys, blocks, lists.block)
    acc.computed += len(q) * len(blocks) * lists.block
    best = tops.amax(1)
    if own is not None:
        chosen, has = (x.to(q.device) for x in own)
        logits = torch.unflatten(q @ keys[chosen].to(q.dtype).mT, 0, (-1, len(has)))
        acc.computed += logits.numel()
        best = torch.maximum(best, logits.masked_fill(~has, -math.inf).amax(-1).flatten())
    return ~(tops - best[:, None] < limit).all(0).cpu()


def block_tops(q: Tensor, keys: Tensor, blocks: Tensor, L: int) -> Tensor:
    """Largest product of each row of q [R, D] with the keys of each block: [R, len(blocks)]."""
    step = max(1, LOGITS_AT_ONCE // (len(q) * L))
    whole = torch.unflatten(keys[: len(keys) // L * L], 0, (-1, L))
    tops = q.new_empty(len(q), len(blocks))
    for a in range(0, len(blocks), step):
        chosen = torch.index_select(whole, 0, blocks[a : a + step].to(keys.device)).flatten(0, 1).to(q.dtype)
        tops[:, a : a + step] = torch.unflatten(q @ chosen.mT, 1, (-1, L)).amax(-1)
    return tops


def _own_keys(own: QueryTiles, tile: int) -> tuple[Tensor, Tensor]:
    """Keys that rows of the tile have of their own, int64 [P], and which of them each row has, [R, P]."""
    part = own.rows(tile)
    rows = np.arange(own.start + part.start, own.start + part.stop, dtype=np.int64)
    keys, has = [], []
    for span in own.own_keys().spans(rows, own.num_keys):
        live = span.hi > span.lo
        if live.any():
            some = np.arange(int(span.lo[live].min()), int(span.hi[live].max()))
            keys.append(some)
            has.append((some >= span.lo[:, None]) & (some < span.hi[:, None]))
    return torch.from_numpy(np.concatenate(keys)), torch.from_numpy(np.concatenate(has, 1))
