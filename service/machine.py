"""What the machine has: memory that this process may use, on the CPU (its control group included) or a
GPU."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_FALLBACK_BYTES = 4 << 30


class NoSuchDevice(ValueError):
    """torch does not see the device; the message says what to ask for."""


def resolve_device(device: str) -> str:
    """``auto`` as what this machine has; anything else as it is, once torch has been seen to have it."""
    if device == "cpu":
        return device
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda" if count else "cpu"
    if int(device.partition(":")[2] or 0) >= count:
        raise NoSuchDevice(
            f"{device!r} was asked for and torch sees {count} CUDA devices; use auto or cpu, or install a "
            "torch built for this machine's GPU and driver"
        )
    return device


def memory_bytes(device: str) -> int:
    """Bytes of memory of ``device``: the smaller of the machine's and the control group's for the CPU."""
    device = resolve_device(device)
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
