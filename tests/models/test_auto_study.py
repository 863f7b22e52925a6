"""A study of ``auto``: true errors of its layers, times in turns with exact, and what is told of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models import auto_study, auto_study_read, quality_long
from models.auto import read_plan
from models.auto_study_read import ask_document, study_document, time_document
from models.auto_study_report import cells, markdown
from models.auto_study_rows import AutoRow, FactRow, StudyResults, TimeRow, load_study
from models.contract import Choice, ModelError
from models.planned import Planned, exact, planned
from models.profile import Ladder, Length, Made, Profile, Rung, load, save
from models.profile_stamp import stamp_of
from models.quality_auto import choice_of, planned_choice, profile_of, refuse_cut_chunks
from models.quality_contenders import contender
from models.quality_error import measure_errors
from models.quality_facts import Document
from models.quality_long_rows import load_long
from models.quality_prompt import change, read_document, timed
from models.quality_record import record_layers
from models.runner import Model
from tests.models.test_quality_long import SOURCES, documents, tiny

CHUNK = 256
TOKENS = 1100
CHEAP = ("sinks", {"window": 128})


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny()


@pytest.fixture(scope="module")
def document(model: Model) -> Document:
    return documents(model, TOKENS)[0]


def rung(backend: str, params: Mapping[str, Any], error: float, share: float) -> Rung:
    return Rung(
        backend=backend,
        params=dict(params),
        median=(error, error),
        p95=(error, error),
        max=(error, error),
        spread=(0.0, 0.0),
        time_share=(share, share),
    )


def profile(model: Model, *errors: float) -> Profile:
    """What ``CHEAP`` is believed to lose in each layer."""
    return Profile(
        stamp=stamp_of(model),
        made=Made(command="made up", date="2026-01-01", seconds=1.0, chunk_tokens=256, seed=0, texts=()),
        lengths=tuple(Length(tokens=n, documents=40, attention_ms=90.0, rest_ms=10.0) for n in (1024, 1500)),
        layers=tuple(
            Ladder(layer=layer, rungs=(rung(*CHEAP, error, 0.3), rung("exact", {}, 0.0, 1.0)))
            for layer, error in enumerate(errors)
        ),
    )


def studied(model: Model, document: Document, made: Profile, max_error: float) -> AutoRow:
    return study_document(model, document, made, max_error, outcome(model, document), CHUNK, 0)


def outcome(model: Model, document: Document) -> Any:
    return read_document(model, document, exact(), CHUNK)


def test_a_plan_is_made_for_the_prompt_and_exact_ones_run_as_plain_exact(model: Model) -> None:
    made = profile(model, 0.01, 0.5, 0.01)
    found, choice = planned_choice(made, TOKENS, 0.1, 3)
    assert isinstance(choice, Planned) and choice.guarded and choice.seed == 3
    assert [each.backend for each in choice.layers] == ["sinks", "exact", "sinks"]
    for tokens, max_error in ((1000, 0.1), (TOKENS, 0.005)):
        found, choice = planned_choice(made, tokens, max_error, 3)
        assert found.is_exact and choice == exact(3)
    assert choice_of(contender("window", {}), None, TOKENS, 5) == contender("window", {}).choice(5)


def test_the_errors_are_those_of_all_rows_on_the_layers_own_inputs(model: Model, document: Document) -> None:
    row = studied(model, document, profile(model, 0.01, 9.0, 9.0), 1.0)
    assert row.backends == ["sinks", "exact", "exact"] and row.exact_from == [None] * 3
    records = record_layers(model._network, document.token_ids[:-1], (0,), CHUNK)
    (wanted,) = measure_errors(records, [contender(*CHEAP)], chunk_tokens=CHUNK)
    assert row.errors == [pytest.approx(wanted.error, rel=1e-4), 0.0, 0.0]
    assert row.estimates[0] == pytest.approx(row.errors[0], rel=0.5) and row.estimates[1:] == [0.0, 0.0]
    assert row.guarded_rows > 0 and 0 < row.density < 1 and row.reason == "chosen"
    assert row.change_percent == pytest.approx(100 * (row.perplexity / row.exact_perplexity - 1))


def test_a_layer_that_turns_out_worse_is_repaired_and_the_plan_can_be_replayed(
    model: Model, document: Document
) -> None:
    made = profile(model, 1e-6, 1e-6, 1e-6)
    loose = studied(model, document, made, 1.0)
    budget = 0.7 * max(loose.errors)
    row = studied(model, document, made, budget)
    assert any(each is not None for each in row.exact_from) and row.density > loose.density
    assert max(row.errors) < max(loose.errors)
    assert max(row.errors) <= 1.2 * budget
    replayed = read_document(model, document, planned(read_plan(row.plan)), CHUNK)
    work = replayed.reading.work
    assert work.pairs_kept / work.pairs_exact == pytest.approx(row.density, rel=1e-2)
    assert replayed.kept == ()
    again = change(document, replayed.reading, outcome(model, document).reading)
    assert again.perplexity == pytest.approx(row.perplexity, rel=1e-4)


def test_an_exact_plan_is_not_read_again(
    model: Model, document: Document, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = outcome(model, document)
    monkeypatch.setattr(auto_study_read, "read_document", None)
    row = study_document(model, document, profile(model, 9.0, 9.0, 9.0), 0.1, held, CHUNK, 0)
    assert row.errors == row.estimates == [0.0] * 3 and row.change_percent == 0 and row.density == 1
    facts = ask_document(model, document, profile(model, 9.0, 9.0, 9.0), 0.1, held, CHUNK, 0)
    assert (facts.chosen, facts.generated) == (facts.exact_chosen, facts.exact_generated)
    assert len(facts.chosen) == 8 and facts.chosen == held.answers.chosen
    assert row.reason == "all layers need exact"


def test_times_are_taken_in_turns_with_exact(
    model: Model, document: Document, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def watched(model: Model, token_ids: Any, choice: Choice, chunk_tokens: int) -> Any:
        asked = getattr(choice.params, "max_error", None)
        read.append(f"{choice.backend} {asked}" if asked else choice.backend)
        return timed(model, token_ids, choice, chunk_tokens)

    monkeypatch.setattr(auto_study_read, "timed", watched)
    made = profile(model, 0.15, 0.15, 0.15)
    rows = time_document(model, document, made, [0.1, 0.2, 0.3], 2, CHUNK, 0)
    there = ["exact", "exact", "exact", "auto 0.2", "exact", "auto 0.3"]
    assert read == [*there, "exact", "auto 0.3", "exact", "auto 0.2", "exact", "exact"]
    assert [(row.max_error, row.exact_plan) for row in rows] == [(0.1, True), (0.2, False), (0.3, False)]
    assert all(len(row.auto_s) == len(row.exact_s) == 2 and row.ratio <= row.largest for row in rows)


def test_chunks_that_would_cut_a_plans_strata_are_refused(model: Model) -> None:
    choice = planned_choice(profile(model, 0.01, 0.01, 0.01), TOKENS, 0.1, 0)[1]
    refuse_cut_chunks([choice, exact()], 512)
    refuse_cut_chunks([choice], 0)
    with pytest.raises(
        ValueError, match="--chunk-tokens 300: auto is read in multiples of 256 rows: give 512"
    ):
        refuse_cut_chunks([exact(), choice], 300)


def test_a_profile_of_other_weights_is_refused_and_other_threads_are_told(
    model: Model, tmp_path: Path
) -> None:
    told: list[str] = []
    made = profile(model, 0.1, 0.1, 0.1)
    save(
        made.model_copy(update={"stamp": made.stamp.model_copy(update={"threads": 77})}), tmp_path / "p.json"
    )
    assert profile_of(model, tmp_path / "p.json", told.append).layers == made.layers
    assert len(told) == 1 and "threads 77, not " in told[0]
    other = made.model_copy(update={"stamp": made.stamp.model_copy(update={"fingerprint": "x"})})
    save(other, tmp_path / "o.json")
    with pytest.raises(ModelError, match="was measured with other weights"):
        profile_of(model, tmp_path / "o.json", told.append)


@pytest.fixture
def at_hand(model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The tiny model in place of the demo model; a directory with two texts and a profile."""
    monkeypatch.setattr(quality_long, "load_model", lambda name, source, progress: model)
    for source in SOURCES:
        (tmp_path / source.name).write_text(source.text, encoding="utf-8")
    save(profile(model, 0.15, 9.0, 0.02), tmp_path / "profile.json")
    return tmp_path


