"""Tiny networks gain nothing from threads, and threads that spin slow a busy machine down."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    if request.node.get_closest_marker("demo") is None:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
