"""Stochastic block model attention: the law of its edges, and that nothing but a row's place moves them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import attend
from kernels.api import attend_packed, parse_params
from kernels.contract import AttentionResult, CallShape, Segment, Unsupported
from kernels.math.edges import attend_ragged, attend_ragged_rows
from kernels.math.kept import KeptStates
from kernels.math.sbm import MAX_CLUSTERS, ClusterParams, random_clusters
from kernels.math.sbm_keys import SUM_KEYS, Guide, KeySums
from kernels.math.sbm_sampler import batches, distinct, draw_points, rates, row_streams
from kernels.registry import load
from tests.kernels.kernel_cases import both_directions, make_inputs, scale_of
from tests.kernels.kernel_oracle import softmax_attention
from tests.kernels.oracles.sbm import edges, probabilities
from tests.kernels.test_workspace import peak_of_tensors

SWAP = np.array([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]], dtype=np.float64)
CYCLE = np.roll(np.eye(4), 1, axis=1)
UNEVEN = np.array([[0.1, 0.9, 0, 0.2], [0.0, 0.2, 0.7, 0], [0.5, 0, 0, 0.1], [0.3, 0.0, 0.4, 0.6]])
AFFINITIES = pytest.mark.parametrize("affinity", [SWAP, CYCLE, UNEVEN], ids=["swap", "cycle", "uneven"])
samplers = pytest.mark.parametrize("sampler", ["poisson", "bernoulli"])
HEADS, SEEDS, TOKENS = 100, 8, 24


def plain(num_heads: int, affinity: np.ndarray) -> ClusterParams:
    """Clusters of which a token of ``tokens`` belongs to its own with 0.98 and to the others with 0.02."""
    C = len(affinity)
    clusters = torch.cat([8.0 * torch.eye(C), torch.full((C, 1), -4.0)], 1)
    one, zero = torch.eye(C + 1), torch.zeros(C + 1)
    wide = torch.from_numpy(affinity).expand(num_heads, C, C).contiguous()
    return ClusterParams(clusters.expand(num_heads, C, C + 1).contiguous(), one, zero, one, zero, wide)


def tokens(num_heads: int, num_tokens: int, C: int, seed: int) -> Tensor:
    """[1, H, N, C + 1], the same for every head."""
    own = torch.randint(0, C, (num_tokens,), generator=torch.Generator().manual_seed(seed))
    rows = torch.cat([torch.nn.functional.one_hot(own, C).float(), torch.ones(num_tokens, 1)], 1)
    return rows.expand(1, num_heads, num_tokens, C + 1).contiguous()


def run(
    q: Tensor, k: Tensor, learned: ClusterParams, causal: bool = False, **options: Any
) -> AttentionResult:
    """With values that tell the keys: out > 0 is the adjacency."""
    told = torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1).contiguous()
    return attend(q, k, told, backend="sbm", learned=learned, causal=causal, scale=0.0, **options)


def adjacency(q: Tensor, k: Tensor, learned: ClusterParams, causal: bool = False, **options: Any) -> Tensor:
    return run(q, k, learned, causal, **options).out > 0


def frobenius(found: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(found - want) / np.linalg.norm(want))


def mean_adjacency(learned: ClusterParams, q: Tensor, k: Tensor, **options: Any) -> np.ndarray:
    """Over SEEDS seeds and HEADS heads, which draw apart."""
    drawn = [adjacency(q, k, learned, seed=seed, **options)[0].double().mean(0) for seed in range(SEEDS)]
    return torch.stack(drawn).mean(0).numpy()


@AFFINITIES
@samplers
def test_the_mean_adjacency_is_that_of_the_law_whatever_the_affinity(
    affinity: np.ndarray, sampler: str
) -> None:
    learned = plain(HEADS, affinity)
    q, k = tokens(HEADS, TOKENS, 4, seed=1), tokens(HEADS, TOKENS, 4, seed=2)
    p = probabilities(q[0, 0].double().numpy(), k[0, 0].double().numpy(), learned, 0)
    want = 1 - np.exp(-p) if sampler == "poisson" else np.minimum(p, 1.0)
    found = mean_adjacency(learned, q, k, params={"sampler": sampler})
    assert frobenius(found, want) < 0.06
    deviation = (found - want) / np.sqrt(np.maximum(want * (1 - want), 1e-3) / (HEADS * SEEDS))
    assert np.abs(deviation).max() < 5.0


@AFFINITIES
def test_points_per_pair_have_mean_and_variance_p(affinity: np.ndarray) -> None:
    learned = plain(1, affinity)
    q, k = tokens(1, TOKENS, 4, seed=1), tokens(1, TOKENS, 4, seed=2)
    p = probabilities(q[0, 0].double().numpy(), k[0, 0].double().numpy(), learned, 0)
    draws = 1500
    counts = np.stack([_multigraph(learned, q, k, seed) for seed in range(draws)])
    assert frobenius(counts.mean(0), p) < 0.05
    deviation = (counts.mean(0) - p) / np.sqrt(np.maximum(p, 1e-3) / draws)
    assert np.abs(deviation).max() < 5.0
    likely = p > 0.3
    spread = counts.var(0)[likely] / p[likely]
    assert spread.mean() == pytest.approx(1.0, abs=0.03) and (abs(spread - 1) < 0.35).all()


def _multigraph(learned: ClusterParams, q: Tensor, k: Tensor, seed: int) -> np.ndarray:
    """How often each pair is drawn, before repeats become one edge."""
    from kernels.math.sbm_sampler import head_stream, row_rates

    sums = KeySums(learned, uniform=False).extend(k[0])
    found = rates(row_rates(q[0, 0], learned, 0, 0.0), sums.upto(k.shape[2]).expand(q.shape[2], -1))
    points = draw_points(row_streams(head_stream(seed, 0, 0), torch.arange(q.shape[2])), found)
    keys = Guide(sums.prefix(0, k.shape[2])).find(points.cluster, points.place)
    counts = np.zeros((q.shape[2], k.shape[2]))
    np.add.at(counts, (points.row.numpy(), keys.numpy()), 1)
    return counts


def released_pairing(
    rows: np.ndarray, affinity: np.ndarray, keys: np.ndarray, draw: np.random.Generator
) -> np.ndarray:
    """WRONG ON PURPOSE: the defect of the paper's released samplers, as it is described, not their code.

    Endpoints are drawn correctly for every pair of clusters (u, v). But sources are listed cluster by cluster
    u and destinations cluster by cluster v, and the two lists are joined place by place without bringing them
    into one order: a source of u meets a destination of whichever cluster stands at its place.
    """
    a, b = rows.sum(0), keys.sum(0)
    between = a[:, None] * affinity * b
    pairs = draw.multinomial(draw.poisson(between.sum()), (between / between.sum()).ravel()).reshape(
        between.shape
    )
    C = len(affinity)
    sources = [draw.choice(len(rows), pairs[u].sum(), p=rows[:, u] / a[u]) for u in range(C)]
    targets = [draw.choice(len(keys), pairs[:, v].sum(), p=keys[:, v] / b[v]) for v in range(C)]
    counts = np.zeros((len(rows), len(keys)))
    np.add.at(counts, (np.concatenate(sources), np.concatenate(targets)), 1)
    return counts


@pytest.mark.parametrize("affinity", [SWAP, CYCLE], ids=["swap", "cycle"])
def test_the_pairing_of_the_released_samplers_would_fail_the_same_test(affinity: np.ndarray) -> None:
    learned = plain(1, affinity)
    q, k = (tokens(1, TOKENS, 4, seed=seed)[0, 0].double().numpy() for seed in (1, 2))
    p = probabilities(q, k, learned, 0)
    rows, keys = (1 / (1 + np.exp(-(8 * x[:, :4] - 4))) for x in (q, k))
    np.testing.assert_allclose(rows @ affinity @ keys.T, p, rtol=1e-6)
    draw = np.random.default_rng(0)
    wrong = np.mean([released_pairing(rows, affinity, keys, draw) for _ in range(1500)], axis=0)
    right = np.mean([_multigraph(learned, *_tensors(q, k), seed) for seed in range(1500)], axis=0)
    assert frobenius(wrong, p) > 0.5
    assert frobenius(right, p) < 0.05
    aligned = np.mean([released_pairing(rows, np.eye(4), keys, draw) for _ in range(500)], axis=0)
    assert frobenius(aligned, rows @ keys.T) < 0.2, "a diagonal affinity hides the defect"


def _tensors(*arrays: np.ndarray) -> list[Tensor]:
    return [torch.from_numpy(x).float()[None, None] for x in arrays]


@pytest.mark.parametrize("expected", [0.05, 0.7, 3.0, 40.0, 700.0])
def test_rows_draw_poisson_many_points(expected: float) -> None:
    """Mean and variance are E; so are those of disjoint parts, which do not depend on each other."""
    num_rows = 4000
    b = torch.tensor([0.3, 0.0, 0.7]).double().expand(num_rows, 3)
    points = draw_points(row_streams(7, torch.arange(num_rows)), rates(torch.full_like(b, expected), b))
    assert not (points.cluster == 1).any(), "an empty cluster has no points"
    halves = [np.bincount(points.row[points.cluster == v].numpy(), minlength=num_rows) for v in (0, 2)]
    for counts, mean in ((halves[0], 0.3 * expected), (halves[1], 0.7 * expected), (sum(halves), expected)):
        assert abs(counts.mean() - mean) < 5 * math.sqrt(mean / num_rows)
        assert abs(counts.var() - mean) < 5 * math.sqrt((mean + 2 * mean**2) / num_rows)
    assert abs(np.corrcoef(*halves)[0, 1]) < 5 / math.sqrt(num_rows)
    places = points.place[points.cluster == 2] / 0.7
    assert abs(float(places.mean()) - 0.5) < 5 * math.sqrt(1 / 12 / len(places))


@both_directions
def test_edges_are_those_of_the_oracle_for_a_given_affinity(causal: bool) -> None:
    q, k, v = make_inputs(2, (4, 2), 90, 130, 12)
    learned = random_clusters(4, 12, 9, seed=3)
    affinity = torch.rand(4, 9, 9, generator=torch.Generator().manual_seed(0)) * 0.02
    learned = replace(learned, affinity=affinity)
    where: dict[str, Any] = {"start": 40, "causal": causal, "layer": 2, "seed": 9}
    want = edges({}, q.double().numpy(), k.double().numpy(), learned=learned, **where)
    np.testing.assert_array_equal(adjacency(q, k, learned, **where).numpy(), want)
    got = attend(q, k, v, backend="sbm", learned=learned, scale=scale_of(q), **where)
    out, lse = softmax_attention(q.numpy(), k.numpy(), v.numpy(), want, scale_of(q))
    np.testing.assert_allclose(got.out.numpy(), out, atol=2e-5)
    np.testing.assert_allclose(got.lse.numpy(), lse, atol=2e-5)  # type: ignore[union-attr]


@both_directions
def test_probabilities_of_one_give_dense_attention(causal: bool) -> None:
    q, k, v = make_inputs(1, (4, 2), 150, 150, 8)
    zero = torch.zeros(8)
    sure = ClusterParams(
        torch.ones(4, 2, 8), torch.eye(8), zero, torch.zeros(8, 8), zero, torch.ones(4, 2, 2)
    )
    common: dict[str, Any] = {"causal": causal, "scale": scale_of(q)}
    got = attend(q, k, v, backend="sbm", params={"sampler": "bernoulli"}, learned=sure, **common)
    want = attend(q, k, v, backend="exact", **common)
    torch.testing.assert_close(got.out, want.out, atol=1e-5, rtol=0)
    torch.testing.assert_close(got.lse, want.lse, atol=1e-5, rtol=0)
    assert got.stats.density == 1.0 and got.stats.dropped_mass == pytest.approx(0.0, abs=1e-5)


@samplers
@both_directions
def test_rows_without_an_edge_give_zeros_and_nothing_is_nan(sampler: str, causal: bool) -> None:
    q, k, v = make_inputs(2, (4, 2), 200, 200, 16)
    few = random_clusters(4, 16, 6, seed=1, density=0.004)
    none = replace(few, affinity=torch.zeros(4, 6, 6))
    for learned in (few, none):
        for rows in (slice(0, 200), slice(199, 200)):
            options: dict[str, Any] = {"params": {"sampler": sampler}, "causal": causal, "scale": 0.3}
            got = attend(q[:, :, rows], k, v, backend="sbm", learned=learned, **options)
            slow = attend(q[:, :, rows], k, v, backend="sbm", learned=learned, impl="reference", **options)
            torch.testing.assert_close(got.out, slow.out, atol=1e-5, rtol=0)
            torch.testing.assert_close(got.lse, slow.lse, atol=1e-5, rtol=0)
            assert got.lse is not None
            empty = got.lse == -math.inf
            assert torch.isfinite(got.out).all() and not torch.isnan(got.lse).any()
            assert (got.out[empty] == 0).all() and (got.out[~empty] != 0).any(-1).all()
            if rows.start == 0:
                assert empty.any() and (learned is few) == bool((~empty).any())
    assert got.stats.pairs_kept == 0 and got.stats.density == 0.0


@samplers
def test_chunks_decode_steps_and_the_whole_prefill_draw_the_same_edges(sampler: str) -> None:
    q, k, _ = make_inputs(1, (4, 2), 400, 400, 16)
    learned = random_clusters(4, 16, 6, seed=1, density=0.05)
    common: dict[str, Any] = {"params": {"sampler": sampler, "exploration": 0.01}, "seed": 3, "layer": 2}
    whole = adjacency(q, k, learned, causal=True, **common)
    for a, b in ((0, 1), (1, 65), (65, 128), (128, 129), (129, 399), (399, 400)):
        part = adjacency(q[:, :, a:b], k[:, :, :b], learned, causal=True, **common)
        assert torch.equal(part, whole[:, :, a:b, :b])
        spare = adjacency(q[:, :, a:b], k, learned, causal=True, start=a, **common)
        assert torch.equal(spare, whole[:, :, a:b]), "later keys that are there already move nothing"
    both = adjacency(q, k, learned, causal=False, **common)
    for a, b in ((0, 130), (130, 131), (131, 400)):
        assert torch.equal(adjacency(q[:, :, a:b], k, learned, start=a, **common), both[:, :, a:b])


def test_batch_mates_move_nothing() -> None:
    q, k, _ = make_inputs(3, (4, 2), 150, 150, 16)
    learned = random_clusters(4, 16, 6, seed=1, density=0.05)
    together = adjacency(q, k, learned, causal=True)
    for b in range(3):
        assert torch.equal(adjacency(q[b : b + 1], k[b : b + 1], learned, causal=True), together[b : b + 1])


@samplers
def test_seeds_layers_heads_and_places_draw_apart(sampler: str) -> None:
    q, k = tokens(2, 200, 4, seed=1), tokens(2, 200, 4, seed=2)
    learned, params = plain(2, 0.2 * UNEVEN), {"sampler": sampler}
    base = adjacency(q, k, learned, params=params)
    kept = float(base.double().mean())
    for other in (
        adjacency(q, k, learned, params=params, seed=1),
        adjacency(q, k, learned, params=params, layer=1),
        base.flip(1),
    ):
        shared = float((base & other).double().mean())
        assert 0 < shared < 0.5 * kept
    same = torch.zeros_like(q) + q[:, :, :1]
    rows = adjacency(same, k, learned, params=params)[0, 0]
    assert len(torch.unique(rows, dim=0)) > 150
    assert torch.equal(adjacency(q, k, learned, params=params), base)


@both_directions
def test_exploration_adds_to_every_probability(causal: bool) -> None:
    none = replace(random_clusters(40, 8, 3, seed=1), affinity=torch.zeros(40, 3, 3))
    q, k, _ = make_inputs(1, (40, 40), 60, 60, 8)
    pairs = 40 * (60 * 61 // 2 if causal else 3600)
    for amount in (0.02, 0.5):
        for sampler, want in (("poisson", 1 - math.exp(-amount)), ("bernoulli", amount)):
            params = {"sampler": sampler, "exploration": amount}
            got = run(q, k, none, causal, params=params).stats
            assert got.density == pytest.approx(want, abs=5 * math.sqrt(want * (1 - want) / pairs))
    assert run(q, k, none, causal).stats.pairs_kept == 0


@both_directions
def test_query_heads_have_clusters_of_their_own_over_the_keys_of_their_group(causal: bool) -> None:
    q, k, v = make_inputs(1, (6, 2), 120, 120, 16)
    learned = random_clusters(6, 16, 5, seed=4, density=0.1)
    common: dict[str, Any] = {"backend": "sbm", "causal": causal, "scale": 0.3}
    grouped = attend(q, k, v, learned=learned, **common)
    repeated = attend(q, *(x.repeat_interleave(3, 1) for x in (k, v)), learned=learned, **common)
    torch.testing.assert_close(grouped.out, repeated.out, atol=1e-6, rtol=0)
    assert grouped.stats.kept_per_head == repeated.stats.kept_per_head
    assert grouped.stats.kept_per_head is not None
    assert sum(grouped.stats.kept_per_head) == grouped.stats.pairs_kept
    moved = replace(learned, clusters=learned.clusters.clone())
    moved.clusters[4] += 1.0
    other = attend(q, k, v, learned=moved, **common)
    differs = [not torch.equal(grouped.out[0, h], other.out[0, h]) for h in range(6)]
    assert differs == [False, False, False, False, True, False]


def test_density_is_told_per_head() -> None:
    q, k = tokens(2, 300, 4, seed=1), tokens(2, 300, 4, seed=2)
    learned = plain(2, CYCLE)
    assert learned.affinity is not None
    learned = replace(learned, affinity=learned.affinity * torch.tensor([0.1, 0.4]).view(2, 1, 1))
    kept = run(q, k, learned).stats.kept_per_head
    assert kept is not None
    for h in range(2):
        p = probabilities(q[0, h].double().numpy(), k[0, h].double().numpy(), learned, h)
        assert kept[h] / 300**2 == pytest.approx(float((1 - np.exp(-p)).mean()), rel=0.05)


@pytest.mark.parametrize("members", ["even", "gaps", "one key", "single", "uneven"])
def test_points_at_the_borders_of_keys_belong_to_the_key_that_begins_there(members: str) -> None:
    num_keys = 1 if members == "single" else 1000
    widths = torch.rand(3, num_keys, generator=torch.Generator().manual_seed(2))
    if members == "even":
        widths = torch.full_like(widths, 0.5)
    elif members == "gaps":
        widths[:, 10:900] = 0.0
    elif members == "one key":
        widths = torch.zeros_like(widths)
        widths[:, 777] = 1.0
    elif members == "uneven":
        widths **= 30
    sums = _sums_of(widths)
    prefix = sums.prefix(0, num_keys)
    guide = Guide(prefix)
    for v in range(3):
        exact = prefix[v].numpy()
        inner = exact[:-1][exact[:-1] < exact[-1]]
        nudged = np.concatenate([np.nextafter(inner, np.inf), np.nextafter(exact[1:], 0)])
        random = np.random.default_rng(v).random(3000) * exact[-1]
        places = np.concatenate([inner, nudged, random])
        places = places[places < exact[-1]]
        want = np.searchsorted(exact[1:], places, side="right")
        assert (widths[v].numpy()[want] > 0).all()
        cluster, place = torch.full((len(places),), v), torch.from_numpy(places)
        np.testing.assert_array_equal(guide.find(cluster.int(), place).numpy(), want)
        some = slice(0, 4000, 3)
        found = sums.find(torch.zeros_like(cluster[some]), cluster[some], place[some], num_keys)
        np.testing.assert_array_equal(found.numpy(), want[some])


def _sums_of(widths: Tensor) -> KeySums:
    """Sums of given memberships [C, M] of one head."""
    C, num_keys = widths.shape
    sums = KeySums(random_clusters(1, 4, C, seed=0), uniform=False).extend(torch.zeros(1, num_keys, 4))
    sums.members[0, :, :num_keys] = widths
    whole = num_keys // SUM_KEYS
    blocks = widths[:, : whole * SUM_KEYS].double().view(C, whole, SUM_KEYS).cumsum(-1)[..., -1]
    sums.before[0, :, 1 : whole + 1] = blocks.cumsum(-1)
    return sums


def test_rounding_never_carries_a_point_beyond_the_keys_that_a_row_sees() -> None:
    b = torch.rand(2000, 5, generator=torch.Generator().manual_seed(1)).double() * 1e-3
    r = torch.rand(2000, 5, generator=torch.Generator().manual_seed(2)).double() * 1e5
    points = draw_points(row_streams(1, torch.arange(2000)), rates(r, b))
    assert (points.place >= 0).all()
    assert (points.place < b[points.row.long(), points.cluster.long()]).all()


def test_sums_over_many_keys_are_exact_to_fp64_and_the_same_in_any_chunks() -> None:
    num_keys = 50_000
    learned = random_clusters(2, 4, 3, seed=1)
    k = torch.randn(1, num_keys, 4, generator=torch.Generator().manual_seed(0))
    whole = KeySums(learned, uniform=False).extend(k)
    chunks = KeySums(learned, uniform=False)
    for stop in (1, 63, 64, 65, 1000, 1024, 30_000, 30_001, num_keys):
        chunks.extend(k[:, :stop])
    told = whole.members[1, 2, :num_keys].double().numpy()
    assert abs(float(whole.upto(num_keys)[1, 2]) - math.fsum(told)) < 1e-9
    prefix = whole.prefix(1, num_keys)
    for at in (0, 1, 63, 64, 65, 1024, 31_337, num_keys):
        assert torch.equal(chunks.upto(at), whole.upto(at))
        assert torch.equal(prefix[:, at], whole.upto(at)[1])


def test_kept_sums_spare_a_decoder_the_keys_it_knows_and_can_be_forgotten() -> None:
    q, k, v = make_inputs(1, (4, 2), 300, 300, 16)
    learned = random_clusters(4, 16, 6, seed=1, density=0.1)
    other = random_clusters(4, 16, 6, seed=2, density=0.3)
    kept = KeptStates()

    def step(a: int, b: int, given: ClusterParams, states: KeptStates | None) -> AttentionResult:
        segment = Segment(slice(0, b - a), k[:, :, :b], v[:, :, :b], start=a, seed=2, kept=states)
        packed = attend_packed(q[:, :, a:b], [segment], backend="sbm", causal=True, scale=0.3, learned=given)
        return AttentionResult(packed.out, None, packed.stats[0])

    flops = []
    for a, b in ((0, 200), (200, 201), (201, 202), (202, 300)):
        for given in (learned, other):
            got, want = step(a, b, given, kept), step(a, b, given, None)
            torch.testing.assert_close(got.out, want.out, atol=1e-6, rtol=0)
            flops.append((got.stats.other_flops, want.stats.other_flops))
    assert flops[2][0] * 20 < flops[2][1]
    kept.truncate(100)
    k[:, :, 100:] += 1.0
    torch.testing.assert_close(step(150, 300, learned, kept).out, step(150, 300, learned, None).out)
    assert kept.nbytes > 0


@samplers
def test_a_broken_key_is_drawn_often_and_felt_by_those_who_draw_it_alone(sampler: str) -> None:
    q, k, v = make_inputs(1, (4, 2), 200, 200, 16)
    learned = random_clusters(4, 16, 6, seed=1, density=0.05)
    k[:, :, 90] = math.nan
    want = edges(
        {"sampler": sampler}, q.numpy(), k.numpy(), start=0, causal=True, layer=0, seed=0, learned=learned
    )
    got = attend(q, k, v, backend="sbm", params={"sampler": sampler}, learned=learned, causal=True, scale=0.3)
    spoiled = ~torch.isfinite(got.out).all(-1)
    np.testing.assert_array_equal(spoiled.numpy(), want[..., 90])
    assert spoiled.any() and not spoiled.all()


def test_nothing_has_as_many_entries_as_there_are_pairs() -> None:
    num_tokens = 12_288
    q, k, v = make_inputs(1, (1, 1), num_tokens, num_tokens, 8)
    learned = random_clusters(1, 8, 4, seed=1, density=0.002)
    peak = peak_of_tensors(lambda: attend(q, k, v, backend="sbm", learned=learned, causal=False, scale=0.3))
    assert peak < num_tokens**2 / 8, "less than a bit per pair"


@samplers
@pytest.mark.parametrize(
    ("heads", "rows", "keys", "causal", "dtype"),
    [
        ((6, 3), 512, 3072, True, torch.float32),
        ((6, 6), 2048, 2048, False, torch.float32),
        ((6, 3), 1, 3072, True, torch.float32),
        ((6, 3), 512, 3072, True, torch.bfloat16),
    ],
)
def test_what_it_is_predicted_to_take_is_what_it_takes_with_the_most_clusters(
    sampler: str, heads: tuple[int, int], rows: int, keys: int, causal: bool, dtype: torch.dtype
) -> None:
    learned = random_clusters(heads[0], 32, MAX_CLUSTERS, seed=3)
    assert learned.affinities.numel() and learned.wide  # the model's, made once
    q, k, v = (x.to(dtype) for x in make_inputs(1, heads, rows, keys, 32))
    params = parse_params("sbm", {"sampler": sampler})
    told = load("sbm").workspace(params, CallShape(rows, keys, *heads, 32, 32, dtype.itemsize, causal))
    kept = KeptStates() if causal else None
    segment = Segment(slice(0, rows), k, v, keys - rows, kept=kept)
    peak = peak_of_tensors(
        lambda: attend_packed(
            q, [segment], backend="sbm", params=params, causal=causal, scale=0.2, learned=learned
        )
    )
    ratio = (told.live_bytes + told.cache_bytes) / (peak - q.numel() * dtype.itemsize)
    assert 0.95 < ratio < 1.9
    assert told.cache_bytes >= (kept.nbytes if kept else 0)


@pytest.mark.parametrize("case", ["some", "none", "all", "one row"])
def test_softmax_over_rows_of_unequal_edges_is_that_of_the_mask(case: str) -> None:
    num_rows = 1 if case == "one row" else 37
    q, k, v = (x[0, 0] for x in make_inputs(1, (1, 1), num_rows, 50, 16, 24))
    keep = torch.rand(num_rows, 50, generator=torch.Generator().manual_seed(1)) < 0.1
    keep[3 % num_rows] = case == "one row"
    keep = {"none": torch.zeros_like(keep), "all": torch.ones_like(keep)}.get(case, keep)
    ends = torch.nn.functional.pad(keep.sum(-1).cumsum(0), (1, 0))
    found = keep.nonzero()[:, 1].int()
    with np.errstate(all="ignore"):
        out, lse = softmax_attention(
            *(x[None, None].numpy() for x in (q, k, v)), keep.numpy()[None, None], 0.3
        )
    gathered = attend_ragged_rows(
        q, k[None], v[None], torch.zeros(num_rows, dtype=torch.long), ends, found, 0.3
    )
    for got in (attend_ragged(q, k, v, ends, found, 0.3), gathered):
        np.testing.assert_allclose(got[0].numpy(), np.nan_to_num(out[0, 0]), atol=1e-5)
        np.testing.assert_allclose(
            got[1].numpy(), np.nan_to_num(lse[0, 0], nan=-np.inf, neginf=-np.inf), atol=1e-5
        )


def test_repeats_are_removed_where_pair_numbers_pass_32_bits() -> None:
    num_rows, num_keys = 3000, 1_000_000
    row = torch.tensor([2999, 0, 2999, 5, 0], dtype=torch.int32)
    key = torch.tensor([999_999, 7, 999_999, 3, 0], dtype=torch.int32)
    found = distinct(row, key, num_rows, num_keys)
    assert found.keys.tolist() == [0, 7, 3, 999_999]
    assert found.ends.diff().nonzero()[:, 0].tolist() == [0, 5, 2999]


def test_stretches_of_rows_cover_all_of_them_and_stay_small() -> None:
    expected = torch.tensor([0.0, 50_000.0, 90_000.0, 10.0, 10**6, 3.0]).double()
    found = list(batches(expected))
    assert [s.start for s in found] == [0, *(s.stop for s in found[:-1])] and found[-1].stop == 6
    assert all(s.stop - s.start == 1 or float(expected[s].sum()) < 140_000 for s in found)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("clusters", torch.zeros(4, 5)),
        ("clusters", torch.zeros(4, MAX_CLUSTERS + 1, 8)),
        ("clusters", None),
        ("clusters", torch.full((4, 5, 8), math.nan)),
        ("w1", torch.zeros(8, 7)),
        ("b1", torch.zeros(7)),
        ("w2", torch.zeros(8)),
        ("b2", torch.zeros(8, dtype=torch.int64)),
        ("b2", torch.full((8,), math.inf)),
        ("affinity", torch.zeros(4, 5, 6)),
        ("affinity", torch.full((4, 5, 5), -0.1)),
        ("affinity", torch.ones(4, 5, 5)),
    ],
)
def test_parameters_of_a_wrong_shape_or_range_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field} must"):
        replace(random_clusters(4, 8, 5, seed=0), **{field: value})


def test_a_call_says_which_parameters_it_lacks() -> None:
    q, k, v = make_inputs(1, (4, 2), 10, 10, 8)
    common: dict[str, Any] = {"backend": "sbm", "causal": True, "scale": 1.0}
    with pytest.raises(Unsupported, match="a model must carry"):
        attend(q, k, v, **common)
    with pytest.raises(ValueError, match="learned must be"):
        attend(q, k, v, learned={"clusters": 1}, **common)
    for wrong in (random_clusters(2, 8, 5, seed=0), random_clusters(4, 16, 5, seed=0)):
        with pytest.raises(ValueError, match=r"learned\.clusters is for"):
            attend(q, k, v, learned=wrong, **common)


@pytest.mark.parametrize("density", [None, 0.003, 0.02, 0.5])
@pytest.mark.parametrize("num_clusters", [1, 16, 128])
def test_drawn_clusters_give_the_density_that_was_asked_for(density: float | None, num_clusters: int) -> None:
    learned = random_clusters(3, 32, num_clusters, seed=5, density=density)
    q, k, _ = make_inputs(1, (1, 1), 500, 500, 32)
    found = [
        probabilities(q[0, 0].double().numpy(), k[0, 0].double().numpy(), learned, h).mean() for h in range(3)
    ]
    assert np.mean(found) == pytest.approx(0.25 if density is None else density, rel=0.2)
    again = random_clusters(3, 32, num_clusters, seed=5, density=density)
    assert torch.equal(learned.clusters, again.clusters)
    assert not torch.equal(learned.clusters, random_clusters(3, 32, num_clusters, seed=6).clusters)


@pytest.mark.parametrize("density", [0.0, 1.0, -1.0, math.nan])
def test_a_density_outside_of_0_and_1_is_refused(density: float) -> None:
    with pytest.raises(ValueError, match="density must lie between"):
        random_clusters(1, 8, 2, seed=0, density=density)
