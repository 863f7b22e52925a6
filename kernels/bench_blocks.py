"""Times the block-sparse computation alone against dense SDPA and compiled FlexAttention on the same mask.

    python -m kernels.bench_blocks --shapes 12x12x64 4x1x256 9x3x64 --tile 512 --density 0.125
    python -m kernels.bench_blocks --sweep --length 8192

Lists are given, nothing is selected, and no row has keys of its own: what is timed is ``add_block_lists``.
``random``: one list per tile and key head, each block equally likely. ``window``: the same number of blocks
around the tile. Rounds alternate between all contenders and the best of each is taken: on a shared machine
only ratios within one run mean anything. A rate is 4 D FLOP per score element computed.
``--sweep`` runs random lists over densities 1/32 to 1 instead: every list gathered, every list as a slice
under a mask, and as ``add_block_lists`` chooses. Where the first two meet is what ``crossover`` is fitted to.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from time import perf_counter
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.contract import Call
from kernels.math import block_sparse
from kernels.math.accumulate import Accumulator, accumulator
from kernels.math.block_lists import BlockLists, lists_from_table

_DENSITIES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 7 / 8, 15 / 16, 31 / 32, 1.0)


@dataclass(frozen=True)
class Shape:
    """H query heads over Hk key heads of width D, N positions, tiles of T rows, blocks of L keys."""

    H: int
    Hk: int
    D: int
    N: int
    tile: int
    block: int

    def __str__(self) -> str:
        return f"{self.H}x{self.Hk}x{self.D}"


@dataclass
class Row:
    """One line. ``share_of_dense``: our rate per computed element over dense SDPA's; ``x_dense`` and
    ``x_flex``: their time over ours."""

    lists: str
    shape: str
    density: float
    time_ms: float
    gflops: float
    share_of_dense: float
    dense_ms: float
    dense_gflops: float
    x_dense: float
    flex_ms: float | None
    x_flex: float | None
    pairs_dense: float
    max_abs_difference: float | None


@dataclass
class SweepRow:
    """One density: times relative to dense SDPA's, above 1 faster."""

    shape: str
    density: float
    gathered: float
    masked_slice: float
    chosen: float
    pairs_dense: float


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, N {args.length}, tile {args.tile}\n"
    )
    run, header = (sweep, _SWEEP_HEADER) if args.sweep else (compare, _HEADER)
    print(header)
    rows = []
    for H, Hk, D in args.shapes:
        for row in run(Shape(H, Hk, D, args.length, args.tile, args.block), args):
            rows.append(row)
            print(_line(row), flush=True)
    if args.json:
        _write(args, rows)
    return 0


def compare(shape: Shape, args: argparse.Namespace) -> Iterable[Row]:
    """Random lists and windows of one density, against dense SDPA and FlexAttention."""
    q, k, v = _tensors(shape)
    tables = {"random": random_table(shape, args.density), "window": window_table(shape, args.density)}
    contenders: dict[str, Callable[[], Any]] = {"dense": lambda: _dense(shape, q, k, v)}
    for name, table in tables.items():
        contenders[name] = _core(shape, q, k, v, table)
        if not args.no_flex:
            contenders[f"{name} flex"] = _flex(shape, q, k, v, table)
    times, results = _best(contenders, args.repeat)
    for name in tables:
        flex_ms = times.get(f"{name} flex")
        acc = results[name]
        far = (
            None if flex_ms is None else float((acc.out.flatten(1, 2) - results[f"{name} flex"]).abs().max())
        )
        yield _row(name, shape, acc, times[name], times["dense"], flex_ms, far)


def sweep(shape: Shape, args: argparse.Namespace) -> Iterable[SweepRow]:
    """Random lists of every density by each way, against dense SDPA."""
    q, k, v = _tensors(shape)
    for density in _DENSITIES:
        run = _core(shape, q, k, v, random_table(shape, density))
        contenders: dict[str, Callable[[], Any]] = {
            "dense": lambda: _dense(shape, q, k, v),
            "gathered": lambda run=run: _one_way(2.0, run),  # type: ignore[misc]
            "masked": lambda run=run: _one_way(0.0, run),  # type: ignore[misc]
            "chosen": run,
        }
        times, results = _best(contenders, args.repeat)
        gathered, masked, chosen = (times["dense"] / times[name] for name in ("gathered", "masked", "chosen"))
        acc = results["chosen"]
        yield SweepRow(str(shape), density, gathered, masked, chosen, acc.dense / acc.computed)


