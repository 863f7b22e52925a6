"""The high-water mark of memory between two moments: what a call takes beyond what was held before it.

    peak = highest resident bytes since construction - resident bytes at construction

On CUDA from torch's allocator; on Linux from the kernel's resident-set high-water mark (``VmHWM``, reset
through ``/proc/self/clear_refs``), file-backed pages that were read for the first time left out. Freed heap
memory is given back before the first reading, so that what a call takes again counts. Elsewhere nothing can
say: None.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_HIGH_WATER_MARK = "5"


class PeakBytes:
    """What happens between construction and ``read`` takes so many bytes at its highest moment."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: tuple[int, int] | None = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = (torch.cuda.memory_allocated(device), 0)
        elif device.type == "cpu":
            self._before = _reset_and_read()

    def read(self) -> int | None:
        """Bytes beyond those held at construction; None where the system cannot say."""
        if self._before is None:
            return None
        held, file_backed = self._before
        if self._device.type == "cuda":
            return max(0, torch.cuda.max_memory_allocated(self._device) - held)
        now = _status()
        if now is None:
            return None
        return max(0, now["VmHWM"] - held - (now["RssFile"] - file_backed))


def peak_bytes(run: Callable[[], Any], device: torch.device, calls: int = 1) -> int | None:
    """The smallest peak of several calls, what each returns included: the rest is the allocator's noise."""
    peaks = []
    for _ in range(calls):
        peak = PeakBytes(device)
        kept = run()
        peaks.append(peak.read())
        del kept
    told = [each for each in peaks if each is not None]
    return min(told) if told else None


def _reset_and_read() -> tuple[int, int] | None:
    """(resident bytes, file-backed ones) after giving free memory back and resetting the high-water mark."""
    give_back_free_memory()
    try:
        _CLEAR_REFS.write_text(_RESET_HIGH_WATER_MARK)
    except OSError:
        return None
    status = _status()
    return None if status is None else (status["VmRSS"], status["RssFile"])


def _status() -> dict[str, int] | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    found = {
        name: int(rest.split()[0]) * 1024
        for name, _, rest in (line.partition(":") for line in lines)
        if name in ("VmHWM", "VmRSS", "RssFile")
    }
    return found if len(found) == 3 else None


@functools.cache
def _malloc_trim() -> object | None:
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except OSError:
        return None


def give_back_free_memory() -> None:
    """Return what the C allocator holds but does not use to the system, where it can be asked to."""
    trim = _malloc_trim()
    if callable(trim):
        trim(0)
