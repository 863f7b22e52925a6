"""What the scripts that measure one figure each have in common: options, prompts, tables, the exit code."""

from __future__ import annotations

import argparse
import json
import random
import shlex
import statistics
import sys
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loadtests.client import Answer, Client
from loadtests.documents import Library
from loadtests.server import Server, ServerProblem

POOL_CHARACTERS = 20_000
Measured = tuple[list[list[str]], dict[str, Any]]
"""A table, its head first, and the same figures for ``--json``."""


@dataclass
class Figure:
    """One measurement while it is taken: where, what was sent, what came back."""

    options: argparse.Namespace
    client: Client
    version: str
    cards: dict[str, dict[str, Any]]
    pools: dict[str, list[int]] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    sent: int = 0
    salt: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Of this run alone: no prompt finds its beginning in the cache of an earlier one."""

    def token_ids(self, model: str, tokens: int) -> list[int]:
        """The next prompt, no two with a common beginning: a passage of the sample text, where it is long
        enough (a generation rarely ends early after one); else tokens drawn from it."""
        self.sent += 1
        draw, pool = random.Random(f"{self.options.seed}-{self.sent}"), self.pools[model]
        if tokens > len(pool) // 2:
            return draw.choices(pool, k=tokens)
        begin = draw.randrange(len(pool) - tokens)
        return [draw.choice(pool), *pool[begin + 1 : begin + tokens]]

    def body(
        self, task: str, model: str, attention: str, tokens: int, new_tokens: int = 1, stream: bool = False
    ) -> dict[str, Any]:
        """A request of ``tokens`` tokens of its own."""
        prompt = {"token_ids": self.token_ids(model, tokens)}
        timeout_ms = int(self.options.timeout * 1000)
        body: dict[str, Any] = {"model": model, "attention": attention, "timeout_ms": timeout_ms}
        if task == "generate":
            body |= {"prompt": prompt, "max_new_tokens": new_tokens, "cache_salt": self.salt}
            return body | ({"stream": True} if stream else {})
        return body | {"input": prompt}

    def post(self, task: str, body: dict[str, Any]) -> Answer:
        answer = self.client.post(f"/v1/{task}", body)
        self.answers.append(answer)
        return answer

    def together(self, task: str, bodies: Sequence[dict[str, Any]]) -> list[Answer]:
        """All at once, one thread each."""
        with ThreadPoolExecutor(len(bodies)) as pool:
            return list(pool.map(lambda body: self.post(task, body), bodies))

    def backends(self, model: str, wanted: Sequence[str]) -> list[str]:
        """``wanted`` where ``model`` runs all of them; ServerProblem otherwise."""
        offered = self.card(model)["backends"]
        missing = [name for name in wanted if name not in offered]
        if missing:
            raise ServerProblem(
                f"model {model!r} does not run {', '.join(missing)}; it runs {', '.join(offered)}"
            )
        return list(wanted)

    def card(self, model: str) -> dict[str, Any]:
        if model not in self.cards:
            raise ServerProblem(f"no model {model!r} there; there are: {', '.join(self.cards)}")
        return self.cards[model]

    def notes(self) -> list[str]:
        """What a reader of the figures must know, unanswered requests first."""
        problems = [answer.problem for answer in self.answers if answer.problem]
        notes = [f"{len(self.answers)} requests, {len(problems)} without an answer"]
        notes += [f"unanswered: {problem}" for problem in sorted(set(problems))[:5]]
        cached = sum(answer.cached_tokens for answer in self.answers)
        return notes + ([f"{cached} prompt tokens came from a cache: times are too good"] if cached else [])

    @property
    def failed(self) -> bool:
        return any(answer.problem for answer in self.answers)


def options_parser(module: str, about: str) -> argparse.ArgumentParser:
    """The options that every script has."""
    parser = argparse.ArgumentParser(prog=f"python -m loadtests.{module}", description=about)
    add = parser.add_argument
    add("--host", default="http://127.0.0.1:8000")
    add("--api-key", default="")
    add("--timeout", type=float, default=3600.0, metavar="SECONDS", help="longest wait for one answer")
    add("--seed", type=int, default=0, help="of the prompts' tokens")
    add("--json", type=Path, default=None, metavar="FILE", help="write the figures there too")
    add("--smoke", action="store_true", help="a few small requests: does the script run there?")
    return parser


def run(
    module: str,
    options: argparse.Namespace,
    models: Sequence[str],
    measure: Callable[[Figure], Measured],
    argv: Sequence[str] | None,
) -> int:
    """Connect, measure, print the table; 1 where a request went unanswered or nothing can be measured."""
    command = shlex.join(["python", "-m", f"loadtests.{module}", *(sys.argv[1:] if argv is None else argv)])
    try:
        figure = connect(options, models)
        print(f"`{command}`\n\nlongreach {figure.version}\n", flush=True)
        table, values = measure(figure)
    except ServerProblem as problem:
        print(problem, file=sys.stderr)
        return 1
    print("\n".join([*markdown(table), "", *figure.notes()]))
    if options.json:
        told = {"command": command, "version": figure.version, **values, "notes": figure.notes()}
        options.json.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return 1 if figure.failed else 0


def connect(options: argparse.Namespace, models: Sequence[str]) -> Figure:
    """Ask the server what it is, and for the tokens that prompts are drawn from."""
    server = Server(options.host, options.api_key, options.timeout)
    version = server.call("/version")
    cards = {card["id"]: card for card in server.call("/v1/models")["data"]}
    client = Client(options.host, options.api_key, options.timeout)
    figure = Figure(options, client, f"{version['version']}, torch {version['torch']}", cards)
    text = Library.from_samples().cut(POOL_CHARACTERS, random.Random(0))
    for model in dict.fromkeys(models):
        figure.card(model)
        told = server.call("/v1/tokenize", {"model": model, "input": text, "special_tokens": False})
        figure.pools[model] = told["data"][0]["token_ids"]
    return figure


def answered(answers: Sequence[Answer]) -> list[Answer]:
    """Those that are answers. ServerProblem, with the first reason, where there are none."""
    good = [answer for answer in answers if not answer.problem]
    if not good:
        raise ServerProblem(f"no request was answered: {answers[0].problem if answers else 'none was sent'}")
    return good


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def markdown(table: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells, the head first, as a Markdown table: the first column left, the others right."""
    head, *rows = table
    rule = "|---" + "|--:" * (len(head) - 1) + "|"
    return [f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]


def verdict(ratio: float, target: float, at_most: bool = True) -> str:
    """``2.41 (<= 3: met)``."""
    met = ratio <= target if at_most else ratio >= target
    return f"{ratio:.2f} ({'<=' if at_most else '>='} {target:g}: {'met' if met else 'missed'})"
