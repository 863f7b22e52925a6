"""What the chaos run sends: requests that must be answered as asked, and bad ones that must be refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MAX_TOKENS = 160
GETS = (
    "/v1/models",
    "/v1/attention/backends",
    "/version",
    "/livez",
    "/readyz",
    "/health",
    "/metrics",
    "/openapi.json",
    "/docs",
)


@dataclass(frozen=True)
class Request:
    """``content`` is sent as it is; ``announced`` replaces its true length in the head."""

    method: str
    path: str
    content: bytes = b""
    stream: bool = False
    media_type: str = "application/json"
    announced: int | None = None
    bad: bool = False
    """The server must refuse it: any 2xx is wrong."""


@dataclass(frozen=True)
class World:
    """The models served, the tokens that each one's prompts are drawn from, and texts."""

    cards: dict[str, dict[str, Any]]
    pools: dict[str, list[int]]
    text: str
    decoding: frozenset[str]
    """Backends with a decode step."""
    prefixes: dict[str, list[int]] = field(default_factory=dict)
    """Beginnings that many prompts share, by model."""

    def model(self, task: str, draw: random.Random) -> str:
        return draw.choice([name for name, card in self.cards.items() if task in card["tasks"]])

    def tasks(self) -> set[str]:
        return {task for card in self.cards.values() for task in card["tasks"]}

    def tokens(self, model: str, draw: random.Random, most: int = MAX_TOKENS) -> list[int]:
        return draw.choices(self.pools[model], k=draw.randint(2, most))

    def words(self, draw: random.Random) -> str:
        start = draw.randrange(len(self.text) - 400)
        return self.text[start : start + draw.randint(20, 300)]

    def backends(self, model: str) -> list[str]:
        """Those that this model runs: where it generates, such as can decode."""
        card = self.cards[model]
        return [name for name in card["backends"] if name in self.decoding or not card["causal"]]

    def attention(self, model: str, draw: random.Random, pair: bool = False) -> Any:
        backends = self.backends(model)
        if pair and draw.random() < 0.1:
            return {"prefill": draw.choice(backends), "decode": "exact"}
        spec = {"backend": draw.choice(backends), "seed": draw.randrange(3)}
        return draw.choice([spec["backend"], spec])


Make = Callable[[World, random.Random], Request]


def valid(world: World, draw: random.Random) -> Request:
    """A small request that the server can answer as asked."""
    makes = [make for make, task, share in VALID if task in world.tasks() for _ in range(share)]
    return draw.choice(makes)(world, draw)


def generate(world: World, draw: random.Random, stream: bool | None = None) -> Request:
    model = world.model("generate", draw)
    body: dict[str, Any] = {
        "model": model,
        "prompt": draw.choice([{"token_ids": world.tokens(model, draw)}, world.words(draw)]),
        "max_new_tokens": draw.randint(1, 6),
        "attention": world.attention(model, draw, pair=True),
        "stream": draw.random() < 0.4 if stream is None else stream,
    }
    extras: list[dict[str, Any]] = [
        {"n": draw.randint(2, 3), "temperature": 0.8},
        {"priority": draw.randint(-10, 10)},
        {"logprobs": 2},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "seed": draw.randrange(99)},
        {"stop": [" the", "."]},
        {"include_stats": False},
        {},
    ]
    return _post("/v1/generate", body | draw.choice(extras))


def shared_prefix(world: World, draw: random.Random) -> Request:
    """A prompt that begins as others do, under one of few attentions, with and without a salt."""
    model = world.model("generate", draw)
    prompt = world.prefixes[model] + world.tokens(model, draw, 40)
    attention = draw.choice(world.backends(model)[:3])
    body = {"model": model, "prompt": {"token_ids": prompt}, "max_new_tokens": 2, "attention": attention}
    return _post("/v1/generate", body | draw.choice([{}, {}, {"cache_salt": draw.choice("ab")}]))


def encode(world: World, draw: random.Random) -> Request:
    model = world.model("encode", draw)
    texts = [world.words(draw) for _ in range(draw.randint(1, 4))]
    body = {"model": model, "input": draw.choice([texts, texts[0], {"token_ids": world.tokens(model, draw)}])}
    extras: list[dict[str, Any]] = [
        {
            "pooling": draw.choice(
                ["mean", "last"] if world.cards[model]["causal"] else ["mean", "cls", "last"]
            )
        },
        {"normalize": False},
        {"pooling": "mean", "late_chunking": {"chunk_tokens": 16, "overlap": 4}},
        {"priority": draw.randint(-10, 10)},
        {"dimensions": 8},
        {},
    ]
    return _post("/v1/encode", body | {"attention": world.attention(model, draw)} | draw.choice(extras))


def score(world: World, draw: random.Random) -> Request:
    model = world.model("score", draw)
    body = {"model": model, "input": {"token_ids": world.tokens(model, draw)}}
    return _post("/v1/score", body | {"attention": world.attention(model, draw)})


