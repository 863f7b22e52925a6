"""The probe rows of every query tile against its keys, on the device: three passes over their logits.

    lse_p      = log2 sum_j 2^(s_pj)                        p: probe rows of a tile, s in units of log 2
    vertical_j = sqrt(mean_even 2^(s_pj - lse_p)) sqrt(mean_odd 2^(s_pj - lse_p))
    rest_bc    = sum_{j in block c} max(sum_{p in query block b} 2^(s_pj - lse_p) / n - share_b vertical_j, 0)

``kernels.math.vertical_slash`` has the equations; vertical_j counts in the last pass where j was chosen.
Computed again in each pass, logits never come to memory: a pass costs 2 D per logit, no bandwidth.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.launch import Launch
from kernels._triton.primitives import LOG2_E, load_rows, power_of_two, precision_of
from kernels._triton.vertical_slash_tables import COLUMNS, Tables
from kernels.math.accumulate import Accumulator

WIDTH = len(COLUMNS)
MAX_PROBES_AT_ONCE = 64
BLOCKS_AT_ONCE = 8
_PLACE = tl.constexpr(WIDTH)


@triton.jit
def _probes(probes, t, chunk, q_g, q_n, G: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr):
    """Some of a tile's probe rows, all heads of a group: where each begins in a key head's q (int64), its
    number among the tile's (p * G + g), and its row of the call (-1: none)."""
    number = chunk * BLOCK_P + tl.arange(0, BLOCK_P)
    p, g = number // G, (number % G).to(tl.int64)
    row = tl.load(probes + t * P + p, mask=p < P, other=-1)
    return g * q_g + tl.maximum(row, 0).to(tl.int64) * q_n, number, row


