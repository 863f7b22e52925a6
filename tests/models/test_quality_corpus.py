"""What the texts of quality runs are made of."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from models import quality_corpus
from models.contract import ModelError


def test_a_page_becomes_its_text_a_line_per_block() -> None:
    page = (
        "<head><title>no</title></head><nav>no</nav><h1>One</h1><p>two <b>three</b></p>\n\n\n"
        "<script>no()</script><li>four</li>"
    )
    assert quality_corpus.plain(page) == "One\ntwo three\n\nfour\n"


def test_halves_make_the_whole() -> None:
    for text in ("", "a", "abc", "abcd"):
        assert quality_corpus.half(text, 1) + quality_corpus.half(text, 2) == text


def test_no_text_is_both_calibrated_and_evaluated_on() -> None:
    for names in (quality_corpus.PAGES, quality_corpus.SECTIONS, quality_corpus.MODULES):
        assert not set(names["calibrate"]) & set(names["evaluate"])


def test_a_package_that_cannot_be_had_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def failing(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 100, "", "E: Unable to locate package nothing\n")

    monkeypatch.setattr(quality_corpus.subprocess, "run", failing)
    with pytest.raises(ModelError, match="nothing could not be downloaded and unpacked: E: Unable to locate"):
        quality_corpus._unpack("nothing", tmp_path)
