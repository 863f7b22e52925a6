from __future__ import annotations

from collections.abc import Iterator

import pytest

from kernels.math import cache


@pytest.fixture(autouse=True)
def fresh_plans() -> Iterator[None]:
    """No test leans on plans that another test made."""
    for kept in (cache.PLANS, cache.MASKS, cache.DRAWS):
        kept.clear()
    yield
