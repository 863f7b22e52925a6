"""A complement that was summed directly, joined to the exact rows under one normaliser.

    share_i = e^(lse'_i + t <q_i, centre>) / (e^(lse_i) + the same),     out_i += share_i (n_i - out_i)

Chen et al., "Scatterbrain" (arXiv 2110.15343), section 4. n_i, lse'_i: attention by features over keys that
lost their mean, whose share of every exponent is put back here.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.launch import Launch, Work
from kernels._triton.signed import LOG2E, along, merge_rows, padded
from kernels._triton.targets import Target

_LOG2E = tl.constexpr(LOG2E)


@triton.jit(do_not_specialize=["num_rows", "first", "q_batch", "q_head"])
def merge_kernel(
    part, part_lse, q, centre, out, lse, dropped, shift_scale, num_rows, first, num_heads, group,
    q_batch, q_head, q_row,
    D: tl.constexpr, DV: tl.constexpr, CENTRED: tl.constexpr, BM: tl.constexpr, DIM: tl.constexpr,
    STEP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Some rows of one head; those before ``first`` stay as they are."""
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    row_mask = (rows >= first) & (rows < num_rows)
    flat = tl.program_id(1).to(tl.int64)
    at = flat * num_rows + rows
    width = tl.arange(0, WIDTH)
    own_lse = tl.load(part_lse + at, mask=row_mask, other=float("-inf"))
    if CENTRED:
        batch, head = flat // num_heads, flat % num_heads
        key_head = batch * (num_heads // group) + head // group
        own_lse += shift_scale * along(
            q + batch * q_batch + head * q_head,
            q_row,
            rows,
            row_mask,
            centre + key_head * D,
            D,
            DIM,
            STEP,
            BM,
        )
    inside = row_mask[:, None] & (width < DV)[None, :]
    own = tl.load(part + at[:, None] * DV + width[None, :], mask=inside, other=0.0)
    merge_rows(own, own_lse, out, lse, dropped, at, row_mask, width, DV)


def merge_part(
    part: Tensor,
    part_lse: Tensor,
    q: Tensor,
    centre: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
    dropped: Tensor,
    first: int,
) -> Launch:
    """part [B, H, N, Dv] and part_lse [B, H, N] into out, lse and dropped of those shapes, all fp32 and
    contiguous, from row ``first`` on; q [B, H, N, D], centre [B, Hk, D] fp32 or None."""
    (B, H, N, D), Dv = q.shape, out.shape[-1]
    BM = 16 if N <= 16 else 32
    Hk = H if centre is None else centre.shape[1]
    return Launch(
        "signed.merge",
        merge_kernel,
        (-(-N // BM), B * H),
        {
            "part": part,
            "part_lse": part_lse,
            "q": q,
            "centre": part_lse if centre is None else centre,
            "out": out,
            "lse": lse,
            "dropped": dropped,
            "shift_scale": float(scale),
            "num_rows": N,
            "first": first,
            "num_heads": H,
            "group": H // Hk,
            "q_batch": q.stride(0),
            "q_head": q.stride(1),
            "q_row": q.stride(2),
        },
        {
            "D": D,
            "DV": Dv,
            "CENTRED": centre is not None,
            "BM": BM,
            "DIM": padded(D),
            "STEP": min(32, padded(D)),
            "WIDTH": padded(Dv),
        },
        num_warps=4,
        num_stages=1,
        sizes=frozenset({"num_rows", "first", "q_batch", "q_head"}),
        multiplies=False,
        work=Work(
            0.0,
            4.0 * B * H * N,
            float(B * H * N * (12 * Dv + 20 + (0 if centre is None else D * q.element_size()))),
        ),
        notes={"centred": int(centre is not None)},
    )


def examples(target: Target, dtype: torch.dtype, head_dim: int) -> Iterator[Launch]:
    """32 query heads over 8 key heads, 16,384 rows."""
    H, Hk, N = 32, 8, 16384

    def empty(*shape: int, like: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=like, device="meta")

    part, lse = empty(1, H, N, head_dim), empty(1, H, N)
    q, centre = empty(1, H, N, head_dim, like=dtype), empty(1, Hk, head_dim)
    yield merge_part(part, lse, q, centre, 1.0, part, lse, lse, 0)
