"""The masks of the backends in FlexAttention's terms: which blocks hold a kept pair, which are kept whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.benchmarks.cases import Case
from kernels.benchmarks.inputs import Tensors
from kernels.contract import Call, Select
from kernels.math.query_tiles import QueryTiles, query_tiles
from kernels.math.random_keys import block_draws
from kernels.math.window import window_keep
from kernels.registry import load

_BLOCK = 128
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Pairs = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Blocks:
    """``touched`` and ``whole``: bool [Hk or H or 1, query blocks, key blocks], blocks that hold a kept pair
    and those kept whole; ``keep`` decides in the others."""

    touched: Tensor
    whole: Tensor
    query_block: int
    key_block: int
    keep: MaskMod

    def share_touched(self) -> float:
        return float(self.touched.float().mean())


def why_no_mask(case: Case) -> str:
    """Why FlexAttention has no mask for the case; "" where it has."""
    params: Any = case.parsed
    if case.backend in ("strided", "fixed"):
        return "every key block holds a kept pair"
    if case.backend in ("random", "bigbird") and params.block_size == 1:
        return "single random keys: every key block holds a kept pair"
    if load(case.backend).capabilities.approximates:
        return "it estimates what it does not keep, which no mask can"
    if case.backend in _FIXED or load(case.backend).select is not None:
        return ""
    return "its mask is not made of key blocks"


_FIXED = ("exact", "window", "sinks", "star", "random", "bigbird")


def fixed_mask(case: Case) -> Blocks:
    """A pattern that knows no data, from its predicate and, for random blocks, its draws."""
    keep, table, block = _pattern(case, case.parsed)
    touched, whole = _classified_once(case, keep, block)
    if table is not None:
        complete = torch.arange(touched.shape[-1]) < case.N // block
        touched, whole = touched | table, whole | (table & complete)
    return Blocks(touched, whole, block, block, _mask_mod(keep, table, block, case.H // case.Hk))


def listed_mask(case: Case, select: Select, x: Tensors) -> Blocks:
    """Own keys of every query tile, and the key blocks that the backend chooses on these inputs.

    Only own keys can be cut, by the diagonal or by the last block's end: ``keep`` is the same function for
    every backend, and one compiled kernel serves them all."""
    params = case.parsed
    lists = select(x.q, x.k, x.v, params, case.call)
    tiles = query_tiles(case.call, case.N, case.N, params.chunk_multiple(), lists.block)
    step = min(_BLOCK, tiles.height)
    begins = torch.arange(0, case.N, step)
    chosen = lists.table(-(-case.N // lists.block))[:, begins // tiles.height]
    own, own_whole = _own_blocks(tiles, begins, step)
    keep = _earlier if case.causal else _any
    return Blocks(chosen | own, chosen | own_whole, step, lists.block, keep)


def _own_blocks(tiles: QueryTiles, begins: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Key blocks that hold own keys of each query block's rows, and those of them that count whole."""
    N, L, T = tiles.num_keys, tiles.block, tiles.height
    keys = torch.arange(0, N, L)[None]
    rows = begins[:, None]
    in_tile = keys // T == rows // T
    if not tiles.causal:
        complete = keys + L <= N
        return in_tile | ~complete, in_tile & complete
    return in_tile & (keys < rows + step), in_tile & (keys + L <= rows + 1)


def _earlier(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return j <= i


def _any(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return j >= 0


def _pattern(case: Case, params: Any) -> tuple[Pairs, Tensor | None, int]:
    """The predicate on elements, the table [Hk, nb, nb] of drawn blocks, and the block size."""
    N, causal = case.N, case.causal
    if case.backend == "exact":
        return (lambda i, j: j <= i) if causal else (lambda i, j: j >= 0), None, _BLOCK
    if case.backend == "sinks":
        window, columns = params.window, params.sinks
        return (lambda i, j: window_keep(i, j, window, columns, 0, causal)), None, _BLOCK
    if case.backend == "star":
        window = params.window
        if causal:
            return (lambda i, j: window_keep(i, j, window, 1, 0, True)), None, _BLOCK
        return (lambda i, j: _ring(i, j, window, N - 1)), None, _BLOCK
    if case.backend == "random":
        return (lambda i, j: i == j), _drawn_blocks(case, params), params.block_size
    window, columns, rows = params.window, params.global_tokens, 0 if causal else params.global_tokens
    near: Pairs = lambda i, j: window_keep(i, j, window, columns, rows, causal)  # noqa: E731
    if case.backend == "window":
        return near, None, _BLOCK
    return near, _drawn_blocks(case, params), params.block_size


def _ring(i: Tensor, j: Tensor, window: int, relay: int) -> Tensor:
    apart = (i - j).abs()
    return (apart <= window) | (relay - apart <= window) | (j == relay) | (i == relay)


def _drawn_blocks(case: Case, params: Any) -> Tensor:
    L = params.block_size
    count = -(-case.N // L)
    call = Call(case.causal, case.scale, 0, 0, 0)
    drawn = block_draws(call, case.Hk, torch.arange(count), params.num_random // L, count)
    table = torch.zeros(case.Hk, count, count + 1, dtype=torch.bool)
    return table.scatter_(2, torch.where(drawn < 0, count, drawn), True)[..., :count].contiguous()


def _classified_once(case: Case, keep: Pairs, block: int) -> tuple[Tensor, Tensor]:
    """Kept for the other shapes of that length: a predicate on positions knows nothing of heads."""
    key = (case.backend, case.told_params, case.N, case.causal)
    if key not in _CLASSIFIED:
        _CLASSIFIED[key] = _classified(keep, block, case.N)
    return _CLASSIFIED[key]


_CLASSIFIED: dict[tuple[str, str, int, bool], tuple[Tensor, Tensor]] = {}


def _classified(keep: Pairs, block: int, N: int) -> tuple[Tensor, Tensor]:
    """Blocks [1, nb, nb] that hold a kept pair, and those kept whole, strip by strip."""
    count = -(-N // block)
    j = torch.arange(count * block, dtype=torch.int32)[None]
    touched, whole = torch.zeros(2, 1, count, count, dtype=torch.bool)
    for b in range(count):
        i = torch.arange(b * block, (b + 1) * block, dtype=torch.int32)[:, None]
        kept = torch.unflatten(keep(i, j).expand(block, -1) & (j < N), 1, (count, block))
        within = kept[: N - b * block]  # rows beyond the last are no rows of the call
        touched[0, b], whole[0, b] = within.any(2).any(0), kept.all(2).all(0)
    return touched, whole


def _mask_mod(keep: Pairs, table: Tensor | None, block: int, group: int) -> MaskMod:
    if table is None:
        return lambda b, h, i, j: keep(i, j)
    drawn = table
    return lambda b, h, i, j: keep(i, j) | drawn[h // group, i // block, j // block]
