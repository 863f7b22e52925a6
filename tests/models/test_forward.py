"""Forwards that are left and gone on with: they compute what a step computes, and leave nothing behind."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from greenlet import getcurrent
from torch import Tensor

import models.products
import models.stretches
from kernels.registry import load as load_backend
from models.contract import Choice, Flops, Slice, StepResult, Work
from models.errors import NonFiniteOutput
from models.forward import LeavableForward, offer_to_pause
from models.products import LeavableLinear
from models.runner import Model
from tests.models.tiny import (
    FAMILIES,
    bert,
    choice,
    close,
    gemma3,
    llama,
    modernbert,
    network,
    random_ids,
    serve,
)

TOKENS = 400


@pytest.fixture(scope="module")
def decoder() -> Model:
    return serve(network(lambda: llama(max_position_embeddings=512)), 512)


@pytest.fixture(scope="module")
def other() -> Model:
    return serve(network(lambda: llama(max_position_embeddings=512), seed=1), 512)


@pytest.fixture(scope="module")
def encoder() -> Model:
    return serve(network(lambda: modernbert()), 512)


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny networks are cut as large ones are."""
    monkeypatch.setattr(models.stretches, "STRETCH_FLOPS", 1e5)
    monkeypatch.setattr(models.stretches, "DENSE_ROWS", 128)
    monkeypatch.setattr(models.products, "PRODUCT_FLOPS", 1e5)


@pytest.fixture(autouse=True)
def modes_are_left_as_they_were() -> Any:
    yield
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def always() -> bool:
    return True


def never() -> bool:
    return False


def whole(model: Model, ids: list[int], want: Any = "logits", pick: Choice | None = None) -> Slice:
    targets = ids[1:] + ids[:1] if want == "scores" else ()
    return Slice(model.open(len(ids)), ids, pick or choice(), want, len(ids), targets)


def to_the_end(
    forward: LeavableForward, between: Callable[[], object] = lambda: None
) -> tuple[StepResult, int]:
    """Left at every yield point: its result, and how often it was left."""
    pauses = 0
    while (result := forward.advance(always)) is None:
        pauses += 1
        between()
    return result, pauses


def told(result: StepResult, index: int = 0) -> Tensor:
    one = result.results[index]
    found = [x for x in (one.logits, one.scores, one.hidden) if x is not None]
    assert len(found) == 1
    return found[0]


def counts(work: Work) -> dict[str, Any]:
    """Without times, and as the estimates are."""
    return {
        name: value
        for name, value in vars(work).items()
        if name not in ("selection_ms", "attention_ms", "dropped_mass")
    }


@pytest.mark.parametrize("want", ["logits", "scores"])
def test_a_forward_left_everywhere_equals_the_step(decoder: Model, want: str) -> None:
    ids = random_ids(TOKENS)
    wanted = decoder.step([whole(decoder, ids, want)])
    mine = whole(decoder, ids, want)
    lengths = []
    result, pauses = to_the_end(decoder.begin([mine]), lambda: lengths.append(mine.sequence.length))
    assert torch.equal(told(result), told(wanted)) and pauses > 3 * 7
    assert set(lengths) == {0} and mine.sequence.length == TOKENS
    assert result.peak_bytes is None
    assert counts(result.results[0].work) == counts(wanted.results[0].work)


def test_a_forward_that_is_never_left_is_a_step(decoder: Model) -> None:
    ids = random_ids(TOKENS)
    result = decoder.begin([whole(decoder, ids)]).advance(never)
    assert result is not None
    assert torch.equal(told(result), told(decoder.step([whole(decoder, ids)])))


def test_nothing_runs_before_the_first_advance(decoder: Model) -> None:
    mine = whole(decoder, random_ids(20))
    forward = decoder.begin([mine])
    assert mine.sequence.held_bytes == 0
    forward.close()
    assert len(decoder.step([mine]).results) == 1


def test_an_empty_forward_is_an_empty_step(decoder: Model) -> None:
    result = decoder.begin([]).advance(always)
    assert result is not None and result.results == ()


def test_pause_is_asked_within_the_forward_and_switches_only_where_it_is_true(decoder: Model) -> None:
    here, asked = getcurrent(), []

    def third() -> bool:
        asked.append(getcurrent())
        return len(asked) == 3

    forward = decoder.begin([whole(decoder, random_ids(20))])
    assert forward.advance(third) is None
    assert len(asked) == 3 and len(set(asked)) == 1 and asked[0] is not here
    assert forward.advance(never) is not None


