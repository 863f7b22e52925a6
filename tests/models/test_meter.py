"""The measured error of what was served equals the one computed directly from every row's q, k and v,
whatever runs beside it, in whatever pieces."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import models.call
import models.products
import models.stretches
from kernels.contract import PackedResult
from models.contract import Choice, LayerError, MeasuredError, Prompt, Slice, StepResult, Verify, Want
from models.errors import NonFiniteOutput
from models.meter import SequenceMeter
from models.runner import Model
from tests.models.tiny import FAMILIES, bert, choice, gemma3, llama, modernbert, network, random_ids, serve

N = 300
ALL = Verify(rows="all")
TILED = {"query_tile": 128, "block_size": 32, "budget": 64}
HASHED = {"cluster_size": 16, "window": 8, "sinks": 2, "num_buckets": 8, "centre_keys": 16}
FEATURES = {"num_features": 16, "centre_keys": 16}
WINDOW = choice("window", window=16)
POOLED = choice("pooled", **TILED)
CHOICES = {
    "window": WINDOW,
    "pooled": POOLED,
    "performer": choice("performer", seed=5, **FEATURES),
    "lsh": choice("lsh", seed=5, **HASHED),
    "random": choice("random", seed=5, num_random=5),
}


def decoder(make: Callable[[], Any] = llama) -> Any:
    return network(lambda: make(max_position_embeddings=512)).double()


@pytest.fixture(scope="module")
def model() -> Model:
    return serve(decoder(), 512)


@dataclass
class Direct:
    """One layer's sums over all rows, by other code than the meter's."""

    difference: float = 0.0
    exact: float = 0.0
    residual: float = 0.0
    heads: Tensor | None = None
    largest: float = 0.0
    rows: int = 0

    @property
    def error(self) -> float:
        return math.sqrt(self.difference / self.exact)

    @property
    def of_residual(self) -> float:
        return math.sqrt(self.difference / self.residual)


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float, start: int, causal: bool) -> Tensor:
    """Softmax attention [1, H, n, Dv], every pair at once."""
    groups = q.shape[1] // k.shape[1]
    scores = scale * q @ k.repeat_interleave(groups, 1).mT
    if causal:
        rows = torch.arange(start, start + q.shape[2])[:, None]
        scores = scores.masked_fill(torch.arange(k.shape[2]) > rows, -math.inf)
    return scores.softmax(-1) @ v.repeat_interleave(groups, 1)


@dataclass
class Recorder:
    """Stands where a step calls the kernels; sums up what the calls for one sequence do."""

    projections: list[Tensor]
    found: dict[int, Direct] = field(default_factory=lambda: defaultdict(Direct))
    fault: Callable[[Tensor, Any, float], Tensor] | None = None

    def __call__(self, q: Tensor, segments: Sequence[Any], **call: Any) -> PackedResult:
        result = self.attend(q, segments, **call)
        if self.fault is not None and call["backend"] != "exact":
            result = replace(result, out=self.fault(q, segments[0], call["scale"]))
        self._sum(q, segments[0], result.out, call)
        return result

    def __post_init__(self) -> None:
        self.attend = models.call.attend_packed

    def _sum(self, q: Tensor, segment: Any, out: Tensor, call: dict[str, Any]) -> None:
        layer = self.found[call["layer"]]
        w_o = self.projections[call["layer"]]
        exact = dense(q, segment.k, segment.v, call["scale"], segment.start, call["causal"])
        project = [rows[0].transpose(0, 1).flatten(1) @ w_o.mT for rows in (out - exact, exact)]
        x, y = (rows.square().sum(-1) for rows in project)
        layer.difference += float(x.sum())
        layer.exact += float(y.sum())
        layer.largest = max(layer.largest, float((x / y).sqrt().max()))
        layer.rows += len(x)
        width = exact.shape[-1]
        heads = [
            ((out - exact)[0, h] @ w_o[:, h * width : (h + 1) * width].mT).square().sum()
            for h in range(q.shape[1])
        ]
        layer.heads = torch.stack(heads) + (0 if layer.heads is None else layer.heads)


@contextmanager
def recorded(made: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """What one sequence's steps do within the block, by ordinal of a layer to which the choice applies."""
    blocks = [m for m in made.modules() if any(hasattr(m, name) for name in ("self_attn", "attn"))]
    parts = [getattr(m, "self_attn", None) or m.attn for m in blocks]
    projections = [getattr(part, "o_proj", None) or part.Wo for part in parts]
    recorder = Recorder([p.weight.detach() for p in projections])

    def note(ordinal: int, block: nn.Module, args: Any, kwargs: Any) -> None:
        stream = args[0] if args else kwargs["hidden_states"]
        recorder.found[ordinal].residual += float(stream.square().sum())

    hooks = [
        block.register_forward_pre_hook(
            lambda block, args, kwargs, ordinal=i: note(ordinal, block, args, kwargs), with_kwargs=True
        )
        for i, block in enumerate(blocks)
    ]
    with monkeypatch.context() as patch:
        patch.setattr(models.call, "attend_packed", recorder)
        yield recorder
    for hook in hooks:
        hook.remove()