def random_table(shape: Shape, density: float) -> Tensor:
    """Bool [Hk, tiles, blocks]: so many blocks of each tile and key head, each equally likely."""
    num_blocks = shape.N // shape.block
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(shape.Hk, -(-shape.N // shape.tile), num_blocks, generator=generator).argsort(-1)
    return order < max(1, round(density * num_blocks))


def window_table(shape: Shape, density: float) -> Tensor:
    """The same number of blocks around each tile."""
    num_blocks, num_tiles = shape.N // shape.block, -(-shape.N // shape.tile)
    width = max(1, round(density * num_blocks))
    middle = (torch.arange(num_tiles) * shape.tile + shape.tile // 2) // shape.block
    first = (middle - width // 2).clamp(0, num_blocks - width)[:, None]
    blocks = torch.arange(num_blocks)
    return ((blocks >= first) & (blocks < first + width)).expand(shape.Hk, -1, -1)


def _core(shape: Shape, q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Callable[[], Accumulator]:
    borders = (*range(0, shape.N, shape.tile), shape.N)
    lists = lists_from_table(table, shape.block, borders)
    call = Call(False, 1 / math.sqrt(shape.D), 0, 0, 0)
    return lambda: _attend(q, k, v, lists, call)


def _attend(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, call: Call) -> Accumulator:
    """The lists merged into rows that hold nothing yet."""
    acc = accumulator(q, k, v, call)
    acc.out.zero_()
    acc.lse.fill_(-math.inf)
    acc.complete(0, 0)
    block_sparse.add_block_lists(acc, 0, lists)
    return acc


def _one_way(share: float, run: Callable[[], Accumulator]) -> Accumulator:
    """Every list by itself: as a slice under a mask beyond ``share``, gathered where that is above 1."""
    with _tuned(share):
        return run()


@contextmanager
def _tuned(share: float) -> Iterator[None]:
    ways: dict[str, Any] = {
        "crossover": lambda num_rows: share,
        "common_and_rest": lambda lists, group: (lists,),
        "VIEW_ELEMENTS": 1 << 62 if share > 1 else 1,
    }
    tuned = {name: getattr(block_sparse, name) for name in ways}
    try:
        for name, value in ways.items():
            setattr(block_sparse, name, value)
        yield
    finally:
        for name, value in tuned.items():
            setattr(block_sparse, name, value)


def _flex(shape: Shape, q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import BlockMask

    L, num_blocks = shape.block, shape.N // shape.block
    by_block = table.repeat_interleave(shape.tile // L, 1)[:, : -(-shape.N // L)]
    by_head = by_block.repeat_interleave(shape.H // shape.Hk, 0)
    order = torch.argsort(by_head.int(), dim=-1, descending=True, stable=True).int()[None]
    none = torch.zeros(1, shape.H, by_head.shape[1], dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(
        none,
        torch.zeros(1, shape.H, by_head.shape[1], num_blocks, dtype=torch.int32),
        by_head.sum(-1).int()[None],
        order,
        BLOCK_SIZE=L,
        mask_mod=lambda b, h, i, j: by_head[h, i // L, j // L],
        seq_lengths=(shape.N, shape.N),
    )
    scale, grouped = 1 / math.sqrt(shape.D), shape.Hk != shape.H
    return lambda: _compiled()(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped)


@cache
def _compiled() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return cast(Callable[..., Tensor], torch.compile(flex_attention, dynamic=False))


def _dense(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=shape.Hk != shape.H)


def _tensors(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = (shape.H, shape.Hk, shape.Hk)
    q, k, v = (torch.randn(1, h, shape.N, shape.D, generator=generator) for h in heads)
    return q, k, v


def _best(contenders: dict[str, Callable[[], Any]], repeat: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Least milliseconds of each over rounds that alternate, and what the unmeasured first calls returned."""
    results = {name: run() for name, run in contenders.items()}
    times = dict.fromkeys(contenders, math.inf)
    for _ in range(repeat):
        for name, run in contenders.items():
            began = perf_counter()
            run()
            times[name] = min(times[name], (perf_counter() - began) * 1e3)
    return times, results


def _row(
    name: str,
    shape: Shape,
    acc: Accumulator,
    ms: float,
    dense_ms: float,
    flex_ms: float | None,
    far: float | None,
) -> Row:
    gflops = 4 * shape.D * acc.computed / ms / 1e6
    pairs = shape.H * shape.N**2
    dense_gflops = 4 * shape.D * pairs / dense_ms / 1e6
    return Row(
        lists=name,
        shape=str(shape),
        density=acc.kept / pairs,
        time_ms=ms,
        gflops=gflops,
        share_of_dense=gflops / dense_gflops,
        dense_ms=dense_ms,
        dense_gflops=dense_gflops,
        x_dense=dense_ms / ms,
        flex_ms=flex_ms,
        x_flex=None if flex_ms is None else flex_ms / ms,
        pairs_dense=acc.dense / acc.computed,
        max_abs_difference=far,
    )


_HEADER = (
    "| lists | shape | density | time_ms | GFLOP/s | of dense's rate | dense_ms | dense GFLOP/s | x dense "
    "| x Flex | from Flex |\n|---|---|" + "--:|" * 9
)
_SWEEP_HEADER = (
    "| shape | density | gathered x dense | masked slice x dense | chosen x dense | dense share |\n|---|"
    + "--:|" * 5
)


def _line(row: Row | SweepRow) -> str:
    if isinstance(row, SweepRow):
        return (
            f"| {row.shape} | {row.density:.4f} | {row.gathered:.2f} | {row.masked_slice:.2f} "
            f"| {row.chosen:.2f} | {row.pairs_dense:.2f} |"
        )
    flex, far = ("-", "-") if row.x_flex is None else (f"{row.x_flex:.2f}", f"{row.max_abs_difference:.0e}")
    return (
        f"| {row.lists} | {row.shape} | {row.density:.4f} | {row.time_ms:.0f} | {row.gflops:.0f} "
        f"| {row.share_of_dense:.2f} | {row.dense_ms:.0f} | {row.dense_gflops:.0f} | {row.x_dense:.2f} "
        f"| {flex} | {far} |"
    )


def _write(args: argparse.Namespace, rows: list[Row | SweepRow]) -> None:
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m kernels.bench_blocks", *sys.argv[1:]]),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rows": [asdict(row) for row in rows],
    }
    with open(args.json, "w", encoding="utf-8") as file:
        json.dump(record, file, indent=1)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    told = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m kernels.bench_blocks", description=told)
    parser.add_argument(
        "--length", type=int, default=16384, metavar="N", help="positions, a multiple of the tile"
    )
    shapes = [(12, 12, 64), (4, 1, 256), (9, 3, 64)]
    parser.add_argument("--shapes", type=_shape, nargs="+", default=shapes, metavar="HxHkxD")
    parser.add_argument("--tile", type=int, default=512, help="query rows that share a list")
    parser.add_argument("--block", type=int, default=64, choices=(32, 64, 128), help="keys of a block")
    parser.add_argument("--density", type=float, default=1 / 8, help="share of the blocks that a list has")
    parser.add_argument("--repeat", type=int, default=3, help="rounds; the best of each contender is taken")
    parser.add_argument("--sweep", action="store_true", help="random lists over densities 1/32 to 1")
    parser.add_argument(
        "--no-flex", action="store_true", help="without FlexAttention (it compiles for a minute)"
    )
    parser.add_argument("--json", metavar="FILE", help="write everything there as well")
    args = parser.parse_args(argv)
    if args.tile % args.block or args.length % args.tile:
        parser.error(
            f"--tile {args.tile} must be a multiple of --block {args.block} and divide --length {args.length}"
        )
    if not 0 < args.density <= 1:
        parser.error(f"--density {args.density} must lie in 0 < density <= 1")
    return args


def _shape(text: str) -> tuple[int, int, int]:
    try:
        H, Hk, D = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected HxHkxD such as 12x12x64, got {text!r}") from None
    return H, Hk, D


if __name__ == "__main__":
    sys.exit(main())
