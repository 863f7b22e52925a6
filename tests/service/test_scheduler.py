"""The policy over plain objects: no model, no clock of its own. Tables of one step, then runs of many."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest

from service.begun import CLEARLY_HIGHER
from service.drain_rate import DrainRate
from service.scheduler import (
    AGE_S,
    LONG_SLICE_MS,
    MAX_PASSED_STEPS,
    Entry,
    Limits,
    Price,
    Rejected,
    Scheduler,
    Step,
)

_keys = itertools.count()
Parts = list[tuple[str, int]]


def limits(**changes: float) -> Limits:
    defaults: dict[str, Any] = {
        "max_queue_requests": 100,
        "max_queue_tokens": 100_000,
        "max_queue_ms": 1e9,
        "max_running": 16,
        "step_tokens": 1024,
        "step_ms": 200.0,
        "prefill_chunk_tokens": 512,
        "short_ms": 2000.0,
        "short_weight": 4.0,
        "memory_bytes": 1000,
    }
    return Limits(**{**defaults, **changes})


def per_token(ms: float) -> Price:
    return lambda start, tokens: ms * tokens


def entry(job: str, tokens: int, **changes: Any) -> Entry:
    """An encoder's input (``chunkable=False``) holds no place unless the case says so."""
    values: dict[str, Any] = {"model": "m", "chunkable": True, "bytes": 1, **changes}
    values.setdefault("places", int(values["chunkable"]))
    return Entry(key=next(_keys), job=job, tokens=tokens, **values)


def long_entry(job: str, tokens: int = 10_000, **changes: Any) -> Entry:
    return entry(job, tokens, **{"price": per_token(1.0), **changes})


def shown(step: Step | None) -> Parts:
    return [] if step is None else [(part.job, tokens) for part, tokens in step.parts]


def run(scheduler: Scheduler, step: Step, seconds: float = 1.0) -> None:
    """Carry a step out: prompts read to their end decode, whole inputs are done."""
    scheduler.advance(step, seconds)
    for part, _ in step.parts:
        if not part.places:
            scheduler.release(part)
        elif part.read == part.tokens:
            part.decoding = True


def planned(scheduler: Scheduler, now: float = 0.0, seconds: float = 1.0) -> Parts:
    """The next step, carried out."""
    step = scheduler.plan(now)
    if step is not None:
        run(scheduler, step, seconds)
    return shown(step)


def admitted(bounds: Limits, *entries: Entry) -> Scheduler:
    scheduler = Scheduler(bounds)
    for one in entries:
        scheduler.admit([one])
    return scheduler


def long_step(scheduler: Scheduler, now: float = 0.0) -> Step:
    step = scheduler.plan(now)
    assert step is not None and step.long
    scheduler.resumed(step, now)
    return step


Case = tuple[str, Limits, Callable[[], list[Entry]], list[Parts]]
STEPS: list[Case] = [
    (
        "a prompt is read in chunks and then decodes one token a step",
        limits(),
        lambda: [entry("a", 1300)],
        [[("a", 512)], [("a", 512)], [("a", 276)], [("a", 1)], [("a", 1)]],
    ),
    (
        "a cached beginning is not read again",
        limits(),
        lambda: [entry("a", 1300, read=1024)],
        [[("a", 276)], [("a", 1)]],
    ),
    (
        "a wholly cached prompt reads its last token",
        limits(),
        lambda: [entry("a", 1024, read=1023)],
        [[("a", 1)], [("a", 1)]],
    ),
    (
        "a chunk that starts off a multiple ends at one",
        limits(),
        lambda: [entry("a", 3000, read=100)],
        [[("a", 412)], [("a", 512)]],
    ),
    (
        "a chunk ends at the query tiles of a backend that selects by them",
        limits(step_tokens=600),
        lambda: [entry("a", 300), entry("tiles", 1000, chunk_multiple=256)],
        [[("a", 300), ("tiles", 256)], [("a", 1), ("tiles", 512)], [("a", 1), ("tiles", 232)]],
    ),
    (
        "a query tile larger than the step is read whole",
        limits(step_tokens=512),
        lambda: [entry("tiles", 1100, chunk_multiple=1024)],
        [[("tiles", 1024)], [("tiles", 76)], [("tiles", 1)]],
    ),
    (
        "a query tile larger than the chunk is read whole where the budget allows",
        limits(step_tokens=2048),
        lambda: [entry("tiles", 3000, chunk_multiple=1024), entry("b", 600)],
        [[("tiles", 1024), ("b", 512)]],
    ),
    (
        "a token budget below a tile does not stall",
        limits(step_tokens=16, prefill_chunk_tokens=16),
        lambda: [entry("b", 200)],
        [[("b", 128)], [("b", 72)]],
    ),
    (
        "whole inputs of an encoder share a step while their tokens fit",
        limits(step_tokens=100),
        lambda: [entry(job, n, chunkable=False) for job, n in (("a", 40), ("b", 70), ("c", 30), ("d", 30))],
        [[("a", 40), ("c", 30), ("d", 30)], [("b", 70)], []],
    ),
    (
        "whole inputs of an encoder share a step while their time fits",
        limits(),
        lambda: [
            entry(job, n, chunkable=False, price=per_token(1.0))
            for job, n in (("a", 150), ("b", 70), ("c", 50))
        ],
        [[("a", 150), ("c", 50)], [("b", 70)], []],
    ),
    (
        "a first input that takes longer than a step runs alone",
        limits(),
        lambda: [entry(job, n, chunkable=False, price=per_token(1.0)) for job, n in (("a", 900), ("b", 50))],
        [[("a", 900)], [("b", 50)]],
    ),
    (
        "chunks are as large as the predicted time allows",
        limits(),
        lambda: [entry("a", 1000, price=per_token(0.7)), entry("b", 1000, price=per_token(0.5))],
        [[("a", 256)]],
    ),
    (
        "what one prompt leaves of the time goes to the next",
        limits(step_ms=300),
        lambda: [entry("a", 300, price=per_token(0.5)), entry("b", 1000, price=per_token(0.5))],
        [[("a", 300), ("b", 256)], [("a", 1), ("b", 512)]],
    ),
    (
        "a chunk that costs more than the step is read where nothing else would be",
        limits(),
        lambda: [entry("a", 300, price=per_token(5.0)), entry("b", 300, price=per_token(5.0))],
        [[("a", 128)], [("a", 128)], [("a", 44)]],
    ),
    (
        "a prompt that nobody waits behind ends within two steps' time instead of two steps",
        limits(),
        lambda: [entry("a", 390, price=per_token(1.0))],
        [[("a", 390)]],
    ),
    (
        "a longer one is read in chunks even alone, for the sake of who may come",
        limits(),
        lambda: [entry("a", 410, price=per_token(1.0))],
        [[("a", 128)], [("a", 282)]],
    ),
    (
        "prompts of the long lane are read in large chunks, one after the other",
        limits(),
        lambda: [long_entry("a", 3000), long_entry("b", 4000)],
        [[("a", 512)]] * 5 + [[("a", 440)]],
    ),
    (
        "a long whole input is read in one step, without others",
        limits(),
        lambda: [long_entry("a", 5000, chunkable=False), long_entry("b", 5000, chunkable=False)],
        [[("a", 5000)], [("b", 5000)], []],
    ),
    (
        "a long causal prompt that cannot be chunked is read whole and decodes",
        limits(),
        lambda: [long_entry("a", 5000, chunkable=False, places=1)],
        [[("a", 5000)], [("a", 1)]],
    ),
    (
        "the cached beginning of a long prompt may make it a short one",
        limits(),
        lambda: [long_entry("a", 5000, read=4096), entry("b", 10, price=per_token(1.0))],
        [[("a", 128), ("b", 10)]],
    ),
    (
        "the larger priority goes first",
        limits(step_tokens=128),
        lambda: [entry("a", 128), entry("b", 128, priority=2), entry("c", 128, priority=1)],
        [[("b", 128)]],
    ),
    (
        "then the earlier deadline, and none last",
        limits(step_tokens=128),
        lambda: [entry("a", 128), entry("b", 128, deadline=9.0), entry("c", 128, deadline=8.0)],
        [[("c", 128)]],
    ),
]


