"""Softmax attention of some query rows over one panel of keys: every fast path ends here.

    out_i = sum_j e^(s_ij - lse_i) v_j,   s_ij = scale * <q_i, k_j>,   lse_i = log sum_j e^(s_ij)

On a CPU this is one call of torch's flash kernel, which returns the log-sum-exp. Grouped heads cost no copy:
the key heads go into its batch dimension, the G query heads of each into its head dimension, and k, v are
expanded with stride 0. Elsewhere, and where Dv differs from D, plain matrix products over key chunks do it.

Rows are 5-dimensional here: q [B, Hk, G, R, D], k [B, Hk, P, D], v [B, Hk, P, Dv] -> out [B, Hk, G, R, Dv],
lse [B, Hk, G, R], both in q's dtype (fp32 or fp64); k and v may be of a narrower dtype.
P keys of a panel, R rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.math.merge import merge_into

KEY_CHUNK = 1024
FLASH_KEYS = 512


@dataclass(frozen=True, eq=False)
class Mask:
    """``bias`` [R, P], or [B, 1, R or 1, P] where panels differ: 0 keeps a pair, -inf drops it.
    ``empty`` marks rows without any key (None: there are none), broadcastable to lse [B, Hk, G, R]."""

    bias: Tensor
    empty: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.bias.nbytes + (self.empty.nbytes if self.empty is not None else 0)


def make_mask(keep: Tensor, dtype: torch.dtype) -> Mask:
    """A mask from booleans, True where the pair counts."""
    bias = torch.zeros(keep.shape, dtype=dtype, device=keep.device).masked_fill_(~keep, -math.inf)
    empty = ~keep.any(-1)
    if not bool(empty.any()):
        return Mask(bias)
    return Mask(bias, empty if keep.dim() == 2 else empty.unsqueeze(1))


def grouped(q: Tensor, num_key_heads: int) -> Tensor:
    """[B, H, N, D] as the view [B, Hk, G, N, D]."""
    B, H, N, D = q.shape
    return torch.unflatten(q, 1, (num_key_heads, H // num_key_heads))


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def dense_part(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    mask: Mask | None = None,
    causal: bool = False,
    guard: bool = False,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the rows over the panel. ``causal`` needs R = P: row r then sees keys 0..r.

    ``guard`` asks that no dropped key be felt even where its numbers are NaN or infinite (slower).
    """
    k, v = k.to(q.dtype), v.to(q.dtype)
    if guard or q.device.type != "cpu" or q.shape[-1] != v.shape[-1]:
        return _portable(q, k, v, scale, mask, causal)
    out, lse = _flash(q, k, v, scale, None if mask is None else mask.bias, causal)
    if mask is not None and mask.empty is not None:
        lse.masked_fill_(mask.empty, -math.inf)
    return out, lse


def computed_elements(num_rows: int, num_keys: int, causal: bool) -> int:
    """Score elements that ``dense_part`` computes per head: torch's CPU kernel computes whole chunks of 512
    keys, and skips those that lie above the diagonal of a block of query rows."""
    if not causal:
        return num_rows * num_keys
    step = 256 if num_rows >= 768 else 64 if num_rows >= 192 else 32
    stops = (min(r + step, num_rows) for r in range(0, num_rows, step))
    return sum(
        (stop - r) * min(-(-stop // FLASH_KEYS) * FLASH_KEYS, num_keys)
        for r, stop in zip(range(0, num_rows, step), stops, strict=True)
    )


def _flash(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    B, Hk, G, R, _ = q.shape
    if G == 1:
        out, lse = _flash_call(q[:, :, 0], k, v, scale, bias, causal)
        return out.unsqueeze(2), lse.unsqueeze(2)
    if Hk == 1:
        many = (B, G, -1, -1)
        out, lse = _flash_call(q[:, 0], k.expand(many), v.expand(many), scale, bias, causal)
        return out.unsqueeze(1), lse.unsqueeze(1)
    if B == 1:
        many = (Hk, G, -1, -1)
        out, lse = _flash_call(
            q[0], k[0, :, None].expand(many), v[0, :, None].expand(many), scale, bias, causal
        )
        return out.unsqueeze(0), lse.unsqueeze(0)
    # torch's kernel takes two leading dimensions, here are three: go along the shorter of two
    along_heads = q.shape[0] >= q.shape[1]
    dim, count = (1, Hk) if along_heads else (0, B)
    parts = []
    for at in range(count):
        one_q, one_k, one_v = (x.narrow(dim, at, 1) for x in (q, k, v))
        parts.append(_flash(one_q, one_k, one_v, scale, bias, causal))
    return torch.cat([out for out, _ in parts], dim), torch.cat([lse for _, lse in parts], dim)


def _flash_call(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    if causal and scale <= 0:  # the kernel multiplies its own -inf of later keys by it
        q, scale = q * scale, 1.0
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=bias, scale=scale
    )
    return out, lse


def _portable(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Mask | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """Matrix products over chunks of keys; a dropped pair is never multiplied, whatever its numbers."""
    R, P = q.shape[-2], k.shape[-2]
    keep = _kept(mask, causal, R, P, q.device)
    out = q.new_zeros((*q.shape[:-1], v.shape[-1]))
    lse = q.new_full(q.shape[:-1], -math.inf)
    for a in range(0, P, KEY_CHUNK):
        b = min(a + KEY_CHUNK, P)
        kept = None if keep is None else keep[..., a:b]
        merge_into(out, lse, *_chunk(q, k[:, :, a:b].unsqueeze(2), v[:, :, a:b].unsqueeze(2), scale, kept))
    return out, lse


def _kept(mask: Mask | None, causal: bool, R: int, P: int, device: torch.device) -> Tensor | None:
    if causal:
        return torch.ones(R, P, dtype=torch.bool, device=device).tril()
    if mask is None:
        return None
    keep = mask.bias == 0
    return keep if keep.dim() == 2 else keep.unsqueeze(1)


def _chunk(q: Tensor, k: Tensor, v: Tensor, scale: float, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    scores = (q * scale) @ k.mT
    if keep is not None:
        scores = scores.masked_fill(~keep, -math.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1))
    if keep is None:
        return weights @ v, lse
    broken = ~torch.isfinite(v)
    out = weights @ v.masked_fill(broken, 0.0)
    if bool(broken.any()):
        reached = keep.to(q.dtype).expand(scores.shape) @ broken.to(q.dtype)
        out = out.masked_fill(reached > 0, math.nan)
    return out, lse
