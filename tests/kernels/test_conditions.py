"""The masks of the backends as graphs: against brute force, and against the values measured for the paper."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from kernels import Unsupported, api, describe
from kernels.api import InvalidParams, attend, backend_names
from kernels.conditions import Conditions, NoMask, conditions, directions, mask, why_no_mask
from kernels.contract import Backend, Capabilities, Params, Workspace
from kernels.drawing import demonstration_params
from kernels.math.graph import Pattern, hamiltonian_path, has_self_loops, layers_to_cover
from kernels.registry import UnknownBackend, load
from tests.kernels.kernel_cases import CASES, Case, both_directions, case_id
from tests.kernels.kernel_oracle import kept_keys

MASKED = [name for name in backend_names() if why_no_mask(name) is None]
SELECTIONS = {name: load(name).capabilities.selection for name in MASKED}
FIXED_CASES = [case for case in CASES if SELECTIONS.get(case[0]) == "none"]


def of(backend: str, num_tokens: int, *, causal: bool = False, seed: int = 0, **params: Any) -> Conditions:
    return conditions(backend, params, num_tokens=num_tokens, causal=causal, seed=seed)


def random_patterns(rng: np.random.Generator, p: int, n: int, loops: bool) -> list[Pattern]:
    share = rng.uniform(0.05, 0.6)
    return [(rng.random((n, n)) < share) | (loops & np.eye(n, dtype=bool)) for _ in range(p)]


def paths_by_force(patterns: Sequence[Pattern]) -> bool:
    """Every order of the tokens, tried."""
    n = len(patterns[0])
    seen_by = {(a, b) for a in range(n) for b in range(n) if any(A[b, a] for A in patterns)}
    return any(
        all(step in seen_by for step in itertools.pairwise(order))
        for order in itertools.permutations(range(n))
    )


def sets_by_layer(patterns: Sequence[Pattern]) -> Iterator[list[set[int]]]:
    """S^1, S^2, ... by the definition, in Python sets."""
    rows = [[{j for j in range(len(A)) if A[k, j]} for k in range(len(A))] for A in patterns]
    reached = rows[0]
    for t in itertools.count(2):
        yield reached
        reached = [set().union(*(reached[j] for j in keys)) for keys in rows[(t - 1) % len(rows)]]


def depth_by_force(patterns: Sequence[Pattern]) -> int | None:
    n = len(patterns[0])
    bound = len(patterns) * (n * n + n)
    for t, reached in enumerate(itertools.islice(sets_by_layer(patterns), bound), start=1):
        if all(len(keys) == n for keys in reached):
            return t
    return None


@pytest.mark.parametrize("case", FIXED_CASES, ids=case_id)
@both_directions
@pytest.mark.parametrize(("num_tokens", "layer", "seed"), [(1, 0, 0), (67, 1, 5), (130, 2, 9)])
def test_a_mask_holds_the_keys_of_the_definition(
    case: Case, causal: bool, num_tokens: int, layer: int, seed: int
) -> None:
    kept = mask(*case, num_tokens, causal, layer=layer, seed=seed, heads=2)
    assert kept.dtype == torch.bool and kept.shape == (2, num_tokens, num_tokens)
    for head in range(2):
        for i in range(0, num_tokens, 7):
            options: dict[str, Any] = {"i": i, "num_keys": num_tokens, "causal": causal, "layer": layer}
            expected = kept_keys(*case, **options, head=head, key_head=head, seed=seed)
            assert set(kept[head, i].nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("name", MASKED)
@both_directions
def test_a_mask_counts_the_pairs_that_attention_reports(name: str, causal: bool) -> None:
    params = api.parse_params(name)
    if causal not in directions(name, params).values():
        with pytest.raises(Unsupported):
            mask(name, params, 300, causal, heads=1)
        return
    kept = mask(name, params, 300, causal, heads=2, seed=3)
    if causal:
        assert not kept.triu(1).any()
    if load(name).capabilities.selection == "none":
        noise = torch.randn(3, 1, 2, 300, 16, generator=torch.Generator().manual_seed(1))
        stats = attend(*noise, backend=name, causal=causal, scale=0.25, seed=3).stats
        assert int(kept.sum()) == stats.pairs_kept
    assert torch.equal(kept, mask(name, params, 300, causal, heads=2, seed=3))


@pytest.mark.parametrize("name", [name for name, selection in SELECTIONS.items() if selection != "none"])
def test_a_choice_by_data_is_the_one_of_the_reference(name: str) -> None:
    params = demonstration_params(name, 600)
    for causal in directions(name, params).values():
        kept = mask(name, params, 600, causal, heads=1, seed=2)
        generator = torch.Generator().manual_seed(2)
        q, k = torch.randn(2, 1, 1, 600, 16, generator=generator)
        identity, options = torch.eye(600)[None, None], {"causal": causal, "scale": 0.25, "seed": 2}
        weights = attend(q, k, identity, backend=name, params=params, impl="reference", **options).out
        assert torch.equal(kept, weights[0] > 0) and not kept.all()


def test_a_remainder_does_not_fill_the_mask() -> None:
    merging = [name for name in MASKED if "remainder" in load(name).params.model_fields]
    for name in merging:
        small = (
            {"query_tile": 128, "block_size": 32} if "query_tile" in load(name).params.model_fields else {}
        )
        budget = {"budget": 32} if "budget" in load(name).params.model_fields else {}
        merged = mask(name, {**small, **budget, "remainder": "mean"}, 512, True, heads=1)
        assert torch.equal(merged, mask(name, {**small, **budget}, 512, True, heads=1))


@pytest.mark.parametrize(
    ("backend", "params", "sparsity", "s"),
    [
        ("strided", {"combine": "union"}, [87.6], 3),
        ("strided", {"combine": "sequential"}, [93.5, 93.8], 3),
        ("strided", {"combine": "multihead"}, [87.6], 3),
        ("fixed", {"combine": "union"}, [87.9], 2),
        ("fixed", {"combine": "sequential"}, [93.8, 93.4], 2),
        ("fixed", {"combine": "multihead"}, [87.9], 2),
        ("star", {"window": 1}, [98.1], 2),
    ],
)
@pytest.mark.parametrize(("num_tokens", "w"), [(64, 8), (256, 16)])
def test_the_patterns_of_the_paper_have_the_measured_sparsity_and_s(
    backend: str, params: dict[str, Any], sparsity: list[float], s: int, num_tokens: int, w: int
) -> None:
    found = of(backend, num_tokens, **(params if backend == "star" else {"stride": w, **params}))
    assert (found.self_loops, found.hamiltonian_path, found.s) == (True, "true", s)
    if num_tokens == 256:
        percent = [100 * (1 - pairs / 256**2) for pairs in found.nnz]
        assert percent == pytest.approx(sparsity, abs=0.0501)


def test_the_star_of_the_paper_has_5n_minus_4_pairs() -> None:
    for num_tokens in (5, 64, 256):
        assert of("star", num_tokens, window=1).nnz == (5 * num_tokens - 4,)


@pytest.mark.parametrize(
    ("backend", "params"),
    [
        ("star", {"window": 4}),
        ("window", {"window": 4, "global_tokens": 1}),
        ("bigbird", {"window": 4, "global_tokens": 1, "num_random": 3, "block_size": 1}),
    ],
)
@pytest.mark.parametrize("num_tokens", [64, 256])
def test_one_token_that_sees_and_is_seen_by_all_makes_two_layers_enough(
    backend: str, params: dict[str, Any], num_tokens: int
) -> None:
    found = of(backend, num_tokens, **params)
    assert (found.self_loops, found.hamiltonian_path, found.s) == (True, "true", 2)


@pytest.mark.parametrize(("num_tokens", "a", "s"), [(64, 4, 16), (256, 8, 32), (1024, 8, 128)])
def test_a_window_alone_crosses_the_text_in_n_minus_1_over_a_layers(num_tokens: int, a: int, s: int) -> None:
    assert of("window", num_tokens, window=a).s == s == -(-(num_tokens - 1) // a)
    assert of("sinks", num_tokens, window=a, sinks=1).s == s


@pytest.mark.parametrize("num_tokens", [16, 64])
def test_random_keys_need_a_search_for_the_path_and_about_four_layers(num_tokens: int) -> None:
    found = []
    for seed in range(12):
        kept = mask("random", {"num_random": int(num_tokens**0.5)}, num_tokens, False, seed=seed, heads=1)[0]
        assert not kept.diagonal(1).all() and not kept.diagonal(-1).all()
        each = of("random", num_tokens, num_random=int(num_tokens**0.5), seed=seed)
        assert each.self_loops and each.one_example and not each.data_dependent
        found.append(each)
    depths = sorted(each.s for each in found if each.s is not None)
    assert 4 in depths and depths[len(depths) // 2] in (4, 5)
    assert sum(each.hamiltonian_path == "true" for each in found) > len(found) // 2
    assert all(each.hamiltonian_path != "unknown" for each in found)


@pytest.mark.parametrize(("num_tokens", "w"), [(64, 8), (256, 16)])
def test_s_depends_on_the_order_of_the_patterns_and_on_the_width_of_the_band(num_tokens: int, w: int) -> None:
    """What no params express: fixed and strided begin with their first pattern, strided's band is w // 2."""
    everything = np.ones((num_tokens, num_tokens), dtype=bool)

    def swapped(backend: str) -> list[Pattern]:
        params = {"stride": w, "combine": "sequential"}
        return [mask(backend, params, num_tokens, False, layer=layer, heads=1)[0].numpy() for layer in (1, 2)]

    assert layers_to_cover(swapped("fixed"), everything) == 3
    assert layers_to_cover(swapped("strided"), everything) == 3
    i = np.arange(num_tokens)
    wide = abs(i[:, None] - i) <= w
    assert layers_to_cover([wide, swapped("strided")[0]], everything) == 2


