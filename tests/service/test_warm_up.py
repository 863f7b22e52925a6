"""What a model runs before its first request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from models.contract import Slice
from service import loading
from service.errors import ApiError
from service.runtime import Runtime
from service.warm_up import BUDGET_S, probes_of, run_probes
from tests.service.bench import Clock
from tests.service.conftest import make_settings
from tests.service.fake_model import FakeModel, decoder, encoder


@contextmanager
def runtime_of(
    model: FakeModel, clock: Callable[[], float] | None = None, **settings: Any
) -> Iterator[Runtime]:
    runtime = Runtime(make_settings(**settings), *([clock] if clock else []))
    runtime.add_models({model.info.name: model})
    runtime.start()
    try:
        yield runtime
    finally:
        assert runtime.close()
    model.check_idle()


@pytest.mark.parametrize("make", [encoder, decoder])
def test_the_cost_model_knows_a_model_before_its_first_request(
    make: Callable[..., FakeModel], capsys: pytest.CaptureFixture[str]
) -> None:
    model = make(max_tokens=8192)
    with runtime_of(model) as runtime:
        asyncio.run(loading.warm_up(runtime, model))
        (learned,) = runtime.costs.summary().values()
        assert isinstance(learned, dict) and learned["steps"] >= 4 and "exact" in learned["backends"]
        assert runtime.progress.ratio == 1.0 and model.info.name in runtime.progress.phase
    assert f"{model.info.name}: warmed up" in capsys.readouterr().err
    sizes = {tokens for step in model.steps for tokens, _ in step}
    assert {16, 128, 512} <= sizes and max(len(step) for step in model.steps) == 4
    if model.info.causal:
        starts = {start for step in model.steps for tokens, start in step if tokens > 1}
        assert len(starts) > 1, "some chunks begin late"
        assert any(len(step) == 4 and step[0][0] == 1 for step in model.steps), "several decode together"


def test_first_use_teaches_nothing() -> None:
    model = encoder(max_tokens=16)
    with runtime_of(model) as runtime:
        assert asyncio.run(run_probes(runtime, model)) == len(model.steps)
        (learned,) = runtime.costs.summary().values()
        assert isinstance(learned, dict) and learned["steps"] == len(model.steps) - 1


@pytest.mark.parametrize("max_tokens", [2, 17, 300])
@pytest.mark.parametrize("make", [encoder, decoder])
def test_no_probe_is_longer_than_the_model_reads(make: Callable[..., FakeModel], max_tokens: int) -> None:
    model = make(max_tokens=max_tokens)
    for probe in probes_of(model, 512):
        assert probe.tokens + probe.new_tokens <= max_tokens
    with runtime_of(model) as runtime:
        assert asyncio.run(run_probes(runtime, model)) >= 1
    assert model.steps


def test_a_slow_machine_stops_early() -> None:
    clock = Clock()

    def slow(slices: Sequence[Slice]) -> None:
        clock.now += 0.02 * sum(len(part.token_ids) for part in slices)

    model = decoder(max_tokens=8192, on_step=slow)
    with runtime_of(model, clock) as runtime:
        began = clock.now
        num_run = asyncio.run(run_probes(runtime, model))
        assert 1 < num_run < len(probes_of(model, 512))
        assert clock.now - began <= BUDGET_S and runtime.progress.ratio == 1.0


def test_a_slow_first_use_does_not_keep_the_other_probes_out() -> None:
    clock = Clock()

    def slow_at_first(slices: Sequence[Slice]) -> None:
        clock.now += 0.01 if model.steps else BUDGET_S / 2

    model = decoder(max_tokens=8192, on_step=slow_at_first)
    with runtime_of(model, clock) as runtime:
        assert asyncio.run(run_probes(runtime, model)) == len(probes_of(model, 512))
        assert runtime.costs.calibrated(model.info.name, "exact")


def test_probes_beyond_the_servers_limits_are_left_out() -> None:
    model = decoder(max_tokens=8192)
    with runtime_of(model, memory_limit_bytes=200_000) as runtime:
        assert 1 <= asyncio.run(run_probes(runtime, model)) < len(probes_of(model, 512))


def test_a_model_that_cannot_run_at_all_says_so() -> None:
    def broken(slices: Sequence[Slice]) -> None:
        raise RuntimeError("no kernel")

    model = decoder(on_step=broken)
    with runtime_of(model) as runtime, pytest.raises(ApiError):
        asyncio.run(run_probes(runtime, model))
