"""Steps: what they return, what they refuse, and that nothing advances when they fail."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from models.contract import Choice, Slice
from models.errors import NonFiniteOutput
from models.head import ROWS_AT_ONCE
from models.runner import Model
from tests.models.tiny import FAMILIES, VOCAB, bert, choice, close, llama, network, random_ids, serve


@pytest.fixture(scope="module")
def decoder() -> Model:
    return serve(network(llama), max_tokens=256)


@pytest.fixture(scope="module")
def encoder() -> Model:
    return serve(network(bert))


def whole(model: Model, ids: list[int], want: Any, **more: Any) -> Slice:
    return Slice(model.open(len(ids)), ids, choice(), want, len(ids), **more)


def reference_logits(made: Any, ids: list[int]) -> torch.Tensor:
    made.set_attn_implementation("eager")
    with torch.no_grad():
        logits: torch.Tensor = made(input_ids=torch.tensor([ids])).logits[0]
    return logits


@pytest.mark.parametrize("name", ["llama, grouped heads", "granite, scaled logits", "mixtral, experts"])
def test_logits_are_those_of_the_last_row_by_the_networks_own_head(name: str) -> None:
    made = network(FAMILIES[name])
    model = serve(made)
    sequences = [random_ids(n, seed=n) for n in (9, 30, 1)]
    results = model.step([whole(model, ids, "logits") for ids in sequences]).results
    for ids, result in zip(sequences, results, strict=True):
        assert result.logits is not None and result.logits.shape == (VOCAB,)
        assert close(result.logits, reference_logits(network(FAMILIES[name]), ids)[-1])


@pytest.mark.parametrize("n", [2, ROWS_AT_ONCE - 1 - 40, 200])
def test_scores_are_the_log_likelihood_of_the_targets_row_by_row(n: int, decoder: Model) -> None:
    ids = random_ids(n + 1)
    result = decoder.step([whole(decoder, ids[:-1], "scores", targets=ids[1:])]).results[0]
    logits = reference_logits(network(llama), ids[:-1])
    wanted = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert result.scores is not None and torch.allclose(result.scores, wanted, atol=1e-4)


def test_scores_in_several_pieces_equal_scores_at_once(
    decoder: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = random_ids(101)
    once = decoder.step([whole(decoder, ids[:-1], "scores", targets=ids[1:])]).results[0]
    monkeypatch.setattr("models.head.ROWS_AT_ONCE", 7)
    pieces = decoder.step([whole(decoder, ids[:-1], "scores", targets=ids[1:])]).results[0]
    assert close(pieces.scores, once.scores, 1e-5)


def test_a_prefill_chunk_returns_nothing_but_its_work(decoder: Model) -> None:
    result = decoder.step([whole(decoder, random_ids(12), "nothing")]).results[0]
    assert result.logits is None and result.scores is None and result.hidden is None
    assert result.work.pairs_exact == 3 * 6 * 12 * 13 // 2


def test_work_counts_pairs_of_applied_layers_and_flops_of_the_whole_forward(decoder: Model) -> None:
    n, window = 40, 5
    pick = choice("window", window=window)
    work = decoder.step([Slice(decoder.open(n), random_ids(n), pick, "logits", n)]).results[0].work
    exact_pairs, kept_pairs = n * (n + 1) // 2, sum(min(i + 1, window) for i in range(n))
    assert work.pairs_exact == 3 * 6 * exact_pairs
    assert work.pairs_kept == 3 * 6 * kept_pairs <= work.pairs_computed
    linear = 2 * n * 3 * (48 * 48 * 2 + 48 * 16 * 2 + 3 * 48 * 64) + 2 * 48 * VOCAB
    assert work.flops == pytest.approx(linear + 4 * 8 * work.pairs_computed)
    assert work.flops_exact == pytest.approx(linear + 4 * 8 * work.pairs_exact)
    assert work.impl and work.attention_ms >= work.selection_ms >= 0


def test_work_adds_up_over_chunks(decoder: Model) -> None:
    ids = random_ids(50)
    at_once = decoder.step([whole(decoder, ids, "logits")]).results[0].work
    state = decoder.open(50)
    chunked = decoder.step([Slice(state, ids[:20], choice(), "nothing", 50)]).results[0].work
    chunked.add(decoder.step([Slice(state, ids[20:], choice(), "logits", 50)]).results[0].work)
    assert chunked.pairs_exact == at_once.pairs_exact
    assert chunked.flops_exact == pytest.approx(at_once.flops_exact, rel=0.1)  # tiles fall differently


def test_the_cache_is_counted_to_the_byte_and_freed_on_close(decoder: Model) -> None:
    state = decoder.open(30)
    assert (state.length, state.held_bytes) == (0, 0)
    decoder.step([Slice(state, [5, 6], choice(), "nothing", 2)])
    assert state.length == 2 and state.held_bytes == 3 * 2 * 2 * 8 * 2 * 4
    state.close()
    state.close()
    assert state.held_bytes == 0
    with pytest.raises(ValueError, match="slice 0: its sequence is closed"):
        decoder.step([Slice(state, [5], choice(), "nothing", 3)])


def test_encoders_hold_no_cache(encoder: Model) -> None:
    state = encoder.open(10)
    encoder.step([Slice(state, random_ids(10), choice(), "hidden", 10)])
    assert state.length == 10 and state.held_bytes == 0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"token_ids": []}, "token_ids is empty"),
        ({"token_ids": [5, VOCAB]}, r"token_ids must lie in 0 \.\. 96"),
        ({"token_ids": [5, -1]}, r"token_ids must lie in 0 \.\. 96"),
        ({"token_ids": [5] * 9}, "9 tokens exceed the sequence's capacity of 8"),
        ({"want": "scores", "targets": [1]}, "targets has 1 entries for 2 token_ids"),
        ({"want": "scores", "targets": [1, VOCAB]}, r"targets must lie in 0 \.\. 96"),
    ],
)
def test_a_slice_that_cannot_run_is_named_with_its_limit(
    decoder: Model, change: dict[str, Any], told: str
) -> None:
    good, bad = decoder.open(8), decoder.open(8)
    slices = [Slice(good, [5, 6], choice(), "nothing", 2)]
    slices.append(replace(Slice(bad, [5, 6], choice(), "nothing", 2), **change))
    with pytest.raises(ValueError, match="slice 1: " + told):
        decoder.step(slices)
    assert good.length == bad.length == 0


def test_an_encoder_reads_a_sequence_at_once_and_has_no_head(encoder: Model) -> None:
    with pytest.raises(ValueError, match="in one step: 3 of 5"):
        encoder.step([Slice(encoder.open(8), [5, 6, 7], choice(), "hidden", 5)])
    with pytest.raises(ValueError, match="no language-model head"):
        encoder.step([whole(encoder, [5, 6, 7], "logits")])


def test_a_sequence_twice_in_a_step_is_refused(decoder: Model) -> None:
    state = decoder.open(8)
    with pytest.raises(ValueError, match="once in a step"):
        decoder.step([Slice(state, [5], choice(), "nothing", 2)] * 2)


@pytest.mark.parametrize("capacity", [0, -1, 257])
def test_capacity_has_the_models_limit(decoder: Model, capacity: int) -> None:
    with pytest.raises(ValueError, match="reads 1 to 256"):
        decoder.open(capacity)


def test_an_empty_step_does_nothing(decoder: Model) -> None:
    assert decoder.step([]).results == ()


def test_non_finite_output_names_the_slice_and_nothing_advances() -> None:
    made = network(llama)
    model = serve(made)
    made.model.embed_tokens.weight[11] = float("nan")
    slices = [whole(model, ids, "nothing") for ids in ([5, 6], [7, 11, 8], [9])]
    with pytest.raises(NonFiniteOutput, match="slice 1") as caught:
        model.step(slices)
    assert caught.value.index == 1
    assert [s.sequence.length for s in slices] == [0, 0, 0]
    again = model.step([slices[0], slices[2]]).results
    assert len(again) == 2 and slices[0].sequence.length == 2


def test_a_failed_step_leaves_the_next_one_as_if_it_had_not_been() -> None:
    made = network(llama)
    model = serve(made)
    ids = random_ids(20)
    wanted = model.step([whole(model, ids, "logits")]).results[0].logits
    state = model.open(20)
    model.step([Slice(state, ids[:10], choice(), "nothing", 20)])
    layer = made.model.layers[2]
    hook = layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError("out of memory")))
    with pytest.raises(MemoryError):
        model.step([Slice(state, ids[10:][::-1], choice(), "logits", 20)])
    hook.remove()
    assert state.length == 10
    assert close(model.step([Slice(state, ids[10:], choice(), "logits", 20)]).results[0].logits, wanted, 1e-5)


def test_unsupported_says_every_reason_in_words(decoder: Model) -> None:
    assert decoder.unsupported(choice("window", window=3)) == []
    assert "unknown attention backend 'nope'" in decoder.unsupported(Choice("nope", choice().params))[0]
    mixed = Choice("window", choice().params)
    assert decoder.unsupported(mixed) == ["backend 'window' takes WindowParams, got ExactParams"]


def test_the_config_never_carries_a_choice(decoder: Model) -> None:
    body = decoder._network.body
    before = body.config.to_dict()
    decoder.step([Slice(decoder.open(9), random_ids(9), choice("window", window=3), "hidden", 9)])
    assert body.config.to_dict() == before
