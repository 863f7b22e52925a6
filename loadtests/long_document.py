"""One long document under several attentions in turn, on a running server: time, density, memory.

    python -m loadtests.long_document --model smollm2-135m --tokens 7000
    python -m loadtests.long_document --model nomic-embed-v1.5 --tokens 7000
    python -m loadtests.long_document --model qwen2.5-coder-0.5b --file samples/state-of-the-union-1901.txt

Decoders generate ``--new-tokens``, encoders embed; ``cosine`` compares with the first attention's embedding.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SAMPLE = Path(__file__).resolve().parents[1] / "samples" / "state-of-the-union-1902.txt"
HEAD = "| attention | tokens | total s | first token s | attention s | density | FLOP ratio | MB | cosine |"


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    try:
        token_ids = _token_ids(options)
        print(
            f"{options.model}, {len(token_ids):,} tokens of {options.file.name}\n\n{HEAD}\n|---"
            + "|--:" * 8
            + "|"
        )
        first: list[float] | None = None
        for attention in options.attentions:
            answer = _read(options, token_ids, attention)
            vector = answer["data"][0]["embedding"] if "data" in answer else None
            first = first or vector
            print(line(answer, first, vector), flush=True)
    except urllib.error.HTTPError as error:
        print(f"{error.code}: {error.read().decode()}", file=sys.stderr)
        return 1
    except urllib.error.URLError as error:
        print(f"no server at {options.host} ({error.reason}); start one with `make serve`", file=sys.stderr)
        return 1
    return 0


def line(answer: dict[str, Any], first: list[float] | None, vector: list[float] | None) -> str:
    """An answer as a row of the table."""
    attention, stats = answer["attention"], answer["stats"]
    peak = stats["memory"]["peak_bytes"]
    to_first = stats["time_to_first_token_ms"]
    cells = [
        attention["used"],
        f"{answer['usage']['prompt_tokens']:,}",
        f"{stats['total_ms'] / 1e3:.1f}",
        "–" if to_first is None else f"{to_first / 1e3:.1f}",
        f"{stats['attention_ms'] / 1e3:.1f}",
        f"{attention['density']:.4f}",
        f"{attention['flops_ratio']:.3f}",
        "–" if peak is None else f"{peak / 1e6:.0f}",
        "–" if first is None or vector is None else f"{cosine(first, vector):.4f}",
    ]
    return "| " + " | ".join(cells) + " |"


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def _token_ids(options: argparse.Namespace) -> list[int]:
    text = options.file.read_text(encoding="utf-8")
    answer = _post(options.host, "/v1/tokenize", {"model": options.model, "input": text})
    token_ids: list[int] = answer["data"][0]["token_ids"]
    return token_ids[: options.tokens]


def _read(options: argparse.Namespace, token_ids: list[int], attention: str) -> dict[str, Any]:
    body: dict[str, Any] = {"model": options.model, "attention": attention}
    cards = _get(options.host, "/v1/models")["data"]
    if any(card["id"] == options.model and "generate" in card["tasks"] for card in cards):
        body |= {"prompt": {"token_ids": token_ids}, "max_new_tokens": options.new_tokens}
        return _post(options.host, "/v1/generate", body)
    return _post(options.host, "/v1/encode", body | {"input": {"token_ids": token_ids}})


def _get(host: str, path: str) -> dict[str, Any]:
    with urllib.request.urlopen(host + path, timeout=60) as answer:
        return dict(json.load(answer))


def _post(host: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(host + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=3600) as answer:
        return dict(json.load(answer))


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.long_document", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--host", default="http://127.0.0.1:8000")
    parser.add_argument("--model", required=True)
    parser.add_argument("--file", type=Path, default=SAMPLE)
    parser.add_argument("--tokens", type=int, default=None, help="only the first so many; all by default")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--attentions", nargs="+", default=["exact", "window", "bigbird"], metavar="BACKEND")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