def test_a_cut_last_block_of_fixed_is_seen_by_nobody_outside_it() -> None:
    for combine in ("union", "sequential", "multihead"):
        assert of("fixed", 250, stride=16, combine=combine).s is None
        assert of("fixed", 256, stride=16, combine=combine).s == 2


@pytest.mark.parametrize("combine", ["union", "sequential", "multihead"])
@pytest.mark.parametrize(("num_tokens", "w"), [(9, 2), (17, 3), (50, 7), (50, 64), (100, 8)])
def test_strided_needs_three_layers_at_most_at_any_length(combine: str, num_tokens: int, w: int) -> None:
    found = of("strided", num_tokens, stride=w, combine=combine)
    assert found.hamiltonian_path == "true" and found.s is not None and found.s <= 3


def test_layers_that_take_turns_are_patterns_and_heads_that_differ_are_united() -> None:
    turns = of("strided", 64, stride=8, combine="sequential")
    assert (turns.num_patterns, turns.num_heads, turns.nnz) == (2, 1, (556, 512))
    heads = of("strided", 64, stride=8, combine="multihead")
    union = of("strided", 64, stride=8, combine="union")
    assert (heads.num_patterns, heads.num_heads, heads.nnz) == (1, 2, union.nnz)
    assert heads.density == turns.density == (556 + 512) / 2 / 64**2 < union.density == union.nnz[0] / 64**2


