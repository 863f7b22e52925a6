"""Scatterbrain over any fixed pattern: pairs one by one where the pattern is, whole blocks where it is not.

    w_ij = e^(s_ij) where the pattern keeps the pair, else L_ij
    L_ij = e^(c_i) sum_r e^(a_ir + mu_r - c_i) e^(e_jr - mu_r)
    mu_r = max over j of e_r(k_j),   c_i = max_r (a_r(q_i) + mu_r)          over the panel of a tile's keys

Per tile of rows and key head the key blocks that some row keeps, or may see in part, form the panel: scores
and features of all its pairs, of which each weighs one or the other. It costs more than exact attention
over the same keys, so patterns that touch most blocks (strided, fixed, single random keys) are here to be
measured. The other blocks come as sums (``kernels.math.complement_blocks``).

A row whose panel may have lost what it sees, because keys that it does not count outweigh them beyond
1e-20, is estimated again from logarithms. Keys that are not finite reach the rows that may see them, and mu
not at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from kernels.contract import AttentionResult, Call
from kernels.math.accumulate import Accumulator, accumulator
from kernels.math.combine import combined_keep
from kernels.math.complement import (
    Features,
    Support,
    exact_rows,
    features_of,
    map_flops,
    merge_complement,
    together,
)
from kernels.math.complement_blocks import BlockFeatures, kept_blocks, rows_part, sums_apart
from kernels.math.features import FeatureMap, FeatureParams
from kernels.math.masked import weighted
from kernels.math.query_tiles import QueryTiles, query_tiles
from kernels.math.random_keys import random_keep
from kernels.math.window import window_keep

TILE = 256
BLOCK = 64
MEND = 1 << 22
"""Exponents that exist at once while rows are estimated again."""
_FAINT = 1e-20


def pattern_keep(support: Support, call: Call, heads: tuple[int, int], i: Tensor, j: Tensor) -> Tensor:
    """The pairs of a fixed pattern, bool [R, M] or [H, R, M], for rows at positions i [R, 1] and all keys j
    [1, M] that some of them may see. ``heads``: H and Hk."""
    params, causal = support.params, call.causal
    if support.name in ("strided", "fixed"):
        w, combine = params.stride, params.combine  # type: ignore[attr-defined]
        if support.name == "strided":
            band = (i - w <= j) & (j <= i) if causal else (i - j).abs() <= w // 2
            patterns = [band, (i - j) % w == 0]
        else:
            patterns = [i // w == j // w, (j == i) | (j % w == w - 1)]
        return combined_keep(patterns, combine, heads[0], call.layer)
    if support.name == "star":
        return _star(params.window, i, j, causal)  # type: ignore[attr-defined]
    if support.name == "random":
        return random_keep(call, params, *heads, i, j) | (i == j)  # type: ignore[arg-type]
    if support.name == "bigbird":
        columns = params.global_tokens  # type: ignore[attr-defined]
        full_rows = 0 if causal else columns
        near = window_keep(i, j, params.window, columns, full_rows, causal)  # type: ignore[attr-defined]
        return near | random_keep(call, params, *heads, i, j)  # type: ignore[arg-type]
    raise ValueError(f"scatterbrain knows no pairs of support {support.name!r}. This is a bug.")


def _star(window: int, i: Tensor, j: Tensor, causal: bool) -> Tensor:
    if causal:
        return window_keep(i, j, window, 1, 0, True)
    relay, apart = j.shape[1] - 1, (i - j).abs()
    return (apart <= window) | (relay - apart <= window) | (j == relay) | (i == relay)


def tiles_attention(
    q: Tensor, k: Tensor, v: Tensor, params: FeatureParams, call: Call, support: Support
) -> AttentionResult:
    """A whole call; rows are visited in tiles at absolute multiples."""
    if call.impl == "triton":
        from kernels._triton.signed_calls import tiles_call

        return tiles_call(q, k, v, params, call, support)
    began = perf_counter()
    acc = accumulator(q, k, v, call)
    features = features_of(acc, params)
    tiles = query_tiles(call, q.shape[2], k.shape[2], TILE, BLOCK)
    dropped = torch.zeros_like(acc.lse)
    acc.complete(0, 0)
    for b in range(len(q)):
        own = features.of_sequence(b)
        blocks = kept_blocks(acc, b, own, params, tiles)
        for tile in range(tiles.num_tiles):
            for keep, panel in _panels(acc, b, tiles, tile, params, support):
                dropped[b, panel.head, :, panel.rows] = _add_panel(acc, b, own, keep, panel, blocks)
        features.flops += own.flops if own is not features else 0
    return together(acc, q, began, features, dropped)


@dataclass(frozen=True)
class _Panel:
    """Rows of the call and keys of one key head; the blocks [P] that are summed instead."""

    head: int
    rows: slice
    keys: Tensor
    summed: Tensor


def _panels(
    acc: Accumulator, b: int, tiles: QueryTiles, tile: int, params: FeatureParams, support: Support
) -> Iterator[tuple[tuple[Tensor, Tensor], _Panel]]:
    """For every key head: (kept, seen) pairs, bool [G or 1, R, keys] and [R, keys], and the panel."""
    began = perf_counter()
    call, (_, Hk, G, _, _), rows = acc.call, acc.q.shape, tiles.rows(tile)
    stop = call.start + rows.stop if call.causal else acc.k.shape[2]
    i = torch.arange(call.start + rows.start, call.start + rows.stop)[:, None]
    j = torch.arange(stop)[None]
    keep = pattern_keep(support, call, (Hk * G, Hk), i, j) | (i < exact_rows(params, call))
    keep = torch.unflatten(keep.expand(Hk * G, len(i), stop), 0, (Hk, G))
    seen = j <= i if call.causal else torch.ones_like(j <= i)
    candidates = stop // BLOCK if not call.causal else tiles.first_key(tile) // BLOCK
    whole = torch.unflatten(keep[..., : candidates * BLOCK], -1, (candidates, BLOCK))
    touched = whole.flatten(1, 2).any(1).any(-1) if candidates else torch.zeros(Hk, 0, dtype=torch.bool)
    acc.selection_s += perf_counter() - began
    for head in range(Hk):
        near = torch.ones(stop, dtype=torch.bool)
        near[: candidates * BLOCK] = touched[head].repeat_interleave(BLOCK)
        keys = near.nonzero()[:, 0]
        panel = _Panel(head, rows, keys, (~touched[head]).nonzero()[:, 0])
        yield (keep[head][..., keys], seen[:, keys]), panel


def _add_panel(
    acc: Accumulator,
    b: int,
    features: Features,
    pairs: tuple[Tensor, Tensor],
    panel: _Panel,
    blocks: BlockFeatures,
) -> Tensor:
    """Fill the rows of one key head, [G, R] of dropped mass back."""
    head, rows, (keep, seen) = panel.head, panel.rows, pairs
    q = acc.q[b, head, :, rows]
    k, v = (x[b, head].index_select(0, panel.keys).to(q.dtype) for x in (acc.k, acc.v))
    of_head = _of_head(features, head)
    shift = of_head.shift(q[None, None])
    keep = keep & seen
    logs = torch.where(keep, (q * acc.call.scale) @ k.mT, _estimates(q, k, of_head, seen & ~keep))
    if features.centre is not None:
        assert isinstance(shift, Tensor)
        logs = torch.where(keep, logs, logs + shift[0, 0].unsqueeze(-1))
    logs.masked_fill_(~seen, -math.inf)
    lse = torch.logsumexp(logs, -1)
    weights = torch.softmax(logs, -1).masked_fill_(~seen | (lse == -math.inf).unsqueeze(-1), 0.0)
    acc.out[b, head, :, rows] = weighted(weights, v.expand(len(q), *v.shape), seen.expand_as(weights))
    acc.lse[b, head, :, rows] = lse
    dropped = weights.masked_fill(keep, 0.0).sum(-1)
    acc.kept += int(keep.sum())
    acc.computed += keep.numel()
    _count(features, q.shape, len(k))
    if len(panel.summed):
        one, own = slice(head, head + 1), panel.summed[None]
        left_out = torch.zeros(1, blocks.num_blocks, dtype=torch.bool).scatter_(1, own, True)
        mu, sums = sums_apart(left_out, blocks.mu[one], blocks.sums[one])
        part = rows_part(q[None, None], of_head, mu[:, 0], sums[:, 0])
        part.log_scale.add_(shift[0] if isinstance(shift, Tensor) else 0.0)
        share = merge_complement(acc.out[b, one, :, rows], acc.lse[b, one, :, rows], part)[0]
        dropped = share + (1.0 - share) * dropped
        features.flops += of_head.flops + 2 * len(panel.summed) * sums[0].numel()
    return dropped


def _of_head(features: Features, head: int) -> Features:
    one = slice(head, head + 1)
    drawn = FeatureMap(features.map.directions[one], features.map.scale)
    return Features(drawn, None if features.centre is None else features.centre[:, one])


def _estimates(q: Tensor, k: Tensor, features: Features, wanted: Tensor) -> Tensor:
    """log L' of rows q [G, R, D] and keys k [P, D] where ``wanted`` [G, R, P]; anything elsewhere."""
    keys = features.map.log_keys(features.centred(k[None, None]))[0, 0]
    rows = features.map.log_queries(q[None, None])[0, 0]
    top = torch.where(torch.isfinite(keys), keys, -math.inf).amax(0)
    top = top.masked_fill(top == -math.inf, 0.0)
    c = (rows + top).amax(-1, keepdim=True)
    found = torch.exp(rows + top - c) @ torch.exp(keys - top).mT
    best = found.masked_fill(~wanted, 0.0).amax(-1)
    faint = (best < _FAINT) & wanted.any(-1)
    found = found.log_().add_(c)
    if bool(faint.any()):
        again = faint.nonzero()
        for some in torch.split(again, max(1, MEND // keys.numel())):
            at = some[:, 0], some[:, 1]
            found[at] = torch.logsumexp(rows[at][:, None] + keys, -1)
    return found


def _count(features: Features, shape: torch.Size, num_keys: int) -> None:
    G, R, F = shape[0], shape[1], features.map.num_features
    features.flops += map_flops(features, num_keys) + G * map_flops(features, R) + 2 * G * R * num_keys * F
