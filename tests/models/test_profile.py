"""Profiles: measured on a tiny model, written, read back, refused where they belong to something else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.api import attend
from loadtests.tiny_models import write_models
from models.auto import plan
from models.calibrate import QUICK, Sizes, Source, calibrate
from models.calibrate_default import profile_for
from models.calibrate_ladders import Sample, Timing, ladders_of, lengths_of, spread_of
from models.calibrate_measure import measure_document, measure_layer, measured_chunks, time_exact
from models.calibrate_rungs import FULL, asked_rungs, default_rungs
from models.call import AttentionClock
from models.contract import ModelError
from models.loader import load_model
from models.profile import SCHEMA_VERSION, Profile, Stamp, load, profile_file, save
from models.profile_stamp import fingerprint, stamp_of
from models.quality_contenders import contender
from models.quality_error import measure_errors, squares
from models.quality_record import LayerRecord, chunks, record_layers
from models.runner import Model
from service.cli import main

TEXT = " ".join(f"This is sentence {n} of a text about the number {n * n}." for n in range(60))
RUNGS = [
    contender("sinks", {"window": 64, "sinks": 4}),
    contender("pooled", {"budget": 64, "block_size": 32}),
]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def decoder(directories: dict[str, Path]) -> Model:
    return loaded("tiny", directories["tiny-decoder"])


def loaded(name: str, directory: Path) -> Model:
    model = load_model(name, str(directory), progress=lambda line: None)
    assert isinstance(model, Model)
    return model


def measured(model: Model, sizes: Sizes, told: list[str] | None = None, **more: Any) -> Profile:
    progress: Callable[[str], Any] = (lambda line: None) if told is None else told.append
    sources = more.pop("sources", [Source("text", TEXT)])
    rungs = more.pop("rungs", RUNGS)
    made = calibrate(model, sources, rungs, sizes, command="c", date="2026-01-01", progress=progress, **more)
    return made.profile()


@pytest.fixture(scope="module")
def profile(decoder: Model) -> Profile:
    return measured(decoder, Sizes(lengths=(128, 256), documents=2))


def test_a_profile_has_every_layer_and_length_and_says_what_it_was_measured_on(
    decoder: Model, profile: Profile
) -> None:
    assert [ladder.layer for ladder in profile.layers] == list(decoder.info.applied_layers)
    assert [(each.tokens, each.documents) for each in profile.lengths] == [(128, 2), (256, 2)]
    assert profile.stamp == stamp_of(decoder)
    assert [text.name for text in profile.made.texts] == ["text"]
    assert profile.made.seconds > 0
    assert all(each.attention_ms > 0 and each.rest_ms > 0 for each in profile.lengths)


def test_calibrated_errors_are_those_of_the_document(decoder: Model) -> None:
    ids = decoder.tokenizer.encode(TEXT).token_ids[:128]
    samples = measure_document(decoder, 3, ids, RUNGS, 512, 0, lambda line: None)
    records = record_layers(decoder._network, ids, decoder.info.applied_layers, 512)
    rows = measure_errors(records, RUNGS, chunk_tokens=512)
    expected = {
        (layer, place): error
        for place, row in enumerate(rows)
        for layer, error in zip(row.layers, row.layer_errors, strict=True)
    }
    assert {(each.layer, each.rung): each.error for each in samples} == pytest.approx(expected)
    assert {(each.document, each.tokens) for each in samples} == {(3, 128)}
    assert all(expected[layer, 0] > 0 for layer in decoder.info.applied_layers)


@pytest.mark.parametrize(
    ("tokens", "chunk_tokens", "every"),
    [
        (4096, 512, 1),
        (8191, 512, 1),
        (8192, 512, 2),
        (16384, 512, 4),
        (15 * 512, 512, 1),
        (12000, 512, 2),
        (9000, 0, 1),
    ],
)
def test_all_chunks_of_a_document_have_the_same_chance_and_lie_evenly(
    tokens: int, chunk_tokens: int, every: int
) -> None:
    everything = list(chunks(tokens, chunk_tokens))
    found = [measured_chunks(tokens, chunk_tokens, first) for first in range(every)]
    assert sorted((each for some in found for each in some), key=lambda rows: rows.start) == everything
    for some in found:
        strata = [everything.index(rows) // every for rows in some]
        assert strata == list(range(len(everything) // every))


def test_chunks_of_a_long_document_stand_for_all(decoder: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.calibrate_measure.MEASURED_TOKENS", 64)
    ids = decoder.tokenizer.encode(TEXT).token_ids[:256]
    (record,) = record_layers(decoder._network, ids, decoder.info.applied_layers[:1], 32)
    of_some = [measure_layer(record, RUNGS, 32, 0, first=first) for first in range(4)]
    (whole, *_) = measure_errors([record], RUNGS, chunk_tokens=32)
    pieces = [measured_chunks(256, 32, first + record.index) for first in range(4)]
    sizes = [measure_size(record, some) for some in pieces]
    together = sum(size * rows[0].error ** 2 for size, rows in zip(sizes, of_some, strict=True)) / sum(sizes)
    assert together**0.5 == pytest.approx(whole.error, rel=1e-4)
    assert len({rows[0].error for rows in of_some}) > 1


def measure_size(record: LayerRecord, pieces: list[slice]) -> float:
    """sum |o W_O|^2 over these rows."""
    whole = attend(
        record.q, record.k, record.v, backend="exact", causal=True, scale=record.scale, layer=record.index
    ).out
    return sum(squares(whole[:, :, rows], record.w_o.t().float()) for rows in pieces)


def test_an_encoder_is_calibrated_reading_at_once(directories: dict[str, Path]) -> None:
    model = loaded("encoder", directories["tiny-encoder"])
    made = measured(model, Sizes(lengths=(128,), documents=1))
    assert (made.made.chunk_tokens, len(made.layers)) == (0, 4)


def test_a_profile_survives_its_file(profile: Profile, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "profile.json"
    save(profile, file)
    assert load(file, profile.stamp) == profile
    assert [path.name for path in file.parent.iterdir()] == ["profile.json"]
    assert plan(load(file), 256, 0.2) == plan(profile, 256, 0.2)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"fingerprint": "other"}, "weights and configuration"),
        ({"dtype": "bfloat16"}, "dtype float32 there, bfloat16 here"),
        ({"device": "cuda:0"}, "device cpu there, cuda:0 here"),
        ({"threads": 9999}, "threads .* there, 9999 here"),
        ({"torch": "1.0"}, "torch release .* there, 1.0 here"),
    ],
)
def test_a_profile_of_something_else_is_refused_with_what_differs(
    profile: Profile, tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    save(profile, tmp_path / "p.json")
    with pytest.raises(ModelError, match=f"{told}.*longreach calibrate"):
        load(tmp_path / "p.json", profile.stamp.model_copy(update=change))


def test_the_same_weights_under_another_name_share_a_profile(profile: Profile, tmp_path: Path) -> None:
    save(profile, tmp_path / "p.json")
    assert load(tmp_path / "p.json", profile.stamp.model_copy(update={"model": "alias"})) == profile


def damaged(profile: Profile) -> Iterator[tuple[Callable[[dict[str, Any]], Any], str]]:
    yield lambda raw: raw.update(schema_version=SCHEMA_VERSION + 1), "version 3, this release reads 1 and 2"
    yield lambda raw: raw.pop("schema_version"), "schema version None"
    yield lambda raw: raw.update(more=1), "damaged: more"
    yield lambda raw: raw["layers"][1]["rungs"].pop(), "layers.1.*do not end in exact"
    yield lambda raw: raw["layers"][0]["rungs"][-1]["median"].pop(), "no figure for each of the 2 lengths"
    yield lambda raw: raw["lengths"].reverse(), "lengths do not ascend"
    yield lambda raw: raw["layers"].reverse(), "layers do not ascend"
    yield lambda raw: raw["layers"][0]["rungs"][-1].update(median=[0.3, 0.3]), "median <= p95 <= max"
    yield lambda raw: raw["lengths"][0].update(attention_ms=float("nan")), "lengths.0.attention_ms"


@pytest.mark.parametrize("number", range(9))
def test_a_damaged_profile_is_refused_by_place(profile: Profile, tmp_path: Path, number: int) -> None:
    change, told = list(damaged(profile))[number]
    raw = profile.model_dump(mode="json")
    change(raw)
    file = tmp_path / "p.json"
    file.write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(ModelError, match=told):
        load(file)


def test_a_file_of_the_first_version_is_read_and_has_no_times_of_another_machine(
    profile: Profile, tmp_path: Path
) -> None:
    raw = profile.model_dump(mode="json")
    del raw["made"]["times"]
    file = tmp_path / "p.json"
    file.write_text(json.dumps({**raw, "schema_version": 1}), encoding="utf-8")
    assert load(file, profile.stamp) == profile.model_copy(update={"schema_version": 1})
    times = {
        "errors_from": raw["stamp"],
        "date": "d",
        "seconds": 1,
        "texts": [],
        "tokens": [64],
        "layers": [0],
    }
    made = {**raw["made"], "times": times}
    file.write_text(json.dumps({**raw, "made": made, "schema_version": 1}), encoding="utf-8")
    with pytest.raises(ModelError, match=r"version 1 has no made\.times"):
        load(file)
    file.write_text(json.dumps({**raw, "made": made}), encoding="utf-8")
    assert load(file).made.times is not None


@pytest.mark.parametrize("content", ["", "[1]", "{", '"x"'])
def test_a_file_that_is_no_profile_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "p.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match="is no profile"):
        load(tmp_path / "p.json")
    with pytest.raises(ModelError, match="cannot be read"):
        load(tmp_path / "absent.json")


def test_profiles_of_other_weights_and_machines_lie_apart(profile: Profile, tmp_path: Path) -> None:
    stamp = profile.stamp
    changed = {name: getattr(stamp, name) for name in Stamp.model_fields} | {
        "model": "a/b",
        "fingerprint": "0" * 64,
        "dtype": "bfloat16",
        "device": "cuda:0",
        "processor": "another",
        "threads": stamp.threads + 1,
        "torch": "9.9",
    }
    changes = [{}, *({name: value} for name, value in changed.items())]
    files = {profile_file(tmp_path, stamp.model_copy(update=change)) for change in changes}
    assert len(files) == len(Stamp.model_fields) + 1, "one takes the place of another"
    assert {file.parent for file in files} == {tmp_path / "profiles"}


def test_the_fingerprint_tells_weights_and_configurations_apart(
    decoder: Model, directories: dict[str, Path]
) -> None:
    again, other = (loaded(name, directories["tiny-decoder"]) for name in ("again", "other"))
    assert fingerprint(again._network) == fingerprint(decoder._network)
    with torch.inference_mode():
        other._network.body.embed_tokens.weight.mul_(1.001)
    assert fingerprint(other._network) != fingerprint(decoder._network)
    again._network.body.config.rms_norm_eps *= 2
    assert fingerprint(again._network) != fingerprint(decoder._network)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[], float]:
    """A document of 64 tokens takes a minute, longer ones their square; nothing else takes time."""
    now = 0.0

    def slowly(model: Model, document: int, token_ids: list[int], *rest: Any) -> list[Sample]:
        nonlocal now
        now += 60 * (len(token_ids) / 64) ** 2
        return measure_document(model, document, token_ids, *rest)

    monkeypatch.setattr("models.calibrate.measure_document", slowly)
    return lambda: now


def test_a_budget_of_minutes_leaves_out_what_does_not_fit_and_says_so(
    decoder: Model, clock: Callable[[], float]
) -> None:
    told: list[str] = []
    sizes = Sizes(lengths=(64, 128), documents=3, minutes=6.5)
    made = measured(decoder, sizes, told, clock=clock)
    assert [(each.tokens, each.documents) for each in made.lengths] == [(64, 2), (128, 1)]
    assert sum("no time for it" in line for line in told) == 3
    assert made.made.seconds == 360


def test_however_short_the_time_one_document_is_measured(decoder: Model, clock: Callable[[], float]) -> None:
    made = measured(decoder, Sizes(lengths=(64, 128), documents=3, minutes=0.001), clock=clock)
    assert [(each.tokens, each.documents) for each in made.lengths] == [(64, 1)]
    assert {rung.spread for ladder in made.layers for rung in ladder.rungs[:-1]} <= {(None,)}


def test_who_watches_is_told_every_layer_and_what_is_left(decoder: Model, clock: Callable[[], float]) -> None:
    seen: list[str] = []
    sizes = Sizes(lengths=(64, 128), documents=2, minutes=6.5)
    measured(decoder, sizes, clock=clock, watch=seen.append)
    layers = len(decoder.info.applied_layers)
    assert seen[0] == "reading 64 tokens, at most about 390 s left"
    assert seen[1] == f"layer 1 of {layers}, 64 tokens, at most about 330 s left"
    assert seen[layers + 1] == "reading 128 tokens, about 300 s left"
    assert seen[-1] == f"layer {layers} of {layers}, 64 tokens, about 0 s left"
    assert len(seen) == 3 * (layers + 1)


def test_layers_are_told_of_only_where_a_document_takes_long(
    decoder: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def layers_told() -> int:
        told: list[str] = []
        measured(decoder, Sizes(lengths=(64,), documents=1), told)
        return sum("layer" in line for line in told)

    assert layers_told() == 0
    monkeypatch.setattr("models.calibrate.TOLD_EVERY_S", 0.0)
    assert layers_told() == len(decoder.info.applied_layers)


def test_documents_come_from_all_texts_in_turn(decoder: Model) -> None:
    told: list[str] = []
    other = Source("other", TEXT.replace("sentence", "line"))
    sizes = Sizes(lengths=(64,), documents=3)
    made = measured(decoder, sizes, told, sources=[Source("text", TEXT), other])
    assert made.lengths[0].documents == 3
    assert len({text.sha256 for text in made.made.texts}) == 2


def test_a_text_too_short_for_a_length_is_told_and_serves_the_shorter_ones(decoder: Model) -> None:
    told: list[str] = []
    made = measured(decoder, Sizes(lengths=(64, 4096), documents=1), told)
    assert [each.tokens for each in made.lengths] == [64]
    assert any("4096 tokens: left out" in line for line in told)
    with pytest.raises(ModelError, match="no text has 4096 tokens"):
        measured(decoder, Sizes(lengths=(4096,), documents=1))


def test_sizes_that_do_not_fit_the_model_or_the_rungs_are_refused(decoder: Model) -> None:
    with pytest.raises(ValueError, match=r"--tokens must lie in 1 \.\. "):
        measured(decoder, Sizes(lengths=(1 << 20,)))
    with pytest.raises(ValueError, match="cuts the query tiles"):
        measured(decoder, Sizes(lengths=(64,), chunk_tokens=100))


def test_many_readings_of_few_layers_measure_what_one_reading_does(
    decoder: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = decoder.tokenizer.encode(TEXT).token_ids[:100]

    def errors() -> list[tuple[int, int, float]]:
        samples = measure_document(decoder, 0, ids, RUNGS, 512, 0, lambda line: None)
        return [(each.layer, each.rung, each.error) for each in samples]

    at_once = errors()
    monkeypatch.setattr("models.calibrate_measure.MAX_RECORDED_BYTES", 1)
    assert errors() == at_once
    assert len(at_once) == len(RUNGS) * len(decoder.info.applied_layers)


def test_exact_is_timed_apart_from_the_rest_of_the_forward(decoder: Model) -> None:
    timing = time_exact(decoder, decoder.tokenizer.encode(TEXT).token_ids[:700], 512)
    assert timing.tokens == 700
    assert timing.attention_ms > 0 and timing.rest_ms > 0


def test_attention_can_be_timed_call_by_call_where_kernels_time_their_launch_alone(decoder: Model) -> None:
    clock, ids = AttentionClock(), decoder.tokenizer.encode(TEXT).token_ids[:300]
    with clock.running():
        timing = time_exact(decoder, ids, 128)
    waited = 1e3 * clock.seconds
    assert timing.attention_ms <= waited < timing.attention_ms + timing.rest_ms
    time_exact(decoder, ids, 128)
    assert 1e3 * clock.seconds == waited


def test_a_layer_that_gives_zeros_is_calibrated_like_any_other(
    directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.calibrate_ladders.worth_keeping", list)
    model = loaded("silenced", directories["tiny-decoder"])
    with torch.no_grad():
        model._network.body.layers[0].self_attn.o_proj.weight.zero_()
    found = measured(model, Sizes(lengths=(128,), documents=1))
    silenced, *others = found.layers
    assert all(set(rung.median) == {0.0} for rung in silenced.rungs)
    assert any(rung.median[0] > 0 for ladder in others for rung in ladder.rungs)


def sample(error: float = 0.1, time: float = 0.5, **more: Any) -> Sample:
    given = {"document": 0, "tokens": 64, "layer": 0, "rung": 0, "selection_s": 0.1, "density": 0.5}
    return Sample(**{**given, "error": error, "attention_s": time, "exact_attention_s": 1.0, **more})


NAMED: list[tuple[str, dict[str, Any]]] = [("sinks", {"window": 64}), ("pooled", {"budget": 64})]


def test_quantiles_are_over_documents() -> None:
    samples = [sample(error / 100, document=error) for error in range(1, 41)]
    (ladder,) = ladders_of(samples, NAMED[:1])
    (found, _) = ladder.rungs
    assert (found.median, found.p95, found.max) == ((0.205,), (0.38,), (0.4,))


def test_time_shares_are_pooled_over_layers_that_compute_as_much() -> None:
    noisy = [sample(time=time, layer=layer) for layer, time in enumerate((0.4, 0.5, 3.0))]
    assert {ladder.rungs[0].time_share for ladder in ladders_of(noisy, NAMED[:1])} == {(0.5,)}


def test_a_layer_that_keeps_more_pairs_takes_longer_but_not_to_choose_them() -> None:
    samples = [sample(layer=layer, density=density) for layer, density in enumerate((0.25, 0.75))]
    shares = [ladder.rungs[0].time_share[0] for ladder in ladders_of(samples, NAMED[:1])]
    assert shares == pytest.approx([0.1 + 0.4 * 0.5, 0.1 + 0.4 * 1.5])


@pytest.mark.parametrize(
    ("one", "other", "kept"),
    [
        ((0.1, 0.5), (0.2, 0.6), ["sinks"]),
        ((0.2, 0.6), (0.1, 0.5), ["pooled"]),
        ((0.1, 0.6), (0.2, 0.5), ["pooled", "sinks"]),
        ((0.1, 0.5), (0.1, 0.5), ["sinks"]),
        ((0.1, 1.1), (0.2, 0.5), ["pooled"]),
    ],
)
def test_rungs_that_another_beats_or_that_cost_as_much_as_exact_are_left_out(
    one: tuple[float, float], other: tuple[float, float], kept: list[str]
) -> None:
    (ladder,) = ladders_of([sample(*one), sample(*other, rung=1)], NAMED)
    assert [rung.backend for rung in ladder.rungs] == [*kept, "exact"]


def test_the_spread_is_within_rungs_layers_and_lengths() -> None:
    wide = [sample(error, document=n) for n, error in enumerate((0.1, 0.1 * math.e))]
    assert spread_of(wide) == pytest.approx(math.sqrt(0.5))
    apart = [sample(0.1), sample(0.9, layer=1), sample(0.5, rung=1), sample(0.3, tokens=128)]
    assert spread_of(apart) is None
    assert spread_of([sample(0.0), sample(0.0, document=1)]) is None


def test_of_each_length_the_least_times_count() -> None:
    timings = [Timing(64, 3.0, 5.0), Timing(64, 2.0, 6.0), Timing(128, 9.0, 9.0)]
    (found,) = lengths_of([sample(), sample(document=1)], timings)
    assert (found.documents, found.attention_ms, found.rest_ms) == (2, 2.0, 5.0)


def test_rungs_are_those_that_the_model_can_run(decoder: Model, directories: dict[str, Path]) -> None:
    assert len(default_rungs(decoder)) == sum(map(len, FULL.values()))
    quick, full = ({each.key for each in default_rungs(decoder, quick=flag)} for flag in (True, False))
    assert quick < full
    assert default_rungs(loaded("encoder", directories["tiny-encoder"]))
    with pytest.raises(ModelError, match="cannot run"):
        asked_rungs(decoder, '{"nystrom": [{}]}')
    with pytest.raises(ValueError, match="exact ends every ladder"):
        asked_rungs(decoder, '{"exact": [{}]}')


def test_the_quick_profile_has_a_stated_time() -> None:
    assert QUICK.minutes is not None and QUICK.minutes <= 5


def test_the_first_use_measures_a_quick_profile_and_the_next_finds_it(
    decoder: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.calibrate_default.QUICK", Sizes(lengths=(64,), documents=2, minutes=1.0))
    told: list[str] = []
    first = profile_for(decoder, tmp_path, told.append)
    assert first.made.command == "at first use" and "minutes at most" in told[0]
    told.clear()
    assert profile_for(decoder, tmp_path, told.append) == first
    assert not told

    save(first.model_copy(update={"stamp": first.stamp.model_copy(update={"torch": "1.0"})}), kept(tmp_path))
    again = profile_for(decoder, tmp_path, told.append)
    assert again.stamp == first.stamp == load(kept(tmp_path)).stamp
    assert "torch release 1.0 there" in told[0]


def kept(cache_dir: Path) -> Path:
    (file,) = (cache_dir / "profiles").glob("*.json")
    return file


def test_without_a_text_to_measure_on_the_first_use_says_what_to_do(
    decoder: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.calibrate_default.DEFAULT_TEXT", tmp_path / "none.txt")
    with pytest.raises(ModelError, match="run longreach calibrate"):
        profile_for(decoder, tmp_path, lambda line: None)


def run_cli(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["calibrate", *words])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_the_command_writes_a_profile_and_tells_what_it_promises(
    directories: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "profile.json"
    text.write_text(TEXT, encoding="utf-8")
    named = f"tiny={directories['tiny-decoder']}"
    rungs = '{"sinks": [{"window": 64}]}'
    words = [named, str(text), "--tokens", "64", "128", "--documents", "2", "--rungs", rungs]
    assert run_cli(*words, "--out", str(out)) == 0
    told = capsys.readouterr()
    assert "MAX_ERROR 0.05" in told.out and f"profile: {out}" in told.out
    assert "document 2, 128 tokens" in told.err
    made = load(out, stamp_of(loaded("tiny", directories["tiny-decoder"])))
    assert [each.documents for each in made.lengths] == [2, 2]
    assert "text.txt --tokens 64 128 --documents 2 --rungs" in made.made.command
    assert str(tmp_path) not in made.made.command.replace(named, "")

    other = tmp_path / "other.txt"
    other.write_text(TEXT.replace("number", "figure"), encoding="utf-8")
    assert run_cli(words[0], str(other), *words[1:], "--check", "--cache-dir", str(tmp_path / "cache")) == 0
    (kept,) = (tmp_path / "cache" / "profiles").iterdir()
    assert kept.name.startswith("tiny-") and f"profile: {kept}" in (told := capsys.readouterr()).out
    assert "LAYER-DOCUMENTS" in told.out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["tiny={decoder}", "absent.txt"], "absent.txt cannot be read"),
        (["tiny={decoder}", "{text}", "--minutes", "0"], "--minutes must be above 0"),
        (["tiny={decoder}", "{text}", "--rungs", "x"], "--contenders is not JSON"),
        (["tiny={decoder}", "{text}", "--check"], "--check plans each text by the others"),
        (["./path", "{text}"], "give it a name"),
        (["tiny={decoder}", "{text}", "--tokens", "999999"], "--tokens must lie in"),
    ],
)
def test_the_command_refuses_in_one_sentence(
    directories: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    told: str,
) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    places = {"decoder": directories["tiny-decoder"], "text": tmp_path / "text.txt"}
    assert run_cli(*(word.format(**places) for word in words)) == 2
    assert told in capsys.readouterr().err