def command(where: Path, *more: str) -> list[str]:
    texts = [str(where / source.name) for source in SOURCES]
    files = ["--json", str(where / "auto.json"), "--markdown", str(where / "auto.md")]
    sizes = ["--tokens", "1024", "1100", "--chunk-tokens", "256", "--profile", str(where / "profile.json")]
    return ["--texts", *texts, *sizes, "--budgets", "0.01", "0.1", "0.2", *files, *more]


def test_a_run_studies_every_document_and_budget_and_times_them_later(at_hand: Path) -> None:
    assert auto_study.main(command(at_hand, "--repeat", "0")) == 0
    first = load_study(at_hand / "auto.json")
    places = [(row.text, row.tokens, row.max_error) for row in first.rows]
    assert places == [(s.name, n, e) for n in (1024, 1100) for s in SOURCES for e in (0.01, 0.1, 0.2)]
    assert not first.times
    asked = [(row.text, row.tokens, row.max_error) for row in first.facts]
    assert asked == places and all(len(row.chosen) == 8 for row in first.facts)
    exact_layers = [[each == "exact" for each in row.backends] for row in first.rows[:3]]
    assert exact_layers == [[True, True, True], [True, True, False], [False, True, False]]
    auto_study.main(command(at_hand, "--repeat", "1", "--resume"))
    second = load_study(at_hand / "auto.json")
    assert (second.rows, second.facts) == (first.rows, first.facts)
    assert len(second.times) == len(first.rows)
    auto_study.main(command(at_hand, "--repeat", "1", "--resume"))
    assert load_study(at_hand / "auto.json") == second, "a run that measures nothing leaves no trace"
    page = (at_hand / "auto.md").read_text(encoding="utf-8")
    assert "python -m models.auto_study --texts one.txt two.txt --tokens 1024 1100" in page
    assert "--profile profile.json" in page and str(at_hand) not in page and "{" not in page
    assert page.count("\n| 1,024 |") >= 9


