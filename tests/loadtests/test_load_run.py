"""Whole runs: locust in a process of its own, headless, against a stub server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.loadtests.stub_server import Stub, stub_server

Calm = tuple[Stub, subprocess.CompletedProcess[str], dict[str, Any]]

ROOT = Path(__file__).resolve().parents[2]


def run_load(
    url: str, tmp_path: Path, *options: str, seconds: int = 1
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """A short run; its process and the summary that it wrote."""
    file = tmp_path / "report.json"
    command = [sys.executable, "-m", "locust", "-f", str(ROOT / "loadtests" / "locustfile.py")]
    command += ["--headless", "--only-summary", "--host", url, "--run-time", f"{seconds}s"]
    command += ["--users", "6", "--spawn-rate", "6", "--stop-timeout", "5", "--wait-ready", "0"]
    command += ["--report-file", str(file), *options]
    # from another directory: a run must not depend on where it is started
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    return process, json.loads(file.read_text()) if file.exists() else {}


def verdicts(report: dict[str, Any]) -> dict[str, int]:
    return {
        name: sum(row[name] for row in report["rows"])
        for name in ("answered", "rejected", "refused", "failed")
    }


@pytest.fixture(scope="module")
def calm(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Stub, subprocess.CompletedProcess[str], dict[str, Any]]:
    with stub_server() as stub:
        process, report = run_load(
            stub.url,
            tmp_path_factory.mktemp("calm"),
            "--max-new-tokens",
            "5",
            "--api-key",
            "s3cret-key",
            seconds=3,
        )
    return stub, process, report


def test_a_run_against_a_healthy_server_passes_and_leaves_nothing_unanswered(calm: Calm) -> None:
    _, process, report = calm
    assert process.returncode == 0, process.stdout + process.stderr
    assert report["passed"] and report["unanswered"] == 0
    assert verdicts(report)["answered"] == report["started"] > 10


def test_every_endpoint_length_class_and_backend_gets_its_own_row(calm: Calm) -> None:
    _, _, report = calm
    seen = {(row["endpoint"], row["backend"]) for row in report["rows"]}
    assert seen == {
        ("encode", "exact"),
        ("encode", "window"),
        *(
            (endpoint, backend)
            for endpoint in ("generate", "score")
            for backend in ("exact", "window", "sinks")
        ),
    }
    assert {"short"} < {row["length"] for row in report["rows"]} <= {"short", "medium", "long"}
    assert not any(row["backend"] == "star" for row in report["rows"])  # served, but by none of these models


def test_the_summary_is_printed_with_percentiles_token_times_throughput_and_density(calm: Calm) -> None:
    _, process, report = calm
    for heading in (
        "p50 ms",
        "p95 ms",
        "p99 ms",
        "TTFT p50",
        "TTFT p99",
        "in tok/s",
        "out tok/s",
        "density",
        "429",
    ):
        assert heading in process.stdout
    row = next(row for row in report["rows"] if row["endpoint"] == "generate" and row["backend"] == "window")
    assert row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]
    assert row["ttft_p50_ms"] <= row["p50_ms"]
    assert row["density_mean"] == 0.25
    assert row["output_tokens_per_s"] > 0


def test_locusts_own_table_names_requests_by_endpoint_length_and_backend(calm: Calm) -> None:
    _, process, _ = calm
    printed = process.stdout + process.stderr
    for kind in ("POST", "TTFT", "ITL"):
        assert any(
            line.split()[:4] == [kind, "generate", "short", "[window]"] for line in printed.splitlines()
        )


def test_documents_keep_to_the_limits_of_their_model(calm: Calm) -> None:
    stub, _, _ = calm
    limits = {"/v1/encode": 512, "/v1/score": 4096, "/v1/generate": 4096 - 5}
    for path, body in stub.bodies:
        assert len(body.get("prompt") or body["input"]) // 4 <= limits[path]
    assert max(len(body.get("prompt") or body["input"]) // 4 for _, body in stub.bodies) > 512


def test_the_api_key_is_sent_and_never_printed(calm: Calm) -> None:
    stub, process, _ = calm
    assert stub.authorizations == {"Bearer s3cret-key"}
    assert "s3cret-key" not in process.stdout + process.stderr


def test_a_429_with_retry_after_is_counted_apart_and_fails_nothing(tmp_path: Path) -> None:
    with stub_server("busy") as stub:
        process, report = run_load(stub.url, tmp_path)
    assert process.returncode == 0, process.stdout
    count = verdicts(report)
    assert count["rejected"] > 0 and count["answered"] > 0 and count["failed"] == 0
    assert "rejected" in process.stdout


def test_a_429_without_retry_after_is_a_failure(tmp_path: Path) -> None:
    with stub_server("busy for ever") as stub:
        process, report = run_load(stub.url, tmp_path)
    assert process.returncode == 1
    assert verdicts(report)["rejected"] == 0 and verdicts(report)["failed"] > 0
    assert "429 without Retry-After" in process.stdout


def test_a_choice_that_can_never_fit_is_refused_not_failed(tmp_path: Path) -> None:
    with stub_server("small") as stub:
        process, report = run_load(stub.url, tmp_path)
    assert process.returncode == 0, process.stdout
    assert all((row["refused"] > 0) == (row["backend"] == "exact") for row in report["rows"])


@pytest.mark.parametrize(
    ("fault", "endpoint", "words"),
    [
        ("broken", "encode", "500 internal_error"),
        ("substitutes", "encode", "the answer used 'exact'"),
        ("stream error", "generate", "this is deadline_exceeded"),
        ("cut off", "generate", "Incomplete response"),
    ],
)
def test_a_wrong_answer_fails_the_run_and_says_why(
    tmp_path: Path, fault: str, endpoint: str, words: str
) -> None:
    with stub_server(fault) as stub:
        options = ["--endpoints", endpoint, "--backends", "window"]
        process, report = run_load(stub.url, tmp_path, *options)
    assert process.returncode == 1, process.stdout
    assert report["passed"] is False
    assert words in process.stdout


def test_the_first_token_is_timed_when_it_arrives_not_when_the_stream_ends(tmp_path: Path) -> None:
    with stub_server("pauses") as stub:  # 0.4 s between the first token and the rest
        _, report = run_load(stub.url, tmp_path, "--endpoints", "generate")
    for row in report["rows"]:
        assert row["p50_ms"] - row["ttft_p50_ms"] > 300
        assert row["itl_p99_ms"] > 300 > row["itl_p50_ms"]


def test_an_open_loop_keeps_sending_while_answers_are_outstanding(tmp_path: Path) -> None:
    with stub_server("slow") as stub:  # answers take 0.5 s: one waiting user would send 2 a second
        process, report = run_load(
            stub.url, tmp_path, "--arrival-rate", "30", "--max-in-flight", "5", "--users", "1", seconds=2
        )
    assert process.returncode == 0, process.stdout
    assert 2 <= stub.most_in_flight <= 5
    assert report["not_sent"] > 0 and "--max-in-flight was reached" in process.stdout
    assert report["unanswered"] == 0


def test_a_server_that_is_not_there_ends_the_run_at_once_with_a_way_out(tmp_path: Path) -> None:
    with stub_server() as stub:
        url = stub.url
    process, _ = run_load(url, tmp_path)
    assert process.returncode == 2
    assert "make serve" in process.stderr and "Traceback" not in process.stderr
