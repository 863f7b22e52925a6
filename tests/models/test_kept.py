"""Every backend through a whole network: chunks and decode steps with what is kept beside the cache, seeds
side by side in one step, and steps that fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.api import backend_names
from kernels.registry import load as load_backend
from models.contract import Choice, Slice
from models.kv_cache import Cache, LayerShape
from models.runner import Model
from models.sequence import OpenSequence
from tests.models.tiny import bert, carrying, choice, close, gemma3, llama, network, random_ids, serve

TOKENS = 268
PROMPT = 250
FEATURES = {"num_features": 16, "centre_keys": 16}
HASHED = {"cluster_size": 16, "window": 8, "sinks": 2}
SMALL: dict[str, dict[str, Any]] = {
    "window": {"window": 8},
    "sinks": {"sinks": 2, "window": 8},
    "random": {"num_random": 5},
    "bigbird": {"window": 8, "global_tokens": 2, "num_random": 4, "block_size": 1},
    "vertical_slash": {"query_tile": 256, "num_verticals": 16, "num_slashes": 2},
    "strided": {"stride": 16},
    "xattention": {"query_tile": 128, "block_size": 32, "mass": 0.5},
    "pooled": {"query_tile": 128, "block_size": 32, "budget": 64},
    "topk": {"query_tile": 128, "block_size": 32, "budget": 64},
    "pages": {"query_tile": 128, "block_size": 32, "budget": 64},
    "performer": FEATURES,
    "lsh": HASHED | {"num_buckets": 8, "centre_keys": 16},
    "kmeans": HASHED | {"num_clusters": 4, "train_keys": 32},
    "scatterbrain": FEATURES | {"support_params": {"window": 16, "sinks": 2}},
    "nystrom": {"num_landmarks": 8},
}
"""Params under which the backend leaves something out of so short a text."""
CAUSAL = [name for name in backend_names() if load_backend(name).capabilities.causal]
BIDIRECTIONAL = [name for name in backend_names() if load_backend(name).capabilities.bidirectional]
BY_ROW = [name for name in CAUSAL if load_backend(name).capabilities.selection in ("none", "row")]


def small(backend: str, seed: int = 0) -> Choice:
    return choice(backend, seed, **SMALL.get(backend, {}))


@pytest.fixture(scope="module")
def made() -> Any:
    """In fp64: in fp32 rounding alone flips a drawn key or a bucket now and then."""
    return network(lambda: llama(max_position_embeddings=512)).double()


@pytest.fixture(scope="module")
def decoder(made: Any) -> Model:
    return carrying(serve(made, 512))


@pytest.fixture(scope="module")
def served() -> Model:
    """A decoder in fp32, as it is served."""
    return carrying(serve(network(lambda: llama(max_position_embeddings=512)), 512))


@pytest.fixture(scope="module")
def encoder() -> Model:
    return carrying(serve(network(bert).double(), 400))


def read_on(model: Model, state: OpenSequence, ids: list[int], wanted: Choice, stops: list[int]) -> Tensor:
    """Hidden states of ``ids`` up to the last stop, read in steps that end at ``stops``."""
    rows = []
    for stop in stops:
        part = ids[state.length : stop]
        rows.append(model.step([Slice(state, part, wanted, "hidden", PROMPT)]).results[0].hidden)
    return torch.cat([row for row in rows if row is not None])


def read_anew(model: Model, ids: list[int], wanted: Choice, stops: list[int]) -> Tensor:
    return read_on(model, model.open(TOKENS), ids, wanted, stops)


DECODE = list(range(PROMPT, TOKENS + 1))


@pytest.mark.parametrize("backend", BY_ROW)
@pytest.mark.parametrize("cuts", [[1, 2, 129], [100, 249], [17, 128]])
def test_chunks_and_decode_steps_equal_the_whole(decoder: Model, backend: str, cuts: list[int]) -> None:
    ids, wanted = random_ids(TOKENS), small(backend, seed=5)
    whole = read_anew(decoder, ids, wanted, [TOKENS])
    assert close(read_anew(decoder, ids, wanted, [*cuts, *DECODE]), whole, 1e-5)


@pytest.mark.parametrize("support", ["lsh", "kmeans", "strided"])
def test_features_around_any_support_do_not_depend_on_chunks(decoder: Model, support: str) -> None:
    ids, around = random_ids(TOKENS), SMALL.get(support, {})
    wanted = choice("scatterbrain", 5, **FEATURES, support=support, support_params=around)
    whole = read_anew(decoder, ids, wanted, [TOKENS])
    assert close(read_anew(decoder, ids, wanted, [100, 249, *DECODE[:12]]), whole[: DECODE[11]], 1e-5)
    assert not close(whole, read_anew(decoder, ids, choice(), [TOKENS]), 1e-3)


@pytest.mark.parametrize("backend", sorted(set(CAUSAL).difference(BY_ROW)))
def test_chunks_that_end_with_tiles_equal_the_whole(decoder: Model, backend: str) -> None:
    ids, wanted = random_ids(TOKENS), small(backend, seed=5)
    if wanted.params.chunk_multiple() >= TOKENS:
        pytest.skip("its tiles are longer than the text")
    whole = read_anew(decoder, ids, wanted, [TOKENS])
    assert close(read_anew(decoder, ids, wanted, [wanted.params.chunk_multiple(), TOKENS]), whole, 1e-5)


@pytest.mark.parametrize("backend", CAUSAL)
def test_a_result_never_depends_on_what_is_kept(
    decoder: Model, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    ids, wanted = random_ids(TOKENS), small(backend, seed=5)
    kept = read_anew(decoder, ids, wanted, [128, *DECODE])
    monkeypatch.setattr(Cache, "kept", lambda self, layer, owner: None)
    assert close(kept, read_anew(decoder, ids, wanted, [128, *DECODE]), 1e-5)


@pytest.mark.parametrize("backend", ["performer", "lsh"])
def test_layers_with_a_window_of_their_own_stand_beside_those_that_keep_states(backend: str) -> None:
    hybrid = serve(network(lambda: gemma3(max_position_embeddings=512)).double(), 512)
    ids, wanted = random_ids(TOKENS), small(backend, seed=5)
    whole = read_anew(hybrid, ids, wanted, [TOKENS])
    assert close(read_anew(hybrid, ids, wanted, [100, 249, *DECODE]), whole, 1e-5)


@pytest.mark.parametrize("backend", CAUSAL)
def test_a_decode_step_under_another_choice_than_the_prefill_finds_what_it_needs(
    decoder: Model, backend: str
) -> None:
    """States are made from the keys where there are none, and two choices beside one cache do not meet."""
    ids, wanted, other = random_ids(TOKENS), small(backend, seed=5), small(backend, seed=6)

    def read(turns: bool) -> Tensor:
        state = decoder.open(TOKENS)
        read_on(decoder, state, ids, choice(), [PROMPT])
        if turns:
            read_on(decoder, state, ids, other, DECODE[1:4])
            state.length = PROMPT
        return read_on(decoder, state, ids, wanted, DECODE[1:8])

    assert close(read(True), read(False), 1e-5)


@pytest.mark.parametrize("backend", CAUSAL)
def test_a_failed_step_leaves_no_trace(made: Any, decoder: Model, backend: str) -> None:
    ids, wanted = random_ids(TOKENS), small(backend, seed=5)
    expected = read_anew(decoder, ids, wanted, [128, PROMPT, *DECODE[1:6]])
    state = decoder.open(TOKENS)
    first = read_on(decoder, state, ids, wanted, [128])
    hook = made.model.layers[2].register_forward_pre_hook(_fail)
    with pytest.raises(MemoryError):
        read_on(decoder, state, ids[:128] + ids[128:][::-1], wanted, [PROMPT + 20])
    hook.remove()
    assert state.length == 128
    again = torch.cat([first, read_on(decoder, state, ids, wanted, [PROMPT, *DECODE[1:6]])])
    assert close(again, expected, 1e-5)


def _fail(*_: object) -> None:
    raise MemoryError("out of memory")


@pytest.mark.parametrize("backend", CAUSAL)
def test_what_is_kept_is_held_within_the_estimate_and_freed(served: Model, backend: str) -> None:
    ids, wanted = random_ids(TOKENS), small(backend)
    state, plain = served.open(TOKENS), served.open(TOKENS)
    read_on(served, state, ids, wanted, [128, *DECODE])
    read_on(served, plain, ids, choice(), [128, *DECODE])
    exact, chosen = (served.estimate_bytes(PROMPT, TOKENS - PROMPT, pick, 128) for pick in (choice(), wanted))
    assert plain.held_bytes <= state.held_bytes
    room_to_grow = 1.25
    assert state.held_bytes - plain.held_bytes <= room_to_grow * beside_cache(served, wanted)
    assert chosen >= state.held_bytes and exact >= plain.held_bytes
    state.close()
    assert state.held_bytes == 0


def beside_cache(model: Model, wanted: Choice) -> int:
    """Bytes that the backend declares to leave beside the caches of all layers."""
    from models.memory import _workspace

    sizes = model._network.sizes
    return sum(_workspace(sizes, layer, wanted, 1, TOKENS).cache_bytes for layer in sizes.plan.layers)


def step_together(model: Model, picks: list[Choice], length: int) -> list[Tensor]:
    ids = random_ids(length)
    slices = [Slice(model.open(length), ids, pick, "hidden", length) for pick in picks]
    found = [result.hidden for result in model.step(slices).results]
    return [hidden for hidden in found if hidden is not None]


@pytest.mark.parametrize(
    ("kind", "backend"),
    [*(("decoder", name) for name in CAUSAL), *(("encoder", name) for name in BIDIRECTIONAL)],
)
def test_each_sequence_has_its_own_seed_whatever_runs_beside_it(
    request: pytest.FixtureRequest, kind: str, backend: str
) -> None:
    model: Model = request.getfixturevalue(kind)
    picks = [small(backend, seed) for seed in (1, 2, 1)] + [choice()]
    if model.unsupported(picks[0]):
        pytest.skip(str(model.unsupported(picks[0])))
    together = step_together(model, picks, TOKENS)
    for pick, hidden in zip(picks, together, strict=True):
        assert close(hidden, step_together(model, [pick], TOKENS)[0], 1e-5)
    assert close(together[0], together[2], 1e-6)
    matters = not close(together[0], together[1], 1e-3)
    assert matters == load_backend(backend).capabilities.random


class Counted:
    """A state that knows the first ``length`` keys and takes a byte for each."""

    def __init__(self) -> None:
        self.length = 0

    @property
    def nbytes(self) -> int:
        return self.length

    def truncate(self, length: int) -> None:
        self.length = min(self.length, length)


def test_a_cache_keeps_states_layer_by_layer_counts_cuts_and_frees_them() -> None:
    cache = Cache([LayerShape(1, 4, 4)] * 2, 50, torch.float32, torch.device("cpu"))
    rows = torch.randn(1, 30, 4)
    for layer in (0, 1):
        cache.write(layer, 0, rows, rows)
    empty = cache.held_bytes
    states = [cache.kept(layer, "lsh").get("codes", Counted) for layer in (0, 1)]
    for state in states:
        state.length = 30
    assert cache.held_bytes == empty + 60 and cache.kept(0, "lsh").get("codes", Counted) is states[0]
    cache.write(1, 10, rows[:, :3], rows[:, :3])
    assert [state.length for state in states] == [30, 10]
    cache.kept(0, "performer")
    assert cache.held_bytes == empty + 10, "a sequence that goes on under another attention"
    cache.close()
    assert cache.held_bytes == 0
