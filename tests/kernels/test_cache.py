"""What may be asked for only once is kept from its second use on; draws are shared by every length."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.api import attend
from kernels.math import cache, random_part
from tests.kernels.kernel_cases import make_inputs


def test_an_entry_from_its_second_use_is_built_twice_and_then_kept() -> None:
    kept, built = cache.BoundedCache(10_000), []

    def build() -> np.ndarray:
        built.append(1)
        return np.zeros(10)

    for number, held in ((1, 0), (2, 1), (2, 1), (2, 1)):
        kept.get("a", build, from_second_use=True)
        assert (len(built), len(kept)) == (number, held)


def test_what_comes_once_leaves_nothing_and_pushes_nothing_out() -> None:
    kept = cache.BoundedCache(5_000)
    first = kept.get("kept", lambda: np.zeros(100))
    held = kept.held_bytes
    for key in range(5_000):
        kept.get(key, lambda: np.zeros(100), from_second_use=True)
    assert len(kept) == 1 and kept.held_bytes == held
    assert kept.get("kept", lambda: np.ones(100)) is first
    assert len(kept._missed) == cache._MISSES_REMEMBERED


def test_an_emptied_cache_has_forgotten_what_it_missed() -> None:
    kept = cache.BoundedCache(5_000)
    kept.get("a", lambda: np.zeros(1), from_second_use=True)
    kept.clear()
    kept.get("a", lambda: np.zeros(1), from_second_use=True)
    assert len(kept) == 0


@pytest.mark.parametrize("backend", ["random", "bigbird"])
def test_causal_rows_draw_the_same_from_tiles_of_any_length_and_place(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cold, warm, one call or chunks, tiles of one row or of all: the same rows."""
    q, k, v = make_inputs(3, (4, 2), 300, 300, 16)

    def read(begin: int, stop: int) -> torch.Tensor:
        found = attend(
            q[:, :, begin:stop],
            k[:, :, :stop],
            v[:, :, :stop],
            backend=backend,
            params={"num_random": 40, "block_size": 1},
            causal=True,
            scale=0.3,
            seed=5,
        )
        return found.out

    cache.DRAWS.clear()
    cold = read(0, 300)
    for tile_rows in (1, 50, 64, 1000):
        monkeypatch.setattr(random_part, "TILE_ROWS", tile_rows)
        chunks = torch.cat([read(a, b) for a, b in ((0, 130), (130, 132), (132, 300))], 2)
        assert torch.allclose(chunks, cold, atol=1e-5)
        assert torch.allclose(read(0, 300), cold, atol=1e-5)


def test_lengths_of_causal_calls_share_their_tiles() -> None:
    cache.DRAWS.clear()
    for length in range(140, 180):
        q, k, v = make_inputs(length, (4, 2), length, length, 16)
        params = {"num_random": 8, "block_size": 1}
        attend(q, k, v, backend="random", params=params, causal=True, scale=0.3)
    assert len(cache.DRAWS) == -(-179 // random_part.TILE_ROWS)
