"""Whatever runs beside a request, in whatever pieces, it gets what it gets alone: over random mixes of
requests that share steps, prefixes and forks, and forwards that are left while other steps run."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import models.products
import models.stretches
from models.auto import LayerChoice
from models.contract import Choice, Prompt, Slice, StepResult
from models.forward import LeavableForward
from models.planned import STRATUM, Planned, planned
from models.runner import Model
from models.sequence import OpenSequence
from tests.models.tiny import FAMILIES, choice, close, llama, modernbert, network, random_ids, serve

MIXES = 200
AT_ONCE = 10
"""Mixes of one test."""
MAX_TOKENS = 320
DECODED = 2
TOLERANCE = 1e-6
"""Relative, in fp64: there rounding flips no choice between two keys."""
MOST_STEPS = 400
CACHED_BYTES = 8 << 20

FEATURES = {"num_features": 16, "centre_keys": 16}
HASHED = {"cluster_size": 16, "window": 8, "sinks": 2}
TILED = {"query_tile": 128, "block_size": 32, "budget": 64}
PARAMS: dict[str, list[dict[str, Any]]] = {
    "exact": [{}],
    "window": [{"window": 8}, {"window": 33}],
    "sinks": [{"sinks": 2, "window": 8}],
    "random": [{"num_random": 5}],
    "bigbird": [{"window": 8, "global_tokens": 2, "num_random": 4, "block_size": 1}],
    "strided": [{"stride": 16}, {"stride": 8}],
    "xattention": [{"query_tile": 128, "block_size": 32, "mass": 0.5}],
    "pooled": [TILED],
    "topk": [TILED, TILED | {"budget": 96}],
    "pages": [TILED],
    "performer": [FEATURES],
    "lsh": [HASHED | {"num_buckets": 8, "centre_keys": 16}],
    "kmeans": [HASHED | {"num_clusters": 4, "train_keys": 32}],
    "scatterbrain": [FEATURES | {"support_params": {"window": 16, "sinks": 2}}],
    "nystrom": [{"num_landmarks": 8}],
}


@dataclass
class Request:
    """What is asked, how its prompt is cut, and what it has got so far."""

    ids: list[int]
    choice: Choice
    want: Any
    stops: list[int]
    """Where its slices end; the last is the prompt's end."""
    salt: str
    parent: Request | None = None
    """The request whose sequence it forks, once that has read the prompt they share."""
    state: OpenSequence | None = None
    found: list[Tensor] = field(default_factory=list)
    busy: bool = False

    @property
    def prompt(self) -> int:
        return self.stops[-1]

    @property
    def over(self) -> bool:
        return self.state is not None and self.state.length == len(self.ids)

    def slice(self) -> Slice:
        """The next one: of the prompt, or one token more."""
        assert self.state is not None
        at = self.state.length
        stop = next((s for s in self.stops if s > at), at + 1)
        part = self.ids[at:stop]
        last = stop >= self.prompt
        want: Any = self.want if self.want != "logits" or last else "nothing"
        targets = [(t + 1) % 90 for t in part] if want == "scores" else ()
        return Slice(self.state, part, self.choice, want, self.prompt, targets)

    def got(self, result: Any) -> None:
        found = [x for x in (result.logits, result.scores, result.hidden) if x is not None]
        self.found += [x[None] if x is result.logits else x for x in found]


