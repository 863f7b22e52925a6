"""Pages: bounds that hold, the choice by them, and what a decode step reads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import attend
from kernels.api import attend_packed, parse_params
from kernels.contract import AttentionResult, Call, Segment
from kernels.math.selected_row import best_blocks, gather_blocks, runs_as_row
from kernels.math.selection import TileParams
from kernels.math.summaries import BlockSummaries
from kernels.registry import load

T, L, D = 128, 32, 16
SMALL: dict[str, Any] = {"query_tile": T, "block_size": L, "budget": 2 * L}


def make(H: int, Hk: int, N: int, M: int, seed: int = 0, Dv: int = D) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(1, H, N, D), torch.randn(1, Hk, M, D), torch.randn(1, Hk, M, Dv)


def close(a: AttentionResult, b: AttentionResult, atol: float = 3e-6) -> None:
    assert a.lse is not None and b.lse is not None and a.dropped is not None and b.dropped is not None
    torch.testing.assert_close(a.out, b.out, atol=atol, rtol=1e-5)
    torch.testing.assert_close(a.lse, b.lse, atol=atol, rtol=1e-5)
    torch.testing.assert_close(a.dropped, b.dropped, atol=atol, rtol=1e-4)
    assert a.stats.pairs_kept == b.stats.pairs_kept and a.stats.pairs_exact == b.stats.pairs_exact


@pytest.mark.parametrize("remainder", ["none", "mean", "gated"])
@pytest.mark.parametrize(
    ("heads", "N", "M", "causal", "scale", "extra"),
    [
        ((4, 2), 300, 900, True, 0.2, {}),
        ((4, 2), 1, 900, True, 0.2, {}),
        ((4, 2), 1, 900, True, -0.2, {}),
        ((3, 3), 1, 897, True, 0.2, {"budget": 0}),
        ((3, 1), 1, 700, True, 0.2, {"budget": [[3 * L]]}),
        ((4, 2), 1, 900, True, 0.2, {"budget": [[L, 2 * L]]}),
        ((4, 2), 1, 900, True, 0.2, {"skip": 0.3}),
        ((4, 2), 1, 900, False, 0.2, {}),
        ((3, 3), 700, 700, False, 0.2, {"block_size": 64, "budget": 128}),
        ((6, 2), 50, 1111, False, -0.2, {}),
        ((4, 1), 257, 513, True, 0.2, {"budget": 0}),
        ((2, 2), 130, 130, True, 0.2, {}),
    ],
)
def test_torch_equals_the_loops_of_the_reference(
    heads: tuple[int, int], N: int, M: int, causal: bool, scale: float, extra: dict[str, Any], remainder: str
) -> None:
    q, k, v = make(*heads, N, M, seed=N + M)
    params = SMALL | {"remainder": remainder} | extra
    common: dict[str, Any] = {"backend": "pages", "params": params, "causal": causal, "scale": scale}
    fast, slow = (attend(q, k, v, impl=impl, **common) for impl in ("torch", "reference"))
    close(fast, slow)


def test_values_of_another_width_and_narrow_or_wide_numbers_are_served_in_decode() -> None:
    q, k, v = make(4, 2, 1, 900, Dv=5)
    for dtype, atol in ((torch.float64, 1e-6), (torch.float32, 3e-6), (torch.bfloat16, 1e-2)):
        inputs = [x.to(dtype) for x in (q, k, v)]
        params = SMALL | {"remainder": "mean"}
        common: dict[str, Any] = {"backend": "pages", "params": params, "causal": True, "scale": 0.2}
        fast, slow = (attend(*inputs, impl=impl, **common) for impl in ("torch", "reference"))
        assert fast.out.dtype == dtype
        close(fast, slow, atol)


def chosen_blocks(q: Tensor, k: Tensor, scale: float, count: int, num_candidates: int) -> list[list[int]]:
    """Quest's rule for one row and one query head per key head, in plain Python; the first page always."""
    chosen = []
    for head in range(k.shape[1]):
        bounds = []
        for b in range(num_candidates):
            page = k[0, head, b * L : (b + 1) * L].tolist()
            row = (q[0, head, 0] * scale).tolist()
            bounds.append(sum(max(x * key[d] for key in page) for d, x in enumerate(row)))
        chosen.append(sorted(range(num_candidates), key=lambda b: (b > 0, -bounds[b], b))[:count])
    return chosen