@pytest.mark.parametrize("name", MASKED)
def test_density_is_the_share_that_attention_reports(name: str) -> None:
    if load(name).capabilities.selection != "none":
        assert conditions(name, num_tokens=300, causal=True).data_dependent
        return
    q = torch.zeros(1, 1, 300, 4)
    for causal in (True, False):
        stats = attend(q, q, q, backend=name, causal=causal, scale=1.0).stats
        assert conditions(name, num_tokens=300, causal=causal).density == pytest.approx(
            stats.density, rel=1e-12
        )


@pytest.mark.parametrize("backend", ["window", "strided", "fixed", "bigbird"])
def test_s_layers_of_attention_depend_on_every_token_and_one_layer_less_does_not(backend: str) -> None:
    small = {"bigbird": {"window": 3, "global_tokens": 0, "num_random": 2, "block_size": 1}}
    params = small.get(backend) or ({"window": 5} if backend == "window" else {"stride": 8})
    s = of(backend, 64, **params).s
    assert s is not None and s > 1
    q, values = torch.zeros(1, 1, 64, 1), torch.eye(64, dtype=torch.float64).expand(1, 1, 64, 64)
    for t in range(1, s + 1):
        values = attend(
            q.double(), q.double(), values, backend=backend, params=params, causal=False, scale=1.0
        ).out
        assert bool((values > 0).all()) == (t == s)


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("loops", [True, False])
def test_small_random_graphs_agree_with_brute_force(p: int, loops: bool) -> None:
    rng = np.random.default_rng([p, loops])
    answers = set()
    for n in [1, 2, 3, 4, 5, 6] * 25 + [7] * 4:
        patterns = random_patterns(rng, p, n, loops)
        everything = np.ones((n, n), dtype=bool)
        assert has_self_loops(patterns) == all(A[k, k] for A in patterns for k in range(n))
        assert layers_to_cover(patterns, everything) == depth_by_force(patterns)
        path = hamiltonian_path(patterns)
        assert path == ("true" if paths_by_force(patterns) else "false")
        answers.add(path)
    assert answers == {"true", "false"}