@pytest.mark.parametrize(
    ("bounds", "entries", "expected"), [case[1:] for case in STEPS], ids=[c[0] for c in STEPS]
)
def test_steps_follow_the_table(
    bounds: Limits, entries: Callable[[], list[Entry]], expected: list[Parts]
) -> None:
    scheduler = admitted(bounds, *entries())
    assert [planned(scheduler) for _ in expected] == expected


def test_the_fixed_part_of_a_step_counts_and_never_makes_pieces_smaller_than_itself() -> None:
    for fixed_ms, tokens in ((0.0, 384), (50.0, 256), (190.0, 256), (1000.0, 512)):
        scheduler = Scheduler(limits(), fixed_ms=lambda model, fixed_ms=fixed_ms: fixed_ms)
        for job in "ab":
            scheduler.admit([entry(job, 2000, price=per_token(0.5))])
        step = scheduler.plan(0.0)
        assert step is not None and shown(step)[0] == ("a", tokens)
        assert step.predicted_ms == pytest.approx(fixed_ms + 0.5 * step.tokens)


def test_finding_a_chunk_asks_for_few_prices() -> None:
    asked: list[tuple[int, int]] = []

    def price(start: int, tokens: int) -> float:
        asked.append((start, tokens))
        return 0.01 * tokens

    scheduler = admitted(
        limits(prefill_chunk_tokens=16_384, step_tokens=16_384), entry("a", 16_000, price=price)
    )
    scheduler.admit([entry("b", 100)])
    asked.clear()
    assert planned(scheduler)[0] == ("a", 16_000)
    assert len(asked) <= 3
    tight = admitted(limits(prefill_chunk_tokens=16_384, step_tokens=16_384, step_ms=37.0))
    tight.admit([entry("a", 16_000, price=price)])
    tight.admit([entry("b", 100)])
    asked.clear()
    assert planned(tight)[0] == ("a", 3584)
    assert len(asked) <= 10


def test_every_sequence_decodes_in_every_short_step_and_prompts_fill_what_is_left() -> None:
    scheduler = admitted(limits(step_tokens=600), entry("a", 10))
    assert planned(scheduler) == [("a", 10)]
    scheduler.admit([entry("b", 2000)])
    scheduler.admit([entry("c", 50)])
    assert planned(scheduler) == [("a", 1), ("b", 512), ("c", 50)]
    assert planned(scheduler) == [("a", 1), ("c", 1), ("b", 512)]


def test_decoding_is_not_left_out_for_time_but_beyond_the_tokens_of_a_step_it_takes_turns() -> None:
    dear: Price = lambda start, tokens: 500.0 if start >= 5 else 0.0  # noqa: E731
    scheduler = admitted(limits(), *[entry(f"d{i}", 5, price=dear) for i in range(6)])
    planned(scheduler)
    assert [tokens for _, tokens in planned(scheduler)] == [1] * 6
    tight = admitted(limits(step_tokens=4), *[entry(f"d{i}", 1) for i in range(6)])
    while not all(part.decoding for part in tight._ledger.alive()):
        planned(tight)
    before = [part.decoded for part in tight._ledger.running.values()]
    for _ in range(6):
        assert len(planned(tight)) == 4
    assert {after.decoded - b for after, b in zip(tight._ledger.running.values(), before, strict=True)} == {4}


def test_reading_gets_its_half_beside_decoding() -> None:
    """A piece of 128 ms, where decoding leaves 50 of a step, waits for one step without it."""
    scheduler = admitted(limits(), entry("d", 5, price=lambda start, tokens: 150.0 if start >= 5 else 0.0))
    planned(scheduler)
    scheduler.admit([entry("a", 384, price=per_token(1.0))])
    without, with_a_piece = [("d", 1)], [("d", 1), ("a", 128)]
    assert [planned(scheduler) for _ in range(6)] == [without, with_a_piece] * 3


def test_what_arrives_beside_sequences_that_only_decode_is_read_at_once() -> None:
    scheduler = admitted(limits(), entry("d", 5, price=lambda start, tokens: 150.0 if start >= 5 else 0.0))
    for _ in range(3):
        planned(scheduler)
    scheduler.admit([entry("a", 128, price=per_token(1.0))])
    assert planned(scheduler) == [("d", 1), ("a", 128)]


def standstill(scheduler: Scheduler, watched: Entry, arrivals: list[list[Entry]]) -> tuple[int, list[str]]:
    """The most steps in a row in which a prompt stood still while its request was there, and the order in
    which prompts were read to their end. Requests arrive one list a step."""
    entries = {part.key: part for part in scheduler._ledger.alive()}
    longest = still = 0
    ended: list[str] = []
    for step in range(400):
        for part in arrivals[step] if step < len(arrivals) else []:
            scheduler.admit([part])
            entries[part.key] = part
        before = watched.read
        planned(scheduler)
        for part in [part for part in entries.values() if part.decoding]:
            del entries[part.key]
            ended.append(part.job)
            scheduler.release(part)
        if watched.decoding:
            return longest, ended
        still = 0 if watched.read > before else still + 1
        longest = max(longest, still)
    raise AssertionError(f"{watched.job} was never read to its end")


@pytest.mark.parametrize("newcomer", [130, 500, 600, 900, 1024, 1500, 5000])
@pytest.mark.parametrize("ahead", [0, 700, 100_000])
def test_a_waiting_prompt_with_a_large_query_tile_is_passed_only_so_often(newcomer: int, ahead: int) -> None:
    """One new request a step, each of which fits beside a running one; a tile of a whole step does not."""
    scheduler = Scheduler(limits(max_queue_tokens=10_000_000, max_queue_requests=1000))
    if ahead:
        scheduler.admit([entry("ahead", ahead)])
        planned(scheduler)
    tiles = entry("tiles", 3000, chunk_multiple=1024)
    scheduler.admit([tiles])
    longest, ended = standstill(scheduler, tiles, [[entry(f"n{i}", newcomer)] for i in range(100)])
    assert longest <= MAX_PASSED_STEPS
    assert "ahead" in ended or ahead != 700, "what came before is not kept waiting either"


