"""The computations below the backends: generator, draws, merging, residue classes, caching, memory."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import attend, backend_names
from kernels.contract import Call
from kernels.math import cache
from kernels.math.combine import heads_of_turn
from kernels.math.dense import dense_part, grouped, make_mask
from kernels.math.merge import merge_into
from kernels.math.random_keys import block_draws, row_draws
from kernels.math.residues import residue_groups
from kernels.math.rng import below, bits, fold
from kernels.registry import load
from tests.kernels.kernel_cases import make_inputs, scale_of, serves

CAUSAL = Call(causal=True, scale=1.0, seed=11, layer=2, start=0)
OPEN = Call(causal=False, scale=1.0, seed=11, layer=2, start=0)


def test_the_generator_is_splitmix64() -> None:
    """First outputs of SplitMix64 seeded with 1234567, as published with its reference code."""
    got = bits(torch.tensor(1234567), torch.arange(3))
    assert [x % 2**64 for x in got.tolist()] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]
    assert fold(1234567, 2) % 2**64 == 9817491932198370423


@pytest.mark.parametrize("bound", [2, 7, 1000, 2**31 - 1])
def test_draws_are_uniform_and_in_range(bound: int) -> None:
    """Chi-square over at most 64 cells, 2^18 draws: 64 cells reach 140 about once in 10^7 runs."""
    drawn = below(bits(torch.arange(512)[:, None], torch.arange(512)), bound)
    assert int(drawn.min()) >= 0 and int(drawn.max()) < bound
    cells = min(bound, 64)
    counts = torch.bincount((drawn * cells // bound).flatten(), minlength=cells).double()
    sizes = torch.tensor(
        [-(-bound * (c + 1) // cells) - -(-bound * c // cells) for c in range(cells)]
    ).double()
    expected = drawn.numel() * sizes / sizes.sum()
    assert float(((counts - expected) ** 2 / expected).sum()) < 140


def test_neighbouring_streams_are_uncorrelated() -> None:
    drawn = below(bits(torch.arange(400)[:, None], torch.arange(400)), 2**20).double()
    centred = (drawn - drawn.mean()) / drawn.std()
    for pair in ((centred[1:] * centred[:-1]).mean(), (centred[:, 1:] * centred[:, :-1]).mean()):
        assert abs(float(pair)) < 5 / math.sqrt(400 * 399)


def test_draws_do_not_depend_on_the_rows_asked_for() -> None:
    rows = torch.arange(700)
    for call in (CAUSAL, OPEN):
        whole = row_draws(call, 3, rows, 9, 700)
        for a, b in ((0, 1), (1, 255), (255, 700)):
            assert torch.equal(row_draws(call, 3, rows[a:b], 9, 700), whole[:, a:b])
        blocks = torch.arange(11)
        whole = block_draws(call, 2, blocks, 4, 11)
        assert torch.equal(block_draws(call, 2, blocks[5:], 4, 11), whole[:, 5:])


def test_causal_draws_stay_behind_their_row_and_reach_all_of_it() -> None:
    drawn = row_draws(CAUSAL, 4, torch.arange(50), 256, 50)
    for i in range(50):
        assert set(drawn[:, i].flatten().tolist()) == set(range(i + 1))
    blocks = block_draws(CAUSAL, 4, torch.arange(6), 64, 6)
    assert set(blocks[:, 0].flatten().tolist()) == {-1}
    for b in range(1, 6):
        assert set(blocks[:, b].flatten().tolist()) == set(range(b))


def test_draws_change_with_seed_layer_head_and_row() -> None:
    def drawn(seed: int, layer: int) -> torch.Tensor:
        call = Call(causal=False, scale=1.0, seed=seed, layer=layer, start=0)
        return row_draws(call, 2, torch.arange(40), 8, 10**6)

    base = drawn(1, 0)
    assert not torch.equal(base, drawn(2, 0)) and not torch.equal(base, drawn(1, 1))
    assert Counter(base.flatten().tolist()).most_common(1)[0][1] <= 2


@pytest.mark.parametrize("backend", ["random", "bigbird"])
def test_the_seed_and_the_layer_change_a_random_pattern_and_nothing_else(backend: str) -> None:
    q, k, v = make_inputs(1, (4, 2), 1000, 1000, 16)
    common: dict[str, Any] = {"backend": backend, "causal": True, "scale": scale_of(q)}
    outs = [attend(q, k, v, seed=s, layer=t, **common).out for s, t in ((0, 0), (1, 0), (0, 1), (0, 0))]
    assert torch.equal(outs[0], outs[3])
    assert not torch.allclose(outs[0], outs[1]) and not torch.allclose(outs[0], outs[2])


def test_merging_two_halves_gives_the_whole_and_an_empty_part_changes_nothing() -> None:
    q, k, v = make_inputs(1, (4, 2), 30, 80, 16, dtype=torch.float64)
    rows = grouped(q, 2)
    want, want_lse = dense_part(rows, k, v, 0.3)
    out, lse = dense_part(rows, k[:, :, :50], v[:, :, :50], 0.3)
    merge_into(out, lse, torch.zeros_like(out), torch.full_like(lse, -math.inf))
    merge_into(out, lse, *dense_part(rows, k[:, :, 50:], v[:, :, 50:], 0.3))
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
    nothing, no_lse = torch.zeros_like(out), torch.full_like(lse, -math.inf)
    merge_into(nothing, no_lse, torch.zeros_like(out), torch.full_like(lse, -math.inf))
    assert torch.equal(nothing, torch.zeros_like(out)) and bool((no_lse == -math.inf).all())
    merge_into(nothing, no_lse, want, want_lse)
    torch.testing.assert_close(nothing, want)


@pytest.mark.parametrize("guard", [False, True])
def test_a_row_without_keys_gives_zeros(guard: bool) -> None:
    q, k, v = make_inputs(2, (4, 2), 6, 9, 16)
    keep = torch.ones(6, 9, dtype=torch.bool)
    keep[2] = False
    out, lse = dense_part(grouped(q, 2), k, v, 0.3, mask=make_mask(keep, torch.float32), guard=guard)
    assert torch.equal(out[..., 2, :], torch.zeros_like(out[..., 2, :]))
    assert bool((lse[..., 2] == -math.inf).all()) and torch.isfinite(lse[..., 3]).all()


@pytest.mark.parametrize("heads", [(1, 1), (1, 3), (2, 3), (3, 2), (4, 1), (5, 4)])
@pytest.mark.parametrize("turns", [2, 3])
def test_every_head_gets_its_turn_once(heads: tuple[int, int], turns: int) -> None:
    Hk, G = heads
    index = torch.arange(Hk * G).view(Hk, G)
    for turn in range(turns):
        got = sorted(h for a, b in heads_of_turn(Hk, G, turn, turns) for h in index[a, b].flatten().tolist())
        assert got == [h for h in range(Hk * G) if h % turns == turn]


@pytest.mark.parametrize("causal", [True, False])
def test_residue_groups_cover_every_row_and_its_keys_once(causal: bool) -> None:
    for start, rows, after, stride in (
        (0, 50, 0, 7),
        (13, 50, 9, 7),
        (3, 4, 30, 10),
        (0, 1, 0, 2),
        (95, 33, 1, 32),
    ):
        keys, seen = start + rows + after, Counter[int]()
        for group in residue_groups(start, rows, keys, stride, causal):
            for s in range(group.count):
                members = list(range(group.row + s, rows, stride))
                assert len(members) == group.num_rows
                assert all((start + r) % stride == group.key + s for r in members)
                last = start + members[-1] + 1 if causal else keys
                assert group.num_keys == len(range(group.key + s, last, stride))
                assert group.num_before == len(range(group.key + s, start + members[0], stride))
                seen.update(members)
        assert seen == Counter(range(rows))


class Entry:
    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


def test_a_cache_stays_within_its_bytes_and_drops_the_least_recently_used() -> None:
    kept = cache.BoundedCache(10_000)
    for name in "abc":
        kept.get(name, lambda: Entry(2_000))
    first = kept.get("a", lambda: Entry(1))
    assert first.nbytes == 2_000
    kept.get("d", lambda: Entry(2_000))
    kept.get("e", lambda: Entry(2_000))
    assert kept.held_bytes <= 10_000 and kept.get("a", lambda: Entry(1)) is first
    assert kept.get("b", lambda: Entry(7)).nbytes == 7
    held = len(kept)
    assert kept.get("huge", lambda: Entry(20_000)).nbytes == 20_000 and len(kept) == held


def test_plans_are_shared_by_layers_seeds_and_lengths_that_they_do_not_depend_on() -> None:
    q, k, v = make_inputs(1, (2, 1), 600, 600, 16)
    for layer, seed in ((0, 0), (1, 5)):
        attend(q, k, v, backend="window", causal=True, scale=0.2, layer=layer, seed=seed)
    assert len(cache.PLANS) == 1
    attend(q[:, :, :300], k, v, backend="window", causal=True, scale=0.2, start=0)
    plans = len(cache.PLANS)
    attend(q[:, :, :300], k[:, :, :300], v[:, :, :300], backend="window", causal=True, scale=0.2)
    assert len(cache.PLANS) == plans
    masks = len(cache.MASKS)
    q, k, v = make_inputs(1, (2, 1), 512, 5120, 16)
    for start in range(1024, 4608, 512):
        attend(q, k, v, backend="window", causal=True, scale=0.2, start=start)
    assert len(cache.MASKS) - masks <= 2


class LargestOutput(TorchDispatchMode):
    """The largest number of elements in any tensor that an operation gives, views of inputs aside."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


SCORE_CHUNK = 2 << 20
"""Numbers that a scoring holds at once, whatever the length."""


@pytest.mark.parametrize("backend", backend_names())
@pytest.mark.parametrize("causal", [True, False])
def test_nothing_grows_faster_than_the_sequence(backend: str, causal: bool) -> None:
    if not serves((backend, {}), causal):
        pytest.skip("it does not serve that direction")
    if load(backend).capabilities.learned:
        pytest.skip("its edges grow with the square: at a fixed number of edges see test_sbm")
    largest = []
    for N in (8192, 16384):
        q, k, v = make_inputs(1, (2, 1), N, N, 16)
        with LargestOutput() as watch:
            attend(q, k, v, backend=backend, causal=causal, scale=scale_of(q))
        largest.append(watch.numel)
        assert watch.numel < N * N // 8
    assert largest[1] <= max(2.05 * largest[0], SCORE_CHUNK)
