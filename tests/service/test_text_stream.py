"""Text from tokens, piece by piece, equals text from all tokens at once."""

from __future__ import annotations

import random

import pytest

from service.text_stream import Detokeniser, StopFinder
from tests.service.fake_model import ByteTokenizer


def stream(data: bytes, stops: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    detokeniser, finder = Detokeniser(ByteTokenizer()), StopFinder(stops)
    pieces = []
    for byte in data:
        pieces.append(finder.push(detokeniser.push(byte)))
        if finder.stopped:
            return pieces, True
    pieces.append(finder.push(detokeniser.finish()) + finder.finish())
    return pieces, finder.stopped


@pytest.mark.parametrize(
    "text", ["plain", "żółw", "🐢🐢", "a\u0301e", "日本語 text", "", "\ufffd is a character too"]
)
def test_pieces_concatenate_to_the_text(text: str) -> None:
    pieces, _ = stream(text.encode())
    assert "".join(pieces) == text


def test_half_a_character_at_the_end_shows_as_replacement_once() -> None:
    pieces, _ = stream("ok🐢".encode()[:-1])
    assert "".join(pieces) == "ok\ufffd" and pieces[:2] == ["o", "k"]


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("hello world", ("wor",), "hello "),
        ("hello world", ("x",), "hello world"),
        ("aaab", ("aab",), "a"),
        ("STSTOP", ("STOP",), "ST"),
        ("one\n\ntwo", ("\n\n",), "one"),
        ("abcabd", ("abd", "xyz"), "abc"),
        ("ab", ("abc",), "ab"),
        ("stop", ("stop",), ""),
        ("🐢stop🐢", ("p🐢",), "🐢sto"),
        ("both ab and cd", ("cd", "ab"), "both "),
    ],
)
def test_text_ends_before_the_first_stop(text: str, stops: tuple[str, ...], expected: str) -> None:
    pieces, stopped = stream(text.encode(), stops)
    assert "".join(pieces) == expected
    assert stopped == (expected != text)


@pytest.mark.parametrize("seed", range(40))
def test_no_stop_is_ever_shown_and_nothing_else_is_lost(seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choice("abż") for _ in range(60))
    stops = tuple(
        "".join(rng.choice("abż") for _ in range(rng.randint(2, 5))) for _ in range(rng.randint(1, 4))
    )
    pieces, stopped = stream(text.encode(), stops)
    shown = "".join(pieces)
    assert text.startswith(shown) and not any(stop in shown for stop in stops)
    if stopped:
        assert any(text[len(shown) :].startswith(stop) for stop in stops)
    else:
        assert shown == text


def test_only_what_may_become_a_stop_is_held_back() -> None:
    finder = StopFinder(("STOP",))
    assert [finder.push(piece) for piece in ("x", "S", "T", "y", "ST")] == ["x", "", "", "STy", ""]
    assert finder.finish() == "ST"
