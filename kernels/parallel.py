"""One call on several cores: stretches of its rows side by side, each on a thread that computes alone.

    attend(q) = [attend(q_1); attend(q_2); ...]       cut at query tiles, over the keys that the rows may see

That is the contract of chunked prefill, so a result does not depend on it. A selection and the products over
what it chose are many small operations: torch would share each of them among its threads and wait for the
slowest every time. Here threads meet once per call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from time import perf_counter
from typing import TypeVar

import torch
from torch import Tensor

from kernels.contract import AttentionResult, Call, Execute, Params, Stats
from kernels.math.summaries import BlockSummaries

T = TypeVar("T")

MIN_FLOPS = 1 << 28
"""Below this many operations of exact attention a call stays on its thread."""
MIN_ROWS = 256
STRETCHES_PER_THREAD = 4


def run_spread(
    execute: Execute, q: Tensor, k: Tensor, v: Tensor, params: Params, call: Call
) -> AttentionResult:
    """``execute`` on the whole call, spread over torch's threads where that pays."""
    borders = _borders(q, k, call, params.chunk_multiple())
    if len(borders) < 3:
        return execute(q, k, v, params, call)
    began = perf_counter()
    shared = call
    if call.summaries is None and len(q) == 1:  # one stretch learns of the keys for all
        shared = replace(call, summaries=BlockSummaries(k.shape[2]))

    def stretch(begin: int, end: int) -> AttentionResult:
        keys = shared.start + end if shared.causal else k.shape[2]
        own = replace(shared, start=shared.start + begin)
        return execute(q[:, :, begin:end], k[:, :, :keys], v[:, :, :keys], params, own)

    jobs = [partial(stretch, begin, end) for begin, end in pairwise(borders)]
    # the last stretch of a causal call is the longest: it begins first
    parts = side_by_side(jobs[::-1], q.device)[::-1]
    return _joined(parts, (perf_counter() - began) * 1e3)


def _borders(q: Tensor, k: Tensor, call: Call, multiple: int) -> list[int]:
    """Rows of the call where stretches begin and end, at absolute multiples of the query tile."""
    (B, H, N, D), threads = q.shape, torch.get_num_threads()
    keys = call.start + (N + 1) // 2 if call.causal else k.shape[2]
    if threads < 2 or q.device.type != "cpu" or 4 * B * H * N * keys * D < MIN_FLOPS:
        return [0, N]
    unit = max(multiple, MIN_ROWS)
    height = -(-N // (threads * STRETCHES_PER_THREAD * unit)) * unit
    first = (call.start // height + 1) * height - call.start
    return [0, *range(first, N, height), N]


def side_by_side(jobs: Sequence[Callable[[], T]], device: torch.device) -> list[T]:
    """The jobs' results in order, on as many threads as torch would use, each computing alone. One after
    another where that is one (so too on a thread of the pool, which must not wait for its like) and on other
    devices."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads < 2 or len(jobs) < 2:
        return [job() for job in jobs]
    inference = torch.is_inference_mode_enabled()

    def alone(job: Callable[[], T]) -> T:
        with torch.inference_mode(inference), torch.no_grad():
            return job()

    pending = [_pool(threads).submit(alone, job) for job in jobs]
    wait(pending)
    return [future.result() for future in pending]


@cache
def _pool(num_threads: int) -> ThreadPoolExecutor:
    """Threads on which torch computes alone.

    torch's number of threads is each thread's own, but the last number set is what new threads begin with: so
    all workers are started here, and the number is set back.
    """
    started = threading.Barrier(num_threads + 1)
    pool = ThreadPoolExecutor(num_threads, "attention", initializer=_compute_alone)
    for _ in range(num_threads):
        pool.submit(started.wait)
    started.wait()
    torch.set_num_threads(num_threads)
    return pool


def _compute_alone() -> None:
    """A thread asks for the number once, at its first use of torch, and would forget one set before it."""
    torch.get_num_threads()
    torch.set_num_threads(1)


def _joined(parts: Sequence[AttentionResult], spent_ms: float) -> AttentionResult:
    lse = [part.lse for part in parts if part.lse is not None]
    dropped = [part.dropped for part in parts if part.dropped is not None]
    rows = torch.cat(dropped, 2) if dropped else None
    return AttentionResult(
        torch.cat([part.out for part in parts], 2),
        torch.cat(lse, 2) if lse else None,
        _side_by_side([part.stats for part in parts], spent_ms, rows),
        rows,
    )


def summed(stats: Sequence[Stats]) -> Stats:
    """What the parts of one call computed together; ``dropped_mass``, a mean, stays the first's."""
    return replace(
        stats[0],
        pairs_kept=sum(s.pairs_kept for s in stats),
        pairs_exact=sum(s.pairs_exact for s in stats),
        pairs_computed=sum(s.pairs_computed for s in stats),
        pairs_dense=sum(s.pairs_dense for s in stats),
        pairs_scored=sum(s.pairs_scored for s in stats),
        other_flops=sum(s.other_flops for s in stats),
        selection_ms=sum(s.selection_ms for s in stats),
        compute_ms=sum(s.compute_ms for s in stats),
        kept_per_head=_per_head([s.kept_per_head for s in stats]),
    )


def _side_by_side(stats: Sequence[Stats], spent_ms: float, dropped: Tensor | None) -> Stats:
    """Selection's share of the time that threads worked, of the time that passed."""
    total = summed(stats)
    worked_ms = total.selection_ms + total.compute_ms
    share = total.selection_ms / worked_ms if worked_ms else 0.0
    return replace(
        total,
        selection_ms=share * spent_ms,
        compute_ms=(1 - share) * spent_ms,
        dropped_mass=None if dropped is None else float(dropped.mean()),
    )


def _per_head(kept: Sequence[tuple[int, ...] | None]) -> tuple[int, ...] | None:
    told = [each for each in kept if each is not None]
    return tuple(map(sum, zip(*told, strict=True))) if told else None