def test_a_file_made_with_another_profile_is_not_gone_on_with(at_hand: Path, model: Model) -> None:
    auto_study.main(command(at_hand, "--repeat", "0", "--tokens", "1024"))
    save(profile(model, 0.16, 9.0, 0.02), at_hand / "profile.json")
    with pytest.raises(SystemExit, match="other settings: profile"):
        auto_study.main(command(at_hand, "--repeat", "0", "--resume"))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--chunk-tokens", "300"], "--chunk-tokens 300: auto is read in multiples of 256"),
        (["--tokens", "9999"], "the model reads 1600 at most"),
        (["--tokens", "1500", "--documents", "99"], "no text has room"),
        (["--profile", "nowhere.json"], "profile nowhere.json cannot be read"),
    ],
)
def test_what_cannot_be_studied_is_told_before_anything_is_written(
    at_hand: Path, more: list[str], told: str
) -> None:
    with pytest.raises(SystemExit, match=told):
        auto_study.main(command(at_hand, *more))
    assert not (at_hand / "auto.json").exists()


def test_texts_that_the_profile_was_made_of_are_told(at_hand: Path, model: Model) -> None:
    made = profile(model, 0.15, 9.0, 0.02)
    of_texts = made.made.model_copy(update={"texts": (SOURCES[1].told(),)})
    save(made.model_copy(update={"made": of_texts}), at_hand / "profile.json")
    auto_study.main(command(at_hand, "--repeat", "0", "--tokens", "1024"))
    assert load_study(at_hand / "auto.json").settings["calibrated_on"] == ["two.txt"]


