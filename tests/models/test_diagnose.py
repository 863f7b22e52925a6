"""Diagnoses of tiny random networks: figures against transformers' own attention, and arms against the
published curves."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from models.contract import Slice
from models.diagnose_model import DiagnosingModel, can_diagnose, diagnosis_of
from models.diagnose_regime import recommend, regime_of
from models.diagnose_told import MAX_TOKENS, Asked, BudgetFigures, Candidate, Diagnosis
from models.errors import NonFiniteOutput
from models.runner import Model
from models.seam import NAME
from tests.models import tiny

TAKEN_APART = (
    "llama, grouped heads",
    "qwen2, half its layers local",
    "qwen3, normed queries and keys",
    "granite, scaled logits",
    "mixtral, experts",
    "phi3, longrope",
    "bert",
    "roberta, positions behind the padding index",
    "nomic",
)
WITH_PATHS = tuple(name for name in TAKEN_APART if name != "phi3, longrope")


def made(name: str) -> Model:
    return tiny.serve(tiny.network(tiny.FAMILIES[name]))


def asked(model: Model, **more: Any) -> Asked:
    few = {"budget": 16, "arm_tokens": 20, **more}
    return Asked(model.info.applied_layers, tiny.choice("sinks", window=8), **few)


def diagnosed(model: Model, tokens: int = 40, **more: Any) -> Diagnosis:
    return diagnosis_of(model, tiny.random_ids(tokens), asked(model, **more))


def probabilities(network: Any, ids: list[int]) -> list[Tensor]:
    """[H, N, N] fp64 of every layer, by transformers' own eager attention."""
    network.set_attn_implementation("eager")
    body = network if network.get_output_embeddings() is None else network.base_model
    with torch.no_grad():
        found = body(input_ids=torch.tensor([ids]), output_attentions=True).attentions
    network.set_attn_implementation(NAME)
    return [layer[0].double() for layer in found]


@pytest.mark.parametrize("name", ["llama, grouped heads", "qwen3, normed queries and keys", "bert"])
def test_entropy_and_mass_are_those_of_the_networks_own_attention(name: str) -> None:
    network = tiny.network(tiny.FAMILIES[name])
    model, ids = tiny.serve(network), tiny.random_ids(40)
    found = diagnosis_of(model, ids, asked(model, rows=64))
    assert found.rows == tuple(range(40))
    sinks = torch.arange(40)
    near = (sinks[:, None] - sinks).abs() < 8 if model.info.causal else (sinks[:, None] - sinks).abs() <= 8
    kept = near | (sinks < 4)
    for layer, rows in zip(found.layers, probabilities(network, ids), strict=True):
        for head, p in zip(layer.heads, rows, strict=True):
            nats = torch.special.entr(p).sum(-1)
            assert head.entropy == pytest.approx(nats.mean().item(), abs=1e-4)
            assert head.kept_mass == pytest.approx((p * kept).sum(-1).mean().item(), abs=1e-4)
            heaviest = p.sort(-1, descending=True).values.cumsum(-1)
            counts = (heaviest < 0.9).sum(-1) + 1
            assert head.keys_for_mass["0.9"] == pytest.approx(counts.double().mean().item(), abs=0.2)


def test_ranks_never_exceed_head_dim_and_errors_are_shares() -> None:
    found = diagnosed(made("llama, grouped heads"))
    for layer in found.layers:
        assert layer.errors is not None and len(layer.heads) == 6
        for head in layer.heads:
            assert 1 <= head.effective_rank <= 8
            assert head.rank_ratio == head.effective_rank / 8
            assert head.low_rank_bottleneck == (head.rank_ratio >= 0.9)
            assert head.errors is not None
            for error in (head.errors.sparse, head.errors.low_rank, head.errors.both):
                assert 0 <= error <= 1


