"""What an attention costs and loses: errors, perplexities, choices at equal time, and the results file."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels import backend_names
from kernels.contract import Call, Params
from kernels.math.cache import DRAWS
from kernels.math.kept import KeptStates
from kernels.registry import load as load_backend
from models import quality, quality_contenders, quality_error, quality_report
from models.contract import Encoding, ModelError
from models.places import Place, _place
from models.quality_choice import best_within, error_in_time, pareto, remainder_gains
from models.quality_contenders import (
    Contender,
    contender,
    default_contenders,
    read_contenders,
    refuse_cut_tiles,
    refuse_unsupported,
    setting,
    unsuitable,
)
from models.quality_error import ErrorRow, measure_errors
from models.quality_ladders import DECODER, ENCODER, Ladders
from models.quality_perplexity import PerplexityRow, compare, read_text, standard_error
from models.quality_plot import _scatter, decoder_panels, pyplot, write_plots
from models.quality_record import LayerRecord, record_layers
from models.quality_report import markdown
from models.quality_run import layer_step
from models.quality_store import Results, begin, load, open_results, save
from models.quality_tables import shown_layers
from models.runner import Model
from tests.models.tiny import (
    bert,
    choice,
    close,
    llama,
    modernbert,
    network,
    nomic,
    random_ids,
    roberta,
    serve,
)

TOKENS = 120
IDS = random_ids(TOKENS + 1)


@pytest.fixture(scope="module")
def model() -> Model:
    return serve(network(llama), max_tokens=256)


@pytest.fixture(scope="module")
def records(model: Model) -> list[LayerRecord]:
    return record(model, 50)


def record(model: Model, chunk_tokens: int) -> list[LayerRecord]:
    return record_layers(model._network, IDS[:TOKENS], (0, 2), chunk_tokens)


def errors(records: list[LayerRecord], *contenders: Contender, chunk_tokens: int = 50) -> list[ErrorRow]:
    return measure_errors(records, contenders, chunk_tokens=chunk_tokens)


def softmax_of(record: LayerRecord, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Output [N, H Dv] and weights [H, N, M] of softmax over the kept pairs, pair by pair."""
    q, k, v = (x[0].double() for x in (record.q, record.k, record.v))
    groups = q.shape[0] // k.shape[0]
    logits = q @ k.repeat_interleave(groups, 0).transpose(1, 2) * record.scale
    weights = logits.masked_fill(~keep, -math.inf).softmax(-1)
    return (weights @ v.repeat_interleave(groups, 0)).transpose(0, 1).flatten(1), weights


def window_of(width: int) -> tuple[Tensor, Tensor]:
    """Boolean [N, N]: pairs of causal attention, and of a window."""
    i, j = torch.arange(TOKENS)[:, None], torch.arange(TOKENS)[None]
    return j <= i, (j <= i) & (j > i - width)


def test_exact_against_itself_has_no_error_and_no_dropped_mass(records: list[LayerRecord]) -> None:
    (row,) = errors(records, contender("exact", {}))
    assert row.error == row.worst_error == row.dropped_true == 0
    assert row.density == 1 and row.layers == [0, 2]
    assert row.attention_s > 0 and row.exact_attention_s > 0


def test_the_error_is_that_of_the_outputs_through_the_output_projection(records: list[LayerRecord]) -> None:
    (row,) = errors(records, contender("window", {"window": 9}))
    causal, window = window_of(9)
    for record, error in zip(records, row.layer_errors, strict=True):
        exact, got = softmax_of(record, causal)[0], softmax_of(record, window)[0]
        w_o = record.w_o.double().T
        wanted = ((got - exact) @ w_o).norm() / (exact @ w_o).norm()
        assert error == pytest.approx(float(wanted), rel=1e-4)
    assert row.error == pytest.approx(sum(row.layer_errors) / 2)


def test_the_mass_truly_dropped_is_what_exact_gives_to_the_keys_left_out(records: list[LayerRecord]) -> None:
    (row,) = errors(records, contender("window", {"window": 9}))
    causal, window = window_of(9)
    outside = [softmax_of(record, causal)[1][:, ~window].sum() / (6 * TOKENS) for record in records]
    assert row.dropped_true == pytest.approx(float(sum(outside) / 2), rel=1e-4)
    assert row.density == pytest.approx(float(window.sum() / causal.sum()))


def test_the_error_of_a_window_falls_as_it_grows(records: list[LayerRecord]) -> None:
    rows = errors(records, *(contender("window", {"window": width}) for width in (2, 8, 30, 100, 120)))
    found = [row.error for row in rows]
    assert found == sorted(found, reverse=True) and found[0] > 0.01 > 1e-5 > found[-1]
    assert all(row.dropped_true is not None for row in rows)


