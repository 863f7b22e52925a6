"""The parts of the load tests that need no server."""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
from pathlib import Path
from time import sleep

import pytest

from loadtests.checks import BadAnswer, check_answer
from loadtests.documents import Library, length_classes, pick
from loadtests.events import read_events
from loadtests.report import Key, Outcome, Report, percentile
from loadtests.run import Run
from loadtests.server import Server, ServerProblem, Target, discover
from tests.loadtests.stub_server import stub_server

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("limit", [16, 63, 500, 512, 513, 2048, 8192, 8193, 32768, 131072])
def test_length_classes_cover_1_to_the_limit_without_gap_or_overlap(limit: int) -> None:
    classes = length_classes(limit)
    assert classes[-1].max_tokens == limit
    for shorter, longer in zip(classes, classes[1:], strict=False):
        assert longer.min_tokens == shorter.max_tokens + 1
    assert all(1 <= each.min_tokens <= each.max_tokens for each in classes)


def test_a_model_of_128k_gets_the_lengths_that_the_classes_are_named_for() -> None:
    short, medium, long = length_classes(131072)
    assert (short.max_tokens, medium.max_tokens, long.max_tokens) == (512, 8192, 131072)


def test_a_limit_below_16_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 16"):
        length_classes(15)


def test_lengths_are_drawn_in_the_shares_of_their_classes() -> None:
    random_ = random.Random(1)
    classes = length_classes(32768)
    drawn = [pick(classes, random_) for _ in range(20_000)]
    assert all(each.min_tokens <= tokens <= each.max_tokens for each, tokens in drawn)
    for each in classes:
        assert sum(one is each for one, _ in drawn) / len(drawn) == pytest.approx(each.share, abs=0.02)


@pytest.mark.parametrize("num_characters", [1, 63, 1000, 57_549, 500_000])
def test_a_document_has_exactly_the_length_asked_for_however_long(num_characters: int) -> None:
    library = Library.from_samples()
    texts = [library.cut(num_characters, random.Random(seed)) for seed in range(5)]
    assert {len(text) for text in texts} == {num_characters}
    if num_characters > 1:
        assert len(set(texts)) > 1


def test_a_missing_sample_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        Library.from_samples(tmp_path)


def test_the_length_of_a_token_is_corrected_downwards_and_by_long_texts_only() -> None:
    target = Target("score", "m", 8192, ("exact",), 4.0)
    target.observe(60, 20)
    target.observe(8000, 1600)
    assert target.characters_per_token == 4.0
    target.observe(3500, 1000)
    assert target.characters_per_token == 3.5
    assert target.num_characters(1000) <= 3500


def test_events_are_read_across_comments_blank_lines_and_split_data() -> None:
    lines = [
        b": ping\n",
        b"\n",
        b"event: token\n",
        b'data: {"text":\n',
        b'data: "\xc3\xa9"}\n',
        b"\r\n",
        b"data:{}\n",
        b"\n",
    ]
    assert list(read_events(lines)) == [("token", {"text": "é"}), ("message", {})]


def test_an_event_that_the_stream_cuts_off_is_not_delivered() -> None:
    assert list(read_events([b"event: done\n", b"data: {}\n"])) == []


@pytest.mark.parametrize("data", [b"data: [DONE]\n", b"data: 3\n", b"data: {\n"])
def test_data_that_is_no_json_object_is_an_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="not"):
        list(read_events([data, b"\n"]))


@pytest.mark.parametrize(("percent", "expected"), [(0, 1), (50, 50), (95, 95), (99, 99), (100, 100)])
def test_percentiles_are_nearest_rank(percent: int, expected: int) -> None:
    values = list(range(1, 101))
    random.Random(0).shuffle(values)
    assert percentile(values, percent) == expected
    assert percentile([], percent) is None


def answer(**changes: object) -> dict[str, object]:
    return {
        "usage": {"prompt_tokens": 3},
        "attention": {"used": "window"},
        "data": [
            {"embedding": [1.0], "truncated_tokens": 0, "token_logprobs": [None, -1.0], "perplexity": 2.0}
        ],
    } | changes


def test_a_complete_answer_passes_the_checks() -> None:
    for endpoint in ("encode", "generate", "score"):
        check_answer(endpoint, "window", answer())


