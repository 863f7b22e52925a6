"""Thousands of requests of every kind at once: is each one answered, and does nothing stay behind?

    python -m loadtests.chaos --serve --tiny --requests 10000
    python -m loadtests.chaos --host http://127.0.0.1:8000 --requests 2000

Valid requests on every route under every backend, bad input, tiny deadlines, clients that leave in every
phase, bursts beyond what the queue takes. What is sent depends on ``--seed`` alone. A request passes that is
answered as asked, refused for a reason of its own, turned away with Retry-After, or left by its client; then
the server must be idle, hold no page, and have grown by at most ``--max-growth`` since the second burst: a
third of the requests at the default sizes, in which bounded caches fill. Its memory is read after a tenth and
a burst, after every further burst and at the end, each time when it has been idle for ``--quiet`` seconds: by
then it has given free memory back. All readings are told.

With ``--serve`` the server is the script's own, and must end a request in flight when told to stop; with
``--tiny`` too it serves the random networks of ``loadtests.tiny_models``. Give any other a
``--prefix-cache-bytes`` that the first tenth fills, as cached pages count as growth.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

from loadtests.chaos_checks import Check, Reading, checks, drain_body, memory_table, settle
from loadtests.chaos_client import ChaosClient, Outcome, departure
from loadtests.chaos_requests import World, bad, tiny_timeout, valid
from loadtests.documents import Library
from loadtests.figure import markdown
from loadtests.own_server import DEFAULT_COMMAND, OwnServer, own_server
from loadtests.server import Server, ServerProblem
from loadtests.tiny_models import serve_flags, write_models

SHARES = {"valid": 60, "bad input": 15, "client leaves": 17, "tiny deadline": 8}
COLUMNS = ("2xx", "4xx", "429", "5xx", "left", "unanswered")
PREFIX_TOKENS = 300


@dataclass
class Tally:
    """Outcomes by kind of request."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    codes: Counter[str] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, outcome: Outcome) -> None:
        self.counts.setdefault(kind, Counter())[column(outcome)] += 1
        if outcome.code:
            self.codes[f"{outcome.status} {outcome.code}"] += 1
        if outcome.problem:
            self.problems[f"{kind}: {outcome.problem}"[:300]] += 1

    @property
    def total(self) -> int:
        return sum(counter.total() for counter in self.counts.values())

    def table(self) -> list[list[str]]:
        rows = [[kind, *(str(counts[name]) for name in COLUMNS)] for kind, counts in self.counts.items()]
        return [["kind", *COLUMNS], *rows]


def column(outcome: Outcome) -> str:
    if outcome.left:
        return "left"
    if not outcome.status:
        return "unanswered"
    return "429" if outcome.status == 429 else f"{outcome.status // 100}xx"


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    try:
        with ExitStack() as stack:
            own = None
            if options.serve:
                command = options.command
                if options.tiny:
                    directory = Path(stack.enter_context(TemporaryDirectory()))
                    command = shlex.join([*shlex.split(command), *serve_flags(write_models(directory))])
                own = stack.enter_context(own_server(command, options.wait_ready, options.server_log))
                options.host = own.url
            return run(options, own)
    except ServerProblem as problem:
        print(problem, file=sys.stderr)
        return 1


def run(options: argparse.Namespace, own: OwnServer | None) -> int:
    server = Server(options.host, options.api_key)
    version = server.call("/version")
    world = discover(server)
    versions = f"longreach {version['version']}, torch {version['torch']}"
    print(f"{options.requests} requests, seed {options.seed}, {versions}")
    tally, began = Tally(), perf_counter()
    readings = asyncio.run(drive(options, world, tally))
    seconds = perf_counter() - began
    found = checks(readings, options.max_growth)
    if own:
        wrong = own.drains(drain_body(world), options.api_key)
        found.append(Check("ends a request in flight on SIGTERM", wrong or "yes", not wrong))
    return report(options, tally, readings, found, seconds)


def discover(server: Server) -> World:
    """Models, and the tokens that prompts are drawn from."""
    text = Library.from_samples().cut(20_000, random.Random(0))
    cards = {card["id"]: card for card in server.call("/v1/models")["data"]}
    pools = {
        name: server.call("/v1/tokenize", {"model": name, "input": text, "special_tokens": False})["data"][0][
            "token_ids"
        ]
        for name in cards
    }
    prefixes = {name: pool[:PREFIX_TOKENS] for name, pool in pools.items()}
    backends = server.call("/v1/attention/backends")["data"]
    decoding = frozenset(each["name"] for each in backends if each["capabilities"]["decode"])
    return World(cards, pools, text, decoding, prefixes)


