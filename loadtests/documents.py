"""Documents of a wanted length, cut from the sample text, and the mix of lengths that a run sends."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

SAMPLES = Path(__file__).resolve().parents[1] / "samples"

SHORT_TOKENS = 512
MEDIUM_TOKENS = 8192
SHARES = {"short": 0.80, "medium": 0.15, "long": 0.05}


@dataclass(frozen=True)
class LengthClass:
    """Documents of ``min_tokens`` to ``max_tokens``; ``share`` of all requests, before the classes that a
    model is too short for are left out."""

    name: str
    min_tokens: int
    max_tokens: int
    share: float


def length_classes(limit_tokens: int) -> tuple[LengthClass, ...]:
    """The classes that fit ``limit_tokens``: short (up to 512), medium (up to 8,192), long (up to the limit).

    A model whose limit lies below 8,192 still gets a long class, the last quarter of what it can take:
    documents near the limit are what a long-document server has to be tested with.
    """
    if limit_tokens < 16:
        raise ValueError(f"at most {limit_tokens} input tokens are allowed; a load test needs at least 16")
    below_long = min(MEDIUM_TOKENS, limit_tokens * 3 // 4)
    short_max = min(SHORT_TOKENS, below_long)
    classes = [
        LengthClass("short", max(1, short_max // 8), short_max, SHARES["short"]),
        LengthClass("medium", short_max + 1, below_long, SHARES["medium"]),
        LengthClass("long", below_long + 1, limit_tokens, SHARES["long"]),
    ]
    return tuple(each for each in classes if each.min_tokens <= each.max_tokens)


def pick(classes: tuple[LengthClass, ...], random_: random.Random) -> tuple[LengthClass, int]:
    """One class by share, and a length in tokens drawn evenly from it."""
    chosen = random_.choices(classes, weights=[each.share for each in classes])[0]
    return chosen, random_.randint(chosen.min_tokens, chosen.max_tokens)


class Library:
    """An endless text: the sample, repeated."""

    def __init__(self, text: str) -> None:
        self._text = " ".join(text.split()) + " "
        if len(self._text) < 1000:
            raise ValueError(f"the sample text has {len(self._text)} characters; at least 1,000 are needed")

    @classmethod
    def from_samples(cls, folder: Path = SAMPLES) -> Library:
        files = sorted(folder.glob("*.txt"))
        if not files:
            raise FileNotFoundError(f"no *.txt in {folder}: the load tests cut their documents from there")
        return cls("\n".join(file.read_text(encoding="utf-8") for file in files))

    def cut(self, num_characters: int, random_: random.Random) -> str:
        """``num_characters`` from a random place on, so that no two documents share a prefix by accident."""
        start = random_.randrange(len(self._text))
        repeats = (start + num_characters) // len(self._text) + 1
        return (self._text * repeats)[start : start + num_characters]
