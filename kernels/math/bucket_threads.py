"""Key heads side by side, each on a thread that computes alone.

What a head's buckets need are many small operations: torch would share each among its threads, which would
spend their time waiting for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from kernels.parallel import _pool

T = TypeVar("T")


def side_by_side(jobs: Sequence[Callable[[], T]], device: torch.device) -> list[T]:
    """The jobs' results in order, on as many threads as torch would use. One after another where that is one
    (so too on a thread of the pool itself, which must not wait for its like) and on other devices."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads < 2 or len(jobs) < 2:
        return [job() for job in jobs]
    inference = torch.is_inference_mode_enabled()

    def alone(job: Callable[[], T]) -> T:
        with torch.inference_mode(inference), torch.no_grad():
            return job()

    pending = [_pool(threads).submit(alone, job) for job in jobs]
    return [future.result() for future in pending]
