"""The sequences of one model: opened, forked, and what they have read remembered for prompts that begin
alike.

Two prompts share pages where everything is equal that their keys and values depend on: the tokens up to
there, the attention and its params, the seed of a random one, and, where a network's rotary embedding depends
on the length of the text, what it makes of that length. How far they share depends on what a row's choice of
keys looks at (``kernels.contract.Selection``):

    none, row    every full page, those of generated tokens too
    tile         pages of whole query tiles of the prompt
    prompt       nothing
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from math import lcm

from kernels.registry import load as load_backend
from models.arena import PAGE_TOKENS, Page
from models.contract import CacheUse, Choice, Kept, Prompt
from models.guard import SequenceGuard
from models.kv_cache import Cache
from models.network import Network
from models.pages import PagePool
from models.planned import Planned
from models.prefix import Chain, root_key
from models.rotary import effective_length

Effective = Callable[[int], Hashable]
"""What a network makes of a text's length: equal for lengths under which it computes the same."""


@dataclass(frozen=True)
class Sharing:
    """What a prompt's pages are remembered by."""

    identity: Hashable
    """Of the attention: sequences go on being remembered only while they read under the same."""
    multiple: int
    """Tokens of the query tile that a row's keys are chosen by; 1 where rows choose for themselves."""
    effective: Effective
    total: int

    @property
    def unit_pages(self) -> int:
        """Shared prefixes end at multiples of so many pages."""
        return lcm(PAGE_TOKENS, self.multiple) // PAGE_TOKENS

    def limit(self, length: int) -> int:
        """How many of the ``length`` tokens read so far are as a longer prompt would have them."""
        whole_tiles = length // self.multiple * self.multiple
        if length > self.total and self.effective(length) != self.effective(self.total):
            return min(whole_tiles, self.total)
        return whole_tiles


def identity(choice: Choice) -> Hashable | None:
    """What an attention's results depend on beside the tokens; None where they depend on the whole prompt, or
    on what its guard has seen of it."""
    able = [load_backend(part.backend).capabilities for part in choice.parts]
    if any(each.selection == "prompt" for each in able) or isinstance(choice, Planned) and choice.guarded:
        return None
    return choice.method, choice.seed if any(each.random for each in able) else None


def tile_of(choice: Choice) -> int:
    """Rows of the query tile that a row's keys are chosen by; 1 where rows choose for themselves."""
    by_tile = [part for part in choice.parts if load_backend(part.backend).capabilities.selection == "tile"]
    return lcm(*(part.params.chunk_multiple() for part in by_tile))


