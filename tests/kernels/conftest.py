from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kernels.math import cache


@pytest.fixture(autouse=True)
def fresh_plans() -> Iterator[None]:
    """No test leans on plans that another test made."""
    for kept in (cache.PLANS, cache.MASKS, cache.DRAWS):
        kept.clear()
    yield


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors: threads would mostly wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
