"""Attention within residue classes: row i keeps the keys j = i (mod stride).

    out_i = softmax(scale * q_i K_c^T) V_c,   K_c = keys at c, c + stride, c + 2 stride, ...,   c = i mod
    stride

A permutation that groups positions by residue makes the pattern dense within each class. The permutation is a
strided view; classes with equally many rows and keys run as one batch. Cost: N M / stride score elements
(causal: half of it).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.math.accumulate import Accumulator
from kernels.math.dense import computed_elements, dense_part
from kernels.math.merge import merge_into


@dataclass(frozen=True)
class ResidueGroup:
    """Neighbouring classes of equal shape: ``count`` of them, whose first rows are ``row``, row + 1, ... (of
    the call) and whose first keys are ``key``, key + 1, ...; ``num_rows`` rows each, ``num_before`` keys
    before the first of them, ``num_keys`` keys that some row sees.
    """

    count: int
    row: int
    key: int
    num_rows: int
    num_before: int
    num_keys: int


def residue_groups(
    start: int, num_rows: int, num_keys: int, stride: int, causal: bool
) -> Iterator[ResidueGroup]:
    """The classes met by rows start .. start + num_rows - 1, grouped; at most five groups."""
    first_rows = min(stride, num_rows)
    borders = {0, first_rows, num_rows % stride, (-start) % stride}
    borders |= {(num_keys - start) % stride, (-start + num_keys % stride) % stride}
    inside = sorted(x for x in borders if 0 <= x <= first_rows)
    for row, stop in zip(inside[:-1], inside[1:], strict=True):
        key = (start + row) % stride
        rows = -(-(num_rows - row) // stride)
        before = (start + row - key) // stride
        keys = before + rows if causal else -(-(num_keys - key) // stride)
        yield ResidueGroup(stop - row, row, key, rows, before, keys)


def add_residues(acc: Accumulator, stride: int) -> None:
    """Add the classes of ``stride`` to every row of the accumulator."""
    if acc.call.impl == "triton":
        from kernels._triton import spans

        spans.add_residues(acc, stride)
        return
    call, num_rows, num_keys = acc.call, acc.q.shape[-2], acc.k.shape[2]
    guard = call.causal and not _finite(acc, slice(call.start, call.start + num_rows))
    kept = computed = 0
    for group in residue_groups(call.start, num_rows, num_keys, stride, call.causal):
        _add_group(acc, group, stride, guard)
        R, before = group.num_rows, group.num_before
        triangle = R * before + R * (R + 1) // 2
        kept += group.count * (triangle if call.causal else R * group.num_keys)
        done = R * before + computed_elements(R, R, True) if call.causal else R * group.num_keys
        computed += group.count * done
    acc.complete(kept * acc.num_heads, computed * acc.num_heads)


def _add_group(acc: Accumulator, group: ResidueGroup, stride: int, guard: bool) -> None:
    q = _classes(acc.q, group.row, group.count, stride, group.num_rows)  # [B, Hk, G, S, R, D], S classes
    k = _classes(acc.k, group.key, group.count, stride, group.num_keys)  # [B, Hk, S, P, D]
    v = _classes(acc.v, group.key, group.count, stride, group.num_keys)
    out = _classes(acc.out, group.row, group.count, stride, group.num_rows)
    lse = _classes(acc.lse.unsqueeze(-1), group.row, group.count, stride, group.num_rows)
    before = group.num_before if acc.call.causal else -1
    for b in range(q.shape[0]):
        for heads in _head_batches(q.shape[1], q.shape[2]):
            rows = q[b, heads].permute(2, 0, 1, 3, 4)  # [S, Hk or 1, G, R, D]
            keys, values = k[b, heads].transpose(0, 1), v[b, heads].transpose(0, 1)
            part, part_lse = _class_attention(rows, keys, values, before, acc.call.scale, guard)
            acc.put_into(
                out[b, heads].permute(2, 0, 1, 3, 4),
                lse[b, heads].permute(2, 0, 1, 3, 4)[..., 0],
                part,
                part_lse,
            )


def _class_attention(
    q: Tensor, k: Tensor, v: Tensor, before: int, scale: float, guard: bool
) -> tuple[Tensor, Tensor]:
    """Rows [S, Hk, G, R, D] over keys [S, Hk, P, D]: all of them (before < 0), or causal after ``before``
    keys.
    """
    if before < 0:
        return dense_part(q, k, v, scale)
    out, lse = dense_part(q, k[:, :, before:], v[:, :, before:], scale, causal=True, guard=guard)
    if before:
        merge_into(out, lse, *dense_part(q, k[:, :, :before], v[:, :, :before], scale))
    return out, lse


def _classes(rows: Tensor, first: int, count: int, stride: int, length: int) -> Tensor:
    """[..., N, D] -> [..., count, length, D]: class s is rows first + s, first + s + stride, ... A view."""
    stop = first + (length - 1) * stride + count
    return rows[..., first:stop, :].unfold(-2, count, stride).movedim(-1, -3)


def _head_batches(num_key_heads: int, group: int) -> list[slice]:
    """Key heads that run in one call: all where no head is shared, one by one where views demand it."""
    return [slice(None)] if group == 1 else [slice(h, h + 1) for h in range(num_key_heads)]


def _finite(acc: Accumulator, keys: slice) -> bool:
    total = acc.k[:, :, keys].sum(dtype=torch.float32) + acc.v[:, :, keys].sum(dtype=torch.float32)
    return math.isfinite(float(total))