def test_what_goes_first_because_it_was_passed_keeps_others_waiting_only_so_long() -> None:
    """Many large tiles wait: all are passed at once, and then begin before the running one."""
    scheduler = Scheduler(limits(max_queue_tokens=10_000_000, max_queue_requests=1000, max_running=64))
    ahead = entry("ahead", 20_000)
    scheduler.admit([ahead])
    planned(scheduler)
    for i in range(30):
        scheduler.admit([entry(f"tiles{i}", 1024, chunk_multiple=1024)])
    longest, _ = standstill(scheduler, ahead, [[entry(f"n{i}", 500)] for i in range(200)])
    assert longest <= MAX_PASSED_STEPS


def test_a_prompt_being_read_is_finished_before_later_ones_are_read_on() -> None:
    scheduler = admitted(limits(step_tokens=512), entry("a", 1000), entry("b", 1000))
    assert [planned(scheduler) for _ in range(3)] == [
        [("a", 512)],
        [("a", 488)],
        [("a", 1), ("b", 384)],
    ]


def test_what_was_passed_too_often_does_not_begin_without_memory() -> None:
    scheduler = admitted(
        limits(memory_bytes=10, max_queue_tokens=10_000_000), entry("ahead", 100_000, bytes=6)
    )
    planned(scheduler)
    scheduler.admit([entry("tiles", 3000, chunk_multiple=1024, bytes=5)])
    for i in range(3 * MAX_PASSED_STEPS):
        scheduler.admit([entry(f"n{i}", 130, bytes=1)])
        assert "tiles" not in dict(planned(scheduler))
        assert scheduler.reserved_bytes <= 10


def test_memory_is_reserved_until_released() -> None:
    scheduler = admitted(limits(memory_bytes=10), entry("a", 5, bytes=6), entry("b", 5, bytes=6))
    step = scheduler.plan(0.0)
    assert shown(step) == [("a", 5)] and step is not None
    run(scheduler, step)
    assert scheduler.reserved_bytes == 6
    assert planned(scheduler) == [("a", 1)], "b must wait"
    scheduler.release(step.parts[0][0])
    assert planned(scheduler) == [("b", 5)]


@pytest.mark.parametrize("lane", ["short", "long"])
@pytest.mark.parametrize("model", ["m", "other"])
def test_what_waits_for_memory_is_passed_only_so_often(lane: str, model: str) -> None:
    """By whatever model's and lane's work."""
    holder = entry("holder", 5, bytes=5)
    scheduler = admitted(limits(memory_bytes=10, step_tokens=100), holder)
    planned(scheduler)
    scheduler.admit([entry("big", 5, bytes=9, price=per_token(1000.0 if lane == "long" else 0.0))])
    passed = 0
    for i in range(MAX_PASSED_STEPS * 3):
        scheduler.admit([entry(f"s{i}", 5, model=model, chunkable=False)])
        for _ in range(2):
            passed += any(job.startswith("s") for job, _ in planned(scheduler))
    assert passed == MAX_PASSED_STEPS
    scheduler.release(holder)
    rest = [part for _ in range(20) for part in planned(scheduler)]
    assert ("big", 5) in rest, "when its model and its lane have their turn"


def test_places_bound_how_many_sequences_hold_a_cache_and_choices_count_each() -> None:
    scheduler = admitted(
        limits(max_running=3), entry("a", 5, places=2), entry("b", 5, places=2), entry("c", 5)
    )
    assert planned(scheduler) == [("a", 5), ("c", 5)]
    assert planned(scheduler) == [("a", 1), ("c", 1)]


def test_many_places_are_waited_for_only_so_long() -> None:
    """Small requests that come and go do not keep one of many choices from ever having its places."""
    scheduler = Scheduler(limits(max_running=4))
    held = [entry(f"s{i}", 5) for i in range(4)]
    for one in held:
        scheduler.admit([one])
    planned(scheduler)
    scheduler.admit([entry("choices", 5, places=4)])
    for i in range(30):
        new = entry(f"n{i}", 5)
        scheduler.admit([new])
        scheduler.release(held.pop(0))
        found = dict(planned(scheduler))
        held += [new] if new.job in found else []
        if "choices" in found:
            return
        if not held:
            held.append(new)
    raise AssertionError("the request of many choices never started")


def test_what_holds_no_cache_is_read_while_every_place_is_taken() -> None:
    """Long generations in all places must not keep an encoder from its steps."""
    scheduler = admitted(limits(max_running=2), *[entry(job, 5, model="dec") for job in "abc"])
    planned(scheduler)
    for i in range(3):
        scheduler.admit([entry(f"e{i}", 10, model="enc", chunkable=False)])
    steps = [planned(scheduler) for _ in range(4)]
    assert [("e0", 10), ("e1", 10), ("e2", 10)] in steps, "read in one step, as if there were no decoder"
    assert [("a", 1), ("b", 1)] in steps and not any(("c", 5) in step for step in steps)


def test_a_fork_shares_bytes_and_places_and_decodes_at_once() -> None:
    leader = entry("a", 5, bytes=11, places=4)
    scheduler = admitted(limits(max_running=4), leader)
    planned(scheduler)
    followers = [entry("a", 5) for _ in range(3)]
    scheduler.fork(leader, followers)
    assert [leader.bytes, *(one.bytes for one in followers)] == [5, 2, 2, 2]
    assert {one.places for one in [leader, *followers]} == {1}
    assert scheduler.reserved_bytes == 11 and scheduler.running("m") == 1
    assert planned(scheduler) == [("a", 1)] * 4
    scheduler.admit([entry("b", 5)])
    assert planned(scheduler) == [("a", 1)] * 4, "no place is free"
    scheduler.release(followers[0])
    assert ("b", 5) in planned(scheduler)


def test_a_fork_of_a_dropped_leader_is_dropped_and_one_of_an_ended_leader_refused() -> None:
    leader, follower = entry("a", 5, places=2), entry("a", 5)
    scheduler = admitted(limits(), leader)
    planned(scheduler)
    scheduler.drop("a")
    scheduler.fork(leader, [follower])
    assert scheduler.plan(0.0) is None
    for one in (leader, follower):
        scheduler.release(one)
    assert scheduler.reserved_bytes == 0
    with pytest.raises(ValueError, match="running"):
        scheduler.fork(leader, [entry("a", 5)])