def test_steps_run_between_two_advances_and_neither_is_felt(decoder: Model) -> None:
    long, short = random_ids(TOKENS, 1), random_ids(30, 2)
    wanted_long, wanted_short = (told(decoder.step([whole(decoder, ids)])) for ids in (long, short))

    def step() -> None:
        assert torch.equal(told(decoder.step([whole(decoder, short)])), wanted_short)
        weight = torch.ones(2, requires_grad=True)
        assert (2 * weight).requires_grad

    result, _ = to_the_end(decoder.begin([whole(decoder, long)]), step)
    assert torch.equal(told(result), wanted_long)


@pytest.mark.parametrize("seed", range(5))
def test_forwards_of_two_models_take_turns(decoder: Model, other: Model, seed: int) -> None:
    turns = random.Random(seed)
    ids = random_ids(TOKENS, seed)
    models_ = [decoder, other, decoder]
    wanted = [told(model.step([whole(model, ids)])) for model in models_]
    assert not torch.equal(wanted[0], wanted[1])
    open_ = {i: model.begin([whole(model, ids)]) for i, model in enumerate(models_)}
    found: dict[int, Tensor] = {}
    while open_:
        i = turns.choice(sorted(open_))
        result = open_[i].advance(lambda: turns.random() < 0.3)
        if result is not None:
            found[i] = told(result)
            del open_[i]
    assert all(torch.equal(found[i], wanted[i]) for i in range(3))


def test_inference_mode_of_the_caller_is_kept(decoder: Model) -> None:
    ids = random_ids(30)
    forward = decoder.begin([whole(decoder, ids)])
    assert forward.advance(always) is None
    with torch.inference_mode():
        assert forward.advance(always) is None
        assert torch.is_inference_mode_enabled()
    with torch.no_grad():
        assert forward.advance(always) is None
        assert not torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    with torch.inference_mode():
        forward.close()
        assert torch.is_inference_mode_enabled()


def test_a_sequence_belongs_to_its_forward_until_that_is_over(decoder: Model) -> None:
    mine = whole(decoder, random_ids(30))
    forward = decoder.begin([mine])
    for refused in (decoder.step, decoder.begin):
        with pytest.raises(ValueError, match="slice 0: its sequence belongs to a forward that has begun"):
            refused([mine])
    with pytest.raises(ValueError, match="belongs to a forward"):
        decoder.fork(mine.sequence, 40)
    assert forward.advance(always) is None
    forward.close()
    assert mine.sequence.length == 0
    decoder.step([mine])
    assert mine.sequence.length == 30


