"""Tiny networks gain nothing from threads, and threads that spin slow a busy machine down."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def usual_threads() -> Iterator[int]:
    """The number outside these tests. What fixtures of whole modules measure has one thread too."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    yield usual
    torch.set_num_threads(usual)


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest, usual_threads: int) -> Iterator[None]:
    """Demo models have all of them."""
    torch.set_num_threads(1 if request.node.get_closest_marker("demo") is None else usual_threads)
    yield
    torch.set_num_threads(1)
