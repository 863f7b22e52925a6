"""More work than the engine can do, or an engine that does none: told with a status, a limit and when to come
back."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.service.conftest import Blocker, sample, serving, wait_for
from tests.service.fake_model import decoder, encoder

BODY: dict[str, Any] = {"prompt": "a" * 99, "max_new_tokens": 1}  # 100 tokens


def test_predicted_work_beyond_the_budget_is_turned_away_and_told_when_to_come_back() -> None:
    """Before anything was measured, a GFLOP counts as 16 ms: 100 tokens as 1.6 s."""
    blocker = Blocker()
    model = decoder(on_step=blocker, flops_per_token=1e9)
    with serving(model, max_queue_seconds=3) as server, ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(server.post, "/v1/generate", BODY)]
        blocker.entered.wait(20)
        calls.append(pool.submit(server.post, "/v1/generate", BODY))
        wait_for(lambda: server.runtime.engine.load("dec").queued_requests == 1)
        refused = server.post("/v1/generate", BODY)
        queued = server.get("/metrics").text
        blocker.release.set()
        assert [call.result().status_code for call in calls] == [200, 200]
        text = server.get("/metrics").text
    assert (refused.status_code, refused.json()["code"]) == (429, "cost_budget_exhausted")
    assert refused.json()["limits"] == {"max_queue_seconds": 3}
    assert "seconds of work are waiting" in refused.json()["detail"]
    after_s, after_ms = int(refused.headers["retry-after"]), int(refused.headers["retry-after-ms"])
    assert after_s >= 1 and (after_s - 1) * 1000 < after_ms <= after_s * 1000
    rejected = {"operation": "generate", "reason": "cost_budget"}
    assert sample(text, "longreach_requests_rejected_total", **rejected) == 1
    assert (sample(queued, "longreach_queue_ms") or 0) > 1600 and sample(text, "longreach_queue_ms") == 0


def test_a_request_of_any_cost_runs_where_nothing_waits() -> None:
    with serving(decoder(flops_per_token=1e12), max_queue_seconds=1) as server:
        assert server.post("/v1/generate", BODY).status_code == 200


def test_an_engine_that_gives_no_sign_of_life_is_neither_alive_nor_ready_until_it_does() -> None:
    blocker = Blocker()
    with serving(encoder(on_step=blocker), watchdog_s=1) as server, ThreadPoolExecutor(1) as pool:
        call = pool.submit(server.post, "/v1/encode", {"input": "abc"})
        blocker.entered.wait(20)
        assert server.get("/livez").status_code == 200
        assert call.result().status_code == 503, "what waits for a stalled engine is answered"
        for path in ("/livez", "/readyz", "/health"):
            told = server.get(path)
            assert (told.status_code, told.json()["code"]) == (503, "engine_unhealthy")
            assert told.json()["limits"] == {"watchdog_s": 1} and "sign of life" in told.json()["detail"]
        assert server.post("/v1/encode", {"input": "abc"}).json()["code"] == "engine_unhealthy"
        age_s = sample(server.get("/metrics").text, "longreach_engine_heartbeat_age_seconds")
        assert age_s is not None and age_s > 1
        blocker.release.set()
        wait_for(lambda: server.get("/livez").status_code == 200)
        assert server.post("/v1/encode", {"input": "abc"}).status_code == 200
        assert sample(server.get("/metrics").text, "longreach_engine_heartbeat_age_seconds") == 0


def test_lanes_pauses_and_predictions_are_counted_as_steps_run() -> None:
    """900 tokens at 1 GFLOP are predicted to take 14 s, so they are long; 10 of them are not."""
    model = decoder(flops_per_token=1e9, pieces=4)
    with serving(model) as server:
        for prompt in ("a" * 899, "a" * 9):
            assert server.post("/v1/generate", {**BODY, "prompt": prompt}).status_code == 200
        text = server.get("/metrics").text
    lanes = [sample(text, "longreach_lane_seconds_total", lane=lane) for lane in ("short", "long")]
    assert all(seconds is not None and seconds > 0 for seconds in lanes)
    steps = sample(text, "longreach_step_seconds_count", model="dec")
    assert sample(text, "longreach_step_prediction_ratio_count", model="dec") == steps
    assert sum(seconds or 0 for seconds in lanes) == pytest.approx(
        sample(text, "longreach_step_seconds_sum", model="dec")
    )
    assert sample(text, "longreach_long_step_pauses_total", model="dec") == 0