class OpenSequence:
    """One sequence's state: tokens read so far and, for decoders, its cache.

    ``sharing`` and ``chain``, where what it reads is to be remembered, begin where ``length`` is.
    """

    def __init__(
        self,
        capacity: int,
        cache: Cache | None,
        length: int = 0,
        sharing: Sharing | None = None,
        chain: Chain | None = None,
    ) -> None:
        self.capacity = capacity
        self.cache = cache
        self.length = length
        self.closed = False
        self.guard: SequenceGuard | None = None
        """Of the prompt, once it is read under a choice that has one."""
        self._sharing = sharing
        self._chain = chain

    @property
    def held_bytes(self) -> int:
        return self.cache.held_bytes if self.cache is not None else 0

    @property
    def kept(self) -> tuple[Kept, ...]:
        return () if self.guard is None else self.guard.kept

    def read(self, token_ids: Sequence[int], choice: Choice) -> None:
        """A step that read these tokens under this attention has succeeded."""
        self.length += len(token_ids)
        if self._sharing is not None and not self.closed:
            self._remember(self._sharing, token_ids, choice)

    def fork(self, capacity: int) -> OpenSequence:
        """Another that has read the same, with room for ``capacity`` tokens in all."""
        if self.cache is None:
            raise ValueError("a bidirectional model reads a sequence in one step: nothing can follow it")
        if self.closed or capacity < self.length:
            raise ValueError(
                "the sequence is closed"
                if self.closed
                else f"capacity is {capacity} tokens, {self.length} have been read"
            )
        chain = self._chain.copy() if self._chain is not None else None
        cache = self.cache.fork(capacity, self.length)
        other = OpenSequence(capacity, cache, self.length, self._sharing, chain)
        other.guard = self.guard.copy() if self.guard is not None else None
        return other

    def rewind(self, length: int) -> None:
        """Go back to the first ``length`` tokens: what follows takes the place of the others. ValueError
        where so many were not read, or where others may have what would be replaced."""
        if self.cache is None or self.closed or not 0 <= length <= self.length:
            raise ValueError(f"no way back to {length} tokens: {self.length} are cached")
        if self._sharing is not None or length < self.cache.shared_length:
            raise ValueError(f"no way back to {length} tokens: others may read those behind them")
        self.length = length

    def close(self) -> None:
        self.closed = True
        if self.cache is not None:
            self.cache.close(self._chain.keys if self._chain is not None else ())

    def _remember(self, sharing: Sharing, token_ids: Sequence[int], choice: Choice) -> None:
        """Publish pages that have become full. What cannot be shared ends it: all that follows depends on
        it."""
        assert self._chain is not None and self.cache is not None
        if identity(choice) != sharing.identity:
            self._sharing = None
            return
        known = len(self._chain.keys)
        self._chain.append(token_ids)
        limit = sharing.limit(self.length)
        if limit < self.length:
            self._sharing = None
            del self._chain.keys[max(known, limit // PAGE_TOKENS) :]
        if len(self._chain.keys) > known:
            self.cache.publish(self._chain.keys)


class Sequences:
    """Opens sequences of one network, over one pool of pages."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._effective = effective_length(network.body)
        self._closed = False
        self.pool = PagePool(network.plan.shapes, network.body.dtype, network.device)

    def open(self, capacity: int, prompt: Prompt | None) -> OpenSequence:
        """RuntimeError once closed."""
        if self._closed:
            raise RuntimeError("the model has left service: it opens no sequence any more")
        if not self._network.plan.causal:
            return OpenSequence(capacity, None)
        sharing = self._sharing(prompt) if prompt is not None else None
        if prompt is None or sharing is None:
            return OpenSequence(capacity, self._cache(capacity))
        chain = self._chain(prompt, sharing)
        pages = self.pool.attach(chain.keys, sharing.unit_pages, len(prompt.token_ids))
        del chain.keys[len(pages) :]
        length = len(pages) * PAGE_TOKENS
        chain = Chain(self._root(prompt, sharing), PAGE_TOKENS, chain.keys, sharing.unit_pages)
        return OpenSequence(capacity, self._cache(capacity, pages, length), length, sharing, chain)

    def cached_tokens(self, prompt: Prompt) -> int:
        """How many tokens ``open`` would spare now. From any thread."""
        sharing = self._sharing(prompt)
        if sharing is None:
            return 0
        found = self.pool.find(self._chain(prompt, sharing).keys)
        return found // sharing.unit_pages * sharing.unit_pages * PAGE_TOKENS

    def fork(self, sequence: OpenSequence, capacity: int) -> OpenSequence:
        if self._closed:
            raise RuntimeError("the model has left service: it opens no sequence any more")
        return sequence.fork(capacity)

    def limit_cached(self, max_bytes: int) -> None:
        """0, as it begins: nothing is remembered. ValueError below."""
        if max_bytes < 0:
            raise ValueError(f"max_bytes is {max_bytes}: give 0 (nothing is kept) or more")
        if not self._closed:
            self.pool.limit_cached(max_bytes)

    def use(self) -> CacheUse:
        return self.pool.use()

    def close(self) -> None:
        """What is open may go on; its pages go back to the system when it is closed."""
        self._closed = True
        self.pool.close()

    def _cache(self, capacity: int, pages: Sequence[Page] = (), length: int = 0) -> Cache:
        network = self._network
        dtype, device = network.body.dtype, network.device
        return Cache(network.plan.shapes, capacity, dtype, device, self.pool, pages, length)

    def _sharing(self, prompt: Prompt) -> Sharing | None:
        """None where nothing is remembered of such a prompt, or nothing at all."""
        of_choice = identity(prompt.choice)
        if of_choice is None or not self.pool.caches or not self._network.plan.causal:
            return None
        return Sharing(of_choice, tile_of(prompt.choice), self._effective, len(prompt.token_ids))

    def _root(self, prompt: Prompt, sharing: Sharing) -> bytes:
        return root_key(prompt.salt, sharing.identity, sharing.effective(sharing.total))

    def _chain(self, prompt: Prompt, sharing: Sharing) -> Chain:
        """Of the pages that a sequence may begin with: the last token must be read for what follows it."""
        chain = Chain(self._root(prompt, sharing), PAGE_TOKENS, unit_pages=sharing.unit_pages)
        chain.append(prompt.token_ids[: max(sharing.total - 1, 0)])
        return chain
