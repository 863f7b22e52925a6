"""A plan runs another attention in every layer, whatever runs beside it and however its prompt is cut; under
a guard no layer exceeds its budget by more than sampling lets through, and the answer's plan replays it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.registry
import models.stretches
from kernels.contract import AttentionResult, Backend, Call, Params
from kernels.registry import load as load_backend
from models.auto import LayerChoice
from models.contract import Choice, Kept, MeasuredError, Prompt, Slice, Verify
from models.errors import NonFiniteOutput
from models.planned import STRATUM, Planned, planned
from models.runner import Model
from tests.models.tiny import choice, close, gemma3, llama, modernbert, network, random_ids, serve

N = 1500
TILED = {"query_tile": 128, "block_size": 32, "budget": 64}
HALVES = [("sinks", {"sinks": 2, "window": 200}), ("exact", {}), ("pooled", TILED)]
ALL = Verify(rows="all")


@pytest.fixture(scope="module")
def model() -> Model:
    made = serve(network(lambda: llama(max_position_embeddings=2048)).double(), 2048)
    made.limit_cached(1 << 28)
    return made


@pytest.fixture(scope="module")
def encoder() -> Model:
    return serve(network(modernbert).double(), 2048)


def layers_of(model: Model, rungs: Sequence[tuple[str, dict[str, Any]]] = HALVES) -> list[LayerChoice]:
    return [LayerChoice(n, *rungs[i % len(rungs)]) for i, n in enumerate(model.info.applied_layers)]


def chunks(cut: Sequence[int], total: int) -> Iterator[slice]:
    stops = [*(stop for stop in cut if stop < total), total]
    yield from (slice(a, b) for a, b in zip([0, *stops], stops, strict=False))


def read(
    model: Model, ids: list[int], pick: Choice, cut: Sequence[int] = (), verify: Verify | None = None
) -> tuple[Tensor, tuple[Kept, ...], MeasuredError | None]:
    """Hidden states of the whole prompt, what its guard kept, and its measured error."""
    state, found = model.open(len(ids)), []
    meter = None if verify is None else model.meter(verify, pick, len(ids))
    for rows in chunks(cut, len(ids)):
        part = Slice(state, ids[rows], pick, "hidden", len(ids), meter=meter)
        hidden = model.step([part]).results[0].hidden
        assert hidden is not None
        found.append(hidden)
    state.close()
    return torch.cat(found), state.kept, None if meter is None else meter.measured()


def replayed(layers: Sequence[LayerChoice], kept: Sequence[Kept], seed: int = 0) -> Planned:
    pairs = zip(layers, kept, strict=True)
    return planned([replace(each, exact_from=seen.exact_from) for each, seen in pairs], seed=seed)


@pytest.mark.parametrize("backend, params", HALVES)
def test_a_plan_of_one_attention_is_that_attention(
    model: Model, backend: str, params: dict[str, Any]
) -> None:
    ids = random_ids(400)
    uniform = planned(layers_of(model, [(backend, params)]))
    assert torch.equal(read(model, ids, uniform)[0], read(model, ids, choice(backend, **params))[0])


def test_each_layer_runs_its_own(model: Model) -> None:
    """The error that a meter finds is zero in the layers that are exact, and only there."""
    error = read(model, random_ids(600), planned(layers_of(model)), verify=ALL)[2]
    assert error is not None
    assert [each.estimate > 0 for each in error.layers] == [True, False, True]


def test_a_networks_own_local_layers_keep_their_window() -> None:
    hybrid = serve(network(lambda: gemma3(max_position_embeddings=512)).double(), 512)
    assert len(hybrid.info.applied_layers) < hybrid.info.num_layers
    exact = planned([LayerChoice(n, "exact") for n in hybrid.info.applied_layers])
    ids = random_ids(300)
    assert torch.equal(read(hybrid, ids, exact)[0], read(hybrid, ids, choice())[0])


def test_plans_share_steps_with_other_requests(model: Model) -> None:
    """Two plans, exact, a window and a decoding sequence in one step: each as it is alone."""
    other = layers_of(model, [*HALVES[1:], HALVES[0]])
    picks = [planned(layers_of(model)), choice(), planned(other, max_error=0.01), choice("window", window=9)]
    texts = [random_ids(STRATUM * 2, seed) for seed in range(len(picks))]
    states = [model.open(len(ids)) for ids in texts]
    slices = [Slice(s, i, p, "hidden", len(i)) for s, i, p in zip(states, texts, picks, strict=True)]
    for result, ids, pick in zip(model.step(slices).results, texts, picks, strict=True):
        assert close(result.hidden, read(model, ids, pick)[0], 1e-9), pick


def test_rows_behind_a_border_are_exact(model: Model) -> None:
    ids, border = random_ids(700), STRATUM
    layers = [replace(each, exact_from=border) for each in layers_of(model)]
    error = read(model, ids[:border], planned(layers), verify=ALL)[2]
    whole = read(model, ids, planned(layers), verify=ALL)[2]
    assert error is not None and whole is not None
    assert all(0 < b.estimate < a.estimate for a, b in zip(error.layers[::2], whole.layers[::2], strict=True))
    for cut in ([border], [128, 384, 512], [640]):
        assert close(read(model, ids, planned(layers), cut)[0], read(model, ids, planned(layers))[0], 1e-9)


@pytest.mark.parametrize("max_error", [0.003, 0.03, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_a_guarded_prompt_is_the_same_in_whatever_chunks(model: Model, max_error: float, seed: int) -> None:
    ids = random_ids(N, seed)
    pick = planned(layers_of(model), seed=seed, max_error=max_error)
    whole, kept, _ = read(model, ids, pick)
    for cut in ([STRATUM], [2 * STRATUM, 5 * STRATUM], range(STRATUM, N, STRATUM)):
        found, seen, _ = read(model, ids, pick, cut)
        assert [each.exact_from for each in seen] == [each.exact_from for each in kept]
        assert [each.rows for each in seen] == [each.rows for each in kept]
        assert close(found, whole, 1e-9)


@pytest.mark.parametrize("served", ["model", "encoder"])
@pytest.mark.parametrize("max_error", [0.003, 0.03, 0.2])
def test_the_plan_with_its_repairs_gives_the_same_answer(
    served: str, max_error: float, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(served)
    ids, layers = random_ids(N, 5), layers_of(model)
    guarded, kept, _ = read(model, ids, planned(layers, max_error=max_error))
    again, nothing, _ = read(model, ids, replayed(layers, kept))
    assert close(again, guarded, 1e-9) and nothing == ()


@pytest.mark.parametrize("served", ["model", "encoder"])
@pytest.mark.parametrize("max_error", [0.003, 0.03, 0.1])
def test_a_layer_that_is_repaired_keeps_its_budget(
    served: str, max_error: float, request: pytest.FixtureRequest
) -> None:
    """These errors are even enough for the rows that are looked at: all rows are within a tenth of it."""
    model = request.getfixturevalue(served)
    _, kept, error = read(model, random_ids(N, 3), planned(layers_of(model), max_error=max_error), verify=ALL)
    assert error is not None
    assert max(each.estimate for each in error.layers) <= 1.1 * max_error
    for seen, true in zip(kept, error.layers, strict=True):
        assert seen.layer == true.layer
        assert seen.estimate == pytest.approx(true.estimate, rel=0.35, abs=0.03)
    if max_error < 0.01:
        assert any(each.exact_from is not None for each in kept)


def test_a_budget_that_nothing_exceeds_repairs_nothing(model: Model) -> None:
    kept = read(model, random_ids(600), planned(layers_of(model), max_error=1.0))[1]
    assert [each.exact_from for each in kept] == [None] * 3
    assert [each.rows > 0 for each in kept] == [True, False, True]


def test_a_forward_that_is_left_repairs_the_same(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    pick, ids = planned(layers_of(model), max_error=0.02), random_ids(N, 7)
    wanted, kept, _ = read(model, ids, pick)
    monkeypatch.setattr(models.stretches, "STRETCH_FLOPS", 2e6)
    monkeypatch.setattr(models.stretches, "DENSE_ROWS", 128)
    state = model.open(N)
    forward = model.begin([Slice(state, ids, pick, "hidden", N)])
    result, pauses = None, 0
    while result is None:
        result = forward.advance(lambda: True)
        pauses += 1
    assert pauses > 10
    assert close(result.results[0].hidden, wanted, 1e-9)
    assert [each.exact_from for each in state.kept] == [each.exact_from for each in kept]


def test_rows_behind_a_repair_are_exact_where_a_forward_may_be_left(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the short stretch at the end, for which the call before it would have had room."""
    params, total = {"sinks": 2, "window": 100}, 2 * STRATUM + 100
    pick, ids = planned(layers_of(model, [("sinks", params)]), max_error=0.2), random_ids(total, 7)
    wanted, kept, _ = read(model, ids, pick)
    assert any(each.exact_from == STRATUM for each in kept)
    flops = model.flops(total, 0, choice("sinks", **params), "nothing").attention / 3
    monkeypatch.setattr(models.stretches, "STRETCH_FLOPS", 0.7 * flops)
    monkeypatch.setattr(models.stretches, "DENSE_ROWS", 128)
    state = model.open(total)
    result = model.begin([Slice(state, ids, pick, "hidden", total)]).advance(lambda: False)
    assert result is not None and close(result.results[0].hidden, wanted, 1e-9)
    assert [each.exact_from for each in state.kept] == [each.exact_from for each in kept]


