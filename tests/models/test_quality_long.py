"""Long texts: planted facts and what is answered about them, prompts that are timed and scored, and runs."""

from __future__ import annotations

import math
import random
import sys
from dataclasses import replace
from itertools import pairwise
from math import comb
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.api import backend_names
from models import quality_answers, quality_long
from models.calibrate import Source
from models.contract import Encoding, ModelError, Slice
from models.planned import exact
from models.quality_answers import ask, mcnemar, paired
from models.quality_contenders import Contender, contender, unsuitable
from models.quality_facts import (
    NUM_CANDIDATES,
    ROOM_FOR_QUESTIONS,
    Document,
    Fact,
    depths,
    documents_of,
)
from models.quality_ladders import LONG
from models.quality_long_report import markdown, panels
from models.quality_long_rows import LongRow, lengths_within, load_long, summaries
from models.quality_perplexity import SKIPPED_TOKENS, read_text
from models.quality_plot import pyplot, write_plots
from models.quality_prompt import Outcome, PromptReading, change, read_document, read_prompt, timed
from models.quality_texts import sentence_ends
from models.runner import Model
from service import cli
from tests.models.tiny import VOCAB, bert, choice, close, llama, network, serve

LIMIT = 1600


class Letters:
    """A token for each character, a first special one; ids are too few to tell all characters apart."""

    vocab_size = VOCAB

    def encode(self, text: str, *, special_tokens: bool = True) -> Encoding:
        ids, spans = [letter(c) for c in text], [(i, i + 1) for i in range(len(text))]
        return Encoding([1, *ids], [(0, 0), *spans]) if special_tokens else Encoding(ids, spans)


def letter(c: str) -> int:
    return 5 + ord(c) % (VOCAB - 5)


def tokens_of(text: str) -> list[int]:
    return [letter(c) for c in text]


def prose(sentences: int, seed: int = 0) -> str:
    drawn = random.Random(seed)
    words = [f"{drawn.choice('bdgklmnprst')}{drawn.choice('aeiou')}{n}" for n in range(60)]
    return " ".join(" ".join(drawn.choices(words, k=drawn.randint(3, 9))) + "." for _ in range(sentences))


def tiny(make: Any = llama, **more: Any) -> Model:
    found = serve(network(lambda: make(max_position_embeddings=LIMIT, **more)), max_tokens=LIMIT)
    words: Any = Letters()
    return Model(found._network, replace(found.info, tasks=("generate", "score", "encode")), words)


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny()


SOURCES = [Source("one.txt", prose(300)), Source("two.txt", prose(300, seed=1))]


def documents(model: Model, tokens: int, each: int = 1, facts: int = 8, seed: int = 0) -> list[Document]:
    left_out: list[str] = []
    found = documents_of(model, SOURCES, tokens, each, facts, seed, left_out.append)
    assert not left_out
    return found


@pytest.mark.parametrize(
    ("tokens", "facts", "each"), [(1100, 8, 1), (1301, 9, 2), (1024, 0, 3), (1500, 12, 1)]
)
def test_documents_have_so_many_tokens_of_their_text_and_every_fact(
    model: Model, tokens: int, facts: int, each: int
) -> None:
    found = documents(model, tokens, each, facts)
    assert [(d.text, d.number) for d in found] == [(s.name, n) for s in SOURCES for n in range(each)]
    for document in found:
        assert document.prompt_tokens == tokens and len(document.planted) == tokens + 1
        assert len(document.facts) == facts and document.token_ids[0] == 1
        source = tokens_of(SOURCES[[s.name for s in SOURCES].index(document.text)].text)
        own = [t for t, planted in zip(document.token_ids, document.planted, strict=True) if not planted]
        assert contains(source, own[1:]), "what is not planted is the text, unbroken"


def contains(whole: list[int], part: list[int]) -> bool:
    return any(whole[i : i + len(part)] == part for i in range(len(whole) - len(part) + 1))


