"""The error that an attention backend makes in each layer, and its time beside exact's.

    error of a layer = sqrt( sum_i |(o^_i - o_i) W_O|^2 / sum_i |o_i W_O|^2 )        i over all rows

o exact's output of a row, o^ the contender's from the same q, k, v, W_O the output projection. The mass truly
dropped is 1 - exp(lse_kept - lse_exact), mean over rows and heads; where left-out keys were put back or
approximated the kept log-sum-exp is not known and the mass is not reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from kernels.api import chosen_impl
from kernels.contract import AttentionResult, Call, Execute, Params
from kernels.math.cache import DRAWS
from kernels.math.kept import KeptStates
from kernels.math.summaries import BlockSummaries
from kernels.parallel import run_spread
from kernels.registry import load as load_backend
from models.call import wait_for
from models.quality_contenders import Contender, contender
from models.quality_ladders import EXACT, REMAINDER
from models.quality_record import LayerRecord, chunks


@dataclass(frozen=True)
class ErrorRow:
    """What one contender did to one text. ``error`` is the mean over the measured layers, ``layer_errors``
    belongs to ``layers``; times are summed over them, selection included in ``attention_s``."""

    tokens: int
    backend: str
    params: dict[str, Any]
    full: dict[str, Any]
    error: float
    layers: list[int]
    layer_errors: list[float]
    attention_s: float
    selection_s: float
    exact_attention_s: float
    density: float
    density_computed: float
    dropped_estimate: float | None
    dropped_true: float | None

    @property
    def time_share(self) -> float:
        return self.attention_s / self.exact_attention_s

    @property
    def worst_error(self) -> float:
        return max(self.layer_errors)

    @property
    def recall(self) -> float | None:
        """Exact's softmax mass on the keys that were kept, mean over rows and heads."""
        return None if self.dropped_true is None else 1 - self.dropped_true


@dataclass
class _Mean:
    """A mean over rows and heads."""

    total: float = 0.0
    count: float = 0.0

    def add(self, mean: float, count: float) -> None:
        self.total += mean * count
        self.count += count

    @property
    def value(self) -> float | None:
        return self.total / self.count if self.count else None


@dataclass
class _Kept:
    """What a server keeps beside one layer's cache from chunk to chunk."""

    summaries: BlockSummaries
    states: KeptStates = field(default_factory=KeptStates)


@dataclass
class _Tally:
    """One contender while its rows are added up."""

    contender: Contender
    execute: Execute
    params: Params
    approximates: bool
    seconds: float = 0.0
    selection_s: float = 0.0
    pairs: list[int] = field(default_factory=lambda: [0, 0, 0])
    difference: float = 0.0
    layer_errors: list[float] = field(default_factory=list)
    dropped: _Mean = field(default_factory=_Mean)
    truth: _Mean = field(default_factory=_Mean)
    kept: list[_Kept] = field(default_factory=list)
    """Of the layer at hand, one for each round: every chunk meets it as the chunk before it left it."""

    def add(self, timed: _Timed, exact: _Timed, projection: Tensor) -> None:
        """One chunk of one layer. ``projection`` is W_O transposed, [H Dv, E]."""
        result, stats = timed.result, timed.result.stats
        self.seconds += timed.seconds
        self.selection_s += timed.selection_s
        counts = (stats.pairs_kept, stats.pairs_exact, stats.pairs_computed)
        self.pairs = [a + b for a, b in zip(self.pairs, counts, strict=True)]
        self.difference += squares(result.out - exact.result.out, projection)
        rows = result.out[..., 0].numel()
        if stats.dropped_mass is not None and not self.approximates:
            self.dropped.add(stats.dropped_mass, rows)
        truth = _dropped_truly(result, exact.result, self.params)
        if truth is not None:
            self.truth.add(float(truth.double().mean()), rows)


@dataclass(frozen=True)
class _Timed:
    result: AttentionResult
    seconds: float
    selection_s: float


def _tally(each: Contender) -> _Tally:
    """As served: a backend that selects by query tile has its rows spread over threads."""
    backend = load_backend(each.backend)
    able, execute = backend.capabilities, backend.impls["torch"]
    if able.selection == "tile":
        execute = partial(run_spread, execute)
    return _Tally(each, execute, each.choice(0).params, able.approximates)


def measure_errors(
    records: Sequence[LayerRecord],
    contenders: Sequence[Contender],
    *,
    chunk_tokens: int,
    seed: int = 0,
    repeat: int = 1,
    pieces: Sequence[slice] | None = None,
    before_call: Callable[[], object] = lambda: None,
) -> list[ErrorRow]:
    """Every contender on the same recorded layers, in turns with exact chunk by chunk: on all of the text, or
    on the rows of ``pieces`` alone, each over all keys before it.

    With ``repeat`` every call runs that often in as many rounds, and its least time counts. Each begins
    without what an earlier one left behind for the same rows (random keys, block summaries, kept states): a
    server draws and sums up once, and its time has to show it. ``before_call`` runs outside inference mode,
    while no time is taken: a yield point, for one.
    """
    exact, tallies = _tally(contender(EXACT, {})), [_tally(each) for each in contenders]
    for record in records:
        rows = chunks(record.q.shape[2], chunk_tokens) if pieces is None else pieces
        _measure_layer(record, exact, tallies, rows, seed, repeat, before_call)
    tokens, layers = records[0].q.shape[2], [record.index for record in records]
    return [_row(tally, exact, tokens, layers) for tally in tallies]


