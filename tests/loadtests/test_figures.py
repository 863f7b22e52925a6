"""The scripts of the figures, against a server over fake models: what they send, and what they conclude."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loadtests import decode_batch, interference, mixing, verify_cost
from loadtests.client import Answer, Client
from loadtests.figure import Figure, markdown, verdict
from loadtests.server import ServerProblem
from tests.service.conftest import Served, serving
from tests.service.fake_model import decoder, encoder, slow


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    hook = slow(0.004)
    with serving(encoder(on_step=hook), decoder(on_step=hook)) as found:
        yield found


def run(main: Any, served: Served, tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    file = tmp_path / "figure.json"
    status = main(["--host", served.url, "--smoke", "--json", str(file), *arguments])
    return status, json.loads(file.read_text())


def test_interference_tells_first_token_times_and_the_long_ones_share(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, told = run(interference.main, served, tmp_path, "--model", "dec")
    assert status == 0
    assert told["short"]["num_idle"] == 3 and told["short"]["num_loaded"] >= 1
    first = told["first_token_ms"]
    assert told["first_token_ratio"]["p99"] == pytest.approx(first["loaded"]["p99"] / first["idle"]["p99"])
    alone, mixed = told["long"]["alone_s"][0], told["long"]["mixed_s"][0]
    compute_s = told["short"]["num_loaded"] * told["short"]["compute_ms"] / 1e3
    assert told["long"]["ratio"] == pytest.approx(mixed / (alone + compute_s))
    assert "| requests | idle or alone | together | ratio |" in capsys.readouterr().out


def test_interference_takes_an_encoder_too(served: Served, tmp_path: Path) -> None:
    status, told = run(interference.main, served, tmp_path, "--model", "enc", "--task", "encode")
    assert status == 0 and told["long"]["alone_s"][0] > 0


def test_mixing_compares_a_mix_with_the_mean_of_runs_of_one_backend(served: Served, tmp_path: Path) -> None:
    status, told = run(mixing.main, served, tmp_path, "--model", "dec", "--backends", "exact", "window")
    assert status == 0 and set(told["alone_s"]) == {"exact", "window"}
    mean = sum(seconds[0] for seconds in told["alone_s"].values()) / 2
    assert told["ratio"] == pytest.approx(told["mixed_s"][0] / mean)


def test_decode_batch_compares_many_sequences_with_one(served: Served, tmp_path: Path) -> None:
    arguments = ("--model", "dec", "--backends", "window", "--new-tokens", "24")
    status, told = run(decode_batch.main, served, tmp_path, *arguments)
    found = told["backends"]["window"]
    assert status == 0 and found["ratio"] > 0
    assert found["ratio"] == pytest.approx(found["many_tokens_per_s"][0] / found["one_tokens_per_s"][0])


def test_verify_cost_compares_a_prompt_with_and_without_measuring(served: Served, tmp_path: Path) -> None:
    status, told = run(verify_cost.main, served, tmp_path, "--model", "dec", "--attention", "window")
    assert status == 0
    plain, verified = told["prefill_ms"]
    assert told["ratio"] == pytest.approx(verified[0] / plain[0])
    assert told["told"] == pytest.approx(told["measured_error"][0]["cost_ms"] / verified[0])


@pytest.mark.parametrize(
    ("main", "arguments", "words"),
    [
        (mixing.main, ["--model", "nobody"], "no model 'nobody' there; there are: enc, dec"),
        (mixing.main, ["--model", "dec", "--backends", "magic"], "does not run magic"),
        (interference.main, ["--model", "dec", "--long-tokens", "399999"], ""),
    ],
)
def test_what_cannot_be_measured_is_said_and_fails(
    main: Any, arguments: list[str], words: str, served: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    smoke = [] if "--long-tokens" in arguments else ["--smoke"]
    assert main(["--host", served.url, *smoke, *arguments]) == 1
    assert (words or "--long-tokens 399999: model 'dec' reads at most 1023") in capsys.readouterr().err


def test_a_request_without_an_answer_fails_the_run(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    posted, post = [], Client.post

    def every_third(client: Client, path: str, body: dict[str, Any]) -> Answer:
        posted.append(path)
        return post(client, path, body | ({"surprise": 1} if len(posted) % 3 == 0 else {}))

    monkeypatch.setattr(Client, "post", every_third)
    status, told = run(mixing.main, served, tmp_path, "--model", "dec", "--backends", "exact", "window")
    assert status == 1 and "unanswered: 400 invalid_request" in capsys.readouterr().out
    assert told["notes"][0] == "8 requests, 2 without an answer"


def test_no_two_prompts_begin_alike_and_the_same_seed_sends_the_same() -> None:
    def prompts(seed: int) -> list[list[int]]:
        options = interference._options(["--seed", str(seed)])
        figure = Figure(options, Client("http://127.0.0.1:1"), "", {}, {"m": list(range(50_000))})
        return [figure.token_ids("m", 8) for _ in range(200)]

    assert prompts(1) == prompts(1) != prompts(2)
    assert len({prompt[0] for prompt in prompts(1)}) > 195


def test_only_what_arrives_while_all_decode_is_counted() -> None:
    def answer(*times: float) -> Answer:
        return Answer(0.0, 200, token_times_s=list(times))

    early = answer(*(0.1 * i for i in range(1, 61)))
    late = answer(*(3 + 0.1 * i for i in range(1, 61)))
    assert decode_batch.tokens_per_s([early, late]) == pytest.approx(20, rel=0.05)
    with pytest.raises(ServerProblem, match="too few to tell"):
        decode_batch.tokens_per_s([answer(1.0, 1.1), answer(1.2, 1.3)])


def test_a_verdict_says_which_way_the_target_lies() -> None:
    assert verdict(1.2, 1.2) == "1.20 (<= 1.2: met)"
    assert verdict(5.0, 6, at_most=False) == "5.00 (>= 6: missed)"
    assert markdown([["a", "b"], ["1", "2"]]) == ["| a | b |", "|---|--:|", "| 1 | 2 |"]
