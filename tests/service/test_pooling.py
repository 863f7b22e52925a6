"""Late chunking: the same chunks as a plain search finds, refused or planned without holding anybody up."""

from __future__ import annotations

import random
import threading

import pytest

from service import pooling
from service.inputs import Tokens
from service.pooling import Chunk, chunks_of, num_chunks
from service.routes import encode as encode_route
from service.schemas import LateChunking
from tests.service.conftest import in_process
from tests.service.fake_model import WIDTH, encoder


def random_tokens(rng: random.Random) -> Tokens:
    """Tokens of several characters, some sharing one, some of none; blanks between, specials around."""
    spans, at = [(0, 0)] * rng.randint(0, 3), 0
    for _ in range(rng.randint(0, 30)):
        at += rng.choice([0, 0, 1, 2])
        end = at + rng.choice([0, 1, 1, 3])
        spans += [(at, end)] * rng.choice([1, 1, 2])
        at = end
    spans += [(0, 0)] * rng.randint(0, 2)
    spans = spans or [(0, 1)]
    return Tokens(list(range(len(spans))), spans, text="x" * (at + 3))


def plain_span(tokens: Tokens, first: int, end: int) -> tuple[int, int] | None:
    inside = [i for i, (a, b) in enumerate(tokens.char_spans) if a < end and b > first]
    return (inside[0], inside[-1] + 1) if inside else None


def plain_chars(tokens: Tokens, first: int, end: int) -> tuple[int, int]:
    spans = [span for span in tokens.char_spans[first:end] if span[1] > span[0]]
    return (spans[0][0], spans[-1][1]) if spans else (0, 0)


@pytest.mark.parametrize("seed", range(60))
def test_chunks_are_those_that_a_search_of_every_token_finds(seed: int) -> None:
    rng = random.Random(seed)
    tokens = random_tokens(rng)
    length, chars = len(tokens.token_ids), len(tokens.text or "")
    size = rng.randint(1, length + 2)
    asked = LateChunking(chunk_tokens=size, overlap=rng.randint(0, size - 1))
    found = chunks_of(tokens, asked, "input")
    assert num_chunks(length, asked) == len(found)
    assert found[-1].token_range[1] == length
    for chunk in found:
        assert chunk.char_range == plain_chars(tokens, *chunk.token_range)
    for first in range(chars):
        end = rng.randint(first + 1, chars)
        expected = plain_span(tokens, first, end)
        asked = LateChunking(spans=[[first, end]])
        if expected is None:
            with pytest.raises(Exception, match="covers no token"):
                chunks_of(tokens, asked, "input")
        else:
            assert chunks_of(tokens, asked, "input") == [Chunk(expected, (first, end))]


@pytest.mark.parametrize(
    "late_chunking",
    [{"spans": [[0, 300]] * 4096}, {"chunk_tokens": 200, "overlap": 199}],
    ids=["spans", "overlap"],
)
def test_an_answer_that_is_too_large_is_refused_before_a_chunk_is_planned(
    late_chunking: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[object] = []
    monkeypatch.setattr(encode_route, "plan_chunks", lambda *args: planned.append(args))
    with in_process(max_output_values=10 * WIDTH) as client:
        answer = client.post("/v1/encode", json={"input": ["x" * 300] * 4, "late_chunking": late_chunking})
    assert answer.status_code == 400 and answer.json()["param"] == "late_chunking"
    parts = 4096 if "spans" in late_chunking else 302 - 199
    assert answer.json()["limits"] == {"max_output_values": 160, "values": 4 * (parts + 1) * WIDTH}
    assert not planned


def test_chunks_are_planned_off_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    real = pooling.chunks_of

    def noting(*args: object) -> object:
        threads.append(threading.current_thread().name)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(encode_route, "chunks_of", noting)
    with in_process(encoder()) as client:
        body = {"input": ["abc", "de"], "late_chunking": {"chunk_tokens": 2}}
        assert client.post("/v1/encode", json=body).status_code == 200
    assert len(threads) == 2 and all("worker" in name for name in threads)
