"""What every backend promises, over the whole registry."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from kernels import Unsupported, backend_names
from kernels.contract import AttentionResult, Segment, Selection
from kernels.math.kept import KeptStates
from kernels.registry import load
from tests.kernels.kernel_cases import (
    CASES,
    Case,
    answer,
    attend,
    attend_packed,
    both_directions,
    case_id,
    every_case,
    every_causal_case,
    every_chunked_case,
    every_decoding_case,
    every_served_case,
    keeps_pairs,
    make_inputs,
    query_tile,
    scale_of,
    serves,
)
from tests.kernels.kernel_oracle import softmax_attention
from tests.kernels.oracles import Expected

HEADS = [(4, 4), (6, 2), (3, 1)]
PLACES = [
    (1, 1, 0),
    (2, 2, 0),
    (63, 63, 0),
    (1, 300, 299),
    (500, 500, 0),
    (130, 333, 133),
    (63, 700, 637),
    (2, 129, 127),
]
"""(N, M, start): prefill, decode, chunked prefill, and a query tile with keys after it."""
TOLERANCE = 2e-5


def test_cases_cover_every_backend_of_the_registry() -> None:
    assert {name for name, _ in CASES} == set(backend_names())


@every_case
@both_directions
def test_a_direction_that_is_not_served_is_refused(case: Case, causal: bool) -> None:
    q, k, v = make_inputs(1, (2, 1), 3, 3, 8)
    options: dict[str, Any] = {"backend": case[0], "params": case[1], "causal": causal, "scale": 0.3}
    if serves(case, causal):
        attend(q, k, v, **options)
        return
    with pytest.raises(Unsupported):
        attend(q, k, v, **options)


@every_served_case
def test_output_lse_and_pair_counts_equal_the_oracle(case: Case, causal: bool) -> None:
    backend, params = case
    for number, (N, M, start) in enumerate(PLACES):
        heads, D = HEADS[number % 3], (60, 64)[number % 2]
        q, k, v = make_inputs(1 + number % 2, heads, N, M, D, seed=number)
        where: dict[str, Any] = {"layer": number % 3, "seed": number * 17, "start": start, "causal": causal}
        want = answer(case, q, k, v, **where)
        assert (want.lse is not None) == keeps_pairs(backend)
        for impl in ("torch", "reference"):
            got = attend(q, k, v, backend=backend, params=params, scale=scale_of(q), impl=impl, **where)
            told = f"{impl} at {N, M, start}"
            np.testing.assert_allclose(got.out.numpy(), want.out, atol=TOLERANCE, err_msg=told)
            _check_lse(got, want, TOLERANCE)
            assert got.stats.pairs_kept == want.pairs_kept, told
            assert got.stats.pairs_kept <= got.stats.pairs_computed
            assert got.stats.impl == impl


def _check_lse(got: AttentionResult, want: Expected, tolerance: float) -> None:
    if want.lse is None:
        assert got.lse is None
        return
    assert got.lse is not None and got.lse.dtype == torch.float32
    np.testing.assert_allclose(got.lse.numpy(), want.lse, atol=tolerance)


@every_served_case
def test_an_oracle_that_keeps_pairs_is_the_softmax_over_them(case: Case, causal: bool) -> None:
    """What an oracle of its own says about lse and pairs fits what it says about the output."""
    if not keeps_pairs(case[0]):
        pytest.skip("its output is no softmax over the pairs kept")
    q, k, v = make_inputs(2, (4, 2), 90, 200, 32)
    want = answer(case, q, k, v, start=60, causal=causal, layer=1, seed=4)
    assert want.kept is not None and want.kept.shape == (2, 4, 90, 200)
    out, lse = softmax_attention(q.numpy(), k.numpy(), v.numpy(), want.kept, scale_of(q))
    np.testing.assert_allclose(want.out, out, atol=1e-12)
    assert want.lse is not None
    np.testing.assert_allclose(want.lse, lse, atol=1e-12)
    if causal:
        assert not want.kept[..., np.triu(np.ones((90, 200), dtype=bool), 61)].any()


def _selection(case: Case) -> Selection:
    return load(case[0]).capabilities.selection


def _borders(case: Case, num_rows: int) -> list[int]:
    """Where a prefill of these rows may be cut without moving its result: anywhere, or at the query tiles."""
    if query_tile(case) == 1:
        return [0, 1, 130, 256, 257, num_rows]
    return [*range(0, num_rows, query_tile(case)), num_rows]


@every_served_case
def test_fp64_agrees_tightly_and_narrow_types_within_their_rounding(case: Case, causal: bool) -> None:
    backend, params = case
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        q, k, v = make_inputs(1, (6, 2), 150, 290, 64, dtype=dtype)
        want = answer(case, q, k, v, start=140, causal=causal)
        got = attend(q, k, v, backend=backend, params=params, causal=causal, scale=scale_of(q))
        assert got.out.dtype == dtype
        assert got.lse is None or got.lse.dtype == torch.float32
        np.testing.assert_allclose(got.out.double().numpy(), want.out, atol=tolerance * _size(case, want.out))


def _size(case: Case, out: Any) -> float:
    """Of which an error is a share: 1 where the answer is a mean of values. Estimated weights may be negative
    and magnify values."""
    return 1.0 if keeps_pairs(case[0]) else max(1.0, float(abs(out).max()))


@every_served_case
def test_values_may_be_wider_or_narrower_than_keys(case: Case, causal: bool) -> None:
    backend, params = case
    for Dv in (24, 96):
        q, k, v = make_inputs(2, (6, 2), 140, 140, 48, Dv)
        fast, slow = (
            attend(q, k, v, backend=backend, params=params, causal=causal, scale=scale_of(q), impl=impl)
            for impl in ("torch", "reference")
        )
        assert fast.out.shape == (2, 6, 140, Dv)
        torch.testing.assert_close(fast.out, slow.out, atol=2e-5, rtol=0)


@every_chunked_case
def test_a_prefill_in_chunks_equals_the_whole_prefill(case: Case, causal: bool) -> None:
    """Causal chunks see the keys so far; bidirectional query tiles see all of them. A selection by query tile
    is cut at its tiles."""
    backend, params = case
    num_rows = 470 if query_tile(case) == 1 else 1100
    q, k, v = make_inputs(1, (6, 2), num_rows, num_rows, 64)
    common: dict[str, Any] = {
        "backend": backend,
        "params": params,
        "causal": causal,
        "scale": scale_of(q),
        "seed": 5,
    }
    whole = attend(q, k, v, **common)
    kept = 0
    for a, b in pairwise(_borders(case, num_rows)):
        end = b if causal else num_rows
        part = attend(q[:, :, a:b], k[:, :, :end], v[:, :, :end], start=a, **common)
        torch.testing.assert_close(part.out, whole.out[:, :, a:b], atol=1e-5, rtol=0)
        kept += part.stats.pairs_kept
    assert kept == whole.stats.pairs_kept


@every_decoding_case
def test_decode_equals_the_last_rows_of_the_prefill(case: Case) -> None:
    backend, params = case
    for heads in HEADS:
        q, k, v = make_inputs(2, heads, 300, 300, 60)
        common: dict[str, Any] = {"backend": backend, "params": params, "causal": True, "scale": scale_of(q)}
        whole = attend(q, k, v, **common)
        for i in (0, 1, 126, 127, 128, 255, 256, 299):
            step = attend(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], **common)
            torch.testing.assert_close(step.out, whole.out[:, :, i : i + 1], atol=1e-5, rtol=0)
            assert (step.lse is None) == (whole.lse is None) == (not keeps_pairs(backend))
            if step.lse is not None and whole.lse is not None:
                torch.testing.assert_close(step.lse, whole.lse[:, :, i : i + 1], atol=1e-5, rtol=0)


@every_served_case
def test_a_batch_equals_each_of_its_members_alone(case: Case, causal: bool) -> None:
    backend, params = case
    q, k, v = make_inputs(3, (6, 2), 200, 260, 64)
    common: dict[str, Any] = {"backend": backend, "params": params, "causal": causal, "scale": scale_of(q)}
    together = attend(q, k, v, **common)
    kept = 0
    for b in range(3):
        alone = attend(q[b : b + 1], k[b : b + 1], v[b : b + 1], **common)
        torch.testing.assert_close(together.out[b : b + 1], alone.out, atol=1e-6, rtol=0)
        kept += alone.stats.pairs_kept
    assert kept == together.stats.pairs_kept


@every_served_case
def test_packed_sequences_equal_each_alone(case: Case, causal: bool) -> None:
    backend, params = case
    lengths = [(1, 77), (140, 140), (1, 1), (33, 190)]
    q, _, _ = make_inputs(1, (6, 2), sum(n for n, _ in lengths), 1, 64)
    segments, at = [], 0
    for number, (n, m) in enumerate(lengths):
        _, k, v = make_inputs(1, (6, 2), 1, m, 64, seed=number + 1)
        segments.append(Segment(slice(at, at + n), k, v, start=m - n, seed=number))
        at += n
    common: dict[str, Any] = {
        "backend": backend,
        "params": params,
        "causal": causal,
        "scale": scale_of(q),
        "layer": 1,
    }
    packed = attend_packed(q, segments, **common)
    for segment, stats in zip(segments, packed.stats, strict=True):
        alone = attend(
            q[:, :, segment.rows], segment.k, segment.v, seed=segment.seed, start=segment.start, **common
        )
        torch.testing.assert_close(packed.out[:, :, segment.rows], alone.out, atol=1e-6, rtol=0)
        assert stats.pairs_kept == alone.stats.pairs_kept


@every_served_case
def test_uninitialised_memory_is_never_read(
    case: Case, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, params = case
    q, k, v = make_inputs(1, (6, 2), 320, 400, 64)
    common: dict[str, Any] = {"backend": backend, "params": params, "causal": causal, "scale": scale_of(q)}
    clean = [attend(q[:, :, -n:], k, v, **common) for n in (320, 1)]
    _poison_empty(monkeypatch)
    for want in clean:
        got = attend(q[:, :, -want.out.shape[2] :], k, v, **common)
        assert torch.equal(got.out, want.out)


def _poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    def filled(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor.fill_(1)

    empty, new_empty, empty_like = torch.empty, torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **kw: filled(empty(*a, **kw)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **kw: filled(empty_like(*a, **kw)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **kw: filled(new_empty(self, *a, **kw)))


@every_causal_case
@pytest.mark.parametrize(("where", "poison"), [("k", math.nan), ("v", math.inf)], ids=["k-nan", "v-inf"])
def test_poisoned_future_keys_do_not_touch_earlier_rows(case: Case, where: str, poison: float) -> None:
    """A row is moved by later tokens only inside the query tile that it shares with them."""
    backend, params = case
    tile = query_tile(case)
    for bad in (1, 130, 299, 800):
        num_rows = max(300, bad + 100)
        q, k, v = make_inputs(1, (6, 2), num_rows, num_rows, 64)
        common: dict[str, Any] = {"backend": backend, "params": params, "causal": True, "scale": scale_of(q)}
        want = attend(q, k, v, **common)
        {"k": k, "v": v}[where][:, :, bad:] = poison
        got = attend(q, k, v, **common)
        free = bad // tile * tile
        torch.testing.assert_close(got.out[:, :, :free], want.out[:, :, :free], atol=1e-5, rtol=0)
        assert not torch.isfinite(got.out[:, :, bad:]).all()


@every_served_case
@pytest.mark.parametrize("where", ["k", "v"])
def test_a_poisoned_key_reaches_exactly_the_rows_that_keep_it(case: Case, causal: bool, where: str) -> None:
    """Every row that may see it, where pairs that are not kept are approximated. A key that is no number may
    also spoil the choice of any row that chooses by keys and may see it."""
    backend, params = case
    for bad in (0, 127, 170):
        q, k, v = make_inputs(1, (6, 2), 300, 300, 64)
        clean = k.clone()
        {"k": k, "v": v}[where][:, :, bad] = math.nan
        got = attend(q, k, v, backend=backend, params=params, causal=causal, scale=scale_of(q))
        spoiled = (~torch.isfinite(got.out[0]).all(-1)).numpy()
        may_see = np.broadcast_to(np.arange(300) >= bad if causal else True, (6, 300))
        if not keeps_pairs(backend):
            np.testing.assert_array_equal(spoiled, may_see)
            continue
        chooses_by_rows = _selection(case) in ("row", "prompt")
        keep = _kept(case, q, clean if chooses_by_rows else k, v, causal)[0, :, :, bad]
        if where == "k" and chooses_by_rows:
            assert not (spoiled & ~may_see).any() and (spoiled.any() or not keep.any())
            continue
        np.testing.assert_array_equal(spoiled, keep)


def _kept(
    case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, start: int = 0
) -> np.ndarray:
    """[B, H, N, M]: the pairs that the oracle keeps."""
    kept = answer(case, q, k, v, start=start, causal=causal).kept
    assert kept is not None
    return kept


@every_served_case
def test_inputs_stay_untouched_and_need_not_be_contiguous(case: Case, causal: bool) -> None:
    backend, params = case
    q, k, v = make_inputs(2, (6, 2), 150, 170, 64)
    common: dict[str, Any] = {"backend": backend, "params": params, "causal": causal, "scale": scale_of(q)}
    before = [x.clone() for x in (q, k, v)]
    want = attend(q, k, v, **common)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))
    model_layout = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    odd_layout = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    cache = [torch.cat([x, torch.full_like(x, math.nan)], 2)[:, :, : x.shape[2]] for x in (q, k, v)]
    for layout in (model_layout, odd_layout, cache):
        torch.testing.assert_close(attend(*layout, **common).out, want.out, atol=1e-6, rtol=0)


@every_served_case
def test_huge_logits_stay_finite(case: Case, causal: bool) -> None:
    backend, params = case
    for N, M in ((260, 260), (1, 260)):
        q, k, v = make_inputs(1, (6, 2), N, M, 64)
        got = attend(q, k, v, backend=backend, params=params, causal=causal, scale=100.0)
        want = attend(q, k, v, backend=backend, params=params, causal=causal, scale=100.0, impl="reference")
        assert float((q @ k.repeat_interleave(3, 1).mT).abs().max()) * 100.0 > 1e3
        assert torch.isfinite(got.out).all()
        if got.lse is not None:
            keeps_any = _kept(case, q, k, v, causal, start=M - N).any(-1)
            np.testing.assert_array_equal(torch.isfinite(got.lse).numpy(), keeps_any)
        if "mass" in params:
            continue  # nearly all weights are 0 or 1: sums of them meet the threshold up to rounding
        torch.testing.assert_close(got.out, want.out, atol=2e-3 * _size(case, want.out), rtol=0)


@every_served_case
@pytest.mark.parametrize("scale", [0.0, -0.2])
def test_a_scale_of_zero_or_below_is_as_good_as_any(case: Case, causal: bool, scale: float) -> None:
    backend, params = case
    if backend == "vertical_slash" and scale == 0:
        pytest.skip("all of its masses tie, up to rounding")
    q, k, v = make_inputs(1, (6, 2), 300, 300, 64)
    common: dict[str, Any] = {"backend": backend, "params": params, "causal": causal, "scale": scale}
    got, want = attend(q, k, v, **common), attend(q, k, v, **common, impl="reference")
    torch.testing.assert_close(got.out, want.out, atol=1e-5, rtol=0)


@every_served_case
def test_the_same_call_gives_the_same_bits(case: Case, causal: bool) -> None:
    backend, params = case
    q, k, v = make_inputs(1, (6, 2), 200, 200, 64)
    common: dict[str, Any] = {
        "backend": backend,
        "params": params,
        "causal": causal,
        "scale": scale_of(q),
        "seed": 3,
    }
    assert torch.equal(attend(q, k, v, **common).out, attend(q, k, v, **common).out)


@every_served_case
def test_the_dropped_mass_is_a_share_per_row_and_zero_where_everything_is_kept(
    case: Case, causal: bool
) -> None:
    backend, params = case
    q, k, v = make_inputs(2, (6, 2), 600, 600, 64)
    got = attend(q, k, v, backend=backend, params=params, causal=causal, scale=scale_of(q))
    if got.dropped is None:
        assert _measures_probes(case) or got.stats.dropped_mass is None
        assert _selection(case) != "tile"
        return
    assert got.dropped.shape == (2, 6, 600) and got.dropped.dtype == torch.float32
    assert ((got.dropped >= 0) & (got.dropped <= 1)).all()
    assert got.stats.dropped_mass == pytest.approx(float(got.dropped.mean()), abs=1e-6)
    complete = torch.from_numpy(_kept(case, q, k, v, causal).copy()).sum(-1) == (
        torch.arange(1, 601) if causal else 600
    )
    assert (got.dropped[complete] <= 1e-6).all()
    if not complete.all():
        assert (got.dropped[~complete] > 0).any()


def _measures_probes(case: Case) -> bool:
    """Whether it keeps pairs that each row chooses by data: what these leave out is measured on some rows."""
    return keeps_pairs(case[0]) and _selection(case) == "row"


@every_served_case
def test_what_rows_leave_out_by_their_own_choice_is_measured_on_probe_rows(case: Case, causal: bool) -> None:
    """Rows 255, 511, ... and the call's last: 1 - e^(lse of what they keep - lse of all)."""
    if not _measures_probes(case):
        pytest.skip("no row chooses its keys by itself, or no estimate is needed for what it leaves out")
    for N, M, start, probes in ((600, 600, 0, [255, 511, 599]), (70, 300, 190, [65, 69]), (1, 256, 255, [0])):
        q, k, v = make_inputs(2, (4, 2), N, M, 32)
        common: dict[str, Any] = {"start": start, "causal": causal, "seed": 3}
        got = attend(q, k, v, backend=case[0], params=case[1], scale=scale_of(q), **common)
        want, whole = answer(case, q, k, v, **common), answer(("exact", {}), q, k, v, **common)
        assert got.dropped is None and want.lse is not None and whole.lse is not None
        left_out = 1 - np.exp(want.lse - whole.lse)[:, :, probes]
        assert got.stats.dropped_mass == pytest.approx(float(left_out.mean()), abs=1e-5)


