"""Free memory is given back once nothing has run for a while, and once only."""

from __future__ import annotations

import asyncio

from service.idle import IDLE_S, Idle
from service.runtime import Runtime
from service.settings import Settings
from tests.service.bench import Clock
from tests.service.conftest import in_process
from tests.service.fake_model import encoder


def idle() -> tuple[Runtime, Clock, Idle, list[float]]:
    clock, given = Clock(), []
    runtime = Runtime(Settings(), clock)
    return runtime, clock, Idle(runtime, lambda: given.append(clock())), given


def look(watched: Idle) -> None:
    asyncio.run(watched.look())


def test_nothing_is_given_back_where_nothing_has_run() -> None:
    _, clock, watched, given = idle()
    clock.now += 100 * IDLE_S
    look(watched)
    assert not given


def test_memory_is_given_back_once_after_each_time_of_work() -> None:
    runtime, clock, watched, given = idle()
    for times in (1, 2):
        runtime.last_step_s = clock()
        look(watched)
        assert len(given) == times - 1
        clock.now += IDLE_S
        look(watched)
        clock.now += IDLE_S
        look(watched)
        assert len(given) == times


def test_nothing_is_given_back_while_a_request_is_there() -> None:
    runtime, clock, watched, given = idle()
    runtime.last_step_s, runtime.in_flight = clock(), 1
    clock.now += 10 * IDLE_S
    look(watched)
    assert not given
    runtime.in_flight = 0
    look(watched)
    assert given


def test_a_step_of_the_engine_is_noted() -> None:
    with in_process(encoder()) as client:
        runtime = client.app.state.runtime
        assert runtime.last_step_s is None
        assert client.post("/v1/encode", json={"input": "a"}).status_code == 200
        assert runtime.last_step_s is not None
