"""How span patterns are cut into tiles: what batching, joined heads and copied keys may not change."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels import attend
from kernels.contract import Call
from kernels.math.accumulate import accumulator
from kernels.math.cache import PLANS
from kernels.math.dense import computed_elements
from kernels.math.spans import SpanPlan, plan_for
from kernels.math.window import tile_height, window_pattern
from tests.kernels.kernel_cases import both_directions, make_inputs, scale_of

GROUPS = [(1, 1), (4, 4), (2, 1), (6, 2), (4, 1), (8, 1), (14, 2)]


def plan_of(heads: tuple[int, int], N: int, window: int, columns: int, causal: bool) -> SpanPlan:
    q, k, v = make_inputs(1, heads, N, N, 8)
    call = Call(causal=causal, scale=1.0, seed=0, layer=0, start=0)
    full_rows = 0 if causal else columns
    return plan_for(accumulator(q, k, v, call), window_pattern(window, columns, full_rows, causal))


@pytest.mark.parametrize("heads", GROUPS, ids=str)
@both_directions
def test_every_number_of_shared_heads_gives_masked_softmax_at_every_width(
    heads: tuple[int, int], causal: bool
) -> None:
    for seed, (N, M, start, width, columns) in enumerate(
        [
            (700, 700, 0, 90, 3),
            (333, 900, 567, 300, 40),
            (900, 2500, 1500, 800, 0),
            (1200, 1700, 500, 1600, 7),
        ]
    ):
        q, k, v = make_inputs(1, heads, N, M, 16, seed=seed)
        common: dict[str, Any] = {
            "backend": "window",
            "params": {"window": width, "global_tokens": columns},
            "causal": causal,
            "scale": scale_of(q),
            "start": start,
        }
        fast, slow = attend(q, k, v, **common), attend(q, k, v, impl="reference", **common)
        torch.testing.assert_close(fast.out, slow.out, atol=1e-5, rtol=0)
        assert fast.lse is not None and slow.lse is not None
        torch.testing.assert_close(fast.lse, slow.lse, atol=1e-5, rtol=0)
        assert fast.stats.pairs_kept == slow.stats.pairs_kept <= fast.stats.pairs_computed


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@both_directions
def test_keys_whose_heads_alternate_give_the_bits_of_keys_that_lie_apart(
    heads: tuple[int, int], dtype: torch.dtype, causal: bool
) -> None:
    q, k, v = make_inputs(2, heads, 600, 700, 32, dtype=dtype)
    common: dict[str, Any] = {
        "backend": "sinks",
        "params": {"window": 100, "sinks": 9},
        "causal": causal,
        "scale": scale_of(q),
    }
    apart = attend(q, k, v, **common)
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    alternating = attend(q, k, v, **common)
    torch.testing.assert_close(alternating.out, apart.out, atol=1e-6, rtol=1e-6)
    assert alternating.stats.pairs_computed == apart.stats.pairs_computed


@both_directions
@pytest.mark.parametrize("where", ["k", "v"])
def test_a_poisoned_key_stays_with_its_rows_where_heads_are_joined_and_spans_are_wide(
    where: str, causal: bool
) -> None:
    width = 1600 if causal else 800
    q, k, v = make_inputs(1, (4, 1), 2400, 2400, 8)
    bad = 1100
    {"k": k, "v": v}[where][:, :, bad] = float("nan")
    params = {"window": width}
    got = attend(q, k, v, backend="window", params=params, causal=causal, scale=scale_of(q))
    spoiled = ~torch.isfinite(got.out[0]).all(-1)
    rows = torch.arange(2400)
    keeps = (rows >= bad) & (rows < bad + width) if causal else (rows - bad).abs() <= width
    assert torch.equal(spoiled, keeps.expand(4, -1))


@both_directions
@pytest.mark.parametrize("heads", GROUPS, ids=str)
def test_a_plan_has_every_row_once_per_part_and_few_tiles(heads: tuple[int, int], causal: bool) -> None:
    for window, columns in ((100, 0), (300, 20), (2000, 5)):
        plan = plan_of(heads, 5000, window, columns, causal)
        for part in plan.parts:
            rows = [row for tile in part.tiles for row in range(tile.rows.start, tile.rows.stop)]
            assert rows == list(range(5000))
            assert len(part.tiles) <= 60


@both_directions
def test_a_narrow_window_computes_little_beyond_what_it_keeps(causal: bool) -> None:
    q, k, v = make_inputs(1, (2, 2), 8192, 8192, 4)
    params = {"window": 512 if causal else 256}
    stats = attend(q, k, v, backend="window", params=params, causal=causal, scale=1.0).stats
    assert stats.pairs_kept < stats.pairs_computed < 1.15 * stats.pairs_kept


def test_joined_heads_reach_the_rows_that_the_kernel_takes_together() -> None:
    for group in range(4, 33):
        assert 192 <= tile_height(100, group) * group < 192 + 16 * group or tile_height(100, group) == 32
    for width in (1, 512, 1535, 1536, 3071, 3072, 65536):
        assert all(tile_height(width, group) >= 32 for group in range(1, 65))


def test_triangles_are_counted_in_the_chunks_of_512_keys_that_torch_computes() -> None:
    assert computed_elements(100, 100, causal=True) == 100 * 100
    assert computed_elements(512, 512, causal=True) == 512 * 512
    assert computed_elements(1024, 1024, causal=True) == 512 * 512 + 512 * 1024
    assert computed_elements(700, 900, causal=False) == 700 * 900


@both_directions
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_exact_says_that_it_left_no_mass_out(impl: Any, causal: bool) -> None:
    for N in (1, 70):
        q, k, v = make_inputs(2, (6, 2), N, 90, 8)
        got = attend(q, k, v, backend="exact", causal=causal, scale=1.0, impl=impl)
        assert got.dropped is not None and got.dropped.shape == (2, 6, N)
        assert got.dropped.dtype == torch.float32 and not got.dropped.any()
        assert got.stats.dropped_mass == 0.0


def test_a_plan_answers_for_the_masks_that_it_keeps_alive() -> None:
    PLANS.clear()
    q, k, v = make_inputs(1, (2, 2), 1200, 1200, 16)
    for window in range(300, 420, 8):
        attend(q, k, v, backend="window", params={"window": window}, causal=False, scale=0.2)
    plans = [value for value, _ in PLANS._entries.values()]
    masks = {
        id(panel.mask): panel.mask.nbytes
        for plan in plans
        for part in plan.parts
        for tile in part.tiles
        for panel in tile.panels
        if panel.mask is not None
    }
    assert 0 < sum(masks.values()) <= PLANS.held_bytes <= PLANS.max_bytes
