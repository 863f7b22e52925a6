"""Real texts with facts planted in them, and questions whose answers are known.

A fact is one sentence with a code of five digits, planted between two sentences of the text; as many depths
as facts, evenly spaced. The question repeats the fact up to its code. The codes of the other facts look the
same and stand in the same text: whoever remembers only that there was a code is wrong.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from models.calibrate import Source
from models.contract import ModelError, Tokenizer
from models.fetch import Progress
from models.files import default_cache_dir
from models.quality_options import DEFAULT_TEXT
from models.quality_texts import Passage, novel, passages_of, sentence_ends
from models.runner import Model

NUM_CANDIDATES = 8
"""Codes that an answer is chosen from, the right one among them."""

ROOM_FOR_QUESTIONS = 64
"""Tokens of a model's limit that a document leaves for a question and its answer."""

_SPARE_TOKENS = 16
"""Tokens that a passage has more than its document, as it is cut into parts that are tokenised apart."""

_OFFICES = (
    "harbour office",
    "railway office",
    "county archive",
    "weather station",
    "post office",
    "city library",
    "customs house",
    "mining office",
    "survey office",
    "telegraph office",
    "grain exchange",
    "ferry terminal",
)
_CITIES = (
    "Aarhus",
    "Bergen",
    "Coimbra",
    "Dresden",
    "Esbjerg",
    "Ferrara",
    "Ghent",
    "Hamar",
    "Izmir",
    "Jena",
    "Kaunas",
    "Lyon",
    "Malaga",
    "Nantes",
    "Odense",
    "Porto",
    "Riga",
    "Split",
    "Turku",
    "Uppsala",
    "Verona",
    "Wismar",
    "Zadar",
)


@dataclass(frozen=True)
class Fact:
    """Tokens of a question, and of what may follow it: ``candidates`` of equal length, the answer first.
    ``depth``: the share of the document that stands before the fact."""

    question: list[int]
    candidates: list[list[int]]
    depth: float

    @property
    def answer(self) -> list[int]:
        return self.candidates[0]


@dataclass(frozen=True)
class Document:
    """``token_ids`` are a prompt and one token more, which is only predicted; ``planted``: which of them
    belong to facts. ``tokens`` is the length that was asked for."""

    text: str
    number: int
    tokens: int
    token_ids: list[int]
    planted: list[bool]
    facts: tuple[Fact, ...] = ()

    @property
    def prompt_tokens(self) -> int:
        return len(self.token_ids) - 1

    @property
    def told(self) -> str:
        return f"{self.text}, document {self.number + 1}, {self.tokens} tokens"


@dataclass(frozen=True)
class _Drawn:
    """A fact as text, before it is tokenised."""

    stem: str
    code: str


def sources_of(files: Sequence[Path] | None, progress: Progress) -> list[Source]:
    """The texts given, or those of ``samples/`` and a novel, which is fetched where it is not here yet.
    ModelError and OSError."""
    if files is None:
        files = [*sorted(DEFAULT_TEXT.parent.glob("*.txt")), novel(default_cache_dir(), progress)]
    names = [file.name for file in files]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"--texts: two files are called {twice[0]}, and tables name them so: rename one")
    return [Source(file.name, file.read_text(encoding="utf-8")) for file in files]


def documents_of(
    model: Model,
    sources: Sequence[Source],
    tokens: int,
    each: int,
    num_facts: int,
    seed: int,
    left_out: Callable[[str], object],
) -> list[Document]:
    """``each`` documents per text, of ``tokens`` tokens: fewer only where the model reads no more and a
    question must follow. A text without room for them is ``left_out``, with the reason."""
    found = []
    room = ROOM_FOR_QUESTIONS if num_facts else 0
    prompt_tokens = min(tokens, model.info.max_tokens - room)
    for source in sources:
        try:
            passages = passages_of(
                source.text, model.tokenizer, "", prompt_tokens + 1 + _SPARE_TOKENS, each, source.name
            )
            found += [
                planted(passage, model.tokenizer, prompt_tokens, tokens, source.name, number, num_facts, seed)
                for number, passage in enumerate(passages)
            ]
        except ModelError as error:
            left_out(f"{source.name} at {tokens} tokens: {error}")
    return found