def tokenize(world: World, draw: random.Random) -> Request:
    return _post("/v1/tokenize", {"model": draw.choice(sorted(world.cards)), "input": world.words(draw)})


def estimate(world: World, draw: random.Random) -> Request:
    model = world.model(draw.choice(sorted(world.tasks() - {"score"})), draw)
    attention = [world.attention(model, draw), "exact"]
    return _post("/v1/estimate", {"model": model, "input": world.words(draw), "attention": attention})


def completion(world: World, draw: random.Random) -> Request:
    model = world.model("generate", draw)
    body = {"model": model, "prompt": world.words(draw), "max_tokens": draw.randint(1, 5)}
    body |= {"attention": world.attention(model, draw), "stream": draw.random() < 0.5}
    return _post("/v1/completions", body | draw.choice([{}, {"n": 2}, {"prompt_cache_key": "a"}]))


def chat(world: World, draw: random.Random) -> Request:
    model = world.model("generate", draw)
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": world.words(draw)}]
    body = {"model": model, "messages": messages, "max_tokens": draw.randint(1, 5)}
    return _post("/v1/chat/completions", body | {"stream": draw.random() < 0.5})


def embedding(world: World, draw: random.Random) -> Request:
    model = world.model("encode", draw)
    body = {"model": model, "input": [world.words(draw)], "attention": world.attention(model, draw)}
    return _post("/v1/embeddings", body | {"encoding_format": draw.choice(["float", "base64"])})


def get(world: World, draw: random.Random) -> Request:
    return Request("GET", draw.choice(GETS))


def tiny_timeout(world: World, draw: random.Random) -> Request:
    """Answered in time or told that it was not."""
    made = valid(world, draw)
    if made.method == "GET" or made.path in ("/v1/tokenize", "/v1/estimate"):
        made = generate(world, draw) if "generate" in world.tasks() else encode(world, draw)
    return _post(made.path, json.loads(made.content) | {"timeout_ms": draw.choice([1, 2, 5, 20, 100])})


VALID: tuple[tuple[Make, str, int], ...] = (
    (generate, "generate", 8),
    (shared_prefix, "generate", 3),
    (encode, "encode", 4),
    (score, "score", 2),
    (completion, "generate", 2),
    (chat, "generate", 1),
    (embedding, "encode", 1),
    (tokenize, "encode", 1),
    (tokenize, "generate", 1),
    (estimate, "encode", 1),
    (estimate, "generate", 1),
    (get, "encode", 1),
    (get, "generate", 1),
)


def bad(world: World, draw: random.Random) -> Request:
    """One of many kinds of bad input."""
    task = draw.choice(sorted(world.tasks() & {"encode", "generate"}))
    model = world.model(task, draw)
    name = "prompt" if task == "generate" else "input"
    path, good = f"/v1/{task}", {"model": model, name: "a few words"}
    changes: list[dict[str, Any]] = [
        {"model": "no-such-model"},
        {"surprise": 1},
        {name: 5},
        {name: None},
        {name: []},
        {name: {"token_ids": []}},
        {name: {"token_ids": [10**9]}},
        {name: {"token_ids": [-1, True]}},
        {name: {"token_ids": [world.pools[model][0]] * (world.cards[model]["max_tokens"] + 1)}},
        {"attention": "no-such-backend"},
        {"attention": {"backend": "window", "params": {"window": -3}}},
        {"attention": {"backend": "window", "params": {"surprise": 1}}},
        {"attention": {"prefill": 3}},
        {"attention": {"backend": "exact", "seed": -1}},
        {"timeout_ms": 0},
        {"timeout_ms": "soon"},
        {"priority": 99},
        {"cache_salt": ""},
        {"max_new_tokens" if task == "generate" else "dimensions": 0},
        {"n" if task == "generate" else "pooling": 99},
        {"temperature" if task == "generate" else "normalize": 99},
    ]
    text = json.dumps(good).encode()
    requests = [_post(path, good | change, bad=True) for change in changes]
    requests += [
        Request("POST", path, text[:-1], bad=True),
        Request("POST", path, b"", bad=True),
        Request("POST", path, b"\xff\xfe{}", bad=True),
        Request("POST", path, b"[" * 5000, bad=True),
        Request("POST", path, text.replace(b"}", b', "timeout_ms": NaN}'), bad=True),
        Request("POST", path, text, media_type="text/plain", bad=True),
        Request("POST", path, text, announced=1 << 40, bad=True),
        Request("DELETE", path, bad=True),
        Request("GET", "/v1/nothing/here", bad=True),
    ]
    return draw.choice(requests)


def _post(path: str, body: dict[str, Any], bad: bool = False) -> Request:
    stream = body.get("stream") is True
    return Request("POST", path, json.dumps(body).encode(), stream=stream, bad=bad)
