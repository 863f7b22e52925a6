"""Pages: many random lives of sequences against what they must read, the lists of free pages against a
recount, and every way in which a sequence goes on from pages of others."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from mmap import PAGESIZE
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from kernels.api import parse_params
from models import arena as arenas
from models import pages as pages_module
from models.arena import PAGE_TOKENS, FreeRuns, LayerShape, Page
from models.contract import Choice, Prompt
from models.kv_cache import Cache
from models.network import Network
from models.pages import PagePool
from models.sequence import OpenSequence, Sequences

SHAPES = [LayerShape(2, 2, 3), LayerShape(1, 1, 1)]
CPU = torch.device("cpu")
EXACT = Choice("exact", parse_params("exact"))
PAGE_BYTES = (2 * 5 + 2) * PAGE_TOKENS * 8


def rows(layer: int, token_ids: list[int], begin: int) -> tuple[Tensor, Tensor]:
    """Keys and values of the positions from ``begin`` on, which depend on every token before them."""
    shape = SHAPES[layer]
    state = torch.tensor(token_ids, dtype=torch.float64).add(1).sqrt().cumsum(0)[begin:]
    heads = torch.arange(1, shape.num_kv_heads + 1, dtype=torch.float64)[:, None, None] + layer
    widths = [torch.arange(1, width + 1, dtype=torch.float64) for width in (shape.key_dim, shape.value_dim)]
    keys, values = (torch.sin(heads * state[None, :, None] / width) for width in widths)
    return keys, values


def make_sequences() -> Sequences:
    """Those of a network of two layers that keeps fp64 rows."""
    body = SimpleNamespace(dtype=torch.float64, modules=lambda: nn.Module().modules())
    plan = SimpleNamespace(shapes=SHAPES, causal=True)
    return Sequences(cast(Network, SimpleNamespace(body=body, plan=plan, device=CPU)))


def free_pages(pool: PagePool) -> list[Page]:
    return [page for arena in pool._arenas.values() for page in arena.pages if page.is_free]


def poison(pool: PagePool) -> None:
    for page in free_pages(pool):
        for keys, values in pool.views(page):
            part = slice(page.number * PAGE_TOKENS, (page.number + 1) * PAGE_TOKENS)
            keys[:, part] = values[:, part] = float("nan")


class Life:
    """An open sequence and all tokens that it has read."""

    def __init__(self, state: OpenSequence, token_ids: list[int]) -> None:
        self.state, self.token_ids = state, token_ids

    @property
    def cache(self) -> Cache:
        assert self.state.cache is not None
        return self.state.cache

    def read(self, token_ids: list[int], fails_at: int | None = None) -> None:
        """A step; one that fails has written other rows before it did."""
        start, told = self.state.length, self.token_ids[: self.state.length] + token_ids
        for layer in range(len(SHAPES)):
            if layer == fails_at:
                return
            keys, values = rows(layer, told, start)
            self.cache.write(layer, start, keys, values)
            self.must_hold(layer, told)
        self.token_ids = told
        self.state.read(token_ids, EXACT)

    def must_hold(self, layer: int, token_ids: list[int]) -> None:
        found = self.cache.keys_values(layer, len(token_ids))
        for got, wanted in zip(found, rows(layer, token_ids, 0), strict=True):
            assert torch.equal(got[0], wanted)


class World:
    """Random sequences over one pool, and what must be true of them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.sequences = make_sequences()
        self.pool = self.sequences.pool
        stems = [[self.random.randrange(50) for _ in range(n)] for n in (150, 400, 700)]
        self.prompts = [stem[: self.random.randrange(100, len(stem))] + [99] for stem in stems * 3] + stems
        self.lives: list[Life] = []
        self.tight = False
        self._limit_allocation()

    def _limit_allocation(self) -> None:
        """In tight times there is no room for long runs."""
        allocate = self.pool.allocate

        def limited(count: int) -> list[Page]:
            if self.tight and count > 3:
                raise MemoryError("no room")
            return allocate(count)

        self.pool.allocate = limited  # type: ignore[method-assign]

    def open(self) -> None:
        prompt = self.random.choice(self.prompts)
        promised = self.sequences.cached_tokens(Prompt(prompt, EXACT))
        capacity = len(prompt) + self.random.randrange(1, 200)
        state = self.sequences.open(capacity, Prompt(prompt, EXACT))
        assert state.length == promised < len(prompt)
        self.lives.append(Life(state, prompt[: state.length]))
        if self.random.random() < 0.8:
            self._step(self.lives[-1], prompt[state.length :])

    def go_on(self) -> None:
        life = self.random.choice(self.lives)
        room = life.state.capacity - life.state.length
        if room:
            count = self.random.randrange(1, room + 1)
            self._step(life, [self.random.randrange(3) for _ in range(count)])

    def _step(self, life: Life, token_ids: list[int]) -> None:
        try:
            if self.random.random() < 0.2:
                life.read([77] * len(token_ids), fails_at=self.random.randrange(len(SHAPES)))
            life.read(token_ids)
        except MemoryError:
            assert self.tight

    def fork(self) -> None:
        life = self.random.choice(self.lives)
        capacity = life.state.length + self.random.randrange(300)
        if capacity:
            forked = self.sequences.fork(life.state, capacity)
            self.lives.append(Life(forked, list(life.token_ids)))

    def close(self) -> None:
        life = self.lives.pop(self.random.randrange(len(self.lives)))
        if self.random.random() < 0.8:
            life.state.close()
            life.state.close()

    def limit(self) -> None:
        self.sequences.limit_cached(self.random.choice([0, 3, 8, 20, 1000]) * PAGE_BYTES)

    def turn(self) -> None:
        self.tight = self.random.random() < 0.15
        with_lives = [self.go_on, self.go_on, self.fork, self.close, self.close] if self.lives else []
        seldom = [self.limit] if self.random.random() < 0.2 else []
        self.random.choice([self.open, self.open, *with_lives, *seldom])()
        self.must_be_right()

    def must_be_right(self) -> None:
        self.pool.check()
        use = self.sequences.use()
        held = {id(page): page for life in self.lives for page in life.cache._held}
        assert use.held_bytes == len(held) * PAGE_BYTES
        for page in held.values():
            assert page.holders == sum(page in life.cache._held for life in self.lives)
        untouched = sum(a.num_free - a.num_kept_free for a in self.pool._arenas.values())
        everything = (sum(len(a.pages) for a in self.pool._arenas.values()) - untouched) * PAGE_BYTES
        assert use.held_bytes + use.cached_bytes + use.free_bytes == everything
        assert use.cached_bytes <= self.pool._max_cached_bytes
        poison(self.pool)
        for life in self.lives:
            if life.cache._runs and life.cache._moving is None:
                for layer in range(len(SHAPES)):
                    life.must_hold(layer, life.token_ids)


