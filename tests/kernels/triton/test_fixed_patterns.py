"""Fixed patterns by the block-sparse kernel: as by torch, alone and packed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from kernels import attend, attend_packed
from kernels._triton.launch import Launch
from kernels._triton.spans import Place, plan_spans
from kernels.contract import Segment
from kernels.math.window import window_pattern
from tests.kernels.triton.agree import agree, operands, poisoned

PATTERNS: list[tuple[str, dict[str, Any]]] = [
    ("exact", {}),
    ("window", {"window": 20}),
    ("window", {"window": 3, "global_tokens": 5}),
    ("sinks", {"window": 33, "sinks": 2}),
    ("star", {"window": 3}),
    ("fixed", {"stride": 7}),
    ("fixed", {"stride": 40, "combine": "sequential"}),
    ("fixed", {"stride": 6, "combine": "multihead"}),
    ("strided", {"stride": 6}),
    ("strided", {"stride": 2}),
    ("strided", {"stride": 9, "combine": "multihead"}),
    ("random", {"num_random": 64, "block_size": 32}),
]


def _named(pattern: object) -> str:
    return str(pattern).replace("'", "")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("backend", "params"), PATTERNS, ids=_named)
def test_a_pattern_gives_what_torch_gives(backend: str, params: dict[str, Any], causal: bool) -> None:
    q, k, v = operands(71, 71, H=2, Hk=1, D=16)
    agree(q, k, v, backend=backend, params=params, causal=causal)


@pytest.mark.parametrize(("backend", "params"), PATTERNS, ids=_named)
def test_a_chunk_of_few_rows_sees_the_keys_before_it(backend: str, params: dict[str, Any]) -> None:
    """Three query heads beside each other, values wider than keys, layer 1 of those that alternate."""
    q, k, v = operands(5, 77, H=3, Hk=1, D=16, Dv=24, dtype=torch.float16)
    agree(q, k, v, backend=backend, params=params, layer=1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("backend", "params"),
    [p for p in PATTERNS if p[1].get("combine") != "multihead" and p[0] != "random"],
    ids=_named,
)
def test_packed_sequences_go_as_they_would_alone(backend: str, params: dict[str, Any], causal: bool) -> None:
    """Rows 4 .. 12 of 13 keys, and all of 37."""
    sizes = [(9 if causal else 13, 13), (37, 37)]
    own = [operands(N, M, D=16, seed=M) for N, M in sizes]
    q = torch.cat([one[0] for one in own], 2)
    segments, row = [], 0
    for (N, M), (_, k, v) in zip(sizes, own, strict=True):
        segments.append(Segment(slice(row, row + N), k, v, M - N))
        row += N
    asked: dict[str, Any] = {
        "backend": backend,
        "params": params,
        "causal": causal,
        "scale": 0.25,
        "layer": 1,
    }
    with poisoned():
        found = attend_packed(q, segments, impl="triton", **asked)
    for segment, (own_q, k, v), stats in zip(segments, own, found.stats, strict=True):
        told = attend(own_q, k, v, impl="torch", **asked)
        torch.testing.assert_close(found.out[:, :, segment.rows], told.out, atol=2e-5, rtol=2e-5)
        assert (stats.impl, stats.pairs_kept) == ("triton", told.stats.pairs_kept)
        assert stats.pairs_exact == told.stats.pairs_exact
        assert stats.dropped_mass == told.stats.dropped_mass


def test_two_runs_give_the_same_bits() -> None:
    q, k, v = operands(40, 40, D=16)
    asked: dict[str, Any] = {"backend": "strided", "params": {"stride": 5}, "causal": True, "scale": 0.3}
    one, other = (attend(q, k, v, impl="triton", **asked) for _ in range(2))
    assert torch.equal(one.out, other.out)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_key_behind_a_row_cannot_spoil_it() -> None:
    q, k, v = operands(40, 40, D=16)
    told = attend(q, k, v, backend="exact", causal=True, scale=0.3, impl="torch")
    k[..., 30, :], v[..., 30, :] = math.nan, math.inf
    found = attend(q, k, v, backend="exact", causal=True, scale=0.3, impl="triton")
    torch.testing.assert_close(found.out[:, :, :30], told.out[:, :, :30], atol=2e-5, rtol=2e-5)
    assert found.out[:, :, 30:].isnan().all()


def test_a_sliding_window_needs_a_handful_of_masks() -> None:
    pattern = window_pattern(100, 4, 0, True)
    plan = plan_spans(pattern, Place(0, 6400, 6400), 64)
    assert len(plan.masks) < 20 < len(plan.masked)
    assert plan.kept == sum(min(i + 1, 100) + min(max(i - 99, 0), 4) for i in range(6400))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("backend", "params"), PATTERNS[:6], ids=_named)
def test_no_length_compiles_a_variant_of_its_own(
    backend: str, params: dict[str, Any], causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer rows than a tile, a whole number of blocks, and more of both."""
    seen = []
    monkeypatch.setattr(Launch, "run", lambda self: seen.append((self.constants, self.signature())))
    for num_rows in (3, 64, 131, 192):
        q, k, v = operands(num_rows, num_rows, H=2, Hk=1, D=16)
        attend(q, k, v, backend=backend, params=params, causal=causal, scale=0.2, impl="triton")
    assert len(seen) % 4 == 0
    launches = len(seen) // 4
    for number in range(launches):
        assert all(one == seen[number] for one in seen[number::launches])


def test_a_plan_names_each_kept_pair_once() -> None:
    """Entries and ranges of a plan, written into a table of counts, are the window."""
    plan = plan_spans(window_pattern(40, 3, 0, True), Place(7, 100, 107), 16)
    count = np.zeros((100, 107 + plan.block), int)
    full_at, masked_at = (np.concatenate([[0], n.cumsum()]) for n in (plan.num_full, plan.num_masked))
    for tile, (row, num) in enumerate(zip(plan.first, plan.num, strict=True)):
        count[row : row + num, slice(*plan.ranges[tile])] += 1
        for first, step in plan.full[full_at[tile] : full_at[tile + 1]]:
            count[row : row + num, first + step * np.arange(plan.block)] += 1
        for first, step, mask in plan.masked[masked_at[tile] : masked_at[tile + 1]]:
            words = plan.masks[mask, :num].view(np.uint32)
            bits = (words[..., None] >> np.arange(32, dtype=np.uint32)) & 1
            count[row : row + num, first + step * np.arange(plan.block)] += bits.reshape(num, -1).astype(int)
    i, j = np.arange(7, 107)[:, None], np.arange(107 + plan.block)
    assert (count == ((j <= i) & ((j > i - 40) | (j < 3)))).all()
    assert count.sum() == plan.kept
