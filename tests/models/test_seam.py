"""The packed stream through the seam computes what transformers computes, each sequence with its own
attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.api import backend_names
from kernels.registry import load as load_backend
from models import pages
from models.contract import Slice
from models.step import Step, in_groups
from tests.models.tiny import (
    FAMILIES,
    alone,
    carrying,
    choice,
    close,
    gemma3,
    llama,
    modernbert,
    network,
    random_ids,
    read,
    serve,
)

LENGTHS = (50, 1, 37)


@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES.keys())
def test_exact_equals_sdpa_alone_and_packed(make: Callable[[], Any]) -> None:
    fresh, made = network(make), network(make)
    model = serve(made)
    sequences = [random_ids(n, seed=n) for n in LENGTHS]
    wanted = [alone(network(make) if "dynamic" in str(fresh.config) else fresh, ids) for ids in sequences]
    for ids, hidden in zip(sequences, wanted, strict=True):
        assert close(read(model, ids, choice()), hidden)
    packed = model.step([Slice(model.open(len(ids)), ids, choice(), "hidden", len(ids)) for ids in sequences])
    for result, hidden in zip(packed.results, wanted, strict=True):
        assert close(result.hidden, hidden)


@pytest.mark.parametrize(
    "make", [llama, gemma3, FAMILIES["mistral, all layers local"], FAMILIES["gpt2, learned positions"]]
)
@pytest.mark.parametrize("cuts", [(0, 1, 2, 45), (0, 17, 44, 45), (0, 13, 14, 40, 43, 45)])
def test_chunked_prefill_and_decode_equal_the_whole(make: Callable[[], Any], cuts: tuple[int, ...]) -> None:
    made = network(make)
    ids = random_ids(45)
    wanted = alone(made, ids)
    model = serve(made)
    state = model.open(48)
    rows = []
    for start, stop in zip(cuts, cuts[1:], strict=False):
        rows.append(model.step([Slice(state, ids[start:stop], choice(), "hidden", 45)]).results[0].hidden)
        assert state.length == stop
    assert close(torch.cat([row for row in rows if row is not None]), wanted)


@pytest.mark.parametrize("make", [llama, gemma3, modernbert, FAMILIES["bert"]])
def test_sequences_with_different_attention_in_one_step_equal_each_alone(make: Callable[[], Any]) -> None:
    model = serve(network(make))
    picks = [
        choice("window", window=4),
        choice(),
        choice("window", window=4),
        choice("window", window=9),
        choice(seed=3),
        choice("sinks", sinks=2, window=5),
        choice("random", seed=1, num_random=3),
        choice("random", seed=2, num_random=3),
    ]
    sequences = [random_ids(20 + 3 * i, seed=i) for i in range(len(picks))]
    slices = [
        Slice(model.open(len(ids)), ids, pick, "hidden", len(ids))
        for ids, pick in zip(sequences, picks, strict=True)
    ]
    together = model.step(slices).results
    for ids, pick, result in zip(sequences, picks, together, strict=True):
        assert close(result.hidden, read(model, ids, pick), 1e-5)
    assert together[6].hidden is not None and together[7].hidden is not None
    assert not close(together[6].hidden[:30], together[7].hidden[:30], 1e-3), "the seed must matter"


def test_every_registered_backend_runs_in_prefill_and_decode_beside_exact() -> None:
    model = carrying(serve(network(llama).double(), max_tokens=256))
    ids = random_ids(70)
    for backend in backend_names():
        pick = choice(backend)
        assert (model.unsupported(pick) == []) == load_backend(backend).capabilities.causal
        if model.unsupported(pick):
            continue
        other, state = model.open(80), model.open(80)
        model.step([Slice(state, ids, pick, "nothing", 70), Slice(other, ids, choice(), "nothing", 70)])
        step = model.step([Slice(state, [7], pick, "logits", 70), Slice(other, [7], choice(), "logits", 70)])
        whole = model.step([Slice(model.open(80), [*ids, 7], pick, "logits", 71)]).results[0]
        assert close(step.results[0].logits, whole.logits, 1e-3), backend


def test_the_order_of_sequences_puts_those_that_share_an_attention_side_by_side() -> None:
    picks = [
        choice("window", window=4),
        choice(),
        choice("window", window=5),
        choice("window", window=4),
        choice(),
    ]
    assert in_groups(picks) == [0, 3, 1, 4, 2]


def test_local_layers_keep_their_own_window_whatever_the_request_chose() -> None:
    model = serve(network(FAMILIES["mistral, all layers local"]))
    ids = random_ids(50)
    exact = model.step([Slice(model.open(50), ids, choice(), "hidden", 50)]).results[0]
    narrow = model.step([Slice(model.open(50), ids, choice("window", window=1), "hidden", 50)]).results[0]
    assert close(exact.hidden, narrow.hidden, 0)
    assert model.info.applied_layers == () and model.info.local_layers == {0: 7, 1: 7, 2: 7}
    assert narrow.work.pairs_exact == 0 and narrow.work.flops == narrow.work.flops_exact


def test_what_is_scored_to_choose_is_work_beside_what_is_attended_to() -> None:
    """3 layers, 6 heads of width 8; of each tile of 128 rows topk scores every key up to the last row."""
    model = serve(network(llama), max_tokens=256)
    ids = random_ids(200)
    picks = choice(), choice("topk", query_tile=128, block_size=32, budget=32)
    exact, chosen = (
        model.step([Slice(model.open(200), ids, pick, "nothing", 200)]).results[0].work for pick in picks
    )
    attended = 4 * 8 * (chosen.pairs_computed - exact.pairs_computed)
    scored = 3 * 6 * (128 * 128 + 72 * 200)
    assert chosen.flops - exact.flops == pytest.approx(attended + 2 * 8 * scored)


def test_the_layer_ordinal_counts_the_layers_to_which_the_choice_applies() -> None:
    model = serve(network(gemma3))
    assert model.info.applied_layers == (5,)
    assert model.info.local_layers == {0: 9, 1: 9, 2: 9, 3: 9, 4: 9, 6: 9}
    hybrid = serve(network(modernbert))
    assert hybrid.info.applied_layers == (0, 3) and hybrid.info.local_layers == {1: 6, 2: 6}


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements that any operation put out."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes():
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return out


@pytest.mark.parametrize("make", [gemma3, modernbert])
def test_no_mask_of_all_pairs_is_ever_built(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "RESERVED_PAGES", 1)  # or the cache's addresses are the largest tensor
    n = 2048
    model = serve(network(make), max_tokens=n)
    ids = random_ids(n)
    with LargestTensor() as seen:
        model.step([Slice(model.open(n), ids, choice("window", window=16), "hidden", n)])
    assert 0 < seen.numel < n * n / 4


def test_a_forward_without_the_seams_keyword_says_what_is_missing() -> None:
    made = network(llama)
    with pytest.raises(RuntimeError, match="forward keyword 'longreach'"):
        made(input_ids=torch.tensor([[5, 6, 7]]))


def test_a_network_that_calls_attention_less_often_than_at_load_is_noticed() -> None:
    made = network(llama)
    model = serve(made)
    del made.model.layers[-1]
    made.config.num_hidden_layers = 2
    state = model.open(8)
    with pytest.raises(RuntimeError, match="2 times, 3 times at load"):
        model.step([Slice(state, [5, 6], choice(), "nothing", 2)])
    assert state.length == 0


def test_a_step_is_spent_after_one_forward() -> None:
    made = network(llama)
    model = serve(made)
    plan = model._network.plan
    from models.step import Member

    step = Step(plan.layers, [Member(slice(0, 3), 0, choice(), None)])
    arguments: dict[str, Any] = {
        "input_ids": torch.tensor([[5, 6, 7]]),
        "position_ids": torch.arange(3)[None],
    }
    made.model(**arguments, longreach=step, use_cache=False)
    with pytest.raises(RuntimeError, match="more often than at load"):
        made.model(**arguments, longreach=step, use_cache=False)
