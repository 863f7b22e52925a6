"""Where a launch goes, and which chip's tiles a device gets."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kernels._triton import available
from kernels._triton.launch import current
from kernels._triton.targets import nearest


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
