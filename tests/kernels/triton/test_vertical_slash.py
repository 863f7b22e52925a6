"""Vertical-slash attention by kernels: probes, choice and attention without a number read back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels import attend
from tests.kernels.triton.agree import DEVICE, agree, operands, poisoned

PARAMS: dict[str, Any] = {
    "num_verticals": 10,
    "num_slashes": 2,
    "query_tile": 256,
    "block_size": 32,
    "probe_rows": 16,
}


def test_a_decode_step_keeps_its_own_largest_keys() -> None:
    agree(*operands(1, 300, H=3, Hk=1, D=24, Dv=20), backend="vertical_slash", params=PARAMS)


def test_a_chunk_that_begins_and_ends_inside_blocks_equals_torch() -> None:
    agree(*operands(41, 310, D=16), backend="vertical_slash", params=PARAMS)


def test_half_precision_of_a_batch_with_numbers_for_each_head() -> None:
    params = PARAMS | {"num_verticals": [[0, 70]], "num_slashes": [[2, 0]]}
    q, k, v = operands(9, 270, B=2, Hk=2, D=16, dtype=torch.float16)
    agree(q, k, v, backend="vertical_slash", params=params, tolerance=2e-2)


def test_both_directions_have_candidates_after_the_tile() -> None:
    q, k, v = operands(262, 330, H=1, D=16)
    agree(q[:, :, 250:], k, v, backend="vertical_slash", params=PARAMS, causal=False, start=250)


def test_a_head_with_room_for_all_candidates_keeps_them_all() -> None:
    q, k, v = operands(10, 270, D=16)
    found = agree(q, k, v, backend="vertical_slash", params=PARAMS | {"num_slashes": 64})
    assert found.stats.pairs_kept == found.stats.pairs_exact


def test_a_probed_logit_that_is_not_finite_keeps_the_whole_tile() -> None:
    q, k, v = operands(9, 270, H=2, Hk=2, D=16)
    k[0, 1, 100, 2] = float("nan")
    with poisoned():
        found, told = (
            attend(q, k, v, backend="vertical_slash", params=PARAMS, causal=True, scale=0.25, impl=impl)
            for impl in ("triton", "torch")
        )
    assert found.stats.pairs_kept == told.stats.pairs_kept
    assert found.out[0, 1].isnan().all() and not found.out[0, 0].isnan().any()
    torch.testing.assert_close(found.out, told.out, equal_nan=True, atol=2e-5, rtol=2e-5)


def test_two_runs_have_the_same_bits_and_no_keys_beyond_a_tile_are_needed() -> None:
    q, k, v = operands(30, 30, D=16)
    one, other = (
        attend(q, k, v, backend="vertical_slash", params=PARAMS, causal=True, scale=0.25, impl="triton")
        for _ in range(2)
    )
    assert torch.equal(one.out, other.out) and one.stats.density == 1.0


@pytest.mark.parametrize("count", [0, 1, 7, 200])
def test_the_largest_columns_are_found_by_their_bits_and_ties_go_to_the_lower(count: int) -> None:
    from kernels._triton.vertical_slash_choice import columns_launch, empty_columns
    from kernels._triton.vertical_slash_tables import tables_of
    from kernels.math.query_tiles import QueryTiles

    room = 256
    tiles = QueryTiles(256, 32, 256, 300, True, (0, 44))
    tables = tables_of(tiles, [0], 16, ((count,), (1,)), torch.device(DEVICE))
    verticals = torch.rand(1, 1, room, generator=torch.Generator().manual_seed(count)).to(DEVICE)
    verticals = (verticals * 8).floor() / 8  # many ties, many zeros
    columns = empty_columns(verticals, count)
    with poisoned():
        whole = torch.zeros(1, 1, dtype=torch.int8, device=DEVICE)
        budget = torch.tensor([count], dtype=torch.int32, device=DEVICE)
        columns_launch(verticals, tables, whole, budget, columns).run()
    order = sorted(range(room), key=lambda j: (-float(verticals[0, 0, j]), j))[:count]
    assert columns.mask[0, 0].nonzero().flatten().tolist() == sorted(order)
    assert columns.listed[0, 0, : int(columns.count[0, 0])].tolist() == sorted(order)
