"""Exact softmax attention of a few rows that lie anywhere in a sequence.

    o_i = sum_j e^(s_ij - lse_i) v_j,    s_ij = scale * <q_i, k_j>,    j <= i where causal

The rows and the G query heads of a key head lie below each other, so keys and values are read once for all of
them. Keys that every row may see go through one call of torch's flash kernel in panels of 2,048 that its
threads share; those that only some may see follow in panels of 1,024 under a mask, over the rows that see
any of them; partial results merge by log-sum-exp (Dao, "Flash-Decoding", 2023). Rows far apart are taken in
groups, so that little is multiplied only to be masked.

Impl ``triton`` is another kernel (``kernels._triton.row_error``): its weights keep 16 bits or more where v is
narrow.

RG rows of one group times G, S panels of one call, P keys of a panel.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.contract import Impl
from kernels.math.dense import Mask, accumulator_dtype, dense_part
from kernels.math.merge import merge_into

GROUP_ROWS = 64
PANEL_KEYS = 2048
"""Their keys and values stay in a core's cache while all rows pass over them."""
PANELS_AT_ONCE = 16
MASKED_KEYS = 1024
MIN_SPAN, SPAN_DIVISOR = 2048, 2
"""Rows of a group lie within half of the keys before them, or 2,048."""


def exact_rows(
    q: Tensor, positions: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, *, impl: Impl = "auto"
) -> Tensor:
    """o [1, H, R, Dv] in fp32 (fp64 where q is) of the rows q [1, H, R, D] at ``positions`` int64 [R]
    (absolute, in any order) over k [1, Hk, M, D] and v [1, Hk, M, Dv] of any float dtype.

    O(H R M (D + Dv)) time; memory for 64 rows over 2,048 keys and 16 partial results. No key is felt by a row
    that may not see it, whatever its numbers; M = 0 gives zeros. ``impl`` auto: triton where the tensors are
    on a CUDA device and its kernels can compute them, else torch. ValueError where shapes do not fit, a
    causal position lies outside the keys, or impl triton cannot compute them.
    """
    _check(q, positions, k, v, causal)
    if runs_triton(q, v, impl):
        return _by_triton(q, positions, k, v, scale, causal)
    order = torch.argsort(positions)
    ascending = positions[order].tolist()
    order = order.to(q.device)
    out = q.new_zeros((*q.shape[:3], v.shape[-1]), dtype=accumulator_dtype(q.dtype))
    for rows in _groups(ascending, causal):
        some, of_some = order[rows], ascending[rows] if causal else None
        stop = ascending[rows.stop - 1] + 1 if causal else k.shape[2]
        out[:, :, some] = _group(q[0, :, some], of_some, k[0, :, :stop], v[0, :, :stop], scale)
    return out


def runs_triton(q: Tensor, v: Tensor, impl: Impl) -> bool:
    """Whether rows q over values v go to Triton's kernels. ValueError where they must and cannot."""
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f"impl must be auto, torch or triton, got {impl!r}")
    if impl == "torch" or (impl == "auto" and not q.is_cuda):
        return False
    from kernels._triton.available import why_not

    reasons = why_not(q, v)
    if impl == "triton" and reasons:
        raise ValueError("; ".join(reasons))
    return not reasons


def _by_triton(q: Tensor, positions: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    from kernels._triton.row_error import row_softmax, row_table

    stop = int(positions.max()) + 1 if causal and len(positions) else k.shape[2]
    if not (len(positions) and stop):
        return q.new_zeros((*q.shape[:3], v.shape[-1]), dtype=torch.float32)
    table = row_table(torch.arange(len(positions)), positions, q.device)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k[:, :, :stop], v[:, :, :stop]))
    out = row_softmax(q, k, v, table, scale=scale, causal=causal).out
    assert out is not None
    return out


