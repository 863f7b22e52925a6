"""The random networks of the chaos run: files that the loader takes, the same every time, and that can do all
that is asked of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtests.tiny_models import main, serve_flags, write_models
from models.contract import Slice
from models.loader import load_model
from tests.models.tiny import choice


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("tiny"))


def test_the_files_are_the_same_every_time(written: dict[str, Path], tmp_path: Path) -> None:
    again = write_models(tmp_path)
    for name, path in written.items():
        files = sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())
        assert len(files) >= 4
        assert all((path / file).read_bytes() == (again[name] / file).read_bytes() for file in files)


def test_the_decoder_generates_scores_and_chats(written: dict[str, Path]) -> None:
    model = load_model("tiny-decoder", str(written["tiny-decoder"]))
    assert {"generate", "score"} <= set(model.info.tasks)
    text = model.tokenizer.chat([{"role": "user", "content": "Zoë, why?\n"}])
    ids = model.tokenizer.encode(text).token_ids
    assert model.tokenizer.decode(ids) == text and "Zoë, why?" in text
    logits = model.step([Slice(model.open(len(ids)), ids, choice(), "logits", len(ids))]).results[0].logits
    assert logits is not None and logits.shape == (model.tokenizer.vocab_size,) and float(logits.std()) > 0


def test_the_encoder_pools_by_mean(written: dict[str, Path]) -> None:
    model = load_model("tiny-encoder", str(written["tiny-encoder"]))
    assert model.info.tasks == ("encode",) and model.info.pooling == "mean" and not model.info.notes


def test_the_command_prints_the_flags_that_serve_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 0
    paths = {name: tmp_path / name for name in ("tiny-decoder", "tiny-encoder")}
    assert capsys.readouterr().out.split() == serve_flags(paths)
