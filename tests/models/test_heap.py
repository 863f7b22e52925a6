"""The border between what the C library's heap holds and what comes from the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

from models import heap
from models.memory import HEAP_FACTOR, SYSTEM_FACTOR, estimate_bytes
from models.network import build_network
from tests.models.tiny import bert, choice, network

TAKE = """
import json, sys
import torch
from kernels.peak import PeakBytes
from models import heap
assert heap.fix_border(1 << 20) and heap.largest_heap_block() == 1 << 20

def blocks():
    freed = [torch.ones(1 << 19) for _ in range(20)]  # 2 MiB each, every other one of them kept
    return freed[::2]

blocks()
before = PeakBytes(torch.device("cpu"))
kept = blocks()
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
with_all = resident()
del kept
print(json.dumps(with_all - resident()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's setting")
def test_large_blocks_go_back_to_the_system_when_they_are_freed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", TAKE], capture_output=True, text=True, timeout=120, check=True
    )
    assert int(done.stdout) > 0.9 * 10 * (2 << 20), "freed blocks stayed in the heap"


def test_where_there_is_no_such_setting_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap.sys, "platform", "darwin")
    before = heap.largest_heap_block()
    assert not heap.fix_border(1 << 20)
    assert heap.largest_heap_block() == before


def test_an_estimate_adds_for_holes_only_what_the_heap_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = build_network(network(bert), 64).sizes

    def estimate(border: int) -> int:
        monkeypatch.setattr(heap, "_border", border)
        return estimate_bytes(sizes, 4000, 0, choice(), 4000)

    from_heap, from_system = estimate(1 << 40), estimate(0)
    assert from_system < from_heap < from_system * HEAP_FACTOR / SYSTEM_FACTOR