def keep_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arenas as on a device that takes no page back."""
    for module in (arenas, pages_module):
        monkeypatch.setattr(module, "reserves_addresses", lambda device: False)


@pytest.fixture(params=["cooled", "kept whole"])
def small_arenas(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages_module, "SMALLEST_ARENA_BYTES", 4 * PAGE_BYTES)
    monkeypatch.setattr(pages_module, "SPARE_BYTES", 6 * PAGE_BYTES)
    monkeypatch.setattr(pages_module, "COPIES_PER_READ", 2)
    monkeypatch.setattr(pages_module, "RESERVED_PAGES", 4)
    if request.param == "kept whole":
        keep_whole(monkeypatch)


@pytest.mark.parametrize("seed", range(20))
def test_any_life_of_sequences_reads_what_it_wrote_and_leaves_nothing(seed: int, small_arenas: None) -> None:
    world = World(seed)
    world.sequences.limit_cached(20 * PAGE_BYTES)
    for _ in range(100):
        world.turn()
    for life in world.lives:
        life.state.close()
    world.lives.clear()
    world.must_be_right()
    world.sequences.limit_cached(0)
    use = world.sequences.use()
    assert world.pool.is_idle() and (use.held_bytes, use.cached_bytes) == (0, 0)
    assert use.free_bytes <= 6 * PAGE_BYTES
    assert use.found_tokens > 0, "or this proves nothing"
    world.sequences.close()
    assert world.sequences.use().free_bytes == 0


@pytest.mark.parametrize("seed", range(20))
def test_free_runs_equal_a_set_of_numbers(seed: int) -> None:
    chance, runs = random.Random(seed), FreeRuns(40)
    free = set(range(40))
    for _ in range(200):
        count = chance.randrange(1, 6)
        best = runs.best(count)
        fits = [n for n in range(40) if free.issuperset(range(n, n + count))]
        assert (best is None) == (not fits)
        assert runs.numbers() == sorted(free)
        if best and chance.random() < 0.5:
            length, begin = best
            assert set(range(begin, begin + length)) <= free
            assert begin + length not in free and begin - 1 not in free
            runs.take(begin, count)
            free -= set(range(begin, begin + count))
        elif taken := sorted(set(range(40)) - free):
            number = chance.choice(taken)
            runs.give(number)
            free.add(number)
        assert runs.numbers() == sorted(free)


def grown(prompt: list[int], behind: int = 0) -> tuple[Sequences, Life]:
    """A sequence that goes on after four shared pages of a prompt whose first reader is gone; ``behind``
    tokens of the first reader's own follow them."""
    sequences = make_sequences()
    sequences.limit_cached(100 * PAGE_BYTES)
    first = Life(sequences.open(len(prompt) + behind, Prompt(prompt, EXACT)), [])
    first.read(prompt)
    if behind:
        first.read([7] * behind)
    first.state.close()
    state = sequences.open(len(prompt) + 300, Prompt(prompt, EXACT))
    assert state.length == 4 * PAGE_TOKENS
    return sequences, Life(state, prompt[: state.length])


