"""Metrics: every series is there before the first request, named to the letter, and counts what happened."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from kernels.registry import BACKENDS
from models.contract import CacheUse
from service.metrics import Metrics, length_bucket
from service.record import OPERATIONS
from tests.service.conftest import Blocker, in_process, sample, serving, wait_for
from tests.service.fake_model import decoder, encoder

NAMES: dict[str, tuple[str, set[str]]] = {
    "requests_total": ("counter", {"model", "operation", "attention", "code"}),
    "requests_rejected_total": ("counter", {"operation", "reason"}),
    "requests_cancelled_total": ("counter", {"operation", "stage"}),
    "deadline_exceeded_total": ("counter", {"operation", "stage"}),
    "request_duration_seconds": ("histogram", {"model", "operation", "attention", "length_bucket"}),
    "inference_seconds": ("histogram", {"model", "operation", "attention", "length_bucket"}),
    "queue_seconds": ("histogram", {"model", "operation"}),
    "tokenize_seconds": ("histogram", {"model", "operation"}),
    "time_to_first_token_seconds": ("histogram", {"model", "attention"}),
    "inter_token_seconds": ("histogram", {"model", "attention"}),
    "input_tokens": ("histogram", {"model", "operation"}),
    "output_tokens": ("histogram", {"model", "operation"}),
    "batch_requests": ("histogram", {"model"}),
    "batch_tokens": ("histogram", {"model"}),
    "step_seconds": ("histogram", {"model"}),
    "step_prediction_ratio": ("histogram", {"model"}),
    "lane_seconds_total": ("counter", {"lane"}),
    "long_step_pauses_total": ("counter", {"model"}),
    "engine_heartbeat_age_seconds": ("gauge", set()),
    "queue_ms": ("gauge", set()),
    "kv_cache_bytes": ("gauge", {"model", "state"}),
    "kernel_cache_bytes": ("gauge", {"cache"}),
    "prefix_cache_looked_up_tokens_total": ("counter", {"model"}),
    "prefix_cache_found_tokens_total": ("counter", {"model"}),
    "prefix_cache_evicted_pages_total": ("counter", {"model"}),
    "warm_up_progress_ratio": ("gauge", set()),
    "model_loads_total": ("counter", {"outcome"}),
    "queue_depth": ("gauge", {"model"}),
    "queue_tokens": ("gauge", {"model"}),
    "running_requests": ("gauge", {"model"}),
    "truncated_inputs_total": ("counter", {"model"}),
    "truncated_tokens_total": ("counter", {"model"}),
    "attention_density_ratio": ("histogram", {"model", "attention"}),
    "attention_impl_total": ("counter", {"model", "attention", "impl"}),
    "kernels_total": ("counter", {"source"}),
    "kernel_compile_seconds_total": ("counter", set()),
    "attention_fallback_total": ("counter", {"requested", "used", "reason"}),
    "measured_error": ("histogram", {"model", "attention", "phase"}),
    "measured_row_bound": ("histogram", {"model", "attention", "phase"}),
    "verified_requests_total": ("counter", {"model", "attention", "cause"}),
    "verified_rows_total": ("counter", {"model", "attention", "phase"}),
    "auto_requests_total": ("counter", {"model", "outcome"}),
    "budget_violations_total": ("counter", {"model"}),
    "auto_error_ratio": ("histogram", {"model"}),
    "auto_layers_total": ("counter", {"model", "backend"}),
    "auto_repaired_layers_total": ("counter", {"model"}),
    "profile_state": ("gauge", {"model", "state"}),
    "memory_reserved_bytes": ("gauge", {"device"}),
    "memory_limit_bytes": ("gauge", {"device"}),
    "memory_estimate_ratio": ("histogram", {"model", "attention"}),
    "model_info": ("gauge", {"model", "source", "architecture", "dtype", "device"}),
    "build_info": ("gauge", {"version", "torch", "transformers", "python"}),
    "event_loop_lag_seconds": ("histogram", set()),
    "ready": ("gauge", set()),
    "draining": ("gauge", set()),
}


def scrape(client: TestClient) -> str:
    return client.get("/metrics").text


def series(text: str) -> set[tuple[str, frozenset[tuple[str, str]]]]:
    return {
        (found.name, frozenset(found.labels.items()))
        for family in text_string_to_metric_families(text)
        for found in family.samples
        if found.name.startswith("longreach_") and not found.name.startswith("longreach_process_")
    }


def test_names_types_and_labels_are_those_of_the_contract() -> None:
    with in_process() as client:
        families = {
            family.name: family
            for family in text_string_to_metric_families(scrape(client))
            if family.name.startswith("longreach_") and "process_" not in family.name
        }
    expected = {f"longreach_{name.removesuffix('_total')}" for name in NAMES}
    assert set(families) == expected
    for name, (kind, labels) in NAMES.items():
        family = families[f"longreach_{name.removesuffix('_total')}"]
        assert family.type == kind, name
        assert family.samples, f"{name} has no series before the first request"
        for found in family.samples:
            assert set(found.labels) - {"le"} == labels, name
        if kind == "counter":
            assert {found.name for found in family.samples} == {f"longreach_{name}"}


def test_ordinary_traffic_creates_no_series_that_was_not_there_before() -> None:
    with in_process(encoder(), decoder()) as client:
        before = series(scrape(client))
        for backend in ("exact", "window"):
            client.post("/v1/encode", json={"input": "a" * 400, "attention": backend})
            client.post("/v1/embeddings", json={"model": "enc", "input": "a", "attention": backend})
            client.post("/v1/generate", json={"prompt": "a" * 900, "max_new_tokens": 5, "attention": backend})
            client.post("/v1/completions", json={"model": "dec", "prompt": "a", "attention": backend})
            client.post("/v1/score", json={"input": "abc", "attention": backend})
            verified = {"backend": backend, "verify": {"rows": "all"}}
            client.post("/v1/generate", json={"prompt": "a" * 90, "attention": verified})
        client.post(
            "/v1/chat/completions", json={"model": "dec", "messages": [{"role": "user", "content": "a"}]}
        )
        client.post("/v1/encode", json={"input": "a" * 600, "truncate": "end"})
        client.post(
            "/v1/encode", json={"input": "a", "attention": {"backend": "strided", "fallback": "exact"}}
        )
        for path in OPERATIONS:
            client.post(path, json={})
            client.post(path, content=b"x", headers={"content-type": "text/plain"})
            client.post(path, json={"model": "no such model", "input": "a", "prompt": "a", "messages": []})
        client.post("/v1/encode", json={"input": "a", "attention": "no such backend"})
        assert series(scrape(client)) == before


def test_labels_are_never_what_a_client_wrote() -> None:
    with in_process() as client:
        client.post(
            "/v1/encode",
            json={"model": "canary-model", "input": "canary-text", "attention": "canary-backend"},
        )
        client.post(
            "/v1/encode", json={"input": "canary-text", "attention": {"backend": "window", "seed": 424242}}
        )
        text = scrape(client)
        assert "canary" not in text and "424242" not in text
        labels = {"model": "unknown", "operation": "encode", "attention": "none", "code": "404"}
        assert sample(text, "longreach_requests_total", **labels) == 1


def test_a_served_request_is_counted_once_everywhere() -> None:
    with in_process() as client:
        client.post("/v1/generate", json={"prompt": "hello", "max_new_tokens": 5, "attention": "window"})
        text = scrape(client)
    base = {"model": "dec", "operation": "generate"}
    used = {**base, "attention": "window"}
    long = {**used, "length_bucket": "<=512"}
    assert sample(text, "longreach_requests_total", **used, code="200") == 1
    assert sample(text, "longreach_request_duration_seconds_count", **long) == 1
    assert sample(text, "longreach_inference_seconds_count", **long) == 1
    for name in ("queue_seconds", "tokenize_seconds", "input_tokens", "output_tokens"):
        assert sample(text, f"longreach_{name}_count", **base) == 1
    assert sample(text, "longreach_input_tokens_sum", **base) == 6
    assert sample(text, "longreach_output_tokens_sum", **base) == 5
    of_model = {"model": "dec", "attention": "window"}
    assert sample(text, "longreach_time_to_first_token_seconds_count", **of_model) == 1
    assert sample(text, "longreach_inter_token_seconds_count", **of_model) == 4
    assert sample(text, "longreach_attention_density_ratio_count", **of_model) == 1
    assert sample(text, "longreach_memory_estimate_ratio_count", **of_model) == 1
    assert sample(text, "longreach_step_seconds_count", model="dec") == 5
    assert sample(text, "longreach_batch_tokens_sum", model="dec") == 6 + 4


def test_streams_count_as_plain_answers_do() -> None:
    with in_process() as client:
        client.post("/v1/completions", json={"model": "dec", "prompt": "a", "max_tokens": 3, "stream": True})
        text = scrape(client)
    labels = {"model": "dec", "operation": "completions", "attention": "exact"}
    assert sample(text, "longreach_requests_total", **labels, code="200") == 1
    assert sample(text, "longreach_inter_token_seconds_count", model="dec", attention="exact") == 2


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"input": 3}, "invalid"),
        ({"input": "a", "model": "x"}, "invalid"),
        ({"input": "a" * 600}, "too_long"),
        ({"input": "a" * 3000}, "too_large"),
        ({"input": "a" * 500, "attention": "exact"}, "memory"),
    ],
)
def test_rejections_are_counted_by_reason(body: dict[str, object], reason: str) -> None:
    with in_process(max_body_bytes=2000, memory_limit_bytes=450_000) as client:
        assert client.post("/v1/encode", json=body).status_code >= 400
        text = scrape(client)
    found = {
        name: sample(text, "longreach_requests_rejected_total", operation="encode", reason=name)
        for name in ("invalid", "too_long", "too_large", "memory", "queue_full", "auth")
    }
    assert {name for name, value in found.items() if value} == {reason}


def test_truncation_and_fallback_are_counted() -> None:
    with in_process() as client:
        client.post("/v1/encode", json={"input": ["a" * 520, "b", "c" * 512], "truncate": "start"})
        client.post(
            "/v1/encode", json={"input": "a", "attention": {"backend": "strided", "fallback": "exact"}}
        )
        text = scrape(client)
    assert sample(text, "longreach_truncated_inputs_total", model="enc") == 2
    assert sample(text, "longreach_truncated_tokens_total", model="enc") == 10 + 2
    labels = {"requested": "strided", "used": "exact", "reason": "unsupported"}
    assert sample(text, "longreach_attention_fallback_total", **labels) == 1


def test_gauges_show_what_waits_and_runs_now() -> None:
    blocker = Blocker()
    with serving(encoder(on_step=blocker)) as server, ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(server.post, "/v1/encode", {"input": "abc"})]
        blocker.entered.wait(20)
        calls += [pool.submit(server.post, "/v1/encode", {"input": "abc"}) for _ in range(2)]
        wait_for(lambda: server.runtime.engine.load("enc").queued_requests == 2)
        text = server.get("/metrics").text
        assert sample(text, "longreach_queue_depth", model="enc") == 2
        assert sample(text, "longreach_queue_tokens", model="enc") == 10
        assert sample(text, "longreach_running_requests", model="enc") == 1
        assert sample(text, "longreach_memory_reserved_bytes", device="cpu") == 5_000
        assert sample(text, "longreach_ready") == 1
        blocker.release.set()
        for call in calls:
            call.result()
        wait_for(
            lambda: sample(server.get("/metrics").text, "longreach_memory_reserved_bytes", device="cpu") == 0
        )


def test_cache_counts_are_what_models_count_and_never_go_back() -> None:
    metrics = Metrics()
    read = metrics.registry.get_sample_value
    for looked_up, found, held in ((100, 40, 7), (100, 40, 3), (250, 90, 5)):
        use = CacheUse(held_bytes=held, looked_up_tokens=looked_up, found_tokens=found, evicted_pages=2)
        metrics.see_cache("m", use)
        assert read("longreach_prefix_cache_looked_up_tokens_total", {"model": "m"}) == looked_up
        assert read("longreach_prefix_cache_found_tokens_total", {"model": "m"}) == found
        assert read("longreach_kv_cache_bytes", {"model": "m", "state": "held"}) == held
    assert read("longreach_prefix_cache_evicted_pages_total", {"model": "m"}) == 2


def test_a_model_that_leaves_takes_all_its_series_along() -> None:
    metrics = Metrics()
    metrics.add_model(encoder("stays").info, ["exact"])
    before = series(metrics.render("")[0].decode())
    metrics.add_model(decoder("goes").info, BACKENDS)
    metrics.see_cache("goes", CacheUse(held_bytes=1, looked_up_tokens=5))
    assert series(metrics.render("")[0].decode()) > before
    metrics.remove_model("goes")
    assert series(metrics.render("")[0].decode()) == before


def test_the_format_is_negotiated() -> None:
    with in_process() as client:
        plain = client.get("/metrics")
        assert plain.headers["content-type"].startswith("text/plain")
        accept = {"accept": "application/openmetrics-text; version=1.0.0"}
        opened = client.get("/metrics", headers=accept)
        assert opened.headers["content-type"].startswith("application/openmetrics-text")
        assert opened.text.endswith("# EOF\n")
        assert "_created" not in plain.text
        assert "process_resident_memory_bytes" in plain.text


def test_two_applications_do_not_share_metrics() -> None:
    first, second = Metrics(), Metrics()
    first.requests.labels("unknown", "encode", "none", "200").inc()
    value = second.registry.get_sample_value(
        "longreach_requests_total",
        {"model": "unknown", "operation": "encode", "attention": "none", "code": "200"},
    )
    assert value == 0


def test_length_buckets() -> None:
    lengths = (1, 512, 513, 2048, 8192, 8193, 32_768, 131_072, 131_073)
    assert [length_bucket(n) for n in lengths] == [
        "<=512",
        "<=512",
        "<=2k",
        "<=2k",
        "<=8k",
        "<=32k",
        "<=32k",
        "<=128k",
        ">128k",
    ]


def test_the_exposition_stays_of_a_size_that_can_be_scraped() -> None:
    with in_process(encoder(max_tokens=8192), decoder(max_tokens=32_768), decoder("third")) as client:
        assert len(scrape(client)) < 4_000_000
        assert re.search(r"longreach_build_info\{", scrape(client))
    assert len(BACKENDS) < 40, "series grow with backends: reconsider which ones are created ahead"
