"""Lists of whole key blocks per query tile (``kernels.math.block_lists``) handed to the block-sparse kernel
as they are: no list is read on the host before it runs."""

from __future__ import annotations

import torch

from kernels._triton.block_sparse import Lists, launch_on, tile_rows, tiles_of
from kernels._triton.operands import keys_of_call
from kernels._triton.targets import target_of
from kernels.math.accumulate import Accumulator
from kernels.math.block_lists import BlockLists
from kernels.math.block_skip import without_skipped
from kernels.math.query_tiles import QueryTiles


def add_block_lists(
    acc: Accumulator, b: int, lists: BlockLists, *, skip: float = 0.0, own: QueryTiles | None = None
) -> BlockLists:
    """Merge attention of batch entry ``b`` over ``lists`` into rows that another part has filled, and count
    its pairs into ``acc``, as ``kernels.math.block_sparse.add_block_lists`` does. ``skip`` drops blocks
    first, by the same rule. The pairs are read from the device after the launch.
    """
    _check(acc, lists)
    if skip != 0.0:
        lists = without_skipped(acc, b, lists, skip, own)
    _launch(acc, b, lists)
    pairs = lists.listed_pairs() * (acc.q.shape[1] * acc.q.shape[2] // lists.heads)
    acc.kept, acc.computed = acc.kept + pairs, acc.computed + pairs
    return lists


def _check(acc: Accumulator, lists: BlockLists) -> None:
    Hk, G, N = acc.q.shape[1:4]
    if lists.heads not in (Hk, Hk * G):
        raise ValueError(f"lists for {lists.heads} heads, expected {Hk} key heads or {Hk * G} query heads")
    if lists.borders[0] != 0 or lists.borders[-1] != N:
        raise ValueError(f"tiles span rows {lists.borders[0]} .. {lists.borders[-1]}, the call has 0 .. {N}")
    if not acc.filled:
        raise ValueError("block lists are added to rows that another part has filled")


def _launch(acc: Accumulator, b: int, lists: BlockLists) -> None:
    device, one = acc.q.device, slice(b, b + 1)
    group = acc.q.shape[1] * acc.q.shape[2] // lists.heads
    width = max(acc.k.shape[-1], acc.v.shape[-1])
    rows = tile_rows(target_of(device), acc.q.dtype, width, group)
    first = lists.indices.to(device, torch.int32) * lists.block
    counts = lists.counts().to(device)
    tiles = tiles_of(lists.borders, rows, device)
    order = counts[:, tiles.table[:, 3].long()].argsort(dim=1, descending=True, stable=True)
    entries = Lists(
        lists.block,
        full_indptr=lists.indptr.to(device, torch.int32).contiguous(),
        full=torch.stack([first, torch.ones_like(first)], 1),
        order=order.int(),
        whole=True,
    )
    keys = keys_of_call(acc.k[one], acc.v[one], acc.call)
    parts = acc.q[one], acc.out[one], acc.lse[one], keys, tiles, entries
    launch_on(*parts, scale=acc.call.scale, filled=True).run()