PROMPT = [i * 7 % 50 for i in range(4 * PAGE_TOKENS + 60)]


def pages_of(life: Life) -> list[int]:
    return [page.number for page in life.cache._pages]


def test_a_sequence_goes_on_in_place_where_pages_behind_the_shared_ones_are_free() -> None:
    sequences, life = grown(PROMPT)
    shared = list(life.cache._pages)
    life.read(PROMPT[life.state.length :])
    assert life.cache._pages[:4] == shared and pages_of(life) == list(range(7))
    keys, _ = life.cache.keys_values(0, 20)
    assert keys.data_ptr() == sequences.pool.views(shared[0])[0][0].data_ptr(), "a view, not a copy"
    second = Life(sequences.open(900, Prompt(PROMPT, EXACT)), PROMPT[: 4 * PAGE_TOKENS])
    second.read(PROMPT[4 * PAGE_TOKENS :])
    assert second.cache._pages[0] is not shared[0] and shared[0].holders == 1, "the first of two has them"
    for one in (life, second):
        one.read([3] * 20)
    assert sequences.use().held_bytes == (7 + 8) * PAGE_BYTES


def test_one_run_is_made_where_the_pages_behind_are_taken_and_the_index_moves_with_it() -> None:
    sequences, life = grown(PROMPT, behind=5 * PAGE_TOKENS)
    before = sequences.use()
    assert before.held_bytes == 4 * PAGE_BYTES and before.cached_bytes == 5 * PAGE_BYTES
    shared = list(life.cache._pages)
    keys, values = rows(0, PROMPT, life.state.length)
    life.cache.write(0, life.state.length, keys, values)
    assert life.cache._pages == shared, "other layers are still to be copied"
    life.read(PROMPT[life.state.length :])
    assert len(life.cache._runs) == 1 and not set(map(id, shared)) & set(map(id, life.cache._pages))
    assert all(page.holders == 0 and page.key is None for page in shared)
    assert sequences.use().held_bytes == 7 * PAGE_BYTES and sequences.use().cached_bytes == 5 * PAGE_BYTES
    third = sequences.open(900, Prompt(PROMPT, EXACT))
    assert third.length == 4 * PAGE_TOKENS and third.cache is not None
    assert third.cache._pages == life.cache._pages[:4]


def test_few_cached_pages_behind_give_way_to_a_long_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages_module, "COPIES_PER_READ", 2)
    sequences, life = grown(PROMPT, behind=2 * PAGE_TOKENS)
    assert sequences.use().cached_bytes == 2 * PAGE_BYTES
    shared = list(life.cache._pages)
    life.read(PROMPT[life.state.length :])
    assert life.cache._pages[:4] == shared and sequences.use().evicted_pages == 2


