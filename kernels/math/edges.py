"""Softmax attention over an edge list: row i keeps the keys e_i1 .. e_iE, each row its own.

    s_it = scale * <q_i, k_(e_it)>,   out_i = sum_t e^(s_it - lse_i) v_(e_it),   lse_i = log sum_t e^(s_it)

Where rows have equally many edges, ``drop`` marks those that do not count (repeats, keys that another part
has); where they have not, ``ends`` says where each row's begin and end, and a row may have none: it gives 0
and lse -inf. On a CPU the scores are one sampled matrix product over a CSR pattern and the values one
weighted embedding bag: neither copies a key. Elsewhere keys are gathered in tiles. O(R E) memory.
"""

from __future__ import annotations

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

_GATHER_ROWS = 256
_GATHER_EDGES = 1 << 16


def attend_edges(
    q: Tensor, k: Tensor, v: Tensor, edges: Tensor, drop: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """q [R, D], k [M, D], v [M, Dv], edges int32 [R, E], drop bool [R, E] -> out [R, Dv], lse [R]."""
    if q.device.type != "cpu" or edges.shape[1] > len(k):  # a CSR pattern holds no more edges than pairs
        return _by_gather(q, k, v, edges, drop, scale)
    scores = _sampled_scores(q, k, edges, scale)
    weights, total, lse = _unnormalised(scores, drop)
    out = F.embedding_bag(edges, v, per_sample_weights=weights, mode="sum")
    return out.div_(total.unsqueeze(-1)), lse


def attend_row_edges(
    q: Tensor, k: Tensor, v: Tensor, head: Tensor, edges: Tensor, drop: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """One query position: q [S, G, D] over k[head[s], edges[s]], k [Hk, M, D], edges [S, E] -> [S, G, Dv],
    [S, G].
    """
    keys = k[head[:, None], edges].to(q.dtype)
    values = v[head[:, None], edges].to(q.dtype)
    scores = torch.bmm(q * scale, keys.mT)
    weights, total, lse = _unnormalised(scores, None if drop is None else drop.unsqueeze(1))
    return torch.bmm(weights, values).div_(total.unsqueeze(-1)), lse


def attend_ragged(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, edges: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """q [R, D], k [M, D], v [M, Dv] of one dtype; edges int32 [n], each pair once; row i's are
    edges[ends[i] : ends[i + 1]], ends int64 [R + 1] -> out [R, Dv], lse [R]."""
    if q.device.type != "cpu":
        head = torch.zeros(len(q), dtype=torch.long, device=q.device)
        return attend_ragged_rows(q, k[None], v[None], head, ends, edges, scale)
    if len(edges) == 0:
        return q.new_zeros(len(q), v.shape[1]), torch.full_like(q[:, 0], -math.inf)
    begins = ends.int()
    pattern = _csr(begins, edges, q.new_zeros(len(edges)), (len(q), len(k)))
    scores = torch.sparse.sampled_addmm(pattern, q, k.mT, alpha=scale, beta=0.0).values()
    weights, total, lse = _unnormalised_ragged(scores, ends)
    out = F.embedding_bag(edges, v, begins, per_sample_weights=weights, mode="sum", include_last_offset=True)
    return out.div_(total.unsqueeze(-1)), lse


def attend_ragged_rows(
    q: Tensor, k: Tensor, v: Tensor, head: Tensor, ends: Tensor, edges: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The same with keys gathered, some edges at a time, each row s over a key head of its own: q [S, D],
    k [Hk, M, D], v [Hk, M, Dv] of any float dtype, head [S] -> out [S, Dv], lse [S]."""
    row = torch.repeat_interleave(torch.arange(len(q), device=q.device), ends.diff())
    scores, at = q.new_zeros(len(edges)), head[row]
    for a in range(0, len(edges), _GATHER_EDGES):
        some = slice(a, a + _GATHER_EDGES)
        keys = k[at[some], edges[some]].to(q.dtype)
        scores[some] = (q[row[some]] * keys).sum(-1) * scale
    weights, total, lse = _unnormalised_ragged(scores, ends)
    out = q.new_zeros(len(q), v.shape[-1])
    for a in range(0, len(edges), _GATHER_EDGES):
        some = slice(a, a + _GATHER_EDGES)
        values = v[at[some], edges[some]].to(q.dtype) * weights[some, None]
        out += torch.segment_reduce(values, "sum", offsets=(ends - a).clamp(0, len(values)), axis=0)
    return out.div_(total.unsqueeze(-1)), lse


def _unnormalised_ragged(scores: Tensor, ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As ``_unnormalised``, of scores [n]."""
    if len(scores) == 0:
        nothing = scores.new_full((len(ends) - 1,), -math.inf)
        return scores, torch.ones_like(nothing), nothing
    top = torch.segment_reduce(scores, "max", offsets=ends, initial=-math.inf)
    top.masked_fill_(top == -math.inf, 0.0)
    weights = scores.sub_(torch.repeat_interleave(top, ends.diff())).exp_()
    total = torch.segment_reduce(weights, "sum", offsets=ends)
    lse = top + torch.log(total)
    return weights, total.masked_fill_(total == 0.0, 1.0), lse


def _unnormalised(scores: Tensor, drop: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """e^(s - max), its sum over the edges (1 where a row has none), and the log-sum-exp. ``scores`` is
    overwritten.
    """
    if drop is not None:
        scores.masked_fill_(drop, -math.inf)
    top = scores.amax(-1)
    top.masked_fill_(top == -math.inf, 0.0)
    weights = scores.sub_(top.unsqueeze(-1)).exp_()
    total = weights.sum(-1)
    lse = top + torch.log(total)
    return weights, total.masked_fill_(total == 0.0, 1.0), lse


def _sampled_scores(q: Tensor, k: Tensor, edges: Tensor, scale: float) -> Tensor:
    R, E = edges.shape
    ends = torch.arange(0, R * E + 1, E, dtype=edges.dtype)
    pattern = _csr(ends, edges.reshape(-1), q.new_zeros(R * E), (R, k.shape[0]))
    scores: Tensor = torch.sparse.sampled_addmm(pattern, q, k.mT, alpha=scale, beta=0.0)
    return scores.values().view(R, E)


def _csr(ends: Tensor, columns: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.sparse_csr_tensor(ends, columns, values, size=size, check_invariants=False)


def _by_gather(
    q: Tensor, k: Tensor, v: Tensor, edges: Tensor, drop: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    head = torch.zeros(1, dtype=torch.long, device=q.device)
    parts = []
    for a in range(0, len(q), _GATHER_ROWS):
        rows = slice(a, a + _GATHER_ROWS)
        own = None if drop is None else drop[rows]
        heads = head.expand(len(edges[rows]))
        parts.append(attend_row_edges(q[rows, None], k[None], v[None], heads, edges[rows].long(), own, scale))
    return torch.cat([out[:, 0] for out, _ in parts]), torch.cat([lse[:, 0] for _, lse in parts])


with warnings.catch_warnings():
    # torch says once per process that CSR tensors are in beta; a server's log is no place for it.
    warnings.simplefilter("ignore")
    _csr(torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), (1, 1))
