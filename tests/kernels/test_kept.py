"""States beside a sequence's cache: the same answers with and without, whatever was cut off in between."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.contract import Segment
from kernels.math.kept import KeptStates
from kernels.math.summaries import BlockSummaries
from kernels.registry import load
from tests.kernels.kernel_cases import (
    CASES,
    Case,
    attend_packed,
    case_id,
    learned_for,
    make_inputs,
    scale_of,
    serves,
)

DECODING = [
    case
    for case in CASES
    if serves(case, True)
    and load(case[0]).capabilities.decode
    and (not case[1] or load(case[0]).capabilities.selection != "none")
]
"""Fixed patterns, of which nothing is kept, at their defaults alone."""
every_decoding_case = pytest.mark.parametrize("case", DECODING, ids=case_id)
KEEPING: list[Case] = [
    ("performer", {}),
    ("scatterbrain", {"support_params": {"window": 9}}),
    ("lsh", {}),
    ("kmeans", {"train_keys": 100}),
    ("sbm", {}),
]
"""Those that need more of the past than the keys themselves, or would read all of it in every step."""
STEPS = [0, 150, 151, 152, 153, 260, 261, 262, 263]
"""Borders of a prefill, steps, a later chunk, and steps again."""
HEADS = (6, 2)
DIM = 32


class Sequence:
    """One sequence that is read step by step, by twins with and without kept states."""

    def __init__(self, case: Case, num_tokens: int = 300, seed: int = 0) -> None:
        self.case, self.kept = case, KeptStates()
        self.q, self.k, self.v = make_inputs(1, HEADS, num_tokens, num_tokens, DIM, seed=seed)

    def check(self, begin: int, end: int, **changes: Any) -> None:
        """Rows begin .. end - 1 over the keys so far: the same with the states as without."""
        want, got = (self.step(begin, end, kept, **changes) for kept in (None, self.kept))
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0, msg=f"rows {begin} to {end}, {changes}")

    def step(self, begin: int, end: int, kept: KeptStates | None, **changes: Any) -> Tensor:
        segment = Segment(
            slice(0, end - begin),
            self.k[:, :, :end],
            self.v[:, :, :end],
            start=begin,
            seed=changes.pop("seed", 11),
            kept=kept,
        )
        options = {"params": self.case[1], "scale": scale_of(self.q), "layer": 1, **changes}
        rows = self.q[:, :, begin:end]
        return attend_packed(rows, [segment], backend=self.case[0], causal=True, **options).out

    def go_back(self, length: int) -> None:
        """Other tokens from ``length`` on, written where the old ones were."""
        self.kept.truncate(length)
        num_tokens = self.k.shape[2]
        other = make_inputs(1, HEADS, num_tokens, num_tokens, DIM, seed=length + 100)
        for mine, new in zip((self.q, self.k, self.v), other, strict=True):
            mine[:, :, length:] = new[:, :, length:]


@every_decoding_case
def test_steps_with_kept_states_equal_the_same_steps_without(case: Case) -> None:
    sequence = Sequence(case)
    for begin, end in pairwise(STEPS):
        sequence.check(begin, end)


@every_decoding_case
def test_a_sequence_that_starts_token_by_token_is_kept_as_well(case: Case) -> None:
    sequence = Sequence(case)
    for i in range(9):
        sequence.check(i, i + 1)
    sequence.check(9, 140)
    sequence.check(140, 141)


@every_decoding_case
def test_other_tokens_in_the_place_of_those_cut_off_are_read(case: Case) -> None:
    sequence = Sequence(case)
    for begin, end in pairwise(STEPS):
        sequence.check(begin, end)
    for length in (262, 261, 201, 128, 64, 63, 1):
        sequence.go_back(length)
        sequence.check(length, length + 1)
        sequence.check(length + 1, length + 30)
        sequence.check(length + 30, length + 31)


CENTRED: list[Case] = [
    ("scatterbrain", {"support_params": {"window": 256}, "centre_keys": 64}),
    ("scatterbrain", {"support": "window", "support_params": {"window": 256}, "centre_keys": 64}),
    ("scatterbrain", {"support": "star", "support_params": {"window": 256}, "centre_keys": 64}),
    (
        "scatterbrain",
        {"support": "lsh", "support_params": {"window": 256, "cluster_size": 16}, "centre_keys": 64},
    ),
]


@pytest.mark.parametrize("case", CENTRED, ids=case_id)
def test_sums_of_fewer_keys_than_are_left_forget_a_centre_that_was_cut_off(case: Case) -> None:
    sequence = Sequence(case, num_tokens=310)
    sequence.check(0, 306)  # keys up to 50 have left the window; the centre is of 64
    sequence.go_back(52)
    sequence.check(52, 300)
    for end in range(301, 311):
        sequence.check(end - 1, end)
    sequence.go_back(52)
    sequence.check(309, 310)


@every_decoding_case
def test_cutting_off_nothing_or_everything_is_safe(case: Case) -> None:
    sequence = Sequence(case)
    sequence.go_back(0)
    sequence.check(0, 200)
    sequence.kept.truncate(10**9)
    sequence.check(200, 201)
    sequence.go_back(0)
    sequence.check(0, 90)
    sequence.check(90, 91)


@every_decoding_case
@pytest.mark.parametrize("broken", ["k", "v"])
def test_what_was_broken_in_tokens_cut_off_is_forgotten(case: Case, broken: str) -> None:
    sequence = Sequence(case)
    getattr(sequence, broken)[:, :, 200:] = math.nan
    sequence.step(0, 150, sequence.kept)
    sequence.step(150, 201, sequence.kept)
    sequence.step(201, 202, sequence.kept)
    sequence.go_back(199)
    sequence.check(199, 260)
    sequence.check(260, 261)


@every_decoding_case
def test_keys_that_the_states_have_not_seen_are_made_up_for(case: Case) -> None:
    sequence = Sequence(case)
    sequence.check(0, 100)
    sequence.check(233, 234)
    sequence.check(180, 190)
    sequence.check(299, 300)
    late = Sequence(case)
    late.check(299, 300)


@every_decoding_case
def test_calls_that_differ_in_seed_layer_scale_or_params_share_no_state(case: Case) -> None:
    sequence = Sequence(case)
    others: list[dict[str, Any]] = [{}, {"seed": 3}, {"layer": 0}, {"scale": -0.3}, {"params": {}}]
    for begin, end in [(0, 150), (150, 151), (151, 152)]:
        for changes in others:
            sequence.check(begin, end, **changes)


@every_decoding_case
def test_states_made_in_inference_mode_serve_outside_of_it_and_back(case: Case) -> None:
    sequence = Sequence(case)
    for number, (begin, end) in enumerate(pairwise(STEPS)):
        with torch.inference_mode(number % 2 == 0):
            sequence.check(begin, end)


@every_decoding_case
def test_packed_sequences_keep_their_own_states(case: Case) -> None:
    sequences = [Sequence(case, seed=number) for number in range(3)]
    borders = [(0, 100, 101, 102), (0, 30, 140, 141), (0, 1, 2, 260)]
    options: dict[str, Any] = {"backend": case[0], "params": case[1], "causal": True, "scale": 0.2}
    for turn in range(3):
        places = [each[turn : turn + 2] for each in borders]
        packed = torch.cat([one.q[:, :, a:b] for one, (a, b) in zip(sequences, places, strict=True)], 2)
        segments, first = [], 0
        for one, (a, b) in zip(sequences, places, strict=True):
            rows, k, v = slice(first, first + b - a), one.k[:, :, :b], one.v[:, :, :b]
            segments.append(Segment(rows, k, v, start=a, seed=7, kept=one.kept))
            first += b - a
        together = attend_packed(packed, segments, **options).out
        want = attend_packed(packed, [replace(each, kept=None) for each in segments], **options).out
        torch.testing.assert_close(together, want, atol=1e-5, rtol=0)


@every_decoding_case
def test_the_bytes_told_are_the_bytes_of_the_tensors_held(case: Case) -> None:
    sequence = Sequence(case)
    learned = learned_for(case[0], sequence.q)
    for begin, end in pairwise(STEPS):
        sequence.step(begin, end, sequence.kept, learned=learned)
        held = _storages(sequence.kept) - _storages(learned)
        told = sequence.kept.nbytes
        assert told == sum(nbytes for _, nbytes in held)
    given = {x.untyped_storage().data_ptr() for x in (sequence.q, sequence.k, sequence.v)}
    assert not given & {place for place, _ in held}, "the cache itself is no state of its own"


@pytest.mark.parametrize("case", KEEPING, ids=case_id)
def test_states_are_kept_and_forgotten(case: Case) -> None:
    sequence = Sequence(case)
    sequence.check(0, 250)
    sequence.check(250, 251)
    full = sequence.kept.nbytes
    assert full > 0
    sequence.kept.truncate(0)
    assert sequence.kept.nbytes <= full


def _storages(root: Any) -> set[tuple[int, int]]:
    """(address, bytes) of every distinct piece of memory that the tensors within ``root`` lie in."""
    return {
        (tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        for tensor in _tensors(root, {})
        if tensor.untyped_storage().nbytes()
    }


def _tensors(root: Any, seen: dict[int, Any]) -> Iterator[Tensor]:
    if id(root) in seen or isinstance(root, (str, bytes, int, float, type)):
        return
    seen[id(root)] = root  # held on to: an address that is free again would be taken for another's
    if isinstance(root, Tensor):
        yield root
    elif isinstance(root, dict):
        for key, value in root.items():
            yield from _tensors(key, seen)
            yield from _tensors(value, seen)
    elif isinstance(root, (list, tuple, set, frozenset)):
        for value in root:
            yield from _tensors(value, seen)
    else:
        slots = [getattr(root, name) for name in getattr(type(root), "__slots__", ()) if hasattr(root, name)]
        yield from _tensors([*slots, *getattr(root, "__dict__", {}).values()], seen)


def test_the_walk_over_what_is_held_finds_tensors_wherever_they_are() -> None:
    kept = BlockSummaries()
    _, k, v = make_inputs(1, (2, 2), 200, 200, 8)
    kept.get(k[0], v[0], 32, 5)
    assert sum(nbytes for _, nbytes in _storages({"a": [(kept,)]})) == kept.nbytes > 0
