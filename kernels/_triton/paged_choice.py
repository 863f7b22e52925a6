"""Which pages a single row keeps, chosen on the device: scores of pages, then the best of them.

    pages:   u_hp = sum_d max(scale q_hd kmax_pd, scale q_hd kmin_pd)
    series:  u_hp = log sum over the page's cells c of e^(scale <q_h, k_(first + c step)>)
    mass_p = mean over the group's heads of softmax_p(u_h);   kept: the ``count`` candidates of largest mass

Quest's bounds (arXiv 2406.10774, section 3.3), or the logits of every ``step``-th key. Ties go to the lower
page, a page with a number that is not finite before all others. The choice is a radix select over the bits of
the masses, which are not negative: four passes, no sort, no reading back. What is left out is summed by its
means beside it: left_h = log sum over pages not kept of L e^(scale <q_h, kmean_p>).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.launch import Launch, Work
from kernels._triton.paged_decode import LEAST_ROWS, MOST_ROWS, Queries
from kernels._triton.primitives import LN_2, LOG2_E, PER_LN_2, power_of_two, precision_of
from kernels._triton.targets import Target

COLUMNS = 12
"""Of a row's table, int64: distances and head strides of bounds and of means (4), of k and its stride between
positions (3), the first key that is read, the row's position, cells, candidates, pages with the own keys'."""
_PAGES, _WIDTH = 32, 32
"""Pages of a tile, and how much of their width goes into a step."""
_CHOSEN_AT_ONCE = 4096
"""Numbers of a step of the choice, over the group's heads."""


