"""Buckets straight from the definition, row by row: the specification of ``kernels.math.buckets``."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.contract import Call
from kernels.math.buckets import Codes, Reach
from kernels.math.spans import Ints

Bools = npt.NDArray[np.bool_]


def kept_pairs(codes: Codes, reach: Reach, call: Call) -> Tensor:
    """All kept pairs of one sequence, window, sinks and exact rows included: bool [H, N, M]."""
    heads, G, rounds, N = codes.rows.shape
    i = np.arange(call.start, call.start + N)
    keep = np.tile(_base(i, codes.keys.shape[-1], reach, call.causal), (heads, G, 1, 1))
    for h, g, r in np.ndindex(heads, G, rounds):
        keys, rows = codes.keys[h, codes.tables[r]].cpu().numpy(), codes.rows[h, g, r].cpu().numpy()
        for n, position in enumerate(i.tolist()):
            keep[h, g, n, _near(np.flatnonzero(keys == rows[n]), position, reach, call.causal)] = True
    return torch.from_numpy(keep).flatten(0, 1)


def _base(i: Ints, num_keys: int, reach: Reach, causal: bool) -> Bools:
    j, row = np.arange(num_keys)[None], i[:, None]
    keep: Bools = (j < reach.sinks) | (np.abs(row - j) <= (reach.window - 1 if causal else reach.window))
    return (keep | (row < reach.exact_rows)) & (j <= row) if causal else keep


def _near(members: Ints, position: int, reach: Reach, causal: bool) -> Ints:
    """Those of a bucket's keys, in order, that the row at ``position`` keeps."""
    p, c = int((members <= position).sum()), reach.cluster_size
    if causal:
        return members[max(p - c, 0) : p]
    return members if reach.whole else members[max(p - -(-c // 2), 0) : p + c // 2]