Refusal = tuple[str, dict[str, float], list[Entry], Entry, str, int, int]
REFUSALS: list[Refusal] = [
    ("bytes", {"memory_bytes": 10}, [], entry("a", 5, bytes=11), "never_fits", 11, 10),
    ("places", {"max_running": 3}, [], entry("a", 5, places=4), "too_many_places", 4, 3),
    ("one's tokens", {"max_queue_tokens": 100}, [], entry("a", 101), "too_many_tokens", 101, 100),
    ("requests", {"max_queue_requests": 1}, [entry("a", 1)], entry("b", 1), "queue_full", 1, 1),
    ("tokens", {"max_queue_tokens": 100}, [entry("a", 60)], entry("b", 60), "token_budget", 60, 100),
    (
        "work",
        {"max_queue_ms": 9e3},
        [long_entry("a", 5000)],
        long_entry("b", 5000),
        "cost_budget",
        5000,
        9000,
    ),
]


@pytest.mark.parametrize(
    ("bounds", "there", "new", "reason", "value", "limit"),
    [r[1:] for r in REFUSALS],
    ids=[r[0] for r in REFUSALS],
)
def test_what_the_queue_cannot_take_is_refused_with_the_number_and_the_limit(
    bounds: dict[str, float], there: list[Entry], new: Entry, reason: str, value: int, limit: int
) -> None:
    scheduler = admitted(limits(**bounds), *there)
    before = scheduler.waiting(), scheduler.waiting_ms()
    with pytest.raises(Rejected, match=reason) as caught:
        scheduler.admit([new])
    assert (caught.value.value, caught.value.limit) == (value, limit)
    assert (caught.value.retry_after_s is None) == (not there)
    assert (scheduler.waiting(), scheduler.waiting_ms()) == before, "a refused request leaves nothing behind"


def test_inputs_of_one_request_count_as_one_and_one_of_any_cost_may_wait_alone() -> None:
    scheduler = admitted(limits(max_queue_requests=2, max_queue_ms=1000))
    scheduler.admit([long_entry("a", 5000), long_entry("a", 7000)])
    assert scheduler.waiting() == (1, 12_000) and scheduler.waiting_ms() == 12_000
    assert scheduler.waiting("m") == (1, 12_000) and scheduler.waiting("x") == (0, 0)
    with pytest.raises(Rejected, match="cost_budget"):
        scheduler.check_room(1, 10, 2001.0)
    scheduler.check_room(1, 10, 2000.0)
    scheduler.admit([entry("b", 600, price=per_token(1.0))])
    with pytest.raises(Rejected, match="queue_full"):
        scheduler.check_room(1)
    roomy = admitted(limits(max_queue_ms=1000), entry("b", 600, price=per_token(1.0)))
    roomy.check_room(1, 400, 400.0)
    with pytest.raises(Rejected, match="cost_budget"):
        roomy.check_room(1, 401, 401.0)


def test_the_wait_told_is_that_of_half_the_work_at_the_measured_rate() -> None:
    scheduler = admitted(limits(max_queue_requests=2), entry("a", 1000, price=per_token(1.0)))
    planned(scheduler, seconds=2.0)
    while scheduler.waiting() != (0, 0) or not next(iter(scheduler._ledger.running.values())).decoding:
        step = scheduler.plan(0.0)
        assert step is not None
        run(scheduler, step, 2 * step.predicted_ms / 1000)
    rate = scheduler.rate.ms_per_s
    assert rate is not None and rate < 500
    for job in "bc":
        scheduler.admit([long_entry(job, 20_000)])
    with pytest.raises(Rejected) as caught:
        scheduler.check_room()
    assert caught.value.retry_after_s == pytest.approx(20_000 / rate)


def test_the_drain_rate_stays_while_a_long_step_is_left_and_gone_on_with() -> None:
    """Such a step counts as it goes: nobody is told to come back late while it runs, or early after it."""
    scheduler = admitted(limits(max_queue_tokens=1 << 20), long_entry("library", 200_000, chunkable=False))
    step, rates = long_step(scheduler), []
    for i in range(100):
        now = 2.0 * i
        scheduler.resumed(step, now)
        assert not scheduler.should_pause(step, now + 1.0)
        scheduler.admit([entry(f"s{i}", 100, price=per_token(1.0), chunkable=False)])
        scheduler.ran(step, 1.9)
        assert planned(scheduler, now + 1.9, 0.1) == [(f"s{i}", 100)]
        assert scheduler.plan(now + 2.0) is step
        rates.append(scheduler.rate.ms_per_s)
    scheduler.advance(step, 10.0)
    rates.append(scheduler.rate.ms_per_s)
    assert rates == pytest.approx([1000.0] * 101)


def test_the_drain_rate_stays_where_a_long_step_is_given_up() -> None:
    scheduler = admitted(limits(), long_entry("library", 60_000, chunkable=False))
    step = long_step(scheduler)
    scheduler.ran(step, 5.0)
    scheduler.drop("library")
    scheduler.failed(step, 0.0)
    assert scheduler.rate.ms_per_s == pytest.approx(1000.0)


def test_the_drain_rate_follows_the_machine_and_bounds_the_wait() -> None:
    rate = DrainRate()
    assert rate.seconds_for(10_000) == 1.0, "nothing measured yet: the shortest wait"
    for _ in range(10):
        rate.observe(100.0, 1.0)
    assert rate.ms_per_s == pytest.approx(100)
    assert rate.seconds_for(1000) == pytest.approx(10)
    assert rate.seconds_for(1_000_000) == 120.0 and rate.seconds_for(1) == 1.0
    for _ in range(600):
        rate.observe(1000.0, 1.0)
    assert rate.ms_per_s == pytest.approx(1000, rel=0.01), "recent steps weigh more"


def test_models_take_turns_by_the_time_they_use() -> None:
    scheduler = admitted(limits(), entry("slow", 5, model="x"), entry("fast", 5, model="y"))
    seconds = {"x": 10.0, "y": 1.0}
    order = []
    for _ in range(22):
        step = scheduler.plan(0.0)
        assert step is not None
        run(scheduler, step, seconds[step.model])
        order.append(step.model)
    assert order.count("x") == 2 and order.count("y") == 20


def test_an_idle_model_saves_up_no_credit_and_owes_nothing() -> None:
    scheduler = admitted(limits(), entry("a", 5, model="x"))
    for _ in range(50):
        planned(scheduler)
    scheduler.admit([entry("b", 5, model="y")])
    models = []
    for _ in range(10):
        step = scheduler.plan(0.0)
        assert step is not None
        run(scheduler, step)
        models.append(step.model)
    assert models.count("x") == 5
    scheduler.remove_model("x")
    assert scheduler.plan(0.0) is not None


def test_a_dropped_request_leaves_before_the_next_step_and_keeps_its_memory_until_released() -> None:
    scheduler = admitted(limits(), entry("a", 2000, bytes=7))
    step = scheduler.plan(0.0)
    assert step is not None
    run(scheduler, step)
    ((running, _),) = step.parts
    scheduler.admit([entry("b", 5)])
    scheduler.drop("a")
    scheduler.drop("b")
    assert scheduler.waiting() == (0, 0)
    assert scheduler.plan(0.0) is None and scheduler.reserved_bytes == 7
    scheduler.release(running)
    assert scheduler.reserved_bytes == 0 and scheduler.running("m") == 0


