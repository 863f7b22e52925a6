"""Milliseconds of calls on a GPU: the median of many, by CUDA events, each with a cold second-level cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any, Protocol

import torch

FLUSH_BYTES = 256 << 20
"""Overwritten before every call: more than the second-level cache of any chip there is (H100: 50 MB, B200:
126 MB)."""
WARM_CALLS = 3


class Timer(Protocol):
    def __call__(self, runs: Sequence[Callable[[], Any]]) -> list[float]:
        """Median milliseconds of each, taken in turns."""


class CudaTimer:
    """``rounds`` timed calls of each contender after ``WARM_CALLS`` that compile and settle."""

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds
        self._flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")

    def __call__(self, runs: Sequence[Callable[[], Any]]) -> list[float]:
        for run in runs:
            for _ in range(WARM_CALLS):
                run()
        spans: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in runs]
        for _ in range(self._rounds):
            for run, own in zip(runs, spans, strict=True):
                own.append(self._once(run))
        torch.cuda.synchronize()
        return [statistics.median(begun.elapsed_time(ended) for begun, ended in own) for own in spans]

    def _once(self, run: Callable[[], Any]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self._flush.zero_()
        begun.record()
        run()
        ended.record()
        return begun, ended


class WallTimer:
    """By the clock on the wall, for devices without events."""

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds

    def __call__(self, runs: Sequence[Callable[[], Any]]) -> list[float]:
        times: list[list[float]] = [[] for _ in runs]
        for _ in range(self._rounds):
            for run, own in zip(runs, times, strict=True):
                began = perf_counter()
                run()
                own.append((perf_counter() - began) * 1e3)
        return [statistics.median(own) for own in times]
