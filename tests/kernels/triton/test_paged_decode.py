"""Decode by kernels: rows of many sequences over runs, drawn keys and chosen pages equal impl torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import attend_packed
from kernels._triton.paged_plan import KEYS_MULTIPLE, cut
from kernels.api import attend, parse_params
from kernels.contract import Call, PackedResult, Segment
from kernels.math.decode import attend_row
from kernels.math.selected_row import RowScoring, decode_selected, row_by_kernels
from kernels.math.summaries import BlockSummaries
from kernels.registry import load
from tests.kernels.triton.agree import DEVICE, TOLERANCE, agree, operands, poisoned

SMALL: dict[str, Any] = {"query_tile": 128, "block_size": 32, "budget": 64}
SCALE = 0.3


def segments_of(
    lengths: Sequence[int],
    *,
    Hk: int = 1,
    D: int = 16,
    Dv: int | None = None,
    dtype: torch.dtype = torch.float32,
    beyond: float = math.nan,
) -> list[Segment]:
    """Keys as a cache holds them: views of longer buffers, ``beyond`` in what follows the sequence."""
    found = []
    for at, num_keys in enumerate(lengths):
        _, k, v = operands(1, num_keys, H=Hk, Hk=Hk, D=D, Dv=Dv, seed=100 + at)
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, 5), value=beyond).to(dtype) for x in (k, v))
        found.append(Segment(slice(at, at + 1), k[:, :, :num_keys], v[:, :, :num_keys], num_keys - 1, 7 * at))
    return found


def queries(num_rows: int, H: int, D: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    """As networks lay them out: [1, T, H, D] in memory."""
    generator = torch.Generator().manual_seed(num_rows)
    rows = torch.randn(1, num_rows, H, D, generator=generator)
    return rows.to(DEVICE, dtype).transpose(1, 2)


def both(
    q: Tensor, segments: Sequence[Segment], backend: str, params: dict[str, Any] | None, **options: Any
) -> tuple[PackedResult, PackedResult]:
    """Impl triton, in poisoned memory, and impl torch in fp32 of the same numbers."""
    common: dict[str, Any] = {"backend": backend, "params": params, "causal": True, "scale": SCALE} | options
    with poisoned():
        found = attend_packed(q, segments, impl="triton", **common)
    wide = [replace(one, k=one.k.float(), v=one.v.float()) for one in segments]
    return found, attend_packed(q.float(), wide, impl="torch", **common)


def assert_same(found: PackedResult, told: PackedResult, dtype: torch.dtype = torch.float32) -> None:
    close = TOLERANCE[dtype]
    assert found.out.dtype == dtype
    torch.testing.assert_close(found.out.float(), told.out, atol=close, rtol=close)
    for one, other in zip(found.stats, told.stats, strict=True):
        assert one.impl == "triton"
        assert (one.pairs_kept, one.pairs_exact) == (other.pairs_kept, other.pairs_exact)
        assert one.pairs_scored == other.pairs_scored
    for mine, theirs in zip(found.dropped, told.dropped, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            torch.testing.assert_close(mine, theirs, atol=close, rtol=close)


PATTERNS: list[tuple[str, dict[str, Any] | None]] = [
    ("exact", None),
    ("sinks", {"sinks": 3, "window": 20}),
    ("strided", {"stride": 7}),
    ("random", {"num_random": 9}),
    ("random", {"num_random": 64, "block_size": 32}),
    ("bigbird", {"window": 9, "global_tokens": 5, "num_random": 7, "block_size": 1}),
    ("bigbird", {"window": 40, "global_tokens": 5, "num_random": 64, "block_size": 32}),
]


@pytest.mark.parametrize(("backend", "params"), PATTERNS, ids=str)
def test_rows_of_many_sequences_equal_impl_torch_on_each(backend: str, params: dict[str, Any] | None) -> None:
    assert_same(*both(queries(3, 4), segments_of([1, 150, 67], Hk=2), backend, params, layer=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("H", "Hk", "D", "Dv"), [(3, 3, 48, 20), (19, 1, 17, 33), (34, 1, 16, 16)])
def test_any_group_of_heads_and_any_width_is_served(
    H: int, Hk: int, D: int, Dv: int, dtype: torch.dtype
) -> None:
    segments = segments_of([40, 100], Hk=Hk, D=D, Dv=Dv, dtype=dtype)
    assert_same(*both(queries(2, H, D, dtype), segments, "exact", None), dtype)


def test_a_long_row_is_divided_among_programs_and_two_runs_give_the_same_bits() -> None:
    q, segments = queries(2, 2), segments_of([1100, 3])
    found, told = both(q, segments, "exact", None)
    assert_same(found, told)
    common: dict[str, Any] = {"backend": "exact", "causal": True, "scale": SCALE}
    assert torch.equal(found.out, attend_packed(q, segments, impl="triton", **common).out)


def test_logits_of_a_thousand_stay_finite() -> None:
    q, segments = queries(2, 2) * 1e3, segments_of([600, 40])
    found, told = both(q, segments, "exact", None)
    assert torch.isfinite(found.out).all()
    torch.testing.assert_close(found.out, told.out, atol=1e-3, rtol=1e-3)


def test_a_key_that_is_not_finite_reaches_the_rows_that_see_it_and_no_others() -> None:
    segments = segments_of([90, 90, 90])
    segments[1].k[0, 0, 3], segments[2].v[0, 0, 80, 2] = math.nan, math.nan
    found, _ = both(queries(3, 2), segments, "sinks", {"sinks": 2, "window": 20})
    assert torch.isfinite(found.out[:, :, :2]).all()
    assert found.out[0, :, 2, 2].isnan().all() and torch.isfinite(found.out[0, :, 2, 3:]).all()
    found, _ = both(queries(3, 2), segments, "sinks", {"sinks": 4, "window": 20})
    assert torch.isfinite(found.out[:, :, 0]).all() and found.out[:, :, 1].isnan().all()


def test_a_row_without_keys_gets_zeros_and_a_log_sum_exp_of_minus_infinity() -> None:
    from kernels._triton.paged_rows import attend_runs

    with poisoned():
        out, lse = attend_runs(queries(2, 2), segments_of([40, 40]), [(slice(0, 40, 3),), ()], SCALE)
    assert torch.isfinite(out).all() and (out[:, :, 1] == 0).all()
    assert torch.isfinite(lse[0]).all() and (lse[1] == -math.inf).all()


def test_one_row_of_a_batch_equals_the_torch_row() -> None:
    q, k, v = operands(1, 70, B=2, H=4, Hk=2, D=16)
    rows, runs = q.view(2, 2, 2, 1, 16), [slice(1, 60, 4), slice(60, 70)]
    with poisoned():
        found = attend_row(rows, k, v, runs, SCALE, impl="triton")
    for mine, theirs in zip(found, attend_row(rows, k, v, runs, SCALE), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("seed", range(20))
def test_pieces_cover_every_run_once_in_items_of_equal_length(seed: int) -> None:
    draw = np.random.default_rng(seed)
    num_rows, num_runs = int(draw.integers(1, 9)), int(draw.integers(0, 30))
    table = np.stack(
        [
            np.sort(draw.integers(0, num_rows, num_runs)),
            draw.integers(0, 100, num_runs),
            draw.integers(1, 9, num_runs),
            draw.integers(1, 900, num_runs),
            draw.integers(-1, 2, num_runs),
        ],
        1,
    )
    most_keys = int(draw.integers(1, 700))
    items, pieces, indptr = cut(table, num_rows, most_keys)
    assert indptr[0] == 0 and indptr[-1] == len(items) and len(indptr) == num_rows + 1
    for row in range(num_rows):
        own = items[indptr[row] : indptr[row + 1]]
        assert (own[:, 0] == row).all()
        lengths = [int(pieces[a:b, 2].sum()) for _, a, b in own]
        assert all(length <= -(-most_keys // KEYS_MULTIPLE) * KEYS_MULTIPLE for length in lengths)
        assert len(set(lengths[:-1])) <= 1
        read = [_elements(*piece) for _, a, b in own for piece in pieces[a:b]]
        asked = [_elements(*run[1:]) for run in table if run[0] == row]
        assert sum(read, []) == sum(asked, [])


def _elements(first: int, step: int, count: int, number: int) -> list[tuple[int, int]]:
    return [(int(number), int(first + i * (step if number < 0 else 1))) for i in range(count)]


@pytest.mark.parametrize("remainder", ["none", "mean", "gated"])
def test_pages_are_chosen_and_left_out_as_impl_torch_does(remainder: str) -> None:
    lengths = [430, 60, 300] if remainder == "none" else [430]
    params = SMALL | {"remainder": remainder}
    assert_same(*both(queries(len(lengths), 4), segments_of(lengths, Hk=2), "pages", params))


@pytest.mark.parametrize("extra", [{"budget": 0}, {"block_size": 64}, {"budget": [[32, 64]]}], ids=str)
def test_pages_of_any_budget_equal_impl_torch(extra: dict[str, Any]) -> None:
    q, k, v = operands(1, 400, H=4, Hk=2, D=16, Dv=24, dtype=torch.float16)
    agree(q, k, v, backend="pages", params=SMALL | extra, scale=-SCALE)


@pytest.mark.parametrize(("N", "M", "causal"), [(40, 300, True), (130, 130, True), (20, 150, False)])
def test_tiles_of_rows_choose_pages_as_impl_torch_does(N: int, M: int, causal: bool) -> None:
    q, k, v = operands(N, M, H=2, Hk=1, D=16)
    agree(q, k, v, backend="pages", params=SMALL | {"budget": 32}, causal=causal)


def test_a_page_with_a_number_that_is_not_finite_is_chosen_first() -> None:
    q, k, v = operands(1, 400, H=2, Hk=1, D=16)
    v[..., 0] = torch.arange(400.0, device=v.device) // 32
    k[0, 0, 70, 3] = math.nan
    found = attend(q, k, v, backend="pages", params=SMALL, causal=True, scale=SCALE, impl="triton")
    assert found.out.isnan().all() and found.dropped is not None and (found.dropped == 0).all()


def test_equal_scores_go_to_the_lower_page() -> None:
    q, k, v = operands(1, 400, H=2, Hk=1, D=16)
    k[:, :, :384] = k[:, :, :1]
    v[..., 0] = torch.arange(400.0, device=v.device) // 32
    params = SMALL | {"budget": 128}
    agree(q, k, v, backend="pages", params=params)


def test_what_is_kept_beside_a_cache_changes_nothing() -> None:
    fresh = segments_of([430, 300], Hk=2)
    kept = [replace(one, summaries=BlockSummaries()) for one in fresh]
    for one in kept:
        assert one.summaries is not None
        one.summaries.get(one.k[0], one.v[0], 32, 5)
    q = queries(2, 4)
    first, _ = both(q, fresh, "pages", SMALL)
    second, _ = both(q, kept, "pages", SMALL)
    torch.testing.assert_close(first.out, second.out, atol=1e-6, rtol=1e-6)


SCORED = [
    ("xattention", {"stride": 4}, RowScoring(4, first_block=True), 430),
    ("xattention", {"stride": 32}, RowScoring(32, first_block=True), 391),
    ("pooled", {}, RowScoring(1, knows_every_logit=True), 290),
    ("topk", {"remainder": "mean"}, RowScoring(1, knows_every_logit=True), 391),
]


@pytest.mark.parametrize(("backend", "extra", "scoring", "num_keys"), SCORED, ids=str)
def test_rows_scored_by_logits_choose_what_impl_torch_chooses(
    backend: str, extra: dict[str, Any], scoring: RowScoring, num_keys: int
) -> None:
    q, k, v = operands(1, num_keys, H=4, Hk=2, D=16)
    params = SMALL | extra
    call = Call(causal=True, scale=SCALE, seed=0, layer=0, start=num_keys - 1, impl="triton")
    knobs: Any = parse_params(backend, params)
    with poisoned():
        found = row_by_kernels(q, k, v, knobs, call, scoring)
    told = attend(q, k, v, backend=backend, params=params, causal=True, scale=SCALE, impl="torch")
    torch.testing.assert_close(found.out, told.out, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(found.lse, told.lse, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(found.dropped, told.dropped, atol=2e-5, rtol=2e-5)
    assert found.stats.pairs_kept == told.stats.pairs_kept
    assert found.stats.pairs_scored == told.stats.pairs_scored


@pytest.mark.parametrize("extra", [{"skip": 0.5}, {"budget": [[32, 64]]}, {"mass": 0.9}], ids=str)
def test_rows_that_have_no_common_budget_are_left_to_calls_of_their_own(extra: dict[str, Any]) -> None:
    params: Any = parse_params("xattention", {"query_tile": 128, "block_size": 32} | extra)
    call = Call(causal=True, scale=SCALE, seed=0, layer=0, start=0, impl="triton")
    scoring = RowScoring(params.stride, first_block=True)
    assert decode_selected(queries(1, 2), segments_of([200], Hk=2), params, call, scoring) is None


def test_impl_torch_decodes_pages_by_calls_of_their_own() -> None:
    decode = load("pages").decode
    assert decode is not None
    call = Call(causal=True, scale=SCALE, seed=0, layer=0, start=0)
    assert decode(queries(1, 2), segments_of([200]), parse_params("pages", SMALL), call) is None
