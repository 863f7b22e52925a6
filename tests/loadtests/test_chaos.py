"""The chaos run: a server that survives it, servers that do not, and what it concludes from their numbers."""

from __future__ import annotations

import asyncio
import json
import random
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from loadtests import chaos
from loadtests.chaos_checks import Reading, checks, memory_table
from loadtests.chaos_client import ChaosClient, Leave, Outcome
from loadtests.chaos_requests import Request, World, bad, valid
from loadtests.metrics import parse, sum_of
from loadtests.own_server import OwnServer
from loadtests.server import ServerProblem
from tests.loadtests.raw_server import raw_server
from tests.service.conftest import serving
from tests.service.fake_model import decoder, encoder

FAKE = f"{shlex.quote(sys.executable)} -m tests.service.fake_server slow --max-queue-requests 20"
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
GET, STREAM = Request("GET", "/livez"), Request("POST", "/v1/generate", b"{}", stream=True)


def test_a_server_answers_hundreds_of_requests_of_every_kind_and_ends_clean(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    file = tmp_path / "chaos.json"
    arguments = ["--serve", "--command", FAKE, "--requests", "300", "--bursts", "1", "--burst", "40"]
    arguments += ["--quiet", "0"]
    status = chaos.main([*arguments, "--json", str(file), "--server-log", str(tmp_path / "log")])
    told = json.loads(file.read_text())
    assert status == 0, (capsys.readouterr().out, (tmp_path / "log").read_text()[-3000:])
    assert told["requests"] == 300 and all(check["passed"] for check in told["checks"].values())
    assert [row["after requests"] for row in told["memory"]] == ["70", "205", "300"]
    assert all(value.isdigit() for row in told["memory"] for value in row.values())
    assert len(told["kinds"]) >= 7 and told["codes"]["429 queue_full"] > 0


def test_a_server_that_fails_on_some_requests_does_not_pass(tmp_path: Path) -> None:
    file = tmp_path / "chaos.json"
    with serving(encoder(), decoder(poison=ord("e"))) as served:
        arguments = ["--host", served.url, "--requests", "60", "--bursts", "0", "--burst", "0"]
        assert chaos.main([*arguments, "--max-growth", "9", "--quiet", "0", "--json", str(file)]) == 1
    told = json.loads(file.read_text())
    assert any("500 internal_error" in problem for problem in told["problems"])
    assert not told["checks"]["answers with 500"]["passed"]


@pytest.mark.parametrize(
    ("request_", "answer", "problem"),
    [
        (GET, OK, ""),
        (GET, OK[:-1], "IncompleteReadError"),
        (GET, b"", "IncompleteReadError"),
        (GET, OK.replace(b"200", b"400"), "a valid request was refused: 400"),
        (GET, OK.replace(b"200", b"429"), "429 without Retry-After"),
        (GET, OK.replace(b"200", b"500"), "500"),
        (Request("GET", "/x", bad=True), OK, "bad input was answered 200"),
        (Request("GET", "/x", bad=True), OK.replace(b"200", b"404"), ""),
        (STREAM, EVENTS + b"event: done\ndata: {}\n\n", ""),
        (STREAM, EVENTS + b"data: [DONE]\n\n", ""),
        (STREAM, EVENTS + b'event: error\ndata: {"code": "deadline_exceeded"}\n\n', ""),
        (STREAM, EVENTS + b'event: error\ndata: {"code": "internal_error"}\n\n', "ended with internal_error"),
        (STREAM, EVENTS + b"event: token\ndata: {}\n\n", "ended without a last event"),
    ],
)
def test_an_answer_passes_only_where_it_is_whole_and_what_was_asked_for(
    request_: Request, answer: bytes, problem: str
) -> None:
    with raw_server(answer) as (url, _):
        outcome = asyncio.run(ChaosClient(url, "", 20).send(request_))
    assert problem in outcome.problem if problem else not outcome.problem, outcome


@pytest.mark.parametrize(
    ("leave", "after_s", "share"),
    [("half_head", 0.0, 0.5), ("half_body", 0.02, 0.9), ("before_answer", 0.0, 1), ("mid_stream", 0.02, 1)],
)
def test_a_client_leaves_where_it_was_told_to(leave: Leave, after_s: float, share: float) -> None:
    with raw_server(EVENTS + b"event: token\ndata: {}\n\n", hold=leave != "mid_stream") as (url, received):
        request = Request("POST", "/v1/generate", b"x" * 60, stream=True)
        outcome = asyncio.run(ChaosClient(url, "", 20).send(request, leave, after_s))
    assert outcome.left and not outcome.problem
    assert (share == 1) == received[0].endswith(b"x" * 60)
    assert (b"\r\n\r\n" in received[0]) == (leave != "half_head")


def test_a_silent_server_is_a_request_without_an_answer() -> None:
    with raw_server(b"", hold=True) as (url, _):
        outcome = asyncio.run(ChaosClient(url, "", 0.2).send(GET))
    assert outcome.status == 0 and "no whole answer within 0.2 s" in outcome.problem
    assert chaos.column(outcome) == "unanswered"


def world() -> World:
    cards: dict[str, dict[str, Any]] = {
        "enc": {"tasks": ["encode"], "backends": ["exact", "nystrom"], "max_tokens": 512, "causal": False},
        "dec": {
            "tasks": ["generate", "score"],
            "backends": ["exact", "nystrom"],
            "max_tokens": 512,
            "causal": True,
        },
    }
    pools = {name: list(range(10, 200)) for name in cards}
    return World(cards, pools, "some words " * 100, frozenset({"exact"}), {"dec": [7] * 300})


def test_the_same_seed_sends_the_same_requests_and_every_route_is_asked() -> None:
    def sent(seed: int) -> list[Request]:
        draws = [random.Random(f"{seed}-{i}") for i in range(400)]
        return [make(world(), draw) for draw in draws for make in (valid, bad)]

    assert sent(1) == sent(1) != sent(2)
    paths = {request.path for request in sent(1)}
    native = {
        "generate",
        "encode",
        "score",
        "tokenize",
        "estimate",
        "completions",
        "chat/completions",
        "embeddings",
    }
    assert {f"/v1/{name}" for name in native} <= paths
    bodies = [json.loads(r.content) for r in sent(1) if r.path == "/v1/generate" and not r.bad]
    used = {str(body.get("attention")) for body in bodies}
    assert not any("nystrom" in each and "prefill" not in each for each in used), "it has no decode step"


METRICS = """# TYPE longreach_queue_depth gauge
longreach_queue_depth{model="dec"} 0.0
longreach_running_requests{model="dec"} 0.0
longreach_memory_reserved_bytes{device="cpu"} 0.0
longreach_kv_cache_bytes{model="dec",state="held"} 0.0
longreach_kv_cache_bytes{model="dec",state="cached"} 5e+06
longreach_kernel_cache_bytes{cache="draws"} 3e+06
longreach_requests_total{model="dec",code="500"} 0.0
longreach_requests_total{model="dec",code="200"} 7.0
longreach_process_resident_memory_bytes 1e+08
"""


def failed(*texts: str) -> list[str]:
    readings = [Reading(100 * number, parse(text)) for number, text in enumerate(texts)]
    return [check.name for check in checks(readings, 0.05) if not check.passed]


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ("", "", []),
        ('queue_depth{model="dec"} 0.0', 'queue_depth{model="dec"} 1.0', ["waiting requests"]),
        ('"held"} 0.0', '"held"} 4096', ["cache bytes held"]),
        ('"500"} 0.0', '"500"} 1', ["answers with 500"]),
        ("memory_bytes 1e+08", "memory_bytes 1.049e+08", []),
        ("memory_bytes 1e+08", "memory_bytes 1.051e+08", ["resident memory"]),
        ("longreach_memory_reserved_bytes", "other", ["reserved bytes"]),
    ],
)
def test_what_stays_behind_fails_the_run(old: str, new: str, names: list[str]) -> None:
    assert failed(METRICS, METRICS.replace(old, new)) == names


