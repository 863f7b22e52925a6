"""FlexAttention's side of the bench: patterns that key blocks can express, compiled by torch.compile.

A pattern is given as FlexAttention wants it: blocks that hold a kept pair, those of them that are kept whole,
and the predicate on elements for the rest. Where nearly every block holds a kept pair, FlexAttention would
compute nearly everything, and the reason is told instead of a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from kernels.api import parse_params
from kernels.contract import Call
from kernels.math.random_keys import block_draws
from kernels.math.window import window_keep

if TYPE_CHECKING:
    from kernels.bench import Case

_BLOCK = 128
_MAX_BLOCKS_TOUCHED = 0.6
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def runner(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor] | str:
    """A call that computes the case, or why there is none."""
    params: Any = parse_params(case.backend, case.params)
    if case.backend in ("strided", "fixed"):
        return "every key block holds a kept pair"
    if case.backend == "random" and params.block_size == 1:
        return "single random keys: every key block holds a kept pair"
    if case.backend == "bigbird" and params.block_size == 1:
        return "single random keys: every key block holds a kept pair"
    keep, table, block = _pattern(case, params)
    touched, whole = _blocks(keep, table, block, case.N)
    if case.backend != "exact" and float(touched.float().mean()) > _MAX_BLOCKS_TOUCHED:
        return "most key blocks hold a kept pair"
    mask = _block_mask(touched, whole, block, case, _mask_mod(keep, table, block, case.H // case.Hk))
    compiled = _compiled()
    return lambda: compiled(q, k, v, block_mask=mask, scale=case.scale, enable_gqa=case.Hk != case.H)


@cache
def _compiled() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 256
    return cast(Callable[..., Tensor], torch.compile(flex_attention, dynamic=False))


def _pattern(case: Case, params: Any) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor | None, int]:
    """The predicate on elements, the table [Hk, nb, nb] of drawn blocks, and the block size."""
    N, causal = case.N, case.causal
    if case.backend == "exact":
        return (lambda i, j: j <= i) if causal else (lambda i, j: j >= 0), None, _BLOCK
    if case.backend == "window":
        window, columns, rows = params.window, params.global_tokens, 0 if causal else params.global_tokens
        return (lambda i, j: window_keep(i, j, window, columns, rows, causal)), None, _BLOCK
    if case.backend == "sinks":
        window, columns = params.window, params.sinks
        return (lambda i, j: window_keep(i, j, window, columns, 0, causal)), None, _BLOCK
    if case.backend == "star":
        window = params.window
        if causal:
            return (lambda i, j: window_keep(i, j, window, 1, 0, True)), None, _BLOCK
        return (lambda i, j: _ring(i, j, window, N - 1)), None, _BLOCK
    table = _drawn_blocks(case, params)
    if case.backend == "random":
        return (lambda i, j: i == j), table, params.block_size
    window, columns, rows = params.window, params.global_tokens, 0 if causal else params.global_tokens
    return (lambda i, j: window_keep(i, j, window, columns, rows, causal)), table, params.block_size


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


def _blocks(
    keep: Callable[[Tensor, Tensor], Tensor], table: Tensor | None, block: int, N: int
) -> tuple[Tensor, Tensor]:
    """Blocks [Hk or 1, nb, nb] that hold a kept pair, and those kept whole, strip by strip."""
    count = -(-N // block)
    j = torch.arange(count * block)[None]
    touched, whole = torch.zeros(count, count, dtype=torch.bool), torch.zeros(count, count, dtype=torch.bool)
    for b in range(count):
        i = torch.arange(b * block, (b + 1) * block)[:, None]
        kept = torch.unflatten(keep(i, j).expand(block, -1) & (j < N), 1, (count, block))
        touched[b], whole[b] = kept.any(2).any(0), kept.all(2).all(0)
    if table is None:
        return touched[None], whole[None]
    complete = torch.arange(count) < N // block
    return touched | table, whole | (table & complete)


def _mask_mod(
    keep: Callable[[Tensor, Tensor], Tensor], table: Tensor | None, block: int, group: int
) -> MaskMod:
    if table is None:
        return lambda b, h, i, j: keep(i, j)
    drawn = table
    return lambda b, h, i, j: keep(i, j) | drawn[h // group, i // block, j // block]


def _block_mask(touched: Tensor, whole: Tensor, block: int, case: Case, mask_mod: MaskMod) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    by_head = touched.shape[0] > 1
    lists = []
    for chosen in (touched & ~whole, whole):
        heads = chosen.repeat_interleave(case.H // case.Hk, 0) if by_head else chosen
        order = torch.argsort(heads.int(), dim=-1, descending=True, stable=True).int()
        lists.append((heads.sum(-1).int()[None], order[None]))
    (num_partial, partial), (num_whole, wholly) = lists
    return BlockMask.from_kv_blocks(
        num_partial,
        partial,
        num_whole,
        wholly,
        BLOCK_SIZE=block,
        mask_mod=mask_mod,
        seq_lengths=(case.N, case.N),
    )