def test_a_question_leads_to_its_own_code_and_the_others_stand_in_the_text_as_well(model: Model) -> None:
    for document in documents(model, 1300):
        planted = [t for t, is_so in zip(document.token_ids, document.planted, strict=True) if is_so]
        answers = [fact.answer for fact in document.facts]
        assert len({tuple(answer) for answer in answers}) == 8
        for fact in document.facts:
            stem = fact.question[2:]
            assert fact.question[:2] == tokens_of("\n\n")
            assert contains(planted, [*tokens_of(" "), *stem, *fact.answer, *tokens_of(".")])
            assert len(fact.candidates) == NUM_CANDIDATES == len({tuple(each) for each in fact.candidates})
            assert all(each in answers and len(each) == len(fact.answer) for each in fact.candidates)


def test_facts_lie_at_even_depths_behind_sentences(model: Model) -> None:
    (document, _) = documents(model, 1500)
    found = [fact.depth for fact in document.facts]
    assert found == sorted(found)
    assert all(abs(depth - (i + 0.5) / 8) < 0.5 / 8 for i, depth in enumerate(found))
    starts = [i for i, (a, b) in enumerate(pairwise(document.planted), 1) if b and not a]
    assert len(starts) == 8 and all(document.token_ids[i - 1] == letter(".") for i in starts)


def test_depths_fall_back_to_words_and_then_to_anything() -> None:
    text = "One. Two two two. Three three."
    assert sentence_ends(text) == [4, 17, 30] and depths(text, 0) == []
    assert depths(text, 1) == [17]
    words = "word " * 100
    assert all(words[place] == " " for place in depths(words, 7)) and len(set(depths(words, 7))) == 7
    assert depths("x" * 100, 4) == [12, 37, 62, 87]


def test_facts_depend_on_the_seed_and_the_document_alone(model: Model) -> None:
    once, again, other = (documents(model, 1200, seed=seed) for seed in (0, 0, 1))
    assert once == again
    assert all(a.facts != b.facts for a, b in zip(once, other, strict=True))
    assert once[0].facts != once[1].facts


def test_at_the_models_limit_a_document_leaves_room_for_a_question(model: Model) -> None:
    (document, _) = documents(model, LIMIT)
    assert document.tokens == LIMIT and document.prompt_tokens == LIMIT - ROOM_FOR_QUESTIONS
    assert documents(model, LIMIT, facts=0)[0].prompt_tokens == LIMIT


def test_texts_without_room_are_left_out_with_the_reason(model: Model) -> None:
    told: list[str] = []
    short = Source("short.txt", prose(20))
    found = documents_of(model, [short, SOURCES[0]], 1300, 1, 8, 0, told.append)
    assert [document.text for document in found] == ["one.txt"]
    assert len(told) == 1 and "short.txt at 1300 tokens: short.txt has no room" in told[0]
    assert not documents_of(model, SOURCES[:1], 512, 1, 8, 0, told.append)
    assert "8 facts take" in told[1] and "fewer --facts" in told[1]


def test_a_prompt_is_scored_as_by_the_model_itself(model: Model) -> None:
    (document, _) = documents(model, 1100)
    wanted = read_text(model, document.token_ids, choice(), 0).scores
    for chunk_tokens in (0, 300, 512):
        sequence = model.open(document.prompt_tokens)
        reading = read_prompt(model, sequence, document.token_ids, exact(), chunk_tokens, scored=True)
        assert close(reading.scores, wanted) and sequence.length == document.prompt_tokens
        assert 0 < reading.work.attention_ms / 1e3 < reading.seconds
        sequence.close()
    plain = timed(model, document.token_ids, choice("window", window=9), 300)
    assert plain.scores is None and plain.work.pairs_kept < plain.work.pairs_exact


