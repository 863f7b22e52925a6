"""Outputs that are a hash of everything they may depend on, and a store of beginnings that were read."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from models.contract import Choice, Prompt
from models.planned import Planned, exact

MASK = (1 << 64) - 1
START = 0x243F6A8885A308D3
PAGE_TOKENS = 128


def mix(*values: int) -> int:
    x = 0x9E3779B97F4A7C15
    for value in values:
        x = (x ^ (value & MASK)) * 0xBF58476D1CE4E5B9 & MASK
        x ^= x >> 29
    return x


NO_REPAIRS: Mapping[int, int] = {}
"""By ordinal of a layer the row from which on it runs exactly after all."""


def choice_digest(choice: Choice, row: int = 0, repairs: Mapping[int, int] = NO_REPAIRS) -> int:
    """Of what runs in ``row``: of a plan, layer by layer, whoever decided it."""
    if not isinstance(choice, Planned):
        return _digest((choice,))
    from_rows = [repairs.get(i, from_row) for i, from_row in enumerate(choice.exact_from)]
    layers = [
        exact(choice.seed) if from_row is not None and row >= from_row else layer
        for layer, from_row in zip(choice.layers, from_rows, strict=True)
    ]
    return _digest(tuple(layers))


@lru_cache(1024)
def _digest(layers: tuple[Choice, ...]) -> int:
    told = "||".join(f"{each.backend}|{each.params.model_dump_json()}|{each.seed}" for each in layers)
    return int.from_bytes(hashlib.blake2b(told.encode(), digest_size=8).digest(), "big")


def numbers(digest: int, count: int) -> Tensor:
    """``count`` values in [-1, 1), a function of ``digest`` alone."""
    base = torch.arange(1, count + 1, dtype=torch.int64) * 0x9E3779B1 + (digest & 0x7FFFFFFF)
    mixed = ((base ^ (base >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 12)) * 0x297A2D39) & 0xFFFFFFFF
    return (mixed.double() / 2**31 - 1).float()


class FakePages:
    """Digests at the ends of pages: (salt, tokens, digest), the one used last at the end."""

    def __init__(self) -> None:
        self._pages: OrderedDict[tuple[str, int, int], None] = OrderedDict()
        self._max_tokens = 0
        self.looked_up_tokens = 0
        self.found_tokens = 0
        self.num_evicted = 0

    @property
    def num_tokens(self) -> int:
        return len(self._pages) * PAGE_TOKENS

    def take(self, prompt: Prompt) -> tuple[int, int]:
        """As ``find``, counted."""
        found = self.find(prompt)
        self.looked_up_tokens += len(prompt.token_ids)
        self.found_tokens += found[0]
        return found

    def find(self, prompt: Prompt) -> tuple[int, int]:
        """(tokens, digest) of the longest beginning that is held, short of the last token."""
        digest, found = START, (0, START)
        for i, token in enumerate(prompt.token_ids[:-1], 1):
            digest = mix(digest, token, choice_digest(prompt.choice, i - 1))
            if i % PAGE_TOKENS == 0:
                page = (prompt.salt, i, digest)
                if page not in self._pages:
                    break
                self._pages.move_to_end(page)
                found = (i, digest)
        return found

    def read(
        self,
        salt: str | None,
        digest: int,
        start: int,
        token_ids: Sequence[int],
        choice: Choice,
        repairs: Mapping[int, int] = NO_REPAIRS,
    ) -> list[int]:
        """Digests after each of ``token_ids``; pages that they fill are held where there is a salt."""
        digests = []
        for i, token in enumerate(token_ids, start + 1):
            digest = mix(digest, token, choice_digest(choice, i - 1, repairs))
            digests.append(digest)
            if salt is not None and i % PAGE_TOKENS == 0:
                self._pages[salt, i, digest] = None
                self._evict()
        return digests

    def limit(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._evict()

    def _evict(self) -> None:
        while self.num_tokens > self._max_tokens:
            self._pages.popitem(last=False)
            self.num_evicted += 1
