"""The policy as a table of cases: plain objects, no model, no clock of its own."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from service.drain_rate import DrainRate
from service.scheduler import MAX_PASSED_STEPS, Entry, Limits, Rejected, Scheduler, Step

_keys = itertools.count()


def limits(**changes: int) -> Limits:
    defaults = {
        "max_queue_requests": 100,
        "max_queue_tokens": 100_000,
        "max_running": 16,
        "step_tokens": 1024,
        "prefill_chunk_tokens": 512,
        "memory_bytes": 1000,
    }
    return Limits(**{**defaults, **changes})


def entry(job: str, tokens: int, **changes: Any) -> Entry:
    values: dict[str, Any] = {"model": "m", "chunkable": True, "bytes": 1, **changes}
    return Entry(key=next(_keys), job=job, tokens=tokens, **values)


def planned(scheduler: Scheduler) -> list[tuple[str, int]]:
    """The next step as (request, tokens), carried out."""
    step = scheduler.plan()
    if step is None:
        return []
    run(scheduler, step)
    return [(part.job, tokens) for part, tokens in step.parts]


def run(scheduler: Scheduler, step: Step, seconds: float = 1.0) -> None:
    scheduler.advance(step, seconds)
    for part, _ in step.parts:
        if part.chunkable and part.read == part.tokens:
            part.decoding = True
        elif not part.chunkable:
            scheduler.release(part)


def test_a_long_prompt_is_read_in_chunks_and_then_decodes_one_token_a_step() -> None:
    scheduler = Scheduler(limits())
    scheduler.admit([entry("a", 1300)])
    steps = [planned(scheduler) for _ in range(5)]
    assert steps == [[("a", 512)], [("a", 512)], [("a", 276)], [("a", 1)], [("a", 1)]]


def test_a_chunk_ends_at_the_query_tiles_of_a_backend_that_selects_by_them() -> None:
    scheduler = Scheduler(limits(step_tokens=600))
    scheduler.admit([entry("a", 300), entry("tiles", 1000, chunk_multiple=256)])
    steps = [planned(scheduler) for _ in range(4)]
    assert steps[0] == [("a", 300), ("tiles", 256)]
    assert steps[1:] == [[("a", 1), ("tiles", 512)], [("a", 1), ("tiles", 232)], [("a", 1), ("tiles", 1)]]


def test_a_query_tile_larger_than_the_step_is_read_whole() -> None:
    scheduler = Scheduler(limits(step_tokens=512))
    scheduler.admit([entry("tiles", 1100, chunk_multiple=1024)])
    assert [planned(scheduler) for _ in range(3)] == [[("tiles", 1024)], [("tiles", 76)], [("tiles", 1)]]


def test_a_query_tile_larger_than_the_chunk_is_read_whole_where_the_budget_allows() -> None:
    scheduler = Scheduler(limits(step_tokens=2048))
    scheduler.admit([entry("tiles", 3000, chunk_multiple=1024), entry("b", 600)])
    assert planned(scheduler) == [("tiles", 1024), ("b", 512)]


def standstill(scheduler: Scheduler, watched: str, arrivals: list[list[Entry]]) -> tuple[int, list[str]]:
    """The most steps in a row in which a prompt stood still while its request was there, and the order in
    which prompts were read to their end. Requests arrive one list a step."""
    entries = {part.job: part for part in scheduler._entries()}
    longest = still = 0
    ended: list[str] = []
    for step in range(400):
        for part in arrivals[step] if step < len(arrivals) else []:
            scheduler.admit([part])
            entries[part.job] = part
        before = entries[watched].read
        planned(scheduler)
        for part in list(entries.values()):
            if part.decoding and part.job not in ended:
                ended.append(part.job)
                scheduler.release(part)
        if entries[watched].decoding:
            return longest, ended
        still = 0 if entries[watched].read > before else still + 1
        longest = max(longest, still)
    raise AssertionError(f"{watched} was never read to its end")


@pytest.mark.parametrize("newcomer", [130, 500, 600, 900, 1024, 1500, 5000])
@pytest.mark.parametrize("ahead", [0, 700, 100_000])
def test_a_waiting_prompt_with_a_large_query_tile_is_passed_only_so_often(newcomer: int, ahead: int) -> None:
    """One new request a step, each of which fits beside a running one; a tile of a whole step does not."""
    scheduler = Scheduler(limits(max_queue_tokens=10_000_000, max_queue_requests=1000))
    if ahead:
        scheduler.admit([entry("ahead", ahead)])
        planned(scheduler)
    scheduler.admit([entry("tiles", 3000, chunk_multiple=1024)])
    arrivals = [[entry(f"n{i}", newcomer)] for i in range(100)]
    longest, ended = standstill(scheduler, "tiles", arrivals)
    assert longest <= MAX_PASSED_STEPS
    assert "ahead" in ended or ahead != 700, "what came before is not kept waiting either"


@pytest.mark.parametrize(
    ("other", "multiple", "ordinary"),
    [(100_000, 128, 1), (100_000, 128, 4), (100_000, 1024, 1), (100_000, 1024, 3), (2000, 256, 6)],
)
def test_a_running_prompt_with_a_large_query_tile_is_not_starved_by_other_running_ones(
    other: int, multiple: int, ordinary: int
) -> None:
    """All are running already and want more than a step together: nobody reads first twice in a row while
    another stands still."""
    scheduler = Scheduler(limits())
    others = [entry(f"o{i}", other, chunk_multiple=multiple) for i in range(ordinary)]
    tiles = entry("tiles", 8000, chunk_multiple=1024)
    for part in [*others, tiles]:
        scheduler.admit([part])
        scheduler._running[part.key] = scheduler._waiting.pop(part.key)
    longest, _ = standstill(scheduler, "tiles", [])
    assert longest <= min(ordinary, MAX_PASSED_STEPS)


def test_running_prompts_are_not_starved_by_waiting_ones_that_were_passed() -> None:
    """Many large tiles wait: all are passed at once, and begin before the running ones one after another."""
    scheduler = Scheduler(limits(max_queue_tokens=10_000_000, max_queue_requests=1000, max_running=64))
    scheduler.admit([entry("ahead", 20_000)])
    planned(scheduler)
    for i in range(30):
        scheduler.admit([entry(f"tiles{i}", 1024, chunk_multiple=1024)])
    arrivals = [[entry(f"n{i}", 500)] for i in range(200)]
    longest, _ = standstill(scheduler, "ahead", arrivals)
    assert longest <= MAX_PASSED_STEPS


def test_what_was_passed_too_often_does_not_begin_without_memory() -> None:
    scheduler = Scheduler(limits(memory_bytes=10, max_queue_tokens=10_000_000))
    scheduler.admit([entry("ahead", 100_000, bytes=6)])
    planned(scheduler)
    scheduler.admit([entry("tiles", 3000, chunk_multiple=1024, bytes=5)])
    for i in range(3 * MAX_PASSED_STEPS):
        scheduler.admit([entry(f"n{i}", 130, bytes=1)])
        planned(scheduler)
        assert scheduler.reserved_bytes <= 10
    assert "tiles" not in {part.job for part in scheduler._running.values()}


def test_decode_tokens_come_first_and_prompts_fill_what_is_left() -> None:
    scheduler = Scheduler(limits(step_tokens=600))
    scheduler.admit([entry("a", 10)])
    assert planned(scheduler) == [("a", 10)]
    scheduler.admit([entry("b", 2000)])
    scheduler.admit([entry("c", 50)])
    assert planned(scheduler) == [("a", 1), ("b", 512), ("c", 50)]
    assert planned(scheduler) == [("a", 1), ("c", 1), ("b", 512)]


def test_chunks_end_at_tile_boundaries_but_the_first_reader_always_advances() -> None:
    scheduler = Scheduler(limits(step_tokens=300, prefill_chunk_tokens=300))
    scheduler.admit([entry("a", 1000)])
    assert [planned(scheduler) for _ in range(4)] == [[("a", 256)], [("a", 256)], [("a", 256)], [("a", 232)]]
    crowded = Scheduler(limits(step_tokens=16, prefill_chunk_tokens=16))
    crowded.admit([entry("b", 200)])
    assert planned(crowded) == [("b", 128)], "a budget below a tile must not stall"


def test_whole_inputs_of_an_encoder_share_a_step_while_they_fit() -> None:
    scheduler = Scheduler(limits(step_tokens=100))
    for job, tokens in (("a", 40), ("b", 70), ("c", 30), ("d", 30)):
        scheduler.admit([entry(job, tokens, chunkable=False)])
    assert planned(scheduler) == [("a", 40), ("c", 30), ("d", 30)]
    assert planned(scheduler) == [("b", 70)]
    assert planned(scheduler) == []


def test_a_long_input_runs_alone_after_a_bounded_number_of_short_steps() -> None:
    scheduler = Scheduler(limits(step_tokens=100, max_queue_requests=1000))
    scheduler.admit([entry("long", 5000, chunkable=False)])
    steps = []
    for i in range(MAX_PASSED_STEPS + 3):
        scheduler.admit([entry(f"short{i}", 60, chunkable=False)])
        steps.append(planned(scheduler))
    assert steps[MAX_PASSED_STEPS] == [("long", 5000)]
    assert all(step[0][0].startswith("short") for i, step in enumerate(steps) if i != MAX_PASSED_STEPS)


def test_a_long_input_with_nobody_behind_it_runs_at_once() -> None:
    scheduler = Scheduler(limits(step_tokens=100))
    scheduler.admit([entry("long", 5000, chunkable=False)])
    assert planned(scheduler) == [("long", 5000)]


def test_memory_is_reserved_until_released_and_never_exceeded() -> None:
    scheduler = Scheduler(limits(memory_bytes=10))
    scheduler.admit([entry("a", 5, bytes=6)])
    scheduler.admit([entry("b", 5, bytes=6)])
    step = scheduler.plan()
    assert step is not None and [part.job for part, _ in step.parts] == ["a"]
    run(scheduler, step)
    assert scheduler.reserved_bytes == 6
    assert planned(scheduler) == [("a", 1)], "b must wait"
    scheduler.release(step.parts[0][0])
    assert planned(scheduler) == [("b", 5)]


def test_what_waits_for_memory_is_passed_only_so_often() -> None:
    scheduler = Scheduler(limits(memory_bytes=10, step_tokens=100))
    holder = entry("holder", 5, bytes=5)
    scheduler.admit([holder])
    planned(scheduler)
    scheduler.admit([entry("big", 5, bytes=9)])
    passed = 0
    for i in range(MAX_PASSED_STEPS * 3):
        scheduler.admit([entry(f"s{i}", 5, bytes=1, chunkable=False)])
        passed += any(job.startswith("s") for job, _ in planned(scheduler))
    assert passed == MAX_PASSED_STEPS
    scheduler.release(holder)
    assert ("big", 5) in planned(scheduler)


def test_a_request_larger_than_the_memory_is_refused_at_once() -> None:
    scheduler = Scheduler(limits(memory_bytes=10))
    with pytest.raises(Rejected) as caught:
        scheduler.admit([entry("a", 5, bytes=11)])
    assert (caught.value.reason, caught.value.value, caught.value.limit) == ("never_fits", 11, 10)
    assert scheduler.waiting() == (0, 0) and scheduler.plan() is None


def test_the_queue_is_bounded_in_requests_and_in_tokens() -> None:
    scheduler = Scheduler(limits(max_queue_requests=2, max_queue_tokens=100))
    scheduler.admit([entry("a", 10), entry("a", 10), entry("a", 10)])
    scheduler.admit([entry("b", 10)])
    with pytest.raises(Rejected, match="queue_full"):
        scheduler.admit([entry("c", 1)])
    tokens = Scheduler(limits(max_queue_tokens=100))
    tokens.admit([entry("a", 60)])
    with pytest.raises(Rejected, match="token_budget"):
        tokens.admit([entry("b", 60)])
    with pytest.raises(Rejected, match="too_many_tokens"):
        tokens.admit([entry("c", 101)])
    assert tokens.waiting() == (1, 60), "a refused request leaves nothing behind"


def test_max_running_bounds_how_many_hold_a_cache() -> None:
    scheduler = Scheduler(limits(max_running=2))
    for job in "abc":
        scheduler.admit([entry(job, 5)])
    assert [job for job, _ in planned(scheduler)] == ["a", "b"]
    assert [job for job, _ in planned(scheduler)] == ["a", "b"]


def test_what_holds_no_cache_is_read_while_every_place_is_taken() -> None:
    """Long generations in all places must not keep an encoder from its steps."""
    scheduler = Scheduler(limits(max_running=2))
    for job in ("a", "b", "c"):
        scheduler.admit([entry(job, 5, model="dec")])
    planned(scheduler)
    for i in range(3):
        scheduler.admit([entry(f"e{i}", 10, model="enc", chunkable=False)])
    steps = [planned(scheduler) for _ in range(4)]
    assert [("e0", 10), ("e1", 10), ("e2", 10)] in steps, "read in one step, as if there were no decoder"
    assert [("a", 1), ("b", 1)] in steps and not any(("c", 5) in step for step in steps)


def test_models_take_turns_by_the_time_they_use() -> None:
    scheduler = Scheduler(limits())
    scheduler.admit([entry("slow", 5, model="x")])
    scheduler.admit([entry("fast", 5, model="y")])
    seconds = {"x": 10.0, "y": 1.0}
    order = []
    for _ in range(22):
        step = scheduler.plan()
        assert step is not None
        run(scheduler, step, seconds[step.model])
        order.append(step.model)
    assert order.count("x") == 2 and order.count("y") == 20


def test_an_idle_model_saves_up_no_credit() -> None:
    scheduler = Scheduler(limits())
    scheduler.admit([entry("a", 5, model="x")])
    for _ in range(50):
        planned(scheduler)
    scheduler.admit([entry("b", 5, model="y")])
    models = []
    for _ in range(10):
        step = scheduler.plan()
        assert step is not None
        run(scheduler, step)
        models.append(step.model)
    assert models.count("x") == 5


def test_a_dropped_request_leaves_before_the_next_step_and_keeps_its_memory_until_released() -> None:
    scheduler = Scheduler(limits())
    scheduler.admit([entry("a", 2000, bytes=7)])
    step = scheduler.plan()
    assert step is not None
    run(scheduler, step)
    ((running, _),) = step.parts
    scheduler.admit([entry("b", 5)])
    scheduler.drop("a")
    scheduler.drop("b")
    assert scheduler.waiting() == (0, 0)
    assert scheduler.plan() is None and scheduler.reserved_bytes == 7
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


def test_retry_after_follows_the_measured_rate() -> None:
    rate = DrainRate()
    assert rate.seconds_for(10_000) == 1.0, "nothing measured yet: the shortest wait"
    for _ in range(10):
        rate.observe(100, 1.0)
    assert rate.tokens_per_s == pytest.approx(100)
    assert rate.seconds_for(1000) == pytest.approx(10)
    assert rate.seconds_for(1_000_000) == 120.0 and rate.seconds_for(1) == 1.0
    for _ in range(600):
        rate.observe(1000, 1.0)
    assert rate.tokens_per_s == pytest.approx(1000, rel=0.01), "recent steps weigh more"


@pytest.mark.parametrize("seed", range(12))
def test_whatever_arrives_every_request_ends_within_its_limits(seed: int) -> None:
    """Random arrivals: budgets hold, memory holds, encoder inputs stay whole, everything finishes."""
    rng = random.Random(seed)
    bounds = limits(
        memory_bytes=60, step_tokens=rng.choice([64, 200, 512]), prefill_chunk_tokens=64, max_running=5
    )
    scheduler = Scheduler(bounds)
    left: dict[str, int] = {}
    decode_left: dict[int, int] = {}
    for i in range(60):
        job = f"j{i}"
        chunkable = rng.random() < 0.5
        model = "dec" if chunkable else "enc"
        parts = [
            entry(job, rng.randint(1, 900), model=model, chunkable=chunkable, bytes=rng.randint(1, 60))
            for _ in range(rng.randint(1, 3))
        ]
        scheduler.admit(parts)
        left[job] = len(parts)
    for _ in range(20_000):
        step = scheduler.plan()
        if step is None:
            break
        holding = sum(part.holds_cache for part in scheduler._running.values())
        assert scheduler.reserved_bytes <= 60 and holding <= 5
        whole = [tokens for part, tokens in step.parts if not part.chunkable]
        over = step.tokens > bounds.step_tokens
        assert not over or len(whole) == 1 or step.tokens <= bounds.step_tokens + 128
        assert len({part.model for part, _ in step.parts}) == 1
        scheduler.advance(step, 0.1)
        for part, tokens in step.parts:
            if not part.chunkable:
                assert tokens == part.tokens
                done = True
            elif part.read < part.tokens:
                done = False
            else:
                part.decoding = True
                decode_left[part.key] = decode_left.get(part.key, rng.randint(1, 5)) - 1
                done = decode_left[part.key] == 0
            if done:
                scheduler.release(part)
                left[part.job] -= 1
    assert scheduler.waiting() == (0, 0) and not scheduler._running and not any(left.values())