def test_deadlines_tell_the_stage_and_queue_deadlines_hold_only_while_waiting() -> None:
    scheduler = Scheduler(limits(max_running=2))
    scheduler.admit([entry("run", 5, deadline=50.0)])
    scheduler.admit([entry("started", 5, queue_deadline=10.0)])
    planned(scheduler)
    scheduler.admit([entry("wait", 5, deadline=100.0, queue_deadline=20.0)])
    assert scheduler.expired(9.9) == []
    assert scheduler.expired(20.0) == [("wait", "queued")]
    scheduler.drop("wait")
    assert scheduler.expired(49.9) == [] and scheduler.expired(50.0) == [("run", "running")]


def test_a_begun_long_step_is_running_for_its_deadlines() -> None:
    scheduler = admitted(limits(), long_entry("a", deadline=5.0, queue_deadline=1.0))
    long_step(scheduler)
    assert scheduler.expired(2.0) == [] and scheduler.expired(5.0) == [("a", "running")]


def test_waiting_overtakes_priority() -> None:
    scheduler = admitted(limits(step_tokens=128), entry("old", 128, arrived=0.0))
    scheduler.admit([entry("new", 128, priority=3, arrived=3 * AGE_S - 1)])
    assert shown(scheduler.plan(3 * AGE_S - 1)) == [("new", 128)]
    scheduler = admitted(limits(step_tokens=128), entry("old", 128, arrived=0.0))
    scheduler.admit([entry("new", 128, priority=3, arrived=3 * AGE_S + 1)])
    assert shown(scheduler.plan(3 * AGE_S + 1)) == [("old", 128)]


def test_a_failed_step_makes_each_of_its_entries_run_alone_once() -> None:
    scheduler = admitted(limits(), entry("a", 5), entry("b", 600), entry("c", 7))
    step = scheduler.plan(0.0)
    assert step is not None and shown(step) == [("a", 5), ("b", 512), ("c", 7)]
    scheduler.failed(step, 1.0)
    assert all(part.read == 0 and part.solo for part, _ in step.parts)
    scheduler.admit([entry("d", 9)])
    assert [planned(scheduler) for _ in range(4)] == [
        [("a", 5)],
        [("b", 512)],
        [("c", 7)],
        [("a", 1), ("c", 1), ("b", 88), ("d", 9)],
    ]


def test_a_decoding_entry_of_a_failed_step_runs_alone_and_one_that_fails_alone_is_not_marked() -> None:
    scheduler = admitted(limits(), entry("a", 5), entry("b", 5))
    planned(scheduler)
    step = scheduler.plan(0.0)
    assert step is not None
    scheduler.failed(step, 1.0)
    alone = scheduler.plan(0.0)
    assert alone is not None and shown(alone) == [("a", 1)]
    scheduler.failed(alone, 1.0)
    scheduler.drop("a")
    scheduler.release(alone.parts[0][0])
    assert [planned(scheduler) for _ in range(2)] == [[("b", 1)], [("b", 1)]]
    assert not step.parts[1][0].solo


def test_a_failed_long_step_is_over_and_its_entries_run_alone_in_long_steps() -> None:
    scheduler = admitted(limits(short_ms=200.0), long_entry("a", 3000, read=2700), long_entry("b"))
    step = long_step(scheduler)
    assert shown(step) == [("a", 300), ("b", 128)] and scheduler.begun == (step,)
    scheduler.failed(step, 1.0)
    assert scheduler.begun == ()
    for expected in ([("a", 300)], [("b", 512)]):
        alone = long_step(scheduler)
        assert shown(alone) == expected
        scheduler.advance(alone, 1.0)
        scheduler.release(alone.parts[0][0])


def test_a_long_step_is_handed_out_again_until_it_is_done() -> None:
    scheduler = admitted(limits(), long_entry("a"))
    step = long_step(scheduler)
    scheduler.ran(step, 0.3)
    assert scheduler.plan(0.3) is step and step.parts[0][0].read == 0
    run(scheduler, step, 0.2)
    following = long_step(scheduler)
    assert following is not step and step.parts[0][0].read == 512


def test_a_short_arrival_pauses_long_work_and_is_in_the_next_step() -> None:
    for other_model in ("m", "x"):
        scheduler = admitted(limits(), long_entry("a"))
        step = long_step(scheduler)
        assert not any(scheduler.should_pause(step, t / 100) for t in range(1000))
        scheduler.admit([entry("s", 100, model=other_model)])
        assert scheduler.should_pause(step, 10.01)
        scheduler.ran(step, 10.01)
        assert planned(scheduler, 10.02, 0.1) == [("s", 100)]
        assert scheduler.plan(10.1) is step


def test_short_work_that_cannot_start_does_not_pause_a_long_step() -> None:
    scheduler = admitted(limits(memory_bytes=10, max_running=1), long_entry("a", bytes=6))
    step = long_step(scheduler)
    scheduler.admit([entry("memory", 5, bytes=5, chunkable=False), entry("place", 5)])
    assert not scheduler.should_pause(step, 2.0)
    scheduler.admit([entry("fits", 5, bytes=4, chunkable=False)])
    assert scheduler.should_pause(step, 4.0)


def test_a_long_step_that_nobody_wants_is_left_and_given_up() -> None:
    scheduler = admitted(limits(), long_entry("a"), long_entry("b"))
    step = long_step(scheduler)
    scheduler.drop("a")
    assert scheduler.should_pause(step, 0.1) and scheduler.abandoned(step)
    scheduler.ran(step, 0.1)
    assert scheduler.plan(0.1) is None, "it must be given up before the model begins another"
    scheduler.failed(step, 0.0)
    scheduler.release(step.parts[0][0])
    assert shown(scheduler.plan(0.1)) == [("b", 512)]


def test_a_long_step_goes_on_for_those_who_are_left() -> None:
    parts = long_entry("a", 2100, read=2000, priority=1), long_entry("b")
    scheduler = admitted(limits(short_ms=50.0), *parts)
    step = long_step(scheduler)
    assert shown(step) == [("a", 100), ("b", 384)]
    scheduler.drop("a")
    assert not scheduler.should_pause(step, 0.1) and not scheduler.abandoned(step)
    scheduler.ran(step, 0.1)
    assert scheduler.plan(0.1) is step


def test_entries_that_are_released_take_their_long_step_with_them() -> None:
    scheduler = admitted(limits(), long_entry("a"), long_entry("b"))
    step = long_step(scheduler)
    scheduler.drop("a")
    scheduler.release(step.parts[0][0])
    assert scheduler.begun == () and shown(scheduler.plan(0.0)) == [("b", 512)]