def planted(
    passage: Passage,
    tokenizer: Tokenizer,
    prompt_tokens: int,
    tokens: int,
    name: str,
    number: int,
    num_facts: int,
    seed: int,
) -> Document:
    """The passage with facts in it, cut behind ``prompt_tokens`` tokens and one. ModelError where the facts
    would take more than half of it."""
    drawn = _draw(tokenizer, random.Random(f"{seed} {name} {number} {tokens}"), num_facts)
    sentences = [_ids(tokenizer, f" {fact.stem} {fact.code}.") for fact in drawn]
    kept_tokens = prompt_tokens + 1 - sum(map(len, sentences))
    if 2 * kept_tokens < prompt_tokens:
        raise ModelError(
            f"{num_facts} facts take {prompt_tokens + 1 - kept_tokens} of {prompt_tokens} tokens: give "
            "longer --tokens or fewer --facts"
        )
    spans = tokenizer.encode(passage.text, special_tokens=False).char_spans
    kept = passage.text[: spans[min(kept_tokens, len(spans)) - 1][1]]
    cuts = [0, *depths(kept, num_facts), len(passage.text)]
    ids, marks = _opening(tokenizer), [False] * len(_opening(tokenizer))
    facts = []
    for place, (begin, end) in enumerate(pairwise(cuts)):
        of_text = _ids(tokenizer, passage.text[begin:end])
        ids, marks = ids + of_text, marks + [False] * len(of_text)
        if place < num_facts:
            facts.append(_fact(tokenizer, drawn, place, len(ids) / prompt_tokens))
            ids, marks = ids + sentences[place], marks + [True] * len(sentences[place])
    wanted = prompt_tokens + 1
    if len(ids) < wanted:
        raise ModelError(
            f"the passage has {len(ids)} tokens in parts, {wanted} are needed: give another text"
        )
    return Document(name, number, tokens, ids[:wanted], marks[:wanted], tuple(facts))


def depths(text: str, count: int) -> list[int]:
    """Where ``count`` facts go, in the middles of as many equal stretches of the text: behind the nearest
    sentence, or the nearest word where no sentence ends in the stretch."""
    ends, found = sentence_ends(text), []
    stretch = len(text) / max(count, 1)
    for number in range(count):
        middle = (number + 0.5) * stretch
        nearest = min(ends, key=lambda end: abs(end - middle), default=0)
        if abs(nearest - middle) >= stretch / 2:
            word = text.rfind(" ", int(number * stretch), int(middle))
            nearest = word if word >= 0 else int(middle)
        found.append(nearest)
    return found


def _draw(tokenizer: Tokenizer, drawn: random.Random, count: int) -> list[_Drawn]:
    places = drawn.sample([(office, city) for office in _OFFICES for city in _CITIES], count)
    codes = _codes(tokenizer, drawn, count)
    return [
        _Drawn(f"The access code of the {office} in {city} is", code)
        for (office, city), code in zip(places, codes, strict=True)
    ]


def _codes(tokenizer: Tokenizer, drawn: random.Random, count: int) -> list[str]:
    """Different codes of five digits that are equally long in tokens."""
    by_length: dict[int, list[str]] = {}
    for code in map(str, drawn.sample(range(10_000, 100_000), 200 * (count + 1))):
        alike = by_length.setdefault(len(_ids(tokenizer, f" {code}")), [])
        alike.append(code)
        if len(alike) >= count:
            return alike[:count]
    raise ModelError(f"the tokenizer has no {count} codes of five digits that are equally long")


def _fact(tokenizer: Tokenizer, drawn: Sequence[_Drawn], place: int, depth: float) -> Fact:
    """Wrong candidates are the codes of the facts that follow, round about."""
    others = [drawn[(place + step) % len(drawn)] for step in range(NUM_CANDIDATES)]
    question = _ids(tokenizer, f"\n\n{drawn[place].stem}")
    return Fact(question, [_ids(tokenizer, f" {each.code}") for each in others], depth)


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, special_tokens=False).token_ids


def _opening(tokenizer: Tokenizer) -> list[int]:
    """Special tokens before a text."""
    encoding = tokenizer.encode("a")
    first = next(i for i, (begin, end) in enumerate(encoding.char_spans) if begin != end)
    return encoding.token_ids[:first]