@triton.jit(do_not_specialize=["num_pages", "q_row", "q_key_head", "q_head"])
def _page_logits_kernel(
    q,
    bounds,
    kmean,
    table,
    upper,
    broken,
    means,
    scale,
    log_page,
    num_pages,
    q_row,
    q_key_head,
    q_head,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BOUNDS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(2).to(tl.int64)
    tiles: tl.constexpr = (GROUP + BLOCK_M - 1) // BLOCK_M
    key_head = (tl.program_id(1) // tiles).to(tl.int64)
    num_heads = tl.num_programs(1) // tiles * GROUP
    member = (tl.program_id(1) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    own = member < GROUP
    at = table + row * COLUMNS
    page = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    there = page < tl.load(at + 10)
    q_at = (row * q_row + key_head * q_key_head + member.to(tl.int64) * q_head)[:, None]
    to = (row * num_heads + key_head * GROUP + member)[:, None] * num_pages + page[None, :]
    stored = own[:, None] & there[None, :]
    mean_rows = kmean + tl.load(at + 2) + key_head * tl.load(at + 3) + page.to(tl.int64)[:, None] * D
    bound_rows = bounds + tl.load(at) + key_head * tl.load(at + 1) + page.to(tl.int64)[:, None] * (2 * D)
    s = tl.zeros([BLOCK_M, BLOCK_P], tl.float32)
    u = tl.zeros([BLOCK_M, BLOCK_P], tl.float32)
    for begin in tl.range(0, D, BLOCK_D):  # whole rows in fp32 and their tf32 parts would fill all registers
        d = begin + tl.arange(0, BLOCK_D)
        query = tl.load(q + q_at + d[None, :], mask=own[:, None] & (d < D)[None, :], other=0.0)
        query = query.to(tl.float32) * scale
        read = there[:, None] & (d < D)[None, :]
        mean = tl.load(mean_rows + d[None, :], mask=read, other=0.0)
        s = tl.dot(query, tl.trans(mean), s, input_precision="tf32x3")
        if BOUNDS:
            most = tl.load(bound_rows + d[None, :], mask=read, other=0.0)
            u = tl.dot(tl.where(query < 0, 0.0, query), tl.trans(most), u, input_precision="tf32x3")
            least = tl.load(bound_rows + D + d[None, :], mask=read, other=0.0)
            u = tl.dot(tl.where(query > 0, 0.0, query), tl.trans(least), u, input_precision="tf32x3")
    tl.store(means + to, s + log_page, mask=stored)
    if BOUNDS:
        tl.store(upper + to, u, mask=stored)
        tl.store(broken + to, 1 - (tl.abs(u) < float("inf")).to(tl.int8), mask=stored)


@triton.jit(do_not_specialize=["num_pages", "q_row", "q_key_head", "q_head"])
def _series_kernel(
    q,
    k,
    table,
    upper,
    broken,
    scale_log2,
    num_pages,
    q_row,
    q_key_head,
    q_head,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
    CELLS: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(2).to(tl.int64)
    tiles: tl.constexpr = (GROUP + BLOCK_M - 1) // BLOCK_M
    pages: tl.constexpr = BLOCK_N // CELLS
    key_head = (tl.program_id(1) // tiles).to(tl.int64)
    num_heads = tl.num_programs(1) // tiles * GROUP
    member = (tl.program_id(1) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    own = member < GROUP
    at = table + row * COLUMNS
    cell = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_cell = cell < tl.load(at + 9)
    key = tl.load(at + 7) + cell * STEP
    read = is_cell & (key <= tl.load(at + 8))
    d = tl.arange(0, BLOCK_D)
    q_at = row * q_row + key_head * q_key_head + member.to(tl.int64) * q_head
    query = tl.load(q + q_at[:, None] + d[None, :], mask=own[:, None] & (d < D)[None, :], other=0.0)
    k_base, k_head = tl.multiple_of(tl.load(at + 4), ALIGN), tl.multiple_of(tl.load(at + 5), ALIGN)
    k_key = tl.multiple_of(tl.load(at + 6), ALIGN)
    k_seen = read[:, None]
    if D < BLOCK_D:
        k_seen = k_seen & (d < D)[None, :]
    keys = tl.load(k + k_base + key_head * k_head + key[:, None] * k_key + d[None, :], mask=k_seen, other=0.0)
    s = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale_log2
    finite = tl.abs(s) < float("inf")
    bad = is_cell[None, :] & (finite == 0)
    s = tl.reshape(tl.where(is_cell[None, :] & finite, s, -float("inf")), [BLOCK_M, pages, CELLS])
    m = tl.max(s, 2)
    base = tl.where(m == -float("inf"), 0.0, m)
    total = tl.sum(tl.exp2(s - base[:, :, None]), 2)
    u = (m + tl.log2(tl.where(total == 0.0, 1.0, total))) * LN_2
    hurt = tl.max(tl.reshape(bad.to(tl.int32), [BLOCK_M, pages, CELLS]), 2)
    page = tl.program_id(0) * pages + tl.arange(0, pages)
    to = (row * num_heads + key_head * GROUP + member)[:, None] * num_pages + page[None, :]
    stored = own[:, None] & (page < tl.load(at + 11))[None, :]
    tl.store(upper + to, u, mask=stored)
    tl.store(broken + to, hurt.to(tl.int8), mask=stored)


@triton.jit
def _finite_scores(upper, broken, base, g, page, stop, GROUP: tl.constexpr, JOINT: tl.constexpr):
    """Scores [heads, pages] in base 2, -inf where they do not count; and what is not finite."""
    there = (g < GROUP)[:, None] & (page < stop)[None, :]
    at = base[:, None] + page[None, :]
    u = tl.load(upper + at, mask=there, other=-float("inf")) * PER_LN_2
    bad = tl.load(broken + at, mask=there, other=0).to(tl.int32)
    if JOINT:
        u = tl.where((tl.max(bad, 0) > 0)[None, :], -float("inf"), u)
    return u, bad


@triton.jit(do_not_specialize=["num_pages", "count"])
def _choose_kernel(
    upper,
    broken,
    means,
    table,
    mass,
    chosen,
    left,
    every,
    num_pages,
    count,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    FIRST: tl.constexpr,
    JOINT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, key_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    num_key_heads = tl.num_programs(1)
    candidates = tl.load(table + row * COLUMNS + 10).to(tl.int32)
    stop = tl.load(table + row * COLUMNS + 11).to(tl.int32)
    g, some = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_P)
    heads = row * num_key_heads * GROUP + key_head * GROUP + g
    base = heads * num_pages
    m = tl.full([BLOCK_G], -float("inf"), tl.float32)
    l = tl.zeros([BLOCK_G], tl.float32)
    hurt = tl.zeros([BLOCK_G], tl.int32)
    for a in range(0, stop, BLOCK_P):
        u, bad = _finite_scores(upper, broken, base, g, a + some, stop, GROUP, JOINT)
        peak = tl.maximum(m, tl.max(u, 1))
        zero = tl.where(peak == -float("inf"), 0.0, peak)
        l = l * tl.exp2(m - zero) + tl.sum(tl.exp2(u - zero[:, None]), 1)
        hurt = tl.maximum(hurt, tl.max(bad, 1))
        m = peak
    lse = tl.where(l == 0.0, 0.0, m + tl.log2(tl.where(l == 0.0, 1.0, l)))
    tl.store(every + heads, tl.where(hurt > 0, float("nan"), lse * LN_2), mask=g < GROUP)

    own_mass = mass + (row * num_key_heads + key_head) * num_pages
    for a in range(0, candidates, BLOCK_P):
        page = a + some
        u, bad = _finite_scores(upper, broken, base, g, page, candidates, GROUP, JOINT)
        share = tl.sum(tl.exp2(u - lse[:, None]), 0) / GROUP
        if FIRST:
            share = tl.where(page == 0, 2.0, share)
        share = tl.where(tl.max(bad, 0) > 0, float("inf"), share)
        tl.store(own_mass + page, share, mask=page < candidates)
    tl.debug_barrier()

    # the bits of the count-th largest mass, eight at a time from the top
    known = tl.zeros([], tl.int32)
    need = tl.zeros([], tl.int32) + count
    digits = tl.arange(0, 256)
    for turn in tl.static_range(4):
        numbers = tl.zeros([256], tl.int32)
        for a in range(0, candidates, BLOCK_P):
            page = a + some
            bits = tl.load(own_mass + page, mask=page < candidates, other=0.0).to(tl.int32, bitcast=True)
            there = page < candidates
            if turn > 0:
                there = there & ((bits >> (32 - 8 * turn)) == known)
            numbers += tl.histogram((bits >> (24 - 8 * turn)) & 255, 256, mask=there)
        above = tl.sum(numbers, 0) - tl.cumsum(numbers, 0)
        here = (above < need) & (need <= above + numbers)
        known = known * 256 + tl.sum(tl.where(here, digits, 0), 0)
        need -= tl.sum(tl.where(here, above, 0), 0)
    known = tl.where(count == 0, 0x7FFFFFFF, known)

    written = tl.zeros([], tl.int32)
    met = tl.zeros([], tl.int32)
    m = tl.full([BLOCK_G], -float("inf"), tl.float32)
    l = tl.zeros([BLOCK_G], tl.float32)
    for a in range(0, candidates, BLOCK_P):
        page = a + some
        there = page < candidates
        bits = tl.load(own_mass + page, mask=there, other=0.0).to(tl.int32, bitcast=True)
        same = (there & (bits == known)).to(tl.int32)
        first_of_same = met + tl.cumsum(same, 0) - same < need
        take = there & ((bits > known) | ((same > 0) & first_of_same))
        taken = take.to(tl.int32)
        place = written + tl.cumsum(taken, 0) - taken
        tl.store(chosen + (row * num_key_heads + key_head) * count + place, page, mask=take)
        written += tl.sum(taken, 0)
        met += tl.sum(same, 0)
        stays = (g < GROUP)[:, None] & (there & (take == 0))[None, :]
        s = tl.load(means + base[:, None] + page[None, :], mask=stays, other=-float("inf")) * PER_LN_2
        peak = tl.maximum(m, tl.max(s, 1))
        zero = tl.where(peak == -float("inf"), 0.0, peak)
        l = l * tl.exp2(m - zero) + tl.sum(tl.exp2(s - zero[:, None]), 1)
        m = peak
    told = (m + tl.log2(tl.where(l == 0.0, 1.0, l))) * LN_2
    tl.store(left + heads, told, mask=g < GROUP)


@dataclass(frozen=True)
class Scoring:
    """By what pages are ranked. ``step`` None: bounds; else logits of every step-th key. ``first_page`` is
    chosen before others of finite score."""

    step: int | None
    first_page: bool


@dataclass(frozen=True)
class Candidates:
    """Pages of R rows. ``bounds`` and ``kmean`` fp32: base tensors, the first row's [Hk, pages, 2 D] and
    [Hk, pages, D]; ``k`` the base of the keys; ``table`` int64 [R, COLUMNS]; ``most_pages`` pages of any row,
    own ones included; ``page`` keys each; ``align``: multiples that k's distances and strides are of."""

    bounds: Tensor
    kmean: Tensor
    k: Tensor
    table: Tensor
    most_pages: int
    page: int
    align: int


@dataclass(frozen=True)
class Choice:
    """``chosen`` int32 [R, Hk, count], ascending; ``left`` [R, H]: log-sum-exp over the means of what was
    left out; ``every`` [R, H]: over all that was scored, NaN where something was not finite; ``means`` [R, H,
    pages]: logits of means, with the log of the page's keys."""

    chosen: Tensor
    left: Tensor
    every: Tensor
    means: Tensor


def choose_pages(
    queries: Queries, where: Candidates, scoring: Scoring, count: int, scale: float, target: Target
) -> Choice:
    """The best ``count`` pages of every row, each of which has more candidates."""
    q = queries.q
    rows, num_key_heads = q.shape[0], q.shape[1]
    shape = rows, queries.num_heads, where.most_pages

    def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device=q.device)

    upper, means, broken = empty(*shape), empty(*shape), empty(*shape, dtype=torch.int8)
    page_launch(queries, where, scoring, scale, upper, broken, means).run()
    if scoring.step is not None:
        series_launch(queries, where, scoring.step, scale, upper, broken, target).run()
    left, every = empty(*shape[:2]), empty(*shape[:2])
    mass = empty(rows, num_key_heads, where.most_pages)
    chosen = empty(rows, num_key_heads, count, dtype=torch.int32)
    choose_launch(queries, where, scoring, upper, broken, means, mass, chosen, left, every).run()
    return Choice(chosen, left, every, means)


def _query_args(q: Tensor) -> dict[str, Tensor | int | float]:
    return {"q_row": q.stride(0), "q_key_head": q.stride(1), "q_head": q.stride(2)}


def _query_tile(q: Tensor) -> tuple[int, int]:
    """Rows of a tile, and tiles of all heads."""
    group = q.shape[2]
    block_m = min(MOST_ROWS, power_of_two(group, LEAST_ROWS))
    return block_m, q.shape[1] * -(-group // block_m)


_CHANGING = frozenset({"num_pages", "q_row", "q_key_head", "q_head"})


def page_launch(
    queries: Queries,
    where: Candidates,
    scoring: Scoring,
    scale: float,
    upper: Tensor,
    broken: Tensor,
    means: Tensor,
) -> Launch:
    """Logits of means, and bounds where those rank."""
    q = queries.q
    block_m, tiles = _query_tile(q)
    return Launch(
        "paged_choice_pages",
        _page_logits_kernel,
        (-(-where.most_pages // _PAGES), tiles, q.shape[0]),
        {
            "q": q,
            "bounds": where.bounds,
            "kmean": where.kmean,
            "table": where.table,
            "upper": upper,
            "broken": broken,
            "means": means,
            "scale": float(scale),
            "log_page": math.log(where.page),
            "num_pages": where.most_pages,
            **_query_args(q),
        },
        {
            "GROUP": q.shape[2],
            "D": q.shape[3],
            "BLOCK_D": min(_WIDTH, power_of_two(q.shape[3])),
            "BLOCK_M": block_m,
            "BLOCK_P": _PAGES,
            "BOUNDS": scoring.step is None,
            "COLUMNS": COLUMNS,
        },
        num_warps=4,
        num_stages=2,
        sizes=_CHANGING,
    )


def series_launch(
    queries: Queries,
    where: Candidates,
    step: int,
    scale: float,
    upper: Tensor,
    broken: Tensor,
    target: Target,
) -> Launch:
    """Sums of the logits of every ``step``-th key, by page, own keys' included."""
    q = queries.q
    block_m, tiles = _query_tile(q)
    cells = where.page // step
    block_n = max(cells, 32 if q.dtype == torch.float32 else 64)
    return Launch(
        "paged_choice_series",
        _series_kernel,
        (-(-where.most_pages * cells // block_n), tiles, q.shape[0]),
        {
            "q": q,
            "k": where.k,
            "table": where.table,
            "upper": upper,
            "broken": broken,
            "scale_log2": float(scale * LOG2_E),
            "num_pages": where.most_pages,
            **_query_args(q),
        },
        {
            "GROUP": q.shape[2],
            "D": q.shape[3],
            "BLOCK_D": power_of_two(q.shape[3]),
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "STEP": step,
            "CELLS": cells,
            "ALIGN": where.align,
            "PRECISION": precision_of(q.dtype),
            "COLUMNS": COLUMNS,
        },
        num_warps=8 if q.dtype == torch.float32 and block_n > 32 else 4,
        num_stages=2,
        sizes=_CHANGING,
    )


def choose_launch(
    queries: Queries,
    where: Candidates,
    scoring: Scoring,
    upper: Tensor,
    broken: Tensor,
    means: Tensor,
    mass: Tensor,
    chosen: Tensor,
    left: Tensor,
    every: Tensor,
) -> Launch:
    """The choice of every row and key head."""
    q = queries.q
    block_g = power_of_two(q.shape[2], 1)
    return Launch(
        "paged_choice",
        _choose_kernel,
        (q.shape[0], q.shape[1]),
        {
            "upper": upper,
            "broken": broken,
            "means": means,
            "table": where.table,
            "mass": mass,
            "chosen": chosen,
            "left": left,
            "every": every,
            "num_pages": where.most_pages,
            "count": chosen.shape[2],
        },
        {
            "GROUP": q.shape[2],
            "BLOCK_G": block_g,
            "BLOCK_P": min(1024, max(64, _CHOSEN_AT_ONCE // block_g)),
            "FIRST": scoring.first_page,
            "JOINT": scoring.step is None,
            "COLUMNS": COLUMNS,
        },
        num_warps=8,
        num_stages=1,
        sizes=frozenset({"num_pages", "count"}),
        multiplies=False,
    )


def choice_examples(target: Target, dtype: torch.dtype, head_dim: int) -> Iterator[Launch]:
    """A step of 32 sequences of 16384 keys, pages of 64: bounds, every 16th key, every key."""
    from kernels._triton.paged_decode import example_operands

    rows, num_keys, num_key_heads, group, page = 32, 16384, 8, 4, 64
    queries, keys = example_operands(dtype, head_dim, rows, num_keys, num_key_heads, group)
    pages = num_keys // page

    def empty(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    where = Candidates(
        empty(num_key_heads, pages, 2 * head_dim),
        empty(num_key_heads, pages, head_dim),
        keys.k,
        empty(rows, COLUMNS, kind=torch.int64),
        pages,
        page,
        16 // dtype.itemsize,
    )
    scored = empty(rows, queries.num_heads, pages)
    broken = empty(rows, queries.num_heads, pages, kind=torch.int8)
    scores = float(scored.numel())
    read = 4.0 * rows * num_key_heads * pages * head_dim
    for step in (None, 16, 1):
        scoring = Scoring(step, True)
        if step != 1:
            launch = page_launch(queries, where, scoring, 0.1, scored, broken, scored)
            times = 3 if step is None else 1
            work = Work(2.0 * times * head_dim * scores, 0, times * read + 8 * scores)
            yield replace(launch, work=work, notes={"step": step or 0})
        if step is not None:
            launch = series_launch(queries, where, step, 0.1, scored, broken, target)
            cells = scores * page / step
            moved = cells / group * head_dim * dtype.itemsize
            yield replace(launch, work=Work(2 * head_dim * cells, cells, moved), notes={"step": step})
    chosen, per_head = empty(rows, num_key_heads, 16, kind=torch.int32), empty(rows, queries.num_heads)
    launch = choose_launch(
        queries, where, Scoring(None, True), scored, broken, scored, scored, chosen, per_head, per_head
    )
    yield replace(launch, work=Work(0, 3 * scores, 24 * scores))
