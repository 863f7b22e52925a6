"""How far an answer is from two others, on sampled rows.

    max_abs_error = max |o_i - r_i|                     r: softmax under the backend's own mask (correctness)
    error_to_exact = sqrt(sum |o_i - e_i|^2 / sum |e_i|^2)    e: exact softmax attention (of these inputs)

The own mask comes from impl ``reference`` on few rows that make the same choice: four stretches of eight, or
whole query tiles where a tile chooses together (``selection`` tile), of one key head each where no head's
choice looks at another's: two tiles up to 4,096 tokens, one up to 16,384, none beyond (the reference chooses
in Python loops over all keys). A choice that depends on the whole prompt can only be repeated on all of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from kernels.api import attend
from kernels.benchmarks.cases import Case
from kernels.benchmarks.inputs import Tensors
from kernels.registry import load

_STRETCHES = 4
_ROWS = 8
_WHOLE_PROMPT_UP_TO = 2048
_TWO_TILES_UP_TO = 4096
_ONE_TILE_UP_TO = 16384
_EXACT_ROWS = 64
_ENOUGH_S = 3.0


@dataclass(frozen=True)
class OwnError:
    """Largest difference over ``num_rows`` rows; None where nothing could be compared."""

    max_abs: float | None
    num_rows: int


def own_error(case: Case, x: Tensors, out: Tensor) -> OwnError:
    """``out`` [1, H, N, D] against the reference; stops between two samples when it has taken long enough."""
    began, worst, num_rows, group = perf_counter(), 0.0, 0, case.H // case.Hk
    for rows in _samples(case):
        heads = _key_heads(case, rows)
        queries = slice(heads.start * group, heads.stop * group)
        again = attend(
            x.q[:, queries, rows],
            x.k[:, heads],
            x.v[:, heads],
            backend=case.backend,
            params=case.params,
            causal=case.causal,
            scale=case.scale,
            start=rows.start,
            impl="reference",
        )
        worst = max(worst, float((again.out - out[:, queries, rows]).abs().max()))
        num_rows += rows.stop - rows.start
        if perf_counter() - began > _ENOUGH_S:
            break
    return OwnError(worst if num_rows else None, num_rows)


def _samples(case: Case) -> Iterator[slice]:
    if case.impl == "reference":
        return
    selection = load(case.backend).capabilities.selection
    if selection == "prompt":
        if case.N <= _WHOLE_PROMPT_UP_TO:
            yield slice(0, case.N)
        return
    if selection != "tile":
        first_rows = torch.linspace(0, max(0, case.N - _ROWS), _STRETCHES).long().tolist()
        yield from (slice(row, min(row + _ROWS, case.N)) for row in dict.fromkeys(first_rows))
        return
    if case.N > _ONE_TILE_UP_TO:
        return
    height = case.parsed.chunk_multiple()
    last = -(-case.N // height) - 1
    for tile in dict.fromkeys([last // 2, last] if case.N <= _TWO_TILES_UP_TO else [last // 2]):
        yield slice(tile * height, min((tile + 1) * height, case.N))


def _key_heads(case: Case, rows: slice) -> slice:
    able = load(case.backend).capabilities
    together = able.selection != "tile" or able.random or able.learned
    if together or case.parsed.size_problems(num_layers=1, num_kv_heads=1):
        return slice(0, case.Hk)
    head = rows.start // (rows.stop - rows.start) % case.Hk
    return slice(head, head + 1)


@dataclass(frozen=True)
class ExactRows:
    """Exact attention of some rows, out [1, H, rows, D]: every contender of a group is compared with it."""

    rows: Tensor
    out: Tensor

    def relative_error(self, out: Tensor) -> float:
        """Of ``out`` [1, H, N, D]."""
        apart = (out[:, :, self.rows] - self.out).double().norm()
        return float(apart / self.out.double().norm())


def exact_rows(x: Tensors, causal: bool, scale: float) -> ExactRows:
    """The last row of each of 64 equal stretches (all rows where there are fewer)."""
    N, Hk = x.q.shape[2], x.k.shape[1]
    count = min(_EXACT_ROWS, N)
    rows = (torch.arange(1, count + 1) * N) // count - 1
    grouped = torch.unflatten(x.q[:, :, rows], 1, (Hk, -1))
    scores = scale * (grouped @ x.k.unsqueeze(2).mT)
    if causal:
        scores.masked_fill_(torch.arange(N) > rows[:, None], -math.inf)
    return ExactRows(rows, (torch.softmax(scores, -1) @ x.v.unsqueeze(2)).flatten(1, 2))