@pytest.mark.parametrize("name", ["llama, grouped heads", "gemma3, hybrid", "modernbert, hybrid", "bert"])
def test_looking_changes_nothing_of_what_the_network_computes(name: str) -> None:
    model, ids = made(name), tiny.random_ids(40)
    before = tiny.read(model, ids, tiny.choice())
    first = diagnosis_of(model, ids, asked(model))
    assert torch.equal(tiny.read(model, ids, tiny.choice()), before)
    assert diagnosis_of(model, ids, asked(model)) == first
    assert not any(m._forward_hooks for m in model._network.body.modules())


def test_local_layers_are_read_as_they_are_and_not_looked_at() -> None:
    model = made("gemma3, hybrid")
    assert [layer.layer for layer in diagnosed(model).layers] == list(model.info.applied_layers)


def test_one_layer_may_be_asked_for_alone() -> None:
    model = made("llama, grouped heads")
    whole = diagnosed(model)
    alone = diagnosis_of(model, tiny.random_ids(40), replace(asked(model), layers=(1,)))
    assert [layer.layer for layer in alone.layers] == [1]
    assert alone.layers[0] == whole.layers[1]


@pytest.mark.parametrize("name", TAKEN_APART)
def test_networks_that_are_taken_apart_equal_themselves(name: str) -> None:
    """The arm ``full`` is checked against the network's own output before any arm is told."""
    collapse = diagnosed(made(name)).rank_collapse
    assert collapse.arms_reason is None and collapse.arms is not None
    assert [arm.name for arm in collapse.arms] == ["attention", "attention+skip", "attention+mlp", "full"]
    assert len({arm.residuals[0] for arm in collapse.arms}) == 1


@pytest.mark.parametrize("name", WITH_PATHS)
def test_paths_of_a_real_network_sum_to_its_output(name: str) -> None:
    paths = diagnosed(made(name)).rank_collapse.paths
    assert paths is not None
    assert paths.sum_error < 1e-5
    layers = len(paths.lengths) - 1
    assert paths.lengths[0].num_paths == 1 and paths.lengths[layers].num_paths > 1


@pytest.mark.parametrize("make", [tiny.bert, tiny.llama])
def test_in_fp64_the_sum_is_exact(make: Any) -> None:
    """Rotary angles and Llama's norms stay in fp32 whatever the weights are."""
    model = tiny.serve(tiny.network(lambda: make().double()))
    paths = diagnosed(model).rank_collapse.paths
    assert paths is not None
    assert paths.sum_error < (1e-12 if make is tiny.bert else 1e-6)


@pytest.mark.parametrize("make", [tiny.bert, tiny.llama])
def test_in_narrow_dtypes_paths_are_summed_too(make: Any) -> None:
    model = tiny.serve(tiny.network(lambda: make().bfloat16()))
    collapse = diagnosed(model).rank_collapse
    assert collapse.paths is not None, collapse.paths_reason


def test_arms_and_paths_are_in_the_estimate_of_memory() -> None:
    """Every layer's probabilities and a few copies of the paths' terms exist at once."""
    model = made("llama, grouped heads")

    def estimate(arm_tokens: int) -> int:
        job = DiagnosingModel(model, asked(model, arm_tokens=arm_tokens, rows=16))
        return job.estimate_bytes(60, 0, tiny.choice(), 60)

    layers, heads, width = 3, 6, model._network.sizes.hidden_size
    least = 60 * 60 * heads * layers * 4 + 2 * 60 * (layers + 1) * width * 8
    assert estimate(60) > least and estimate(60) > estimate(0)


def test_hybrid_networks_that_carry_clusters_are_looked_at_in_their_own_layers() -> None:
    model = tiny.carrying(made("gemma3, hybrid"))
    support = tiny.choice("sbm")
    found = diagnosis_of(model, tiny.random_ids(40), replace(asked(model), support=support))
    assert [layer.layer for layer in found.layers] == list(model.info.applied_layers)