@pytest.mark.parametrize("max_error", [0.05, 0.1, 0.15])
def test_errors_before_a_repair_are_measured(model: Model, max_error: float) -> None:
    """As in the replay, where the rows before it are a call of their own."""
    ids, layers = random_ids(N, 5), layers_of(model, [("sinks", {"sinks": 2, "window": 200})])
    _, kept, error = read(model, ids, planned(layers, max_error=max_error), verify=ALL)
    assert all(each.exact_from in (STRATUM, 2 * STRATUM) for each in kept)
    _, _, again = read(model, ids, replayed(layers, kept), verify=ALL)
    assert error is not None and again is not None
    for one, other in zip(error.layers, again.layers, strict=True):
        assert one.estimate == pytest.approx(other.estimate, rel=1e-6) and one.estimate > 0


@pytest.mark.parametrize("seed", range(4))
def test_a_repair_does_not_cut_a_query_tile(model: Model, seed: int) -> None:
    """The rows of a tile before it would choose other keys in the replay."""
    params = {"query_tile": 512, "num_verticals": 32, "num_slashes": 2}
    ids, layers = random_ids(N, seed), layers_of(model, [("vertical_slash", params)])
    pick = planned(layers, seed=seed, max_error=0.04)
    guarded, kept, _ = read(model, ids, pick)
    assert any(each.exact_from is not None for each in kept)
    assert all(each.exact_from is None or each.exact_from % 512 == 0 for each in kept)
    again = replayed(layers, kept, seed)
    assert model.unsupported(again) == [] and close(read(model, ids, again)[0], guarded, 1e-9)
    assert close(read(model, ids, pick, [512])[0], guarded, 1e-9)
    askew = planned([replace(each, exact_from=STRATUM) for each in layers])
    assert model.unsupported(askew) == ["exact_from is 256: exact rows begin at multiples of 512"]


