"""Memory of requests that keep something of each input until all are read."""

from __future__ import annotations

from typing import Any

import pytest

from service.runtime import Runtime
from service.schedule import Step
from tests.service.conftest import in_process, wait_for
from tests.service.fake_model import WIDTH, encoder


def test_vectors_of_inputs_that_are_done_stay_reserved_between_the_steps_of_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = encoder()
    between: list[int] = []
    with in_process(model, max_running=8, step_tokens=128, prefill_chunk_tokens=128) as client:
        runtime: Runtime = client.app.state.runtime  # type: ignore[attr-defined]
        plain = runtime.engine._scheduler.plan

        def plan(now: float) -> Step | None:
            between.append(runtime.engine.reserved_bytes)
            return plain(now)

        monkeypatch.setattr(runtime.engine._scheduler, "plan", plan)
        body: dict[str, Any] = {"input": ["x" * 120] * 4, "pooling": "none"}
        assert client.post("/v1/encode", json=body).status_code == 200
        [(tokens, _)] = model.steps[-1]
        wait_for(lambda: len(between) > 4)
        assert between[-5:] == [i % 4 * tokens * WIDTH * 4 for i in range(5)]
