"""Outputs that are a hash of everything they may depend on, and a store of beginnings that were read."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from models.contract import Choice, Prompt

MASK = (1 << 64) - 1
START = 0x243F6A8885A308D3
PAGE_TOKENS = 128


def mix(*values: int) -> int:
    x = 0x9E3779B97F4A7C15
    for value in values:
        x = (x ^ (value & MASK)) * 0xBF58476D1CE4E5B9 & MASK
        x ^= x >> 29
    return x


def choice_digest(choice: Choice) -> int:
    told = f"{choice.backend}|{choice.params.model_dump_json()}|{choice.seed}"
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
        key, digest, found = choice_digest(prompt.choice), START, (0, START)
        for i, token in enumerate(prompt.token_ids[:-1], 1):
            digest = mix(digest, token, key)
            if i % PAGE_TOKENS == 0:
                page = (prompt.salt, i, digest)
                if page not in self._pages:
                    break
                self._pages.move_to_end(page)
                found = (i, digest)
        return found

    def read(
        self, salt: str | None, digest: int, start: int, token_ids: Sequence[int], choice: Choice
    ) -> list[int]:
        """Digests after each of ``token_ids``; pages that they fill are held where there is a salt."""
        key, digests = choice_digest(choice), []
        for i, token in enumerate(token_ids, start + 1):
            digest = mix(digest, token, key)
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
