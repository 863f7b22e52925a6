"""The table of one long document under several attentions."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from loadtests.long_document import cosine, line, main

STATS = {"total_ms": 8805.5, "time_to_first_token_ms": 8153.5, "attention_ms": 2151.8}
ANSWER: dict[str, Any] = {
    "usage": {"prompt_tokens": 7000},
    "attention": {"used": "window", "density": 0.14061, "flops_ratio": 0.578},
    "stats": {**STATS, "memory": {"peak_bytes": 323_251_200}},
}


def test_a_row_tells_seconds_density_and_megabytes() -> None:
    assert line(ANSWER, None, None) == "| window | 7,000 | 8.8 | 8.2 | 2.2 | 0.1406 | 0.578 | 323 | – |"


def test_what_is_not_known_is_a_dash_not_a_zero() -> None:
    stats = {**STATS, "time_to_first_token_ms": None, "memory": {"peak_bytes": None}}
    cells = line({**ANSWER, "stats": stats}, [3.0, 4.0], [4.0, 3.0]).strip("| ").split(" | ")
    assert (cells[3], cells[7], cells[8]) == ("–", "–", "0.9600")


def test_cosine_of_a_vector_with_itself_is_one() -> None:
    assert cosine([3.0, -4.0], [3.0, -4.0]) == pytest.approx(1)


def test_without_a_server_the_message_says_how_to_start_one(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    assert main(["--host", f"http://127.0.0.1:{port}", "--model", "any"]) == 1
    assert "make serve" in capsys.readouterr().err