def _measure_layer(
    record: LayerRecord,
    exact: _Tally,
    tallies: list[_Tally],
    pieces: Iterable[slice],
    seed: int,
    repeat: int,
    before_call: Callable[[], object],
) -> None:
    everyone = [exact, *tallies]
    for each in everyone:
        each.kept = [_Kept(BlockSummaries(record.q.shape[2])) for _ in range(repeat)]
        each.difference = 0.0
    size = 0.0
    for number, rows in enumerate(pieces):
        first = number + record.index
        size += _add(record, everyone, _in_turns(record, rows, everyone, seed, repeat, first, before_call))
    for each in everyone:
        each.layer_errors.append(_relative(each.difference, size))


def _relative(difference: float, size: float) -> float:
    """The root of their ratio. A layer whose exact output is 0 has no error where its own is 0 too."""
    if size == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return math.sqrt(difference / size)


@torch.inference_mode()
def _add(record: LayerRecord, everyone: list[_Tally], timed: list[_Timed]) -> float:
    """One chunk: sum |o W_O|^2 of its rows."""
    projection = record.w_o.t().float()
    for each, its in zip(everyone, timed, strict=True):
        each.add(its, timed[0], projection)
    return squares(timed[0].result.out, projection)


def _in_turns(
    record: LayerRecord,
    rows: slice,
    everyone: list[_Tally],
    seed: int,
    repeat: int,
    first: int,
    before_call: Callable[[], object],
) -> list[_Timed]:
    """Everyone's best of ``repeat`` calls. Each round begins one further on: nobody is always first."""
    best: dict[int, _Timed] = {}
    for turn in range(repeat):
        begin = (first + turn) % len(everyone)
        for i in [*range(begin, len(everyone)), *range(begin)]:
            before_call()
            its = _run(record, rows, everyone[i], seed, turn)
            if i not in best or its.seconds < best[i].seconds:
                best[i] = its
    return [best[i] for i in range(len(everyone))]


@torch.inference_mode()
def _run(record: LayerRecord, rows: slice, tally: _Tally, seed: int, turn: int) -> _Timed:
    """One chunk as the cache serves it: its rows over the keys so far, what earlier chunks left kept. A
    bidirectional model has no cache."""
    causal, held = record.plan.causal, tally.kept[turn]
    call = Call(
        causal=causal,
        scale=record.scale,
        seed=seed,
        layer=record.plan.ordinal,
        start=rows.start,
        summaries=held.summaries if causal else None,
        kept=held.states if causal else None,
        learned=record.learned.get(tally.contender.backend),
    )
    q, k, v = record.q[:, :, rows], record.k[:, :, : rows.stop], record.v[:, :, : rows.stop]
    execute, call = _as_served(tally, q, v, call)
    DRAWS.clear()
    wait_for(q.device)
    began = perf_counter()
    result = execute(q, k, v, tally.params, call)
    wait_for(q.device)
    return _Timed(result, perf_counter() - began, result.stats.selection_ms / 1e3)


def _as_served(tally: _Tally, q: Tensor, v: Tensor, call: Call) -> tuple[Execute, Call]:
    """By the impl that suits the device."""
    backend = load_backend(tally.contender.backend)
    impl = chosen_impl(backend, q, v, "auto")
    if impl == call.impl:
        return tally.execute, call
    return backend.impls[impl], replace(call, impl=impl)


def squares(out: Tensor, projection: Tensor) -> float:
    """sum |out W_O|^2 over rows: out [1, H, N, Dv], projection [H Dv, E]."""
    rows = out[0].float().transpose(0, 1).flatten(1)
    return float((rows @ projection).square().sum(dtype=torch.float64))


def _dropped_truly(result: AttentionResult, exact: AttentionResult, params: Params) -> Tensor | None:
    """Softmax mass [1, H, N] that is not in the result; None where it cannot be told."""
    if result.lse is None or exact.lse is None or getattr(params, REMAINDER, "none") != "none":
        return None
    return -torch.expm1(result.lse - exact.lse)


def _row(tally: _Tally, exact: _Tally, tokens: int, layers: list[int]) -> ErrorRow:
    kept, pairs_exact, computed = tally.pairs
    return ErrorRow(
        tokens=tokens,
        backend=tally.contender.backend,
        params=tally.contender.params,
        full=tally.contender.full,
        error=sum(tally.layer_errors) / len(layers),
        layers=layers,
        layer_errors=tally.layer_errors,
        attention_s=tally.seconds,
        selection_s=tally.selection_s,
        exact_attention_s=exact.seconds,
        density=kept / pairs_exact,
        density_computed=computed / pairs_exact,
        dropped_estimate=tally.dropped.value,
        dropped_true=tally.truth.value,
    )