@pytest.mark.parametrize(
    ("endpoint", "changes"),
    [
        ("encode", {"attention": {"used": "exact"}}),
        ("encode", {"usage": {"prompt_tokens": 0}}),
        ("encode", {"data": []}),
        ("encode", {"data": [{"embedding": [1.0], "truncated_tokens": 7}]}),
        ("encode", {"data": [{"embedding": [], "truncated_tokens": 0}]}),
        ("encode", {"data": [{"embedding": [1.0, None], "truncated_tokens": 0}]}),
        ("encode", {"data": [{"embedding": [float("nan")], "truncated_tokens": 0}]}),
        ("score", {"data": [{"token_logprobs": [None], "perplexity": 2.0}]}),
        ("score", {"data": [{"token_logprobs": [-1.0], "perplexity": float("inf")}]}),
        ("generate", {"attention": None}),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_caught(
    endpoint: str, changes: dict[str, object]
) -> None:
    with pytest.raises(BadAnswer):
        check_answer(endpoint, "window", answer(**changes))


def test_a_report_counts_what_never_came_back_and_passes_only_with_answers() -> None:
    report = Report()
    report.started = 3
    assert not report.passed
    key = Key("score", "m", "short", "exact")
    report.add(key, Outcome("rejected", 1.0))
    assert not report.passed and "no request was answered" in report.render(1.0)
    report.add(key, Outcome("answered", 10.0, input_tokens=50, density=1.0))
    assert not report.passed and report.unanswered == 1
    assert "1 requests got no answer; --max-unanswered allows 0" in report.render(1.0)
    report.max_unanswered = 1
    assert report.passed and "got no answer" not in report.render(1.0)
    report.max_unanswered = 0
    report.add(key, Outcome("answered", 10.0))
    assert report.passed and report.unanswered == 0
    [line] = report.lines(duration_s=2.0)
    assert (line.p50_ms, line.input_tokens_per_s, line.answered, line.rejected) == (10.0, 25.0, 2, 1)


def test_loading_the_locust_file_imports_none_of_the_servers_packages() -> None:
    program = (
        "import sys; from locust.util.load_locustfile import load_locustfile; "
        "load_locustfile('loadtests/locustfile.py'); "
        "print([m for m in sys.modules if m.split('.')[0] in ('service', 'models', 'kernels', 'torch')])"
    )
    process = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert process.stdout.strip() == "[]"


EVERYTHING: dict[str, list[str]] = {
    "endpoints": ["encode", "generate", "score"],
    "models": [],
    "backends": [],
}


def test_every_task_of_every_model_is_a_target_with_the_backends_it_can_run() -> None:
    with stub_server() as stub:
        targets = discover(Server(stub.url), "word " * 1000, **EVERYTHING)
    assert [(each.endpoint, each.model, each.backends) for each in targets] == [
        ("encode", "encoder", ("exact", "window")),
        ("generate", "decoder", ("exact", "window", "sinks")),
        ("score", "decoder", ("exact", "window", "sinks")),
    ]
    assert all(each.characters_per_token == pytest.approx(4, rel=0.02) for each in targets)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"backends": ["nonesuch"]}, "unknown backend 'nonesuch'; there are: exact, window, sinks, star"),
        ({"models": ["nonesuch"]}, "unknown model 'nonesuch'; there are: encoder, decoder"),
        ({"endpoints": ["chat"]}, "unknown endpoint 'chat'; there are: encode, generate, score"),
        ({"backends": ["star"]}, "no model there serves that"),
        ({"models": ["encoder"], "endpoints": ["score"]}, "no model there serves that"),
    ],
)
def test_an_impossible_choice_is_refused(choice: dict[str, list[str]], words: str) -> None:
    with stub_server() as stub, pytest.raises(ServerProblem, match=words):
        discover(Server(stub.url), "text", **EVERYTHING | choice)


def test_a_limit_that_leaves_no_document_is_refused() -> None:
    options = argparse.Namespace(load_seed=0, max_new_tokens=32, max_input_tokens=3, max_unanswered=0)
    target = Target("score", "m", 4096, ("exact",), 4.0)
    with pytest.raises(ServerProblem, match="at least 16"):
        Run(options, Server("http://127.0.0.1"), [target], Library.from_samples())


def test_a_generate_document_leaves_room_for_the_answer() -> None:
    options = argparse.Namespace(load_seed=0, max_new_tokens=1000, max_input_tokens=0, max_unanswered=0)
    target = Target("generate", "m", 4096, ("exact",), 4.0)
    run = Run(options, Server("http://127.0.0.1"), [target], Library.from_samples())
    assert run.classes["generate", "m"][-1].max_tokens == 3096


def test_a_server_that_is_still_loading_is_waited_for_and_then_given_up() -> None:
    pauses: list[float] = []
    with stub_server("loading") as stub, pytest.raises(ServerProblem, match="not ready after 0.05 s"):
        Server(stub.url).wait_until_ready(0.05, lambda pause_s: (pauses.append(pause_s), sleep(0.02))[0])
    assert pauses
    with stub_server() as stub:
        Server(stub.url).wait_until_ready(0)


def test_a_server_that_speaks_something_else_is_named() -> None:
    with stub_server() as stub, pytest.raises(ServerProblem, match="/nonesuch answered 404"):
        Server(stub.url).call("/nonesuch")