@every_served_case
def test_pairs_split_by_head_add_up(case: Case, causal: bool) -> None:
    q, k, v = make_inputs(2, (6, 2), 130, 150, 32)
    stats = attend(q, k, v, backend=case[0], params=case[1], causal=causal, scale=scale_of(q)).stats
    if _measures_probes(case):  # each row chooses, and so each head
        assert stats.kept_per_head is not None
    if stats.kept_per_head is not None:
        kept = answer(case, q, k, v, start=20, causal=causal).kept
        assert kept is not None
        assert stats.kept_per_head == tuple(int(n) for n in kept.sum((0, 2, 3)))
        assert sum(stats.kept_per_head) == stats.pairs_kept
    assert stats.other_flops >= 0
    if not keeps_pairs(case[0]) and stats.pairs_kept < stats.pairs_exact:
        assert stats.other_flops > 0


COUNTED: list[Case] = [
    ("lsh", {}),
    ("kmeans", {"train_keys": 100}),
    ("performer", {}),
    ("scatterbrain", {"support_params": {"window": 9}}),
]
"""Those that code or sum up keys once and keep what they know of them."""


@pytest.mark.parametrize("case", COUNTED, ids=case_id)
def test_operations_are_counted_once_for_every_key_that_a_state_holds(case: Case) -> None:
    q, k, v = make_inputs(1, (4, 2), 1032, 1032, 32)

    def flops(begin: int, end: int, kept: KeptStates | None) -> int:
        rows, some = slice(0, end - begin), (x[:, :, :end] for x in (k, v))
        segments = [Segment(rows, *some, start=begin, kept=kept)]
        options: dict[str, Any] = {"params": case[1], "causal": True, "scale": 0.2}
        stats = attend_packed(q[:, :, begin:end], segments, backend=case[0], **options).stats[0]
        return stats.other_flops

    kept, chunks, steps = KeptStates(), 0, []
    for begin in range(0, 1024, 256):  # chunks that end on probed rows, as the whole does
        chunks += flops(begin, begin + 256, kept)
        steps.append(flops(begin + 256, begin + 257, kept))
        kept.truncate(begin + 256)
    whole = flops(0, 1024, None)
    assert len(set(steps)) == 1
    assert 0.7 * whole < chunks <= whole
    assert steps[0] < 3 * whole / 1024
    assert flops(1025, 1026, None) > 20 * steps[0], "without states every key is read"


