"""Rows of many sequences decoded at once equal each decoded alone, for every backend that has ``decode``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import attend, attend_packed
from kernels.contract import Backend, PackedResult, Segment, Stats
from kernels.math import random_rows
from kernels.registry import BACKENDS, load
from tests.kernels.kernel_cases import CASES, Case

DECODED = [name for name in BACKENDS if load(name).decode is not None]
CASES_DECODED = [case for case in CASES if case[0] in DECODED]
LENGTHS = [1, 2, 63, 64, 65, 127, 128, 129, 500]
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2}

every_case = pytest.mark.parametrize("case", CASES_DECODED, ids=str)


def _segment(rows: slice, num_keys: int, heads: int, dim: int, seed: int, **how: Any) -> Segment:
    """Keys as a cache holds them: a view of a longer buffer, NaN beyond the sequence."""
    generator = torch.Generator().manual_seed(1000 + seed)
    dtype, value_dim = how.get("dtype", torch.float32), how.get("value_dim", dim)
    keys = torch.full((heads, num_keys + 70, dim), torch.nan, dtype=dtype)
    values = torch.full((heads, num_keys + 70, value_dim), torch.nan, dtype=dtype)
    keys[:, :num_keys] = torch.randn(heads, num_keys, dim, generator=generator).to(dtype)
    values[:, :num_keys] = torch.randn(heads, num_keys, value_dim, generator=generator).to(dtype)
    start = num_keys - (rows.stop - rows.start)
    return Segment(rows, keys[None, :, :num_keys], values[None, :, :num_keys], start, seed)


def _queries(num_rows: int, heads: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """As networks lay them out: [1, T, H, D] in memory."""
    generator = torch.Generator().manual_seed(num_rows)
    return torch.randn(1, num_rows, heads, dim, generator=generator).to(dtype).transpose(1, 2)


def _decode_step(lengths: Sequence[int], **how: Any) -> tuple[Tensor, list[Segment]]:
    heads, group, dim = how.pop("heads", 2), how.pop("group", 3), how.pop("dim", 16)
    q = _queries(len(lengths), heads * group, dim, how.get("dtype", torch.float32))
    segments = [
        _segment(slice(at, at + 1), num_keys, heads, dim, seed=7 * at, **how)
        for at, num_keys in enumerate(lengths)
    ]
    return q, segments


def _assert_each_as_alone(case: Case, q: Tensor, segments: Sequence[Segment], layer: int = 1) -> None:
    options: dict[str, Any] = {"backend": case[0], "params": case[1], "causal": True, "scale": 0.3}
    packed = attend_packed(q, segments, layer=layer, **options)
    tolerance = TOLERANCE[q.dtype]
    for number, segment in enumerate(segments):
        alone = attend(
            q[:, :, segment.rows],
            segment.k,
            segment.v,
            seed=segment.seed,
            start=segment.start,
            layer=layer,
            **options,
        )
        got = packed.out[:, :, segment.rows]
        assert got.dtype == q.dtype
        torch.testing.assert_close(got, alone.out, atol=tolerance, rtol=tolerance)
        assert _counts(packed.stats[number]) == _counts(alone.stats)
        _assert_same_dropped(packed, number, alone.dropped)


def _counts(stats: Stats) -> Stats:
    return replace(stats, selection_ms=0.0, compute_ms=0.0)


def _assert_same_dropped(packed: PackedResult, number: int, alone: Tensor | None) -> None:
    got = packed.dropped[number]
    assert (got is None) == (alone is None)
    if got is not None:
        torch.testing.assert_close(got, alone, atol=0, rtol=0)


def test_fixed_patterns_and_random_keys_are_decoded_together() -> None:
    assert set(DECODED) >= {"exact", "window", "sinks", "strided", "fixed", "star", "random", "bigbird"}


@every_case
@pytest.mark.parametrize("layer", [0, 1])
def test_rows_of_many_sequences_equal_each_alone(case: Case, layer: int) -> None:
    _assert_each_as_alone(case, *_decode_step(LENGTHS), layer=layer)


@every_case
@pytest.mark.parametrize("group", [1, 9])
@pytest.mark.parametrize("heads", [1, 3])
def test_heads_that_share_keys_read_their_own(case: Case, heads: int, group: int) -> None:
    _assert_each_as_alone(case, *_decode_step([1, 70, 200], heads=heads, group=group))


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_wider_and_narrower_numbers_are_accumulated_as_alone(case: Case, dtype: torch.dtype) -> None:
    _assert_each_as_alone(case, *_decode_step([2, 129, 300], dtype=dtype))


@every_case
def test_values_may_be_of_another_width_than_keys(case: Case) -> None:
    _assert_each_as_alone(case, *_decode_step([1, 129, 300], value_dim=24))


@every_case
def test_chunks_and_rows_of_one_call_keep_to_their_own_places(case: Case) -> None:
    shapes = [(1, 90), (40, 100), (1, 1), (1, 260), (3, 3), (1, 17)]
    q = _queries(sum(rows for rows, _ in shapes), 6, 16)
    segments, at = [], 0
    for number, (rows, num_keys) in enumerate(shapes):
        segments.append(_segment(slice(at, at + rows), num_keys, 2, 16, seed=number))
        at += rows
    _assert_each_as_alone(case, q, segments)
    _assert_each_as_alone(case, q, segments[::-1])


@every_case
def test_segments_may_come_in_any_order(case: Case) -> None:
    q, segments = _decode_step([30, 200, 64, 7])
    _assert_each_as_alone(case, q, [segments[i] for i in (2, 0, 3, 1)])


@every_case
def test_keys_beyond_the_row_are_not_read(case: Case) -> None:
    """A row may stand before the end of the keys it is given."""
    q, segments = _decode_step([90, 300])
    longer = [_segment(one.rows, one.k.shape[2] + 20, 2, 16, seed=5) for one in segments]
    before = [replace(one, start=one.start - 20) for one in longer]
    for one, segment in zip(longer, before, strict=True):
        one.k[:, :, segment.start + 1 :] = torch.nan
        one.v[:, :, segment.start + 1 :] = torch.nan
    _assert_each_as_alone(case, q, before)


def _heads_alternate(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _dims_apart(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def _odd_rows(x: Tensor) -> Tensor:
    return torch.cat([x, x[..., :3]], -1)[..., : x.shape[-1]]


@every_case
@pytest.mark.parametrize("layout", [_heads_alternate, _dims_apart, _odd_rows])
def test_keys_of_any_memory_layout_are_read_right(case: Case, layout: Callable[[Tensor], Tensor]) -> None:
    q, segments = _decode_step([1, 2, 150])
    moved = [replace(one, k=layout(one.k), v=layout(one.v)) for one in segments]
    _assert_each_as_alone(case, q, moved)


@every_case
def test_sequences_of_unlike_head_counts_are_served_too(case: Case) -> None:
    q = _queries(2, 6, 16)
    segments = [_segment(slice(0, 1), 40, 2, 16, seed=1), _segment(slice(1, 2), 50, 3, 16, seed=2)]
    _assert_each_as_alone(case, q, segments)


@pytest.mark.parametrize("case", [c for c in CASES_DECODED if c[0] in ("random", "bigbird")], ids=str)
def test_keys_gathered_in_several_turns_are_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_rows, "GATHERED_BYTES", 3 * 64 * 16 * 4)
    _assert_each_as_alone(case, *_decode_step(LENGTHS))


@every_case
def test_the_reference_is_run_row_by_row(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> PackedResult:
        raise AssertionError("decode was called")

    _replace_decode(monkeypatch, case[0], refuse)
    q, segments = _decode_step([20, 30])
    attend_packed(q, segments, backend=case[0], params=case[1], causal=True, scale=0.3, impl="reference")
    with pytest.raises(AssertionError, match="decode was called"):
        attend_packed(q, segments, backend=case[0], params=case[1], causal=True, scale=0.3)


@every_case
def test_params_that_need_a_call_for_each_get_it(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    _replace_decode(monkeypatch, case[0], lambda *_, **__: None)
    _assert_each_as_alone(case, *_decode_step([20, 1, 130]))


def _replace_decode(monkeypatch: pytest.MonkeyPatch, name: str, decode: Callable[..., Any]) -> None:
    changed: Backend = replace(load(name), decode=decode)
    monkeypatch.setattr("kernels.api.load", lambda _: changed)


def test_a_bidirectional_input_of_one_token_is_no_decode_step() -> None:
    q, segments = _decode_step([1, 1])
    packed = attend_packed(q, segments, backend="window", causal=False, scale=0.3)
    torch.testing.assert_close(packed.out[:, :3, 0], segments[0].v[:, :1, 0].expand(-1, 3, -1))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"start": 40}, "segment 1: start must lie in 0 .. M - N = 39"),
        ({"start": -1}, "segment 1: start must lie in"),
        ({"seed": -1}, "segment 1: seed must lie in"),
        ({"rows": slice(1, 3), "start": 0}, "segment 2 has rows 2..3, expected them to begin at 3"),
        ({"v": torch.zeros(1, 2, 39, 16)}, "segment 1: k and v must agree"),
        ({"v": torch.zeros(1, 2, 40, 15)}, "segment 1 has value dim 15, the first has 16"),
        ({"k": torch.zeros(1, 2, 40, 15)}, "segment 1: q and k must have the same head_dim"),
        ({"k": torch.zeros(2, 2, 40, 16), "v": torch.zeros(2, 2, 40, 16)}, "segment 1: k and v must agree"),
        ({"k": torch.zeros(1, 4, 40, 16), "v": torch.zeros(1, 4, 40, 16)}, "multiple of the key heads"),
        ({"k": torch.zeros(2, 40, 16)}, "segment 1: k must have 4 dimensions"),
        ({"k": torch.zeros(1, 2, 40, 16, dtype=torch.float64)}, "segment 1: q, k, v must share one floating"),
    ],
)
def test_what_does_not_fit_is_refused_by_segment(change: dict[str, Any], told: str) -> None:
    q, segments = _decode_step([30, 40, 50])
    segments[1] = replace(segments[1], **change)
    with pytest.raises(ValueError, match=told):
        attend_packed(q, segments, backend="exact", causal=True, scale=0.3)