def test_a_graph_of_eight_tokens_with_one_hidden_path_is_decided() -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        order = rng.permutation(8)
        sees = np.zeros((8, 8), dtype=bool)
        sees[order[1:], order[:-1]] = True
        assert hamiltonian_path([sees]) == "true"
        sees[order[4], order[3]] = False
        assert hamiltonian_path([sees]) == "false"


def test_causal_patterns_are_decided_exactly_at_any_size() -> None:
    rng = np.random.default_rng(3)
    for n in (2, 5, 40, 300):
        A = np.tril(rng.random((n, n)) < 0.5) | np.eye(n, dtype=bool)
        A[np.arange(1, n), np.arange(n - 1)] = True
        assert hamiltonian_path([A]) == hamiltonian_path([A.T]) == "true"
        missing = rng.integers(1, n)
        A[missing, missing - 1] = False
        assert hamiltonian_path([A]) == hamiltonian_path([A.T]) == "false"


def test_a_path_may_take_its_steps_from_different_patterns() -> None:
    even, odd = np.eye(6, dtype=bool), np.eye(6, dtype=bool)
    even[[2, 4], [1, 3]] = odd[[1, 3, 5], [0, 2, 4]] = True
    assert hamiltonian_path([even, odd]) == "true"
    assert hamiltonian_path([even]) == hamiltonian_path([odd]) == "false"


def test_what_no_path_can_pass_is_told_without_a_search() -> None:
    apart = np.kron(np.eye(2, dtype=bool), np.ones((300, 300), dtype=bool))
    alone = np.ones((600, 600), dtype=bool)
    alone[7] = alone[:, 7] = False
    two_sources = np.ones((600, 600), dtype=bool)
    two_sources[[3, 9]] = False
    for sees in (apart, alone, two_sources, two_sources.T):
        shuffle = np.random.default_rng(0).permutation(600)
        assert hamiltonian_path([sees[shuffle][:, shuffle]], max_steps=0) == "false"


def test_a_search_that_runs_out_of_steps_says_unknown() -> None:
    """No path, and nothing short of a search tells: three groups that meet in two tokens."""
    bridges, groups = [0, 1], [range(2, 8), range(8, 14), range(14, 20), range(20, 26)]
    sees = np.zeros((26, 26), dtype=bool)
    for group in groups:
        members = [*bridges, *group]
        sees[np.ix_(members, members)] = True
    sees[1, 0] = sees[0, 1] = False
    shuffle = np.random.default_rng(1).permutation(26)
    sees = sees[shuffle][:, shuffle]
    assert hamiltonian_path([sees], max_steps=200) == "unknown"
    small = [each for group in groups for each in group[:1]]
    tiny = sees[np.ix_(np.argsort(shuffle)[[*bridges, *small]], np.argsort(shuffle)[[*bridges, *small]])]
    assert hamiltonian_path([tiny]) == "false"


def test_large_unions_do_not_overflow() -> None:
    """256 and 512 ways from one token to another: a sum in 8 bits would be 0."""
    for n in (256, 512, 1024):
        first, last = np.eye(n, dtype=bool), np.eye(n, dtype=bool)
        first[:, 0] = last[0] = True
        assert layers_to_cover([last | first], np.ones((n, n), dtype=bool)) == 2
        assert layers_to_cover([np.ones((n, n), dtype=bool)], np.ones((n, n), dtype=bool)) == 1


def test_graphs_that_turn_for_ever_are_infinite() -> None:
    cycle = np.roll(np.eye(12, dtype=bool), 1, axis=1)
    everything = np.ones((12, 12), dtype=bool)
    assert layers_to_cover([cycle], everything) is None
    assert layers_to_cover([cycle | np.eye(12, dtype=bool)], everything) == 11
    chord = cycle.copy()
    chord[0, 2] = True
    assert layers_to_cover([chord], everything) == depth_by_force([chord]) is not None


@pytest.mark.parametrize("name", MASKED)
def test_no_causal_model_has_a_finite_s(name: str) -> None:
    params = load(name).params()
    if True not in directions(name, params).values():
        return
    found = conditions(name, num_tokens=257, causal=True)
    assert found.s is None and found.self_loops
    assert found.hamiltonian_path in ("true", "false")
    alone = conditions(name, num_tokens=1, causal=True)
    assert (alone.s, alone.causal_s, alone.hamiltonian_path, alone.density) == (1, 1, "true", 1.0)


def test_a_causal_model_reaches_what_lies_before_it_in_causal_s_layers() -> None:
    assert of("exact", 100, causal=True).causal_s == 1
    assert of("window", 100, causal=True, window=2).causal_s == 99
    assert of("window", 100, causal=True, window=10).causal_s == 11
    assert of("strided", 256, causal=True, stride=16).causal_s == 2
    assert of("window", 100, causal=True, window=1, global_tokens=1).causal_s is None
    assert of("window", 100, window=10).causal_s is None