@triton.jit
def _scores(
    q_base, at, row, k_base, k_m, j, stop, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, STEP_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits of probe rows [BLOCK_P] and keys ``j`` [BLOCK_N], STEP_D dimensions at a time."""
    scores = tl.zeros([at.shape[0], j.shape[0]], tl.float32)
    for d in tl.static_range(0, BLOCK_D, STEP_D):
        queries = load_rows(q_base + d, at, 1, row >= 0, STEP_D if D == BLOCK_D else D - d, STEP_D, True)
        keys = load_rows(
            k_base + d, j.to(tl.int64), k_m, j < stop, STEP_D if D == BLOCK_D else D - d, STEP_D, True
        )
        scores = tl.dot(queries, tl.trans(keys), scores, input_precision=PRECISION)
    return scores * scale


_LSE_SIZES = ("start", "step", "scale")
_VERTICALS_SIZES = ("start", "room", "scale")
_REST_SIZES = ("room", "num_blocks", "scale")


@triton.jit(do_not_specialize=_LSE_SIZES)
def probe_lse(
    q, k, probes, places, lse, q_b, q_h, q_g, q_n, k_b, k_h, k_m, start, step, scale,
    HK: tl.constexpr, G: tl.constexpr, P: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    STEP_D: tl.constexpr, BLOCK_P: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    t, x = (tl.program_id(0) // CHUNKS).to(tl.int64), tl.program_id(1).to(tl.int64)
    chunk, split = tl.program_id(0) % CHUNKS, tl.program_id(2)
    b, h = x // HK, x % HK
    if tl.load(places + t * _PLACE + 9) == 0:
        return
    stop = tl.load(places + t * _PLACE + 2)
    q_base, k_base = q + b * q_b + h * q_h, k + b * k_b + h * k_h
    at, number, row = _probes(probes, t, chunk, q_g, q_n, G, P, BLOCK_P)
    m = tl.full([BLOCK_P], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_P], tl.float32)
    for a in tl.range(split * step, tl.minimum(stop, split * step + step), BLOCK_N):
        j = a + tl.arange(0, BLOCK_N)
        scores = _scores(q_base, at, row, k_base, k_m, j, stop, scale, D, BLOCK_D, STEP_D, PRECISION)
        seen = (j < stop)[None]
        if CAUSAL:
            seen = seen & (j[None] <= start + row[:, None])
        # a score that is not finite makes the sum NaN, whatever it is
        wrong = tl.sum(tl.where(seen, scores - scores, 0.0), 1)
        scores = tl.where(seen, scores, float("-inf"))
        top = tl.maximum(m, tl.max(scores, 1))
        base = tl.where(top == float("-inf"), 0.0, top)
        l = l * tl.exp2(m - base) + tl.sum(tl.exp2(scores - base[:, None]), 1) + wrong
        m = top
    part = tl.where(l == 0.0, float("-inf"), m + tl.log2(tl.where(l == 0.0, 1.0, l)))
    part = tl.where(l == l, part, float("nan"))
    num = tl.num_programs(0) // CHUNKS
    to = lse + ((split * num + t) * tl.num_programs(1) + x) * (P * G) + number
    tl.store(to, tl.where(row >= 0, part, 0.0), mask=number < P * G)


@triton.jit(do_not_specialize=_VERTICALS_SIZES)
def probe_verticals(
    q, k, probes, probe_blocks, places, lse, verticals,
    q_b, q_h, q_g, q_n, k_b, k_h, k_m, start, room, scale,
    HK: tl.constexpr, G: tl.constexpr, P: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    STEP_D: tl.constexpr, BLOCK_P: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    t, x = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    b, h = x // HK, x % HK
    q_base, k_base = q + b * q_b + h * q_h, k + b * k_b + h * k_h
    place = places + t * _PLACE
    before, after, end = tl.load(place + 3), tl.load(place + 4), tl.load(place + 5)
    num_probes, stop = tl.load(place + 6), tl.load(place + 2)
    if tl.load(place + 9) == 0:
        return
    all_probes = tl.arange(0, P)
    odd_probes = tl.load(probe_blocks + t * P + all_probes) % 2
    num_odd = tl.sum(tl.where(all_probes < num_probes, odd_probes, 0), 0)
    num_even = num_probes - num_odd
    first = tl.program_id(0) * BLOCKS * BLOCK_N
    for a in tl.range(first, tl.minimum(first + BLOCKS * BLOCK_N, tl.maximum(before, end)), BLOCK_N):
        j = a + tl.arange(0, BLOCK_N)
        even, odd = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
        for chunk in tl.static_range(CHUNKS):
            at, number, row = _probes(probes, t, chunk, q_g, q_n, G, P, BLOCK_P)
            scores = _scores(q_base, at, row, k_base, k_m, j, stop, scale, D, BLOCK_D, STEP_D, PRECISION)
            total = tl.load(
                lse + (t * tl.num_programs(2) + x) * (P * G) + number, mask=number < P * G, other=0.0
            )
            weights = tl.where((row >= 0)[:, None], tl.exp2(scores - total[:, None]), 0.0)
            is_odd = tl.load(probe_blocks + t * P + number // G, mask=number < P * G, other=0) % 2
            even += tl.sum(tl.where((is_odd == 0)[:, None], weights, 0.0), 0)
            odd += tl.sum(tl.where((is_odd == 1)[:, None], weights, 0.0), 0)
        if (num_even == 0) | (num_odd == 0):
            vertical = (even + odd) / (num_probes * G)
        else:
            vertical = tl.sqrt(even / (num_even * G)) * tl.sqrt(odd / (num_odd * G))
        candidate = (j < before) | ((j >= after) & (j < end))
        to = verticals + (t * tl.num_programs(2) + x) * room + j
        tl.store(to, tl.where(candidate, vertical, -1.0), mask=j < room)


@triton.jit(do_not_specialize=_REST_SIZES)
def probe_rest(
    q, k, probes, probe_blocks, places, lse, verticals, columns, share, rest,
    q_b, q_h, q_g, q_n, k_b, k_h, k_m, room, num_blocks, scale,
    HK: tl.constexpr, G: tl.constexpr, P: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    STEP_D: tl.constexpr, BLOCK_P: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr, L: tl.constexpr, NQ: tl.constexpr, BLOCK_Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    t, x = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    b, h = x // HK, x % HK
    q_base, k_base = q + b * q_b + h * q_h, k + b * k_b + h * k_h
    place = places + t * _PLACE
    before, after, end = tl.load(place + 3), tl.load(place + 4), tl.load(place + 5)
    num_probes, stop = tl.load(place + 6), tl.load(place + 2)
    if tl.load(place + 9) == 0:
        return
    query_blocks = tl.arange(0, BLOCK_Q)
    shares = tl.load(share + t * NQ + query_blocks, mask=query_blocks < NQ, other=0.0)
    head = t * tl.num_programs(2) + x
    first = tl.program_id(0) * BLOCKS
    for block in tl.range(first, tl.minimum(first + BLOCKS, num_blocks)):
        sums = tl.zeros([BLOCK_Q], tl.float32)
        for piece in tl.range(0, L, BLOCK_N):
            j = block * L + piece + tl.arange(0, BLOCK_N)
            mass = tl.zeros([BLOCK_Q, BLOCK_N], tl.float32)
            for chunk in tl.static_range(CHUNKS):
                at, number, row = _probes(probes, t, chunk, q_g, q_n, G, P, BLOCK_P)
                scores = _scores(q_base, at, row, k_base, k_m, j, stop, scale, D, BLOCK_D, STEP_D, PRECISION)
                total = tl.load(lse + head * (P * G) + number, mask=number < P * G, other=0.0)
                weights = tl.where((row >= 0)[:, None], tl.exp2(scores - total[:, None]), 0.0)
                own = tl.load(probe_blocks + t * P + number // G, mask=number < P * G, other=-1)
                chosen = (own[None] == query_blocks[:, None]) & (row >= 0)[None]
                mass = tl.dot(chosen.to(tl.float32), weights, mass, input_precision="tf32x3")
            mass = mass / (num_probes * G)
            inside = j < room
            vertical = tl.load(verticals + head * room + j, mask=inside, other=0.0)
            column = tl.load(columns + head * room + j, mask=inside, other=0)
            explained = tl.where(column != 0, vertical, 0.0)
            left = tl.maximum(mass - shares[:, None] * explained[None], 0.0)
            candidate = (j < before) | ((j >= after) & (j < end))
            sums += tl.sum(tl.where(candidate[None], left, 0.0), 1)
        tl.store(rest + (head * NQ + query_blocks) * num_blocks + block, sums, mask=query_blocks < NQ)


def lse_launch(acc: Accumulator, tables: Tables, lse: Tensor, step: int) -> Launch:
    """Fills ``lse`` fp32 [splits, T, X, P G], base 2, of ``step`` keys each; NaN: a logit is not finite."""
    shape = _constants(acc, tables)
    return Launch(
        "probe_lse",
        probe_lse,
        (len(tables.told) * int(shape["CHUNKS"]), lse.shape[2], lse.shape[0]),
        {
            "q": acc.q,
            "k": acc.k,
            "probes": tables.probes,
            "places": tables.places,
            "lse": lse,
            **_strides(acc),
            "start": acc.call.start,
            "step": step,
            "scale": acc.call.scale * LOG2_E,
        },
        {**shape, "BLOCK_N": keys_at_once(acc), "CAUSAL": acc.call.causal},
        num_warps=_warps(acc),
        sizes=frozenset(_LSE_SIZES),
    )


def verticals_launch(acc: Accumulator, tables: Tables, lse: Tensor, verticals: Tensor) -> Launch:
    """Fills ``verticals`` fp32 [T, X, room] of the tiles' keys up to their last candidate; -1 at others."""
    shape = _constants(acc, tables)
    per_program = keys_at_once(acc) * BLOCKS_AT_ONCE
    return Launch(
        "probe_verticals",
        probe_verticals,
        (triton.cdiv(verticals.shape[2], per_program), len(tables.told), verticals.shape[1]),
        {
            "q": acc.q,
            "k": acc.k,
            "probes": tables.probes,
            "probe_blocks": tables.probe_blocks,
            "places": tables.places,
            "lse": lse,
            "verticals": verticals,
            **_strides(acc),
            "start": acc.call.start,
            "room": verticals.shape[2],
            "scale": acc.call.scale * LOG2_E,
        },
        {**shape, "BLOCK_N": keys_at_once(acc), "BLOCKS": BLOCKS_AT_ONCE, "CAUSAL": acc.call.causal},
        num_warps=_warps(acc),
        sizes=frozenset(_VERTICALS_SIZES),
    )


def rest_launch(
    acc: Accumulator,
    tables: Tables,
    lse: Tensor,
    verticals: Tensor,
    columns: Tensor,
    rest: Tensor,
    block: int,
) -> Launch:
    """Fills ``rest`` fp32 [T, X, nq, key blocks]; ``columns`` int8 [T, X, room]."""
    return Launch(
        "probe_rest",
        probe_rest,
        (triton.cdiv(rest.shape[3], BLOCKS_AT_ONCE), len(tables.told), verticals.shape[1]),
        {
            "q": acc.q,
            "k": acc.k,
            "probes": tables.probes,
            "probe_blocks": tables.probe_blocks,
            "places": tables.places,
            "lse": lse,
            "verticals": verticals,
            "columns": columns,
            "share": tables.share,
            "rest": rest,
            **_strides(acc),
            "room": verticals.shape[2],
            "num_blocks": rest.shape[3],
            "scale": acc.call.scale * LOG2_E,
        },
        {
            **_constants(acc, tables),
            "BLOCK_N": min(block, keys_at_once(acc)),
            "L": block,
            "BLOCKS": BLOCKS_AT_ONCE,
            "NQ": rest.shape[2],
            "BLOCK_Q": power_of_two(rest.shape[2]),
        },
        num_warps=8,
        sizes=frozenset(_REST_SIZES),
        notes={"block": block},
    )


def _constants(acc: Accumulator, tables: Tables) -> dict[str, int | bool | str | float]:
    _, Hk, G, _, D = acc.q.shape
    P = tables.probes.shape[1]
    block_p = min(power_of_two(P * G), MAX_PROBES_AT_ONCE)
    return {
        "HK": Hk,
        "G": G,
        "P": P,
        "D": D,
        "BLOCK_D": power_of_two(D),
        "STEP_D": min(power_of_two(D), _dims_at_once(acc)),
        "BLOCK_P": block_p,
        "CHUNKS": triton.cdiv(P * G, block_p),
        "PRECISION": precision_of(acc.q.dtype),
    }


def _strides(acc: Accumulator) -> dict[str, int]:
    rows = {f"q_{x}": acc.q.stride(at) for at, x in enumerate("bhgn")}
    return rows | {f"k_{x}": acc.k.stride(at) for at, x in enumerate("bhm")}


def _warps(acc: Accumulator) -> int:
    return 8 if acc.q.dtype == torch.float32 else 4


def _dims_at_once(acc: Accumulator) -> int:
    """Dimensions of a product: of fp32 few, whose operands lie in registers twice, as big and small part."""
    return 32 if acc.q.dtype == torch.float32 else 256


def keys_at_once(acc: Accumulator) -> int:
    """Keys of a product: as many as leave registers for the rest."""
    return 32 if acc.q.dtype == torch.float32 or acc.q.shape[-1] > 128 else 64
