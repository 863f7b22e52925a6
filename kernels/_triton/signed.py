"""Scatterbrain's features of key blocks, summed over what a query tile leaves out, joined to its exact rows.

    block b    beta_br = log sum over j in b of e^(e_r(k_j)),      m_br = the mean of v_j under those weights
    tile t     B_tr = log sum over left-out b of e^(beta_br),      m_tr = the mean of m_br under those weights
    row i      lse'_i = log sum_r e^(a_r(q_i) + B_tr),             n_i  = the mean of m_tr under those weights
    together   share_i = e^(lse'_i) / (e^(lse_i) + e^(lse'_i)),    out_i += share_i (n_i - out_i)

Chen et al., "Scatterbrain" (arXiv 2110.15343), section 4; letters of ``kernels.math.complement_blocks``. Sums
are kept here as a logarithm and a mean: means are no larger than the values they are of, so they are held and
multiplied in the values' own type. A row over a tile is then a softmax over F features. Projections on random
directions are fp32 (three TF32 products): an exponent's rounding is its weight's relative error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.launch import Launch, Work
from kernels._triton.targets import Target

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)
_LN2 = tl.constexpr(LN2)
_LOG2E = tl.constexpr(LOG2E)


def padded(size: int) -> int:
    """The next power of two that a matrix product can take."""
    return max(16, 1 << (size - 1).bit_length())


@triton.jit
def projected(
    x, stride, rows, row_mask, directions, features, feature_mask, centre,
    CENTRED: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, STEP: tl.constexpr,
    ROWS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """<w_r, x_i> [ROWS, FEATURES] and |x_i|^2 [ROWS] of rows that lose the centre first."""
    found = tl.zeros([ROWS, FEATURES], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    for begin in tl.static_range(0, DIM, STEP):
        dims = begin + tl.arange(0, STEP)
        inside = dims < D
        part = tl.load(
            x + rows[:, None] * stride + dims[None, :], mask=row_mask[:, None] & inside[None, :], other=0.0
        ).to(tl.float32)
        if CENTRED:
            part -= tl.load(centre + dims, mask=inside, other=0.0)[None, :]
        w = tl.load(
            directions + features[:, None] * D + dims[None, :],
            mask=feature_mask[:, None] & inside[None, :],
            other=0.0,
        )
        found = tl.dot(part, tl.trans(w), found, input_precision="tf32x3")
        squares += tl.sum(part * part, 1)
    return found, squares


@triton.jit(do_not_specialize=["first_block", "k_head", "v_head", "bias_head", "mean_head"])
def block_features_kernel(
    k, v, directions, centre, bias, means, root, half, first_block,
    k_head, k_row, v_head, v_row, bias_head, mean_head,
    F: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, CENTRED: tl.constexpr,
    ALIGN: tl.constexpr, BF: tl.constexpr, DIM: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """beta and m of one block, one key head and BF features."""
    block = (first_block + tl.program_id(0)).to(tl.int64)
    head = tl.program_id(2).to(tl.int64)
    features = tl.program_id(1) * BF + tl.arange(0, BF)
    feature_mask = features < F
    rows = block * BLOCK + tl.arange(0, BLOCK)
    here = tl.full([BLOCK], 1, tl.int1)
    logs, squares = projected(
        k + head * tl.multiple_of(k_head.to(tl.int64), ALIGN), k_row, rows, here,
        directions + head * F * D, features, feature_mask,
        centre + head * D, CENTRED, D, DIM, STEP, BLOCK, BF,
    )  # fmt: skip
    logs = logs * root - (squares * half)[:, None]
    top = tl.max(logs, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2(logs - top[None, :])
    total = tl.sum(weights, 0)
    width = tl.arange(0, WIDTH)
    v += head * tl.multiple_of(v_head.to(tl.int64), ALIGN)
    values = tl.load(v + rows[:, None] * v_row + width[None, :], mask=(width < DV)[None, :], other=0.0)
    sums = tl.dot(tl.trans(weights).to(values.dtype), values, input_precision=PRECISION)
    at = block * F + features
    tl.store(bias + head * bias_head + at, top + tl.log2(total), mask=feature_mask)
    tl.store(
        means + head * mean_head + at[:, None] * DV + width[None, :],
        (sums / total[:, None]).to(means.dtype.element_ty),
        mask=feature_mask[:, None] & (width < DV)[None, :],
    )


@triton.jit(do_not_specialize=["num_tiles", "num_blocks", "bias_head", "mean_head"])
def left_out_kernel(
    left_out, ends, bias, means, tile_bias, tile_means, num_tiles, num_blocks, bias_head, mean_head,
    F: tl.constexpr, DV: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """B and m of BT tiles, one key head and one feature."""
    tiles = tl.program_id(1) * BT + tl.arange(0, BT)
    feature = tl.program_id(0)
    head = tl.program_id(2).to(tl.int64)
    tile_mask = tiles < num_tiles
    table = left_out + (head * num_tiles + tiles.to(tl.int64)) * num_blocks
    width = tl.arange(0, WIDTH)
    top = tl.full([BT], float("-inf"), tl.float32)
    total = tl.zeros([BT], tl.float32)
    sums = tl.zeros([BT, WIDTH], tl.float32)
    end = tl.max(tl.load(ends + tiles, mask=tile_mask, other=0), 0)
    for begin in tl.range(0, end, BP):
        blocks = begin + tl.arange(0, BP)
        block_mask = blocks < end
        at = blocks.to(tl.int64) * F + feature
        out = (
            tl.load(table[:, None] + blocks[None, :], mask=tile_mask[:, None] & block_mask[None, :], other=0)
            != 0
        )
        beta = tl.load(bias + head * bias_head + at, mask=block_mask, other=0.0)
        mean = tl.load(
            means + head * mean_head + at[:, None] * DV + width[None, :],
            mask=block_mask[:, None] & (width < DV)[None, :],
            other=0.0,
        )
        finite = tl.abs(mean.to(tl.float32)) < float("inf")
        logs = tl.where(out, beta[None, :], float("-inf"))
        new_top = tl.maximum(top, tl.max(logs, 1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.where(out, tl.exp2(logs - safe[:, None]), 0.0)
        decay = tl.exp2(top - safe)
        total = total * decay + tl.sum(weights, 1)
        clean = tl.where(finite, mean, 0.0).to(mean.dtype)
        sums = sums * decay[:, None] + tl.dot(weights.to(mean.dtype), clean, input_precision=PRECISION)
        if tl.min(tl.min(finite.to(tl.int32), 1), 0) == 0:
            # a block that is not finite is felt where it is left out: 0 * NaN would be NaN in all tiles
            felt = tl.dot(
                out.to(mean.dtype), tl.where(finite, 0.0, 1.0).to(mean.dtype), input_precision=PRECISION
            )
            sums = tl.where(felt > 0.0, float("nan"), sums)
        top = new_top
    none = total == 0.0
    divisor = tl.where(none, 1.0, total)
    into = (head * num_tiles + tiles.to(tl.int64)) * F + feature
    tl.store(tile_bias + into, tl.where(none, float("-inf"), top + tl.log2(divisor)), mask=tile_mask)
    tl.store(
        tile_means + into[:, None] * DV + width[None, :],
        (sums / divisor[:, None]).to(tile_means.dtype.element_ty),
        mask=tile_mask[:, None] & (width < DV)[None, :],
    )


@triton.jit(do_not_specialize=["num_tiles", "per_tile", "num_rows", "first_tile", "q_head"])
def rows_kernel(
    q, directions, centre, bias, means, out, lse, dropped, borders,
    root, half, shift_scale, log_features, num_tiles, per_tile, num_rows, first_tile, group, q_head, q_row,
    F: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, CENTRED: tl.constexpr, ALIGN: tl.constexpr,
    BM: tl.constexpr, BF: tl.constexpr, DIM: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of one query head over their tile's features, merged into out, lse and dropped."""
    tile = first_tile + tl.program_id(0) // per_tile
    head = tl.program_id(1).to(tl.int64)
    key_head = head // group
    first = tl.load(borders + tile) + (tl.program_id(0) % per_tile) * BM
    rows = first + tl.arange(0, BM)
    row_mask = rows < tl.load(borders + tile + 1)
    own = key_head * num_tiles + (tile - first_tile)
    q += head * tl.multiple_of(q_head.to(tl.int64), ALIGN)
    width = tl.arange(0, WIDTH)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    sums = tl.zeros([BM, WIDTH], tl.float32)
    squares = tl.zeros([BM], tl.float32)
    for begin in tl.range(0, F, BF):
        features = begin + tl.arange(0, BF)
        feature_mask = features < F
        logs, squares = projected(
            q, q_row, rows.to(tl.int64), row_mask, directions + key_head * F * D, features,
            feature_mask, centre, False, D, DIM, STEP, BM, BF,
        )  # fmt: skip
        beta = tl.load(bias + own * F + features, mask=feature_mask, other=float("-inf"))
        logs = logs * root + beta[None, :]
        new_top = tl.maximum(top, tl.max(logs, 1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(logs - safe[:, None])
        decay = tl.exp2(top - safe)
        total = total * decay + tl.sum(weights, 1)
        mean = tl.load(
            means + (own * F + features)[:, None] * DV + width[None, :],
            mask=feature_mask[:, None] & (width < DV)[None, :],
            other=0.0,
        )
        sums = sums * decay[:, None] + tl.dot(weights.to(mean.dtype), mean, input_precision=PRECISION)
        top = new_top
    scale = -squares * half - log_features
    if CENTRED:
        scale += shift_scale * along(
            q, q_row, rows.to(tl.int64), row_mask, centre + key_head * D, D, DIM, STEP, BM
        )
    lost = total == 0.0
    divisor = tl.where(lost, 1.0, total)
    part_lse = tl.where(lost, float("-inf"), (top + tl.log2(divisor) + scale) * _LN2)
    merge_rows(
        sums / divisor[:, None], part_lse, out, lse, dropped,
        head * num_rows + rows.to(tl.int64), row_mask, width, DV,
    )  # fmt: skip


@triton.jit
def along(
    x, stride, rows, row_mask, centre, D: tl.constexpr, DIM: tl.constexpr, STEP: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """<x_i, centre> [ROWS]."""
    found = tl.zeros([ROWS], tl.float32)
    for begin in tl.static_range(0, DIM, STEP):
        dims = begin + tl.arange(0, STEP)
        inside = dims < D
        part = tl.load(
            x + rows[:, None] * stride + dims[None, :], mask=row_mask[:, None] & inside[None, :], other=0.0
        ).to(tl.float32)
        found += tl.sum(part * tl.load(centre + dims, mask=inside, other=0.0)[None, :], 1)
    return found


@triton.jit
def merge_rows(part, part_lse, out, lse, dropped, at, row_mask, width, DV: tl.constexpr):
    """Join a part to rows ``at`` of out [.., Dv], lse and dropped, which takes the part's share in."""
    inside = row_mask[:, None] & (width < DV)[None, :]
    places = at[:, None] * DV + width[None, :]
    old_lse = tl.load(lse + at, mask=row_mask, other=0.0)
    old_dropped = tl.load(dropped + at, mask=row_mask, other=0.0)
    old = tl.load(out + places, mask=inside, other=0.0)
    high = tl.maximum(old_lse, part_lse)
    safe = tl.where(high == float("-inf"), 0.0, high)
    weight = tl.exp2((part_lse - safe) * _LOG2E)
    joined = tl.exp2((old_lse - safe) * _LOG2E) + weight
    joined = tl.where(high == float("-inf"), 1.0, joined)
    share = weight / joined
    new = tl.where((share == 0.0)[:, None], old, old + share[:, None] * (part - old))
    tl.store(out + places, new, mask=inside)
    tl.store(lse + at, tl.where(share == 0.0, old_lse, safe + tl.log2(joined) * _LN2), mask=row_mask)
    tl.store(dropped + at, share + (1.0 - share) * old_dropped, mask=row_mask)


@dataclass(frozen=True)
class Map:
    """A feature map for kernels: ``directions`` [Hk, F, D] and ``centre`` [Hk, D] fp32 (None: keys keep their
    mean), both contiguous; ``scale`` t."""

    directions: Tensor
    centre: Tensor | None
    scale: float

    @property
    def num_features(self) -> int:
        return self.directions.shape[1]

    @property
    def key_root(self) -> float:
        """What <w_r, k> is multiplied by for an exponent of 2."""
        return math.sqrt(abs(self.scale)) * LOG2E

    @property
    def query_root(self) -> float:
        return math.copysign(self.key_root, self.scale)

    @property
    def half(self) -> float:
        """What |x|^2 is multiplied by."""
        return abs(self.scale) / 2 * LOG2E

    def centre_or_any(self) -> Tensor:
        """A tensor to point at where nothing is read."""
        return self.directions if self.centre is None else self.centre


@dataclass(frozen=True)
class Sums:
    """``bias`` [Hk, n, F] fp32 (logarithms to base 2) and ``means`` [Hk, n, F, Dv] in the values' dtype, of n
    blocks or tiles; only their head may have a stride of its own."""

    bias: Tensor
    means: Tensor

    @property
    def count(self) -> int:
        return self.bias.shape[1]

    @property
    def nbytes(self) -> int:
        return self.bias.nbytes + self.means.nbytes

    def first(self, count: int) -> Sums:
        return Sums(self.bias[:, :count], self.means[:, :count])


def room(heads: int, count: int, num_features: int, v: Tensor) -> Sums:
    """Unwritten sums for values like v [..., Dv]."""
    shape = heads, count, num_features
    bias = torch.empty(shape, dtype=torch.float32, device=v.device)
    return Sums(bias, torch.empty(*shape, v.shape[-1], dtype=v.dtype, device=v.device))


def precision(dtype: torch.dtype) -> str:
    """How products of this type are carried out; 16-bit floats have one way only."""
    return "tf32x3" if dtype == torch.float32 else "ieee"


def alignment(*tensors: Tensor) -> int:
    """Elements that the heads of tensors [heads, n, width] begin at a multiple of: 16 bytes of them, or 1."""
    elements = 16 // max(tensor.element_size() for tensor in tensors)
    return elements if all(tensor.stride(0) % elements == 0 for tensor in tensors) else 1


def feature_tile(num_features: int, most: int = 64) -> int:
    return min(most, padded(num_features))


def block_features(k: Tensor, v: Tensor, fmap: Map, block: int, begin: int, into: Sums) -> Launch:
    """Blocks ``begin`` .. into.count - 1 of k [Hk, M, D], v [Hk, M, Dv], each of ``block`` keys."""
    (Hk, F, D), Dv = fmap.directions.shape, v.shape[-1]
    wide = v.dtype == torch.float32
    BF = feature_tile(F, 32 if wide else 64)
    num = into.count - begin
    args: dict[str, Tensor | int | float] = {
        "k": k,
        "v": v,
        "directions": fmap.directions,
        "centre": fmap.centre_or_any(),
        "bias": into.bias,
        "means": into.means,
        "root": fmap.key_root,
        "half": fmap.half,
        "first_block": begin,
        "k_head": k.stride(0),
        "k_row": k.stride(1),
        "v_head": v.stride(0),
        "v_row": v.stride(1),
        "bias_head": into.bias.stride(0),
        "mean_head": into.means.stride(0),
    }
    constants: dict[str, int | bool | str | float] = {
        "F": F,
        "D": D,
        "DV": Dv,
        "BLOCK": block,
        "CENTRED": fmap.centre is not None,
        "BF": BF,
        "DIM": padded(D),
        "STEP": min(32, padded(D)),
        "WIDTH": padded(Dv),
        "PRECISION": precision(v.dtype),
        "ALIGN": alignment(k, v),
    }
    keys = num * block * Hk
    return Launch(
        "signed.block_features",
        block_features_kernel,
        (num, -(-F // BF), Hk),
        args,
        constants,
        num_warps=8 if padded(Dv) > 64 else 4,
        sizes=frozenset({"first_block", "k_head", "v_head", "bias_head", "mean_head"}),
        work=Work(
            2.0 * keys * F * (D + Dv),
            float(keys * F),
            float(keys * (D + Dv) * k.element_size() + num * Hk * F * (4 + Dv * v.element_size())),
        ),
        notes={"block": block},
    )


def left_out_sums(left_out: Tensor, ends: Tensor, blocks: Sums, into: Sums) -> Launch:
    """Sums over the blocks that ``left_out`` uint8 [Hk, T, P] marks, tile by tile; ``ends`` int32 [T]: blocks
    from there on are in no tile's table."""
    (Hk, T, P), F, Dv = left_out.shape, blocks.bias.shape[2], blocks.means.shape[3]
    wide = blocks.means.dtype == torch.float32
    BT = 16 if T <= 16 else 64
    args: dict[str, Tensor | int | float] = {
        "left_out": left_out,
        "ends": ends,
        "bias": blocks.bias,
        "means": blocks.means,
        "tile_bias": into.bias,
        "tile_means": into.means,
        "num_tiles": T,
        "num_blocks": P,
        "bias_head": blocks.bias.stride(0),
        "mean_head": blocks.means.stride(0),
    }
    constants: dict[str, int | bool | str | float] = {
        "F": F,
        "DV": Dv,
        "BT": BT,
        "BP": 16 if wide else 32,
        "WIDTH": padded(Dv),
        "PRECISION": precision(blocks.means.dtype),
    }
    return Launch(
        "signed.left_out",
        left_out_kernel,
        (F, -(-T // BT), Hk),
        args,
        constants,
        num_warps=8 if BT == 64 else 4,
        num_stages=1 if wide else 2,
        sizes=frozenset({"num_tiles", "num_blocks", "bias_head", "mean_head"}),
        work=Work(2.0 * Hk * T * P * F * Dv, float(Hk * T * P * F), float(2 * blocks.means.numel() * 2)),
        notes={"tiles": BT},
    )


@dataclass(frozen=True)
class Exact:
    """Rows of one sequence and what their exact half has come to: q [H, N, D] with a dense last dimension;
    ``out`` [H, N, Dv], ``lse`` and ``dropped`` [H, N] fp32, contiguous, which kernels write."""

    q: Tensor
    out: Tensor
    lse: Tensor
    dropped: Tensor


def rows_over_sums(
    rows: Exact, fmap: Map, tiles: Sums, borders: Tensor, tallest: int, first_tile: int = 0
) -> Launch:
    """Merge ``tiles``, sums of the tiles from ``first_tile`` on, into their rows. ``borders`` int32: rows
    where tiles begin and end, none higher than ``tallest``."""
    (H, N, _), (Hk, F, D), Dv = rows.q.shape, fmap.directions.shape, rows.out.shape[-1]
    wide = tiles.means.dtype == torch.float32
    BM = 16 if tallest <= 16 else 64
    per_tile = -(-tallest // BM)
    args: dict[str, Tensor | int | float] = {
        "q": rows.q,
        "directions": fmap.directions,
        "centre": fmap.centre_or_any(),
        "bias": tiles.bias,
        "means": tiles.means,
        "out": rows.out,
        "lse": rows.lse,
        "dropped": rows.dropped,
        "borders": borders,
        "root": fmap.query_root,
        "half": fmap.half,
        "shift_scale": fmap.scale * LOG2E,
        "log_features": math.log2(F),
        "num_tiles": tiles.count,
        "per_tile": per_tile,
        "num_rows": N,
        "first_tile": first_tile,
        "group": H // Hk,
        "q_head": rows.q.stride(0),
        "q_row": rows.q.stride(1),
    }
    constants: dict[str, int | bool | str | float] = {
        "F": F,
        "D": D,
        "DV": Dv,
        "CENTRED": fmap.centre is not None,
        "ALIGN": 1 if wide else alignment(rows.q),  # sm_100 spills where it reads vectors of fp32
        "BM": BM,
        "BF": feature_tile(F, 16 if wide and padded(Dv) > 64 else 32 if wide else 64),
        "DIM": padded(D),
        "STEP": 16 if wide else min(32, padded(D)),
        "WIDTH": padded(Dv),
        "PRECISION": precision(tiles.means.dtype),
    }
    return Launch(
        "signed.rows",
        rows_kernel,
        (tiles.count * per_tile, H),
        args,
        constants,
        num_warps=8 if BM == 64 and (wide or padded(Dv) > 64) else 4,
        num_stages=1 if wide else 2,
        sizes=frozenset({"num_tiles", "per_tile", "num_rows", "first_tile", "q_head"}),
        work=Work(
            2.0 * H * N * F * (D + Dv),
            float(H * N * F),
            float(H * N * (D * rows.q.element_size() + 8 * Dv + 16)),
        ),
        notes={"rows": BM},
    )


def examples(target: Target, dtype: torch.dtype, head_dim: int) -> Iterator[Launch]:
    """Default tiles: 32 query heads over 8 key heads, 16,384 positions, 64 features, tiles of 256 rows."""
    H, Hk, N, F, block, tiles = 32, 8, 16384, 64, 64, 64

    def empty(*shape: int, like: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=like, device="meta")

    q, k = empty(H, N, head_dim, like=dtype), empty(Hk, N, head_dim, like=dtype)
    fmap = Map(empty(Hk, F, head_dim), empty(Hk, head_dim), head_dim**-0.5)
    blocks, sums = room(Hk, N // block, F, k), room(Hk, tiles, F, k)
    yield block_features(k, k, fmap, block, 0, blocks)
    yield left_out_sums(
        empty(Hk, tiles, N // block, like=torch.uint8), empty(tiles, like=torch.int32), blocks, sums
    )
    exact = Exact(q, empty(H, N, head_dim), empty(H, N), empty(H, N))
    yield rows_over_sums(exact, fmap, sums, empty(tiles + 1, like=torch.int32), 256)
    from kernels._triton import signed_merge, signed_pairs

    yield from signed_merge.examples(target, dtype, head_dim)
    yield from signed_pairs.examples(target, dtype, head_dim)
