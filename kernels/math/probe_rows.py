"""How much softmax mass a selection left out, measured on a few rows.

    dropped_i = 1 - e^(lse_kept_i - lse_i),      lse_i = log sum over all keys that row i may see of e^(s_ij)

The rows are those at absolute positions i with i mod 256 = 255, and the last row of a call of several rows: a
sample of 1 in 256, whose exact scores cost 1 / 256 of exact attention's. A decode step between them has none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.contract import Call

PROBE_EVERY = 256
ROWS_AT_ONCE = 64
SCORES_AT_ONCE = 1 << 20
"""Over all heads: so many keys are scored at a time, but at least 256."""


@dataclass(frozen=True)
class Probe:
    """``dropped_mass``: mean over probed rows, heads and batch, 0 .. 1; None where no row was probed or none
    of them has a finite log-sum-exp. ``flops``: what it took, for ``Stats.other_flops``."""

    dropped_mass: float | None
    flops: int


def probed_rows(start: int, num_rows: int) -> list[int]:
    """Rows of the call (0 .. num_rows - 1) that are probed, in order."""
    first = (PROBE_EVERY - 1 - start) % PROBE_EVERY
    rows = list(range(first, num_rows, PROBE_EVERY))
    last = num_rows - 1
    return rows if num_rows == 1 or last in rows[-1:] else [*rows, last]


def probe_dropped_mass(q: Tensor, k: Tensor, lse: Tensor, call: Call) -> Probe:
    """Measure what the kept pairs of a call have left out.

    q [B, Hk, G, N, D] in the accumulator's dtype (under impl triton as it came), k [B, Hk, M, D] of any float
    dtype, lse [B, Hk, G, N] over the kept pairs (-inf: none), all as ``Accumulator`` holds them.
    O(N / 256 M D H) time, memory for a million scores.
    """
    rows = probed_rows(call.start, q.shape[-2])
    if not rows:
        return Probe(None, 0)
    measure = _mean_by_triton if call.impl == "triton" else _mean
    scored = sum(len(some) * _num_keys(some, k, call) for some in _groups(rows))
    return Probe(measure(q, k, lse, call, rows), 2 * q.shape[-1] * q[..., 0, 0].numel() * scored)


def _groups(rows: list[int]) -> list[list[int]]:
    return [rows[a : a + ROWS_AT_ONCE] for a in range(0, len(rows), ROWS_AT_ONCE)]


def _num_keys(rows: list[int], k: Tensor, call: Call) -> int:
    """That rows of a group go over together."""
    return rows[-1] + call.start + 1 if call.causal else k.shape[2]


def _mean(q: Tensor, k: Tensor, lse: Tensor, call: Call, rows: list[int]) -> float | None:
    shares = []
    for group in _groups(rows):
        some = torch.tensor(group, device=q.device)
        full = _full_lse(q[..., some, :], k, some + call.start, call, _num_keys(group, k, call))
        shares.append((1.0 - torch.exp(lse[..., some] - full))[torch.isfinite(full)])
    dropped = torch.cat(shares).clamp_(0.0, 1.0)
    dropped = dropped[torch.isfinite(dropped)]
    return float(dropped.mean()) if len(dropped) else None


def _mean_by_triton(q: Tensor, k: Tensor, lse: Tensor, call: Call, rows: list[int]) -> float | None:
    """All rows at once; the mean is read back once."""
    from kernels._triton.row_error import row_softmax, row_table

    chosen = torch.tensor(rows)
    table = row_table(chosen, chosen + call.start, q.device)
    full = row_softmax(q.flatten(1, 2), k, None, table, scale=call.scale, causal=call.causal).lse
    kept = lse[..., chosen.to(q.device, non_blocking=True)].flatten(1, 2)
    dropped = (1.0 - torch.exp(kept - full)).clamp_(0.0, 1.0)
    counts = torch.isfinite(full) & torch.isfinite(dropped)
    total, number = torch.stack([dropped.where(counts, 0.0).sum(), counts.sum()]).tolist()
    return total / number if number else None


def _full_lse(q: Tensor, k: Tensor, positions: Tensor, call: Call, stop: int) -> Tensor:
    """Over every key that the rows may see, all of them before ``stop``: [B, Hk, G, R]."""
    lse = torch.full_like(q[..., 0], -math.inf)
    step = max(256, SCORES_AT_ONCE // lse.numel())
    for a in range(0, stop, step):
        b = min(a + step, stop)
        # the rows of a group below each other: a product that is broadcast would copy the keys for each
        scores = (q * call.scale).flatten(2, 3) @ k[:, :, a:b].to(q.dtype).mT
        scores = torch.unflatten(scores, 2, q.shape[2:4])
        if call.causal:
            later = torch.arange(a, b, device=q.device) > positions[:, None]
            scores.masked_fill_(later, -math.inf)
        lse = torch.logaddexp(lse, torch.logsumexp(scores, -1))
    return lse
