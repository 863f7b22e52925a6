"""Buckets in general, and those of hashes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import Unsupported, attend
from kernels.api import InvalidParams
from kernels.contract import Call
from kernels.math.bucket_reference import kept_pairs
from kernels.math.bucket_states import CodeState
from kernels.math.buckets import Codes, Reach, bucket_panels
from kernels.math.hashing import LshParams, lsh_codes
from kernels.math.kept import KeptStates
from kernels.math.probe_rows import probe_dropped_mass, probed_rows
from kernels.math.window import window_keep
from tests.kernels.kernel_cases import both_directions, make_inputs


def drawn_codes(
    seed: int, heads: int, G: int, N: int, M: int, tables: tuple[int, ...], buckets: int
) -> Codes:
    """Codes of very unequal buckets; rounds of one table are different buckets."""
    random = np.random.default_rng(seed)
    keys = (random.random((heads, max(tables) + 1, M)) ** 2 * buckets).astype(np.int16)
    rows = (random.random((heads, G, len(tables), N)) ** 2 * buckets).astype(np.int16)
    for r in range(1, len(tables)):
        if tables[r] == tables[r - 1]:
            rows[:, :, r] = (rows[:, :, r - 1] + 1) % buckets
    return Codes(torch.from_numpy(keys), torch.from_numpy(rows), tables, buckets)


def base_mask(reach: Reach, call: Call, num_rows: int, num_keys: int) -> Tensor:
    i, j = torch.arange(call.start, call.start + num_rows)[:, None], torch.arange(num_keys)[None]
    exact = reach.exact_rows if call.causal else 0
    return window_keep(i, j, reach.window, reach.sinks, exact, call.causal)


SHAPES = [(1, 1, 1, 0), (2, 3, 77, 0), (3, 1, 300, 0), (1, 4, 65, 230), (2, 2, 40, 501)]
"""(key heads, group, rows, start)."""
REACHES = [
    Reach(16, 1, 0),
    Reach(32, 5, 3, exact_rows=20),
    Reach(16, 30, 40, exact_rows=7),
    Reach(128, 2, 1),
    Reach(512, 1, 0),
]


@both_directions
@pytest.mark.parametrize("tables", [(0,), (0, 1, 2), (0, 0), (0, 0, 1)], ids=str)
def test_panels_and_base_have_every_kept_pair_exactly_once(causal: bool, tables: tuple[int, ...]) -> None:
    for number, (heads, G, N, start) in enumerate(SHAPES):
        for reach in REACHES:
            M = start + N + (0 if causal else 23)
            call = Call(causal=causal, scale=1.0, seed=0, layer=0, start=start)
            codes = drawn_codes(number, heads, G, N, M, tables, buckets=7)
            seen = base_mask(reach, call, N, M).int().expand(heads, G, N, M).clone()
            add_panels(seen, codes, reach, call)
            assert torch.equal(seen.flatten(0, 1), kept_pairs(codes, reach, call).int()), (number, reach)


def add_panels(seen: Tensor, codes: Codes, reach: Reach, call: Call) -> None:
    """Count every pair of the panels in ``seen`` [Hk, G, N, M]."""
    for panels in bucket_panels(codes, reach, call):
        panel, row, key = panels.keep.nonzero(as_tuple=True)
        at = (panels.rows[panel, row], panels.keys[panel, key])
        assert torch.equal(panels.into[panel, row], at[0])
        flat = seen[panels.head].flatten(0, 1)
        flat.index_put_(at, torch.ones_like(at[0], dtype=torch.int32), accumulate=True)
        assert panels.num_kept == len(at[0])


@both_directions
def test_more_keys_than_a_small_integer_counts_are_told_apart(causal: bool) -> None:
    N, M = 24, 40_000
    call = Call(causal=causal, scale=1.0, seed=0, layer=0, start=M - N)
    codes = drawn_codes(5, 1, 2, N, M, (0, 1), buckets=3)
    reach = Reach(4096, 4, 2)
    seen = base_mask(reach, call, N, M).int().expand(1, 2, N, M).clone()
    add_panels(seen, codes, reach, call)
    assert torch.equal(seen[0], kept_pairs(codes, reach, call).int())


def test_whole_buckets_are_seen_whole() -> None:
    call = Call(causal=False, scale=1.0, seed=0, layer=0, start=0)
    codes, reach = drawn_codes(1, 2, 2, 90, 90, (0, 1), buckets=5), Reach(64, 3, 1, whole=True)
    seen = base_mask(reach, call, 90, 90).int().expand(2, 2, 90, 90).clone()
    add_panels(seen, codes, reach, call)
    assert torch.equal(seen.flatten(0, 1), kept_pairs(codes, reach, call).int())
    assert (seen == 1)[0, 0, 40][codes.keys[0, 1] == codes.rows[0, 0, 1, 40]].all()


def test_a_key_in_the_direction_of_a_query_is_always_found() -> None:
    q, k, v = make_inputs(1, (4, 2), 600, 600, 32)
    wanted = torch.randint(0, 600, (4, 600), generator=torch.Generator().manual_seed(1))
    for head in range(4):
        q[0, head] = 7.0 * k[0, head // 2, wanted[head]]
    knobs = {"cluster_size": 4096, "window": 1, "sinks": 0, "centre_keys": 0, "num_hash_rounds": 1}
    got = attend(q, k, v, backend="lsh", params=knobs, causal=False, scale=1.0)
    want = torch.stack([v[0, head // 2, wanted[head]] for head in range(4)])
    assert got.stats.density < 0.1
    torch.testing.assert_close(got.out[0], want, atol=1e-3, rtol=0)
    away = attend(q, k, v, backend="lsh", params=knobs, causal=False, scale=-1.0)
    assert not torch.isclose(away.out[0], want, atol=0.1).all(-1).any()


@both_directions
@pytest.mark.parametrize("variant", ["reformer", "smyrf"])
def test_the_choice_does_not_see_what_all_keys_share_nor_their_length(causal: bool, variant: Any) -> None:
    if causal and variant == "smyrf":
        pytest.skip("it has no causal form")
    q, k, _ = make_inputs(1, (4, 2), 300, 300, 32, dtype=torch.float64)
    call = Call(causal=causal, scale=1.0, seed=3, layer=1, start=0)
    rows, params = torch.unflatten(q[0], 0, (2, 2)), LshParams(variant=variant, cluster_size=16)
    plain = lsh_codes(params, rows, k[0], call)
    moved = lsh_codes(params, rows, k[0] + torch.randn(2, 1, 32, dtype=torch.float64), call)
    assert torch.equal(plain.keys, moved.keys) and torch.equal(plain.rows, moved.rows)
    if variant == "reformer":
        longer = lsh_codes(params, rows * 5, k[0] * 0.1, call)
        assert torch.equal(plain.keys, longer.keys) and torch.equal(plain.rows, longer.rows)


def test_seeds_layers_and_key_heads_hash_apart() -> None:
    k = make_inputs(1, (1, 1), 400, 400, 32)[1][0].expand(2, -1, -1)
    rows = k[:, None]

    def code(seed: int, layer: int) -> Tensor:
        return lsh_codes(LshParams(), rows, k, Call(True, 1.0, seed, layer, 0)).keys

    assert torch.equal(code(1, 0), code(1, 0))
    assert not torch.equal(code(1, 0), code(2, 0)) and not torch.equal(code(1, 0), code(1, 1))
    assert not torch.equal(code(1, 0)[0], code(1, 0)[1]) and not torch.equal(
        code(1, 0)[:, 0], code(1, 0)[:, 1]
    )


def test_codes_of_some_keys_are_those_of_all() -> None:
    k = make_inputs(1, (3, 3), 1, 5000, 48)[1][0]
    rows = k[:, None]
    whole = lsh_codes(LshParams(), rows, k, Call(True, 1.0, 0, 0, 0))
    for stop in (70, 71, 4097):
        some = lsh_codes(
            LshParams(), rows[:, :, stop - 1 : stop], k[:, :stop], Call(True, 1.0, 0, 0, stop - 1)
        )
        assert torch.equal(some.keys, whole.keys[..., :stop])
        assert torch.equal(some.rows[..., 0], whole.rows[..., stop - 1])


def test_smyrf_cuts_queries_and_keys_into_clusters_of_nearly_one_size() -> None:
    q, k, _ = make_inputs(1, (4, 2), 333, 1000, 32)
    params = LshParams(variant="smyrf", cluster_size=48)
    codes = lsh_codes(params, torch.unflatten(q[0], 0, (2, 2)), k[0], Call(False, 1.0, 0, 0, 0))
    for one in (*codes.keys.flatten(0, 1), *codes.rows.flatten(0, 2)):
        sizes = torch.bincount(one.long(), minlength=21)
        assert len(sizes) == 21 and sizes.max() - sizes.min() <= 1


def test_smyrf_has_no_causal_form_and_says_why() -> None:
    q, k, v = make_inputs(1, (2, 2), 9, 9, 16)
    with pytest.raises(Unsupported, match="sorts all tokens"):
        attend(q, k, v, backend="lsh", params={"variant": "smyrf"}, causal=True, scale=1.0)


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"num_buckets": 7}, "1 or even, got 7"),
        ({"num_buckets": 2048}, "num_buckets"),
        ({"cluster_size": 20}, "cluster_size"),
        ({"cluster_size": 8192}, "cluster_size"),
        ({"num_hash_rounds": 9}, "num_hash_rounds"),
        ({"window": 0}, "window"),
    ],
)
def test_params_out_of_bounds_are_refused_by_name(params: dict[str, int], told: str) -> None:
    q, k, v = make_inputs(1, (2, 2), 9, 9, 16)
    with pytest.raises(InvalidParams, match=told):
        attend(q, k, v, backend="lsh", params=params, causal=True, scale=1.0)


@both_directions
def test_threads_change_nothing(causal: bool) -> None:
    q, k, v = make_inputs(1, (6, 3), 700, 700, 32)
    before = torch.get_num_threads()
    answers = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            answers.append(attend(q, k, v, backend="lsh", causal=causal, scale=0.2, params={"window": 3}))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(answers[0].out, answers[1].out)
    assert answers[0].stats.pairs_kept == answers[1].stats.pairs_kept


@both_directions
def test_a_broken_query_breaks_its_own_row_alone(causal: bool) -> None:
    q, k, v = make_inputs(1, (2, 1), 400, 400, 32)
    want = attend(q, k, v, backend="lsh", causal=causal, scale=0.2)
    q[0, 1, 222] = math.nan
    got = attend(q, k, v, backend="lsh", causal=causal, scale=0.2)
    others = torch.ones(2, 400, dtype=torch.bool)
    others[1, 222] = False
    torch.testing.assert_close(got.out[0][others], want.out[0][others], atol=1e-6, rtol=0)
    assert torch.isnan(got.out[0, 1, 222]).all()


def test_kept_codes_are_made_once_for_every_key_and_forgotten_when_cut_off() -> None:
    k = make_inputs(1, (2, 2), 1, 300, 8)[1][0]
    made: list[int] = []
    told: list[tuple[int, int]] = []

    def encode(new: Tensor, basis: Tensor | None) -> Tensor:
        assert basis is not None
        made.append(new.shape[1])
        return (new - basis).sum(-1, keepdim=True).mT.mul(100).to(torch.int16)

    state = CodeState(10)
    want = encode(k, k[:, :10].mean(1, keepdim=True))
    for length in (100, 101, 102, 90, 300):
        coded = state.codes(k[:, :length], lambda first: first.mean(1, keepdim=True), encode)
        assert torch.equal(coded.codes, want[..., :length])
        told.append((coded.num_coded, coded.num_fitted))
    assert made[1:] == [100, 1, 1, 198]
    assert told == [(100, 10), (1, 0), (1, 0), (0, 0), (198, 0)]
    held = state.nbytes
    state.truncate(50)
    assert torch.equal(state.codes(k, lambda first: first.mean(1, keepdim=True), encode).codes, want)
    assert made[-1] == 250 and state.nbytes == held
    state.truncate(9)
    moved = k + 1.0
    want = encode(moved, moved[:, :10].mean(1, keepdim=True))
    assert torch.equal(state.codes(moved, lambda first: first.mean(1, keepdim=True), encode).codes, want)


def test_codes_kept_in_inference_mode_grow_outside_of_it_and_back() -> None:
    k = make_inputs(1, (2, 2), 1, 60, 8)[1][0]

    def encode(new: Tensor, basis: Tensor | None) -> Tensor:
        return (new - basis).sum(-1, keepdim=True).mT.mul(100).to(torch.int16)

    state = CodeState(10)
    want = encode(k, k[:, :10].mean(1, keepdim=True))
    for length in range(20, 61):  # most lengths find room in what another mode has made
        with torch.inference_mode(length % 3 != 2):
            coded = state.codes(k[:, :length], lambda first: first.mean(1, keepdim=True), encode)
        assert coded.basis is not None and not coded.basis.is_inference() and not coded.codes.is_inference()
        assert torch.equal(coded.codes, want[..., :length])


LONG: list[tuple[str, dict[str, Any]]] = [
    ("lsh", {}),
    ("kmeans", {"num_probes": 3}),
    ("scatterbrain", {"support": "lsh", "num_features": 8}),
]
"""Rounds whose panels are larger than 16 bits can number, and that look at what earlier ones found."""


@pytest.mark.parametrize(
    ("backend", "params"), LONG, ids=lambda given: given if isinstance(given, str) else ""
)
def test_rows_beyond_what_a_small_integer_counts_keep_what_the_reference_keeps(
    backend: str, params: dict[str, Any]
) -> None:
    q, k, v = make_inputs(1, (1, 1), 40, 33_000, 8)
    call: dict[str, Any] = {"backend": backend, "params": params, "causal": True, "scale": 0.3}
    got, want = attend(q, k, v, **call), attend(q, k, v, impl="reference", **call)
    torch.testing.assert_close(got.out, want.out, atol=1e-5, rtol=0)
    assert got.stats.pairs_kept == want.stats.pairs_kept
    assert got.stats.kept_per_head == want.stats.kept_per_head


def test_a_step_hashes_its_own_key_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = make_inputs(1, (2, 2), 400, 400, 16)
    kept = KeptStates()
    lsh_codes(LshParams(), q[0, :, None, :399], k[0, :, :399], Call(True, 1.0, 0, 0, 0, kept=kept))
    want = lsh_codes(LshParams(), q[0, :, None, 399:], k[0], Call(True, 1.0, 0, 0, 399))
    k[:, :, 100:399] = math.nan
    got = lsh_codes(LshParams(), q[0, :, None, 399:], k[0], Call(True, 1.0, 0, 0, 399, kept=kept))
    assert torch.equal(got.keys, want.keys) and torch.equal(got.rows, want.rows)


@both_directions
def test_dropped_mass_is_that_of_the_probed_rows(causal: bool) -> None:
    q, k, v = make_inputs(1, (4, 2), 600, 700, 32)
    call: dict[str, Any] = {"backend": "lsh", "causal": causal, "scale": 0.3}
    got, full = attend(q, k, v, **call), attend(q, k, v, **(call | {"backend": "exact"}))
    assert got.lse is not None and full.lse is not None and got.dropped is None
    rows = [i - 100 for i in (255, 511, 699)]
    want = (1 - torch.exp(got.lse - full.lse))[..., rows].mean()
    assert got.stats.dropped_mass == pytest.approx(float(want), abs=1e-5)
    assert 0.1 < got.stats.dropped_mass < 1


def test_probed_rows_are_every_256th_and_the_last_of_a_call_of_several() -> None:
    assert probed_rows(0, 600) == [255, 511, 599]
    assert probed_rows(0, 512) == [255, 511]
    assert probed_rows(250, 5) == [4]
    assert probed_rows(255, 1) == [0] and probed_rows(256, 1) == [] and probed_rows(256, 2) == [1]


def test_rows_without_a_finite_mass_say_nothing_of_what_was_dropped() -> None:
    q, k, _ = make_inputs(1, (2, 2), 300, 300, 16)
    call = Call(causal=True, scale=1.0, seed=0, layer=0, start=0)
    scores = torch.einsum("bhid,bhjd->bhij", q, k).masked_fill(~torch.ones(300, 300).tril().bool(), -math.inf)
    lse = scores.logsumexp(-1)[:, :, None]
    assert probe_dropped_mass(q[:, :, None], k, lse, call).dropped_mass == pytest.approx(0.0, abs=1e-5)
    half = probe_dropped_mass(q[:, :, None], k, lse - math.log(2), call).dropped_mass
    assert half == pytest.approx(0.5, abs=1e-5)
    nothing = torch.full_like(lse, -math.inf)
    assert probe_dropped_mass(q[:, :, None], k, nothing, call).dropped_mass == 1.0
    k[:, :, 280] = math.nan  # row 255 does not see it, the last row does
    told = probe_dropped_mass(q[:, :, None], k, lse - math.log(2), call).dropped_mass
    assert told == pytest.approx(0.5, abs=1e-5)
    k[:, :, 3] = math.nan
    assert probe_dropped_mass(q[:, :, None], k, lse, call).dropped_mass is None
