"""How far an answer is from two others, on sampled rows.

    max_abs_error = max |o_i - r_i|                     r: the backend's own definition (correctness)
    error_to_exact = sqrt(sum |o_i - e_i|^2 / sum |e_i|^2)    e: exact softmax attention (of these inputs)

The definition is impl ``reference``: softmax under the own mask or, for a backend that approximates, its own
estimate, written slowly. It runs on few rows that make the same choice: four stretches of eight, or
whole query tiles where a tile chooses together (``selection`` tile), of one key head each where no head's
choice looks at another's: two tiles up to 4,096 tokens, one up to 16,384, none beyond (the reference chooses
in Python loops over all keys). A choice that depends on the whole prompt can only be repeated on all of it:
up to 2,048 tokens, as for a reference that takes memory for every pair of keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from kernels.api import attend
from kernels.benchmarks.cases import Case, chooses_by_tile
from kernels.benchmarks.inputs import Tensors
from kernels.registry import load

_SQUARE_REFERENCE = ("scatterbrain",)
"""Backends whose reference takes memory that grows with the square of the keys, however few rows it is asked
for."""
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
    learned = case.learned
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
            learned=learned,
        )
        worst = max(worst, float((again.out - out[:, queries, rows]).abs().max()))
        num_rows += rows.stop - rows.start
        if perf_counter() - began > _ENOUGH_S:
            break
    return OwnError(worst if num_rows else None, num_rows)


def _samples(case: Case) -> Iterator[slice]:
    if case.impl == "reference":
        return
    if case.backend in _SQUARE_REFERENCE and case.N > _WHOLE_PROMPT_UP_TO:
        return
    if _looks_at_every_row(case):
        if case.N <= _WHOLE_PROMPT_UP_TO:
            yield slice(0, case.N)
        return
    if not chooses_by_tile(case):
        first_rows = torch.linspace(0, max(0, case.N - _ROWS), _STRETCHES).long().tolist()
        yield from (slice(row, min(row + _ROWS, case.N)) for row in dict.fromkeys(first_rows))
        return
    if case.N > _ONE_TILE_UP_TO:
        return
    height = case.parsed.chunk_multiple()
    last = -(-case.N // height) - 1
    for tile in dict.fromkeys([last // 2, last] if case.N <= _TWO_TILES_UP_TO else [last // 2]):
        yield slice(tile * height, min((tile + 1) * height, case.N))


def _looks_at_every_row(case: Case) -> bool:
    """Whether a row's result depends on the call's other rows; SMYRF's hashing sorts them all."""
    by_prompt = load(case.backend).capabilities.selection == "prompt"
    return by_prompt or "smyrf" in (case.params.get("variant"), _support(case).get("variant"))


def _support(case: Case) -> dict[str, Any]:
    found = case.params.get("support_params")
    return found if isinstance(found, dict) else {}


def _key_heads(case: Case, rows: slice) -> slice:
    able = load(case.backend).capabilities
    together = not chooses_by_tile(case) or able.random or able.learned
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