WIDE: list[Case] = [
    ("window", {"window": 65536}),
    ("window", {"window": 1, "global_tokens": 4096}),
    ("sinks", {"sinks": 4096}),
    ("star", {"window": 65536}),
    ("strided", {"stride": 4096}),
    ("fixed", {"stride": 4096}),
    ("bigbird", {"window": 65536}),
    ("xattention", {"mass": 1.0, "query_tile": 128}),
    ("xattention", {"budget": 4096, "query_tile": 128}),
    ("pooled", {"mass": 1.0, "query_tile": 128}),
    ("pooled", {"budget": 4096, "query_tile": 128}),
    ("topk", {"mass": 1.0, "query_tile": 128}),
    ("pages", {"budget": 4096, "query_tile": 128}),
    ("vertical_slash", {"query_tile": 256, "num_verticals": 4096}),
    ("lsh", {"window": 4096}),
    ("lsh", {"num_buckets": 1, "cluster_size": 4096, "window": 1, "sinks": 0}),
    ("lsh", {"variant": "smyrf", "cluster_size": 4096, "window": 1, "sinks": 0}),
    ("kmeans", {"num_clusters": 1, "num_probes": 1, "cluster_size": 4096, "window": 1}),
    ("kmeans", {"num_clusters": 6, "num_probes": 6, "cluster_size": 4096, "window": 1, "train_keys": 64}),
    ("kmeans", {"window": 4096, "train_keys": 64}),
    ("scatterbrain", {"support_params": {"window": 4096}}),
    ("scatterbrain", {"support": "window", "support_params": {"window": 4096}, "centre_keys": 0}),
    ("scatterbrain", {"support": "topk", "support_params": {"mass": 1.0, "query_tile": 128}}),
    (
        "scatterbrain",
        {"support": "lsh", "support_params": {"num_buckets": 1, "cluster_size": 4096, "window": 1}},
    ),
    ("performer", {"centre_keys": 4096}),
    ("sbm", {"sampler": "bernoulli", "exploration": 1.0}),
]
WIDE_SERVED = [
    pytest.param(case, causal, id=f"{case_id(case)}-{'causal' if causal else 'bidirectional'}")
    for case in WIDE
    for causal in (True, False)
    if serves(case, causal) and (causal or case[0] != "performer")
]
"""``performer`` is exact where all causal rows are among those that its centre is taken from."""