def test_scattered_pages_are_gathered_where_there_is_no_room_for_one_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sequences, life = grown(PROMPT, behind=5 * PAGE_TOKENS)
    allocate = sequences.pool.allocate

    def limited(count: int) -> list[Page]:
        if count > 3:
            raise MemoryError("no room")
        return allocate(count)

    monkeypatch.setattr(sequences.pool, "allocate", limited)
    life.read(PROMPT[life.state.length :])
    life.read([5] * 90)
    assert len(life.cache._runs) == 2 and sequences.use().held_bytes == 7 * PAGE_BYTES
    assert sequences.cached_tokens(Prompt([*PROMPT, *([5] * 90), 1], EXACT)) == 5 * PAGE_TOKENS
    forked = Life(sequences.fork(life.state, life.state.length + 40), list(life.token_ids))
    life.state.close()
    forked.read([8] * 40)
    assert len(forked.cache._runs) == 3, "shared pages, its own copy of a part, and what follows"


def test_forks_have_their_own_rows_and_outlive_the_one_they_come_from() -> None:
    sequences = make_sequences()
    leader = Life(sequences.open(500, None), [])
    leader.read(PROMPT[:300])
    forks = [Life(sequences.fork(leader.state, 400), PROMPT[:300]) for _ in range(3)]
    assert sequences.use().held_bytes == 4 * PAGE_BYTES, "they hold the leader's pages, and none beside"
    leader.read([1] * 50)
    forks[0].read([2] * 50)
    leader.state.close()
    poison(sequences.pool)
    for n, fork in enumerate(forks):
        fork.read([3 + n] * 40)
        fork.state.close()
    assert sequences.pool.is_idle()


def test_a_fork_has_room_for_what_was_read_and_a_closed_sequence_has_none() -> None:
    sequences = make_sequences()
    leader = Life(sequences.open(300, None), [])
    leader.read(PROMPT[:256])
    with pytest.raises(ValueError, match="capacity is 255 tokens, 256 have been read"):
        sequences.fork(leader.state, 255)
    forked = sequences.fork(leader.state, 256)
    forked.close()
    leader.state.close()
    with pytest.raises(ValueError, match="closed"):
        sequences.fork(leader.state, 300)


def test_nothing_is_written_where_others_may_read() -> None:
    sequences, life = grown(PROMPT)
    keys, values = rows(0, PROMPT, 0)
    for start in (0, 4 * PAGE_TOKENS - 1):
        with pytest.raises(RuntimeError, match="not for this sequence to write"):
            life.cache.write(0, start, keys[:, :9], values[:, :9])
    with pytest.raises(RuntimeError, match="not for this sequence to write"):
        life.cache.write(0, life.state.capacity - 4, keys[:, :9], values[:, :9])


def test_sequences_that_are_dropped_give_their_pages_back() -> None:
    sequences = make_sequences()
    life = Life(sequences.open(300, None), [])
    life.read(PROMPT[:300])
    assert sequences.use().held_bytes == 3 * PAGE_BYTES
    del life
    gc.collect()
    assert sequences.use().held_bytes == 0 and sequences.pool.is_idle()


def test_a_sequence_that_was_closed_gives_nothing_back_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(PagePool, "abandon", lambda pool, pages: asked.append(pages))
    sequences = make_sequences()
    closed, dropped = (sequences.open(300, None) for _ in range(2))
    closed.close()
    del closed, dropped
    gc.collect()
    assert len(asked) == 1


def test_pages_dropped_while_the_pool_is_at_work_are_collected_later() -> None:
    pool = PagePool(SHAPES, torch.float64, CPU)
    taken = pool.allocate(3)
    with pool._lock:
        pool.abandon(taken)
        assert taken[0].holders == 1
    assert pool.use().held_bytes == 0 and pool.is_idle()


def test_short_sequences_share_an_arena_and_long_ones_go_back_to_the_system() -> None:
    pool = PagePool(SHAPES, torch.float64, CPU)
    shorts = [pool.allocate(2) for _ in range(8)]
    assert len(pool._arenas) == 1 and pool.use().free_bytes == 0
    long = pool.allocate(10_000)
    assert pool.use().held_bytes == 10_016 * PAGE_BYTES
    pool.release(long)
    assert len(pool._arenas) == 1 and pool.use().free_bytes == 0
    for pages in shorts:
        pool.release(pages)
    assert pool.use().free_bytes == 16 * PAGE_BYTES <= pages_module.SPARE_BYTES and pool.is_idle()
    pool.close()
    assert not pool._arenas


