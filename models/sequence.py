"""The sequences of one model: opened, forked, and what they have read remembered for prompts that begin
alike."""

from __future__ import annotations

from collections.abc import Sequence

from models.contract import CacheUse, Choice, Prompt
from models.kv_cache import Cache
from models.network import Network


class OpenSequence:
    """One sequence's state: tokens read so far and, for decoders, its cache."""

    def __init__(self, capacity: int, cache: Cache | None) -> None:
        self.capacity = capacity
        self.cache = cache
        self.length = 0
        self.closed = False

    @property
    def held_bytes(self) -> int:
        return self.cache.held_bytes if self.cache is not None else 0

    def read(self, token_ids: Sequence[int], choice: Choice) -> None:
        """A step that read these tokens under this attention has succeeded."""
        self.length += len(token_ids)

    def close(self) -> None:
        self.closed = True
        if self.cache is not None:
            self.cache.close()


class Sequences:
    """Opens sequences of one network."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def open(self, capacity: int, prompt: Prompt | None) -> OpenSequence:
        network = self._network
        if not network.plan.causal:
            return OpenSequence(capacity, None)
        return OpenSequence(
            capacity, Cache(network.plan.shapes, capacity, network.body.dtype, network.device)
        )

    def cached_tokens(self, prompt: Prompt) -> int:
        return 0

    def fork(self, sequence: OpenSequence, capacity: int) -> OpenSequence:
        raise NotImplementedError

    def limit_cached(self, max_bytes: int) -> None: ...

    def use(self) -> CacheUse:
        return CacheUse()

    def close(self) -> None: ...
