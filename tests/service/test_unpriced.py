"""A price that fails: its own request ends with 500, everything reserved for it is free again, and the engine
goes on."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from models.contract import Choice, Flops, Want
from service.attention import exact_choice
from service.jobs import Job
from service.pricing import Prices
from tests.service.bench import Bench, running
from tests.service.conftest import serving, wait_for
from tests.service.fake_model import FakeModel, decoder, encoder

GUILTY = Choice("exact", exact_choice().params, seed=13)


class Broken:
    """Takes the FLOPs of slices under ``GUILTY`` away from a model as soon as ``armed``."""

    def __init__(self, model: FakeModel, result: Callable[[], Flops] | None = None) -> None:
        self.armed = False
        plain = model.flops

        def flops(rows: int, start: int, choice: Choice, want: Want) -> Flops:
            if self.armed and choice == GUILTY:
                if result is not None:
                    return result()
                raise RuntimeError("no formula")
            return plain(rows, start, choice, want)

        model.flops = flops  # type: ignore[method-assign]


def ended(job: Job) -> str:
    """The code of the error that a request ended with; "" where it is complete."""
    wait_for(lambda: job.ended)
    return "" if job.error is None else job.error.code


def check_alive(bench: Bench, model: FakeModel) -> None:
    wait_for(lambda: bench.engine.reserved_bytes == 0 and not model.open_states)
    assert bench.engine.healthy and bench.engine.num_jobs == 0
    assert ended(bench.generate(model, 20)) == ""


def test_a_price_that_fails_at_the_door_fails_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = encoder()
    plain = model.flops

    def flops(rows: int, start: int, choice: Choice, want: Want) -> Flops:
        if choice.backend == "window":
            raise RuntimeError("no formula")
        return plain(rows, start, choice, want)

    monkeypatch.setattr(model, "flops", flops)
    with serving(model) as server:
        refused = server.post("/v1/encode", {"input": "x", "attention": "window"})
        assert refused.status_code == 500 and refused.json()["code"] == "internal_error"
        assert server.post("/v1/encode", {"input": "x"}).status_code == 200
        assert server.runtime.engine.num_jobs == 0


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -1.0], ids=str)
def test_a_price_that_fails_while_waiting_fails_its_request_alone(value: float | None) -> None:
    model = decoder(pieces=3)
    broken = Broken(model, None if value is None else lambda: Flops(value, 0.0))
    guilty: list[Job] = []

    def arrive(piece: int) -> None:
        if piece == 0 and not guilty:
            guilty.append(bench.generate(model, 700, choice=GUILTY))
            guilty.append(bench.generate(model, 30))
            broken.armed = True

    model.on_piece = arrive
    with running(model) as bench:
        long = bench.generate(model, 300)
        wait_for(lambda: len(guilty) == 2)
        assert ended(guilty[0]) == "internal_error"
        assert ended(guilty[1]) == ended(long) == "", "the long step that ran goes on"
        check_alive(bench, model)


def test_a_price_that_fails_in_mid_decode_fails_its_request_alone() -> None:
    model = decoder(max_tokens=4096)
    with running(model) as bench:
        other = bench.generate(model, 20, 200)
        broken = Broken(model)
        guilty = bench.generate(model, 20, 3000)
        object.__setattr__(guilty.sequences[0], "_decode_choice", GUILTY)
        wait_for(lambda: len(model.steps) > 5)
        broken.armed = True
        assert ended(guilty) == "internal_error" and ended(other) == ""
        check_alive(bench, model)


def test_flops_that_fail_after_the_step_cost_only_the_lesson() -> None:
    model = decoder()
    broken = Broken(model)
    with running(model) as bench:
        jobs: list[Job] = []

        def forget(slices: object) -> None:
            wait_for(lambda: jobs)
            [sequence] = jobs[0].sequences
            assert sequence.entry is not None and isinstance(sequence.entry.price, Prices)
            sequence.entry.price._kept.clear()
            broken.armed = True

        model.on_step = forget
        jobs.append(bench.generate(model, 20, choice=GUILTY))
        assert ended(jobs[0]) == "" and bench.engine.costs.summary() == {}
        model.on_step = lambda slices: None
        check_alive(bench, model)
