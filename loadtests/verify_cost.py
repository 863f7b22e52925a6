"""What measuring the error costs: a long prompt read with ``verify`` and without.

    python -m loadtests.verify_cost --model qwen2.5-coder-0.5b --tokens 16000

Same attention, same lengths, other passages of the text each time, with and without in turns; medians of the
server's own ``prefill_ms`` are compared. ``told`` is the time that the answer itself says measuring took.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from typing import Any

from loadtests.client import Answer
from loadtests.documents import Library
from loadtests.figure import Figure, Measured, answered, median, options_parser, run, verdict
from loadtests.server import Server, ServerProblem

TARGET = 0.02
CHARACTERS_PER_TOKEN = 7


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    return run("verify_cost", options, [options.model], measure, argv)


def measure(figure: Figure) -> Measured:
    options = figure.options
    draw = random.Random(options.seed)
    read(figure, False, passage(figure, options.warm_up_tokens, draw))  # not measured: first steps build
    plain, verified = list[Answer](), list[Answer]()
    for turn in range(options.repeat):
        for verify in (turn % 2 == 0, turn % 2 == 1):
            prompt = passage(figure, options.tokens, draw)
            (verified if verify else plain).append(read(figure, verify, prompt))
    return _table(plain, verified)


def read(figure: Figure, verify: bool, token_ids: Sequence[int]) -> Answer:
    """One prompt."""
    options = figure.options
    body = figure.body("generate", options.model, options.attention, 1)
    body["prompt"] = {"token_ids": token_ids}
    body["attention"] = {"backend": options.attention, "params": options.params}
    if verify:
        body["attention"]["verify"] = True
    return answered([figure.post("generate", body)])[0]


def passage(figure: Figure, tokens: int, draw: random.Random) -> list[int]:
    """So many tokens of a part of the sample texts that ``draw`` picks."""
    options = figure.options
    text = Library.from_samples().cut(CHARACTERS_PER_TOKEN * tokens, draw)
    asked = {"model": options.model, "input": text, "special_tokens": False}
    told = Server(options.host, options.api_key, options.timeout).call("/v1/tokenize", asked)
    ids = list[int](told["data"][0]["token_ids"])[:tokens]
    if len(ids) < tokens:
        raise ServerProblem(f"the sample text has {len(ids)} tokens, {tokens} are needed: lower --tokens")
    return ids


def _table(plain: Sequence[Answer], verified: Sequence[Answer]) -> Measured:
    prefill = [[float(answer.body["stats"]["prefill_ms"]) for answer in each] for each in (plain, verified)]
    errors = [answer.body["attention"]["measured_error"] for answer in verified]
    told = median([error["cost_ms"] for error in errors]) / median(prefill[1])
    ratio = median(prefill[1]) / median(prefill[0])
    error = errors[-1]
    rows = [
        ["figure", "value"],
        ["prefill without", f"{median(prefill[0]) / 1e3:.1f} s"],
        ["prefill with", f"{median(prefill[1]) / 1e3:.1f} s"],
        ["more", f"{ratio - 1:+.1%}"],
        ["told, of the prefill", verdict(told, TARGET)],
        ["error told", f"{error['estimate']:.3f}"],
        ["rows computed twice", f"{error['rows']:,} of {error['rows_total']:,}"],
    ]
    values: dict[str, Any] = {"prefill_ms": prefill, "ratio": ratio, "told": told, "target": TARGET}
    return rows, values | {"measured_error": errors}


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options_parser("verify_cost", __doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", default="smollm2-135m")
    add("--attention", default="pooled", metavar="BACKEND")
    add("--params", type=json.loads, default={}, metavar="JSON")
    add("--tokens", type=int, default=8000, help="of each prompt")
    add("--warm-up-tokens", type=int, default=600)
    add("--repeat", type=int, default=3, metavar="N")
    options = parser.parse_args(argv)
    if options.smoke:
        options.tokens, options.warm_up_tokens, options.repeat = min(options.tokens, 256), 16, 1
    return options


if __name__ == "__main__":
    sys.exit(main())
