"""What short requests feel of a long one, and the long one of them.

    longreach serve --profile 32k
    python -m loadtests.interference --model qwen2.5-coder-0.5b --long-tokens 32000
    python -m loadtests.interference --model nomic-embed-v1.5 --task encode --long-tokens 8000

Idle: short requests once a second. Alone: the long request with nothing beside it. Mixed: the long one with a
short one every second for as long as it takes. Figures: the p99 of the shorts' time to first token under load
over idle; and the long one's time over its time alone plus the compute of the shorts (their number times a
short one's measured time between first and last step on the idle server).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter, sleep
from typing import Any

from loadtests.client import Answer
from loadtests.figure import Figure, Measured, answered, median, options_parser, run, verdict
from loadtests.report import percentile
from loadtests.server import ServerProblem

FIRST_TOKEN_TARGET = 3.0
LONG_TARGET = 1.2
MAX_IN_FLIGHT = 512


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    return run("interference", options, [options.model], measure, argv)


@dataclass(frozen=True)
class Round:
    """The long request alone, then beside shorts."""

    alone_s: float
    mixed_s: float
    shorts: tuple[Answer, ...]

    def ratio(self, short_s: float) -> float:
        """Mixed over alone plus the shorts, each of ``short_s`` seconds of compute."""
        return self.mixed_s / (self.alone_s + len(self.shorts) * short_s)


def measure(figure: Figure) -> Measured:
    options = figure.options
    _check_length(figure)
    figure.post(options.task, _body(figure, options.short_tokens))  # what a first step builds is not measured
    idle = answered(arrive(figure, lambda sent: sent >= options.idle_requests))
    return _table(figure, idle, [one_round(figure) for _ in range(options.repeat)])


def one_round(figure: Figure) -> Round:
    alone = answered([figure.post(figure.options.task, _body(figure, figure.options.long_tokens))])[0]
    mixed, shorts = beside_a_long_one(figure)
    return Round(alone.total_s, mixed.total_s, tuple(answered(shorts)))


def beside_a_long_one(figure: Figure) -> tuple[Answer, list[Answer]]:
    """The long request with shorts arriving until it is answered; the last of them are waited for."""
    body = _body(figure, figure.options.long_tokens)
    with ThreadPoolExecutor(1) as pool:
        long_one = pool.submit(figure.post, figure.options.task, body)
        sleep(1 / figure.options.rate)
        shorts = arrive(figure, lambda sent: sent > 0 and long_one.done())
        return answered([long_one.result()])[0], shorts


def arrive(figure: Figure, enough: Callable[[int], bool]) -> list[Answer]:
    """Shorts at fixed times, whether or not earlier ones were answered, until ``enough`` (of how many were
    sent)."""
    options, began = figure.options, perf_counter()
    answers: list[Future[Answer]] = []
    with ThreadPoolExecutor(MAX_IN_FLIGHT) as pool:
        while not enough(len(answers)):
            body = _body(figure, options.short_tokens)
            answers.append(pool.submit(figure.post, options.task, body))
            sleep(max(0.0, began + len(answers) / options.rate - perf_counter()))
        return [answer.result() for answer in answers]


def _body(figure: Figure, tokens: int) -> dict[str, Any]:
    options = figure.options
    return figure.body(options.task, options.model, options.attention, tokens)


def _first_token_ms(answers: Sequence[Answer]) -> dict[str, float]:
    times = [answer.first_s * 1e3 for answer in answers]
    return {f"p{p}": percentile(times, p) or 0.0 for p in (50, 99)}


def _table(figure: Figure, idle: Sequence[Answer], rounds: Sequence[Round]) -> Measured:
    loaded = [answer for each in rounds for answer in each.shorts]
    short_s = median([answer.busy_s for answer in idle])
    before, under = _first_token_ms(idle), _first_token_ms(loaded)
    ratio = {name: under[name] / before[name] for name in before}
    long_ratio = median([each.ratio(short_s) for each in rounds])
    alone_s, mixed_s = [each.alone_s for each in rounds], [each.mixed_s for each in rounds]
    told = {"p50": f"{ratio['p50']:.2f}", "p99": verdict(ratio["p99"], FIRST_TOKEN_TARGET)}
    table = [
        ["requests", "idle or alone", "together", "ratio"],
        ["short ones", str(len(idle)), str(len(loaded)), ""],
        *([f"their {p} to first token, ms", f"{before[p]:.0f}", f"{under[p]:.0f}", told[p]] for p in before),
        ["compute of one, ms", f"{short_s * 1e3:.0f}", "", ""],
        [
            f"{figure.options.long_tokens:,} tokens, s; over alone plus the shorts' compute",
            f"{median(alone_s):.1f}",
            f"{median(mixed_s):.1f}",
            verdict(long_ratio, LONG_TARGET),
        ],
    ]
    values = {
        "first_token_ms": {"idle": before, "loaded": under},
        "first_token_ratio": {"p99": ratio["p99"], "target": FIRST_TOKEN_TARGET},
        "long": {"alone_s": alone_s, "mixed_s": mixed_s, "ratio": long_ratio, "target": LONG_TARGET},
        "short": {"compute_ms": short_s * 1e3, "num_idle": len(idle), "num_loaded": len(loaded)},
    }
    return table, values


def _check_length(figure: Figure) -> None:
    options = figure.options
    room = figure.card(options.model)["max_tokens"] - (options.task == "generate")
    if options.long_tokens > room:
        raise ServerProblem(
            f"--long-tokens {options.long_tokens}: model {options.model!r} reads at most {room}; take fewer, "
            "or serve one with a longer context (longreach serve --profile 32k)"
        )


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options_parser("interference", __doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", default="qwen2.5-coder-0.5b")
    add("--task", default="generate", choices=("generate", "encode"))
    add("--attention", default="exact", metavar="BACKEND", help="of the long request and the short ones")
    add("--long-tokens", type=int, default=32_000)
    add("--short-tokens", type=int, default=128)
    add("--idle-requests", type=int, default=30)
    add("--rate", type=float, default=1.0, help="short requests per second")
    add("--repeat", type=int, default=1, metavar="N", help="of the long request alone and mixed, in turn")
    options = parser.parse_args(argv)
    if options.smoke:
        options.idle_requests, options.rate, options.short_tokens = 3, 20.0, min(options.short_tokens, 32)
        options.long_tokens = min(options.long_tokens, 400)
    return options


if __name__ == "__main__":
    sys.exit(main())