def test_a_much_shorter_document_is_read_before_a_begun_one_goes_on() -> None:
    library = long_entry("library", 60_000, chunkable=False)
    scheduler = admitted(limits(), library)
    below = long_step(scheduler)
    scheduler.resumed(below, 0.0)
    assert not scheduler.should_pause(below, 1.0)
    scheduler.admit([long_entry("chapter", 3_000, chunkable=False)])
    assert scheduler.should_pause(below, 1.1)
    scheduler.ran(below, 1.1)
    assert planned(scheduler, 1.1, seconds=3.0) == [("chapter", 3_000)]
    assert scheduler.plan(4.1) is below


def test_a_step_that_is_given_up_below_another_leaves_no_debt() -> None:
    below, above = long_entry("below", 60_000, chunkable=False), long_entry("above", 9_000, chunkable=False)
    scheduler = admitted(limits(), below)
    lower = long_step(scheduler)
    scheduler.admit([above])
    upper = long_step(scheduler)
    scheduler.drop("below")
    scheduler.failed(lower, 0.0)
    scheduler.release(below)
    scheduler.admit([long_entry("chapter", 3_000, chunkable=False)])
    assert scheduler.begun == (upper,) and planned(scheduler) == [("chapter", 3_000)]


@pytest.mark.parametrize("needed", [600, 300])
def test_short_requests_go_on_while_a_second_document_waits_for_the_first(needed: int) -> None:
    """For the memory that it holds, or for its turn where short requests hold what it needs beside that."""
    first, second = (
        long_entry(name, 60_000, chunkable=False, bytes=num_bytes)
        for name, num_bytes in (("first", 600), ("second", needed))
    )
    scheduler = admitted(limits(), first)
    step, now = long_step(scheduler), 0.0
    scheduler.admit([second])
    for i in range(3 * MAX_PASSED_STEPS):
        second.passed_steps = max(second.passed_steps, MAX_PASSED_STEPS if needed == 300 else 0)
        scheduler._ledger.waiting.passed(second)
        scheduler.admit([entry(f"s{i}", 10, bytes=300, chunkable=False)])
        assert scheduler.should_pause(step, now + 0.1)
        scheduler.ran(step, 0.1)
        assert planned(scheduler, now + 0.1, 0.01) == [(f"s{i}", 10)]
        assert scheduler.plan(now + 0.2) is step
        now += 0.2
        scheduler.resumed(step, now)
    if needed == 600:
        scheduler.admit([long_entry("third", 3_000, chunkable=False, bytes=100)])
        assert scheduler.plan(now) is step, "no other document takes what is free, however short"
    run(scheduler, step, 0.1)
    assert planned(scheduler, now) == [("second", 60_000)]


def test_a_prompt_that_the_cache_has_lost_leaves_the_short_lane() -> None:
    lost, kept = long_entry("lost", 9_984, read=9_728), long_entry("kept", 9_984, read=1_024)
    scheduler = admitted(limits(step_ms=500.0), lost, kept)
    step = scheduler.plan(0.0)
    assert step is not None and not step.long and shown(step)[0] == ("lost", 256)
    scheduler.found(lost, 0)
    scheduler.advance(step, 0.3)
    assert lost.lane == "long" and lost.read == 256
    step = long_step(scheduler)
    assert shown(step) == [("kept", 512)], "less is left of it"
    scheduler.found(kept, 9_728)
    assert scheduler.plan(0.0) is step, "what has begun as a long step is gone on with as one"


@pytest.mark.parametrize(
    ("library", "chapter", "nested"),
    [
        ({"priority": 1}, {}, False),
        ({"priority": 1}, {"priority": 2}, True),
        ({}, {"deadline": 20.0}, True),
        ({"deadline": 100.0}, {}, True),
        ({"deadline": 70.0}, {}, False),
        ({"deadline": 30.0}, {}, True),
    ],
)
def test_a_chapter_begins_on_top_only_of_what_may_wait(
    library: dict[str, Any], chapter: dict[str, Any], nested: bool
) -> None:
    """60 s of reading: a deadline in 100 s leaves room for 3 s more, one in 70 s does not, and one in 30 s
    cannot be met anyway."""
    scheduler = admitted(limits(), long_entry("library", 60_000, chunkable=False, **library))
    below = long_step(scheduler)
    scheduler.admit([long_entry("chapter", 3_000, chunkable=False, **chapter)])
    assert scheduler.should_pause(below, 0.1) is nested
    scheduler.ran(below, 0.1)
    assert (scheduler.plan(0.1) is below) is not nested


@pytest.mark.parametrize(
    ("low", "high", "left"),
    [(-10, 10, True), (0, CLEARLY_HIGHER, True), (0, CLEARLY_HIGHER - 1, False), (10, 10, False)],
)
def test_a_begun_document_is_left_for_one_of_clearly_higher_priority(low: int, high: int, left: bool) -> None:
    scheduler = admitted(limits(), long_entry("low", 6_000, chunkable=False, priority=low, deadline=8.0))
    below = long_step(scheduler)
    scheduler.admit([long_entry("high", 9_000, chunkable=False, priority=high)])
    assert scheduler.should_pause(below, 1.0) is left
    scheduler.ran(below, 1.0)
    expected = [("high", 9_000)] if left else [("low", 6_000)]
    assert planned(scheduler, 1.0, 9.0) == expected
    if left:
        assert scheduler.plan(10.0) is below, "it goes on where it was left"


def test_a_debt_to_what_has_begun_does_not_keep_a_clearly_higher_priority_waiting() -> None:
    scheduler = admitted(limits(), long_entry("low", 60_000, chunkable=False, priority=-10))
    below = long_step(scheduler)
    scheduler.ran(below, 0.1)
    scheduler.admit([long_entry("chapter", 3_000, chunkable=False, priority=-10)])
    assert planned(scheduler, 0.1, seconds=3.0) == [("chapter", 3_000)]
    assert scheduler.plan(3.1) is below
    scheduler.resumed(below, 3.1)
    scheduler.admit([long_entry("high", 90_000, chunkable=False, priority=10)])
    assert scheduler.should_pause(below, 3.2)
    scheduler.ran(below, 0.1)
    assert planned(scheduler, 3.2) == [("high", 90_000)]


def test_what_has_begun_ages_until_no_priority_goes_before_it() -> None:
    scheduler = admitted(limits(), long_entry("low", 60_000, chunkable=False, priority=-10))
    below, now, num_read = long_step(scheduler), 0.0, 0
    while True:
        scheduler.admit([long_entry(f"high {num_read}", 90_000, chunkable=False, priority=10, arrived=now)])
        if not scheduler.should_pause(below, now):
            break
        scheduler.ran(below, 0.0)
        assert planned(scheduler, now, 7.0) == [(f"high {num_read}", 90_000)]
        now, num_read = now + 7.0, num_read + 1
        assert scheduler.plan(now) is below
        scheduler.resumed(below, now)
    assert (20 - CLEARLY_HIGHER) * AGE_S < now <= (21 - CLEARLY_HIGHER) * AGE_S + 7.0


