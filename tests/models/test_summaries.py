"""Attention that chooses key blocks, through a whole network: block summaries beside the cache, what the work
says of the choice, and budgets that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from models.contract import Choice, Slice, Work
from models.kv_cache import Cache
from models.runner import Model
from models.sequence import OpenSequence
from tests.models.tiny import FAMILIES, bert, choice, close, llama, network, random_ids, serve

TOKENS = 420
SMALL: dict[str, Any] = {"query_tile": 128, "block_size": 32, "budget": 64}


@pytest.fixture(scope="module")
def made() -> Any:
    return network(lambda: llama(max_position_embeddings=512))


@pytest.fixture(scope="module")
def decoder(made: Any) -> Model:
    return serve(made, 512)


def read_on(model: Model, state: OpenSequence, ids: list[int], wanted: Choice, stops: list[int]) -> Tensor:
    """Logits after the last token of ``ids``, read in steps that end at ``stops``."""
    logits = None
    for stop in stops:
        part = ids[state.length : stop]
        logits = model.step([Slice(state, part, wanted, "logits", len(ids))]).results[0].logits
    assert logits is not None
    return logits


CHUNKS = [128, 384, *range(385, TOKENS + 1)]


@pytest.mark.parametrize("remainder", ["none", "mean"])
def test_a_result_never_depends_on_what_is_kept_beside_the_cache(
    decoder: Model, monkeypatch: pytest.MonkeyPatch, remainder: str
) -> None:
    ids, wanted = random_ids(TOKENS), choice("pages", **SMALL, remainder=remainder)
    kept = read_on(decoder, decoder.open(TOKENS), ids, wanted, CHUNKS)
    monkeypatch.setattr(Cache, "summaries", lambda self, layer: None)
    alone = read_on(decoder, decoder.open(TOKENS), ids, wanted, CHUNKS)
    assert torch.equal(kept, alone)
    exact = read_on(decoder, decoder.open(TOKENS), ids, choice(), CHUNKS)
    assert not close(kept, exact, 1e-3), "the choice leaves something out, or this proves nothing"


def test_summaries_are_counted_with_the_cache_and_go_with_it(decoder: Model) -> None:
    ids = random_ids(TOKENS)
    plain, pages = decoder.open(TOKENS), decoder.open(TOKENS)
    read_on(decoder, plain, ids, choice(), CHUNKS)
    read_on(decoder, pages, ids, choice("pages", **SMALL), CHUNKS)
    block = 3 * 2 * 4 * 8 * 4  # 3 layers, 2 key heads, two bounds and two means of 8 numbers
    assert 12 * block <= pages.held_bytes - plain.held_bytes <= TOKENS // 32 * block
    pages.close()
    assert pages.held_bytes == 0


def test_a_failed_step_leaves_nothing_in_the_summaries(made: Any, decoder: Model) -> None:
    ids, wanted = random_ids(TOKENS), choice("pages", **SMALL, remainder="mean")
    expected = read_on(decoder, decoder.open(TOKENS), ids, wanted, [128, TOKENS])
    state = decoder.open(TOKENS)
    read_on(decoder, state, ids, wanted, [128])
    layer = made.model.layers[2]
    hook = layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError("out of memory")))
    with pytest.raises(MemoryError):
        read_on(decoder, state, ids[:128] + ids[128:][::-1], wanted, [TOKENS])
    hook.remove()
    assert state.length == 128
    assert torch.equal(read_on(decoder, state, ids, wanted, [TOKENS]), expected)


def test_encoders_choose_blocks_without_a_cache() -> None:
    encoder = serve(network(bert), 400)
    ids = random_ids(400)
    state = encoder.open(400)
    wanted = choice("pages", **SMALL)
    work = encoder.step([Slice(state, ids, wanted, "hidden", 400)]).results[0].work
    assert state.held_bytes == 0 and 0 < work.dropped_mass < work.dropped_rows == 2 * 400


def test_the_work_says_what_was_left_out_layer_by_layer_and_row_by_row(decoder: Model) -> None:
    ids = random_ids(TOKENS)

    def work_of(wanted: Choice, stops: list[int]) -> Work:
        state, total = decoder.open(TOKENS), Work()
        for stop in stops:
            part = ids[state.length : stop]
            total.add(decoder.step([Slice(state, part, wanted, "nothing", TOKENS)]).results[0].work)
        return total

    once, chunked = (work_of(choice("pages", **SMALL), stops) for stops in ([TOKENS], [128, 256, TOKENS]))
    assert once.dropped_rows == chunked.dropped_rows == 3 * TOKENS
    assert once.dropped_mass == pytest.approx(chunked.dropped_mass, rel=1e-4)
    assert 0.05 < once.dropped_mass / once.dropped_rows < 0.8
    exact = work_of(choice(), [TOKENS])
    assert exact.dropped_mass == 0 and exact.pairs_dense == 0
    everything = work_of(choice("pages", **SMALL | {"budget": 512}), [TOKENS])
    assert everything.dropped_mass == 0 and everything.pairs_kept == everything.pairs_exact


def test_budgets_of_another_length_than_the_network_are_refused_with_both_lengths(decoder: Model) -> None:
    fits = choice("pages", budget=[64, [64, 128], 64])
    assert decoder.unsupported(fits) == []
    told = decoder.unsupported(choice("pages", budget=[64, [64, 64, 64]]))
    assert len(told) == 1 and "2 entries" in told[0] and "3 layers" in told[0]
    told = decoder.unsupported(choice("pages", budget=[64, [64, 64, 64], 64]))
    assert len(told) == 1 and "budget[1] has 3 entries" in told[0] and "2 key heads" in told[0]


def test_only_layers_to_which_the_choice_applies_count_for_its_length() -> None:
    hybrid = serve(network(FAMILIES["gemma3, hybrid"]))
    applied = len(hybrid.info.applied_layers)
    assert 0 < applied < hybrid.info.num_layers
    assert hybrid.unsupported(choice("pages", budget=[64] * applied)) == []
    assert hybrid.unsupported(choice("pages", budget=[64] * hybrid.info.num_layers)) != []