def test_the_chunks_of_a_reading_do_not_change_what_is_recorded(model: Model) -> None:
    whole = record(model, 0)
    for chunk_tokens in (1, 50, 512):
        for one, other in zip(record(model, chunk_tokens), whole, strict=True):
            assert close(one.q, other.q) and close(one.k, other.k) and close(one.v, other.v)


def test_the_chunks_of_a_measurement_do_not_change_the_error(records: list[LayerRecord]) -> None:
    wanted = errors(records, contender("sinks", {"window": 7}), chunk_tokens=0)[0]
    for chunk_tokens in (1, 50, 119):
        row = errors(records, contender("sinks", {"window": 7}), chunk_tokens=chunk_tokens)[0]
        assert row.error == pytest.approx(wanted.error, rel=1e-4)
        assert row.density == wanted.density


def test_calls_are_chunks_over_the_keys_so_far_with_summaries_and_states_of_their_own_layer(
    records: list[LayerRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: dict[str, list[tuple[int, int, int, Any, Any]]] = {"exact": [], "window": []}

    def watched(name: str) -> Any:
        backend = load_backend(name)

        def execute(q: Tensor, k: Tensor, v: Tensor, params: Params, call: Call) -> Any:
            calls[name].append((call.layer, call.start, k.shape[2], call.summaries, call.kept))
            return backend.impls["torch"](q, k, v, params, call)

        return replace(backend, impls={**backend.impls, "torch": execute})

    monkeypatch.setattr(quality_error, "load_backend", watched)
    measure_errors(records, [contender("window", {})], chunk_tokens=50, repeat=2)
    chunks = [(0, 50), (50, 100), (100, 120)]
    wanted = [(layer, *chunk) for layer in (0, 2) for chunk in chunks for _ in range(2)]
    for found in calls.values():
        assert [call[:3] for call in found] == wanted
    for what in (3, 4):
        held = {name: [id(call[what]) for call in found] for name, found in calls.items()}
        assert len({each for found in held.values() for each in found}) == 8  # layers, contenders, rounds
        assert held["window"][:6] == held["window"][:2] * 3, "each round keeps its own from chunk to chunk"
    assert all(isinstance(call[4], KeptStates) for found in calls.values() for call in found)


def test_a_repeated_call_finds_nothing_that_an_earlier_one_left(
    records: list[LayerRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    known: dict[tuple[int, int], set[int]] = {}
    backend = load_backend("pages")

    def execute(q: Tensor, k: Tensor, v: Tensor, params: Params, call: Call) -> Any:
        assert call.summaries is not None
        drawn.append(len(DRAWS))
        DRAWS.get(("left behind", call.layer, call.start), lambda: q)
        known.setdefault((call.layer, call.start), set()).add(call.summaries.nbytes)
        return backend.impls["torch"](q, k, v, params, call)

    watched = replace(backend, impls={**backend.impls, "torch": execute})
    monkeypatch.setattr(
        quality_error, "load_backend", lambda name: watched if name == "pages" else load_backend(name)
    )
    small = contender("pages", {"query_tile": 128, "block_size": 32, "budget": 32})
    long = [
        replace(each, **{name: getattr(each, name).repeat(1, 1, 4, 1) for name in "qkv"}) for each in records
    ]
    measure_errors(long, [small], chunk_tokens=128, repeat=3)
    assert len(drawn) == 2 * 4 * 3 and set(drawn) == {0}
    assert all(len(sizes) == 1 for sizes in known.values()), "the same in each of the three calls"
    assert len(set.union(*known.values())) > 1


def test_an_encoder_reads_at_once_or_not_at_all() -> None:
    encoder = serve(network(bert))._network
    with pytest.raises(ModelError, match="reads a text at once: give 0 chunk tokens"):
        record_layers(encoder, IDS[:20], (0,), 8)
    (record,) = record_layers(encoder, IDS[:20], (1,), 0)
    assert record.index == 1 and not record.plan.causal
    assert record.q.shape == record.k.shape == record.v.shape == (1, 6, 20, 8)


@pytest.mark.parametrize("backend", ["sinks", "bigbird", "pages"])
def test_whole_documents_are_measured_in_both_directions(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = serve(network(bert), max_tokens=256)
    records = record_layers(encoder._network, IDS[:TOKENS], (0, 1), 0)
    seen: list[Call] = []
    real = load_backend(backend)

    def execute(q: Tensor, k: Tensor, v: Tensor, params: Params, call: Call) -> Any:
        seen.append(call)
        return real.impls["torch"](q, k, v, params, call)

    watched = replace(real, impls={**real.impls, "torch": execute})
    monkeypatch.setattr(
        quality_error, "load_backend", lambda name: watched if name == backend else load_backend(name)
    )
    (row,) = errors(records, contender(backend, {}), chunk_tokens=0)
    assert [(call.causal, call.start, call.summaries, call.kept) for call in seen] == [
        (False, 0, None, None)
    ] * 2
    assert row.layers == [0, 1] and row.tokens == TOKENS


def altered(name: str, monkeypatch: pytest.MonkeyPatch, **capabilities: Any) -> None:
    """``window`` with other capabilities, and whatever ``name`` stands for in its place."""
    real = load_backend("window")

    def execute(q: Tensor, k: Tensor, v: Tensor, params: Params, call: Call) -> Any:
        result = real.impls["torch"](q, k, v, params, call)
        measured = None if call.start else 0.25
        lse = None if capabilities.get("approximates") else result.lse
        stats = replace(result.stats, dropped_mass=measured)
        return replace(result, lse=lse, stats=stats, dropped=None)

    able = replace(real.capabilities, **capabilities)
    watched = replace(real, capabilities=able, impls={**real.impls, "torch": execute})
    monkeypatch.setattr(
        quality_error, "load_backend", lambda each: watched if each == name else load_backend(each)
    )


def test_a_backend_that_approximates_has_no_dropped_mass_and_no_recall(
    records: list[LayerRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    altered("window", monkeypatch, approximates=True)
    (row,) = errors(records, contender("window", {"window": 9}))
    assert row.dropped_estimate is row.dropped_true is row.recall is None
    assert row.error > 0.01


def test_an_estimate_counts_the_calls_that_made_one(
    records: list[LayerRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    altered("window", monkeypatch)
    (row,) = errors(records, contender("window", {"window": 9}))
    assert row.dropped_estimate == pytest.approx(0.25)
    assert row.dropped_true is not None and row.recall == 1 - row.dropped_true


def test_a_tile_selecting_backend_runs_spread_over_threads_as_served(
    records: list[LayerRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    spread: list[Any] = []

    def run_spread(execute: Any, *call: Any) -> Any:
        spread.append(execute)
        return execute(*call)

    monkeypatch.setattr(quality_error, "run_spread", run_spread)
    errors(records, contender("window", {}), contender("pooled", {}), chunk_tokens=0)
    assert set(spread) == {load_backend("pooled").impls["torch"]} and len(spread) == 2


def test_what_a_model_carries_for_a_backend_reaches_it_layer_by_layer(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    carrying = replace(model._network, learned={"window": ("first", "second", "third")})
    found = record_layers(carrying, IDS[:40], (0, 2), 20)
    assert [record.learned for record in found] == [{"window": "first"}, {"window": "third"}]
    given: list[object] = []
    real = load_backend("window")

    def execute(q: Tensor, k: Tensor, v: Tensor, params: Params, call: Call) -> Any:
        given.append(call.learned)
        return real.impls["torch"](q, k, v, params, call)

    watched = replace(real, impls={**real.impls, "torch": execute})
    monkeypatch.setattr(
        quality_error, "load_backend", lambda name: watched if name == "window" else load_backend(name)
    )
    errors(found, contender("window", {}), chunk_tokens=20)
    assert given == ["first"] * 2 + ["third"] * 2


def test_a_layer_whose_output_projection_is_not_known_is_refused(model: Model) -> None:
    places = [*model._network.places]
    places[2] = "it has no parts"
    other = replace(model._network, places=places)
    assert record_layers(other, IDS[:20], (0, 1), 0)
    with pytest.raises(ModelError, match="output projection of layer 2 is not known: it has no parts"):
        record_layers(other, IDS[:20], (0, 2), 0)


def test_an_output_projection_that_is_missing_or_of_another_width_is_not_taken() -> None:
    module = nn.Module()
    module.o_proj = nn.Linear(48, 40)
    place = _place(module, {}, 48)
    assert isinstance(place, Place) and torch.equal(place.w_o, module.o_proj.weight)
    other, empty = _place(module, {}, 50), _place(nn.Module(), {}, 48)
    assert isinstance(other, str) and "no output projection of 50 inputs" in other and "o_proj (Lin" in other
    assert isinstance(empty, str) and "it has no parts" in empty


@pytest.mark.parametrize("make", [bert, roberta, nomic, modernbert, llama])
def test_the_output_projection_is_what_the_network_multiplies_attention_with(make: Any) -> None:
    made = network(make)
    layer = 0 if make is not modernbert else 3
    (record,) = record_layers(serve(made)._network, IDS[:20], (layer,), 0)
    projections = [
        child.weight
        for name, child in made.named_modules()
        if re.search(rf"layers?\.{layer}\.(attn|self_attn|attention)\.(o_proj|Wo|output\.dense)$", name)
    ]
    assert len(projections) == 1 and torch.equal(record.w_o, projections[0])


def test_perplexity_is_that_of_the_networks_own_logits(model: Model) -> None:
    reading = read_text(model, IDS, choice(), 50)
    row = compare(TOKENS, contender("exact", {}), reading, reading, skipped=10)
    made = network(llama)
    made.set_attn_implementation("eager")
    with torch.no_grad():
        loss = nn.functional.cross_entropy(
            made(input_ids=torch.tensor([IDS])).logits[0, 10:-1], torch.tensor(IDS[11:])
        )
    assert row.perplexity == pytest.approx(math.exp(float(loss)), rel=1e-4)
    assert row.change_percent == row.standard_error_percent == 0


def test_chunked_reading_equals_the_whole_for_exact(model: Model) -> None:
    whole = read_text(model, IDS, choice(), 0).scores
    for chunk_tokens in (1, 33, 120, 512):
        assert close(read_text(model, IDS, choice(), chunk_tokens).scores, whole)


def test_the_change_of_perplexity_is_paired_with_its_standard_error(model: Model) -> None:
    each = contender("window", {"window": 3})
    exact, reading = read_text(model, IDS, choice(), 50), read_text(model, IDS, each.choice(0), 50)
    row = compare(TOKENS, each, reading, exact, skipped=20)
    assert row.change_percent == pytest.approx(100 * (row.perplexity / row.exact_perplexity - 1))
    spread = standard_error((exact.scores - reading.scores)[20:].double())
    assert spread is not None and spread > 0
    assert row.standard_error_percent == pytest.approx(
        100 * row.perplexity / row.exact_perplexity * spread, rel=1e-6
    )
    assert 0 < row.density < 1 and row.attention_s < row.total_s


def test_the_standard_error_is_that_of_the_means_of_blocks_of_64_tokens() -> None:
    difference = torch.randn(10 * 64, dtype=torch.float64)
    means = difference.view(10, 64).mean(-1)
    assert standard_error(difference) == pytest.approx(float(means.std()) / 10**0.5)
    repeated = means.repeat_interleave(64)
    naive = float(repeated.std()) / len(repeated) ** 0.5
    assert (standard_error(repeated) or 0) > 7 * naive, "what hangs together counts once"
    assert standard_error(difference[:64]) is None
    assert standard_error(torch.full((100,), 0.5)) == 0


def test_a_last_block_that_is_cut_weighs_by_its_tokens() -> None:
    torch.manual_seed(0)
    drawn = [torch.randn(100) + 0.1 for _ in range(4000)]
    spread = float(torch.stack([d.mean() for d in drawn]).std())
    found = [standard_error(d) or 0.0 for d in drawn]
    assert (sum(e * e for e in found) / len(found)) ** 0.5 == pytest.approx(spread, rel=0.1)


def test_a_text_no_longer_than_what_is_skipped_has_no_perplexity(model: Model) -> None:
    reading = read_text(model, IDS[:65], choice(), 0)
    with pytest.raises(ValueError, match="64 tokens leave none to score after the first 64"):
        compare(64, contender("exact", {}), reading, reading)


def error_row(backend: str, share: float, error: float, **full: Any) -> ErrorRow:
    return ErrorRow(
        tokens=4096,
        backend=backend,
        params=full,
        full=full,
        error=error,
        layers=[0, 1],
        layer_errors=[error, error],
        attention_s=2 * share,
        selection_s=0.1 * share,
        exact_attention_s=2.0,
        density=0.5,
        density_computed=0.6,
        dropped_estimate=None,
        dropped_true=0.1,
    )


LADDER = [
    error_row("exact", 0.2, 0.0),
    error_row("window", 0.20, 0.9, window=1),
    error_row("window", 0.30, 0.5, window=2),
    error_row("window", 0.34, 0.6, window=3),
    error_row("window", 0.50, 0.3, window=4),
    error_row("sinks", 0.36, 0.1),
    error_row("topk", 3.0, 0.01),
]


@pytest.mark.parametrize(
    ("budget", "wanted"),
    [
        (0.1, []),
        (0.25, [("window", 0.9)]),
        (0.35, [("window", 0.5)]),
        (0.36, [("sinks", 0.1), ("window", 0.5)]),
        (0.50, [("sinks", 0.1), ("window", 0.3)]),
        (4.0, [("topk", 0.01), ("sinks", 0.1), ("window", 0.3)]),
    ],
)
def test_within_a_time_each_backend_shows_its_least_error(
    budget: float, wanted: list[tuple[str, float]]
) -> None:
    assert [(row.backend, row.error) for row in best_within(LADDER, budget)] == wanted


def test_of_equal_errors_the_faster_setting_is_chosen() -> None:
    rows = [error_row("window", share, 0.5, window=int(100 * share)) for share in (0.3, 0.2, 0.4)]
    assert best_within(rows, 0.5)[0].time_share == pytest.approx(0.2)


def test_what_is_beaten_in_time_and_error_is_not_on_the_front() -> None:
    assert [row.error for row in pareto(LADDER[1:5])] == [0.9, 0.5, 0.3]


def test_the_error_between_two_settings_lies_on_a_line_in_logarithms() -> None:
    rows = [error_row("pages", share, error) for share, error in ((0.1, 0.8), (0.4, 0.2))]
    assert error_in_time(rows, 0.2) == pytest.approx(0.4)
    assert error_in_time(rows, 0.1) == pytest.approx(0.8)
    assert error_in_time(rows, 0.4) == pytest.approx(0.2)
    assert error_in_time(rows, 0.5) is None and error_in_time(rows, 0.05) is None


def test_a_remainder_is_compared_at_equal_choice_and_at_equal_time() -> None:
    rows = [
        error_row("pages", 0.1, 0.8, budget=1, remainder="none"),
        error_row("pages", 0.4, 0.2, budget=2, remainder="none"),
        error_row("pages", 0.2, 0.3, budget=1, remainder="mean"),
        error_row("pages", 0.6, 0.1, budget=2, remainder="mean"),
        error_row("topk", 0.2, 0.3, budget=1, remainder="mean"),
    ]
    rows.append(error_row("pages", 0.3, 0.25, budget=2, remainder="gated"))
    every_key = replace(error_row("pages", 0.5, 1e-8, budget=9, remainder="none"), density=1.0)
    assert remainder_gains([*rows, every_key]) == remainder_gains(rows), (
        "no yardstick for what leaves keys out"
    )
    first, second = remainder_gains(rows)
    assert first.mean and first.gated is None
    assert (first.none.error, first.mean.row.error) == (0.8, 0.3)
    assert first.mean.at_equal_time == pytest.approx(0.4)
    assert second.mean and second.gated
    assert (second.none.error, second.mean.at_equal_time) == (0.2, None)
    assert second.gated.row.error == 0.25
    assert second.gated.at_equal_time == pytest.approx(0.8 * 0.25 ** (math.log(3) / math.log(4)))


def results() -> Results:
    full = {"window": 4}
    reading = PerplexityRow(4096, "window", full, full, 11.0, 10.0, 10.0, 0.5, 1.0, 0.1, 5.0, 2.0, 6.0, 0.5)
    settings = {"model": "tiny", "text": "t.txt", "chunk_tokens": 50, "repeat": 1, "layers": None}
    context = {
        "command": "python -m models.quality",
        "date": "2026-01-01",
        "processor": "a processor",
        "threads": 2,
        "torch": "2.0",
        "loads_at_start": [0.25],
    }
    return Results(settings, context, list(LADDER), [reading])


def test_results_survive_their_file(tmp_path: Path) -> None:
    save(results(), tmp_path / "q.json")
    assert load(tmp_path / "q.json") == results()
    former = json.loads((tmp_path / "q.json").read_text())
    del former["retrievals"]
    (tmp_path / "q.json").write_text(json.dumps(former))
    assert load(tmp_path / "q.json") == results(), "files of decoders without that part are read as well"
    assert [file.name for file in tmp_path.iterdir()] == ["q.json"]


def test_a_results_file_is_neither_overwritten_nor_mixed_with_other_settings(tmp_path: Path) -> None:
    file, kept = tmp_path / "q.json", results()
    save(kept, file)
    with pytest.raises(ValueError, match="is there already: give --resume"):
        open_results(file, False, kept.settings, {})
    with pytest.raises(ValueError, match=r"other settings: chunk_tokens \(50, now 512\)"):
        open_results(file, True, {**kept.settings, "chunk_tokens": 512}, {})
    assert open_results(file, True, kept.settings, {}) == kept
    assert open_results(tmp_path / "new.json", True, kept.settings, {}).errors == []


@pytest.mark.parametrize(
    ("name", "value"), [("processor", "another"), ("threads", 4), ("torch", "2.1"), ("threads", None)]
)
def test_times_of_another_machine_are_not_added(name: str, value: Any) -> None:
    kept = results()
    told = rf"another machine: {name} \(.*, now {value}\). Times of two machines cannot be compared"
    with pytest.raises(ValueError, match=told):
        begin(kept, {**kept.context, name: value}, 0.5)
    assert kept == results()
    begin(kept, {**kept.context, "date": "2026-01-02"}, 1.234)
    assert kept.context["loads_at_start"] == [0.25, 1.23]
    assert kept.context["added_by"] == []
    for _ in range(2):
        begin(kept, {**kept.context, "command": "python -m models.quality --seed 3"}, 0.0)
    assert kept.context["added_by"] == ["python -m models.quality --seed 3"]
    assert "`python -m models.quality`, then\n`python -m models.quality --seed 3`,\n" in markdown(kept)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"settings": {}}', '{"settings": 3, "context": {}}'])
def test_a_file_that_holds_no_results_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "q.json").write_text(text)
    with pytest.raises(ValueError, match="holds no results"):
        load(tmp_path / "q.json")


def test_the_report_has_every_table_and_says_where_it_is_from() -> None:
    found = results()
    found.errors += [
        error_row("pages", 0.1, 0.8, budget=1, remainder="none"),
        error_row("pages", 0.2, 0.3, budget=1, remainder="mean"),
        error_row("pages", 0.3, 0.2, budget=1, remainder="gated"),
    ]
    text = markdown(found, ["quality-4k.png"])
    assert "`python -m models.quality`,\n2026-01-01, a processor, 2 threads, torch 2.0.\n" in text
    assert "Load of the machine when measuring began: 0.25." in text
    assert "](quality-4k.png)" in text and "## 4,096 tokens" in text
    assert "| 35 % | window | window=2 | 4 | 0.5000 | 0.5000 | – | 0.500 | 0.900 | 30 % |" in text
    read = "+10.00 ± 0.50 % | 50 % | 83 % | 50 % | 2 % | 0.500 | 0.600 | – | 0.1000 | 0.900 |"
    assert f"| window | window=4 | 0.3000 | 0.3000 | {read}" in text
    assert "| backend | setting | 0 | 1 |" in text
    assert "| sinks | default | 0.100 | 0.100 |" in text
    gain = "| 10 % | 0.8000 | 20 % | 0.3000 | -62 % | – | 30 % | 0.2000 | -75 % | – |"
    assert f"| pages | budget=1, remainder=none {gain}" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| exact")}
    assert widths == {15}


def test_the_report_says_which_backends_such_a_model_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    left_out = {"nystrom": "has no causal form", "window": "is measured nevertheless"}
    monkeypatch.setattr(quality_report, "unsuitable", lambda causal: left_out if causal else {})
    assert "server reads it. Not measured: `nystrom` has no causal form.\n" in markdown(results())
    monkeypatch.setattr(quality_report, "unsuitable", lambda causal: {})
    assert "Not measured" not in markdown(results())


@pytest.mark.parametrize(("count", "wanted"), [(1, [0]), (12, list(range(12))), (30, list(range(0, 30, 3)))])
def test_of_many_layers_some_are_shown(count: int, wanted: list[int]) -> None:
    assert shown_layers(range(count)) == wanted


def test_a_change_without_a_standard_error_is_shown_without_one() -> None:
    found = results()
    found.perplexities = [replace(found.perplexities[0], standard_error_percent=None)]
    assert "| +10.00 % | 50 % | 83 % |" in markdown(found)


def test_each_remainder_is_drawn_in_its_own_way() -> None:
    pytest.importorskip("matplotlib")
    rows = [
        error_row("pages", share, error, budget=1, remainder=what)
        for share, error, what in ((0.1, 0.8, "none"), (0.2, 0.3, "mean"), (0.3, 0.2, "gated"))
    ]
    figure, axes = pyplot().subplots()
    _scatter(axes, rows, lambda row: row.time_share, lambda row: row.error)
    points, twins = axes.lines[:3], axes.lines[3:]
    looks = {(line.get_fillstyle(), line.get_markerfacecolor() == "white") for line in points}
    assert looks == {("full", False), ("full", True), ("left", False)}
    assert {line.get_linestyle() for line in twins} == {":", "--"}
    assert axes.get_legend_handles_labels()[1] == ["pages"]
    pyplot().close(figure)


def test_plots_are_written_per_length(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = write_plots(results(), tmp_path / "quality", decoder_panels)
    assert [file.name for file in files] == ["quality-4k.png"]
    assert files[0].read_bytes().startswith(b"\x89PNG")


def test_plots_without_matplotlib_say_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModelError, match=r"pip install 'longreach\[bench\]'"):
        pyplot()


@pytest.mark.parametrize(("ladders", "causal"), [(DECODER, True), (ENCODER, False)])
def test_every_backend_that_such_a_model_runs_has_contenders_and_distinct_ones(
    ladders: Ladders, causal: bool
) -> None:
    found = default_contenders(ladders, causal)
    assert {each.backend for each in found} == set(backend_names()) - set(unsuitable(causal))
    assert len({each.key for each in found}) == len(found)
    assert any(each.chosen for each in found)
    able = {name: load_backend(name) for name in backend_names()}
    for each in found:
        assert not able[each.backend].unsupported(each.choice(0).params, causal), each.label


def test_backends_that_no_such_model_runs_are_left_out_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def changed(name: str) -> Any:
        real = load_backend(name)
        changes = {
            "star": {"learned": True},
            "fixed": {"causal": False},
            "random": {"decode": False},
            "sinks": {"bidirectional": False},
        }
        return replace(real, capabilities=replace(real.capabilities, **changes.get(name, {})))

    monkeypatch.setattr(quality_contenders, "load_backend", changed)
    decoders, encoders = unsuitable(causal=True), unsuitable(causal=False)
    assert {"star", "fixed", "random"} <= set(decoders) and "sinks" not in decoders
    assert {"star", "sinks"} <= set(encoders) and not {"fixed", "random"} & set(encoders)
    assert "parameters of its own" in decoders["star"] and decoders["fixed"] == "has no causal form"
    assert encoders["sinks"] == "has no bidirectional form"
    assert "star" not in {each.backend for each in default_contenders(DECODER, True)}
    assert {each.backend for each in default_contenders(DECODER, True, ["star"])} == {"star"}


def test_a_backend_without_a_ladder_runs_at_its_defaults() -> None:
    (only,) = default_contenders(Ladders({}, {}), True, ["star"])
    assert only.params == {} and only.full == {"window": 2} and only.chosen and not only.brief


def test_params_of_a_support_are_shown_behind_its_name() -> None:
    params = {"support": "pooled", "num_features": 64, "support_params": {"budget": 512}}
    assert setting(params) == "support=pooled, num_features=64, support_params.budget=512"
    assert setting({}) == "default"


def test_contenders_are_read_from_json_and_refused_with_reasons() -> None:
    found = read_contenders('{"window": [{"window": 9}, {}]}')
    assert [each.label for each in found] == ["window window=9", "window default"]
    for text, told in [
        ("{", "not JSON"),
        ("[1]", "must be"),
        ('{"window": {}}', "must be"),
        ('{"window": [{"window": 0}]}', "greater than or equal to 1"),
    ]:
        with pytest.raises(ValueError, match=told):
            read_contenders(text)
    with pytest.raises(KeyError, match="unknown attention backend 'nope'"):
        read_contenders('{"nope": [{}]}')


@pytest.mark.parametrize("backend", ["xattention", "pooled", "pages", "topk"])
def test_selections_are_measured_with_every_remainder_at_equal_choice(backend: str) -> None:
    budgets: dict[str, set[int]] = {"none": set(), "mean": set(), "gated": set()}
    for each in default_contenders(DECODER, True, [backend]):
        if each.full.get("budget") is not None:
            budgets[each.full["remainder"]].add(each.full["budget"])
    assert len(budgets["mean"]) >= 2 and budgets["mean"] == budgets["gated"] < budgets["none"]


@pytest.mark.parametrize("ladders", [DECODER, ENCODER])
def test_what_is_chosen_or_brief_is_a_setting_of_the_ladders(ladders: Ladders) -> None:
    for backend, settings in [*ladders.chosen.items(), *ladders.brief.items()]:
        assert all(each in ladders.settings[backend] for each in settings)


def test_chunks_that_would_cut_query_tiles_are_refused_with_the_number_to_use() -> None:
    found = [contender("xattention", {}), contender("vertical_slash", {}), contender("window", {})]
    with pytest.raises(ValueError, match=r"vertical_slash default \(tiles of 512\): give 1024, or 0") as told:
        refuse_cut_tiles(found, 768)
    assert "xattention" not in str(told.value)
    for chunk_tokens in (0, 512, 1536):
        refuse_cut_tiles(found, chunk_tokens)
    refuse_cut_tiles(found[2:], 33)


def test_contenders_that_the_model_cannot_run_are_all_named(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_unsupported(model, [contender("window", {})])
    monkeypatch.setattr(Model, "unsupported", lambda self, choice: [f"no {choice.backend}"])
    with pytest.raises(ModelError, match=r"window default: no window; sinks sinks=2: no sinks"):
        refuse_unsupported(model, [contender("window", {}), contender("sinks", {"sinks": 2})])


class Words:
    """A tokenizer of the test's ids, whatever the text."""

    def encode(self, text: str, *, special_tokens: bool = True) -> Encoding:
        return Encoding(list(IDS))


@pytest.fixture
def at_hand(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tiny model in place of the demo model; gives the list of loads."""
    loads: list[str] = []

    def tiny(name: str, source: str, progress: Any) -> Model:
        loads.append(name)
        return Model(model._network, model.info, Words())  # type: ignore[arg-type]

    monkeypatch.setattr(quality, "load_model", tiny)
    return loads


def command(tmp_path: Path, *more: str, contenders: str = '{"window": [{"window": 9}]}') -> list[str]:
    files = ["--json", str(tmp_path / "q.json"), "--markdown", str(tmp_path / "q.md")]
    return ["--tokens", "100", "--chunk-tokens", "32", "--contenders", contenders, *files, *more]


def test_a_run_goes_on_where_it_was_interrupted(
    tmp_path: Path, at_hand: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = '{"exact": [{}], "window": [{"window": 9}]}'
    real = quality.read_text
    monkeypatch.setattr(quality, "read_text", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        quality.main(command(tmp_path, contenders=both))
    first = load(tmp_path / "q.json")
    assert [row.backend for row in first.errors] == ["exact", "window"] and not first.perplexities
    monkeypatch.setattr(quality, "read_text", real)
    quality.main(command(tmp_path, "--resume", contenders=both))
    second = load(tmp_path / "q.json")
    assert second.errors == first.errors
    assert len(second.context["loads_at_start"]) == 2
    quality.main(command(tmp_path, "--resume", contenders=both))
    assert load(tmp_path / "q.json") == second, "a run that measures nothing leaves no trace"
    assert [row.backend for row in second.perplexities] == ["exact", "window"]
    assert "| window | window=9 |" in (tmp_path / "q.md").read_text()


def test_a_run_with_nothing_left_to_measure_loads_no_model(tmp_path: Path, at_hand: list[str]) -> None:
    quality.main(command(tmp_path))
    (tmp_path / "q.md").unlink()
    quality.main(command(tmp_path, "--resume"))
    assert len(at_hand) == 1 and (tmp_path / "q.md").exists()


def test_a_run_does_not_go_on_with_another_number_of_threads(tmp_path: Path, at_hand: list[str]) -> None:
    quality.main(command(tmp_path))
    held = (tmp_path / "q.json").read_text()
    threads = torch.get_num_threads()
    (tmp_path / "q.json").write_text(held.replace(f'"threads": {threads},', '"threads": 77,'))
    with pytest.raises(SystemExit, match=rf"threads \(77, now {threads}\)"):
        quality.main(command(tmp_path, "--resume", contenders='{"window": [{"window": 8}]}'))
    assert len(at_hand) == 1


def test_the_report_repeats_what_was_measured_and_not_where_it_was_put(
    tmp_path: Path, at_hand: list[str]
) -> None:
    quality.main(command(tmp_path, "--perplexity", "none"))
    text = (tmp_path / "q.md").read_text()
    asked = """--contenders '{"window": [{"window": 9}]}' --tokens 100 --chunk-tokens 32 --perplexity none"""
    assert f"python -m models.quality {asked}`" in text
    assert str(tmp_path) not in text
    assert not json.loads((tmp_path / "q.json").read_text())["perplexities"]


def test_beyond_the_usual_length_the_default_run_measures_fewer_layers() -> None:
    assert [layer_step(None, n, 4096) for n in (4096, 4097)] == [1, 3]
    assert layer_step(2, 8192, 4096) == 2


def test_other_backends_are_added_to_a_file_that_is_there(tmp_path: Path, at_hand: list[str]) -> None:
    quality.main(command(tmp_path))
    first = load(tmp_path / "q.json")
    more = ["--tokens", "100", "--chunk-tokens", "32", "--backends", "sinks", "--perplexity", "none"]
    quality.main([*more, "--json", str(tmp_path / "q.json"), "--resume"])
    second = load(tmp_path / "q.json")
    assert second.errors[:1] == first.errors and second.perplexities == first.perplexities
    assert [row.backend for row in second.errors] == ["window", *["sinks"] * 4]
    added = "python -m models.quality --backends sinks --tokens 100 --chunk-tokens 32 --perplexity none"
    assert second.context["added_by"] == [added]


def test_brief_contenders_are_measured_at_the_usual_length_alone(
    tmp_path: Path, at_hand: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "LONG_TOKENS", 80)
    settings = ({"window": 4}, {"window": 8})
    ladders = Ladders({"window": settings}, {"window": settings[1:]}, {"window": settings[:1]})
    monkeypatch.setattr(quality, "DECODER", ladders)
    options = ["--tokens", "80", "100", "--chunk-tokens", "32", "--backends", "window"]
    quality.main([*options, "--json", str(tmp_path / "q.json")])
    found = load(tmp_path / "q.json")
    assert [(row.tokens, row.params["window"]) for row in found.errors] == [(80, 4), (80, 8), (100, 8)]
    assert [(row.tokens, row.params["window"]) for row in found.perplexities] == [(80, 4), (80, 8), (100, 8)]


def test_a_model_that_reads_in_both_directions_is_sent_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = serve(network(bert))
    monkeypatch.setattr(quality, "load_model", lambda *_, **__: encoder)
    with pytest.raises(SystemExit, match="python -m models.quality_encoder"):
        quality.main(command(tmp_path))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--tokens", "121"], "t.txt has 121 tokens"),
        (["--tokens", "300"], "reads 256 at most"),
        (["--contenders", '{"nope": [{}]}'], "unknown attention backend 'nope'"),
        (["--text", "nowhere.txt"], "No such file"),
        (["--contenders", '{"pooled": [{}]}'], "--chunk-tokens 32 cuts the query tiles of pooled default"),
    ],
)
def test_what_cannot_be_measured_is_told_before_anything_is_written(
    tmp_path: Path, at_hand: list[str], more: list[str], told: str
) -> None:
    (tmp_path / "t.txt").write_text("text")
    with pytest.raises(SystemExit, match=told):
        quality.main([*command(tmp_path), "--text", str(tmp_path / "t.txt"), *more])
    assert not (tmp_path / "q.json").exists()


@pytest.mark.parametrize(
    "argv", [["--resume"], ["--tokens", "0"], ["--contenders", "{}", "--backends", "exact"]]
)
def test_options_that_make_no_sense_are_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        quality.main(argv)
    assert caught.value.code == 2 and "error:" in capsys.readouterr().err
