"""Ten long texts of five kinds, a pair of each: one to calibrate on, one to try plans on.

    python -m models.quality_corpus DIRECTORY

writes DIRECTORY/calibrate/*.txt and DIRECTORY/evaluate/*.txt: halves of a novel (npm), two presidential
messages (``samples/``), and out of Debian packages, unpacked and not installed, pages of the Python library
reference, sections of an FAQ and modules of Python's standard library. Other releases of these have other
bytes: a profile names its texts with their sha256.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

from models.contract import ModelError
from models.files import default_cache_dir
from models.quality_options import DEFAULT_TEXT
from models.quality_run import guarded, tell
from models.quality_texts import NOVEL, novel

REFERENCE = "python3.11-doc", "usr/share/doc/python3.11/html/library"
FAQ = "anarchism", "usr/share/doc/anarchism/html"
LIBRARY = ("libpython3.11-minimal", "libpython3.11-stdlib"), "usr/lib/python3.11"
PAGES = {
    "calibrate": ("argparse", "asyncio-task", "datetime", "collections", "itertools"),
    "evaluate": ("subprocess", "unittest", "typing", "threading"),
}
SECTIONS = {"calibrate": ("secF8", "secJ3"), "evaluate": ("secH3",)}
MODULES = {
    "calibrate": ("tarfile.py", "ast.py", "zipfile.py"),
    "evaluate": ("typing.py", "inspect.py", "subprocess.py"),
}
MESSAGES = {"calibrate": 1901, "evaluate": 1902}
_HIDDEN = ("script", "style", "head", "nav")
_BLOCKS = ("p", "div", "li", "dt", "dd", "h1", "h2", "h3", "pre", "tr")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m models.quality_corpus", description="Texts of five kinds.")
    parser.add_argument("directory", type=Path, metavar="DIRECTORY")
    return guarded(run, parser.parse_args(argv))


def run(options: argparse.Namespace) -> None:
    book = _read(novel(default_cache_dir(), tell))
    with tempfile.TemporaryDirectory() as unpacked:
        there = Path(unpacked)
        for package in (REFERENCE[0], FAQ[0], *LIBRARY[0]):
            _unpack(package, there)
        for number, (use, year) in enumerate(MESSAGES.items(), 1):
            texts = {
                "python-library": "\n".join(_page(there / REFERENCE[1], name) for name in PAGES[use]),
                "anarchism-faq": "".join(_page(there / FAQ[1], name) for name in SECTIONS[use]),
                "python-source": "\n".join(_read(there / LIBRARY[1] / name) for name in MODULES[use]),
                f"{NOVEL}-{number}": half(book, number),
                f"state-of-the-union-{year}": _message(year),
            }
            _write(options.directory / use, texts)


def half(text: str, number: int) -> str:
    """The first or the second."""
    middle = len(text) // 2
    return text[:middle] if number == 1 else text[middle:]


def plain(html: str) -> str:
    """What a page shows, a line per block, without what surrounds it."""
    reader = _Reader()
    reader.feed(html)
    return re.sub(r"\n\s*\n+", "\n\n", "".join(reader.parts))


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._hidden += tag in _HIDDEN

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in _HIDDEN
        if tag in _BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)


def _unpack(name: str, unpacked: Path) -> None:
    """A Debian package's files. ModelError where it cannot be had."""
    commands = [
        ["apt-get", "download", name],
        ["sh", "-c", f"for file in {name}_*.deb; do dpkg -x $file .; done"],
    ]
    for command in commands:
        try:
            done = subprocess.run(command, cwd=unpacked, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise ModelError(f"{command[0]} is not here: these texts come from Debian packages") from None
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:]
            raise ModelError(f"{name} could not be downloaded and unpacked: {' '.join(last)}")


def _page(directory: Path, name: str) -> str:
    return plain((directory / f"{name}.html").read_text(encoding="utf-8", errors="replace"))


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def _message(year: int) -> str:
    return _read(DEFAULT_TEXT.parent / f"state-of-the-union-{year}.txt")


def _write(directory: Path, texts: dict[str, str]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (directory / f"{name}.txt").write_text(text, encoding="utf-8")
        tell(f"{directory.name}/{name}.txt: {len(text):,} characters")


if __name__ == "__main__":
    sys.exit(main())
