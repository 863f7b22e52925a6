"""Decode: the keys of a single row's buckets, found by comparing codes, read and nothing else.

A causal row compares codes from its own position backwards until its buckets are full: its cost grows with
the number of keys only where a bucket is rare.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from kernels.math.accumulate import Accumulator
from kernels.math.bucket_plan import Codes16
from kernels.math.buckets import Codes, Reach
from kernels.math.edges import attend_row_edges
from kernels.math.merge import merge_into
from kernels.math.spans import Ints

_FIRST_KEYS = 4096


def add_row(acc: Accumulator, b: int, codes: Codes, reach: Reach) -> tuple[Ints, int]:
    """Add what the only row of sequence b keeps beyond ``reach.base``; pairs kept by each query head [H], and
    computed."""
    heads, G = codes.rows.shape[:2]
    keys, rows = codes.keys.cpu().numpy(), codes.rows[..., 0].cpu().numpy()
    look = partial(found_keys, tables=codes.tables, i=acc.call.start, causal=acc.call.causal, reach=reach)
    found = [look(keys[h], rows[h, g]) for h in range(heads) for g in range(G)]
    kept = np.array([len(one) for one in found])
    most = int(kept.max())
    if not most:
        return kept, 0
    edges, drop = padded_edges(found, most, acc.call.start)
    head = torch.arange(heads, device=acc.q.device).repeat_interleave(G)
    out, lse = attend_row_edges(
        acc.q[b].flatten(0, 1),
        acc.k[b],
        acc.v[b],
        head,
        edges.to(acc.q.device),
        drop.to(acc.q.device),
        acc.call.scale,
    )
    merge_into(acc.out[b].flatten(0, 1), acc.lse[b].flatten(0, 1), out, lse)
    return kept, edges.numel()


def found_keys(
    keys: Codes16, rows: Codes16, tables: tuple[int, ...], i: int, causal: bool, reach: Reach
) -> Ints:
    """Positions, ascending, that the row at i keeps through keys' codes [tables, M] and its own [rounds]."""
    if causal and i < reach.exact_rows:
        return np.empty(0, np.int64)
    c = reach.cluster_size
    rounds = zip(tables, rows, strict=True)
    if causal:
        near = [_most_recent(keys[table], code, c) for table, code in rounds]
    else:
        near = [_nearest(np.flatnonzero(keys[table] == code), i, c, reach.whole) for table, code in rounds]
    joined = np.unique(np.concatenate(near)) if len(near) > 1 else near[0]
    beyond = joined <= i - reach.window if causal else np.abs(joined - i) > reach.window
    return joined[beyond & (joined >= reach.sinks)]


def _most_recent(keys: Codes16, code: int, count: int) -> Ints:
    """The last ``count`` places of a code."""
    stop, step, found, have = len(keys), _FIRST_KEYS, [], 0
    while stop > 0 and have < count:
        begin = max(0, stop - step)
        found.append(np.flatnonzero(keys[begin:stop] == code) + begin)
        stop, step, have = begin, 4 * step, have + len(found[-1])
    return np.concatenate(found[::-1])[-count:]


def _nearest(members: Ints, i: int, count: int, whole: bool) -> Ints:
    if whole:
        return members
    p = int(np.searchsorted(members, i, side="right"))
    return members[max(p - -(-count // 2), 0) : p + count // 2]


def padded_edges(found: list[Ints], most: int, own: int) -> tuple[Tensor, Tensor]:
    """Edges [rows, most] and which of them do not count. Those are the row's own key, which it keeps anyway:
    at weight 0 it spoils nothing."""
    edges = np.full((len(found), most), own)
    drop = np.ones((len(found), most), bool)
    for row, keys in enumerate(found):
        edges[row, : len(keys)], drop[row, : len(keys)] = keys, False
    return torch.from_numpy(edges), torch.from_numpy(drop)