def test_numbers_that_overflow_are_told_as_such() -> None:
    model = made("llama, grouped heads")
    with torch.no_grad():
        model._network.body.layers[1].self_attn.q_proj.weight.fill_(math.inf)
    with pytest.raises(NonFiniteOutput, match="of layer 1"):
        diagnosed(model)


@pytest.mark.parametrize(
    ("name", "said"), [("gemma3, hybrid", "taken apart, the network's output is"), ("gpt2", "GPT2Block")]
)
def test_networks_of_another_form_say_so_and_have_no_arms(name: str, said: str) -> None:
    full = next(family for family in tiny.FAMILIES if family.startswith(name))
    collapse = diagnosed(made(full)).rank_collapse
    assert collapse.arms is None and collapse.paths is None
    assert collapse.arms_reason is not None and said in collapse.arms_reason
    assert collapse.residuals is not None


def test_no_arms_are_run_where_none_are_asked_for() -> None:
    collapse = diagnosed(made("bert"), arm_tokens=0).rank_collapse
    assert collapse.arms is None and collapse.arms_reason == "arm_tokens is 0"


def test_a_random_network_collapses_without_skips_as_published() -> None:
    """BERT-base at random (arXiv 2103.03404): attention alone .61, .018, 7e-7; with skips .45 and more at the
    last layer. Here fp64, so the curve goes on falling."""
    config = {**tiny.WIDTH, "hidden_size": 96, "num_hidden_layers": 8}

    def build() -> Any:
        return hf.BertModel(hf.BertConfig(**config), add_pooling_layer=False).double()

    arms = diagnosed(tiny.serve(tiny.network(build)), 60, arm_tokens=60).rank_collapse.arms
    assert arms is not None
    curves = {arm.name: arm.residuals for arm in arms}
    for name in ("attention", "attention+mlp"):
        alone = curves[name]
        assert alone[1] < 0.1 and alone[2] < 1e-4 and alone[4] < 1e-10
        assert math.log(alone[2]) / math.log(alone[1]) > 1.8
    assert min(curves["attention+skip"]) > 0.3
    assert curves["full"][8] > 0.2


def test_bad_questions_are_refused_with_the_limit() -> None:
    model = made("gemma3, hybrid")
    with pytest.raises(ValueError, match="attention can be chosen in layers 5"):
        diagnosis_of(model, [5, 6], replace(asked(model), layers=(0,)))
    with pytest.raises(ValueError, match="4,096"):
        diagnosis_of(model, [5] * (MAX_TOKENS + 1), asked(model))
    with pytest.raises(ValueError, match="arm_tokens is 9999"):
        diagnosis_of(model, [5, 6], replace(asked(model), arm_tokens=9999))


@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_texts_as_short_as_can_be_are_diagnosed(tokens: int) -> None:
    for name in ("llama, grouped heads", "bert"):
        found = diagnosed(made(name), tokens)
        assert found.tokens == tokens
        if tokens < 16:
            assert found.regime is None and found.recommended["backend"] == "exact"


def test_a_diagnosis_left_between_its_parts_finds_the_same() -> None:
    model, ids = made("llama, grouped heads"), tiny.random_ids(40)
    diagnosing = DiagnosingModel(model, asked(model))
    assert can_diagnose(model) and not can_diagnose(diagnosing)
    state = diagnosing.open(40)
    forward = diagnosing.begin([Slice(state, ids, tiny.choice(), "nothing", total=40)])
    other, pauses = model.open(30), 0
    while forward.advance(lambda: True) is None:
        pauses += 1
        if pauses % 40 == 0:
            model.step([Slice(other, [7], tiny.choice(), "hidden", total=1)])
    assert pauses > 100
    assert state.found == diagnosis_of(model, ids, asked(model))
    clean = model.open(30)
    for _ in range(other.length):
        model.step([Slice(clean, [7], tiny.choice(), "nothing", total=1)])
    last = [
        model.step([Slice(s, [7], tiny.choice(), "hidden", total=1)]).results[0].hidden
        for s in (other, clean)
    ]
    assert tiny.close(last[0], last[1])


