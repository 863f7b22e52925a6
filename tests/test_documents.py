"""What the documents point at is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from service.cli import backends_markdown

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "deploy").rglob("*.md"), *(ROOT / "samples").glob("*.md")])
PACKAGES = "kernels|models|service|loadtests|deploy|tests|samples"

every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))


@every_document
def test_relative_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8"))
    files = [link.partition("#")[0] for link in links if not re.match(r"[a-z]+:|#", link)]
    assert [link for link in files if not (document.parent / link).exists()] == []


@every_document
def test_files_that_are_named_exist(document: Path) -> None:
    named = re.findall(rf"`((?:{PACKAGES})/[\w./-]*\w)/?`", document.read_text(encoding="utf-8"))
    missing = [name for name in named if not (ROOT / name).exists() and not (document.parent / name).exists()]
    assert missing == []


@every_document
def test_make_targets_that_are_named_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z_-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert (
        set(re.findall(r"(?:`|^)make ([a-z_-]+)", document.read_text(encoding="utf-8"), re.MULTILINE))
        <= targets
    )


def test_the_readme_lists_the_backends_of_the_registry() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = readme.partition("--markdown` -->\n")[2].partition("\n<!-- /backends -->")[0]
    assert shown == backends_markdown(), "run `longreach backends --markdown` and paste it between the marks"
