"""What the machine has: memory that this process may use, on the CPU (its control group included) or a
GPU."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_FALLBACK_BYTES = 4 << 30


def memory_bytes(device: str) -> int:
    """Bytes of memory of ``device``: the smaller of the machine's and the control group's for the CPU."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    return min([_physical_bytes(), *_cgroup_bytes()])


def _physical_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return _FALLBACK_BYTES


def _cgroup_bytes() -> list[int]:
    found = []
    for path in _CGROUP_LIMITS:
        try:
            text = Path(path).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit() and 0 < int(text) < 1 << 60:
            found.append(int(text))
    return found
