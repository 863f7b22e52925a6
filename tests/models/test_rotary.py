"""Length-dependent rotary positions: every sequence has the frequencies it would have alone in a fresh
network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from models.contract import Slice
from models.rotary import PerSequenceRotary, is_length_dependent, replace_rotary
from tests.models.tiny import DYNAMIC, alone, choice, close, llama, network, nomic, phi3, random_ids, serve


def dynamic_nomic() -> Any:
    return nomic(max_position_embeddings=32, rope_parameters={**DYNAMIC, "rope_theta": 1e3})


def dynamic_llama() -> Any:
    return llama(max_position_embeddings=32, rope_parameters=dict(DYNAMIC))


@pytest.mark.parametrize("make", [dynamic_nomic, dynamic_llama, phi3])
def test_packed_sequences_on_both_sides_of_the_threshold_equal_fresh_networks(
    make: Callable[[], Any],
) -> None:
    model = serve(network(make), max_tokens=128)
    sequences = [random_ids(n, seed=n) for n in (100, 5, 33, 32, 31, 64)]
    for _ in range(2):  # the second time after long sequences have been served
        slices = [Slice(model.open(len(ids)), ids, choice(), "hidden", len(ids)) for ids in sequences]
        for ids, result in zip(sequences, model.step(slices).results, strict=True):
            assert close(result.hidden, alone(network(make), ids)), len(ids)


@pytest.mark.parametrize("make", [dynamic_llama, phi3])
@pytest.mark.parametrize("prompt", [30, 50])
def test_generation_beyond_the_threshold_equals_transformers_own_cache(
    make: Callable[[], Any], prompt: int
) -> None:
    ids = random_ids(prompt + 6)
    model, fresh = serve(network(make), max_tokens=128), network(make)
    fresh.set_attn_implementation("sdpa")
    state = model.open(prompt + 6)
    chunks = [ids[:20], ids[20:prompt], *([token] for token in ids[prompt:])]
    with torch.no_grad():
        output = fresh(input_ids=torch.tensor([ids[:prompt]]), use_cache=True)
        wanted = [output.logits[0, -1]]
        for token in ids[prompt:]:
            output = fresh(torch.tensor([[token]]), past_key_values=output.past_key_values, use_cache=True)
            wanted.append(output.logits[0, -1])
    got = [
        model.step([Slice(state, chunk, choice(), "logits", prompt)]).results[0].logits for chunk in chunks
    ]
    for ours, theirs in zip(got[1:], wanted, strict=True):
        assert close(ours, theirs)


def test_only_length_dependent_rotary_modules_are_replaced() -> None:
    plain, dynamic = network(llama), network(dynamic_llama)
    assert (replace_rotary(plain), replace_rotary(dynamic)) == (0, 1)
    assert isinstance(dynamic.model.rotary_emb, PerSequenceRotary)
    assert is_length_dependent(dynamic) and not is_length_dependent(plain)
    assert replace_rotary(dynamic) == 0


def test_nothing_is_kept_between_calls() -> None:
    made = network(dynamic_llama)
    replace_rotary(made)
    rotary = made.model.rotary_emb
    x = torch.zeros(1, 1, 48)
    before = rotary(x, torch.tensor([[3]]))
    rotary(x, torch.tensor([[200]]))
    after = rotary(x, torch.tensor([[3]]))
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