def test_only_the_last_step_of_a_prompt_gives_logits(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    wants: list[tuple[str, int]] = []
    real = Model.step

    def step(self: Model, slices: Any) -> Any:
        wants.extend((s.want, len(s.logit_rows)) for s in slices)
        return real(self, slices)

    monkeypatch.setattr(Model, "step", step)
    ids = documents(model, 1100)[0].token_ids
    timed(model, ids, exact(), 512)
    read_prompt(model, model.open(1100), ids, exact(), 512, scored=True)
    assert wants == [
        ("nothing", 0),
        ("nothing", 0),
        ("logits", 0),
        ("hidden", 0),
        ("hidden", 0),
        ("hidden", 1),
    ]


def test_planted_tokens_and_the_first_ones_do_not_count_in_the_perplexity() -> None:
    T = SKIPPED_TOKENS + 200
    document = Document("t", 0, T, [0] * (T + 1), [False] * 100 + [True] * 20 + [False] * (T - 119))
    scores = torch.randn(T)
    exact_scores = scores.clone()
    exact_scores[:SKIPPED_TOKENS] += 5.0
    exact_scores[99:119] -= 7.0
    told = [PromptReading(1.0, None, each) for each in (scores, exact_scores)]  # type: ignore[arg-type]
    same = change(document, *told)
    assert same.percent == 0 and same.perplexity == same.exact_perplexity
    scores[119] -= 1.0
    counted = T - SKIPPED_TOKENS - 20
    assert change(document, *told).percent == pytest.approx(100 * math.expm1(1 / counted), rel=1e-4)
    with pytest.raises(ValueError, match="leaves no token to score"):
        change(replace(document, planted=[True] * (T + 1)), *told)


def every_likelihood(model: Model, document: Document, fact: Fact) -> list[float]:
    """By reading prompt, question and candidate whole."""
    found = []
    for candidate in fact.candidates:
        ids = [*document.token_ids[:-1], *fact.question, *candidate]
        scores = read_text(model, ids, choice(), 0).scores[-len(candidate) :]
        found.append(float(scores.double().sum()))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_a_chosen_answer_is_likelier_than_every_other(model: Model, seed: int) -> None:
    (document, _) = documents(model, 1100, seed=seed)
    rng = random.Random(seed)
    facts = []
    for fact in document.facts:
        mixed = list(fact.candidates)
        rng.shuffle(mixed)
        near = [*mixed[0][:-1], letter(rng.choice("0123456789"))]  # shares all but its last token
        facts.append(replace(fact, candidates=[mixed[0], near, *mixed[1:]]))
    facts = [fact for fact in facts if fact.candidates[0] != fact.candidates[1]]
    document = replace(document, facts=tuple(facts))
    sequence = model.open(1100)
    read_prompt(model, sequence, document.token_ids, exact(), 0)
    found = ask(model, sequence, document)
    assert sequence.length == 1100
    for fact, chosen in zip(facts, found.chosen, strict=True):
        own, *others = every_likelihood(model, document, fact)
        assert chosen == (own > max(others))


def test_most_wrong_candidates_need_no_forward(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    (document, _) = documents(model, 1100)
    read: list[list[int]] = []
    real = quality_answers._follow
    monkeypatch.setattr(
        quality_answers,
        "_follow",
        lambda *given: (read.append([*given[3]]), real(*given))[1],  # type: ignore[func-returns-value]
    )
    read_document(model, document, exact(), 0)
    assert len(document.facts) <= len(read) < len(document.facts) * NUM_CANDIDATES


def test_a_generated_answer_is_what_greedy_decoding_says(model: Model) -> None:
    (document, _) = documents(model, 1100)
    sequence = model.open(1100)
    read_prompt(model, sequence, document.token_ids, exact(), 0)
    facts = []
    for number, fact in enumerate(document.facts):
        fork = model.fork(sequence, 1300)
        logits = model.step([Slice(fork, fact.question, exact(), "logits", 1100)]).results[0].logits
        said: list[int] = []
        while len(said) < 6:
            assert logits is not None
            said.append(int(logits.argmax()))
            logits = model.step([Slice(fork, said[-1:], exact(), "logits", 1100)]).results[0].logits
        wrong = [*said[:-1], (said[-1] + 1) % VOCAB] if number % 2 else said
        facts.append(replace(fact, candidates=[wrong, *fact.candidates[1:]]))
    assert ask(model, sequence, replace(document, facts=tuple(facts))).generated == [True, False] * 4


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (0, 5), (5, 0), (3, 9), (7, 7), (1, 0)])
def test_mcnemars_test_counts_splits_at_least_as_uneven(lost: int, won: int) -> None:
    n = lost + won
    splits = sum(comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= abs(lost - won))
    assert mcnemar(lost, won) == pytest.approx(splits / 2**n)


def test_a_pair_counts_what_only_one_answers() -> None:
    found = paired([True, True, False, False, False], [True, False, True, True, True])
    assert found is not None
    assert (found.questions, found.lost, found.won, found.share, found.exact_share) == (5, 3, 1, 0.4, 0.8)
    assert found.points == pytest.approx(-40)
    assert paired([], []) is None