def test_a_study_needs_a_budget(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        auto_study.main(["--budgets"])
    assert "--budgets must name one or more" in capsys.readouterr().err


def test_auto_is_a_contender_of_the_long_run(at_hand: Path, model: Model) -> None:
    texts = ["--texts", *(str(at_hand / source.name) for source in SOURCES)]
    options = [*texts, "--tokens", "1100", "--chunk-tokens", "256", "--contenders", '{"sinks": [{}]}']
    files = ["--json", str(at_hand / "long.json"), "--profile", str(at_hand / "profile.json")]
    quality_long.main([*options, *files, "--budgets", "0.1", "0.2"])
    rows = load_long(at_hand / "long.json").rows
    assert [row.backend for row in rows] == ["sinks", "auto", "auto"] * 2
    assert [row.params for row in rows[1:3]] == [{"max_error": 0.1}, {"max_error": 0.2}]
    assert 1 > rows[1].density > rows[2].density
    auto_study.main(command(at_hand, "--repeat", "0", "--tokens", "1100"))
    studied = load_study(at_hand / "auto.json")
    (row,) = [r for r in studied.facts if r.max_error == 0.2 and r.text == "one.txt"]
    assert (row.chosen, row.generated) == (rows[2].chosen, rows[2].generated)
    save(profile(model, 0.02, 9.0, 0.15), at_hand / "profile.json")
    quality_long.main([*options, *files, "--budgets", "0.1", "--resume"])
    assert len(load_long(at_hand / "long.json").rows) == 8, "with another profile it is another contender"


def auto_row(text: str, errors: list[float], estimates: list[float], **more: Any) -> AutoRow:
    made = AutoRow(
        text=text,
        document=0,
        tokens=4096,
        prompt_tokens=4000,
        max_error=0.1,
        reason="chosen",
        layers=[0, 1, 3],
        backends=["sinks", "pooled", "exact"],
        plan=[],
        errors=errors,
        estimates=estimates,
        exact_from=[None, 3000, None],
        guarded_rows=126,
        density=0.4,
        perplexity=10.1,
        exact_perplexity=10.0,
        change_percent=1.0,
        standard_error_percent=0.1,
    )
    return replace(made, **more)


def results() -> StudyResults:
    settings = {
        "model": "tiny",
        "texts": {"a.txt": "", "b.txt": ""},
        "facts": 8,
        "chunk_tokens": 512,
        "profile": "0123456789ab",
        "profile_command": "longreach calibrate tiny a.txt",
        "calibrated_on": ["a.txt"],
    }
    context = {
        "command": "python -m models.auto_study",
        "date": "2026-01-01",
        "processor": "a processor",
        "threads": 2,
        "torch": "2.0",
        "loads_at_start": [0.25],
    }
    rows = [
        auto_row("a.txt", [0.08, 0.16, 0.0], [0.1, 0.12, 0.0]),
        auto_row("b.txt", [0.12, 0.05, 0.0], [0.06, 0.11, 0.0], change_percent=3.0, exact_from=[None] * 3),
        auto_row("b.txt", [0.0] * 3, [0.0] * 3, tokens=512, backends=["exact"] * 3, exact_from=[None] * 3),
    ]
    place = 4096, 4032, 0.1
    facts = [FactRow(name, 0, *place, *([True, False], [True] * 2) * 2) for name in ("a.txt", "b.txt")]
    facts.append(FactRow("b.txt", 0, 512, 512, 0.1, *[[True, False]] * 4))
    facts[0] = replace(facts[0], exact_generated=[True, False])
    times = [
        TimeRow("a.txt", 0, 4096, 0.1, False, [0.9, 1.8, 0.7], [1.0, 1.5, 1.0]),
        TimeRow("b.txt", 0, 4096, 0.1, False, [0.5], [1.0]),
    ]
    return StudyResults(settings, context, rows, facts, times)


def test_a_cell_counts_layer_documents_rows_and_flags() -> None:
    short, cell = cells(results())
    assert (short.tokens, short.approximated, short.repaired_rows_share, short.ratios) == (512, [], None, [])
    assert len(cell.layers) == 6 and len(cell.approximated) == 4
    assert cell.within == pytest.approx(4 / 6) and cell.far_above == pytest.approx(1 / 6)
    assert cell.repaired_rows_share == pytest.approx(1000 / 16000)
    assert sorted(cell.ratios) == pytest.approx([0.5, 0.75, 1.25, 2.2])
    assert (cell.flagged(True, True), cell.flagged(True, False), cell.flagged(False, True)) == (1, 1, 1)
    assert cell.chosen is not None and (cell.chosen.lost, cell.chosen.won) == (2, 0)
    assert cell.generated is not None and cell.generated.points == -25


def test_the_page_has_every_figure() -> None:
    page = markdown(results())
    assert "| 4,096 | 0.1 | 2 | 6 | 66.7 % | 16.7 % | 1.60 | 33.3 % | 1 | 6.2 % | 0.400 |" in page
    facts = "50.0 % | -50.0 (−2 +0, p 0.50) | 50.0 % | -25.0 (−1 +0, p 1.00)"
    assert f"| 4,096 | 0.1 | 2 | +2.00 % | +3.00 % | {facts} | 0.70 | 1.20 | 2 |" in page
    assert "| 512 | 0.1 | 1 | 3 | 100.0 % | 0.0 % | 0.00 | 100.0 % | 0 | – |" in page
    assert "| 4,096 | 0.1 | 2 | 252 | 1.00 | 0.50 | 2.20 | 1 | 1 | 1 |" in page
    assert "| a.txt 1 | 4,096 | 0.1 | 1 | pooled | 0.1600 | 1.60 | 0.1200 | 3,000 |" in page
    assert "The 2 worst of 2." in page and "3 documents of `a.txt`, `b.txt`" in page
    assert "Profile `0123456789ab` (`longreach calibrate tiny a.txt`). It was made of `a.txt` too." in page
    assert "| 0.1 | 6 | 50.0 % | -33.3 (−2 +0, p 0.50) | 50.0 % | -16.7 (−1 +0, p 1.00) |" in page
    assert "Those with facts have 4,032 tokens" in page and "read once more for them" in page
    assert "{" not in page


def test_a_profile_in_a_file_is_read_as_it_was_written(model: Model, tmp_path: Path) -> None:
    save(profile(model, 0.1, 0.2, 0.3), tmp_path / "p.json")
    assert load(tmp_path / "p.json", stamp_of(model)) == profile(model, 0.1, 0.2, 0.3)