def read(
    model: Model,
    chosen: Choice,
    *,
    verify: Verify = ALL,
    sizes: Sequence[int] = (N,),
    pause: Callable[[], bool] | None = None,
    seed: int = 0,
    beside: Sequence[Callable[[], Slice]] = (),
) -> MeasuredError | None:
    """Read ``sum(sizes)`` tokens in chunks; what the meter says. ``beside``: what shares its first step."""
    ids = random_ids(sum(sizes), seed)
    state, meter, begin = model.open(len(ids)), model.meter(verify, chosen, len(ids)), 0
    for size in sizes:
        part = Slice(state, ids[begin : begin + size], chosen, "nothing", len(ids), meter=meter)
        slices = [part] if begin else [*(make() for make in beside), part]
        run(model, slices, pause)
        begin += size
    state.close()
    return meter.measured()


def run(model: Model, slices: Sequence[Slice], pause: Callable[[], bool] | None = None) -> StepResult:
    if pause is None:
        return model.step(slices)
    forward = model.begin(slices)
    for _ in range(10_000):
        result = forward.advance(pause)
        if result is not None:
            return result
    raise AssertionError("a forward that never ends")


def measured(found: MeasuredError | None) -> MeasuredError:
    assert found is not None
    return found


def same(one: MeasuredError | None, other: MeasuredError | None, tolerance: float = 1e-6) -> bool:
    """The same rows and, within rounding, the same figures."""
    one, other = measured(one), measured(other)
    return (one.rows, one.rows_total) == (other.rows, other.rows_total) and all(
        same_layer(a, b, tolerance) for a, b in zip(one.layers, other.layers, strict=True)
    )


def same_layer(a: LayerError, b: LayerError, tolerance: float) -> bool:
    def near(x: float | None, y: float | None) -> bool:
        return x is y is None or (
            x is not None and y is not None and math.isclose(x, y, rel_tol=tolerance, abs_tol=1e-12)
        )

    pairs = [
        (a.estimate, b.estimate),
        (a.approx_upper_95, b.approx_upper_95),
        (a.row_bound, b.row_bound),
        (a.of_residual, b.of_residual),
        *zip(a.head_shares, b.head_shares, strict=True),
    ]
    return (a.layer, a.rows, a.rows_total) == (b.layer, b.rows, b.rows_total) and all(
        near(*pair) for pair in pairs
    )