def test_a_short_sequence_of_a_large_network_takes_no_more_pages_than_it_needs() -> None:
    pool = PagePool([LayerShape(8, 128, 128)] * 32, torch.bfloat16, CPU)
    assert pool.page_bytes == 16 << 20
    assert len(pool.allocate(2)) == 2 and pool.use().free_bytes == 0


def test_cached_pages_make_room_before_a_sequence_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages_module, "RESERVED_PAGES", 1)
    sequences, life = grown(PROMPT, behind=20 * PAGE_TOKENS)
    life.state.close()
    room = [PAGE_BYTES * 100]
    mapped = arenas._map

    def limited(num_bytes: int, device: torch.device) -> Any:
        if sum(len(a.pages) for a in sequences.pool._arenas.values()) * PAGE_BYTES > room[0]:
            raise MemoryError("no room")
        return mapped(num_bytes, device)

    monkeypatch.setattr(arenas, "_map", limited)
    room[0] = 0
    other = Life(sequences.open(3000, None), [])
    other.read(PROMPT)
    assert sequences.use().cached_bytes == 0 and sequences.use().evicted_pages == 24
    with pytest.raises(MemoryError):
        Life(sequences.open(4000, None), []).read(PROMPT)
    other.read(PROMPT)
    other.state.close()
    assert sequences.pool.is_idle()


def test_memory_that_the_system_does_not_have_is_refused_with_its_size() -> None:
    with pytest.raises(MemoryError, match=r"no room for \d+ bytes of keys and values"):
        PagePool(SHAPES, torch.float64, CPU).allocate(1 << 45)


def test_an_arena_that_cannot_give_pages_back_counts_whole_against_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pages_module, "SPARE_BYTES", 0)
    keep_whole(monkeypatch)
    pool = PagePool(SHAPES, torch.float64, CPU)
    pool.limit_cached(50 * PAGE_BYTES)
    chains = [[bytes([n, i]) for i in range(3)] for n in range(4)]
    for chain in chains:
        pages = pool.allocate(20)
        pool.publish(chain, pages[:3])
        pool.release(pages, chain)
    assert [pool.find(chain) for chain in chains] == [0, 0, 3, 3]
    assert pool.use().cached_bytes == 6 * PAGE_BYTES and pool.use().free_bytes == 34 * PAGE_BYTES


def test_ends_go_before_beginnings_and_a_text_read_beside_its_pages_keeps_them() -> None:
    pool = PagePool(SHAPES, torch.float64, CPU)
    pool.limit_cached(50 * PAGE_BYTES)
    first, second = ([bytes([n, i]) for i in range(3)] for n in range(2))
    for chain in (first, second):
        pages = pool.allocate(3)
        pool.publish(chain, pages)
        pool.release(pages)
    again = pool.allocate(3)
    pool.publish(first, again)
    pool.release(again, first)
    left = []
    for limit in (5, 4, 3, 1):
        pool.limit_cached(limit * PAGE_BYTES)
        left.append((pool.find(first), pool.find(second)))
    assert left == [(3, 2), (3, 1), (3, 0), (1, 0)]


@pytest.mark.skipif(sys.platform != "linux", reason="memory goes back page by page on Linux")
def test_free_pages_give_memory_back_and_cached_ones_keep_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGESIZE

    pool = PagePool([LayerShape(2, 64, 64)] * 4, torch.float32, CPU)
    monkeypatch.setattr(pool, "_spare_bytes", 0)
    pool.limit_cached(10 * pool.page_bytes)
    pages = pool.allocate(400)
    before = resident()
    for keys, values in pool.views(pages[0]):
        keys.fill_(3)
        values.fill_(4)
    grown = resident() - before
    assert grown > 0.95 * 400 * pool.page_bytes
    chain = [bytes([n]) for n in range(20)]
    pool.publish(chain, pages[:20])
    pool.release(pages, chain)
    assert pool.find(chain) == 10 and pool.use().free_bytes == 0
    assert resident() - before < 0.1 * grown
    for keys, values in pool.views(pages[0]):
        assert bool((keys[:, : 10 * PAGE_TOKENS] == 3).all() and (values[:, : 10 * PAGE_TOKENS] == 4).all())
    pool.check()
    pool.close()
    assert resident() - before < 0.05 * grown


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_views_serve_steps_in_inference_mode_and_copies_outside_it() -> None:
    sequences = make_sequences()
    life = Life(sequences.open(400, None), [])
    with torch.inference_mode():
        life.read(PROMPT[:100])
    life.read(PROMPT[:30])
    with torch.inference_mode():
        forked = Life(sequences.fork(life.state, 200), list(life.token_ids))
        forked.read([4] * 5)
    forked.read([4] * 5)