@pytest.mark.parametrize(("case", "causal"), WIDE_SERVED)
def test_a_pattern_that_covers_everything_is_exact(case: Case, causal: bool) -> None:
    backend, params = case
    q, k, v = make_inputs(1, (6, 2), 400, 400, 64)
    got = attend(q, k, v, backend=backend, params=params, causal=causal, scale=scale_of(q))
    want = attend(q, k, v, backend="exact", causal=causal, scale=scale_of(q))
    torch.testing.assert_close(got.out, want.out, atol=1e-5, rtol=0)
    assert got.stats.density == 1.0


@pytest.mark.parametrize("width", [600, 2000])
@pytest.mark.parametrize("backend", ["window", "strided", "fixed", "star"])
@both_directions
def test_spans_wider_than_a_tile_are_cut_into_panels_without_loss(
    backend: str, width: int, causal: bool
) -> None:
    params = {"stride": width} if backend in ("strided", "fixed") else {"window": width}
    q, k, v = make_inputs(1, (2, 1), 2700, 2700, 16)
    common: dict[str, Any] = {"backend": backend, "params": params, "causal": causal, "scale": scale_of(q)}
    fast, slow = attend(q, k, v, **common), attend(q, k, v, impl="reference", **common)
    torch.testing.assert_close(fast.out, slow.out, atol=1e-5, rtol=0)
    assert fast.stats.pairs_kept == slow.stats.pairs_kept


@pytest.mark.parametrize(
    "case",
    [
        ("random", {"num_random": 32, "block_size": 32}),
        ("bigbird", {"window": 2, "global_tokens": 0, "num_random": 32, "block_size": 32}),
    ],
    ids=case_id,
)
def test_a_decoded_row_of_the_first_block_does_not_feel_keys_that_it_did_not_draw(case: Case) -> None:
    q, k, v = make_inputs(1, (4, 2), 6, 6, 16)
    v[:, :, 0] = math.nan
    common: dict[str, Any] = {"backend": case[0], "params": case[1], "causal": True, "scale": 1.0}
    step = attend(q[:, :, 5:], k, v, **common)
    torch.testing.assert_close(step.out, attend(q, k, v, **common).out[:, :, 5:], atol=1e-6, rtol=0)
    assert torch.isfinite(step.out).all()