class Mix:
    """Some requests to one model, run in an order that a seed draws."""

    def __init__(self, model: Model, seed: int) -> None:
        self.model = model
        self.draw = random.Random(seed)
        self.texts = [random_ids(MAX_TOKENS, 100 * seed + i) for i in range(2)]
        self.requests: list[Request] = []
        for _ in range(self.draw.randint(2, 8)):
            self.requests.append(self._request(f"mix {seed}"))
        self.begun: list[tuple[LeavableForward, list[Request]]] = []

    def _request(self, salt: str) -> Request:
        draw, causal = self.draw, self.model.info.causal
        forked = [r for r in self.requests if causal and r.want == "logits" and r.parent is None]
        if forked and draw.random() < 0.15:
            parent = draw.choice(forked)
            tail = random_ids(DECODED, draw.randrange(10**6))
            ids = parent.ids[: parent.prompt] + tail
            return Request(ids, parent.choice, "logits", list(parent.stops), salt, parent)
        alike = [r for r in self.requests if draw.random() < 0.3]
        pick = alike[0].choice if alike else self._choice()
        length = draw.choice([1, 2, 17, 60, draw.randint(3, 200), draw.randint(128, MAX_TOKENS - DECODED)])
        ids = list(draw.choice(self.texts)[:length])
        if not causal:
            return Request(ids, pick, "hidden", [length], salt)
        want = draw.choice(["logits", "logits", "scores"])
        decoded = random_ids(DECODED, draw.randrange(10**6)) if want == "logits" else []
        return Request(ids + decoded, pick, want, self._stops(length, pick), salt)

    def _choice(self) -> Choice:
        return self._plan() if self.draw.random() < 0.15 else self._single()

    def _plan(self) -> Planned:
        """Another attention in every layer, some of them exact from some row on."""
        layers = []
        for number in self.model.info.applied_layers:
            single, border = self._single(), self.draw.choice([None, None, 0, STRATUM])
            layers.append(LayerChoice(number, single.backend, single.params.model_dump(), border))
        return planned(layers, seed=self.draw.choice([0, 7]))

    def _single(self) -> Choice:
        while True:
            backend = self.draw.choice(sorted(PARAMS))
            pick = choice(backend, self.draw.choice([0, 7]), **self.draw.choice(PARAMS[backend]))
            if not self.model.unsupported(pick):
                return pick

    def _stops(self, length: int, pick: Choice) -> list[int]:
        multiple = pick.params.chunk_multiple()
        places = range(multiple, length, multiple)
        some = self.draw.sample(places, min(len(places), self.draw.choice([0, 1, 2, 4])))
        return [*sorted(some), length]

    def run(self) -> None:
        for _ in range(MOST_STEPS):
            if all(r.over for r in self.requests) and not self.begun:
                return
            self._open_some()
            if self.begun and self.draw.random() < 0.5:
                self._go_on(self.draw.choice(self.begun))
            else:
                self._start()
        raise AssertionError(f"not over after {MOST_STEPS} steps")

    def _open_some(self) -> None:
        for r in self.requests:
            if r.state is not None or self.draw.random() < 0.3:
                continue
            if r.parent is None:
                shares = r.want == "logits" and self.draw.random() < 0.7
                prompt = Prompt(r.ids[: r.prompt], r.choice, r.salt) if shares else None
                r.state = self.model.open(len(r.ids), prompt)
            elif r.parent.state is not None and not r.parent.busy and r.parent.state.length == r.prompt:
                r.state = self.model.fork(r.parent.state, len(r.ids))
                r.found = list(r.parent.found)
            elif r.parent.over:
                r.parent = None

    def _start(self) -> None:
        ready = [r for r in self.requests if r.state is not None and not r.busy and not r.over]
        if not ready:
            return
        some = self.draw.sample(ready, self.draw.randint(1, len(ready)))
        slices = [r.slice() for r in some]
        if self.draw.random() < 0.5 and len(self.begun) < 2:
            forward = self.model.begin(slices)
            for r in some:
                r.busy = True
            self.begun.append((forward, some))
        else:
            self._take(self.model.step(slices), some)

    def _go_on(self, begun: tuple[LeavableForward, list[Request]]) -> None:
        forward, some = begun
        if self.draw.random() < 0.03:  # given up: its sequences begin this slice again
            forward.close()
            result = None
        else:
            result = forward.advance(lambda: self.draw.random() < 0.1)
            if result is None:
                return
        self.begun.remove(begun)
        for r in some:
            r.busy = False
        if result is not None:
            self._take(result, some)

    def _take(self, result: StepResult, some: list[Request]) -> None:
        for r, each in zip(some, result.results, strict=True):
            r.got(each)
            if r.over and not any(child.parent is r and child.state is None for child in self.requests):
                assert r.state is not None
                if self.draw.random() < 0.5:
                    r.state.close()


def alone(model: Model, r: Request) -> Tensor:
    """The same request by itself: its prompt whole, then token by token."""
    state = model.open(len(r.ids))
    single = Request(r.ids, r.choice, r.want, [r.prompt], "", state=state)
    while not single.over:
        single.got(model.step([single.slice()]).results[0])
    state.close()
    return torch.cat(single.found)


def made(kind: str) -> Model:
    if kind == "encoder":
        return serve(network(modernbert).double(), MAX_TOKENS)
    if kind == "local layers":
        return serve(network(FAMILIES["qwen2, half its layers local"]).double(), MAX_TOKENS)
    return serve(
        network(lambda: llama(num_hidden_layers=2, max_position_embeddings=512)).double(), MAX_TOKENS
    )


@pytest.fixture(scope="module", params=["grouped heads", "local layers", "encoder"])
def served(request: pytest.FixtureRequest) -> tuple[str, Model]:
    model = made(request.param)
    model.limit_cached(CACHED_BYTES)
    return request.param, model


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiny networks are cut as large ones are."""
    monkeypatch.setattr(models.stretches, "STRETCH_FLOPS", 2e6)
    monkeypatch.setattr(models.stretches, "DENSE_ROWS", 128)
    monkeypatch.setattr(models.products, "PRODUCT_FLOPS", 2e6)
    yield


@pytest.mark.parametrize("block", range(-(-MIXES // (3 * AT_ONCE))))
def test_every_request_of_a_mix_gets_what_it_gets_alone(served: tuple[str, Model], block: int) -> None:
    kind, model = served
    for seed in range(block * AT_ONCE, (block + 1) * AT_ONCE):
        mix = Mix(model, seed)
        try:
            mix.run()
        except Exception as error:
            raise AssertionError(f"{kind}, seed {seed}") from error
        for r in mix.requests:
            where = f"{kind}, seed {seed}: {r.choice} with stops {r.stops}, wants {r.want}"
            wanted, found = alone(model, r), torch.cat(r.found)
            assert found.shape == wanted.shape, where
            assert close(found, wanted, TOLERANCE), where


def test_mixes_meet_everything_that_they_are_to_meet(served: tuple[str, Model]) -> None:
    """Forwards left beside others, prefixes found, forks: without them the mixes would show nothing."""
    kind, model = served
    before = model.cache_use().found_tokens
    forks, most_open, sizes = 0, 0, set()
    for seed in range(AT_ONCE):
        mix = Mix(model, seed)
        start = mix._start

        def watched(mix: Mix = mix, start: Any = start) -> None:
            nonlocal most_open
            most_open = max(most_open, len(mix.begun))
            start()

        mix._start = watched  # type: ignore[method-assign]
        mix.run()
        sizes.add(len(mix.requests))
        forks += sum(r.parent is not None for r in mix.requests)
    assert most_open == 2 and len(sizes) > 2
    if kind != "encoder":
        assert forks and model.cache_use().found_tokens > before