@pytest.mark.parametrize("num_tokens", [0, -1, 4097])
def test_a_length_out_of_range_is_told_with_its_limit(num_tokens: int) -> None:
    with pytest.raises(ValueError, match=rf"num_tokens must lie in 1 .. 4096, got {num_tokens}"):
        conditions("exact", num_tokens=num_tokens, causal=True)
    with pytest.raises(ValueError, match=r"1 .. 4096"):
        mask("exact", None, num_tokens, True, heads=1)


def test_what_attend_refuses_is_refused() -> None:
    with pytest.raises(InvalidParams, match="stride"):
        of("strided", 64, stride=1)
    with pytest.raises(UnknownBackend):
        of("nope", 64)


@pytest.mark.parametrize("name", MASKED)
def test_a_description_holds_the_conditions_at_the_defaults(name: str) -> None:
    graph = describe(name)["graph"]
    assert json.loads(json.dumps(graph)) == graph and graph["num_tokens"] == api.GRAPH_TOKENS
    for direction, causal in (("bidirectional", False), ("causal", True)):
        if graph[direction] is None:
            assert not getattr(load(name).capabilities, direction)
            continue
        assert graph[direction] == conditions(name, num_tokens=api.GRAPH_TOKENS, causal=causal).as_json()
    graph.clear()
    assert describe(name)["graph"], "a caller's changes stay the caller's"
    assert "graph" not in describe(name, graph=False)


def toy(**capabilities: Any) -> Backend:
    """``exact`` under other capabilities."""
    able = {"causal": True, "bidirectional": True, "decode": True, "exact": False, "selection": "row"}
    return Backend(
        name="toy",
        summary="",
        paper="",
        params=Params,
        capabilities=Capabilities(**able | capabilities),
        impls=load("exact").impls,
        workspace=lambda params, shape: Workspace(0),
    )


@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        ("approximates", "it approximates the pairs that it does not keep"),
        ("learned", "decided by parameters that a model must carry for it"),
    ],
)
def test_a_backend_without_a_mask_says_why_and_its_description_has_no_graph(
    capability: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = toy(**{capability: True})
    for module in ("kernels.api", "kernels.conditions"):
        monkeypatch.setattr(f"{module}.load", lambda name: method)
    api._graph.cache_clear()
    told = describe("toy")
    api._graph.cache_clear()
    assert told["graph"] is None and json.loads(json.dumps(told)) == told
    assert told["capabilities"][capability] is True
    for refused in (
        lambda: mask("toy", None, 64, True, heads=1),
        lambda: conditions("toy", num_tokens=64, causal=True),
    ):
        with pytest.raises(NoMask, match=f"attention backend 'toy' has no mask: .*{reason}"):
            refused()


def test_those_without_a_mask_are_those_that_approximate_or_must_be_learned() -> None:
    able = {name: load(name).capabilities for name in backend_names()}
    assert [name for name in able if name not in MASKED] == [
        name for name, each in able.items() if each.approximates or each.learned
    ]
    for name in backend_names():
        assert (describe(name)["graph"] is None) == (name not in MASKED)


def test_a_direction_that_a_backend_has_not_is_null(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = load("exact")
    one_way = Backend(
        name="one_way",
        summary="",
        paper="",
        params=Params,
        capabilities=Capabilities(
            causal=True, bidirectional=False, decode=True, exact=True, selection="none"
        ),
        impls=exact.impls,
        workspace=lambda params, shape: Workspace(0),
    )
    for module in ("kernels.api", "kernels.conditions"):
        monkeypatch.setattr(f"{module}.load", lambda name: one_way)
    told = describe("one_way")["graph"]
    assert told["bidirectional"] is None and told["causal"]["density"] == 1.0


def test_the_prose_of_the_backends_agrees_with_what_is_computed() -> None:
    """The sentences of ``Backend.conditions``, where they give a number."""
    for combine in ("union", "sequential", "multihead"):
        assert of("strided", 300, stride=20, combine=combine).s == 3
        assert of("fixed", 300, stride=20, combine=combine).s == 2
    assert of("star", 300).s == 2
    assert of("bigbird", 300, window=4, global_tokens=1, num_random=4, block_size=1).s == 2
    assert of("window", 300, window=10).s == 30 and of("window", 300, window=10, global_tokens=1).s == 2
    assert of("sinks", 300, window=10, sinks=4).s == 30
