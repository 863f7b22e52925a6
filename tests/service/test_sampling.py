"""Sampling follows the distribution it names and its own seed alone."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from service.sampling import Sampler, SamplingParams, stream_key

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0, 0.5])


def draws(params: SamplingParams, count: int = 4000, index: int = 0) -> Counter[int]:
    sampler = Sampler(params, index)
    return Counter(sampler.sample(LOGITS).token_id for _ in range(count))


def test_temperature_zero_takes_the_most_likely() -> None:
    assert draws(SamplingParams(temperature=0), 5) == {1: 5}


def test_frequencies_follow_softmax_of_logits_over_temperature() -> None:
    for temperature in (0.7, 1.0, 2.0):
        expected = (LOGITS / temperature).softmax(-1)
        found = draws(SamplingParams(temperature=temperature, seed=3))
        for token, share in enumerate(expected.tolist()):
            assert found[token] / 4000 == pytest.approx(share, abs=0.03)


def test_top_k_keeps_the_k_most_likely() -> None:
    assert set(draws(SamplingParams(temperature=2, top_k=2))) == {1, 2}
    assert set(draws(SamplingParams(temperature=2, top_k=1))) == {1}
    assert set(draws(SamplingParams(temperature=2, top_k=1 << 20))) == set(range(5))


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass() -> None:
    probs = LOGITS.softmax(-1)
    assert set(draws(SamplingParams(temperature=1, top_p=float(probs[1]) - 1e-4))) == {1}
    assert set(draws(SamplingParams(temperature=1, top_p=float(probs[1]) + 1e-4))) == {1, 2}
    assert set(draws(SamplingParams(temperature=1, top_p=1e-9))) == {1}


def test_tiny_temperatures_stay_finite() -> None:
    assert draws(SamplingParams(temperature=1e-300), 5) == {1: 5}


def test_a_choice_repeats_with_its_seed_and_differs_from_its_neighbours() -> None:
    def run(seed: int, index: int) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=2, seed=seed), index)
        return [sampler.sample(LOGITS).token_id for _ in range(50)]

    assert run(7, 0) == run(7, 0)
    assert len({tuple(run(seed, index)) for seed in (7, 8) for index in (0, 1)}) == 4
    keys = {stream_key(seed, index) for seed in range(200) for index in range(8)}
    assert len(keys) == 1600
    assert 0 <= stream_key(2**63 - 1, 7) < 2**64


def test_logprobs_are_the_models_own_before_temperature_and_cuts() -> None:
    sampled = Sampler(SamplingParams(temperature=2, top_k=1, logprobs=3), 0).sample(LOGITS)
    expected = LOGITS.log_softmax(-1)
    assert sampled.logprob == pytest.approx(float(expected[1]))
    assert [token for token, _ in sampled.top] == [1, 2, 0]
    assert Sampler(SamplingParams(logprobs=0), 0).sample(LOGITS).top == ()
    assert Sampler(SamplingParams(), 0).sample(LOGITS).logprob is None