def test_a_model_reads_the_lengths_that_it_can() -> None:
    told: list[str] = []
    assert lengths_within(8192, [32768, 4096, 8192, 4096], told.append) == [4096, 8192]
    assert told == ["32768 tokens: the model reads 8192"]
    with pytest.raises(ModelError, match="--tokens 4096: the model reads 512 at most"):
        lengths_within(512, [8192, 4096], told.append)


def test_every_backend_that_reads_a_prompt_is_in_the_long_run_at_several_settings() -> None:
    able = set(backend_names()) - set(unsuitable(causal=True))
    assert set(LONG.settings) == able
    assert all(len(settings) > 1 for name, settings in LONG.settings.items() if name != "exact")
    found = [contender(name, params) for name, settings in LONG.settings.items() for params in settings]
    assert len({each.key for each in found}) == len(found)
    for name, settings in LONG.brief.items():
        assert all(each in LONG.settings[name] for each in settings)


CONTENDERS = '{"exact": [{}], "window": [{"window": 9}], "sinks": [{"window": 256}]}'


@pytest.fixture
def at_hand(model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The tiny model in place of the demo model; a directory with two texts."""
    monkeypatch.setattr(quality_long, "load_model", lambda name, source, progress: model)
    for source in SOURCES:
        (tmp_path / source.name).write_text(source.text, encoding="utf-8")
    return tmp_path


def command(where: Path, *more: str) -> list[str]:
    texts = [str(where / source.name) for source in SOURCES]
    files = ["--json", str(where / "long.json"), "--markdown", str(where / "long.md")]
    sizes = ["--tokens", "1024", "--chunk-tokens", "256"]
    return ["--texts", *texts, *sizes, "--contenders", CONTENDERS, *files, *more]


def test_a_run_writes_a_row_per_document_and_contender_and_goes_on(at_hand: Path) -> None:
    assert quality_long.main(command(at_hand, "--budgets")) == 0
    found = load_long(at_hand / "long.json")
    names = ["exact", "window", "sinks"]
    assert [(row.text, row.backend) for row in found.rows] == [(s.name, n) for s in SOURCES for n in names]
    for row in found.rows:
        same = row.backend == "exact"
        assert (row.change_percent == 0) == same and (row.density == 1) == same
        assert len(row.chosen) == len(row.generated) == 8 and row.prefill_s > 0
        assert not same or (row.chosen, row.generated) == (row.exact_chosen, row.exact_generated)
    quality_long.main(command(at_hand, "--budgets", "--tokens", "1024", "1100", "--resume"))
    more = load_long(at_hand / "long.json")
    assert more.rows[:6] == found.rows and {row.tokens for row in more.rows[6:]} == {1100}
    quality_long.main(command(at_hand, "--budgets", "--tokens", "1024", "1100", "--resume"))
    assert load_long(at_hand / "long.json") == more, "a run that measures nothing leaves no trace"
    page = (at_hand / "long.md").read_text(encoding="utf-8")
    assert "longreach bench quality --texts one.txt two.txt --tokens 1024" in page
    assert str(at_hand) not in page and "## 1,024 tokens" in page and "## 1,100 tokens" in page
    assert all(line.count("|") > 3 for line in page.splitlines() if line.startswith("|"))


def test_what_is_read_at_the_shortest_length_alone_is_not_read_at_one_that_is_added(
    at_hand: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def contenders(*args: object) -> list[Contender]:
        return [contender("exact", {}), contender("window", {"window": 9}, brief=True)]

    monkeypatch.setattr(quality_long, "contenders_of", contenders)
    quality_long.main(command(at_hand, "--budgets"))
    quality_long.main(command(at_hand, "--budgets", "--tokens", "1100", "--resume"))
    found = [(row.tokens, row.backend) for row in load_long(at_hand / "long.json").rows]
    assert set(found) == {(1024, "exact"), (1024, "window"), (1100, "exact")}


def test_texts_may_be_added_to_a_run(at_hand: Path) -> None:
    one, two = (
        ["--texts", *(str(at_hand / source.name) for source in some)] for some in (SOURCES[:1], SOURCES)
    )
    quality_long.main(command(at_hand, "--budgets", *one))
    before = load_long(at_hand / "long.json").rows
    quality_long.main(command(at_hand, "--budgets", *two, "--resume"))
    found = load_long(at_hand / "long.json")
    assert found.rows[:3] == before and [row.text for row in found.rows[3:]] == [SOURCES[1].name] * 3
    assert list(found.settings["texts"]) == [source.name for source in SOURCES]
    with pytest.raises(SystemExit, match="other settings: texts"):
        quality_long.main(command(at_hand, "--budgets", *one, "--resume"))


def test_a_run_without_facts_asks_nothing(at_hand: Path) -> None:
    quality_long.main(command(at_hand, "--budgets", "--facts", "0", "--tokens", "500"))
    assert all(not row.chosen for row in load_long(at_hand / "long.json").rows)
    page = (at_hand / "long.md").read_text(encoding="utf-8")
    assert "planted" not in page and "points" not in page


def test_a_file_of_other_texts_or_facts_is_not_gone_on_with(at_hand: Path) -> None:
    quality_long.main(command(at_hand, "--budgets"))
    with pytest.raises(SystemExit, match=r"other settings: facts \(8, now 9\)"):
        quality_long.main(command(at_hand, "--budgets", "--facts", "9", "--resume"))
    (at_hand / "two.txt").write_text(prose(290), encoding="utf-8")
    with pytest.raises(SystemExit, match="other settings: texts"):
        quality_long.main(command(at_hand, "--budgets", "--resume"))
    with pytest.raises(SystemExit, match="is there already"):
        quality_long.main(command(at_hand, "--budgets"))
    (at_hand / "long.json").write_text("{}")
    with pytest.raises(SystemExit, match="holds no results of this command"):
        quality_long.main(command(at_hand, "--budgets", "--resume"))


def test_exact_is_read_again_after_so_many_others(at_hand: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real_read, real_timed = quality_long.read_document, quality_long.timed

    def read_one(model: Model, document: Document, choice: Any, chunk_tokens: int) -> Outcome:
        read.append(choice.backend)
        return real_read(model, document, choice, chunk_tokens)

    def time_one(*given: Any, scored: bool) -> PromptReading:
        assert scored, "as the others are: what is timed must be the same work"
        read.append(f"{given[2].backend} again")
        return real_timed(*given, scored=scored)

    monkeypatch.setattr(quality_long, "read_document", read_one)
    monkeypatch.setattr(quality_long, "timed", time_one)
    widths = ", ".join(f'{{"window": {width}}}' for width in (8, 16, 32))
    asked = ["--contenders", f'{{"window": [{widths}]}}', "--turns", "2", "--budgets"]
    quality_long.main(command(at_hand, *asked, "--texts", str(at_hand / "one.txt")))
    assert read == ["exact", "window", "window", "exact again", "window"]
    rows = load_long(at_hand / "long.json").rows
    assert rows[0].exact_prefill_s == rows[1].exact_prefill_s != rows[2].exact_prefill_s


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--tokens", "9999"], "--tokens 9999: the model reads 1600 at most"),
        (["--contenders", '{"pooled": [{}]}', "--chunk-tokens", "100"], "cuts the query tiles of pooled"),
        (["--texts", "nowhere.txt"], "No such file"),
        (["--contenders", '{"nope": [{}]}'], "unknown attention backend 'nope'"),
        (["--tokens", "400"], "no text has room for a document"),
    ],
)
def test_what_cannot_be_read_is_told_before_anything_is_written(
    at_hand: Path, more: list[str], told: str
) -> None:
    with pytest.raises(SystemExit, match=told):
        quality_long.main(command(at_hand, "--budgets", *more))
    assert not (at_hand / "long.json").exists()


@pytest.mark.parametrize(
    "argv", [["--facts", "3"], ["--facts", "65"], ["--budgets", "0"], ["--budgets", "1.5"], ["--resume"]]
)
def test_options_that_make_no_sense_are_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        quality_long.main(argv)
    assert caught.value.code == 2 and "error:" in capsys.readouterr().err


def test_two_texts_of_one_name_are_refused(at_hand: Path) -> None:
    (at_hand / "more").mkdir()
    (at_hand / "more" / "one.txt").write_text("x")
    with pytest.raises(SystemExit, match=r"two files are called one\.txt"):
        quality_long.main(
            command(at_hand, "--texts", str(at_hand / "one.txt"), str(at_hand / "more/one.txt"))
        )


def test_an_encoder_is_refused(at_hand: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_long, "load_model", lambda *_, **__: serve(network(bert)))
    with pytest.raises(SystemExit, match="predicts no tokens: give a decoder"):
        quality_long.main(command(at_hand, "--budgets"))


def long_row(backend: str, change: float, share: float, text: str = "one.txt", **full: Any) -> LongRow:
    return LongRow(
        text=text,
        document=0,
        tokens=4096,
        prompt_tokens=4096,
        backend=backend,
        params=full,
        full=full,
        perplexity=10 * (1 + change / 100),
        exact_perplexity=10.0,
        change_percent=change,
        standard_error_percent=0.25,
        prefill_s=share,
        exact_prefill_s=1.0,
        attention_s=share / 4,
        exact_attention_s=0.5,
        density=0.5,
        chosen=[True, False],
        exact_chosen=[True, True],
        generated=[False, False],
        exact_generated=[False, True],
    )


def a_run() -> quality_long.LongResults:
    settings = {"model": "tiny", "texts": {"one.txt": "", "two.txt": ""}, "facts": 8, "chunk_tokens": 512}
    context = {
        "command": "longreach bench quality",
        "date": "2026-01-01",
        "processor": "a processor",
        "threads": 2,
        "torch": "2.0",
        "loads_at_start": [0.25],
        "left_out": ["32768 tokens: the model reads 8192"],
    }
    rows = [
        long_row("window", 21.0, 0.5, window=9),
        long_row("window", 0.0, 0.7, "two.txt", window=9),
        long_row("auto", 1.0, 0.8, max_error=0.1),
        long_row("exact", 0.0, 1.0),
    ]
    return quality_long.LongResults(settings, context, rows)


def test_a_summary_is_over_documents() -> None:
    window, auto, _ = summaries(a_run(), 4096)
    assert window.change_percent == pytest.approx(10.0) and window.worst_percent == 21.0
    assert window.prefill_share == pytest.approx(0.6) and window.largest_prefill_share == 0.7
    assert window.attention_share == pytest.approx(0.3) and len(auto.rows) == 1
    assert window.chosen is not None and (window.chosen.lost, window.chosen.won) == (2, 0)
    assert summaries(a_run(), 8192) == []


def test_the_report_has_every_figure_and_says_what_was_left_out() -> None:
    page = markdown(a_run(), ["long-4k.png"])
    facts = "50.0 % | -50.0 (−2 +0, p 0.50) | 0.0 % | -50.0 (−2 +0, p 0.50) |"
    assert f"| window | window=9 | 2 | +10.00 % | +21.00 % | 60 % | 70 % | 30 % | 0.500 | {facts}" in page
    assert "| auto | max_error=0.1 | 1 | +1.00 % |" in page
    assert "| window | window=9 | +21.00 ± 0.25 % | +0.00 ± 0.25 % |" in page
    assert "| auto | max_error=0.1 | +1.00 ± 0.25 % | – |" in page
    assert "Left out: 32768 tokens: the model reads 8192." in page
    assert "](long-4k.png)" in page and "2026-01-01" in page and "{" not in page


def test_auto_is_drawn_among_the_backends(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (file,) = write_plots(a_run(), tmp_path / "long", panels)
    assert file.name == "long-4k.png" and file.read_bytes().startswith(b"\x89PNG")
    figure, axes = pyplot().subplots()
    panel, facts = panels(a_run(), 4096)
    panel.dress(axes)
    (line,) = [line for line in axes.lines if line.get_linewidth() == 4]
    assert sorted(line.get_xdata()) == [0.6, 0.8], "neither beats the other"
    assert {row.backend for row in facts.rows} == {"window", "auto"}
    pyplot().close(figure)


def test_bench_becomes_the_process_that_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """No parent waits beside it, which could be killed and leave it running."""
    became: list[tuple[str, list[str]]] = []

    def execv(path: str, arguments: list[str]) -> None:
        became.append((path, arguments))
        raise SystemExit(3)

    monkeypatch.setattr("os.execv", execv)
    for given in (["quality", "--facts", "0"], ["--quick"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(["bench", *given])
        assert caught.value.code == 3
    assert became == [
        (sys.executable, [sys.executable, "-m", "models.quality_long", "--facts", "0"]),
        (sys.executable, [sys.executable, "-m", "kernels.bench", "--quick"]),
    ]
