"""Decode: the keys of a causal row's buckets, found by comparing codes from its own position backwards.

    near_r = the cluster_size most recent keys whose code in round r is the row's;  A = union of near_r, less
    the window and the sinks;  O = sum_{j in A} e^(s_j - lse) v_j

One program finds the keys of one query head, all rounds side by side, and stops as soon as every bucket is
full; another attends to them and merges the row, which holds its window and sinks already.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.launch import Launch
from kernels.math.accumulate import Accumulator
from kernels.math.buckets import Codes, Reach

_LOG2E = 1.4426950408889634
CODES_AT_ONCE = 1024


@triton.jit(
    do_not_specialize=["key_x", "key_t", "num_keys", "num_rounds", "cluster_size", "window", "sinks", "room"]
)
def bucket_row_keys(
    keys, rows, listed, count, key_x, key_t, num_keys, num_rounds, cluster_size, window, sinks, room,
    G: tl.constexpr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    rounds = tl.arange(0, ROUNDS)
    real = rounds < num_rounds
    code = tl.load(rows + head * num_rounds + rounds, mask=real, other=0).to(tl.int32)
    base = keys + (head // G) * key_x + rounds.to(tl.int64)[:, None] * key_t
    have = tl.where(real, 0, cluster_size)
    total, begin = 0, 0
    while (begin < num_keys) & (tl.min(have, 0) < cluster_size):
        j = num_keys - 1 - begin - tl.arange(0, BLOCK)
        inside = real[:, None] & (j >= 0)[None]
        found = tl.load(base + j[None], mask=inside, other=0).to(tl.int32)
        same = (inside & (found == code[:, None])).to(tl.int32)
        rank = have[:, None] + tl.cumsum(same, 1) - same
        near = tl.max(tl.where(rank < cluster_size, same, 0), 0)
        near = tl.where((j <= num_keys - 1 - window) & (j >= sinks), near, 0)
        tl.store(listed + head * room + total + tl.cumsum(near, 0) - near, j, mask=near != 0)
        total += tl.sum(near, 0)
        have += tl.sum(same, 1)
        begin += BLOCK
    tl.store(count + head, total)


@triton.jit(do_not_specialize=["room", "scale"])
def bucket_row_attend(
    q, k, v, out, lse, listed, count,
    q_b, q_h, q_g, k_b, k_h, k_m, v_b, v_h, v_m, out_b, out_h, out_g, lse_b, lse_h, lse_g, room, scale,
    HK: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    g, h, b = head % G, head // G % HK, head // G // HK
    num = tl.load(count + head)
    dims, value_dims = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    query = tl.load(q + b * q_b + h * q_h + g * q_g + dims, mask=dims < D, other=0.0).to(tl.float32) * scale
    m = tl.load(lse + b * lse_b + h * lse_h + g * lse_g) * 1.4426950408889634
    out_at = out + b * out_b + h * out_h + g * out_g + value_dims
    acc = tl.load(out_at, mask=value_dims < DV, other=0.0)
    nothing = m == float("-inf")
    l = tl.where(nothing, 0.0, 1.0)
    acc = tl.where(nothing, 0.0, acc)
    for a in tl.range(0, num, BLOCK):
        at = a + tl.arange(0, BLOCK)
        inside = at < num
        j = tl.load(listed + head * room + at, mask=inside, other=0).to(tl.int64)
        keys = tl.load(
            k + b * k_b + h * k_h + j[:, None] * k_m + dims[None],
            mask=inside[:, None] & (dims < D)[None],
            other=0.0,
        )
        scores = tl.where(inside, tl.sum(keys.to(tl.float32) * query[None], 1), float("-inf"))
        top = tl.maximum(m, tl.max(scores, 0))
        safe = tl.where(top == float("-inf"), 0.0, top)
        weights, decay = tl.exp2(scores - safe), tl.exp2(m - safe)
        values = tl.load(
            v + b * v_b + h * v_h + j[:, None] * v_m + value_dims[None],
            mask=inside[:, None] & (value_dims < DV)[None],
            other=0.0,
        )
        acc = acc * decay + tl.sum(weights[:, None] * values.to(tl.float32), 0)
        l = l * decay + tl.sum(weights, 0)
        m = top
    empty = l == 0.0
    tl.store(out_at, acc / tl.where(empty, 1.0, l), mask=value_dims < DV)
    total = (m + tl.log2(tl.where(empty, 1.0, l))) * 0.6931471805599453
    tl.store(lse + b * lse_b + h * lse_h + g * lse_g, tl.where(empty, float("-inf"), total))


def add_row(acc: Accumulator, codes: list[Codes], reach: Reach) -> tuple[Tensor, Tensor]:
    """Add what the only row of every sequence keeps beyond ``reach.base``, which it holds already; causal. On
    the device: pairs kept by each query head int64 [H], and computed."""
    B, Hk, G = acc.q.shape[:3]
    rounds = len(codes[0].tables)
    room = rounds * reach.cluster_size
    device = acc.q.device
    listed = torch.empty(B * Hk * G, room, dtype=torch.int32, device=device)
    count = torch.empty(B * Hk * G, dtype=torch.int32, device=device)
    find_launch(_joined([one.keys for one in codes]), codes, listed, count, reach, G).run()
    attend_launch(acc, listed, count).run()
    kept = count.view(B, Hk * G).sum(0, dtype=torch.int64)
    return kept, kept.sum()


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def find_launch(
    keys: Tensor, codes: list[Codes], listed: Tensor, count: Tensor, reach: Reach, group: int
) -> Launch:
    """``keys`` [B Hk, tables, M]: their codes, for rows of all sequences' ``codes``."""
    rows = _joined([one.rows[..., 0] for one in codes]).contiguous()
    rounds = len(codes[0].tables)
    return Launch(
        "bucket_row_keys",
        bucket_row_keys,
        (len(count),),
        {
            "keys": keys,
            "rows": rows,
            "listed": listed,
            "count": count,
            "key_x": keys.stride(0),
            "key_t": keys.stride(1) if keys.shape[1] > 1 else 0,
            "num_keys": keys.shape[2],
            "num_rounds": rounds,
            "cluster_size": reach.cluster_size,
            "window": reach.window,
            "sinks": reach.sinks,
            "room": listed.shape[1],
        },
        {"G": group, "ROUNDS": triton.next_power_of_2(rounds), "BLOCK": CODES_AT_ONCE},
        sizes=frozenset(
            {"key_x", "key_t", "num_keys", "num_rounds", "cluster_size", "window", "sinks", "room"}
        ),
        multiplies=False,
    )