def test_what_was_passed_too_often_finds_its_memory_when_its_lane_has_its_turn() -> None:
    """Short requests that hold memory end together, and others wait: they do not take it all again."""
    document = long_entry("document", bytes=800)
    scheduler = admitted(limits(), *(entry(f"s{i}", 5, bytes=300) for i in range(4)))
    planned(scheduler)
    scheduler.admit([document])
    decoded: dict[int, int] = {}
    for i in range(200):
        step = scheduler.plan(0.0)
        assert step is not None
        if any(part is document for part, _ in step.parts):
            return
        run(scheduler, step, 0.01)
        for part, _ in step.parts:
            decoded[part.key] = decoded.get(part.key, 0) + part.decoding
            if decoded[part.key] == 8:
                scheduler.release(part)
                scheduler.admit([entry(f"t{i}", 5, bytes=300)])
    pytest.fail("the document never started")


def test_documents_of_like_length_are_read_one_after_the_other() -> None:
    scheduler = admitted(limits(), long_entry("first", 6_000, chunkable=False))
    below = long_step(scheduler)
    scheduler.resumed(below, 0.0)
    scheduler.admit([long_entry("second", 4_000, chunkable=False)])
    assert not scheduler.should_pause(below, 1.1)
    scheduler.ran(below, 1.1)
    assert scheduler.plan(1.1) is below


def test_a_begun_document_gets_its_share_between_shorter_ones() -> None:
    scheduler = admitted(limits(), long_entry("library", 60_000, chunkable=False))
    below = long_step(scheduler)
    scheduler.ran(below, 0.1)
    for i in range(2):
        scheduler.admit([long_entry(f"chapter {i}", 3_000, chunkable=False)])
    assert planned(scheduler, 0.1, seconds=3.0) == [("chapter 0", 3_000)]
    assert scheduler.plan(3.1) is below
    scheduler.resumed(below, 3.1)
    assert not scheduler.should_pause(below, 4.5)
    assert scheduler.should_pause(below, 4.7), "half of what the chapter took has passed"
    scheduler.ran(below, 1.6)
    assert planned(scheduler, 4.7, seconds=3.0) == [("chapter 1", 3_000)]


def test_the_shorter_of_two_long_prompts_is_read_first_unless_the_other_has_waited() -> None:
    scheduler = admitted(limits(), long_entry("library", 60_000))
    assert planned(scheduler, 0.0) == [("library", 512)]
    scheduler.admit([long_entry("chapter", 3_000, arrived=1.0)])
    assert planned(scheduler, 1.0) == [("chapter", 512)]
    assert planned(scheduler, AGE_S - 0.1) == [("chapter", 512)]
    assert planned(scheduler, AGE_S) == [("library", 512)], "ten seconds without a turn are a point"
    assert planned(scheduler, AGE_S + 0.1) == [("chapter", 512)]


def test_a_long_prompt_whose_deadline_leaves_little_slack_goes_first() -> None:
    pressed = long_entry("pressed", 60_000, deadline=70.0)
    scheduler = admitted(limits(), pressed, long_entry("chapter", 3_000, deadline=500.0))
    assert planned(scheduler, 0.0) == [("pressed", 512)]
    hopeless = long_entry("hopeless", 60_000, deadline=30.0)
    scheduler = admitted(limits(), hopeless, long_entry("chapter", 3_000, deadline=500.0))
    assert planned(scheduler, 0.0) == [("chapter", 512)]


def test_long_steps_of_two_models_take_turns_in_slices() -> None:
    scheduler = admitted(limits(), long_entry("a", model="x"), long_entry("b", model="y"))
    slices: list[tuple[str, float]] = []
    now = 0.0
    for _ in range(6):
        step = long_step(scheduler, now)
        started = now
        while not scheduler.should_pause(step, now):
            now += 0.01
        scheduler.ran(step, now - started)
        slices.append((step.model, now - started))
    assert [model for model, _ in slices] == ["x", "y"] * 3
    assert all(LONG_SLICE_MS <= 1000 * seconds <= 2.1 * LONG_SLICE_MS for _, seconds in slices)
    assert len(scheduler.begun) == 2


def test_a_model_keeps_its_long_turn_while_short_work_comes_between() -> None:
    scheduler = admitted(limits(), long_entry("a", model="x"), long_entry("b", model="y"))
    turns: list[str] = []
    now = 0.0
    for i in range(40):
        step = long_step(scheduler, now)
        scheduler.admit([entry(f"s{i}", 5, chunkable=False)])
        assert scheduler.should_pause(step, now + 0.1)
        scheduler.ran(step, 0.1)
        turns.append(step.model)
        assert planned(scheduler, now + 0.1, 0.01) == [(f"s{i}", 5)]
        now += 0.11
    changes = sum(before != after for before, after in itertools.pairwise(turns))
    assert 3 <= changes <= 8, "five tenths of a second each"


def dear_and_long() -> tuple[Entry, Entry]:
    """A short prompt of 160 ms, and a long one of 32 ms for its smallest piece."""
    return entry("d", 160, price=per_token(1.0)), long_entry("a", price=per_token(0.25))


def test_pieces_of_long_prompts_fill_short_steps_unless_they_are_in_a_long_step() -> None:
    short, long = dear_and_long()
    assert shown(admitted(limits(), short, long).plan(0.0)) == [("d", 160), ("a", 128)]
    short, long = dear_and_long()
    scheduler = admitted(limits(), long)
    long_step(scheduler)
    scheduler.admit([short])
    assert planned(scheduler) == [("d", 160)]


def test_long_prompts_fill_no_more_of_a_short_step_than_their_lane_has_a_share_in() -> None:
    """A quarter of what the short work takes: 40 ms of 160, not what is left of the step."""
    for weight, parts in ((4.0, [("a", 128)]), (6.0, []), (1.0, [("a", 128)])):
        scheduler = admitted(limits(short_weight=weight), *dear_and_long())
        assert shown(scheduler.plan(0.0)) == [("d", 160), *parts]
    roomy = admitted(limits(step_ms=1000), *dear_and_long())
    assert shown(roomy.plan(0.0)) == [("d", 160), ("a", 128)]


def test_what_a_short_step_lends_to_long_prompts_is_on_their_account() -> None:
    scheduler = admitted(limits(), *dear_and_long())
    step = scheduler.plan(0.0)
    assert step is not None and step.predicted_ms == 192 and step.lent_ms == 32
    scheduler.advance(step, 1.92)
    assert scheduler._turns.used("long") == pytest.approx(320)
    assert scheduler._turns.used("short") == pytest.approx(1600 / 4)