@pytest.mark.parametrize("sizes", [(N,), (128, 128, 44), (1, 299)], ids=["whole", "tiles", "ragged"])
@pytest.mark.parametrize("name", CHOICES)
def test_every_row_looked_at_gives_the_error_itself(
    model: Model, name: str, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with recorded(model._network.body, monkeypatch) as direct:
        found = measured(read(model, CHOICES[name], sizes=sizes))
    assert len(found.layers) == 3
    for layer in found.layers:
        its = direct.found[layer.layer]
        assert its.error > 1e-3
        assert layer.estimate == pytest.approx(its.error, rel=1e-5)
        assert layer.of_residual == pytest.approx(its.of_residual, rel=1e-5)
        assert layer.rows == layer.rows_total == its.rows == N
        assert its.heads is not None
        assert layer.head_shares == pytest.approx((its.heads / its.heads.sum()).tolist(), rel=1e-4)
        assert layer.row_bound is not None and layer.row_bound <= its.largest * (1 + 1e-5)
    assert found.estimate == max(layer.estimate for layer in found.layers)
    assert found.rows == found.rows_total == 3 * N and found.cost_ms > 0


@pytest.mark.parametrize("name", ["window", "pooled", "performer"])
def test_an_encoders_error_is_measured_in_the_layers_that_are_not_local(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = network(modernbert).double()
    encoder = serve(made, 400)
    applied = encoder.info.applied_layers
    with recorded(made, monkeypatch) as direct:
        direct.projections = [direct.projections[layer] for layer in applied]
        recorder_call = direct.__class__.__call__

        def chosen_alone(recorder: Recorder, q: Tensor, segments: Any, **call: Any) -> PackedResult:
            if call["params"] != CHOICES[name].params:
                return recorder.attend(q, segments, **call)
            return recorder_call(recorder, q, segments, **call)

        monkeypatch.setattr(Recorder, "__call__", chosen_alone)
        found = measured(read(encoder, CHOICES[name]))
    assert tuple(layer.layer for layer in found.layers) == applied == (0, 3)
    for ordinal, layer in enumerate(found.layers):
        assert (
            layer.estimate == pytest.approx(direct.found[ordinal].error, rel=1e-5) and layer.estimate > 1e-3
        )
        assert layer.rows == N


@pytest.mark.parametrize("family", ["bert", "gpt2, learned positions", "nomic", "granite, scaled logits"])
def test_the_output_projection_is_found_in_every_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = network(FAMILIES[family]).double()
    width = 48
    own = [
        module.weight.mT if "c_proj" in name else module.weight
        for name, module in made.named_modules()
        if name.endswith(("attention.output.dense", "o_proj", "attn.c_proj"))
    ]
    assert own and all(w.shape == (width, width) for w in own)
    served, chosen = serve(made, 64), choice("window", window=4)
    recorder = Recorder(own)
    with monkeypatch.context() as patch:
        patch.setattr(models.call, "attend_packed", recorder)
        found = measured(read(served, chosen, sizes=(60,)))
    for layer in found.layers:
        assert layer.estimate == pytest.approx(recorder.found[layer.layer].error, rel=1e-5)
        assert layer.of_residual is not None and layer.of_residual > 0


def test_exact_attention_has_no_error_and_costs_no_rows(model: Model) -> None:
    found = measured(read(model, choice(), sizes=(100, 200)))
    assert (found.estimate, found.approx_upper_95, found.row_bound) == (0.0, 0.0, 0.0)
    assert found.rows == 0 and found.rows_total == 3 * N
    assert found.layers[0].head_shares == (0.0,) * 6
    whole = choice("window", window=N)
    assert measured(read(model, whole)).estimate == 0.0


def test_a_chunk_in_which_every_pair_was_kept_counts_as_without_error(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    exact_rows = models.measuring.exact_rows

    def counted(q: Tensor, *rest: Any) -> Tensor:
        calls.append(q.shape[2])
        return exact_rows(q, *rest)

    monkeypatch.setattr(models.measuring, "exact_rows", counted)
    whole = read(model, WINDOW)
    assert sum(calls) == 3 * N
    calls.clear()
    assert same(whole, read(model, WINDOW, sizes=(16, 284)))
    assert sum(calls) == 3 * (N - 16)


def test_rows_of_many_small_chunks_are_computed_together(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    exact_rows = models.measuring.exact_rows

    def counted(q: Tensor, *rest: Any) -> Tensor:
        calls.append(q.shape[2])
        return exact_rows(q, *rest)

    monkeypatch.setattr(models.measuring, "exact_rows", counted)
    verify = Verify(rows=100, seed=1)
    whole = read(model, WINDOW, verify=verify)
    assert len(calls) == 3
    calls.clear()
    assert same(whole, read(model, WINDOW, verify=verify, sizes=[10] * 30))
    assert sum(calls) == measured(whole).rows - 3 * 10  # the first chunk kept every pair
    assert len(calls) <= sum(calls) / models.meter.HELD_ROWS + 3


def test_what_is_measured_so_far_is_what_was_computed_so_far(model: Model) -> None:
    ids, chosen = random_ids(N), choice("window", window=4)
    state, meter, told = model.open(N), model.meter(ALL, chosen, N), []
    for begin in range(0, N, 20):
        chunk = ids[begin : begin + 20]
        model.step([Slice(state, chunk, chosen, "nothing", N, meter=meter)])
        told.append((meter.measured(), meter.held_bytes))
    rows = [(0, 0) if found is None else (found.rows, found.rows_total) for found, _ in told]
    assert rows == [
        (3 * n, 3 * n) for n in (0, 0, 60, 60, 60, 120, 120, 120, 180, 180, 180, 240, 240, 240, 300)
    ]
    assert told[2][0] is not told[4][0] and same(told[2][0], told[4][0], 0.0)
    row_bytes = 3 * 6 * 2 * 8 * 8  # layers, heads, query and output, their width, fp64
    assert [held for _, held in told[:4]] == [20 * row_bytes, 40 * row_bytes, 0, 20 * row_bytes]
    assert told[-1][1] == 0
    first = measured(told[2][0]).layers[2].of_residual
    beginning = model.meter(ALL, chosen, 60)
    model.step([Slice(model.open(60), ids[:60], chosen, "nothing", 60, meter=beginning)])
    assert first == pytest.approx(measured(beginning.measured()).layers[2].of_residual, rel=1e-9)


@pytest.mark.parametrize("verify", [Verify(), ALL], ids=["some rows", "all rows"])
@pytest.mark.parametrize("total", [2, 30, 129, N])
def test_a_text_whose_last_token_nobody_reads_is_measured_to_its_end(
    model: Model, total: int, verify: Verify
) -> None:
    """As scoring reads it."""
    ids, state, chosen = random_ids(total), model.open(total), choice("window", window=4)
    meter = model.meter(verify, chosen, total)
    for begin in range(0, total - 1, 100):
        chunk = ids[begin : min(begin + 100, total - 1)]
        model.step([Slice(state, chunk, chosen, "nothing", total, meter=meter)])
    found = measured(meter.measured())
    assert found.rows_total == 3 * (total - 1) and meter.held_bytes == 0
    assert total == 2 or found.estimate > 0
    if verify == ALL or total <= 128:
        assert found.rows in (0, found.rows_total)


@pytest.mark.parametrize("name", ["window", "pooled", "lsh"])
@pytest.mark.parametrize("rows", [None, 20])
def test_neither_chunks_nor_pauses_nor_neighbours_move_what_is_drawn(
    model: Model, name: str, rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models.stretches, "STRETCH_FLOPS", 1e5)
    monkeypatch.setattr(models.measuring, "STRETCH_FLOPS", 1e5)
    monkeypatch.setattr(models.products, "PRODUCT_FLOPS", 1e5)
    verify, chosen = Verify(rows=rows, seed=7), CHOICES[name]
    alone = read(model, chosen, verify=verify)
    assert measured(alone).rows < 3 * N
    assert same(alone, read(model, chosen, verify=verify, sizes=(128, 128, 44)))
    assert same(alone, read(model, chosen, verify=verify, pause=lambda: True))
    assert same(alone, read(model, chosen, verify=verify, pause=lambda: True, sizes=(128, 172)))
    assert same(alone, read(model, chosen, verify=verify, beside=neighbours(model, chosen)))
    assert same(
        alone, read(model, chosen, verify=verify, pause=lambda: True, beside=neighbours(model, chosen))
    )
    assert not same(alone, read(model, chosen, verify=replace(verify, seed=8)))


def neighbours(model: Model, chosen: Choice) -> list[Callable[[], Slice]]:
    """With a meter and without, under the same attention and another."""

    def make(n: int, under: Choice, verify: Verify | None) -> Callable[[], Slice]:
        def slice_() -> Slice:
            meter = model.meter(verify, under, n) if verify is not None else None
            return Slice(model.open(n), random_ids(n, n), under, "nothing", n, meter=meter)

        return slice_

    return [make(40, chosen, None), make(150, choice(), None), make(70, WINDOW, ALL), make(200, chosen, ALL)]


def test_neighbours_get_their_own_figures_too(model: Model) -> None:
    ids = random_ids(200, 200)
    meters = []
    for crowd in (False, True):
        meter = model.meter(ALL, POOLED, 200)
        mine = Slice(model.open(200), ids, POOLED, "nothing", 200, meter=meter)
        model.step([*(make() for make in neighbours(model, POOLED)), mine] if crowd else [mine])
        meters.append(meter)
    assert same(meters[0].measured(), meters[1].measured())


def test_a_meter_changes_nothing_that_is_served(model: Model) -> None:
    ids = random_ids(N)
    results = []
    for meter in (None, model.meter(Verify(), POOLED, N)):
        part = Slice(model.open(N), ids, POOLED, "hidden", N, meter=meter)
        results.append(model.step([part]).results[0])
    assert results[0].hidden is not None and results[1].hidden is not None
    assert torch.equal(results[0].hidden, results[1].hidden)
    assert results[0].work.flops == results[1].work.flops
    assert results[0].work.pairs_computed == results[1].work.pairs_computed


def test_no_hook_stays_behind(model: Model) -> None:
    def hooks() -> int:
        return sum(
            len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model._network.body.modules()
        )

    before = hooks()
    read(model, WINDOW)
    meter = model.meter(ALL, WINDOW, N)
    forward = model.begin([Slice(model.open(N), random_ids(N), WINDOW, "nothing", N, meter=meter)])
    for _ in range(12):
        assert forward.advance(lambda: True) is None
    assert hooks() > before
    forward.close()
    assert hooks() == before


def test_another_step_in_the_middle_of_a_measured_one_is_not_counted(model: Model) -> None:
    ids, alone = random_ids(N), read(model, WINDOW)
    meter = model.meter(ALL, WINDOW, N)
    forward = model.begin([Slice(model.open(N), ids, WINDOW, "nothing", N, meter=meter)])
    result = None
    while result is None:
        result = forward.advance(lambda: True)
        assert read(model, POOLED, sizes=(40,), verify=ALL) is not None
        model.step([Slice(model.open(30), random_ids(30), WINDOW, "nothing", 30)])
    assert same(alone, meter.measured())


def test_a_step_within_a_measured_one_is_not_taken_for_it(model: Model) -> None:
    meter, alone = model.meter(ALL, WINDOW, N), read(model, WINDOW)
    forward = model.begin([Slice(model.open(N), random_ids(N), WINDOW, "nothing", N, meter=meter)])
    within, nested = 0, False

    def step_instead_of_pausing() -> bool:
        nonlocal within, nested
        if not nested:  # its own yield points come here too
            nested = True
            model.step([Slice(model.open(30), random_ids(30), WINDOW, "nothing", 30)])
            within, nested = within + 1, False
        return False

    assert forward.advance(step_instead_of_pausing) is not None
    assert within > 3 and same(alone, meter.measured())


def test_a_planted_fault_is_seen(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that loses one block of keys for the rows behind it."""

    def without_a_block(q: Tensor, segment: Any, scale: float) -> Tensor:
        right = dense(q, segment.k, segment.v, scale, segment.start, True)
        rows = torch.arange(segment.start, segment.start + q.shape[2])
        left = [i for i in range(segment.k.shape[2]) if not 64 <= i < 96]
        groups = q.shape[1] // segment.k.shape[1]
        k, v = (x[:, :, left].repeat_interleave(groups, 1) for x in (segment.k, segment.v))
        scores = (scale * q @ k.mT).masked_fill(torch.tensor(left) > rows[:, None], -math.inf)
        return torch.where((rows >= 96)[:, None], scores.softmax(-1) @ v, right)

    healthy = choice("window", window=N - 1)
    with recorded(model._network.body, monkeypatch) as direct:
        fine = measured(read(model, healthy))
    with recorded(model._network.body, monkeypatch) as direct:
        direct.fault = without_a_block
        faulty = measured(read(model, healthy))
        sampled = measured(read(model, healthy, verify=Verify(rows=32, seed=3)))
    assert fine.estimate < 0.05 * faulty.estimate
    for layer, drawn in zip(faulty.layers, sampled.layers, strict=True):
        assert layer.estimate == pytest.approx(direct.found[layer.layer].error, rel=1e-3)
        assert drawn.rows < N and 0.5 < drawn.estimate / layer.estimate < 2


def decode(model: Model, verify: Verify, steps: int, crowd: int) -> SequenceMeter:
    prompt, chosen = 100, choice("window", window=8)
    metered = model.meter(verify, chosen, prompt, decode=True)
    states = []
    for i in range(crowd + 1):
        states.append(model.open(prompt + steps))
        model.step([Slice(states[-1], random_ids(prompt, i), chosen, "nothing", prompt)])
    told = random_ids(steps, 99)
    for t in range(steps):
        meters = [metered, *[None] * crowd]
        model.step(
            [
                Slice(state, [told[t]], chosen, "logits", prompt, meter=meter)
                for state, meter in zip(states, meters, strict=True)
            ]
        )
    return metered


def test_every_decode_step_looked_at_gives_the_error_itself(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with recorded(model._network.body, monkeypatch) as direct:
        chosen = choice("window", window=8)
        state, meter = model.open(130), model.meter(ALL, chosen, 100, decode=True)
        model.step([Slice(state, random_ids(100), chosen, "nothing", 100)])
        assert meter.measured() is None
        direct.found.clear()
        for token in random_ids(30, 99):
            model.step([Slice(state, [token], chosen, "logits", 100, meter=meter)])
    for layer in measured(meter.measured()).layers:
        assert layer.estimate == pytest.approx(direct.found[layer.layer].error, rel=1e-5)
        assert layer.of_residual == pytest.approx(direct.found[layer.layer].of_residual, rel=1e-5)
        assert layer.rows == layer.rows_total == 30


def test_decode_steps_that_kept_every_pair_count_as_without_error(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = choice("window", window=112)
    with recorded(model._network.body, monkeypatch) as direct:
        state, meter = model.open(130), model.meter(ALL, chosen, 100, decode=True)
        model.step([Slice(state, random_ids(100), chosen, "nothing", 100)])
        direct.found.clear()
        for token in random_ids(30, 99):
            model.step([Slice(state, [token], chosen, "logits", 100, meter=meter)])
    for layer in measured(meter.measured()).layers:
        assert layer.estimate == pytest.approx(direct.found[layer.layer].error, rel=1e-5)
        assert layer.rows == 30 and layer.estimate > 0


def test_some_decode_steps_are_drawn_the_same_ones_in_every_layer_and_company(model: Model) -> None:
    alone, crowd = (decode(model, Verify(seed=2), 120, crowd) for crowd in (0, 3))
    assert same(alone.measured(), crowd.measured())
    found = measured(alone.measured())
    assert found.rows_total == 3 * 120 and 0 < found.layers[0].rows < 40
    assert len({layer.rows for layer in found.layers}) == 1
    assert found.row_bound is None


def test_rows_found_in_the_cache_are_not_counted() -> None:
    served = serve(decoder(), 512)
    served.limit_cached(1 << 30)
    ids = random_ids(N)

    def ask() -> MeasuredError:
        state = served.open(N, Prompt(ids, WINDOW))
        meter = served.meter(ALL, WINDOW, N)
        served.step([Slice(state, ids[state.length :], WINDOW, "nothing", N, meter=meter)])
        state.close()
        return measured(meter.measured())

    first, second = ask(), ask()
    assert first.layers[0].rows_total == N
    assert second.layers[0].rows_total == second.layers[0].rows == N - 256


def test_a_failed_step_leaves_the_meter_as_it_was(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random_ids(N)
    state, meter = model.open(N), model.meter(Verify(rows=20), POOLED, N)

    def step(begin: int, stop: int, want: Want = "nothing") -> None:
        model.step([Slice(state, ids[begin:stop], POOLED, want, N, meter=meter)])

    step(0, 128)
    before, held = meter.measured(), meter.held_bytes
    assert held > 0
    with monkeypatch.context() as patch:
        patch.setattr(models.results, "all_finite", lambda values: False)
        with pytest.raises(NonFiniteOutput):
            step(128, 256)
    assert meter.measured() is before
    forward = model.begin([Slice(state, ids[128:256], POOLED, "nothing", N, meter=meter)])
    for _ in range(20):
        forward.advance(lambda: True)
    forward.close()
    assert meter.measured() is before and meter.held_bytes == held
    step(128, 256)
    step(256, N)
    assert same(meter.measured(), read(model, POOLED, verify=Verify(rows=20)))


def test_layers_are_named_as_the_model_numbers_them() -> None:
    hybrid = serve(decoder(gemma3), 512)
    assert hybrid.info.applied_layers == (5,)
    found = measured(read(hybrid, WINDOW))
    assert [layer.layer for layer in found.layers] == [5]
    with pytest.raises(ValueError, match=r"layers: \[0, 9\] are not among the layers 5 .. 5"):
        hybrid.meter(Verify(layers=(0, 5, 9)), WINDOW, N)
    with pytest.raises(ValueError, match="layers: none is given"):
        hybrid.meter(Verify(layers=()), WINDOW, N)


def test_a_model_whose_layers_are_all_local_has_none_to_measure() -> None:
    local = serve(network(FAMILIES["mistral, all layers local"]), 64)
    assert local.info.applied_layers == ()
    with pytest.raises(ValueError, match="layers: none is given"):
        local.meter(Verify(), WINDOW, 10)
    with pytest.raises(ValueError, match=r"layers: \[0\] are not among the layers \(none\)"):
        local.meter(Verify(layers=(0,)), WINDOW, 10)


def test_some_layers_alone_can_be_measured(model: Model) -> None:
    every, some = (read(model, POOLED, verify=Verify("all", layers)) for layers in (None, (2, 0)))
    chosen = [measured(every).layers[i] for i in (0, 2)]
    assert [layer.layer for layer in measured(some).layers] == [0, 2]
    assert all(same_layer(a, b, 1e-9) for a, b in zip(chosen, measured(some).layers, strict=True))


def test_a_model_whose_output_projection_is_not_known_says_so() -> None:
    served = serve(network(bert), 64)
    broken = replace(served._network, places=["BertSelfAttention has no output projection"] * 2)
    with pytest.raises(ValueError, match="verify: the output projection of layer 0 is not known: Bert"):
        Model(broken, served.info, None).meter(ALL, WINDOW, 10)


Kind = Literal["choice", "total", "beyond", "prompt", "gap"]


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("choice", "slice 0: its meter was made for"),
        ("total", "slice 0: its meter was made for a prompt of 100 tokens, total is 90"),
        ("beyond", "slice 0: its meter measures the prompt: generated tokens need"),
        ("prompt", "slice 0: its meter measures generated tokens: the prompt needs"),
        ("gap", "slice 0: its meter has read up to position 10, the slice begins at 20"),
    ],
)
def test_a_meter_that_does_not_fit_the_slice_is_refused(model: Model, kind: Kind, told: str) -> None:
    state, meter = model.open(120), model.meter(ALL, WINDOW, 100, decode=kind == "prompt")
    ids = random_ids(120)

    def step(begin: int, stop: int, chosen: Choice = WINDOW, total: int = 100, metered: bool = True) -> None:
        used = meter if metered else None
        model.step([Slice(state, ids[begin:stop], chosen, "nothing", total, meter=used)])

    with pytest.raises(ValueError, match=told):
        if kind == "choice":
            step(0, 10, POOLED)
        elif kind == "total":
            step(0, 10, total=90)
        elif kind == "beyond":
            step(0, 100)
            step(100, 101)
        elif kind == "prompt":
            step(0, 10)
        else:
            step(0, 10)
            step(10, 20, metered=False)
            step(20, 30)


def test_a_meter_is_of_one_sequence(model: Model) -> None:
    meter = model.meter(ALL, WINDOW, 10)
    parts = [Slice(model.open(10), random_ids(10), WINDOW, "nothing", 10, meter=meter) for _ in range(2)]
    with pytest.raises(ValueError, match="a meter may appear once in a step"):
        model.step(parts)
