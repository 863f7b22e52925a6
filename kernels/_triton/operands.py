"""What the kernels are handed: where each sequence's keys lie, and the rows that their parts are added up in.

Many sequences go through one launch: their keys and values are views anywhere in memory, told to a kernel as
distances in elements from one base tensor (int64), since a kernel cannot load through a pointer that it
loaded. Letters as in ``kernels.contract``; S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.contract import Call, Segment

SEQUENCE_COLUMNS = 8
"""Columns of ``Keys.table``: distance of k, distance of v, strides of k (head, position), strides of v (head,
position), number of keys, absolute position of the first query row."""
ALIGNED_BYTES = 16


@dataclass(frozen=True)
class Keys:
    """Keys and values of S sequences.

    ``k`` and ``v`` are the base tensors (of the first sequence); ``table`` int64 [S, SEQUENCE_COLUMNS] on
    their device. ``aligned``: every distance and stride is a multiple of 16 bytes, so that a kernel may say
    ``tl.multiple_of`` of what it loads from the table and read whole vectors.
    """

    k: Tensor
    v: Tensor
    table: Tensor
    num_heads: int
    key_dim: int
    value_dim: int
    aligned: bool
    lengths: tuple[int, ...]
    starts: tuple[int, ...]

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)


def keys_of_call(k: Tensor, v: Tensor, call: Call) -> Keys:
    """One ``attend`` call: k [B, Hk, M, D], v [B, Hk, M, Dv]; each batch entry is a sequence."""
    return _keys([(k[b], v[b], call.start) for b in range(len(k))])


def keys_of_segments(segments: Sequence[Segment]) -> Keys:
    """One packed call: k [1, Hk, M, D] and v [1, Hk, M, Dv] of every segment."""
    return _keys([(segment.k[0], segment.v[0], segment.start) for segment in segments])


def _keys(found: Sequence[tuple[Tensor, Tensor, int]]) -> Keys:
    (base_k, base_v, _), rows = found[0], []
    for k, v, start in found:
        strides = k.stride(0), k.stride(1), v.stride(0), v.stride(1)
        rows.append((_distance(k, base_k), _distance(v, base_v), *strides, k.shape[1], start))
    return Keys(
        base_k,
        base_v,
        torch.tensor(rows, dtype=torch.int64).to(base_k.device, non_blocking=True),
        base_k.shape[0],
        base_k.shape[-1],
        base_v.shape[-1],
        _aligned(base_k, base_v, rows),
        tuple(row[6] for row in rows),
        tuple(row[7] for row in rows),
    )


def _distance(tensor: Tensor, base: Tensor) -> int:
    """Elements from the base's first to the tensor's; they need not share an allocation."""
    return 0 if tensor.is_meta else (tensor.data_ptr() - base.data_ptr()) // tensor.element_size()


def _aligned(k: Tensor, v: Tensor, rows: Sequence[tuple[int, ...]]) -> bool:
    elements = ALIGNED_BYTES // k.element_size()
    bases = k.is_meta or (k.data_ptr() % ALIGNED_BYTES == 0 and v.data_ptr() % ALIGNED_BYTES == 0)
    return bases and all(value % elements == 0 for row in rows for value in row[:6])


@dataclass
class Rows:
    """Queries and what their parts have come to: q [B, H, N, D]; ``out`` [B, H, N, Dv] and ``lse`` [B, H, N]
    fp32 (natural log). A call of one part writes ``out`` in q's dtype; of several, in fp32 until all are
    merged.

    ``filled``: some part has covered every row; later ones are merged by log-sum-exp in the kernel that
    computes them. Batch entry b is sequence b of ``Keys`` where B > 1; a packed call has B = 1 and its tables
    say which rows belong to which sequence.
    """

    q: Tensor
    out: Tensor
    lse: Tensor
    filled: bool = False

    def result(self) -> Tensor:
        return self.out.to(self.q.dtype)


def rows_of(q: Tensor, value_dim: int, *, parts: int = 1) -> Rows:
    """Empty rows for ``parts`` parts that each cover every row. The rows of ``out`` lie head by head next to
    each other in memory, which is how networks go on with them."""
    B, H, N, _ = q.shape
    dtype = q.dtype if parts == 1 else torch.float32
    out = torch.empty(B, N, H, value_dim, dtype=dtype, device=q.device).transpose(1, 2)
    return Rows(q, out, torch.empty(B, H, N, dtype=torch.float32, device=q.device))
