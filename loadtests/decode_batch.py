"""What decoding together gains: tokens per second of 16 sequences and of one.

    python -m loadtests.decode_batch --model smollm2-135m --backends exact window

Prompts of 128 tokens. Counted is what arrives while all sequences decode: from the moment when the last of
them has its first token until the first of them ends; the prompts' own time is left out. Runs of one and of
many are interleaved and repeated, medians are compared. ``--plain`` asks without streams, whose events cost
the server and this script time on the same cores, and sums each sequence's own rate.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from loadtests.client import Answer
from loadtests.figure import Figure, Measured, answered, median, options_parser, run, verdict
from loadtests.server import ServerProblem

TARGET = 6.0


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    return run("decode_batch", options, [options.model], measure, argv)


def measure(figure: Figure) -> Measured:
    options = figure.options
    rows = [["attention", "1 sequence tok/s", f"{options.sequences} sequences tok/s", "ratio"]]
    values: dict[str, Any] = {"target": TARGET, "sequences": options.sequences, "backends": {}}
    for name in figure.backends(options.model, options.backends):
        decode(figure, name, 1)  # what a first step builds and keeps is not measured
        one, many = list[float](), list[float]()
        for _ in range(options.repeat):
            one.append(decode(figure, name, 1))
            many.append(decode(figure, name, options.sequences))
        ratio = median(many) / median(one)
        values["backends"][name] = {"one_tokens_per_s": one, "many_tokens_per_s": many, "ratio": ratio}
        cells = [f"{median(one):.1f}", f"{median(many):.1f}", verdict(ratio, TARGET, at_most=False)]
        rows.append([name, *cells])
    return rows, values


def decode(figure: Figure, attention: str, sequences: int) -> float:
    """Tokens per second of so many sequences at once."""
    options = figure.options
    stream = not options.plain
    bodies = [
        figure.body("generate", options.model, attention, options.tokens, options.new_tokens, stream=stream)
        for _ in range(sequences)
    ]
    answers = answered(figure.together("generate", bodies))
    return tokens_per_s(answers) if stream else sum(map(own_tokens_per_s, answers))


def own_tokens_per_s(answer: Answer) -> float:
    """Of one sequence, as the server tells its time of decoding: reading the prompts of others beside it
    included."""
    tokens = int(answer.body["usage"]["completion_tokens"]) - 1
    return tokens / (float(answer.body["stats"]["decode_ms"]) / 1e3) if tokens else 0.0


def tokens_per_s(answers: Sequence[Answer]) -> float:
    """Tokens that arrive while all of these decode, per second. ServerProblem where they hardly ever do."""
    times = [answer.token_times_s for answer in answers if answer.token_times_s]
    begin, end = max(each[0] for each in times), min(each[-1] for each in times)
    arrived = sum(begin < at <= end for each in times for at in each)
    if arrived < 4 * len(answers):
        raise ServerProblem(
            f"{len(answers)} sequences decoded {arrived} tokens side by side, too few to tell: "
            "raise --new-tokens, or take another --seed where a text ends early"
        )
    return arrived / (end - begin)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options_parser("decode_batch", __doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", default="smollm2-135m")
    add("--backends", nargs="+", default=["exact", "window", "performer"], metavar="BACKEND")
    add("--sequences", type=int, default=16)
    add("--tokens", type=int, default=128, help="of each prompt")
    add("--new-tokens", type=int, default=128, help="at the most, of each sequence")
    add("--plain", action="store_true", help="no streams: rates as the server tells them, summed")
    add("--repeat", type=int, default=3, metavar="N")
    options = parser.parse_args(argv)
    if options.smoke:
        options.sequences, options.new_tokens, options.repeat = 2, min(options.new_tokens, 32), 1
        options.tokens = min(options.tokens, 16)
    return options


if __name__ == "__main__":
    sys.exit(main())
