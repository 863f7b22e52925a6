"""Softmax over keys that share a bucket with their row: what ``lsh`` and ``kmeans`` have in common.

    A_i = window(i)  ∪  sinks  ∪  near_1(i)  ∪ ... ∪  near_rounds(i)
    causal:         near_r(i) = the cluster_size most recent keys j <= i of row i's bucket of round r
    bidirectional:  with the bucket's keys in order of position and p of them at positions <= i,
                    its places [p - ceil(cluster_size / 2), p + floor(cluster_size / 2)), as far as they exist

A pair that several rounds, the window or the sinks find counts once. Rows below ``exact_rows`` keep all that
they may see. Keys are sorted by (bucket, position) once per round and key head: then near_r(i) is a run of
places, and the rows of a bucket, sorted in the same way, have runs that only move on. So rows are taken in
dense panels, and what a row does not keep of a panel is masked out; keys within the window and sinks are runs
of places too. A pair of an earlier round is known by that key's place in the order of that round.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.contract import Call
from kernels.math.bucket_plan import Round, Sight, Table, batches, key_table, look
from kernels.math.spans import SpanPattern
from kernels.math.window import window_pattern


@dataclass(frozen=True)
class Reach:
    """How far rows look. ``whole``: a row sees all keys of its bucket (buckets that are cut to size).
    ``exact_rows``: causal rows at positions below it keep every key that they may see."""

    cluster_size: int
    window: int
    sinks: int
    exact_rows: int = 0
    whole: bool = False

    def base(self, causal: bool) -> SpanPattern:
        """The part that asks no bucket: window, sinks and exact rows. With the bucket part's panels it has
        every kept pair once."""
        return window_pattern(self.window, self.sinks, self.exact_rows if causal else 0, causal)

    def sight(self, causal: bool) -> Sight:
        return Sight(self.cluster_size, self.window, self.sinks, self.exact_rows, self.whole, causal)


@dataclass(frozen=True)
class Codes:
    """Buckets of one sequence: ``keys`` [Hk, tables, M], ``rows`` [Hk, G, rounds, N], int16 or int32, each
    below ``num_buckets``.

    Round r looks into the keys' table ``tables[r]``. Rounds of one table hold different buckets for a row.
    ``flops``: what making them took, of all heads: rows, and keys that no kept state had a code for.
    """

    keys: Tensor
    rows: Tensor
    tables: tuple[int, ...]
    num_buckets: int
    flops: int = 0


@dataclass(frozen=True)
class BucketPanels:
    """T panels of R rows over P keys, of one key head.

    ``rows`` int64 [T, R] numbers the rows of the group as g * N + n (n: row of the call), ``keys`` int64
    [T, P] are positions, ``drop`` [T, R, P] is -1 (all bits set) for pairs that do not count, else 0. Places
    that only fill a panel repeat some row or key and keep nothing; ``into`` is ``rows`` with G * N in such
    places, for putting results back: no other row stands twice in the panels of a round.
    """

    head: int
    rows: Tensor
    into: Tensor
    keys: Tensor
    drop: Tensor

    @property
    def keep(self) -> Tensor:
        """bool [T, R, P]: which pairs count."""
        return ~self.drop.bool()

    @property
    def num_kept(self) -> int:
        return self.drop.numel() - int(np.count_nonzero(self.drop.cpu().numpy()))

    def num_kept_per_head(self, group: int, num_rows: int) -> Tensor:
        """int64 [G]: pairs kept by each query head of a group of ``group`` with ``num_rows`` rows."""
        dropped = self.drop.sum(-1, dtype=self.drop.dtype)  # at most as many as keys: it fits
        kept = dropped.to(torch.int64).add_(self.drop.shape[-1])
        counts = kept.new_zeros(group + 1)  # the last: places that only fill a panel
        return counts.index_add_(0, (self.into // num_rows).view(-1), kept.view(-1))[:-1]


def bucket_panels(codes: Codes, reach: Reach, call: Call) -> Iterator[BucketPanels]:
    """Every pair that the buckets of one sequence keep and ``reach.base(call.causal)`` does not, exactly once
    over all batches of panels, head by head. ``codes``: causal, of the keys up to the call's last row alone.
    """
    for head in range(codes.rows.shape[0]):
        yield from head_panels(codes, head, reach, call)


def head_panels(codes: Codes, head: int, reach: Reach, call: Call) -> Iterator[BucketPanels]:
    """The same for one key head."""
    for round_panels in head_rounds(codes, head, reach, call):
        yield from round_panels


def head_rounds(codes: Codes, head: int, reach: Reach, call: Call) -> Iterator[Iterator[BucketPanels]]:
    """The same for one key head, round by round; each round to its end before the next."""
    if not looks_beyond_base(reach, call, codes.rows.shape[-1], codes.keys.shape[-1]):
        return
    sight = reach.sight(call.causal)
    tables: dict[int, Table] = {}
    rounds: list[Round] = []
    for r, number in enumerate(codes.tables):
        keys, rows = codes.keys[head, number].cpu().numpy(), codes.rows[head, :, r].cpu().numpy()
        if number not in tables:
            tables[number] = key_table(keys, codes.num_buckets, sight.sinks)
        rounds.append(look(tables[number], number, rows, call.start, sight))
        found = batches(rounds[-1], rounds[:-1], sight.cluster_size, codes.keys.device)
        yield (BucketPanels(head, one.rows, one.into, one.keys, one.drop) for one in found)


def looks_beyond_base(reach: Reach, call: Call, num_rows: int, num_keys: int) -> bool:
    """False where window, sinks and exact rows leave nothing for buckets to find."""
    last = call.start + num_rows - 1
    if call.causal:
        return last >= reach.exact_rows and last - reach.window >= reach.sinks
    return max(last, num_keys - 1 - call.start) > reach.window