@pytest.mark.parametrize(
    "rung",
    [
        ("nystrom", {"num_landmarks": 16}),
        ("lsh", {"variant": "smyrf", "cluster_size": 16, "window": 8}),
        ("scatterbrain", {"support": "lsh", "support_params": {"variant": "smyrf", "cluster_size": 16}}),
    ],
    ids=lambda rung: rung[0],
)
def test_what_looks_at_all_rows_together_is_repaired_whole(
    encoder: Model, rung: tuple[str, dict[str, Any]]
) -> None:
    """The rows before a repair would be others without the rows behind it."""
    ids, layers = random_ids(900, 2), layers_of(encoder, [rung])
    guarded, kept, _ = read(encoder, ids, planned(layers, max_error=0.05))
    assert {each.exact_from for each in kept} <= {None, 0}
    assert any(each.exact_from == 0 for each in kept)
    assert close(read(encoder, ids, replayed(layers, kept))[0], guarded, 1e-9)
    (told,) = encoder.unsupported(planned([replace(each, exact_from=STRATUM) for each in layers]))
    assert told == (
        "exact_from is 256: an attention that looks at all rows together is exact from 0 or nowhere"
    )


def test_a_fork_of_a_guarded_prompt_goes_on_under_what_its_guard_has_seen(model: Model) -> None:
    pick, ids = planned(layers_of(model), max_error=0.02), random_ids(N, 7)
    wanted, kept, _ = read(model, ids, pick)
    assert any(each.exact_from is not None for each in kept)
    state, cut = model.open(N), 4 * STRATUM
    model.step([Slice(state, ids[:cut], pick, "nothing", N)])
    before, fork = state.kept, model.fork(state, N)
    assert fork.kept == before
    rest = model.step([Slice(fork, ids[cut:], pick, "hidden", N)]).results[0].hidden
    assert rest is not None and close(rest, wanted[cut:], 1e-9)
    assert [each.exact_from for each in fork.kept] == [each.exact_from for each in kept]
    assert state.kept == before != fork.kept


