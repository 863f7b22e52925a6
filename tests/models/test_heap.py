"""The border between what the C library's heap holds and what comes from the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

from models import heap
from models.contract import Slice
from models.memory import HEAP_FACTOR, SYSTEM_FACTOR, estimate_bytes
from models.network import build_network
from tests.models.tiny import bert, choice, network, serve

TAKE = """
import json, sys
import torch
from kernels.peak import PeakBytes
from models import heap
heap.set_border(1 << 20)

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


def test_long_documents_alone_run_under_the_low_border(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_mallopt", lambda: print)
    assert heap.border_for(heap.LONG_DOCUMENT_BYTES) == heap.LOW_BORDER
    assert heap.border_for(heap.LONG_DOCUMENT_BYTES - 1) == heap.HIGH_BORDER


def test_where_there_is_no_such_setting_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_mallopt", lambda: None)
    before = heap._border
    heap.set_border(1 << 20)
    assert heap._border == before
    assert heap.border_for(1 << 40) == heap.HIGH_BORDER


def test_a_forward_sets_its_border_whenever_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = serve(network(bert))
    seen: list[int] = []
    monkeypatch.setattr("models.runner.set_border", seen.append)
    monkeypatch.setattr("models.runner.border_for", lambda hidden_bytes: hidden_bytes)
    ids = list(range(5, 25))
    forward = model.begin([Slice(model.open(20), ids, choice(), "hidden", 20)])
    while forward.advance(lambda: True) is None:
        model.step([Slice(model.open(4), ids[:4], choice(), "hidden", 4)])
    width = model.info.embedding_dim * 4
    assert seen[::2] == [20 * width] * len(seen[::2]) and len(seen) > 4
    assert seen[1::2] == [4 * width] * len(seen[1::2])


def test_an_estimate_adds_for_holes_only_what_the_heap_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = build_network(network(bert), 64).sizes

    def estimate(border: int) -> int:
        monkeypatch.setattr("models.memory.border_for", lambda hidden_bytes: border)
        return estimate_bytes(sizes, 4000, 0, choice(), 4000)

    from_heap, from_system = estimate(1 << 40), estimate(0)
    assert from_system < from_heap < from_system * HEAP_FACTOR / SYSTEM_FACTOR