@pytest.mark.parametrize("weight", [1.0, 4.0])
@pytest.mark.parametrize("num_decoding", [1, 20])
def test_decoding_keeps_its_share_beside_a_long_prompt_of_its_model(weight: float, num_decoding: int) -> None:
    """Whether the prompt is read in steps of its own or fills others."""

    def price(start: int, tokens: int) -> float:
        return 5.0

    bounds = limits(short_weight=weight, max_queue_tokens=10_000_000, max_running=64)
    decoding = [entry(f"d{i}", 5, price=price) for i in range(num_decoding)]
    scheduler = admitted(bounds, *decoding, long_entry("a", 1_000_000, price=per_token(0.1)))
    now, decoded_ms, read_ms = 0.0, 0.0, 0.0
    while now < 60:
        step = scheduler.plan(now)
        assert step is not None
        started = now
        if step.long:
            while not scheduler.should_pause(step, now) and now < started + 0.0512:
                now += 0.005
            read_ms += 1000 * (now - started)
            finish = scheduler.advance if now >= started + 0.0512 else scheduler.ran
            finish(step, now - started)
        else:
            now += step.predicted_ms / 1000
            read_ms += step.lent_ms
            decoded_ms += step.predicted_ms - step.lent_ms
            run(scheduler, step, now - started)
    assert decoded_ms / read_ms == pytest.approx(weight, rel=0.15)


@pytest.mark.parametrize("weight", [1.0, 4.0, 9.0])
@pytest.mark.parametrize("models", [("m", "m"), ("x", "y")])
def test_busy_lanes_share_the_time_by_weight(weight: float, models: tuple[str, str]) -> None:
    """Somebody always decodes, somebody always reads a long prompt."""
    bounds = limits(short_weight=weight, max_queue_tokens=10_000_000, short_ms=1000)
    scheduler = admitted(bounds, entry("d", 5, model=models[0]))
    scheduler.admit([long_entry("a", 1_000_000, chunkable=False, model=models[1])])
    used = {False: 0.0, True: 0.0}
    now = 0.0
    while now < 60:
        step = scheduler.plan(now)
        assert step is not None
        started, now = now, now + 0.02
        if step.long:
            while not scheduler.should_pause(step, now):
                now += 0.02
            scheduler.ran(step, now - started)
        else:
            run(scheduler, step, now - started)
        used[step.long] += now - started
    assert used[False] / used[True] == pytest.approx(weight, rel=0.1)


def test_what_comes_after_idle_time_starts_level() -> None:
    """An hour of long work alone is no credit for short work, and the other way round."""
    scheduler = admitted(limits(), long_entry("a", 1_000_00, chunkable=False))
    step = long_step(scheduler)
    assert not scheduler.should_pause(step, 3600.0)
    scheduler.admit([entry("d", 5)])
    assert scheduler.should_pause(step, 3600.0)
    scheduler.ran(step, 3600.0)
    planned(scheduler, 3600.0, 0.2)
    assert scheduler.plan(3600.2) is step, "it has had its four shares in one step"


def test_the_weight_of_a_lane_must_not_depend_on_how_often_it_is_asked() -> None:
    runs = []
    for asks in (1, 1000):
        scheduler = admitted(limits(), long_entry("a"))
        step = long_step(scheduler)
        for i in range(asks):
            scheduler.should_pause(step, (i + 1) / asks)
        scheduler.ran(step, 1.0)
        runs.append(scheduler._turns.used("long"))
    assert runs[0] == pytest.approx(runs[1]) == pytest.approx(1000) and math.isfinite(runs[0])


def collector(job: str, count: int, *, num_bytes: int, output_bytes: int) -> list[Entry]:
    """Inputs of one request, read whole one a step."""
    values = {"bytes": num_bytes, "output_bytes": output_bytes, "chunkable": False}
    return [entry(job, 600, price=per_token(1.0), **values) for _ in range(count)]


def read_next(scheduler: Scheduler, unfinished: dict[str, int], now: float = 0.0) -> list[str]:
    """The next step, and what it reads is done: its output stays where its request has further inputs."""
    step = scheduler.plan(now)
    assert step is not None
    scheduler.advance(step, 0.1)
    for part, _ in step.parts:
        unfinished[part.job] -= 1
        scheduler.release(part, keeps_output=unfinished[part.job] > 0)
        if not unfinished[part.job]:
            scheduler.drop(part.job)
    return [part.job for part, _ in step.parts]


def test_outputs_of_inputs_that_are_done_stay_reserved_until_their_request_ends() -> None:
    scheduler = Scheduler(limits(step_tokens=600, memory_bytes=1000))
    scheduler.admit(collector("a", 3, num_bytes=400, output_bytes=150))
    unfinished, reserved = {"a": 3}, []
    while unfinished["a"]:
        assert read_next(scheduler, unfinished) == ["a"]
        reserved.append(scheduler.reserved_bytes)
    assert reserved == [150, 300, 0]
    scheduler.admit(collector("b", 2, num_bytes=400, output_bytes=150))
    read_next(scheduler, {"b": 2})
    scheduler.admit([entry("c", 5, bytes=900, chunkable=False)])
    assert read_next(scheduler, {"b": 1, "c": 1}) == ["b"] and scheduler.reserved_bytes == 0
    assert planned(scheduler) == [("c", 5)], "it never had room beside what was kept"


def test_a_request_whose_last_input_cannot_fit_beside_its_outputs_is_refused() -> None:
    scheduler = Scheduler(limits(memory_bytes=1000))
    with pytest.raises(Rejected, match="never_fits") as caught:
        scheduler.admit(collector("a", 6, num_bytes=400, output_bytes=150))
    assert caught.value.value == 6 * 150 + 250 and scheduler.waiting() == (0, 0)
    scheduler.admit(collector("a", 5, num_bytes=400, output_bytes=150))


def test_requests_that_collect_outputs_never_wait_for_each_other() -> None:
    """Each fits alone; two of them, all but their last inputs read, would leave room for neither last one."""
    scheduler = Scheduler(limits(step_tokens=600, memory_bytes=1000))
    unfinished = {"a": 4, "b": 4, "c": 1}
    for job in "ab":
        scheduler.admit(collector(job, 4, num_bytes=400, output_bytes=150))
    scheduler.admit([entry("c", 5, bytes=700, chunkable=False)])
    order: list[str] = []
    while any(unfinished.values()):
        order += read_next(scheduler, unfinished)
        assert len(order) < 12
    assert order.count("a") == order.count("b") == 4 and scheduler.reserved_bytes == 0


def test_what_was_passed_too_often_does_not_keep_a_collecting_request_from_its_end() -> None:
    scheduler = Scheduler(limits(step_tokens=600, memory_bytes=1000))
    scheduler.admit(collector("a", 3, num_bytes=400, output_bytes=150))
    unfinished = {"a": 3, "large": 1}
    read_next(scheduler, unfinished)
    large = entry("large", 5, bytes=950, chunkable=False)
    large.passed_steps = MAX_PASSED_STEPS
    scheduler.admit([large])
    assert [read_next(scheduler, unfinished) for _ in range(3)] == [["a"], ["a"], ["large"]]


def test_a_dropped_request_gives_back_what_it_has_collected() -> None:
    scheduler = Scheduler(limits(step_tokens=600, memory_bytes=1000))
    scheduler.admit(collector("a", 3, num_bytes=400, output_bytes=150))
    read_next(scheduler, {"a": 3})
    assert scheduler.reserved_bytes == 150
    scheduler.drop("a")
    assert scheduler.reserved_bytes == 0 and scheduler.waiting() == (0, 0)
