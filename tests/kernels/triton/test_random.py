"""Random and bigbird at block_size 1 by kernels that draw for themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels import attend_packed
from kernels._triton.edges_draw import Drawing, draw
from kernels.contract import Call, Segment
from kernels.math.random_keys import row_streams
from kernels.math.random_part import edge_tile
from tests.kernels.triton.agree import DEVICE, agree, operands, poisoned

NEAR = {"window": 10, "global_tokens": 3, "num_random": 20, "block_size": 1}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_the_kernel_draws_the_keys_that_impl_torch_draws(causal: bool, seed: int) -> None:
    call = Call(causal=causal, scale=1.0, seed=seed, layer=3, start=13)
    rows = torch.arange(13, 50, device=DEVICE)
    told = edge_tile(call, 2, rows, 50, 20, None)
    streams = row_streams(3, [seed], 2, rows.device)
    with poisoned():
        edges, kept = draw(Drawing(streams, 37, 20, 50, causal, itself=True, start=13))
    found = edges.view(2, 37, 21).sort(-1).values
    expected = told.edges.masked_fill(told.drop, -1).sort(-1).values
    assert torch.equal(found, expected) and int(kept.sum()) == told.kept


@pytest.mark.parametrize(
    ("backend", "params", "N", "M", "causal"),
    [
        ("random", {"num_random": 20}, 37, 50, True),
        ("random", {"num_random": 5}, 40, 40, False),
        ("random", {"num_random": 17}, 1, 40, True),
        ("bigbird", NEAR, 33, 60, True),
        ("bigbird", NEAR, 33, 33, False),
        ("bigbird", NEAR, 1, 60, True),
    ],
)
def test_triton_agrees_with_torch(backend: str, params: dict[str, Any], N: int, M: int, causal: bool) -> None:
    q, k, v = operands(N, M, B=2, H=2, Hk=1, D=24, Dv=16)
    agree(q, k, v, backend=backend, params=params, causal=causal, seed=5, layer=2)


def test_half_precision_agrees_too() -> None:
    agree(*operands(20, 20, dtype=torch.float16), backend="random", params={"num_random": 9})


def test_one_row_over_drawn_blocks_agrees() -> None:
    params = {"num_random": 64, "block_size": 32, "window": 10, "global_tokens": 3}
    agree(*operands(1, 90, H=4, Hk=2), backend="bigbird", params=params, seed=1)
    agree(*operands(1, 90, H=4, Hk=2), backend="random", params={"num_random": 64, "block_size": 32})


def test_rows_in_stretches_equal_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels._triton.edges_random.EDGES_AT_ONCE", 2 * 20 * 16)
    agree(*operands(40, 50), backend="bigbird", params=NEAR)


def test_sequences_side_by_side_in_one_launch_equal_each_alone() -> None:
    segments, first = [], 0
    for seed, (rows, keys) in enumerate([(5, 30), (3, 7), (33, 33)]):
        _, k, v = operands(rows, keys, H=4, Hk=2, seed=seed)
        segments.append(Segment(slice(first, first + rows), k, v, keys - rows, seed=seed))
        first += rows
    q = operands(first, first, H=4, Hk=2, seed=9)[0]
    with poisoned():
        found, told = (
            attend_packed(
                q, segments, backend="random", params={"num_random": 9}, causal=True, scale=0.2, impl=impl
            )
            for impl in ("triton", "torch")
        )
    torch.testing.assert_close(found.out, told.out, atol=2e-5, rtol=2e-5)
    for own, other in zip(found.stats, told.stats, strict=True):
        assert own.impl == "triton"
        assert (own.pairs_kept, own.pairs_exact, own.pairs_computed) == (
            other.pairs_kept,
            other.pairs_exact,
            other.pairs_computed,
        )