def test_growth_counts_from_the_second_reading_and_is_told_from_the_first_too() -> None:
    small, large = (
        METRICS.replace("memory_bytes 1e+08", f"memory_bytes {size}") for size in ("9e+07", "1.06e+08")
    )
    assert failed(small, METRICS, METRICS) == []
    assert failed(small, METRICS, large) == ["resident memory"]
    assert failed(small, METRICS.replace("process_resident", "other"), METRICS) == ["resident memory"]
    readings = [Reading(number, parse(text)) for number, text in ((5, small), (20, METRICS), (90, METRICS))]
    assert checks(readings, 0.05)[-1].told == "+0.0% since request 20, +11.1% since request 5"


def test_memory_is_told_reading_by_reading_with_what_is_kept_on_purpose() -> None:
    more = METRICS.replace("memory_bytes 1e+08", "memory_bytes 1.2e+08")
    table = memory_table([Reading(10, parse(METRICS)), Reading(90, parse(more))])
    kept = ["5", "3", "not told", "not told"]
    assert table[0] == [
        "after requests",
        "resident MB",
        "cached pages MB",
        "draws MB",
        "plans MB",
        "masks MB",
    ]
    assert table[1:] == [["10", "100", *kept], ["90", "120", *kept]]


def test_the_tiny_networks_need_a_server_of_the_scripts_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        chaos.main(["--tiny"])
    assert "--serve" in capsys.readouterr().err


def test_with_tiny_the_server_serves_the_random_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[list[str]] = []

    @contextmanager
    def started(command: str, wait_s: float, log: Path | None) -> Iterator[OwnServer]:
        served.append(shlex.split(command))
        assert all((Path(flag.split("=")[1]) / "config.json").is_file() for flag in served[0][-3::2])
        raise ServerProblem("no server in this test")
        yield

    monkeypatch.setattr(chaos, "own_server", started)
    assert chaos.main(["--serve", "--tiny", "--command", "serve --port 1"]) == 1
    assert served[0][:4] == ["serve", "--port", "1", "--model"]
    assert [flag.split("=")[0] for flag in served[0][-3::2]] == ["tiny-decoder", "tiny-encoder"]


def test_sums_are_over_the_series_that_carry_the_labels() -> None:
    samples = parse(METRICS)
    assert sum_of(samples, "longreach_kv_cache_bytes") == 5e6
    assert sum_of(samples, "longreach_requests_total", code="200") == 7
    assert sum_of(samples, "longreach_requests_total", code="404") is None


def test_outcomes_fall_into_one_column_each() -> None:
    told = [chaos.column(Outcome(status)) for status in (0, 200, 400, 429, 504)]
    assert told == ["unanswered", "2xx", "4xx", "429", "5xx"]
    assert chaos.column(Outcome(200, left=True)) == "left"
