"""Which keys and which block offsets every tile keeps, chosen on the device.

    columns   the num_verticals largest of vertical_j, ties to the lower key
    slash_d   sum of rest_bc over query blocks b and key blocks c = b - d, per probe row that can use d;
              the num_slashes largest, ties to the lower offset

``kernels.math.vertical_slash`` has the equations. The n largest numbers of a row are found by their bits,
from the highest down: 31 counts of how many reach a threshold, whatever the numbers are. Offset number o of
a tile with nb key blocks joins its query block a and key block a + nb - 1 - o.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.launch import Launch
from kernels._triton.targets import interpreting
from kernels._triton.vertical_slash_tables import COLUMNS, Tables

KEYS_AT_ONCE = 4096
_PLACE = tl.constexpr(len(COLUMNS))


@triton.jit(do_not_specialize=["room", "most"])
def largest_columns(
    verticals,
    places,
    whole,
    budget,
    columns,
    listed,
    count,
    room,
    most,
    HK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t, x = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head = t * tl.num_programs(1) + x
    place = places + t * _PLACE
    before, after, end = tl.load(place + 3), tl.load(place + 4), tl.load(place + 5)
    stop = tl.maximum(before, end)
    need = tl.minimum(tl.load(budget + x % HK), before + end - after)
    is_whole = tl.load(whole + head) != 0
    need = tl.where(is_whole, 0, need)
    span = tl.where(is_whole | (need == 0), 0, stop)
    base = verticals + head * room
    threshold = 0
    for turn in range(31):
        bit = 1 << (30 - turn)
        reach = tl.zeros([BLOCK], tl.int32)
        for a in range(0, span, BLOCK):
            j = a + tl.arange(0, BLOCK)
            bits = tl.load(base + j, mask=j < stop, other=-1.0).to(tl.int32, bitcast=True)
            reach += (bits >= threshold + bit).to(tl.int32)
        threshold += tl.where(tl.sum(reach, 0) >= need, bit, 0)
    above = tl.zeros([BLOCK], tl.int32)
    for a in range(0, span, BLOCK):
        j = a + tl.arange(0, BLOCK)
        bits = tl.load(base + j, mask=j < stop, other=-1.0).to(tl.int32, bitcast=True)
        above += (bits > threshold).to(tl.int32)
    equal = need - tl.sum(above, 0)
    total, equals = 0, 0
    for a in range(0, room, BLOCK):
        j = a + tl.arange(0, BLOCK)
        bits = tl.load(base + j, mask=j < span, other=-1.0).to(tl.int32, bitcast=True)
        same = (bits == threshold).to(tl.int32)
        taken = (bits > threshold) | ((same != 0) & (equals + tl.cumsum(same, 0) - same < equal))
        taken = (taken & (j < span)).to(tl.int32)
        tl.store(columns + head * room + j, taken.to(tl.int8), mask=j < room)
        tl.store(listed + head * most + total + tl.cumsum(taken, 0) - taken, j, mask=taken != 0)
        total += tl.sum(taken, 0)
        equals += tl.sum(same, 0)
    tl.store(count + head, total)


@dataclass(frozen=True)
class Columns:
    """``mask`` int8 [T, X, room], ``listed`` int32 [T, X, most] ascending, ``count`` int32 [T, X] of them."""

    mask: Tensor
    listed: Tensor
    count: Tensor


def empty_columns(verticals: Tensor, most: int) -> Columns:
    ints = verticals.new_empty(*verticals.shape[:2], max(1, most), dtype=torch.int32)
    mask = torch.empty_like(verticals, dtype=torch.int8)
    return Columns(mask, ints, ints.new_empty(verticals.shape[:2]))


def columns_launch(
    verticals: Tensor, tables: Tables, whole: Tensor, budget: Tensor, columns: Columns
) -> Launch:
    """``whole`` int8 [T, X]: heads that keep every candidate have no columns; ``budget`` int32 [Hk]."""
    return Launch(
        "largest_columns",
        largest_columns,
        (len(tables.told), verticals.shape[1]),
        {
            "verticals": verticals,
            "places": tables.places,
            "whole": whole,
            "budget": budget,
            "columns": columns.mask,
            "listed": columns.listed,
            "count": columns.count,
            "room": verticals.shape[2],
            "most": columns.listed.shape[2],
        },
        {"HK": len(budget), "BLOCK": 256 if interpreting() else KEYS_AT_ONCE},
        num_warps=8,
        sizes=frozenset({"room", "most"}),
        multiplies=False,
    )


@dataclass(frozen=True)
class Slashes:
    """Key blocks of each query block: ``listed`` int32 [T, X, nq, most] ascending, and their ``count`` int32
    [T, X, nq]; ``dropped`` fp32 [T, X, nq]; int64 [T, X]: the pairs that one query head keeps by columns and
    slashes, ``pairs``, and ``computed``."""

    listed: Tensor
    count: Tensor
    dropped: Tensor
    pairs: Tensor
    computed: Tensor


def choose_slashes(
    rest: Tensor, columns: Columns, tables: Tables, whole: Tensor, budget: Tensor, block: int
) -> Slashes:
    """``rest`` fp32 [T, X, nq, nb]; ``whole`` bool [T, X]; ``budget`` int64 [X]: slashes of each head."""
    usable, key_blocks = _usable(tables, rest.shape[2], rest.shape[3], block)
    rest = torch.where(whole[..., None, None], 0.0, rest)
    reach = (usable * tables.share[..., None]).sum(1)
    mass = rest.gather(3, key_blocks[:, None].expand(-1, rest.shape[1], -1, -1))
    mass = torch.where(usable[:, None], mass, 0.0).sum(2)
    mass = torch.where((reach > 0)[:, None], mass / reach[:, None], 0.0)
    mass = mass.masked_fill(~usable.any(1)[:, None], -1.0)
    chosen = _most(mass, budget) & ~whole[..., None]
    used = chosen[:, :, None] & usable[:, None]
    listed, count = _compact(used, key_blocks, rest.shape[3])
    return Slashes(listed, count, *_tallies(rest, used, key_blocks, count, columns, tables, whole, block))


def _usable(tables: Tables, nq: int, nb: int, block: int) -> tuple[Tensor, Tensor]:
    """[T, nq, nq + nb - 1]: whether query block and offset meet in a candidate, and its number."""
    place = {name: tables.places[:, at, None, None].long() for at, name in enumerate(COLUMNS)}
    device = tables.places.device
    a = torch.arange(nq, device=device)[:, None]
    c = a + place["num_blocks"] - 1 - torch.arange(nq + nb - 1, device=device)
    first = c * block
    candidate = (first < place["before"]) | ((first >= place["after"]) & (first < place["end"]))
    usable = (c >= 0) & candidate & (a < (tables.rows > 0).sum(1)[:, None, None])
    return usable, c.clamp(0, nb - 1)


def _most(mass: Tensor, counts: Tensor) -> Tensor:
    """The ``counts`` [X] largest of mass [T, X, n] that are not negative; ties to the lower place."""
    order = torch.sort(mass, dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(mass.shape[-1], device=mass.device).expand_as(order)
    )
    return (rank < counts[:, None]) & (mass >= 0)


def _compact(used: Tensor, key_blocks: Tensor, nb: int) -> tuple[Tensor, Tensor]:
    """Ascending key blocks of used [T, X, nq, offsets], and how many."""
    numbers = torch.where(used, key_blocks[:, None], nb).to(torch.int32)
    return torch.sort(numbers, dim=-1).values, used.sum(-1, dtype=torch.int32)


def _tallies(
    rest: Tensor,
    used: Tensor,
    key_blocks: Tensor,
    count: Tensor,
    columns: Columns,
    tables: Tables,
    whole: Tensor,
    block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mass left out [T, X, nq], pairs kept [T, X] and computed [T, X] by a query head."""
    index = key_blocks[:, None].expand(-1, rest.shape[1], -1, -1)
    covered = torch.where(used, rest.gather(3, index), 0.0).sum(-1)
    share = tables.share[:, None]
    left = torch.where(share > 0, (rest.sum(-1) - covered) / share, 0.0).clamp(0.0, 1.0)
    dropped = left.gather(2, tables.probed[:, None].expand_as(left))
    in_block = columns.mask.unflatten(2, (-1, block)).sum(-1, dtype=torch.int64)
    masked = torch.where(used, in_block[:, :, None].expand(*rest.shape).gather(3, index), 0).sum(-1)
    rows = tables.rows[:, None]
    by_columns = columns.count * rows.sum(-1)
    everything = (tables.places[:, 3] + tables.places[:, 5] - tables.places[:, 4])[:, None] * rows.sum(-1)
    kept = torch.where(whole, everything, by_columns + ((count * block - masked) * rows).sum(-1))
    return dropped, kept, torch.where(whole, everything, by_columns + (count * block * rows).sum(-1))