def test_two_diagnoses_of_one_model_in_turns_find_the_same() -> None:
    model, texts = made("llama, grouped heads"), (tiny.random_ids(40), tiny.random_ids(25, seed=1))
    begun = []
    for ids in texts:
        diagnosing = DiagnosingModel(model, asked(model))
        state = diagnosing.open(len(ids))
        forward = diagnosing.begin([Slice(state, ids, tiny.choice(), "nothing", total=len(ids))])
        begun.append((state, forward))
    left = [forward for _, forward in begun]
    while left:
        left = [forward for forward in left if forward.advance(lambda: True) is None]
    for ids, (state, _) in zip(texts, begun, strict=True):
        assert state.found == diagnosis_of(model, ids, asked(model))


def test_a_diagnosis_given_up_leaves_the_model_as_it_was() -> None:
    model, ids = made("llama, grouped heads"), tiny.random_ids(40)
    before = tiny.read(model, ids, tiny.choice())
    diagnosing = DiagnosingModel(model, asked(model))
    forward = diagnosing.begin([Slice(diagnosing.open(40), ids, tiny.choice(), "nothing", total=40)])
    for _ in range(30):
        assert forward.advance(lambda: True) is None
    forward.close()
    assert not any(m._forward_hooks for m in model._network.body.modules())
    assert torch.equal(tiny.read(model, ids, tiny.choice()), before)


def test_only_whole_texts_are_diagnosed() -> None:
    model = made("bert")
    diagnosing = DiagnosingModel(model, asked(model))
    with pytest.raises(ValueError, match="whole text"):
        diagnosing.begin([Slice(diagnosing.open(4), [5, 6], tiny.choice(), "nothing", total=4)])


@pytest.mark.parametrize(
    ("errors", "regime"),
    [
        ((0.1, 0.0, 0.0), "sparse"),
        ((0.11, 0.1, 0.0), "low-rank"),
        ((0.2, 0.2, 0.05), "both"),
        ((0.2, 0.2, 0.2), "neither"),
    ],
)
def test_regimes_follow_the_stated_rule(errors: tuple[float, float, float], regime: str) -> None:
    assert regime_of(BudgetFigures(*errors), 0.1) == regime
    assert regime_of(None, 0.1) is None


def candidate(name: str, kept: float | None, density: float) -> Candidate:
    return Candidate({"backend": name, "params": {}}, kept, None, 0.5, density)


def test_a_sparse_head_gets_the_least_dense_candidate_that_keeps_its_mass() -> None:
    question = Asked((0,), tiny.choice("sinks"))
    measured = [candidate("sinks", 0.8, 0.1), candidate("pooled", 0.95, 0.3), candidate("lsh", 0.99, 0.4)]
    spec, why = recommend("sparse", measured, [c.kept_mass for c in measured], question)
    assert spec["backend"] == "pooled" and "95.0%" in why
    spec, why = recommend("sparse", measured[:1], [0.8], question)
    assert spec["backend"] == "exact" and "80.0%" in why
    spec, _ = recommend("low-rank", [candidate("performer", None, 0.0)], [None], question)
    assert spec["backend"] == "performer"
    spec, why = recommend("both", [], [], question)
    assert spec["backend"] == "exact" and "scatterbrain" in why


@pytest.mark.parametrize("name", ["llama, grouped heads", "bert"])
def test_every_recommended_spec_can_be_run(name: str) -> None:
    model = made(name)
    found = diagnosed(model, budget=8)
    for spec in [found.recommended, *(head.recommended for layer in found.layers for head in layer.heads)]:
        chosen = tiny.choice(spec["backend"], spec.get("seed", 0), **spec["params"])
        assert model.unsupported(chosen) == []
