"""Steps from their beginning to their end: long ones that are left and gone on with, given up, cut short;
prompts read once for many choices; beginnings found in the cache; an engine that stalls and comes back."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from models.contract import Choice, Prompt
from service.attention import exact_choice
from service.errors import ApiError
from service.seen import TimeSeen
from service.watchdog import look, watch
from tests.service.bench import Clock, done, failed, generated, ids_of, running, tokens_of, told
from tests.service.conftest import Blocker, wait_for
from tests.service.fake_model import FakeModel, decoder, encoder

PIECES = 50
LONG_TOKENS = 1000


class HeldAt:
    """An ``on_piece`` hook: notes every piece, and waits at one of them until told to go on."""

    def __init__(self, piece: int, log: list[Any] | None = None) -> None:
        self.piece = piece
        self.log: list[Any] = [] if log is None else log
        self.blocker = Blocker()

    def __call__(self, piece: int) -> None:
        self.log.append(piece)
        if piece == self.piece:
            self.blocker(None)

    def reached(self) -> None:
        assert self.blocker.entered.wait(20)

    def go_on(self) -> None:
        self.blocker.release.set()


def long_encoder(held: HeldAt, **changes: Any) -> FakeModel:
    return encoder("long", pieces=PIECES, on_piece=held, max_tokens=4096, **changes)


@pytest.mark.parametrize("same_model", [False, True])
def test_a_short_request_runs_in_the_middle_of_a_long_one(same_model: bool) -> None:
    held = HeldAt(10)
    model = long_encoder(held)
    other = model if same_model else encoder()
    with running(model, other) as bench:
        alone = bench.encode(model, LONG_TOKENS)
        held.reached()
        held.go_on()
        done(alone)
        held = model.on_piece = HeldAt(10)
        other.on_step = lambda slices: held.log.append(("step", len(slices[0].token_ids)))
        long = bench.encode(model, LONG_TOKENS)
        held.reached()
        short = bench.encode(other, 20)
        assert bench.engine.load(other.info.name).queued_requests == 1
        held.go_on()
        done(short, long)
    log = [entry for entry in held.log if entry != ("step", LONG_TOKENS)]
    assert log == [*range(11), ("step", 20), *range(11, PIECES)]
    assert bench.seen[-1].long and bench.seen[-1].pauses == 1
    assert bench.seen[-1].predicted_ms == LONG_TOKENS
    assert long.sequences[0].hidden.equal(alone.sequences[0].hidden)  # type: ignore[attr-defined]


def test_lane_time_is_told_while_a_long_step_is_still_begun() -> None:
    held, again = HeldAt(10), HeldAt(5)
    model, other = long_encoder(held), encoder(on_step=lambda slices: again.blocker(None))
    seen: list[TimeSeen] = []
    with running(model, other, observe_time=seen.append) as bench:
        long = bench.encode(model, LONG_TOKENS)
        held.reached()
        short = bench.encode(other, 20)
        held.go_on()
        again.reached()
        assert [time.left for time in seen] == [True] and seen[0].seconds["long"] > 0
        again.go_on()
        done(short, long)
    assert [time.left for time in seen] == [True, False, False]
    assert seen[1].seconds["long"] == 0 < seen[1].seconds["short"]
    assert sum(time.seconds["long"] for time in seen) == pytest.approx(bench.seen[-1].seconds)


def test_many_short_requests_and_a_long_one_all_finish() -> None:
    model = decoder(pieces=PIECES, max_tokens=8192)
    with running(model) as bench:
        alone = bench.generate(model, 4000, 3)
        done(alone)
        long = bench.generate(model, 4000, 3)
        shorts = [bench.generate(model, 20 + i, 30) for i in range(20)]
        done(long, *shorts)
        again = [bench.generate(model, 20 + i, 30) for i in range(20)]
        done(*again)
    assert tokens_of(long) == tokens_of(alone)
    assert [tokens_of(job) for job in shorts] == [tokens_of(job) for job in again]
    chunks = [tokens for step in model.steps for tokens, _ in step if tokens > 100]
    assert max(chunks) <= 512, "a long prompt is read in chunks"


def test_a_long_request_that_is_cancelled_is_freed_before_the_next_step() -> None:
    held = HeldAt(10)
    model = long_encoder(held)
    open_then: list[int] = []
    with running(model) as bench:
        long = bench.encode(model, LONG_TOKENS)
        held.reached()
        model.on_step = lambda slices: open_then.append(len(model.open_states))
        short = bench.encode(model, 20)
        bench.engine.cancel(long)
        assert bench.engine.reserved_bytes > 0, "its memory is in use until it can be left"
        held.go_on()
        done(short)
        assert failed(long) == "client_closed_request"
    assert held.log == list(range(11)) and open_then == [1]


def test_a_library_that_is_cancelled_below_a_chapter_leaves_and_the_chapter_is_read() -> None:
    held = HeldAt(10)
    model = long_encoder(held)
    with running(model) as bench:
        library = bench.encode(model, LONG_TOKENS)
        held.reached()
        chapter = bench.encode(model, LONG_TOKENS // 5)
        below, above = held.blocker, Blocker()
        held.log.clear()
        held.blocker, held.piece = above, 3
        below.release.set()
        held.reached()
        assert len(model.open_forwards) == 2 and [job.stage for job in (library, chapter)] == ["running"] * 2
        bench.engine.cancel(library)
        held.go_on()
        done(chapter)
        assert failed(library) == "client_closed_request"
        wait_for(lambda: not model.open_forwards)
    assert held.log == list(range(len(held.log))), "the library was not gone on with"


def test_a_long_step_goes_on_for_those_who_still_wait() -> None:
    held = HeldAt(10)
    model = decoder(pieces=PIECES, on_piece=held)
    with running(model) as bench:
        blocker = Blocker()
        model.on_step = lambda slices: blocker(slices) if len(slices[0].token_ids) == 9 else None
        first = bench.generate(model, 9)
        blocker.entered.wait(20)
        leaves, stays = bench.generate(model, 200, 4), bench.generate(model, 210, 4)
        blocker.release.set()
        held.reached()
        assert [len(step) for step in model.steps] == [1, 2], "both are in the long step"
        bench.engine.cancel(leaves)
        inside: list[int] = []
        model.on_step = lambda slices: inside.append(len(model.open_states))
        short = bench.generate(model, 7)
        held.go_on()
        done(first, short, stays)
        assert inside[0] == 3, "what belongs to a begun forward stays open, whoever has left"
        assert failed(leaves) == "client_closed_request"
        wait_for(lambda: len(model.open_states) == 0)
        assert held.log[:PIECES] == list(range(PIECES)) and not told(leaves)
        alone = bench.generate(model, 210, 4)
        done(alone)
        assert tokens_of(alone) == tokens_of(stays)
    assert not bench.engine.has_work("dec")


def test_a_deadline_in_the_middle_of_a_long_step_ends_it_there() -> None:
    held, clock = HeldAt(10), Clock()
    model = long_encoder(held)
    with running(model, clock=clock) as bench:
        job = bench.encode(model, LONG_TOKENS, deadline=clock.now + 5)
        held.reached()
        clock.now += 6
        bench.engine.expire()
        assert failed(job) == "deadline_exceeded" and job.error is not None and job.error.stage == "running"
        held.go_on()
        wait_for(lambda: not model.open_states)
    assert held.log == list(range(11))


def test_an_abort_ends_a_long_step_where_it_may_be_left() -> None:
    held = HeldAt(10)
    model = long_encoder(held)
    with running(model) as bench:
        jobs = [bench.encode(model, LONG_TOKENS), bench.encode(model, LONG_TOKENS)]
        held.reached()
        bench.engine.abort()
        assert [failed(job) for job in jobs] == ["draining", "draining"]
        held.go_on()
        wait_for(lambda: not bench.engine.healthy)
    assert held.log == list(range(11))
    with pytest.raises(ApiError) as refused:
        bench.encode(model, 10)
    assert refused.value.code == "draining"


def test_a_forward_that_is_begun_when_the_engine_dies_is_closed_before_its_sequences() -> None:
    held = HeldAt(10)
    model, deadly = long_encoder(held), encoder()

    def die(slices: object) -> None:
        raise SystemExit("no step can go on")

    deadly.on_step = die
    with running(model, deadly) as bench:
        long = bench.encode(model, LONG_TOKENS)
        held.reached()
        short = bench.encode(deadly, 10)
        held.go_on()
        assert failed(long) == failed(short) == "internal_error"
        wait_for(lambda: not bench.engine.healthy)


def test_long_steps_of_two_models_take_turns() -> None:
    clock = Clock()
    log: list[str] = []

    def piece_of(name: str) -> Callable[[int], None]:
        def note(piece: int) -> None:
            log.append(name)
            clock.now += 0.1

        return note

    models = [encoder(name, pieces=PIECES, max_tokens=4096, on_piece=piece_of(name)) for name in "ab"]
    blocker = Blocker()
    first = encoder("first", on_step=blocker)
    with running(*models, first, clock=clock) as bench:
        opener = bench.encode(first, 5)
        blocker.entered.wait(20)
        jobs = [bench.encode(model, LONG_TOKENS) for model in models]
        blocker.release.set()
        done(opener, *jobs)
    assert sorted(log) == ["a"] * PIECES + ["b"] * PIECES
    turns = [i for i in range(1, len(log)) if log[i] != log[i - 1]]
    assert len(turns) >= 8, "they did not take turns"
    assert all(len(step) == 1 for model in models for step in model.steps)


def leaky(monkeypatch: pytest.MonkeyPatch) -> Choice:
    """A test double: no causal backend looks at the whole prompt."""
    from kernels.registry import load

    window = load("window")
    double = replace(window, name="leaky", capabilities=replace(window.capabilities, selection="prompt"))
    known = {"leaky": double}
    monkeypatch.setattr("service.estimate.load", lambda name: known.get(name) or load(name))
    return Choice("leaky", window.params())


def test_a_prompt_whose_backend_looks_at_all_of_it_is_read_whole_in_a_step_that_can_be_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = HeldAt(10)
    choice = leaky(monkeypatch)
    model = decoder(pieces=PIECES, on_piece=held, max_tokens=4096)
    with running(model) as bench:
        long = bench.generate(model, 3000, 3, choice=choice)
        held.reached()
        short = bench.generate(model, 20, 2)
        held.go_on()
        done(short, long)
        assert model.steps[0] == [(3000, 0)]
        assert (20, 0) in model.steps[1], "the short one ran inside"
        assert len(tokens_of(long)[0]) == 3


@pytest.mark.parametrize("new_tokens", [1, 6])
@pytest.mark.parametrize("tokens", [40, 900])
def test_choices_of_one_prompt_read_it_once_and_get_what_each_gets_alone(
    tokens: int, new_tokens: int
) -> None:
    model = decoder()
    with running(model) as bench:
        apart = bench.generate(model, tokens, new_tokens, n=5, leads=False)
        done(apart)
        read_apart = sum(n for step in model.steps for n, start in step if start < tokens)
        model.steps.clear()
        job = bench.generate(model, tokens, new_tokens, n=5)
        done(job)
    assert tokens_of(job) == tokens_of(apart) and len({tuple(ids) for ids in tokens_of(job)}) > 1
    assert read_apart == 5 * tokens
    assert sum(n for step in model.steps for n, start in step if start < tokens) == tokens
    assert model.num_forks == (4 if new_tokens > 1 else 0)
    leader, *followers = generated(job)
    assert leader.prefill_work.pairs_exact > 0
    assert all(follower.prefill_work.pairs_exact == 0 for follower in followers)
    assert [follower.decode_work.pairs_exact > 0 for follower in followers] == [new_tokens > 1] * 4


def test_tokens_of_choices_that_share_a_prompt_are_streamed_as_they_come() -> None:
    model = decoder()
    with running(model) as bench:
        job = bench.generate(model, 30, 4, n=3, stream=True)
        done(job)
        out = told(job)
    assert [token.index for token in out[:3]] == [0, 1, 2]
    for index, sequence in enumerate(generated(job)):
        assert [token for token in out if token.index == index] == sequence.tokens


def test_the_memory_of_choices_is_reserved_together_and_freed_one_by_one() -> None:
    model = decoder(script=b"abcdefgh")
    blocker = Blocker()
    with running(model) as bench:
        model.on_step = lambda slices: blocker(slices) if len(slices) == 3 else None
        job = bench.generate(model, 30, 4, n=3)
        blocker.entered.wait(20)
        estimated = sum(sequence.estimated_bytes for sequence in job.sequences)
        assert bench.engine.reserved_bytes == estimated
        assert bench.engine.load("dec").running_requests == 1
        blocker.release.set()
        done(job)


def test_more_choices_than_sequences_may_run_are_refused_with_the_way_out() -> None:
    model = decoder()
    with running(model, max_running=4) as bench:
        with pytest.raises(ApiError) as refused:
            bench.generate(model, 10, 2, n=5)
        assert refused.value.status == 413 and "fewer choices" in refused.value.detail
        assert refused.value.limits == {"n": 5, "max_running": 4}
        done(bench.generate(model, 10, 2, n=4))


def test_a_fork_that_fails_fails_its_own_request() -> None:
    model = decoder()
    plain = model.fork
    calls = iter(range(100))

    def fork(*args: Any) -> Any:
        if next(calls) == 1:
            raise MemoryError("no page left")
        return plain(*args)

    model.fork = fork  # type: ignore[method-assign, assignment]
    with running(model) as bench:
        job, other = bench.generate(model, 30, 5, n=4), bench.generate(model, 31, 5)
        assert failed(job) == "internal_error"
        done(other)


@pytest.mark.parametrize("tokens", [40, 150], ids=["short", "long"])
def test_only_the_guilty_request_of_a_step_fails(tokens: int) -> None:
    model = decoder(poison=7, pieces=5)
    blocker = Blocker()
    with running(model) as bench:
        model.on_step = lambda slices: blocker(slices) if len(slices[0].token_ids) == 9 else None
        first = bench.generate(model, 9)
        blocker.entered.wait(20)
        good = [bench.generate(model, tokens, 3) for _ in range(2)]
        bad = bench.generate(model, [*ids_of(tokens - 1), 7], 3)
        blocker.release.set()
        done(first, *good)
        assert failed(bad) == "internal_error"
        shared = [len(step) for step in model.steps]
        assert shared[:2] == [1, 3], "they did share a step"
        assert shared.count(3) == 1, "a step that failed is not tried again as it was"
        assert tokens_of(good[0]) == tokens_of(good[1])
        assert len(tokens_of(good[0])[0]) == 3


@pytest.mark.parametrize("tokens", [40, 150], ids=["short", "long"])
def test_a_result_that_is_not_finite_fails_its_own_request_without_another_run(tokens: int) -> None:
    model = decoder(nan=7, pieces=5)
    blocker = Blocker()
    with running(model) as bench:
        model.on_step = lambda slices: blocker(slices) if len(slices[0].token_ids) == 9 else None
        first = bench.generate(model, 9)
        blocker.entered.wait(20)
        good = bench.generate(model, tokens)
        bad = bench.generate(model, [*ids_of(tokens - 1), 7])
        blocker.release.set()
        done(first, good)
        assert failed(bad) == "non_finite_output"
        assert [len(step) for step in model.steps] == [1, 2]


def test_a_long_step_that_raises_after_it_was_left_fails_its_own_request() -> None:
    held = HeldAt(10)
    model = long_encoder(held)

    def break_at_20(piece: int) -> None:
        held(piece)
        if piece == 20:
            raise RuntimeError("secret")

    model.on_piece = break_at_20
    with running(model) as bench:
        long = bench.encode(model, LONG_TOKENS)
        held.reached()
        short = bench.encode(model, 20)
        held.go_on()
        done(short)
        assert failed(long) == "internal_error"
        model.on_piece = lambda piece: None
        done(bench.encode(model, LONG_TOKENS))
    assert held.log == list(range(21))


def test_a_begin_that_raises_fails_its_own_request() -> None:
    model = long_encoder(HeldAt(PIECES))

    def begin(slices: object) -> Any:
        raise ValueError("cannot")

    plain, model.begin = model.begin, begin  # type: ignore[method-assign]
    with running(model) as bench:
        assert failed(bench.encode(model, LONG_TOKENS)) == "internal_error"
        done(bench.encode(model, 10))
        model.begin = plain  # type: ignore[method-assign]
        done(bench.encode(model, LONG_TOKENS))


@pytest.mark.parametrize("tokens", [40, 150], ids=["short", "long"])
def test_a_sequence_that_cannot_be_opened_harms_no_other_of_its_step(tokens: int) -> None:
    model = decoder(pieces=5)
    plain = model.open

    def refuse(capacity: int, prompt: Any = None) -> Any:
        if capacity == tokens + 77:
            raise MemoryError("no room")
        return plain(capacity, prompt)

    model.open = refuse  # type: ignore[method-assign]
    blocker = Blocker()
    with running(model) as bench:
        model.on_step = lambda slices: blocker(slices) if len(slices[0].token_ids) == 9 else None
        first = bench.generate(model, 9)
        blocker.entered.wait(20)
        bad, good = bench.generate(model, tokens, 77), bench.generate(model, tokens, 3)
        blocker.release.set()
        done(first, good)
        assert failed(bad) == "internal_error"


def test_a_cached_beginning_is_not_read_again_and_changes_nothing() -> None:
    model = decoder()
    model.limit_cached(1 << 30)
    other = Choice("window", exact_choice().params, seed=3)
    with running(model) as bench:
        jobs = [
            bench.generate(model, 700, 4, salt=salt, choice=choice)
            for salt, choice in [("", None), ("mine", None), ("", other)]
        ]
        done(*jobs)
        again = bench.generate(model, 700, 4)
        longer = bench.generate(model, [*ids_of(700), 1, 2, 3], 4, n=2)
        done(again, longer)
    read = [start for step in model.steps for tokens, start in step if tokens > 1 or start == 0]
    assert [job.cached_tokens for job in jobs] == [0, 0, 0], "other salts and methods share nothing"
    assert again.cached_tokens == 640
    assert longer.cached_tokens == 640 and 640 in read, "counted once for both choices"
    assert tokens_of(again) == tokens_of(jobs[0])


def test_a_sequence_goes_on_where_the_cache_really_ends() -> None:
    """More or less of a prompt may be cached when it is opened than when it was submitted."""
    model = decoder()
    model.limit_cached(1 << 30)
    blocker = Blocker()
    with running(model, prefill_chunk_tokens=256) as bench:
        done(alone := bench.generate(model, 700, 4))
        model.on_step = lambda slices: blocker(slices) if len(slices[0].token_ids) == 9 else None
        first = bench.generate(model, 9)
        blocker.entered.wait(20)
        model.steps.clear()
        less = bench.generate(model, 700, 4)
        (entry,) = (sequence.entry for sequence in less.sequences)
        assert entry is not None and (entry.read, entry.lane) == (640, "short")
        model.limit_cached(0)
        more = bench.generate(model, 700, 4)
        blocker.release.set()
        done(first, less, more)
        assert less.cached_tokens == more.cached_tokens == 0
        assert entry.lane == "long" and any(seen.long for seen in bench.seen), "there is more to read"
        assert tokens_of(less) == tokens_of(more) == tokens_of(alone)
        ends = {tokens + start for step in model.steps for tokens, start in step if tokens > 1}
        assert all(end % 128 == 0 or end in (9, 700) for end in ends)
        model.limit_cached(1 << 30)
        blocker = Blocker()
        first = bench.generate(model, 9)
        blocker.entered.wait(20)
        late = bench.generate(model, 700, 4)
        model.remember(Prompt(ids_of(700), exact_choice()))
        model.steps.clear()
        blocker.release.set()
        done(first, late)
        assert late.cached_tokens == 640 and tokens_of(late) == tokens_of(alone)


def test_a_step_that_gives_no_sign_of_life_is_answered_for_and_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, blocker = Clock(), Blocker()
    model = encoder(on_step=blocker)
    monkeypatch.setattr(logging.getLogger("longreach"), "propagate", True)
    with running(model, clock=clock) as bench:
        stuck, behind = bench.encode(model, 10), bench.encode(model, 11)
        blocker.entered.wait(20)
        clock.now += 100
        look(bench.engine)
        assert not stuck.ended, "not yet"
        clock.now += 100
        assert bench.engine.heartbeat_age() == 200
        look(bench.engine)
        look(bench.engine)
        assert failed(stuck) == failed(behind) == "engine_unhealthy"
        assert not bench.engine.healthy
        with pytest.raises(ApiError) as refused:
            bench.encode(model, 10)
        assert refused.value.status == 503 and refused.value.code == "engine_unhealthy"
        (record,) = [r for r in caplog.records if r.name == "longreach.watchdog"]
        assert any("conftest.py" in place for place in record.__dict__["fields"]["stack"])
        blocker.release.set()
        wait_for(lambda: not bench.engine.stalled)
        look(bench.engine)
        done(bench.encode(model, 10))


def test_a_long_step_is_alive_as_long_as_it_passes_places_where_it_may_be_left() -> None:
    clock = Clock()
    stalled: list[bool] = []
    model = encoder(pieces=PIECES, max_tokens=4096)
    with running(model, clock=clock) as bench:

        def slow(piece: int) -> None:
            clock.now += 100
            stalled.append(bench.engine.stalled)

        model.on_piece = slow
        done(bench.encode(model, LONG_TOKENS))
    assert len(stalled) == PIECES and not any(stalled)


def test_the_watch_looks_again_and_again_until_it_is_cancelled() -> None:
    clock, blocker = Clock(), Blocker()
    model = encoder(on_step=blocker)
    with running(model, clock=clock) as bench:
        stuck = bench.encode(model, 10)
        blocker.entered.wait(20)
        clock.now += 1000

        async def until(holds: Callable[[], bool]) -> None:
            while not holds():
                await asyncio.sleep(0.005)

        async def main() -> None:
            watching = asyncio.create_task(watch(bench.engine, 0.005))
            await until(lambda: stuck.ended and not bench.engine.healthy)
            blocker.release.set()
            await until(lambda: bench.engine.healthy)
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

        asyncio.run(asyncio.wait_for(main(), 20))
        done(bench.encode(model, 10))


def test_a_model_has_work_until_its_last_sequence_is_closed() -> None:
    held = HeldAt(10)
    model, other = long_encoder(held), encoder()
    with running(model, other) as bench:
        assert not bench.engine.has_work("long")
        job = bench.encode(model, LONG_TOKENS)
        held.reached()
        bench.engine.cancel(job)
        assert bench.engine.num_jobs == 0 and bench.engine.has_work("long")
        assert not bench.engine.has_work(other.info.name)
        held.go_on()
        wait_for(lambda: not bench.engine.has_work("long"))
        model.close()
        bench.engine.remove_model("long")
        done(bench.encode(other, 10))


def test_cancels_at_random_moments_of_long_and_short_steps_leave_nothing_open() -> None:
    import random

    rng = random.Random(5)
    models = [
        encoder(pieces=20, max_tokens=4096),
        decoder(pieces=20, max_tokens=4096),
    ]
    models[1].limit_cached(1 << 21)
    with running(*models) as bench:
        jobs = []
        for i in range(120):
            model = models[i % 2]
            tokens = rng.choice([5, 60, 140, 700])
            if i % 2:
                job = bench.generate(model, tokens, rng.choice([1, 8]), n=rng.choice([1, 3]))
            else:
                job = bench.encode(model, tokens)
            jobs.append(job)
            if rng.random() < 0.5:
                bench.engine.cancel(rng.choice(jobs))
            if rng.random() < 0.1:
                threading.Event().wait(0.003)
        wait_for(lambda: all(job.ended for job in jobs))
        codes = {job.error.code for job in jobs if job.error is not None}
        assert codes <= {"client_closed_request"}
        assert any(job.error is None for job in jobs)
        wait_for(lambda: not any(model.open_states for model in models))