def test_a_sequence_closed_under_its_forward_gives_no_answer(decoder: Model) -> None:
    """Its pages may be another's by then, even after the last layer's keys were written."""
    _, pauses = to_the_end(decoder.begin([whole(decoder, random_ids(30))]))
    for stop in (1, pauses // 2, pauses - 1):
        part = whole(decoder, random_ids(30))
        forward = decoder.begin([part])
        for _ in range(stop):
            assert forward.advance(lambda: True) is None
        part.sequence.close()
        with pytest.raises(RuntimeError, match="closed"):
            to_the_end(forward)
        assert part.sequence.length == 0 and part.sequence not in decoder._begun


def test_bad_slices_are_refused_when_a_forward_begins(decoder: Model) -> None:
    good, bad = whole(decoder, [5, 6, 7]), whole(decoder, [5, 6, 7])
    wrong = Slice(bad.sequence, [], choice(), "logits", 3)
    with pytest.raises(ValueError, match="slice 1: token_ids is empty"):
        decoder.begin([good, wrong])
    decoder.step([good, bad])


def held_tensors(model: Model, forward: LeavableForward) -> list[weakref.ref[Tensor]]:
    """Tensors that came to life while the forward went to its 12th yield point."""
    before = set(map(id, tensors()))
    for _ in range(12):
        assert forward.advance(always) is None
    return [weakref.ref(x) for x in tensors() if id(x) not in before]


def tensors() -> list[Tensor]:
    return [x for x in gc.get_objects() if type(x) is Tensor]


@pytest.mark.parametrize("how", ["closed", "forgotten"])
def test_a_forward_given_up_in_the_middle_frees_what_it_holds(decoder: Model, how: str) -> None:
    ids = random_ids(50)
    mine = whole(decoder, ids)
    forward: LeavableForward | None = decoder.begin([mine])
    assert forward is not None
    held = held_tensors(decoder, forward)
    mine.sequence.close()
    if how == "closed":
        forward.close()
        forward.close()
    forward = None
    assert held and [ref() for ref in held if ref() is not None] == []
    assert len(decoder.step([whole(decoder, ids)]).results) == 1


def test_a_forward_that_is_over_cannot_be_gone_on_with(decoder: Model) -> None:
    ended, given_up = (decoder.begin([whole(decoder, random_ids(9))]) for _ in range(2))
    assert ended.advance(never) is not None
    assert given_up.advance(always) is None
    given_up.close()
    for forward in (ended, given_up):
        with pytest.raises(RuntimeError, match="this forward is over"):
            forward.advance(never)
        forward.close()


def test_a_forward_cannot_be_advanced_or_closed_from_within(decoder: Model) -> None:
    forward = decoder.begin([whole(decoder, random_ids(9))])
    met: list[str] = []

    def pause() -> bool:
        for call in (lambda: forward.advance(never), forward.close):
            with pytest.raises(RuntimeError, match="is running") as caught:
                call()
            met.append(str(caught.value))
        return False

    assert forward.advance(pause) is not None and met


def test_an_error_within_ends_the_forward_and_shows_where_it_was_raised(decoder: Model) -> None:
    body = decoder._network.body
    mine = whole(decoder, random_ids(20))
    forward = decoder.begin([mine])
    assert forward.advance(always) is None
    hook = body.layers[2].register_forward_pre_hook(_fail)
    with pytest.raises(MemoryError, match="out of memory") as caught:
        forward.advance(never)
    hook.remove()
    assert any(entry.name == "_fail" for entry in caught.traceback)
    with pytest.raises(RuntimeError, match="is over"):
        forward.advance(never)
    assert mine.sequence.length == 0
    decoder.step([mine])


def _fail(*_: object) -> None:
    raise MemoryError("out of memory")


def test_an_error_of_pause_ends_the_forward(decoder: Model) -> None:
    forward = decoder.begin([whole(decoder, random_ids(20))])
    with pytest.raises(ZeroDivisionError):
        forward.advance(lambda: bool(1 // 0))
    with pytest.raises(RuntimeError, match="is over"):
        forward.advance(never)


def test_non_finite_output_names_the_slice_and_nothing_advances() -> None:
    made = network(llama)
    model = serve(made)
    made.model.embed_tokens.weight[11] = float("nan")
    slices = [whole(model, ids, "nothing") for ids in ([5, 6], [7, 11, 8], [9])]
    with pytest.raises(NonFiniteOutput, match="slice 1"):
        to_the_end(model.begin(slices))
    assert [s.sequence.length for s in slices] == [0, 0, 0]
    assert len(model.step([slices[0], slices[2]]).results) == 2


@pytest.mark.parametrize("name", ["llama, dynamic rotary", "phi3, longrope", "nomic, dynamic rotary"])
def test_lengths_that_rotary_embeddings_depend_on_stay_with_their_forward(name: str) -> None:
    """The length in force is a context variable: a step in between has its own."""
    model = serve(network(FAMILIES[name]))
    long, short = random_ids(60, 1), random_ids(20, 2)
    wanted = [told(model.step([whole(model, ids, "hidden")])) for ids in (long, short)]

    def step() -> None:
        assert torch.equal(told(model.step([whole(model, short, "hidden")])), wanted[1])

    result, _ = to_the_end(model.begin([whole(model, long, "hidden")]), step)
    assert torch.equal(told(result), wanted[0])


def test_rows_of_the_head_are_yield_points(decoder: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    _, few = to_the_end(decoder.begin([whole(decoder, random_ids(100), "scores")]))
    monkeypatch.setattr("models.head.ROWS_AT_ONCE", 10)
    _, many = to_the_end(decoder.begin([whole(decoder, random_ids(100), "scores")]))
    assert many == few + 9


CUT = ["exact", "window", "sinks", "bigbird", "strided", "random", "star", "fixed"]
CUT += ["topk", "pages", "pooled", "xattention"]
SMALL: dict[str, dict[str, Any]] = {
    "window": {"window": 8},
    "sinks": {"sinks": 2, "window": 8},
    "random": {"num_random": 5},
    "bigbird": {"window": 8, "global_tokens": 2, "num_random": 4, "block_size": 1},
    "strided": {"stride": 16},
    "xattention": {"query_tile": 128, "block_size": 32, "mass": 0.5},
    "pooled": {"query_tile": 128, "block_size": 32, "budget": 64},
    "topk": {"query_tile": 128, "block_size": 32, "budget": 64},
    "pages": {"query_tile": 128, "block_size": 32, "budget": 64},
    "lsh": {"num_buckets": 8, "centre_keys": 16, "cluster_size": 16, "window": 8, "sinks": 2},
    "kmeans": {"num_clusters": 4, "train_keys": 32, "cluster_size": 16, "window": 8, "sinks": 2},
    "performer": {"num_features": 16, "centre_keys": 16},
    "scatterbrain": {"num_features": 16, "centre_keys": 16, "support_params": {"window": 16, "sinks": 2}},
}


def small(backend: str, seed: int = 3) -> Choice:
    return choice(backend, seed, **SMALL.get(backend, {}))


GOES_ON = ["lsh", "kmeans", "performer", "scatterbrain"]


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize(
    ("make", "backend"),
    [*((llama, name) for name in CUT + GOES_ON), *((bert, name) for name in CUT)],
)
def test_stretches_of_rows_equal_the_whole_call(make: Callable[..., Any], backend: str) -> None:
    """Beside a neighbour that is not cut, in fp64: rounding alone would flip choices."""
    model = serve(network(lambda: _longer(make)).double(), 512)
    ids, beside = random_ids(TOKENS, 1), random_ids(70, 2)

    def slices() -> list[Slice]:
        return [whole(model, part, "hidden", small(backend)) for part in (beside, ids)]

    wanted = model.step(slices())
    forward = model.begin(slices())
    result, pauses = to_the_end(forward)
    assert pauses > 2 * len(model._network.plan.layers) + len(list(linears(model)))
    for index in (0, 1):
        assert close(told(result, index), told(wanted, index), 1e-9)
        mine, his = result.results[index].work, wanted.results[index].work
        assert (mine.pairs_kept, mine.pairs_exact) == (his.pairs_kept, his.pairs_exact)
        assert mine.kept_per_head == his.kept_per_head and mine.exact_per_head == his.exact_per_head
        assert mine.dropped_rows + mine.unmeasured_rows == his.dropped_rows + his.unmeasured_rows
        if his.dropped_rows and load_backend(backend).capabilities.selection == "tile":
            assert mine.dropped_mass / mine.dropped_rows == pytest.approx(his.dropped_mass / his.dropped_rows)


def _longer(make: Callable[..., Any]) -> Any:
    if make is llama:
        return llama(max_position_embeddings=512)
    import transformers as hf

    from tests.models.tiny import WIDTH

    config = hf.BertConfig(**WIDTH, num_hidden_layers=2, max_position_embeddings=512)
    return hf.BertModel(config, add_pooling_layer=False)


def linears(model: Model) -> list[LeavableLinear]:
    return [module for module in model._network.body.modules() if isinstance(module, LeavableLinear)]


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("cuts", [(0, 100, 399, 400), (0, 128, 130, 400)])
@pytest.mark.parametrize("backend", ["exact", "window", "topk", "lsh", "performer"])
def test_stretches_within_chunks_go_on_from_the_cache(backend: str, cuts: tuple[int, ...]) -> None:
    model = serve(network(lambda: gemma3(max_position_embeddings=512)).double(), 512)
    ids, pick = random_ids(TOKENS), small(backend)
    cuts = cuts if backend != "topk" else (0, 128, 256, 400)
    plain, left = model.open(TOKENS), model.open(TOKENS)
    for start, stop in zip(cuts, cuts[1:], strict=False):
        wanted, mine = (Slice(s, ids[start:stop], pick, "hidden", TOKENS) for s in (plain, left))
        result, _ = to_the_end(model.begin([mine]))
        assert close(told(result), told(model.step([wanted])), 1e-9)


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("backend", ["nystrom", "performer", "scatterbrain", "lsh", "kmeans"])
def test_what_must_see_all_keys_anew_runs_each_layer_of_an_encoder_whole(backend: str) -> None:
    model = serve(network(lambda: _longer(bert)).double(), 512)
    ids = random_ids(TOKENS)
    pick = choice(backend, 3, **({"num_landmarks": 8} if backend == "nystrom" else SMALL[backend]))
    result, pauses = to_the_end(model.begin([whole(model, ids, "hidden", pick)]))
    _, pauses_of_exact = to_the_end(model.begin([whole(model, ids, "hidden")]))
    assert close(told(result), told(model.step([whole(model, ids, "hidden", pick)])), 1e-9)
    assert pauses < pauses_of_exact


@pytest.mark.usefixtures("short_pieces")
def test_a_product_in_stretches_of_rows_equals_the_product() -> None:
    """With and without a bias, on any number of leading dimensions."""
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        for bias, shape in ((True, (1, 700, 48)), (False, (700, 48)), (True, (2, 3, 150, 48))):
            linear = torch.nn.Linear(48, 64, bias=bias)
            x = torch.randn(shape)
            wanted = linear(x)
            linear.__class__ = LeavableLinear
            asked: list[int] = []

            def work(linear: Any = linear, x: Tensor = x) -> Any:
                return linear(x)

            forward = LeavableForward(work, lambda: None)
            found: Any = forward.advance(lambda asked=asked: bool(asked.append(1)))  # type: ignore[misc]
            assert found.shape == wanted.shape and torch.allclose(found, wanted, atol=1e-6)
            assert len(asked) > 2 and torch.equal(linear(x), wanted)


def test_networks_are_made_leavable_once() -> None:
    made = network(FAMILIES["gpt2, learned positions"])
    model = serve(made)
    serve(made)
    hooked = [m for m in model._network.body.modules() if offer_to_pause in m._forward_pre_hooks.values()]
    assert len(hooked) == 2 * 4 and all(len(m._forward_pre_hooks) == 1 for m in hooked)
    _, pauses = to_the_end(model.begin([whole(model, random_ids(20))]))
    assert pauses == 2 * (4 + 1)


@pytest.mark.parametrize("want", ["nothing", "logits", "scores"])
@pytest.mark.parametrize("backend", ["exact", "window"])
def test_flops_of_a_slice_are_those_the_step_counts(decoder: Model, backend: str, want: str) -> None:
    ids, pick = random_ids(300), small(backend)
    work = decoder.step([whole(decoder, ids, want, pick)]).results[0].work
    told_flops = decoder.flops(300, 0, pick, want)  # type: ignore[arg-type]
    rows = {"nothing": 0, "logits": 1, "scores": 300}[want]
    linear = 2 * 300 * 3 * (48 * 48 * 2 + 48 * 16 * 2 + 3 * 48 * 64) + 2 * rows * 48 * 97
    assert told_flops.linear == pytest.approx(linear)
    call = decoder._network.plan.layers[0].call_shape(300, 300, 4, True)
    per_layer = load_backend(backend).flops(pick.params, call)
    assert told_flops.attention == pytest.approx(3 * per_layer)
    assert work.flops - linear == pytest.approx(told_flops.attention, rel=1.0)


def test_flops_count_a_networks_own_windows_as_such() -> None:
    model = serve(network(gemma3), 512)
    one = load_backend("window")
    layer = model._network.plan.layers[0]
    assert layer.window == 9
    local = one.flops(one.params.model_validate({"window": 9}), layer.call_shape(50, 350, 4, True))
    exact = load_backend("exact").flops(choice().params, layer.call_shape(50, 350, 4, True))
    assert model.flops(50, 300, choice(), "nothing").attention == pytest.approx(6 * local + exact)


def test_flops_grow_with_rows_and_start_and_refuse_nonsense(decoder: Model) -> None:
    def ask(rows: int, start: int) -> Flops:
        return decoder.flops(rows, start, choice(), "nothing")

    assert ask(10, 0).attention < ask(20, 0).attention < ask(20, 100).attention
    assert ask(20, 0).linear == ask(20, 100).linear == 2 * ask(10, 0).linear
    with pytest.raises(ValueError, match="rows must be at least 1"):
        ask(0, 5)
    with pytest.raises(ValueError, match="start at least 0"):
        ask(1, -1)
