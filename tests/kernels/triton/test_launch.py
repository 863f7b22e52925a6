"""Where a launch goes, and which chip's tiles a device gets."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernels import warm
from kernels._triton import available
from kernels._triton.launch import current
from kernels._triton.targets import nearest
from kernels.contract import PackedResult, Segment
from kernels.registry import BACKENDS
from tests.kernels.kernel_cases import learned_for


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: ("made current", device.index))
    assert current(torch.device("cuda:1")) == ("made current", 1)
    for device in ("cuda:0", "cpu", "meta"):
        with current(torch.device(device)) as nothing:
            assert nothing is None


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((8, 0), "sm_80"),
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((12, 0), "sm_80"),
        ((12, 1), "sm_80"),
    ],
)
def test_a_chip_gets_tiles_of_one_that_it_can_stand_in_for(capability: tuple[int, int], name: str) -> None:
    assert nearest(*capability).name == name


def test_a_chip_with_little_shared_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As consumer cards have: the tiles would not launch there, so torch computes."""
    chip = SimpleNamespace(shared_memory_per_block_optin=101376)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: chip)
    available._why_not_chip.cache_clear()
    try:
        [reason] = available.why_not_there(torch.device("cuda:0"), torch.float16, 64)
        assert "shared memory" in reason and "101,376" in reason
        chip.shared_memory_per_block_optin = 166912
        available._why_not_chip.cache_clear()
        assert available.why_not_there(torch.device("cuda:0"), torch.float16, 64) == []
    finally:
        available._why_not_chip.cache_clear()


def test_warming_up_runs_every_backend_in_every_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU by torch: that no backend is lost on the way, and that nothing would be compiled here."""
    ran: list[tuple[str, int, int]] = []
    attend = warm.attend_packed

    def noted(q: torch.Tensor, segments: Sequence[Segment], **given: Any) -> PackedResult:
        ran.append((given["backend"], q.shape[2], len(segments)))
        return attend(q, segments, **given)

    monkeypatch.setattr(warm, "attend_packed", noted)
    monkeypatch.setattr(warm, "ROWS", 70)
    monkeypatch.setattr(warm, "CHUNK_ROWS", 20)
    for causal in (True, False):
        shape = warm.HeadShape(4, 2, 16, 16, causal, torch.float32, torch.device("cpu"))
        assert warm.compiles(list(BACKENDS), shape) == []
        for name in BACKENDS:
            warm.warm(name, shape, learned=learned_for(name, torch.empty(1, 4, 1, 16)))
    assert {name for name, _, _ in ran} == set(BACKENDS)
    assert {(rows, num) for name, rows, num in ran if name == "window"} == {
        (70, 1),
        (60, 3),
        (20, 1),
        (1, 1),
        (3, 3),
    }
