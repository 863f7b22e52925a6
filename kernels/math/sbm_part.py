"""The edges of every row of a call drawn, and the softmax over them: what the backend sbm runs.

Head by head, and of each head stretches of rows that draw POINTS_AT_ONCE numbers: memory is O(M C + N) beside
them, and nothing has N x M entries. A single row (decode) draws for all heads at once, from the sums that are
kept beside its cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Literal, Protocol

import torch
from torch import Tensor

from kernels.math.accumulate import Accumulator
from kernels.math.edges import attend_ragged, attend_ragged_rows
from kernels.math.sbm import ClusterParams
from kernels.math.sbm_keys import Guide, KeySums, kept_sums
from kernels.math.sbm_sampler import (
    ROWS_AT_ONCE,
    Edges,
    batches,
    bernoulli_edges,
    distinct,
    draw_points,
    head_stream,
    rates,
    row_rates,
    row_streams,
)

PAIRS_AT_ONCE = 1 << 18
Draw = Callable[[slice, Tensor], Iterator[tuple[slice, Edges]]]
"""(rows of the call, their r [R, C]) -> the edges of stretches of them."""


class SbmParams(Protocol):
    @property
    def sampler(self) -> Literal["poisson", "bernoulli"]: ...
    @property
    def exploration(self) -> float: ...


@dataclass
class EdgePart:
    """One call: ``kept`` [H] counts edges by query head, ``flops`` what memberships took."""

    acc: Accumulator
    learned: ClusterParams
    params: SbmParams
    kept: list[int] = field(init=False)
    flops: int = 0
    _count: Callable[[], None] = field(default=lambda: None)

    def __post_init__(self) -> None:
        self.kept = [0] * self.learned.num_heads

    @property
    def num_keys(self) -> int:
        acc = self.acc
        return acc.call.start + acc.q.shape[-2] if acc.call.causal else acc.k.shape[2]

    def count(self) -> None:
        """What was kept and computed, read from the device where only it knows: after everything else has
        been launched."""
        self._count()

    def add(self) -> None:
        if self.acc.call.impl == "triton":
            from kernels._triton.edges_sbm import add_drawn

            self._count = add_drawn(self)
            return
        single = self.acc.q.shape[-2] == 1
        for b in range(self.acc.q.shape[0]):
            if single:
                self._add_row(b)
                continue
            for key_head in range(self.acc.k.shape[1]):
                self._add_group(b, key_head)
        self.acc.complete(sum(self.kept), sum(self.kept))

    def sums(self, b: int, key_head: int | None) -> KeySums:
        """Of all heads where they are kept or asked for (None), else of one key head's query heads."""
        began, acc = perf_counter(), self.acc
        sums = kept_sums(acc.call, self.learned, self.params.exploration > 0.0) if len(acc.q) == 1 else None
        G, some = acc.q.shape[2], slice(None)
        if sums is None and key_head is not None:
            some = slice(key_head, key_head + 1)
            heads = slice(key_head * G, key_head * G + G)
            sums = KeySums(self.learned, self.params.exploration > 0.0, heads)
        elif sums is None:
            sums = KeySums(self.learned, self.params.exploration > 0.0)
        keys = acc.k[b, some, : self.num_keys]
        new = max(0, self.num_keys - sums.length) * len(keys)
        C, D = self.learned.num_clusters, self.learned.head_dim
        self.flops += new * (4 * D * D + G * C * (2 * D + 1))
        sums.extend(keys)
        acc.selection_s += perf_counter() - began
        return sums

    def rates(self, q: Tensor, head: int | slice) -> Tensor:
        C, D = self.learned.num_clusters, self.learned.head_dim
        self.flops += q.shape[:-1].numel() * (4 * D * D + 2 * C * D + 2 * C * C + 2 * C)
        return row_rates(q, self.learned, head, self.params.exploration)

    def _add_group(self, b: int, key_head: int) -> None:
        acc = self.acc
        G = acc.q.shape[2]
        sums = self.sums(b, key_head)
        k, v = (x[b, key_head, : self.num_keys].to(acc.q.dtype).contiguous() for x in (acc.k, acc.v))
        for g in range(G):
            own = g if len(sums.members) == G else key_head * G + g
            draw = self._drawn_points if self.params.sampler == "poisson" else self._drawn_pairs
            for rows, edges in self._timed(draw(b, key_head, g, sums, own)):
                out, lse = attend_ragged(
                    acc.q[b, key_head, g, rows], k, v, edges.ends, edges.keys, acc.call.scale
                )
                acc.put_into(acc.out[b, key_head, g, rows], acc.lse[b, key_head, g, rows], out, lse)
                self.kept[key_head * G + g] += len(edges.keys)

    def _timed(self, drawn: Iterator[tuple[slice, Edges]]) -> Iterator[tuple[slice, Edges]]:
        while True:
            began = perf_counter()
            found = next(drawn, None)
            self.acc.selection_s += perf_counter() - began
            if found is None:
                return
            yield found

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the call and their positions."""
        start, num_rows = self.acc.call.start, self.acc.q.shape[-2]
        for a in range(0, num_rows, ROWS_AT_ONCE):
            b = min(a + ROWS_AT_ONCE, num_rows)
            yield slice(a, b), torch.arange(start + a, start + b, device=self.acc.q.device)

    def _drawn_points(
        self, b: int, key_head: int, g: int, sums: KeySums, own: int
    ) -> Iterator[tuple[slice, Edges]]:
        call, head = self.acc.call, key_head * self.acc.q.shape[2] + g
        prefix = sums.prefix(own, self.num_keys)
        guide, stream = Guide(prefix), head_stream(call.seed, call.layer, head)
        for rows, positions in self._tiles():
            r = self.rates(self.acc.q[b, key_head, g, rows], head)
            seen = prefix[:, positions + 1].mT if call.causal else prefix[:, -1].expand_as(r)
            found, streams = rates(r, seen), row_streams(stream, positions)
            for some in batches(found.expected):
                points = draw_points(streams[some], found.take(some))
                keys = guide.find(points.cluster, points.place)
                edges = distinct(points.row, keys, some.stop - some.start, self.num_keys)
                yield slice(rows.start + some.start, rows.start + some.stop), edges

    def _drawn_pairs(
        self, b: int, key_head: int, g: int, sums: KeySums, own: int
    ) -> Iterator[tuple[slice, Edges]]:
        call, head = self.acc.call, key_head * self.acc.q.shape[2] + g
        members = sums.members[own, :, : self.num_keys].double()
        stream, height = (
            head_stream(call.seed, call.layer, head, bernoulli=True),
            max(1, PAIRS_AT_ONCE // self.num_keys),
        )
        for tile, where in self._tiles():
            r, streams = self.rates(self.acc.q[b, key_head, g, tile], head), row_streams(stream, where)
            for a in range(0, len(r), height):
                some = slice(a, min(a + height, len(r)))
                edges = bernoulli_edges(streams[some], r[some], members, where[some] if call.causal else None)
                self.flops += 2 * (some.stop - a) * members.numel()
                yield slice(tile.start + a, tile.start + some.stop), edges

    def _add_row(self, b: int) -> None:
        """The only row of the call, of all heads."""
        acc, call = self.acc, self.acc.call
        Hk, G, _, D = acc.q.shape[1:]
        sums = self.sums(b, None)
        began = perf_counter()
        q = acc.q[b].reshape(Hk * G, D)
        r = self.rates(q[:, None], slice(None))[:, 0]
        edges = self._row_points(sums, r) if self.params.sampler == "poisson" else self._row_pairs(sums, r)
        acc.selection_s += perf_counter() - began
        head = torch.arange(Hk, device=q.device).repeat_interleave(G)
        out, lse = attend_ragged_rows(q, acc.k[b], acc.v[b], head, edges.ends, edges.keys, call.scale)
        acc.put_into(acc.out[b], acc.lse[b], out.view(Hk, G, 1, -1), lse.view(Hk, G, 1))
        self.kept = [kept + n for kept, n in zip(self.kept, edges.ends.diff().tolist(), strict=True)]

    def _row_points(self, sums: KeySums, r: Tensor) -> Edges:
        found = rates(r, sums.upto(self.num_keys))
        streams, rows, keys = self.streams_of_row(), [], []
        for some in batches(found.expected):
            points = draw_points(streams[some], found.take(some))
            rows.append(points.row.long() + some.start)
            keys.append(sums.find(rows[-1], points.cluster.long(), points.place, self.num_keys))
        return distinct(torch.cat(rows), torch.cat(keys), len(r), self.num_keys)

    def _row_pairs(self, sums: KeySums, r: Tensor) -> Edges:
        streams, parts = self.streams_of_row(), []
        for head in range(len(r)):
            members = sums.members[head, :, : self.num_keys].double()
            parts.append(bernoulli_edges(streams[head : head + 1], r[head : head + 1], members, None))
            self.flops += 2 * members.numel()
        counts = torch.cat([part.ends[1:] for part in parts]).cumsum(0)
        return Edges(torch.nn.functional.pad(counts, (1, 0)), torch.cat([part.keys for part in parts]))

    def streams_of_row(self) -> Tensor:
        """Of the only row of the call, per head: int64 [H]."""
        bernoulli = self.params.sampler == "bernoulli"
        call, heads = self.acc.call, range(self.learned.num_heads)
        streams = [head_stream(call.seed, call.layer, head, bernoulli=bernoulli) for head in heads]
        device = self.acc.q.device
        return row_streams(torch.tensor(streams, device=device), torch.tensor(call.start, device=device))