def test_one_row_keeps_the_pages_that_quests_rule_keeps() -> None:
    backend = load("pages")
    assert backend.select is not None
    for seed in range(5):
        q, k, v = make(3, 3, 1, 700, seed=seed)
        call = Call(causal=True, scale=0.3, seed=0, layer=0, start=699)
        params = parse_params("pages", SMALL | {"budget": 5 * L})
        lists = backend.select(q, k, v, params, call)
        found = [lists.indices[int(lists.indptr[h, 0]) : int(lists.indptr[h, 1])].tolist() for h in range(3)]
        assert found == [sorted(blocks) for blocks in chosen_blocks(q, k, 0.3, 5, 640 // L)]


@pytest.mark.parametrize("remainder", ["none", "mean", "gated"])
@pytest.mark.parametrize(("H", "Hk"), [(3, 3), (4, 2)])
def test_a_decode_step_reads_its_own_keys_the_chosen_pages_and_nothing_else(
    H: int, Hk: int, remainder: str
) -> None:
    """Everything else is spoilt after the summaries were taken, and the result stays the same bit for bit."""
    M = 1000
    q, k, v = make(H, Hk, 1, M)
    params = parse_params("pages", SMALL | {"remainder": remainder})
    call = Call(causal=True, scale=0.3, seed=0, layer=0, start=M - 1)
    backend = load("pages")
    assert backend.select is not None
    table = backend.select(q, k, v, params, call).table(M // T * T // L)[:, 0]
    assert table.sum(-1).tolist() == [2] * Hk
    kept = BlockSummaries()

    def step(k: Tensor, v: Tensor) -> Tensor:
        segment = Segment(slice(0, 1), k, v, M - 1, 0, kept)
        return attend_packed(q, [segment], backend="pages", params=params, causal=True, scale=0.3).out

    before = step(k, v)
    for head, block in (~table).nonzero().tolist():
        k[0, head, block * L : (block + 1) * L] = math.nan
        v[0, head, block * L : (block + 1) * L] = math.nan
    assert torch.equal(step(k, v), before)
    head, block = table.nonzero()[0].tolist()
    k[0, head, block * L] = math.nan
    assert bool(step(k, v)[0, head * (H // Hk)].isnan().any()), "a page that was chosen is read"


@pytest.mark.parametrize("N", [1, 200])
def test_a_key_that_is_not_finite_reaches_the_rows_whatever_the_budget(N: int) -> None:
    q, k, v = make(4, 2, N, 900)
    clean = attend(q, k, v, backend="pages", params=SMALL, causal=True, scale=0.3).out
    k[0, 1, 70, 3] = math.nan
    common: dict[str, Any] = {"backend": "pages", "params": SMALL, "causal": True, "scale": 0.3}
    for impl in ("torch", "reference"):
        found = attend(q, k, v, impl=impl, **common).out
        assert bool(found[0, 2:].isnan().all()) and torch.allclose(found[0, :2], clean[0, :2], atol=1e-5)


@pytest.mark.parametrize("N", [1, 300])
@pytest.mark.parametrize("place", [335, 10])
def test_a_page_with_a_broken_key_comes_before_the_first(N: int, place: int) -> None:
    q, k, v = make(4, 2, N, 900)
    k[0, :, place, 3] = math.nan
    for impl in ("torch", "reference"):
        got = attend(q, k, v, backend="pages", params={"budget": 64}, causal=True, scale=0.3, impl=impl)
        assert bool(got.out.isnan().all()), impl
        assert got.dropped is not None and not got.dropped.any()


def test_a_budget_beyond_what_there_is_keeps_everything_and_equals_exact() -> None:
    for N in (1, 300):
        q, k, v = make(4, 2, N, 900)
        exact = attend(q, k, v, backend="exact", causal=True, scale=0.3)
        found = attend(q, k, v, backend="pages", params=SMALL | {"budget": 1024}, causal=True, scale=0.3)
        torch.testing.assert_close(found.out, exact.out, atol=1e-6, rtol=1e-5)
        assert found.stats.density == 1 and found.stats.dropped_mass == 0


@pytest.mark.parametrize("remainder", ["none", "mean", "gated"])
def test_a_result_does_not_depend_on_what_is_kept_beside_the_cache(remainder: str) -> None:
    """Chunk by chunk, then step by step, with the summaries kept and with none."""
    q, k, v = make(4, 2, 420, 420)
    params = parse_params("pages", SMALL | {"remainder": remainder})
    kept = BlockSummaries(420)
    bounds = [0, 128, 384, *range(385, 421)]
    for a, b in zip(bounds, bounds[1:], strict=False):
        rows = q[:, :, a:b]
        with_kept, alone = (
            attend_packed(
                rows,
                [Segment(slice(0, b - a), k[:, :, :b], v[:, :, :b], a, 0, summaries)],
                backend="pages",
                params=params,
                causal=True,
                scale=0.3,
            )
            for summaries in (kept, None)
        )
        assert torch.equal(with_kept.out, alone.out)
        assert with_kept.dropped[0] is not None and alone.dropped[0] is not None
        assert torch.equal(with_kept.dropped[0], alone.dropped[0])


def test_rows_that_are_no_decode_step_go_through_the_tiles() -> None:
    q, k, _ = make(4, 2, 1, 900)
    causal = Call(causal=True, scale=0.3, seed=0, layer=0, start=899)
    early = Call(causal=True, scale=0.3, seed=0, layer=0, start=150)
    other = Call(causal=False, scale=0.3, seed=0, layer=0, start=0)

    def taken(q: Tensor, call: Call, **extra: Any) -> bool:
        params = parse_params("pages", SMALL | extra)
        assert isinstance(params, TileParams)
        return runs_as_row(q, k, params, call)

    assert taken(q, causal) and taken(q, causal, budget=[[L, L]])
    assert not taken(q, early, budget=4 * L), "four pages to choose from, and a budget of four"
    assert not taken(q, other) and not taken(q, causal, skip=0.1)
    assert not taken(q, causal, budget=[[L, 2 * L]])
    assert not taken(q.expand(-1, -1, 2, -1), causal)


def test_ties_go_to_the_lower_page() -> None:
    scores = torch.zeros(2, 40)
    scores[0, 7], scores[1, 30] = math.inf, math.inf
    scores[1, 31] = math.inf
    assert best_blocks(scores, 3).tolist() == [[7, 0, 1], [30, 31, 0]]
    distinct = torch.randperm(40).float().repeat(2, 1)
    assert sorted(best_blocks(distinct, 5)[1].tolist()) == sorted(distinct[0].topk(5).indices.tolist())


@pytest.mark.parametrize("Hk", [1, 3])
def test_blocks_are_gathered_from_any_layout(Hk: int) -> None:
    buffer = torch.randn(Hk, 333, D)
    blocks = torch.stack([torch.randperm(9)[:4] for _ in range(Hk)])
    expected = torch.stack(
        [torch.cat([buffer[h, b * L : (b + 1) * L] for b in blocks[h]]) for h in range(Hk)]
    )
    wide = torch.randn(Hk, 333, 2 * D)
    wide[..., :D] = buffer
    packed = buffer.transpose(0, 1).contiguous().transpose(0, 1)
    for x in (buffer, buffer[:, :300], packed, wide[..., :D]):
        assert torch.equal(gather_blocks(x, blocks, L), expected)
    assert gather_blocks(buffer, blocks[:, :0], L).shape == (Hk, 0, D)