def test_a_first_step_that_fails_leaves_no_guard(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another plan may read the prompt then."""
    ids, state = random_ids(300), model.open(300)
    with monkeypatch.context() as patched:
        patched.setattr(model._network.body.layers[2].mlp, "forward", lambda x: x / 0.0 * 0.0)
        with pytest.raises(NonFiniteOutput):
            model.step([Slice(state, ids, planned(layers_of(model), max_error=0.1), "nothing", 300)])
    assert state.kept == ()
    model.step([Slice(state, ids, planned(layers_of(model), max_error=0.2), "nothing", 300)])
    assert len(state.kept) == 3


def test_a_step_that_fails_leaves_the_guard_as_it_was(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    pick, ids = planned(layers_of(model), max_error=0.02), random_ids(3 * STRATUM, 2)
    _, wanted, _ = read(model, ids, pick, [STRATUM])
    state = model.open(len(ids))
    model.step([Slice(state, ids[:STRATUM], pick, "nothing", len(ids))])
    before = state.kept
    layer = model._network.body.layers[2]
    with monkeypatch.context() as patched:
        patched.setattr(layer.mlp, "forward", lambda x: x / 0.0 * 0.0)
        with pytest.raises(NonFiniteOutput):
            model.step([Slice(state, ids[STRATUM:], pick, "hidden", len(ids))])
    assert state.kept == before
    model.step([Slice(state, ids[STRATUM:], pick, "nothing", len(ids))])
    assert state.kept == wanted


def test_prompts_share_what_a_replayed_plan_has_read(model: Model) -> None:
    """A guarded one shares nothing: what it repairs depends on the whole prompt."""
    ids, layers = random_ids(900, 11), layers_of(model)
    for pick, shared in ((planned(layers), 896), (planned(layers, max_error=0.1), 0)):
        prompt = Prompt(ids, pick, "a salt of its own")
        state = model.open(len(ids), prompt)
        first = model.step([Slice(state, ids, pick, "hidden", len(ids))]).results[0].hidden
        state.close()
        assert model.cached_tokens(prompt) == shared
        again = model.open(len(ids), prompt)
        rest = model.step([Slice(again, ids[shared:], pick, "hidden", len(ids))]).results[0].hidden
        assert first is not None and close(rest, first[shared:], 1e-9)
        again.close()


def test_a_plan_that_does_not_fit_the_model_is_refused_with_the_reason(model: Model) -> None:
    short = planned(layers_of(model)[:2])
    assert model.unsupported(short) == ["the plan has 2 layers, 'tiny' has 3"]
    askew = planned([replace(each, exact_from=300) for each in layers_of(model)])
    assert model.unsupported(askew) == ["exact_from is 300: exact rows begin at multiples of 256"]
    [reason] = model.unsupported(planned([LayerChoice(n, "sbm") for n in range(3)]))
    assert "sbm" in reason
    assert model.unsupported(planned(layers_of(model), max_error=0.1)) == []
    blind = replace(model._network, places=["nothing is known"] * 3)
    told = Model(blind, model.info, None).unsupported(planned(layers_of(model), max_error=0.1))
    assert told == ["the output projection of layer 0 is not known: nothing is known"]
    assert Model(blind, model.info, None).unsupported(planned(layers_of(model))) == []


def test_a_guarded_prompt_is_refused_where_it_is_not_read_in_strata(model: Model) -> None:
    pick, ids = planned(layers_of(model), max_error=0.1), random_ids(600)
    state = model.open(700)
    for part, total, told in (
        (ids[:100], 600, "whole strata of 256"),
        (ids, 500, "reads the prompt alone"),
    ):
        with pytest.raises(ValueError, match=told):
            model.step([Slice(state, part, pick, "nothing", total)])
    begun = model.open(700)
    model.step([Slice(begun, ids[:STRATUM], choice(), "nothing", 600)])
    with pytest.raises(ValueError, match="256 tokens were read without its guard"):
        model.step([Slice(begun, ids[STRATUM:], pick, "nothing", 600)])
    model.step([Slice(state, ids[:STRATUM], pick, "nothing", 600)])
    other = planned(layers_of(model), max_error=0.2)
    with pytest.raises(ValueError, match="under another plan"):
        model.step([Slice(state, ids[STRATUM:], other, "nothing", 600)])


def test_what_a_plan_takes_is_predicted_layer_by_layer(model: Model) -> None:
    plain = [model.flops(512, 1024, choice(name, **params), "nothing") for name, params in HALVES]
    mixed = model.flops(512, 1024, planned(layers_of(model)), "nothing")
    assert mixed.attention == pytest.approx(sum(each.attention for each in plain) / 3)
    assert mixed.linear == plain[0].linear
    sizes = [model.estimate_bytes(1500, 0, choice(name, **params), 512) for name, params in HALVES]
    assert max(sizes) <= 1.01 * model.estimate_bytes(1500, 0, planned(layers_of(model)), 512)


@pytest.mark.parametrize("served", ["model", "encoder"])
def test_exact_rows_of_a_replayed_plan_are_priced_as_exact(
    served: str, request: pytest.FixtureRequest
) -> None:
    model, total = request.getfixturevalue(served), 1024
    sinks = {"sinks": 2, "window": 100}
    layers = layers_of(model, [("sinks", sinks)])

    def attention(pick: Choice, rows: int = total, start: int = 0) -> float:
        return float(model.flops(rows, start, pick, "nothing").attention)

    def behind(row: int) -> Choice:
        return planned([replace(each, exact_from=row) for each in layers])

    plain, dear = choice("sinks", **sinks), choice()
    assert attention(behind(0)) == attention(dear) and attention(behind(total)) == attention(plain)
    if model.info.causal:
        assert attention(behind(512)) == pytest.approx(
            attention(plain, 512) + attention(dear, total - 512, 512)
        )
        assert attention(behind(512), 256, 256) == attention(plain, 256, 256)
        assert attention(behind(512), 256, 768) == attention(dear, 256, 768)
    else:
        assert attention(behind(512)) == pytest.approx((attention(plain) + attention(dear)) / 2)


def test_a_repairs_own_answer_is_foreseen(model: Model) -> None:
    """While it is computed, what it replaces is there too."""
    whole = model.estimate_bytes(1500, 0, choice(), 1500)
    layers = layers_of(model, [("sinks", {"sinks": 2, "window": 16})])
    answer = 1500 * 6 * model._network.plan.layers[0].shape.value_dim * 8
    assert model.estimate_bytes(1500, 0, planned(layers, max_error=0.1), 1500) >= whole + answer


def test_work_counts_what_ran(model: Model) -> None:
    """Rows that were repaired count as exact's; what had been computed of them for nothing counts too."""
    ids, flops = random_ids(N, 3), {}
    for max_error in (1e-9, 0.1, 1.0):
        pick, state = planned(layers_of(model), max_error=max_error), model.open(N)
        work = model.step([Slice(state, ids, pick, "nothing", N)]).results[0].work
        per_layer = 6 * N * (N + 1) // 2
        assert work.pairs_exact == 3 * per_layer and work.pairs_kept <= work.pairs_exact
        flops[max_error] = work.flops
        first = [each.exact_from for each in state.kept]
        if max_error == 1.0:
            assert first == [None] * 3 and work.flops < work.flops_exact
        if max_error < 1e-6:
            assert first[1] is None and max(first[0] or 0, first[2] or 0) <= STRATUM
            assert work.pairs_kept > 0.95 * work.pairs_exact and work.flops > work.flops_exact
        state.close()
    assert flops[1e-9] > flops[0.1] > flops[1.0]


def test_heads_are_counted_up_to_a_repair(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact rows have no heads that choose apart, wherever a forward may be left."""
    monkeypatch.setattr(models.stretches, "STRETCH_FLOPS", 8e6)
    monkeypatch.setattr(models.stretches, "DENSE_ROWS", 128)
    hashed = {"cluster_size": 16, "window": 100, "sinks": 2, "num_buckets": 8, "centre_keys": 16}
    pick, ids = planned(layers_of(model, [("lsh", hashed)]), max_error=0.3), random_ids(N, 5)
    for left in (False, True):
        state = model.open(N)
        part = Slice(state, ids, pick, "nothing", N)
        result = model.begin([part]).advance(lambda: False) if left else model.step([part])
        assert result is not None
        work, rows = result.results[0].work, [each.exact_from for each in state.kept]
        assert any(each for each in rows) and work.exact_per_head
        for layer, exact in work.exact_per_head.items():
            border = N if rows[layer] is None else rows[layer]
            assert border and exact == border * (border + 1) // 2
            assert all(kept <= exact for kept in work.kept_per_head[layer])


class BlindParams(Params):
    """The double's: which block of 64 keys it does not see."""

    block: int = 3


def _blind(q: Tensor, k: Tensor, v: Tensor, params: BlindParams, call: Call) -> AttentionResult:
    """Exact attention that drops one block of keys."""
    exact = load_backend("exact")
    kept = torch.ones(k.shape[2], dtype=torch.bool)
    kept[64 * params.block : 64 * (params.block + 1)] = False
    rows = torch.arange(call.start, call.start + q.shape[2])[:, None]
    seen = kept & (torch.arange(k.shape[2]) <= rows)
    whole = exact.impls["torch"](q, k, v, exact.params(), call)
    groups = q.shape[1] // k.shape[1]
    scores = call.scale * q @ k.repeat_interleave(groups, 1).mT
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num()
    out = weights @ v.repeat_interleave(groups, 1)
    lost = q.shape[1] * int((~seen & (torch.arange(k.shape[2]) <= rows)).sum())
    stats = replace(whole.stats, pairs_kept=whole.stats.pairs_exact - lost, dropped_mass=None)
    return AttentionResult(out, None, stats)


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend that is exact but for one block of keys, under the name ``blind``."""
    double: Backend = replace(
        load_backend("exact"), name="blind", params=BlindParams, impls={"torch": _blind}, decode=None
    )
    for module in (kernels.registry, kernels.api, models.members, models.planned, models.step, models.runner):
        real = module.__dict__.get("load") or module.__dict__.get("load_backend")
        name = "load" if "load" in module.__dict__ else "load_backend"
        monkeypatch.setattr(module, name, lambda name, real=real: double if name == "blind" else real(name))
    return "blind"


def test_a_backend_that_drops_a_block_of_keys_is_caught_and_repaired(model: Model, blind: str) -> None:
    """All its rows from that block on are wrong: ``verify`` sees it from its rows, and ``auto`` keeps the
    budget all the same."""
    ids, rungs = random_ids(N, 8), [("blind", {}), ("exact", {})]
    wrong = planned(layers_of(model, rungs))
    all_rows = read(model, ids, wrong, verify=ALL)[2]
    sampled = read(model, ids, wrong, verify=Verify())[2]
    assert all_rows is not None and sampled is not None
    for seen, true in zip(sampled.layers, all_rows.layers, strict=True):
        assert (seen.estimate > 0) == (true.estimate > 0)
        assert seen.estimate == pytest.approx(true.estimate, rel=0.3)
    budget = all_rows.layers[0].estimate / 3
    _, kept, error = read(model, ids, planned(layers_of(model, rungs), max_error=budget), verify=ALL)
    assert error is not None
    assert kept[0].exact_from is not None and kept[1].exact_from is None
    assert max(each.estimate for each in error.layers) <= 1.1 * budget