def _groups(positions: list[int], causal: bool) -> Iterator[slice]:
    """Rows start .. stop of the ascending positions that go over the keys together."""
    begin = 0
    for row, position in enumerate(positions):
        first = positions[begin]
        far = causal and position - first > max(MIN_SPAN, first // SPAN_DIVISOR)
        if row - begin == GROUP_ROWS or far:
            yield slice(begin, row)
            begin = row
    if positions:
        yield slice(begin, len(positions))


def _group(q: Tensor, positions: list[int] | None, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q [H, R, D] at ascending positions (None: they see every key), k [Hk, M, D], v [Hk, M, Dv] ->
    [H, R, Dv]."""
    H, R, D = q.shape
    Hk, M, Dv = v.shape
    rows = q.to(accumulator_dtype(q.dtype)).reshape(Hk, H // Hk * R, D)
    out, lse = rows.new_zeros(Hk, H // Hk * R, Dv), rows.new_full(rows.shape[:2], -math.inf)
    seen_by_all = M if positions is None else positions[0] + 1
    whole = seen_by_all // PANEL_KEYS
    at_once = PANELS_AT_ONCE if k.dtype == rows.dtype else 1
    for a in range(0, whole, at_once):
        keys = slice(a * PANEL_KEYS, min(a + at_once, whole) * PANEL_KEYS)
        merge_into(out, lse, *_panels(rows, k[:, keys], v[:, keys], scale))
    if whole * PANEL_KEYS < seen_by_all:
        keys = slice(whole * PANEL_KEYS, seen_by_all)
        merge_into(out, lse, *_panel(rows, k[:, keys], v[:, keys], scale, None))
    if positions is not None and seen_by_all < M:
        by_head = (torch.unflatten(x, 1, (H // Hk, R)) for x in (out, lse))
        _add_masked(
            torch.unflatten(rows, 1, (H // Hk, R)), *by_head, positions=positions, k=k, v=v, scale=scale
        )
    return out.reshape(H, R, Dv)


def _add_masked(
    rows: Tensor, out: Tensor, lse: Tensor, *, positions: list[int], k: Tensor, v: Tensor, scale: float
) -> None:
    """Add the keys that not all of the rows [Hk, G, R, D] may see to out [Hk, G, R, Dv], lse [Hk, G, R]."""
    Hk, G, R, _ = rows.shape
    for a in range(positions[0] + 1, v.shape[1], MASKED_KEYS):
        keys = slice(a, min(a + MASKED_KEYS, v.shape[1]))
        first = bisect_left(positions, a)
        mask = _mask(torch.tensor(positions[first:], device=rows.device), keys, G, rows.dtype)
        some = rows[:, :, first:].reshape(Hk, G * (R - first), -1)
        of_some = _panel(some, k[:, keys], v[:, keys], scale, mask)
        parts = (torch.unflatten(x, 1, (G, R - first)) for x in of_some)
        merge_into(out[:, :, first:], lse[:, :, first:], *parts)


def _panels(rows: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """rows [Hk, RG, D] over S whole panels of keys that they all see -> out [Hk, RG, Dv], lse [Hk, RG]."""
    k, v = (torch.unflatten(x, 1, (-1, PANEL_KEYS)) for x in (k, v))  # [Hk, S, P, D]
    many = rows[:, None, None].expand(-1, k.shape[1], -1, -1, -1)
    out, lse = dense_part(many, k, v, scale)
    total = torch.logsumexp(lse, 1, keepdim=True)
    weights = torch.exp(lse - total).unsqueeze(-1)
    return (out * weights).sum(1).squeeze(1), total[:, 0, 0]


def _panel(rows: Tensor, k: Tensor, v: Tensor, scale: float, mask: Mask | None) -> tuple[Tensor, Tensor]:
    """rows [Hk, RG, D] over keys of which each sees its own part. A key that is not finite would be felt by
    the rows that drop it; it is looked for only once a result shows one."""
    many, k, v = rows[None, :, None], k[None], v[None]
    out, lse = dense_part(many, k, v, scale, mask=mask)
    if mask is not None and not bool(torch.isfinite(out).all()):
        out, lse = dense_part(many, k, v, scale, mask=mask, guard=True)
    return out[0, :, 0], lse[0, :, 0]


def _mask(positions: Tensor, keys: slice, group: int, dtype: torch.dtype) -> Mask:
    """Of RG = group * R rows, head after head. Each sees the first of the keys."""
    later = torch.arange(keys.start, keys.stop, device=positions.device) > positions[:, None]
    bias = torch.zeros(later.shape, dtype=dtype, device=later.device).masked_fill_(later, -math.inf)
    return Mask(bias.repeat(group, 1))


def _check(q: Tensor, positions: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    shapes = [tuple(x.shape) for x in (q, k, v)]
    if any(len(shape) != 4 or shape[0] != 1 for shape in shapes):
        raise ValueError(f"q, k, v have shapes {shapes}: [1, heads, rows, dim] each is needed")
    if k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q, k, v have shapes {shapes}: keys and values of one length, q as wide as k are needed"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are no multiple of {k.shape[1]} key heads")
    if positions.shape != (q.shape[2],):
        raise ValueError(f"positions has shape {tuple(positions.shape)}: one for each of {q.shape[2]} rows")
    if causal and len(positions) and not 0 <= int(positions.min()) <= int(positions.max()) < k.shape[2]:
        raise ValueError(
            f"positions must lie in 0 .. {k.shape[2] - 1}: a causal row's own key is among the keys"
        )