async def drive(options: argparse.Namespace, world: World, tally: Tally) -> list[Reading]:
    """Send everything; the server's numbers after the first tenth and a burst, after each further burst, and
    at the end."""
    client = ChaosClient(options.host, options.api_key, options.timeout)
    warm_up = options.requests // 10
    await steady(client, options, world, tally, range(warm_up))
    await burst(client, options, world, tally, -1)
    readings = [await read(options, tally)]
    left = options.requests - tally.total
    part = max(0, left - options.bursts * options.burst) // (options.bursts + 1)
    for number in range(options.bursts):
        first = warm_up + number * part
        await steady(client, options, world, tally, range(first, first + part))
        await burst(client, options, world, tally, number)
        readings.append(await read(options, tally))
    first = warm_up + options.bursts * part
    await steady(client, options, world, tally, range(first, first + options.requests - tally.total))
    return [*readings, await read(options, tally)]


async def read(options: argparse.Namespace, tally: Tally) -> Reading:
    reading = Reading(tally.total, await settle(options.host, options.api_key, options.quiet))
    print(
        ", ".join(f"{name} {value}" for name, value in zip(*memory_table([reading]), strict=True)), flush=True
    )
    return reading


async def steady(
    client: ChaosClient, options: argparse.Namespace, world: World, tally: Tally, numbers: range
) -> None:
    """Requests of these numbers, ``--concurrency`` at a time."""
    waiting = iter(numbers)

    async def worker() -> None:
        for number in waiting:
            tally.add(*await one(client, world, random.Random(f"{options.seed}-{number}")))

    await asyncio.gather(*(worker() for _ in range(options.concurrency)))


async def burst(
    client: ChaosClient, options: argparse.Namespace, world: World, tally: Tally, number: int
) -> None:
    """More valid requests at once than the queue takes."""
    draws = [random.Random(f"{options.seed}-burst-{number}-{i}") for i in range(options.burst)]
    for outcome in await asyncio.gather(*(client.send(valid(world, draw)) for draw in draws)):
        tally.add("burst", outcome)


async def one(client: ChaosClient, world: World, draw: random.Random) -> tuple[str, Outcome]:
    """A request of a kind drawn by its share."""
    kind = draw.choices(list(SHARES), weights=list(SHARES.values()))[0]
    if kind == "bad input":
        return kind, await client.send(bad(world, draw))
    if kind == "tiny deadline":
        return kind, await client.send(tiny_timeout(world, draw))
    request = valid(world, draw)
    if kind == "valid":
        return kind, await client.send(request)
    point, after_s = departure(draw)
    return f"{kind}: {point.replace('_', ' ')}", await client.send(request, point, after_s)


def report(
    options: argparse.Namespace, tally: Tally, readings: list[Reading], found: list[Check], seconds: float
) -> int:
    """Print and write what came of it; the exit code."""
    memory = memory_table(readings)
    rows = [[check.name, check.told, "ok" if check.passed else "FAILED"] for check in found]
    tables = [tally.table(), memory, [["check", "found", ""], *rows]]
    print("\n".join(line for table in tables for line in ["", *markdown(table)]), end="\n\n")
    print(f"{tally.total} requests in {seconds:.0f} s; {dict(sorted(tally.codes.items()))}")
    for problem, count in tally.problems.most_common(20):
        print(f"{count}x {problem}")
    passed = not tally.problems and all(check.passed for check in found)
    if options.json:
        told = {
            "requests": tally.total,
            "seconds": seconds,
            "seed": options.seed,
            "passed": passed,
            "kinds": tally.counts,
            "codes": tally.codes,
            "problems": tally.problems,
            "memory": [dict(zip(memory[0], row, strict=True)) for row in memory[1:]],
            "checks": {check.name: {"found": check.told, "passed": check.passed} for check in found},
        }
        options.json.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return 0 if passed else 1


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtests.chaos", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--host", default="http://127.0.0.1:8000")
    add("--api-key", default="")
    add("--requests", type=int, default=10_000)
    add("--concurrency", type=int, default=32, help="requests in flight between bursts")
    add("--bursts", type=int, default=3)
    add("--burst", type=int, default=400, help="requests at once in a burst")
    add("--seed", type=int, default=0)
    add("--timeout", type=float, default=600.0, metavar="SECONDS", help="longest wait for a whole answer")
    add(
        "--max-growth", type=float, default=0.05, help="of resident memory since the second burst, as a share"
    )
    add("--quiet", type=float, default=5.0, metavar="SECONDS", help="idle time before memory is read")
    add("--serve", action="store_true", help="start a server for this run, and stop it at the end")
    add(
        "--tiny",
        action="store_true",
        help="with --serve: two tiny random networks instead of the demo models",
    )
    add("--command", default=DEFAULT_COMMAND, help="what --serve starts; '--port N' is added")
    add("--server-log", type=Path, default=None, metavar="FILE", help="where --serve keeps what it prints")
    add("--wait-ready", type=float, default=600.0, metavar="SECONDS")
    add("--json", type=Path, default=None, metavar="FILE", help="write the outcome there too")
    add("--smoke", action="store_true", help="a few hundred requests: does the script run there?")
    options = parser.parse_args(argv)
    if options.tiny and not options.serve:
        parser.error("--tiny names what --serve serves: give both, or neither")
    if options.smoke:
        options.requests, options.bursts, options.burst = (
            min(options.requests, 300),
            1,
            min(options.burst, 40),
        )
    return options


if __name__ == "__main__":
    sys.exit(main())
