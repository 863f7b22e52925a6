"""Softmax attention of query blocks over lists of key blocks.

    out_b = softmax(scale * q_b [K_(c_1) | K_(c_2) | ...]^T) [V_(c_1); V_(c_2); ...]

The key blocks of one query block are collected into a panel, the panels of many query blocks run as one
batch. Two kinds of list: ``full`` blocks, all of whose pairs count, padded to equal length; and single
``partial`` blocks with a mask of their own, merged one per query block at a time. Work and memory grow with
the blocks listed, not with N M.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.math.accumulate import Accumulator
from kernels.math.dense import Mask, dense_part
from kernels.math.merge import merge_into

PANEL_BYTES = 4 << 20


@dataclass(frozen=True)
class PartialBlocks:
    """At most one key block ``key_block[p]`` for each query block ``query_block[p]``, with its mask [P, 1, R,
    L].
    """

    query_block: Tensor
    key_block: Tensor
    mask: Mask


@dataclass(frozen=True)
class BlockLists:
    """The lists of ``count`` query blocks of ``height`` rows, the first at row ``row`` of the call, for one
    key head.

    ``full`` [count, F] holds key blocks, the first ``num_full[b]`` of which count.
    """

    row: int
    height: int
    count: int
    full: Tensor
    num_full: Tensor
    partial: tuple[PartialBlocks, ...]

    @property
    def nbytes(self) -> int:
        return self.full.nbytes + sum(p.mask.nbytes for p in self.partial)


def key_blocks(keys: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    """[M, D] as [ceil(M / L), L, D]: a view where rows are dense and M is a multiple of L, else padded with
    zeros.
    """
    M, D = keys.shape
    keys = keys.to(dtype).contiguous()
    short = -M % block_size
    return (F.pad(keys, (0, 0, 0, short)) if short else keys).view(-1, block_size, D)


def add_block_lists(
    acc: Accumulator, batch: int, key_head: int, k: Tensor, v: Tensor, lists: BlockLists, guard: bool
) -> None:
    """Merge the lists into rows that another part has filled. k, v as ``key_blocks`` gives them.

    ``guard``: keys that do not count hold NaN or infinities (see ``dense_part``).
    """
    rows = slice(lists.row, lists.row + lists.height * lists.count)
    q, out = (_by_block(x[batch, key_head, :, rows], lists) for x in (acc.q, acc.out))
    lse = _by_block(acc.lse[batch, key_head, :, rows].unsqueeze(-1), lists)[..., 0]
    if lists.full.shape[1]:
        _add_full(q, out, lse, k, v, lists, acc.call.scale, guard)
    for partial in lists.partial:
        _add_partial(q, out, lse, k, v, partial, acc.call.scale, guard)


def _by_block(rows: Tensor, lists: BlockLists) -> Tensor:
    """[G, count * R, D] -> [count, 1, G, R, D], a view."""
    return torch.unflatten(rows, 1, (lists.count, lists.height)).transpose(0, 1).unsqueeze(1)


def _add_full(
    q: Tensor, out: Tensor, lse: Tensor, k: Tensor, v: Tensor, lists: BlockLists, scale: float, guard: bool
) -> None:
    L, D = k.shape[1:]
    F_ = lists.full.shape[1]
    step = max(1, PANEL_BYTES // (F_ * L * D * k.element_size()))
    k_panel = k.new_empty(min(step, lists.count) * F_, L * D)
    v_panel = v.new_empty(min(step, lists.count) * F_, L * v.shape[2])
    for a in range(0, lists.count, step):
        some = slice(a, min(a + step, lists.count))
        chosen = lists.full[some]
        width = int(lists.num_full[some].max())
        if width == 0:
            continue
        keys = _panel(k, chosen[:, :width], k_panel)
        values = _panel(v, chosen[:, :width], v_panel)
        mask = _padding(lists.num_full[some], width, L, q.dtype)
        part, part_lse = dense_part(q[some], keys, values, scale, mask=mask, guard=guard)
        merge_into(out[some], lse[some], part, part_lse)


def _panel(blocks: Tensor, chosen: Tensor, buffer: Tensor) -> Tensor:
    """The chosen blocks [b, F] side by side: [b, 1, F * L, D] in the buffer's memory."""
    num, F_ = chosen.shape
    into = buffer[: num * F_]
    torch.index_select(blocks.flatten(1), 0, chosen.reshape(-1), out=into)
    return into.view(num, 1, F_ * blocks.shape[1], blocks.shape[2])


def _padding(num_full: Tensor, width: int, block_size: int, dtype: torch.dtype) -> Mask | None:
    if int(num_full.min()) == width:
        return None
    listed = torch.arange(width, device=num_full.device) < num_full[:, None]
    bias = torch.zeros(listed.shape, dtype=dtype, device=listed.device).masked_fill_(~listed, -math.inf)
    return Mask(bias.repeat_interleave(block_size, 1)[:, None, None], (num_full == 0)[:, None, None, None])


def _add_partial(
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    k: Tensor,
    v: Tensor,
    partial: PartialBlocks,
    scale: float,
    guard: bool,
) -> None:
    own, keys = partial.query_block, partial.key_block
    part = dense_part(
        q[own], k[keys].unsqueeze(1), v[keys].unsqueeze(1), scale, mask=partial.mask, guard=guard
    )
    rows, rows_lse = out[own], lse[own]
    merge_into(rows, rows_lse, *part)
    out[own], lse[own] = rows, rows_lse
