"""The rows of one call while the disjoint parts of its pattern are added up.

Each part covers every row once: the first is copied, the later ones are merged by log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from time import perf_counter

from torch import Tensor

from kernels.contract import AttentionResult, Call, Stats
from kernels.math.dense import accumulator_dtype, grouped
from kernels.math.merge import merge_into


@dataclass
class Accumulator:
    """q [B, Hk, G, N, D], out [B, Hk, G, N, Dv], lse [B, Hk, G, N] in the accumulator's dtype; and the tally.
    Under impl ``triton`` q keeps the dtype it came in: kernels read it as it is and accumulate in fp32.

    ``kept``, ``computed``, ``dense`` and ``scored`` count pairs as ``Stats`` says, over all heads and batch
    entries.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    call: Call
    filled: bool = False
    kept: int = 0
    computed: int = 0
    dense: int = 0
    scored: int = 0
    selection_s: float = 0.0

    @property
    def num_heads(self) -> int:
        """Heads times batch entries: what per-head counts are multiplied by."""
        return self.lse.shape[0] * self.lse.shape[1] * self.lse.shape[2]

    def put(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        """Add a part for some rows; ``complete`` closes the part."""
        self.put_into(self.out[..., rows, :], self.lse[..., rows], out, lse)

    def put_into(self, to_out: Tensor, to_lse: Tensor, out: Tensor, lse: Tensor) -> None:
        """The same for any views of ``out`` and ``lse``."""
        if self.filled:
            merge_into(to_out, to_lse, out, lse)
        else:
            to_out.copy_(out)
            to_lse.copy_(lse)

    def complete(self, kept: int, computed: int, dense: int = 0) -> None:
        """The part has covered every row. Counts are summed over heads and batch."""
        self.filled = True
        self.kept += kept
        self.computed += computed
        self.dense += dense

    def heads(self, key_heads: slice, group: slice) -> Accumulator:
        """Some of the heads, sharing memory; its tally is its own."""
        return replace(
            self,
            q=self.q[:, key_heads, group],
            k=self.k[:, key_heads],
            v=self.v[:, key_heads],
            out=self.out[:, key_heads, group],
            lse=self.lse[:, key_heads, group],
            kept=0,
            computed=0,
            dense=0,
            scored=0,
            selection_s=0.0,
        )


def accumulator(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Accumulator:
    """An empty one for q [B, H, N, D], k [B, Hk, M, D], v [B, Hk, M, Dv]."""
    dtype = accumulator_dtype(q.dtype)
    rows = grouped(q if call.impl == "triton" else q.to(dtype), k.shape[1])
    out = rows.new_empty((*rows.shape[:-1], v.shape[-1]), dtype=dtype)
    return Accumulator(rows, k, v, out, rows.new_empty(rows.shape[:-1], dtype=dtype), call)


def result(
    acc: Accumulator, q: Tensor, began: float, *, impl: str | None = None, dropped: Tensor | None = None
) -> AttentionResult:
    """What the call returns. ``began``: the perf_counter reading when it began; ``dropped`` [B, Hk, G, N]."""
    spent_ms = (perf_counter() - began) * 1e3
    stats = Stats(
        pairs_kept=acc.kept,
        pairs_exact=pairs_exact(q, acc.k.shape[2], acc.call),
        pairs_computed=acc.computed,
        selection_ms=acc.selection_s * 1e3,
        compute_ms=spent_ms - acc.selection_s * 1e3,
        impl=impl or acc.call.impl,
        pairs_dense=acc.dense,
        dropped_mass=None if dropped is None else float(dropped.mean()),
        pairs_scored=acc.scored,
    )
    rows_dropped = None if dropped is None else dropped.flatten(1, 2).float()
    return AttentionResult(
        acc.out.flatten(1, 2).to(q.dtype), acc.lse.flatten(1, 2).float(), stats, rows_dropped
    )


def pairs_exact(q: Tensor, num_keys: int, call: Call) -> int:
    """Pairs that ``exact`` computes, over heads and batch."""
    B, H, N, _ = q.shape
    per_head = N * call.start + N * (N + 1) // 2 if call.causal else N * num_keys
    return B * H * per_head
