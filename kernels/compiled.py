"""How many kernels were compiled in this process, or found on disk, and how long that took."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Compiled:
    """``compiled`` kernels in ``seconds``; ``cached`` were found in Triton's cache on disk."""

    compiled: int = 0
    cached: int = 0
    seconds: float = 0.0


_lock = threading.Lock()
_count = Compiled()


def compiled() -> Compiled:
    """The count so far."""
    return _count


def listen() -> None:
    """Begin to count; called when the first kernel is imported. A listener that is there already hears on."""
    from triton import knobs

    with _lock:
        before = knobs.compilation.listener
        if getattr(before, "counts_kernels", False):
            return

        def heard(*, src: Any, metadata: Any, metadata_group: Any, times: Any, cache_hit: bool) -> None:
            _add(cache_hit, times)
            if before is not None:
                before(
                    src=src,
                    metadata=metadata,
                    metadata_group=metadata_group,
                    times=times,
                    cache_hit=cache_hit,
                )

        heard.counts_kernels = True  # type: ignore[attr-defined]
        knobs.compilation.listener = heard


def _add(cache_hit: bool, times: Any) -> None:
    global _count
    with _lock:
        if cache_hit:
            _count = Compiled(_count.compiled, _count.cached + 1, _count.seconds)
        else:
            seconds = _count.seconds + times.total / 1e6
            _count = Compiled(_count.compiled + 1, _count.cached, seconds)