def test_other_threads_may_ask_and_close_while_sequences_are_read() -> None:
    sequences = make_sequences()
    sequences.limit_cached(20 * PAGE_BYTES)
    over, to_close = Event(), SimpleQueue[OpenSequence]()

    def ask() -> int:
        asked = 0
        while not over.is_set() or not to_close.empty():
            use = sequences.use()
            assert use.cached_bytes <= 20 * PAGE_BYTES
            assert sequences.cached_tokens(Prompt(PROMPT, EXACT)) in range(0, 513, PAGE_TOKENS)
            with suppress(Empty):
                to_close.get_nowait().close()
            asked += 1
        return asked

    with ThreadPoolExecutor(3) as threads:
        answers = [threads.submit(ask) for _ in range(3)]
        for n in range(150):
            prompt = PROMPT[: 100 + n * 3] + [n] * (n % 7 * 60)
            life = Life(sequences.open(1200, Prompt(prompt, EXACT)), [])
            life.token_ids = prompt[: life.state.length]
            life.read(prompt[life.state.length :] or [1])
            to_close.put(life.state)
        over.set()
        assert all(answer.result() for answer in answers)
    sequences.limit_cached(0)
    assert sequences.pool.is_idle()


def test_bad_limits_are_refused_and_a_model_that_left_opens_nothing() -> None:
    sequences, life = grown(PROMPT)
    with pytest.raises(ValueError, match="max_bytes is -1"):
        sequences.limit_cached(-1)
    sequences.close()
    assert sequences.use().cached_bytes == 0
    with pytest.raises(RuntimeError, match="left service"):
        sequences.open(10, None)
    with pytest.raises(RuntimeError, match="left service"):
        sequences.fork(life.state, 2000)
    life.read(PROMPT[life.state.length :])
    life.state.close()
    sequences.limit_cached(1 << 30)
    use: Any = sequences.use()
    assert (use.held_bytes, use.cached_bytes, use.free_bytes) == (0, 0, 0)


@pytest.mark.parametrize("seed", range(4))
def test_a_rewound_sequence_reads_on_as_if_it_had_never_read_more(seed: int) -> None:
    sequences, draw = make_sequences(), random.Random(seed)
    leader = Life(sequences.open(500, None), [])
    leader.read(PROMPT[: 250 + seed])
    fork = Life(sequences.fork(leader.state, 450), PROMPT[: 250 + seed])
    for _ in range(20):
        if draw.random() < 0.4:
            length = draw.randrange(250 + seed, fork.state.length + 1)
            fork.state.rewind(length)
            fork.token_ids = fork.token_ids[:length]
        else:
            room = min(fork.state.capacity - fork.state.length, 60)
            fork.read([draw.randrange(50) for _ in range(draw.randrange(room + 1))])
        assert fork.state.length == len(fork.token_ids)
    fork.read([1] * (fork.state.capacity - fork.state.length))
    for layer in range(len(SHAPES)):
        leader.must_hold(layer, PROMPT[: 250 + seed])
        fork.must_hold(layer, fork.token_ids)


def test_there_is_no_way_back_to_what_others_may_read_or_to_what_was_never_read() -> None:
    sequences = make_sequences()
    leader = Life(sequences.open(500, None), [])
    leader.read(PROMPT[:300])
    fork = Life(sequences.fork(leader.state, 400), PROMPT[:300])
    fork.read([1] * 20)
    for length in (-1, 321):
        with pytest.raises(ValueError, match="320 are cached"):
            fork.state.rewind(length)
    with pytest.raises(ValueError, match="others may read"):
        fork.state.rewind(299)
    sequences.limit_cached(1 << 20)
    found = Life(sequences.open(500, Prompt(PROMPT[:300], EXACT)), [])
    found.read(PROMPT[:300])
    with pytest.raises(ValueError, match="others may read"):
        found.state.rewind(290)
    fork.state.close()
    with pytest.raises(ValueError, match="no way back"):
        fork.state.rewind(310)
