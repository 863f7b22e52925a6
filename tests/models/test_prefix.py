"""Prompts that begin alike: what is spared is never seen in the answer, and only equals share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.contract import Capabilities
from kernels.registry import load as load_backend
from models.arena import PAGE_TOKENS
from models.contract import Choice, Prompt, Slice
from models.prefix import Chain, PrefixIndex, root_key
from models.runner import Model
from models.sequence import OpenSequence, Sharing
from tests.models.test_kept import BY_ROW, CAUSAL, small
from tests.models.tiny import (
    DYNAMIC,
    FAMILIES,
    LONGROPE,
    bert,
    carrying,
    choice,
    close,
    gemma3,
    llama,
    network,
    random_ids,
    serve,
)

IDS = random_ids(430)
BY_TILE = [name for name in CAUSAL if load_backend(name).capabilities.selection == "tile"]
PAGE_BYTES = PAGE_TOKENS * 3 * 2 * 2 * 8 * 8


def remembering(make: Callable[[], Any], max_tokens: int = 512) -> Model:
    """In fp64: in fp32 rounding alone flips a drawn key or a bucket now and then."""
    model = carrying(serve(network(make).double(), max_tokens))
    model.limit_cached(1 << 30)
    return model


@pytest.fixture(scope="module")
def decoder() -> Model:
    return remembering(lambda: llama(max_position_embeddings=512))


@pytest.fixture(scope="module")
def hybrid() -> Model:
    made = serve(network(lambda: gemma3(max_position_embeddings=512)).double(), 512)
    made.limit_cached(1 << 30)
    return made


@pytest.fixture
def empty(decoder: Model) -> Model:
    """The decoder with nothing remembered."""
    decoder.limit_cached(0)
    decoder.limit_cached(1 << 30)
    return decoder


def go_on(model: Model, state: OpenSequence, ids: list[int], wanted: Choice, total: int = 0) -> Tensor:
    """Hidden states of what ``state`` has not read of ``ids``, a prompt of ``total`` tokens and more."""
    part = Slice(state, ids[state.length :], wanted, "hidden", total or len(ids))
    found = model.step([part]).results[0].hidden
    assert found is not None
    return found


def read(model: Model, ids: list[int], wanted: Choice, salt: str = "") -> tuple[int, Tensor]:
    """Tokens spared, and the hidden states of the others, of a sequence that is closed again."""
    state = model.open(len(ids), Prompt(ids, wanted, salt))
    spared = state.length
    hidden = go_on(model, state, ids, wanted)
    state.close()
    return spared, hidden


def whole(model: Model, ids: list[int], wanted: Choice) -> Tensor:
    return go_on(model, model.open(len(ids)), ids, wanted)


@pytest.mark.parametrize("kind", ["decoder", "hybrid"])
@pytest.mark.parametrize("backend", CAUSAL)
def test_an_answer_after_a_reused_beginning_equals_one_that_was_read_whole(
    request: pytest.FixtureRequest, kind: str, backend: str
) -> None:
    model: Model = request.getfixturevalue(kind)
    wanted = small(backend, seed=5)
    if model.unsupported(wanted):
        pytest.skip(str(model.unsupported(wanted)))
    unit = max(PAGE_TOKENS, wanted.params.chunk_multiple())
    other = IDS[:400] + random_ids(60, seed=3)
    assert read(model, IDS, wanted)[0] == 0
    spared, hidden = read(model, other, wanted)
    assert spared == 400 // unit * unit
    if spared:
        assert close(hidden, whole(model, other, wanted)[spared:], 1e-9)
    spared, hidden = read(model, IDS, wanted)
    assert spared == 430 // unit * unit
    assert close(hidden, whole(model, IDS, wanted)[spared:], 1e-9)
    model._sequences.pool.check()


@pytest.mark.parametrize("backend", BY_ROW)
def test_generated_tokens_are_remembered_too(empty: Model, backend: str) -> None:
    wanted = small(backend, seed=5)
    state = empty.open(400, Prompt(IDS[:250], wanted))
    go_on(empty, state, IDS[:250], wanted)
    for stop in range(251, 262):
        go_on(empty, state, IDS[:stop], wanted, total=250)
    state.close()
    spared, hidden = read(empty, IDS[:300], wanted)
    assert spared == 256 and close(hidden, whole(empty, IDS[:300], wanted)[256:], 1e-5)


@pytest.mark.parametrize("backend", BY_TILE)
def test_of_tiles_only_whole_ones_of_the_prompt_are_remembered(empty: Model, backend: str) -> None:
    wanted = small(backend)
    unit = wanted.params.chunk_multiple()
    if unit == 1:
        pytest.skip("its support chooses row by row")
    state = empty.open(430, Prompt(IDS[: unit + 100], wanted))
    go_on(empty, state, IDS[:unit], wanted, total=unit + 100)
    go_on(empty, state, IDS[: unit + 100], wanted)
    for stop in range(unit + 101, 2 * unit + 1 if unit < 200 else unit + 30):
        go_on(empty, state, IDS[:stop], wanted, total=unit + 100)
    state.close()
    assert empty.cached_tokens(Prompt(IDS, wanted)) == unit
    assert empty.cached_tokens(Prompt(IDS[:unit], wanted)) == 0, "its last token must be read"


def test_a_chunk_that_ends_within_a_tile_ends_what_is_remembered(empty: Model) -> None:
    wanted = small("pages")
    state = empty.open(430, Prompt(IDS, wanted))
    for stop in (128, 200, 384, 430):
        go_on(empty, state, IDS[:stop], wanted, total=430)
    assert empty.cached_tokens(Prompt(IDS, wanted)) == 128


def test_what_is_shared_ends_with_a_tile(empty: Model) -> None:
    for tile, shared in ((128, 384), (256, 256), (512, 0)):
        wanted = choice("pages", query_tile=tile, block_size=32, budget=64)
        read(empty, IDS, wanted)
        spared, hidden = read(empty, IDS, wanted)
        assert spared == shared and close(hidden, whole(empty, IDS, wanted)[spared:], 1e-9)


@pytest.mark.parametrize("backend", ["xattention", "pooled", "topk", "vertical_slash"])
def test_texts_that_part_within_a_tile_share_no_page_of_it(backend: str) -> None:
    """Rows before the fork look, through their tile's choice, at tokens behind it: a third text must not get
    pages of both."""
    model = remembering(lambda: llama(max_position_embeddings=1024), 1024)
    more: dict[str, Any] = {"num_verticals": 16, "num_slashes": 2}
    if backend != "vertical_slash":
        more = {"block_size": 32} | ({"mass": 0.5} if backend == "xattention" else {"budget": 64})
    wanted = choice(backend, query_tile=256, **more)
    one, other = (random_ids(640, seed=1) + random_ids(200, seed) for seed in (2, 3))
    assert read(model, one, wanted)[0] == 0
    spared, hidden = read(model, other, wanted)
    assert spared == 512 and close(hidden, whole(model, other, wanted)[512:], 1e-9)
    third = other + random_ids(100, seed=4)
    spared, hidden = read(model, third, wanted)
    assert spared == 768 and close(hidden, whole(model, third, wanted)[768:], 1e-9)
    model._sequences.pool.check()


def test_tiles_that_pages_do_not_divide_share_at_multiples_of_both() -> None:
    unit = Sharing(None, 192, lambda length: (), 1000).unit_pages
    assert unit * PAGE_TOKENS == 384


def test_only_equals_share(empty: Model) -> None:
    wanted = choice("random", 1, num_random=4)
    read(empty, IDS, wanted, "one")
    others = [
        Prompt(IDS, wanted, "two"),
        Prompt(IDS, choice("random", 2, num_random=4), "one"),
        Prompt(IDS, choice("random", 1, num_random=5), "one"),
        Prompt(IDS, choice("exact", 1), "one"),
        Prompt([*IDS[:50], 96 - IDS[50], *IDS[51:]], wanted, "one"),
        Prompt(IDS[1:], wanted, "one"),
    ]
    assert empty.cached_tokens(Prompt(IDS, wanted, "one")) == 384
    assert [empty.cached_tokens(prompt) for prompt in others] == [0] * 6
    assert empty.open(430, others[0]).length == 0


def test_the_seed_matters_to_random_backends_alone(empty: Model) -> None:
    read(empty, IDS, choice("window", 1, window=8))
    assert empty.cached_tokens(Prompt(IDS, choice("window", 2, window=8))) == 384


def test_a_selection_over_the_whole_prompt_shares_nothing(
    empty: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = load_backend("exact")
    capabilities: Capabilities = replace(exact.capabilities, selection="prompt")
    by_prompt = replace(exact, capabilities=capabilities)
    monkeypatch.setattr("models.sequence.load_backend", lambda name: by_prompt)
    read(empty, IDS, choice())
    assert read(empty, IDS, choice())[0] == 0 and empty.cache_use().cached_bytes == 0


def test_pages_read_under_another_attention_are_not_remembered(empty: Model) -> None:
    state = empty.open(430, Prompt(IDS, choice()))
    for stop, wanted in ((200, choice()), (256, small("window")), (430, choice())):
        go_on(empty, state, IDS[:stop], wanted, total=430)
    assert empty.cached_tokens(Prompt(IDS, choice())) == 128
    assert empty.cached_tokens(Prompt(IDS, small("window"))) == 0


def test_open_sequences_share_while_they_run(empty: Model) -> None:
    first = empty.open(430, Prompt(IDS, choice()))
    go_on(empty, first, IDS[:300], choice(), total=430)
    second = empty.open(430, Prompt(IDS, choice()))
    assert second.length == 256 and empty.cache_use().held_bytes == 4 * PAGE_BYTES
    assert second.held_bytes == 256 * PAGE_BYTES // PAGE_TOKENS
    expected = whole(empty, IDS, choice())
    steps = [Slice(s, IDS[s.length :], choice(), "hidden", 430) for s in (first, second)]
    for state, result in zip([300, 256], empty.step(steps).results, strict=True):
        assert close(result.hidden, expected[state:], 1e-9)


def test_nothing_is_remembered_before_a_limit_is_set() -> None:
    model = serve(network(llama), 256)
    assert read(model, IDS[:250], choice())[0] == read(model, IDS[:250], choice())[0] == 0
    use = model.cache_use()
    assert (use.cached_bytes, use.held_bytes, use.looked_up_tokens) == (0, 0, 0)
    assert model._sequences.pool.is_idle()


def test_what_was_looked_up_and_found_is_counted(empty: Model) -> None:
    before = empty.cache_use()
    for n in (430, 430, 200):
        read(empty, IDS[:n], choice())
    after = empty.cache_use()
    assert after.looked_up_tokens - before.looked_up_tokens == 1060
    assert after.found_tokens - before.found_tokens == 384 + 128
    assert after.cached_bytes == 3 * PAGE_BYTES and after.held_bytes == 0


def test_a_failed_step_is_not_remembered(empty: Model) -> None:
    body = empty._network.body
    state = empty.open(430, Prompt(IDS, choice()))
    go_on(empty, state, IDS[:130], choice(), total=430)
    hook = body.layers[2].register_forward_pre_hook(_fail)
    with pytest.raises(MemoryError):
        go_on(empty, state, IDS[:130] + IDS[130:][::-1], choice())
    hook.remove()
    assert state.length == 130 and empty.cached_tokens(Prompt(IDS, choice())) == 128
    assert close(go_on(empty, state, IDS, choice()), whole(empty, IDS, choice())[130:], 1e-9)


def test_a_first_step_that_failed_on_reused_pages_leaves_them_as_they_were(empty: Model) -> None:
    read(empty, IDS, choice())
    expected = whole(empty, IDS, choice())
    first, second = (empty.open(430, Prompt(IDS, choice())) for _ in range(2))
    hook = empty._network.body.layers[1].register_forward_pre_hook(_fail)
    for state in (first, second):
        with pytest.raises(MemoryError):
            go_on(empty, state, IDS[:384] + IDS[384:][::-1], choice())
    hook.remove()
    forked = empty.fork(second, 430)
    for state in (second, first, forked):
        assert close(go_on(empty, state, IDS, choice()), expected[384:], 1e-9)


def _fail(*_: object) -> None:
    raise MemoryError("out of memory")


@pytest.mark.parametrize("backend", CAUSAL)
@pytest.mark.parametrize("length", [256, 300])
def test_a_fork_goes_on_as_a_sequence_read_alone(empty: Model, backend: str, length: int) -> None:
    wanted = small(backend, seed=5)
    leader = empty.open(430, Prompt(IDS, wanted))
    go_on(empty, leader, IDS[:length], wanted)
    forks = [empty.fork(leader, 420) for _ in range(2)]
    tails = [IDS[:length] + random_ids(8, seed) for seed in (1, 2, 3)]
    for state, ids in zip([leader, *forks], tails, strict=True):
        alone = empty.open(430)
        go_on(empty, alone, ids[:length], wanted)
        expected = go_on(empty, alone, ids, wanted, total=length)
        assert close(go_on(empty, state, ids, wanted, total=length), expected, 1e-9)
        state.close()


def test_a_fork_remembers_what_it_generates_itself(empty: Model) -> None:
    leader = empty.open(430, Prompt(IDS[:300], choice()))
    go_on(empty, leader, IDS[:300], choice())
    forked = empty.fork(leader, 430)
    go_on(empty, forked, IDS[:390], choice(), total=300)
    assert empty.cached_tokens(Prompt(IDS, choice())) == 384
    go_on(empty, leader, IDS[:300] + random_ids(100, 9), choice(), total=300)
    assert empty.cached_tokens(Prompt([*IDS[:300], *random_ids(100, 9)], choice())) == 384


def test_encoders_have_nothing_to_share_or_fork() -> None:
    model = serve(network(bert), 400)
    model.limit_cached(1 << 20)
    prompt = Prompt(IDS[:400], choice())
    state = model.open(400, prompt)
    go_on(model, state, IDS[:400], choice())
    assert model.cached_tokens(prompt) == model.open(400, prompt).length == 0
    with pytest.raises(ValueError, match="bidirectional"):
        model.fork(state, 400)


def test_dynamic_rotary_shares_between_lengths_that_it_treats_alike() -> None:
    parameters = {**DYNAMIC}
    model = remembering(lambda: llama(max_position_embeddings=300, rope_parameters=parameters))
    read(model, IDS[:250], choice())
    spared, hidden = read(model, IDS[:299], choice())
    assert spared == 128 and close(hidden, whole(model, IDS[:299], choice())[128:], 1e-9)
    for n, found in ((400, 0), (401, 0), (400, 384)):
        spared, hidden = read(model, IDS[:n], choice())
        assert spared == found and close(hidden, whole(model, IDS[:n], choice())[spared:], 1e-9)


def test_longrope_shares_on_either_side_of_the_trained_length() -> None:
    parameters = {**LONGROPE, "original_max_position_embeddings": 300}
    made = FAMILIES["phi3, longrope"]

    def make() -> Any:
        config = made().config
        config.rope_parameters.update(parameters)
        config.max_position_embeddings, config.original_max_position_embeddings = 512, 300
        return type(made())(config)

    model = remembering(make)
    for n, found in ((250, 0), (280, 128), (400, 0), (430, 384), (290, 256)):
        spared, hidden = read(model, IDS[:n], choice())
        assert spared == found and close(hidden, whole(model, IDS[:n], choice())[spared:], 1e-9)


def test_tokens_generated_beyond_the_trained_length_are_not_remembered_where_it_matters() -> None:
    model = remembering(lambda: llama(max_position_embeddings=300, rope_parameters=dict(DYNAMIC)))
    for length, found in ((270, 256), (290, 256)):
        state = model.open(430, Prompt(IDS[:length], choice()))
        go_on(model, state, IDS[:length], choice())
        for stop in range(length + 1, 390, 7):
            go_on(model, state, IDS[:stop], choice(), total=length)
        state.close()
        assert model.cached_tokens(Prompt(IDS[:299], choice())) == found
        assert model.cached_tokens(Prompt(IDS, choice())) == 0
        assert model.cache_use().cached_bytes == 2 * PAGE_BYTES, "no page that could never be found"


def test_the_least_recently_used_are_evicted_first_and_ends_before_beginnings(empty: Model) -> None:
    texts = [random_ids(430, seed) for seed in (11, 12, 13)]

    def spared() -> list[int]:
        return [empty.cached_tokens(Prompt(ids, choice())) for ids in texts]

    for ids in texts:
        read(empty, ids, choice())
    read(empty, texts[0], choice())
    for pages, left in ((8, [384, 256, 384]), (5, [384, 0, 256]), (1, [128, 0, 0])):
        empty.limit_cached(pages * PAGE_BYTES)
        assert spared() == left
        empty._sequences.pool.check()
    empty.limit_cached(0)
    assert spared() == [0, 0, 0] and empty.cache_use().cached_bytes == 0


def chain(*token_ids: int, root: bytes = b"", size: int = 4) -> list[bytes]:
    made = Chain(root, size)
    made.append(token_ids)
    return made.keys


def test_keys_do_not_depend_on_how_tokens_come_in() -> None:
    ids = tuple(random_ids(50))
    expected = chain(*ids)
    assert len(expected) == 12 and len(set(expected)) == 12
    for cuts in ((1, 2, 3), (4, 8), (25,), tuple(range(1, 50))):
        made = Chain(b"", 4)
        for begin, stop in zip((0, *cuts), (*cuts, 50), strict=True):
            made.append(ids[begin:stop])
        assert made.keys == expected
    forked = Chain(b"", 4)
    forked.append(ids[:30])
    other = forked.copy()
    other.append(ids[30:])
    assert other.keys == expected and forked.keys == expected[:7]
    later = Chain(b"", 4, expected[:5])
    later.append(ids[20:])
    assert later.keys == expected


def test_pages_of_a_unit_get_their_keys_together_from_all_its_tokens() -> None:
    def keys(*token_ids: int) -> list[bytes]:
        made = Chain(b"", 2, unit_pages=2)
        for token_id in token_ids:
            made.append([token_id])
        assert made.copy().keys == made.keys
        return made.keys

    assert keys(1, 2, 3) == [] and len(set(keys(1, 2, 3, 4, 5, 6, 7))) == 2
    assert keys(1, 2, 3, 4)[0] != keys(1, 2, 3, 5)[0]
    assert len(set(keys(1, 2, 3, 4, 1, 2, 3, 4, 9))) == 4
    later = Chain(b"", 2, keys(1, 2, 3, 4), unit_pages=2)
    later.append([5, 6, 7, 8])
    assert later.keys == keys(1, 2, 3, 4, 5, 6, 7, 8)


def test_keys_tell_texts_and_roots_apart() -> None:
    assert chain(1, 2, 3, 4, 5, 6, 7, 8)[1] != chain(9, 2, 3, 4, 5, 6, 7, 8)[1]
    assert chain(1, 2, 3, 4) != chain(1, 2, 3, 4, root=b"x") and chain(-1, -2, 3, 4) != chain(-2, -1, 3, 4)
    assert (
        len({root_key("a", 1), root_key("a", "1"), root_key("a1"), root_key(("a", 1)), root_key("a", None)})
        == 5
    )


def filled(*chains: str) -> PrefixIndex[str]:
    """Each letter a page; every chain is held."""
    index: PrefixIndex[str] = PrefixIndex()
    for text in chains:
        for i in range(len(text)):
            key = text[: i + 1].encode()
            if key not in index:
                index.add(key, text[:i].encode() if i else None, text[: i + 1])
    return index


def test_a_page_goes_with_all_that_continue_it_children_first() -> None:
    index = filled("abcd", "abx", "z")
    assert index.find([b"a", b"ab", b"abq", b"abc"]) == ["a", "ab"] and index.find([b"q"]) == []
    gone = index.remove(b"ab")
    assert sorted(gone) == ["ab", "abc", "abcd", "abx"]
    assert gone.index("abcd") < gone.index("abc") < gone.index("ab") > gone.index("abx")
    assert sorted(index.pages().values()) == ["a", "z"] and len(index) == 2
    index.add(b"ab", b"a", "new")
    assert index.find([b"a", b"ab", b"abc"]) == ["a", "new"]
    with pytest.raises(ValueError, match="one page"):
        index.add(b"ab", b"a", "newer")
    assert index.replace(b"ab", "newest") == "new" and index.find([b"a", b"ab"]) == ["a", "newest"]


def test_what_rests_is_evicted_in_the_order_of_its_last_use() -> None:
    index = filled("abc", "xy")
    assert index.oldest() is None
    for key in (b"abc", b"ab", b"a", b"xy", b"x"):
        index.rest(key)
    index.touch([b"a", b"ab", b"abc"])
    index.hold(b"x")
    order = []
    while (oldest := index.oldest()) is not None:
        order += index.remove(oldest)
    assert order == ["xy", "abc", "ab", "a"] and index.num_resting == 0 and len(index) == 1


def test_the_index_needs_no_torch() -> None:
    told = "import sys, models.prefix; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("seed", range(4))
def test_random_prompts_with_common_beginnings_are_read_as_if_alone(empty: Model, seed: int) -> None:
    """Many at once, under a limit that evicts, in random chunks."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    empty.limit_cached(6 * PAGE_BYTES)
    stems, picks = [random_ids(330, s) for s in (1, 2)], [choice(), small("window"), small("performer", 3)]
    prompts = [stems[draw(0, 2)][: draw(1, 330)] + random_ids(draw(1, 99), draw(0, 3)) for _ in range(14)]
    open_now: list[tuple[OpenSequence, list[int], Choice, Tensor]] = []
    while prompts or open_now:
        if prompts and len(open_now) < 4:
            ids, wanted = prompts.pop(), picks[draw(0, 3)]
            state = empty.open(len(ids), Prompt(ids, wanted))
            open_now.append((state, ids, wanted, whole(empty, ids, wanted)))
        slices = []
        for state, ids, wanted, _ in open_now:
            stop = draw(state.length, len(ids)) + 1
            slices.append(Slice(state, ids[state.length : stop], wanted, "hidden", len(ids)))
        starts = [state.length for state, *_ in open_now]
        for start, (state, _, _, expected), result in zip(
            starts, open_now, empty.step(slices).results, strict=True
        ):
            assert close(result.hidden, expected[start : state.length], 1e-6)
        for done in [one for one in open_now if one[0].length == len(one[1])]:
            done[0].close()
            open_now.remove(done)
        empty._sequences.pool.check()
    assert empty.cache_use().held_bytes == 0 and empty.cache_use().found_tokens > 0