def attend_launch(acc: Accumulator, listed: Tensor, count: Tensor) -> Launch:
    """The row of every query head over its ``listed`` keys, merged into ``acc``."""
    _, Hk, G, _, D = acc.q.shape
    Dv = acc.v.shape[-1]
    wide = max(triton.next_power_of_2(D), triton.next_power_of_2(Dv))
    strides = {
        **{f"q_{x}": acc.q.stride(at) for at, x in enumerate("bhg")},
        **{f"k_{x}": acc.k.stride(at) for at, x in enumerate("bhm")},
        **{f"v_{x}": acc.v.stride(at) for at, x in enumerate("bhm")},
        **{f"out_{x}": acc.out.stride(at) for at, x in enumerate("bhg")},
        **{f"lse_{x}": acc.lse.stride(at) for at, x in enumerate("bhg")},
    }
    return Launch(
        "bucket_row_attend",
        bucket_row_attend,
        (len(count),),
        {
            "q": acc.q,
            "k": acc.k,
            "v": acc.v,
            "out": acc.out,
            "lse": acc.lse,
            "listed": listed,
            "count": count,
            **strides,
            "room": listed.shape[1],
            "scale": acc.call.scale * _LOG2E,
        },
        {
            "HK": Hk,
            "G": G,
            "D": D,
            "DV": Dv,
            "BLOCK_D": triton.next_power_of_2(D),
            "BLOCK_DV": triton.next_power_of_2(Dv),
            "BLOCK": 32 if wide > 128 else 64,
        },
        sizes=frozenset({"room", "scale"}),
        multiplies=False,
    )
